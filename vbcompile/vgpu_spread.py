"""Which of the tiers beyond the device holds each streamed weight, so that all links end their work together."""

from collections.abc import Sequence
from typing import NamedTuple

from vbcompile.vgpu_plan import Tier


class Traffic(NamedTuple):
    """A weight that does not live on the device: its size, and how often a step copies it."""

    weight: int
    nbytes: int
    copies: int


def spread(traffic: Sequence[Traffic], tiers: Sequence[Tier], staging: int) -> dict[int, int] | None:
    """Level of each weight; None where the capacities do not suffice.

    Each weight goes where it would arrive first given all that is under way, which loads parallel links by their
    bandwidth. The shares found so are then interleaved in order of use, so that no link idles while another works.

    Args:
        traffic: In order of use.
        staging: Bytes that host memory gives up if anything is read from disk.
    """
    reached = {tier.via for tier in tiers if tier.via is not None}
    attempts = (
        [(tuple(tier for tier in tiers if tier.via is None), 0), (tuple(tiers), staging)]
        if reached
        else [(tuple(tiers), 0)]
    )
    for usable, taken in attempts:
        room = {tier.level: tier.capacity - (taken if tier.level in reached else 0) for tier in usable}
        first = _by_arrival(traffic, usable, room)
        if first is not None:
            return _interleaved(traffic, usable, room, first)
    return None


def least_time(moved: int, stored: int, tiers: Sequence[Tier]) -> int:
    """Nanoseconds below which ``moved`` bytes of ``stored`` ones cannot reach the device, whatever the plan.

    All links at full rate together; then, for each tier from the fastest, what the faster ones cannot hold at the rate
    of the others.
    """
    direct = sorted((tier for tier in tiers if tier.via is None), key=lambda tier: -tier.read_rate)
    disks = [tier for tier in tiers if tier.via is not None]
    least = _at_rate(moved, sum(tier.read_rate for tier in direct))
    for count in range(1, len(direct)):
        rate = sum(tier.read_rate for tier in direct[count:])
        least = max(least, _at_rate(stored - sum(tier.capacity for tier in direct[:count]), rate))
    beyond = stored - sum(tier.capacity for tier in direct)
    return max(least, _at_rate(beyond, sum(tier.read_rate for tier in disks)))


def _at_rate(nbytes: int, rate: int) -> int:
    return nbytes * 10**9 // rate if nbytes > 0 and rate else 0


def _by_arrival(traffic: Sequence[Traffic], tiers: Sequence[Tier], room: dict[int, int]) -> dict[int, int] | None:
    left, busy = dict(room), {tier.level: 0 for tier in tiers}
    by_level = {tier.level: tier for tier in tiers}
    levels: dict[int, int] = {}
    for item in traffic:
        open_tiers = [tier for tier in tiers if item.nbytes <= left[tier.level]]
        if not open_tiers:
            return None
        chosen = min(open_tiers, key=lambda tier: (_arrival(item, tier, by_level, busy), tier.level))
        for link in _links(chosen, by_level):
            busy[link.level] += item.copies * link.read_ns(item.nbytes)
        left[chosen.level] -= item.nbytes
        levels[item.weight] = chosen.level
    return levels


def _arrival(item: Traffic, tier: Tier, by_level: dict[int, Tier], busy: dict[int, int]) -> int:
    return max(busy[link.level] + item.copies * link.read_ns(item.nbytes) for link in _links(tier, by_level))


def _links(tier: Tier, by_level: dict[int, Tier]) -> tuple[Tier, ...]:
    return (tier,) if tier.via is None else (tier, by_level[tier.via])


def _interleaved(
    traffic: Sequence[Traffic], tiers: Sequence[Tier], room: dict[int, int], first: dict[int, int]
) -> dict[int, int]:
    """The same shares in proportion all along the step; the first choice where sizes do not allow that."""
    share = {tier.level: 0 for tier in tiers}
    for item in traffic:
        share[first[item.weight]] += item.nbytes
    if sum(1 for nbytes in share.values() if nbytes) < 2:
        return first
    total, passed, given, left = sum(share.values()), 0, dict.fromkeys(share, 0), dict(room)
    levels: dict[int, int] = {}
    for item in traffic:
        passed += item.nbytes
        open_levels = [level for level in share if share[level] and item.nbytes <= left[level]]
        if not open_levels:
            return first
        level = max(open_levels, key=lambda level: (share[level] * passed - given[level] * total, -level))
        levels[item.weight] = level
        given[level] += item.nbytes
        left[level] -= item.nbytes
    return levels
