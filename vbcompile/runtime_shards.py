"""Files of our own for weights that live on disk and are in no checkpoint.

A shard is a safetensors file whose tensors are plain bytes, with a CRC-32 of every piece in its metadata. It is written
under another name and renamed when it is complete, and no later run looks for it: what an interrupted run leaves behind
is never trusted, only removed.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vbcompile.runtime_disk import StorageError, file_identity
from vbcompile.runtime_sources import DiskBytes
from vbcompile.vgpu_files import BLOCK, create_file, synchronise, write_at
from vbcompile.vgpu_plan import padded
from vbcompile.vgpu_size import MIB

log = logging.getLogger(__name__)

CHECKSUM_BYTES = 8 * MIB
"""Bytes that one checksum covers."""

_PREFIX = "vbcompile"
_numbers = itertools.count()


class Shard:
    """A new file that holds tensors, removed when this object is dropped or the process ends.

    Space for the whole file is reserved before ``load`` is called for the first time. One tensor at a time is held.

    Args:
        folder: Created if need be. Files of processes that have died are removed from it.
        sizes: Bytes of each tensor.
        load: Gives a tensor by name: contiguous, on any device, of as many bytes.

    Attributes:
        sources: Where each tensor's bytes are, with their checksums.

    Raises:
        StorageError: the folder cannot be written to, or the disk has no room. Nothing is left behind.
        ValueError: a tensor has not the size that was announced.
    """

    def __init__(self, folder: str | os.PathLike[str], sizes: Mapping[str, int], load: Callable[[str], Tensor]) -> None:
        place = Path(folder).absolute()  # the process may go to another folder
        with _storage_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            _remove_orphans(place)
        name = f"{_PREFIX}-{socket.gethostname()}-{os.getpid()}-{next(_numbers)}.safetensors"
        partial, final = place / f"{name}.partial", place / name
        try:
            with _storage_errors(partial):
                begin, checksums = _write(partial, sizes, load)
                partial.rename(final)
                synchronise(place)
                identity = file_identity(final.stat())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self._finalizer = weakref.finalize(self, _remove, final, os.getpid())
        self.sources: dict[str, DiskBytes] = {}
        for key, nbytes in sizes.items():
            self.sources[key] = DiskBytes(final, begin, nbytes, identity, tuple(checksums[key]), CHECKSUM_BYTES)
            begin += nbytes


def _write(file: Path, sizes: Mapping[str, int], load: Callable[[str], Tensor]) -> tuple[int, dict[str, list[int]]]:
    """(first byte of the data, checksums of each tensor)."""
    checksums = {name: [0] * -(-nbytes // CHECKSUM_BYTES) for name, nbytes in sizes.items()}
    begin = len(_header(sizes, checksums))
    descriptor = create_file(file)
    try:
        _reserve(descriptor, file, begin + sum(sizes.values()))
        offset = begin
        for name, nbytes in sizes.items():
            data = load(name).detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            if data.numel() != nbytes:
                raise ValueError(f"tensor {name!r} has {data.numel()} bytes, not the {nbytes} that were announced")
            checksums[name] = _write_pieces(descriptor, data, offset)
            offset += nbytes
        _write_all(descriptor, _header(sizes, checksums), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return begin, checksums


def _header(sizes: Mapping[str, int], checksums: Mapping[str, list[int]]) -> bytes:
    """The file's first bytes; their number depends on the sizes alone, and the data begins on a block."""
    crc = {name: "".join(f"{value:08x}" for value in values) for name, values in checksums.items()}
    entries: dict[str, object] = {"__metadata__": {"crc32": json.dumps(crc), "crc32_bytes": str(CHECKSUM_BYTES)}}
    offset = 0
    for name, nbytes in sizes.items():
        entries[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(entries).encode()
    length = padded(8 + len(text), BLOCK) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _reserve(descriptor: int, file: Path, nbytes: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if free < nbytes:
        raise StorageError(file, 0, nbytes, free, "the disk has no room: free space, or name another folder")
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)


def _write_pieces(descriptor: int, data: Tensor, offset: int) -> list[int]:
    found = []
    for first in range(0, data.numel(), CHECKSUM_BYTES):
        piece = data[first : first + CHECKSUM_BYTES].numpy().data
        found.append(zlib.crc32(piece))
        _write_all(descriptor, piece, offset + first)
    return found


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while len(rest):
        count = write_at(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


@contextlib.contextmanager
def _storage_errors(file: Path) -> Iterator[None]:
    """Errors of the operating system as :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(file, 0, "to write", "an error", error.strerror or str(error)) from error


def _remove(file: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked child: its parent still reads the file
        return
    try:
        file.unlink(missing_ok=True)
    except OSError as error:  # Windows, while it is open; the next run removes it
        log.warning("%s was not removed: %s", file, error.strerror or error)


def _remove_orphans(folder: Path) -> None:
    """Shards of processes of this machine that have ended without removing them."""
    for file in folder.glob(f"{_PREFIX}-{socket.gethostname()}-*"):
        owner = file.name.removeprefix(f"{_PREFIX}-{socket.gethostname()}-").partition("-")[0]
        if owner.isdigit() and not _is_alive(int(owner)):
            log.info("removing %s: the process that wrote it has ended", file)
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(process))
