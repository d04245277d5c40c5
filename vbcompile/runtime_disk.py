"""Weights that stay on disk: unbuffered reads by a few threads, straight out of safetensors files or shards of our own.

Files are never mapped into memory: a mapped file that is truncated under its reader ends the process (SIGBUS), a read
returns fewer bytes and is reported. Where a file system refuses unbuffered reads, buffered ones are used.
"""

import errno
import json
import logging
import os
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbcompile.runtime_sources import DiskBytes
from vbcompile.vgpu_files import BLOCK, open_unbuffered, read_at
from vbcompile.vgpu_size import MIB

log = logging.getLogger(__name__)

_LARGEST_HEADER = 100 * MIB  # what the safetensors format allows


class StorageError(OSError):
    """A file does not hold what it should.

    Attributes:
        file: Its path.
        offset: Where in the file.
        wanted: Bytes (or what else) expected there.
        got: What was found.
    """

    def __init__(self, file: str | os.PathLike[str], offset: int, wanted: Any, got: Any, reason: str) -> None:
        super().__init__(f"{os.fspath(file)}: {reason} (at byte {offset}: wanted {wanted}, got {got})")
        self.file, self.offset, self.wanted, self.got = Path(file), offset, wanted, got


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a safetensors file: its bytes, dtype as safetensors spells it (``BF16``), and shape."""

    source: DiskBytes
    dtype: str
    shape: tuple[int, ...]


def file_identity(status: os.stat_result) -> tuple[int, int]:
    """(size in bytes, modification time in ns): differs once a file is written to."""
    return status.st_size, status.st_mtime_ns


def safetensors_contents(file: str | os.PathLike[str]) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, from the header alone.

    Raises:
        StorageError: missing, truncated, or a header that contradicts itself or the file's size.
    """
    path = Path(file).absolute()  # the process may go to another folder
    try:
        with path.open("rb") as stream:
            identity = file_identity(os.fstat(stream.fileno()))
            length = int.from_bytes(_exactly(stream, path, 0, 8), "little")
            if length > min(_LARGEST_HEADER, identity[0] - 8):
                raise StorageError(path, 0, f"a header of at most {identity[0] - 8} bytes", length, "truncated file")
            header = _parse_header(path, _exactly(stream, path, 8, length))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(path, 0, "a safetensors file", "nothing", error.strerror or str(error)) from error
    metadata = header.pop("__metadata__", {})
    begin = 8 + length
    return {name: _file_tensor(path, identity, begin, name, entry) for name, entry in header.items()}, metadata


class OpenFiles:
    """Files that are open for reading, each opened once: unbuffered where its file system allows that.

    Args:
        direct: False: never unbuffered.
    """

    def __init__(self, *, direct: bool = True) -> None:
        self._direct = direct
        self._lock = threading.Lock()
        self._open: dict[Path, tuple[int, bool]] = {}

    def read(self, source: DiskBytes, begin: int, memory: Tensor, wanted: int) -> None:
        """Read into ``memory`` from byte ``begin`` of the file; at least ``wanted`` bytes must be there.

        Raises:
            StorageError: the file is missing, ends too early, is not the one that ``source`` describes, or the device
                reports an error.
        """
        try:
            descriptor, direct = self._descriptor(source.file)
            self._require_same(source, descriptor)
            if direct and not _unbuffered(descriptor, memory, begin, wanted, source.file):
                descriptor = self._buffered(source.file)
                direct = False
            if not direct:
                _fill(descriptor, memory[:wanted], begin, wanted, source.file)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(source.file, begin, wanted, 0, error.strerror or str(error)) from error

    def is_direct(self, file: Path) -> bool:
        """Whether this file is read past the page cache."""
        return self._descriptor(file)[1]

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, file: Path) -> tuple[int, bool]:
        with self._lock:
            if file not in self._open:
                self._open[file] = open_unbuffered(file, direct=self._direct)
            return self._open[file]

    def _buffered(self, file: Path) -> int:
        """Give up unbuffered reads of a file whose file system refuses them only when it comes to reading."""
        with self._lock:
            descriptor, direct = self._open[file]
            if direct:
                log.warning("%s: the file system refuses unbuffered reads; reading through the page cache", file)
                set_buffered(descriptor)
                self._open[file] = descriptor, False
            return descriptor

    def _require_same(self, source: DiskBytes, descriptor: int) -> None:
        found = file_identity(os.fstat(descriptor))
        if found[0] < source.offset + source.nbytes:
            there = max(found[0] - source.offset, 0)
            raise StorageError(source.file, source.offset, source.nbytes, there, "the file has been truncated")
        if found != source.identity:
            reason = "the file has been changed, by its size and time of last write"
            raise StorageError(source.file, source.offset, source.identity, found, reason)


