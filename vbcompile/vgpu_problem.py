"""The planner's question, and what an answer costs: a resident set, turned into copies, slots and a step time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from vbcompile.vgpu_plan import DEVICE, Copy, Plan, Prediction, Read, Sweep, Tier, padded, staged
from vbcompile.vgpu_simulator import pace
from vbcompile.vgpu_slots import Place, Stay, place, stays
from vbcompile.vgpu_spread import Traffic, least_time, spread

_STAGING = (2, 4)  # disk reads that the host's staging memory holds at once; 1 where no more fit


@dataclass(frozen=True)
class Candidate:
    """A resident set with the copies that follow from it."""

    step_ns: int
    stall_ns: int
    ring_bytes: int
    staging_bytes: int
    resident: frozenset[int]
    levels: tuple[int, ...]
    copies: tuple[Copy, ...]
    reads: tuple[Read, ...]

    @property
    def rank(self) -> tuple[int, int, list[int]]:
        return self.step_ns, self.ring_bytes, sorted(self.resident)


class Problem:
    """The question, with everything that does not change during the search."""

    thorough = False  # whether every way of holding weights for a second use is tried for each resident set

    def __init__(self, sweep: Sweep, budget: int, tiers: tuple[Tier, ...], alignment: int) -> None:
        self.sweep, self.budget, self.tiers, self.alignment = sweep, budget, tiers, alignment
        self.sizes = [padded(weight.nbytes, alignment) for weight in sweep.weights]
        self.room = budget - sweep.reserve
        self.used = [index for index, uses in enumerate(sweep.uses) if uses]
        self.order = sorted(self.used, key=lambda index: (sweep.uses[index][0], index))
        self.pinned = frozenset(i for i, weight in enumerate(sweep.weights) if weight.pinned or not weight.nbytes)
        self.free = [index for index in self.order if index not in self.pinned]
        self.used_again = any(len(uses) > 1 for uses in sweep.uses)
        self.rate = sum(tier.read_rate for tier in tiers if tier.via is None) or 1
        self._seen: dict[tuple[frozenset[int], int], Candidate | None] = {}

    @property
    def fits(self) -> bool:
        return sum(self.sizes) <= self.room

    @property
    def pinned_bytes(self) -> int:
        return self.size_of(self.pinned)

    def group(self, operator: int) -> int:
        """Bytes that one operator reads at once from weights that may be streamed."""
        return self.size_of(set(self.sweep.operators[operator].weights) - self.pinned)

    @property
    def least_ring(self) -> int:
        return max(map(self.group, range(len(self.sweep.operators))), default=0)

    @property
    def least_budget(self) -> int:
        """No plan for less: at one operator, what it reads and what is pinned are there together."""
        return self.sweep.reserve + self.pinned_bytes + self.least_ring

    def size_of(self, weights: Iterable[int]) -> int:
        return sum(self.sizes[index] for index in weights)

    def bound(self, ring: int) -> int:
        """No plan with a ring of this size is faster.

        A stretch of operators in which no weight returns has to load all that it reads and that was not there when it
        began: in the first stretch the resident weights were, in later ones what the ring holds as well.
        """
        first, *later = self.stretches
        stored = sum(self.sweep.weights[index].nbytes for index in self.used) - (self.room - ring)
        again = sum(max(nbytes - self.room, 0) for nbytes in later)
        moved = max(max(first - (self.room - ring), 0) + again, stored)
        return max(self.sweep.compute_ns, least_time(moved, stored, self.tiers))

    @cached_property
    def stretches(self) -> list[int]:
        """Bytes read by each stretch of operators in which no weight returns; the next operator's use is no return."""
        totals, seen, last = [0], set[int](), set[int]()
        for operator in self.sweep.operators:
            fresh = set(operator.weights) - last
            if fresh & seen:
                totals.append(0)
                seen, fresh = set(), set(operator.weights)
            totals[-1] += sum(self.sweep.weights[index].nbytes for index in fresh)
            seen |= fresh
            last = set(operator.weights)
        return totals

    def evaluate(self, resident: frozenset[int], ring: int | None = None) -> Candidate | None:
        """The best copies for a resident set; the ring takes what it leaves. None: it cannot be done."""
        ring = self.room - self.size_of(resident) if ring is None else ring
        key = resident, ring
        if key not in self._seen:
            self._seen[key] = self._evaluate(resident, ring)
        return self._seen[key]

    def _evaluate(self, resident: frozenset[int], ring: int) -> Candidate | None:
        if not self.pinned <= resident or ring < 0:
            return None
        streamed = frozenset(self.used) - resident
        tried: list[list[Stay]] = []
        found: list[Candidate | None] = []
        for hold in self._holds(ring):
            entries = stays(self.sweep, streamed, self.sizes, hold)
            if entries not in tried and (hold >= 0 or self.thorough or not any(found)):
                tried.append(entries)
                found.append(self._with_stays(resident, streamed, ring, entries))
        return min((c for c in found if c is not None), key=lambda candidate: candidate.rank, default=None)

    def _holds(self, ring: int) -> tuple[int, ...]:
        """Bytes that may pass a weight by before it has to be copied again."""
        if not self.used_again:
            return (0,)
        return (0, ring // 4, ring // 2, ring - ring // 4, -1) if self.thorough else (ring // 2, 0, -1)

    def _with_stays(
        self, resident: frozenset[int], streamed: frozenset[int], ring: int, entries: Sequence[Stay]
    ) -> Candidate | None:
        places = place(entries, ring, len(self.sweep.operators))
        if places is None:
            return None
        copies_of = [0] * len(self.sweep.weights)
        for entry in entries:
            copies_of[entry.weight] += 1
        away = [index for index in range(len(self.sweep.weights)) if index not in resident]
        away.sort(key=lambda index: self.sweep.uses[index][:1] or (len(self.sweep.operators),))
        traffic = [Traffic(index, self.sweep.weights[index].nbytes, copies_of[index]) for index in away]
        largest = max((staged(self.sweep.weights[index].nbytes) for index in streamed), default=0)
        has_disk = any(tier.via is not None for tier in self.tiers)
        counts = _STAGING if has_disk else (0,)
        found = [self._staged(resident, entries, places, traffic, count * largest) for count in counts]
        if has_disk and not any(found):
            found = [self._staged(resident, entries, places, traffic, largest)]
        return min((c for c in found if c is not None), key=lambda candidate: candidate.rank, default=None)

    def _staged(
        self,
        resident: frozenset[int],
        entries: Sequence[Stay],
        places: Sequence[Place],
        traffic: Sequence[Traffic],
        staging: int,
    ) -> Candidate | None:
        levels = self._levels(traffic, staging)
        built = None if levels is None else self._transfers(entries, places, levels, staging)
        if built is None or levels is None:
            return None
        copies, reads, staged_bytes = built
        step = pace(self.sweep.operators, copies, reads, self.tiers)
        everywhere = tuple(levels.get(index, DEVICE) for index in range(len(self.sweep.weights)))
        extent = max((p.offset + e.size for p, e in zip(places, entries, strict=True)), default=0)
        return Candidate(*step, extent, staged_bytes, resident, everywhere, copies, reads)

    def _levels(self, traffic: Sequence[Traffic], staging: int) -> dict[int, int] | None:
        """Level of each weight; those that have a home stay there, and share its level with no other."""
        at_home = {t.weight: home for t in traffic if (home := self.sweep.weights[t.weight].home) is not None}
        if not at_home:
            return spread(traffic, self.tiers, staging)
        taken = set(at_home.values())
        free = [tier for tier in self.tiers if tier.level not in taken and (tier.via is None or tier.via not in taken)]
        others = spread([t for t in traffic if t.weight not in at_home], free, 0)
        return None if others is None else at_home | others

    def _transfers(
        self, entries: Sequence[Stay], places: Sequence[Place], levels: dict[int, int], staging: int
    ) -> tuple[tuple[Copy, ...], tuple[Read, ...], int] | None:
        """Copies and disk reads in order, and the staging bytes in use; None where the staging is too small."""
        via = {tier.level: tier.via for tier in self.tiers}
        slow = [j for j, entry in enumerate(entries) if via[levels[entry.weight]] is not None]
        nbytes = [self.sweep.weights[entry.weight].nbytes for entry in entries]
        waiting = [Stay(entries[j].weight, staged(nbytes[j]), j, j) for j in slow]
        buffers = place(waiting, staging, len(entries))
        if buffers is None:
            return None
        reads = tuple(
            Read(entries[j].weight, levels[entries[j].weight], nbytes[j], buffer.offset, j, buffer.free_after)
            for j, buffer in zip(slow, buffers, strict=True)
        )
        read_of = {j: index for index, j in enumerate(slow)}
        copies = tuple(
            Copy(
                weight=entry.weight,
                level=levels[entry.weight],
                link=_link(levels[entry.weight], via),
                nbytes=nbytes[j],
                offset=slot.offset,
                first_use=entry.first,
                last_use=entry.last,
                free_after=slot.free_after,
                read=read_of.get(j),
            )
            for j, (entry, slot) in enumerate(zip(entries, places, strict=True))
        )
        return copies, reads, max((r.offset + staged(r.nbytes) for r in reads), default=0)

    def declined(self) -> Plan:
        compute = self.sweep.compute_ns
        resident = tuple(DEVICE for _ in self.sweep.weights)
        prediction = Prediction(compute, 0, compute, _per_level(self.tiers))
        return Plan(self.sweep, self.budget, self.tiers, resident, (), (), 0, 0, prediction, self.alignment)

    def finish(self, best: Candidate) -> Plan:
        carried, busy = _per_level(self.tiers), _per_level(self.tiers)
        tier = {tier.level: tier for tier in self.tiers}
        moves = [(copy.link, copy.nbytes) for copy in best.copies] + [(read.level, read.nbytes) for read in best.reads]
        for link, nbytes in moves:
            carried[link] += nbytes
            busy[link] += tier[link].read_ns(nbytes)
        slowest = max(busy, key=lambda level: (busy[level], -level), default=None)
        link_bound = slowest is not None and busy[slowest] > self.sweep.compute_ns
        prediction = Prediction(
            step_ns=best.step_ns,
            stall_ns=best.stall_ns,
            roofline_ns=self.bound(0),
            link_bytes=carried,
            bottleneck=tier[slowest].name if link_bound and slowest is not None else "compute",
        )
        return Plan(
            self.sweep,
            self.budget,
            self.tiers,
            best.levels,
            best.copies,
            best.reads,
            best.ring_bytes,
            best.staging_bytes,
            prediction,
            self.alignment,
        )


def _link(level: int, via: dict[int, int | None]) -> int:
    onward = via[level]
    return level if onward is None else onward


def _per_level(tiers: Sequence[Tier]) -> dict[int, int]:
    return {tier.level: 0 for tier in tiers}
