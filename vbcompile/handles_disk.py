"""Weights that host memory has no room for, written to a file of our own on the disk level.

The file has its full size before anything is written, so that a full disk shows at once, and it gets its name when it
is complete, so that an interrupted run leaves nothing that a later one would trust. It goes with the model.
"""

import errno
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vbcompile.handles_memory import fill
from vbcompile.runtime_disk import BLOCK, StorageError, file_identity
from vbcompile.runtime_sources import DiskBytes
from vbcompile.vgpu_plan import padded
from vbcompile.vgpu_size import MIB

_PIECE = 8 * MIB

Content = tuple[Tensor, Callable[[], Tensor]]
"""A tensor whose size counts, and what gives its content."""


class WeightFile:
    """A file of weights that is removed when nobody reads it any more.

    Attributes:
        sources: Where each weight's bytes are.
    """

    def __init__(self, folder: Path, contents: Mapping[str, Content]) -> None:
        sizes = {name: like.numel() * like.element_size() for name, (like, _) in contents.items()}
        total = sum(padded(size, BLOCK) for size in sizes.values())
        path, descriptor = _create(folder, total)
        self._remove = weakref.finalize(self, _unlink, path)
        checksums = {}
        offset = 0
        try:
            for name, (_, content) in contents.items():
                checksums[name] = (offset, _write(descriptor, path, offset, sizes[name], content()))
                offset += padded(sizes[name], BLOCK)
            os.fsync(descriptor)
            identity = file_identity(os.fstat(descriptor))
        except BaseException:
            self._remove()
            raise
        finally:
            os.close(descriptor)
        self.sources = {
            name: DiskBytes(path, begin, sizes[name], identity, sums, _PIECE)
            for name, (begin, sums) in checksums.items()
        }


def _create(folder: Path, nbytes: int) -> tuple[Path, int]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="weights-", suffix=".vb", dir=folder)
    except OSError as error:
        raise StorageError(folder, 0, "a folder to write to", "none", error.strerror or str(error)) from error
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        os.close(descriptor)
        _unlink(Path(name))
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize if error.errno == errno.ENOSPC else 0
        raise StorageError(name, 0, nbytes, free, error.strerror or "the disk is full") from error
    return Path(name), descriptor


def _write(descriptor: int, path: Path, offset: int, nbytes: int, value: Tensor) -> tuple[int, ...]:
    memory = torch.empty(nbytes, dtype=torch.uint8)
    fill(memory, value)
    data = memory.numpy().data
    checksums = []
    for begin in range(0, nbytes, _PIECE):
        piece = data[begin : begin + _PIECE]
        checksums.append(zlib.crc32(piece))
        written = 0
        while written < len(piece):
            try:
                written += os.pwrite(descriptor, piece[written:], offset + begin + written)
            except OSError as error:
                raise StorageError(
                    path, offset + begin + written, len(piece), written, error.strerror or str(error)
                ) from error
    return tuple(checksums)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
