"""Who used which bytes of a ring last."""

from bisect import bisect_right
from typing import NamedTuple


class Stretch(NamedTuple):
    """Bytes ``begin`` to ``end`` that ``owner`` was the last to claim."""

    begin: int
    end: int
    owner: int


class Ledger:
    """The bytes of a ring, each with the number of its last owner. Nothing overlaps."""

    def __init__(self) -> None:
        self._stretches: list[Stretch] = []  # in order

    def owners(self, begin: int, end: int) -> list[int]:
        """Owners of any of these bytes, in order of place."""
        first, last = self._range(begin, end)
        return [stretch.owner for stretch in self._stretches[first:last]]

    def claim(self, begin: int, end: int, owner: int) -> None:
        """Give these bytes to ``owner``; what others own outside of them stays theirs."""
        if end <= begin:
            return
        first, last = self._range(begin, end)
        old = self._stretches[first:last]
        left = [old[0]._replace(end=begin)] if old and old[0].begin < begin else []
        right = [old[-1]._replace(begin=end)] if old and old[-1].end > end else []
        self._stretches[first:last] = [*left, Stretch(begin, end, owner), *right]

    def _range(self, begin: int, end: int) -> tuple[int, int]:
        """Indices of the stretches that share a byte with these."""
        if end <= begin:
            return 0, 0
        first = bisect_right(self._stretches, begin, key=lambda stretch: stretch.end)
        last = first
        while last < len(self._stretches) and self._stretches[last].begin < end:
            last += 1
        return first, last
