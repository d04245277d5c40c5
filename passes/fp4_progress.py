"""A progress bar while many weights are packed."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


@contextmanager
def progress(items: Sequence[Item], what: str, wanted: bool) -> Iterator[Iterable[Item]]:
    """``items``, with a bar on standard error where that is a terminal.

    ``TQDM_DISABLE=1`` in the environment switches it off.
    """
    if not wanted or not sys.stderr.isatty():
        yield items
        return
    with tqdm(items, desc=what, unit="weight", leave=False) as bar:
        yield bar
