"""Reads and writes at a place in a file, past the page cache where the file system allows it, on every system."""

import logging
import os
import threading

log = logging.getLogger(__name__)

BLOCK = 4096
"""Unbuffered reads begin and end on multiples of this, in the file and in memory."""

_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends otherwise
_seeking = threading.Lock()  # where a file has to be wound to its place first


def open_unbuffered(file: str | os.PathLike[str], *, direct: bool = True) -> tuple[int, bool]:
    """(descriptor for reading, whether reads pass the page cache by).

    Unbuffered reads must begin and end on whole blocks (:data:`BLOCK`).

    Args:
        direct: False: through the page cache.

    Raises:
        OSError: the file cannot be opened.
    """
    flag = getattr(os, "O_DIRECT", 0)
    if flag and direct:
        try:
            return os.open(file, os.O_RDONLY | _BINARY | flag), True
        except OSError as error:
            log.info("%s: no unbuffered reads (%s); reading through the page cache", os.fspath(file), error.strerror)
    return os.open(file, os.O_RDONLY | _BINARY), False


def create_file(file: str | os.PathLike[str]) -> int:
    """Descriptor of a new file for writing. Raises OSError, also where there is one of that name."""
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)


def read_at(descriptor: int, memory: memoryview, offset: int) -> int:
    """Read into memory from a place in a file; returns the bytes read, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [memory], offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(memory))
    memory[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write at a place in a file; returns the bytes written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def synchronise(path: str | os.PathLike[str]) -> None:
    """Have the system write a file, or a folder's names, to disk before what follows; Windows keeps names by itself."""
    windows = os.name == "nt"
    if windows and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
