"""Slots: which copies a step needs, and which bytes of the ring each goes through.

The ring is filled front to back and begins again at its front when the next operator's weights do not fit behind the
last ones; every step starts at the front, so that a weight has the same address in each step.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from vbcompile.vgpu_plan import Sweep


class Stay(NamedTuple):
    """One stay of a weight in the ring: from before operator ``first`` to the end of operator ``last``."""

    weight: int
    size: int
    first: int
    last: int


class Place(NamedTuple):
    """Where a stay's slot begins, and the operator that frees it (negative: in the step before)."""

    offset: int
    free_after: int


def stays(sweep: Sweep, streamed: frozenset[int], sizes: Sequence[int], hold: int) -> list[Stay]:
    """The stays of one step in order of first use.

    Args:
        streamed: Weights that do not live on the device.
        sizes: Bytes that each weight takes in the ring.
        hold: A weight that is used again stays in the ring if at most this many bytes of other weights enter between
            its two uses. -1: it is copied for each operator anew.
    """
    found: list[Stay] = []
    latest: dict[int, tuple[int, int]] = {}  # weight -> (its last stay, bytes that had entered the ring by then)
    entered = 0
    for operator, step in enumerate(sweep.operators):
        for weight in dict.fromkeys(step.weights):
            if weight not in streamed:
                continue
            stay, until = latest.get(weight, (-1, 0))
            if stay >= 0 and entered - until <= hold:
                found[stay] = found[stay]._replace(last=operator)
            else:
                entered += sizes[weight]
                latest[weight] = (len(found), entered)
                found.append(Stay(weight, sizes[weight], operator, operator))
    return found


def place(entries: Sequence[Stay], ring: int, cycle: int) -> list[Place] | None:
    """Slots for one step that is repeated every ``cycle`` operators; None where the ring is too small.

    The weights of one operator lie side by side. No entry waits for an operator that is not over before its own first
    use, so that the result cannot deadlock.
    """
    group = _group_sizes(entries)
    behind: deque[tuple[int, int, int]] = deque()  # (start, end, freed by) of the lap before, from the head on
    lap: list[tuple[int, int, int]] = []
    places: list[Place] = []
    for step in (0, 1):  # the second round meets what the first one left, as every later step does
        behind, lap, head = deque([*lap, *behind]), [], 0
        places = []
        for index, entry in enumerate(entries):
            if head + group[index] > ring:
                if group[index] > ring:
                    return None
                behind, lap, head = deque([*lap, *behind]), [], 0
            freed_by = _overwrite(behind, head + entry.size)
            if freed_by >= step * cycle + entry.first:
                return None
            places.append(Place(head, freed_by - cycle))
            lap.append((head, head + entry.size, step * cycle + entry.last))
            head += entry.size
    return places


def _group_sizes(entries: Sequence[Stay]) -> list[int]:
    """For the first entry of each operator the bytes that all of its entries take; 0 for the others."""
    sizes = [0] * len(entries)
    leader = 0
    for index, entry in enumerate(entries):
        if entry.first != entries[leader].first:
            leader = index
        sizes[leader] += entry.size
    return sizes


def _overwrite(behind: deque[tuple[int, int, int]], end: int) -> int:
    """Take what lies before ``end`` out of the lap before; the last operator that frees any of it, or -1."""
    freed_by = -1
    while behind and behind[0][0] < end:
        _, stop, freed = behind.popleft()
        freed_by = max(freed_by, freed)
        if stop > end:
            behind.appendleft((end, stop, freed))
    return freed_by