def set_buffered(descriptor: int) -> None:
    """Take the flag for unbuffered reads off an open file; other threads may be reading from it."""
    import fcntl  # only where there is O_DIRECT to take off

    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _unbuffered(descriptor: int, memory: Tensor, begin: int, wanted: int, file: Path) -> bool:
    """Whether the read went through; False where it is refused for its alignment."""
    if memory.data_ptr() % BLOCK or begin % BLOCK or memory.numel() % BLOCK:
        return False
    try:
        _fill(descriptor, memory, begin, wanted, file)
    except OSError as error:
        if isinstance(error, StorageError) or error.errno != errno.EINVAL:
            raise
        return False
    return True


def _fill(descriptor: int, memory: Tensor, begin: int, wanted: int, file: Path) -> None:
    """Read until ``wanted`` bytes are there; a read may return less than it was asked for."""
    room = memory.numpy().data
    got = 0
    while got < wanted:
        count = read_at(descriptor, room[got:], begin + got)
        if count == 0:
            raise StorageError(file, begin, wanted, got, "the file ends too early")
        got += count


def disk_bytes(file: str | os.PathLike[str], offset: int, nbytes: int) -> DiskBytes:
    """A stretch of a file as it is now.

    Raises:
        StorageError: there is no such file, or it is too short.
    """
    path = Path(file)
    try:
        identity = file_identity(path.stat())
    except OSError as error:
        raise StorageError(path, offset, nbytes, 0, error.strerror or str(error)) from error
    if offset < 0 or offset + nbytes > identity[0]:
        raise StorageError(path, offset, nbytes, max(identity[0] - offset, 0), "the file is too short")
    return DiskBytes(path, offset, nbytes, identity)


def verify_checksums(source: DiskBytes, payload: Tensor) -> None:
    """Compare bytes with the checksums that were written with them.

    Raises:
        StorageError: one differs; it names the first byte of the piece.
    """
    for number, wanted in enumerate(source.checksums):
        begin = number * source.checksum_bytes
        got = zlib.crc32(payload[begin : begin + source.checksum_bytes].numpy().data)
        if got != wanted:
            raise StorageError(
                source.file, source.offset + begin, f"{wanted:#010x}", f"{got:#010x}", "checksum mismatch: damaged file"
            )


def read_bytes(source: DiskBytes) -> Tensor:
    """All bytes of a stretch of a file, verified where there are checksums: uint8, one dimension, on the CPU.

    Raises:
        StorageError: they could not be read, or are not what was written.
    """
    memory = torch.empty(source.nbytes, dtype=torch.uint8)
    files = OpenFiles(direct=False)
    try:
        files.read(source, source.offset, memory, source.nbytes)
    finally:
        files.close()
    verify_checksums(source, memory)
    return memory


def _exactly(stream: Any, path: Path, offset: int, nbytes: int) -> bytes:
    found = stream.read(nbytes)
    if len(found) != nbytes:
        raise StorageError(path, offset, nbytes, len(found), "truncated file")
    return bytes(found)


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StorageError(path, 8, "a JSON header", f"{len(text)} bytes that are none", str(error)) from error
    if not isinstance(header, dict):
        raise StorageError(path, 8, "a JSON object", type(header).__name__, "malformed header")
    return header


def _file_tensor(path: Path, identity: tuple[int, int], begin: int, name: str, entry: Any) -> FileTensor:
    try:
        first, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        sane = all(type(value) is int and value >= 0 for value in (first, end, *shape)) and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError) as error:
        raise StorageError(path, 8, f"dtype, shape and offsets of {name!r}", entry, "malformed header") from error
    if not sane or end < first:
        raise StorageError(path, 8, f"dtype, shape and offsets of {name!r}", entry, "malformed header")
    if begin + end > identity[0]:
        there = max(identity[0] - begin - first, 0)
        raise StorageError(path, begin + first, end - first, there, f"truncated in tensor {name!r}")
    return FileTensor(DiskBytes(path, begin + first, end - first, identity), dtype, shape)
