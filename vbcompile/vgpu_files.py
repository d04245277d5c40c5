"""Files that are read past the page cache where their file system allows it."""

import logging
import os

log = logging.getLogger(__name__)


def open_unbuffered(file: str | os.PathLike[str], *, direct: bool = True) -> tuple[int, bool]:
    """(descriptor for reading, whether reads pass the page cache by).

    Unbuffered reads must begin and end on blocks of 4096 bytes, in the file and in memory.

    Args:
        direct: False: through the page cache.

    Raises:
        OSError: the file cannot be opened.
    """
    flag = getattr(os, "O_DIRECT", 0)
    if flag and direct:
        try:
            return os.open(file, os.O_RDONLY | flag), True
        except OSError as error:
            log.info("%s: no unbuffered reads (%s); reading through the page cache", os.fspath(file), error.strerror)
    return os.open(file, os.O_RDONLY), False
