"""Which weights stay on the device, and in which bytes of a ring the others pass through.

A forward pass is a cyclic sweep. For a given resident set, copying the rest in order of use as early as their slots
allow is optimal on each link, so that two questions are left: which set, and how large the ring. Every byte that is
resident saves the same traffic; what differs is how evenly the link is loaded. Resident weights are therefore spread by
error diffusion (bytes handed to the link so far follow the time that has passed), for each size of the ring, and the
simulated clock decides. Sweeps of few weights are searched exhaustively. Everything is integer arithmetic.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from vbcompile.vgpu_plan import ALIGNMENT, DEVICE, Copy, Plan, PlanError, Prediction, Read, Sweep, Tier, padded, staged
from vbcompile.vgpu_simulator import pace
from vbcompile.vgpu_slots import Place, Stay, place, stays
from vbcompile.vgpu_spread import Traffic, least_time, spread

_EXHAUSTIVE = 8
"""Sweeps with at most this many weights are searched completely."""

_RING_STEPS = (2, 3, 4, 6, 8, 12)
_RING_SIZES = 12  # distinct weight sizes that ring sizes are made of, largest first
_PHASES = 4
_SWAPS = 24
_GOOD_ENOUGH = 2000  # search ends at 1/2000 above the least possible time
_STAGING = (2, 4)  # disk reads that the host's staging memory holds at once; 1 where no more fit


def plan_weights(sweep: Sweep, budget: int, tiers: Sequence[Tier], *, alignment: int = ALIGNMENT) -> Plan:
    """Plan one step that is repeated.

    Args:
        sweep: Its weights and operators.
        budget: Bytes of device memory, ``sweep.reserve`` included.
        tiers: The places beyond the device; each level number once.
        alignment: Bytes to which a tensor's size on the device is rounded up.

    Returns:
        The plan; with ``declined`` set where everything fits. The same arguments always give the same plan.

    Raises:
        PlanError: no plan keeps within the budget and the tiers' capacities; it names the smallest budget that works.
        ValueError: tiers that contradict each other, or a budget that is not a positive integer.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0:
        raise ValueError(f"the budget must be a positive number of bytes, not {budget!r}")
    problem = _Problem(sweep, budget, _validated(tiers), alignment)
    if problem.fits:
        return problem.declined()
    if budget < problem.least_budget:
        raise _too_small(problem)
    best = _search(problem)
    if best is None:
        raise _no_room(problem)
    return problem.finish(_with_less_ring(problem, best))


def smallest_budget(sweep: Sweep, tiers: Sequence[Tier], *, alignment: int = ALIGNMENT) -> int:
    """Bytes of device memory below which :func:`plan_weights` refuses.

    Where the tiers' capacities decide, the figure is found by bisection: a plan exists for it.
    """
    tiers = _validated(tiers)
    low = max(_Problem(sweep, 1, tiers, alignment).least_budget, 1)
    if _feasible(sweep, low, tiers, alignment):
        return low
    high = max(sweep.reserve + sum(padded(w.nbytes, alignment) for w in sweep.weights), 1)
    while high - low > alignment:
        middle = (low + high) // 2
        if _feasible(sweep, middle, tiers, alignment):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class _Candidate:
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


class _Problem:
    """The question, with everything that does not change during the search."""

    def __init__(self, sweep: Sweep, budget: int, tiers: tuple[Tier, ...], alignment: int) -> None:
        self.sweep, self.budget, self.tiers, self.alignment = sweep, budget, tiers, alignment
        self.sizes = [padded(weight.nbytes, alignment) for weight in sweep.weights]
        self.room = budget - sweep.reserve
        self.used = [index for index, uses in enumerate(sweep.uses) if uses]
        self.order = sorted(self.used, key=lambda index: (sweep.uses[index][0], index))
        self.pinned = frozenset(i for i, weight in enumerate(sweep.weights) if weight.pinned or not weight.nbytes)
        self.free = [index for index in self.order if index not in self.pinned]
        self.used_again = any(len(uses) > 1 for uses in sweep.uses)
        self.rate = sum(tier.read_rate for tier in tiers if tier.via is None)
        self._seen: dict[tuple[frozenset[int], int], _Candidate | None] = {}

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
        """No plan with a ring of this size is faster."""
        streamed = sum(self.sweep.weights[index].nbytes for index in self.used) - (self.room - ring)
        return max(self.sweep.compute_ns, least_time(streamed, self.tiers))

    def evaluate(self, resident: frozenset[int], ring: int | None = None) -> _Candidate | None:
        """The best copies for a resident set; the ring takes what it leaves. None: it cannot be done."""
        ring = self.room - self.size_of(resident) if ring is None else ring
        key = resident, ring
        if key not in self._seen:
            self._seen[key] = self._evaluate(resident, ring)
        return self._seen[key]

    def _evaluate(self, resident: frozenset[int], ring: int) -> _Candidate | None:
        if not self.pinned <= resident or ring < 0:
            return None
        streamed = frozenset(self.used) - resident
        holds = (-1, 0, ring // 4, ring // 2, ring - ring // 4) if self.used_again else (0,)
        found = [c for hold in holds if (c := self._with_hold(resident, streamed, ring, hold)) is not None]
        return min(found, key=lambda candidate: candidate.rank, default=None)

    def _with_hold(self, resident: frozenset[int], streamed: frozenset[int], ring: int, hold: int) -> _Candidate | None:
        entries = stays(self.sweep, streamed, self.sizes, hold)
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
    ) -> _Candidate | None:
        levels = spread(traffic, self.tiers, staging)
        built = None if levels is None else self._transfers(entries, places, levels, staging)
        if built is None or levels is None:
            return None
        copies, reads, staged_bytes = built
        step = pace(self.sweep.operators, copies, reads, self.tiers)
        everywhere = tuple(levels.get(index, DEVICE) for index in range(len(self.sweep.weights)))
        extent = max((p.offset + e.size for p, e in zip(places, entries, strict=True)), default=0)
        return _Candidate(*step, extent, staged_bytes, resident, everywhere, copies, reads)

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
        prediction = Prediction(compute, 0, compute, _per_level(self.tiers), _per_level(self.tiers))
        return Plan(self.sweep, self.budget, self.tiers, resident, (), (), 0, 0, prediction, self.alignment)

    def finish(self, best: _Candidate) -> Plan:
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
            link_ns=busy,
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


def _search(problem: _Problem) -> _Candidate | None:
    if len(problem.free) <= _EXHAUSTIVE:
        return _best(problem, _all_sets(problem), problem.bound(0))
    best: _Candidate | None = None
    enough = problem.bound(0) + problem.bound(0) // _GOOD_ENOUGH
    for ring in _ring_sizes(problem):
        if best is not None and (problem.bound(ring) >= best.step_ns or best.step_ns <= enough):
            break
        best = _better(best, _best(problem, _diffused_sets(problem, ring), enough))
    best = best or _best(problem, [problem.pinned], enough)
    if best is None or best.step_ns <= enough:
        return best
    return _exchanged(problem, best)


def _best(problem: _Problem, sets: Iterable[frozenset[int]], enough: int) -> _Candidate | None:
    best: _Candidate | None = None
    for resident in sets:
        best = _better(best, problem.evaluate(resident))
        if best is not None and best.step_ns <= enough:
            break
    return best


def _better(one: _Candidate | None, other: _Candidate | None) -> _Candidate | None:
    return min((c for c in (one, other) if c is not None), key=lambda candidate: candidate.rank, default=None)


def _all_sets(problem: _Problem) -> Iterator[frozenset[int]]:
    for count in range(len(problem.free), -1, -1):
        for chosen in combinations(problem.free, count):
            if problem.size_of(chosen) + problem.pinned_bytes <= problem.room:
                yield problem.pinned.union(chosen)


def _ring_sizes(problem: _Problem) -> list[int]:
    distinct = sorted({problem.sizes[index] for index in problem.free}, reverse=True)[:_RING_SIZES]
    least = problem.least_ring
    groups = sorted({problem.group(operator) for operator in range(len(problem.sweep.operators))} - {0})
    sizes = {count * size for size in distinct for count in _RING_STEPS} | {least, 2 * least}
    sizes |= {2 * group for group in groups[-_RING_SIZES:]}
    return sorted(size for size in sizes if size <= problem.room - problem.pinned_bytes)


def _diffused_sets(problem: _Problem, ring: int) -> Iterator[frozenset[int]]:
    """Resident sets that leave about ``ring`` bytes: large weights in first, then tiny ones, then an even choice."""
    room = problem.room - ring
    for limit in (ring // 2, ring):  # what is larger than half the ring cannot arrive while another is in use
        large = problem.pinned.union(index for index in problem.free if problem.sizes[index] > limit)
        left = room - problem.size_of(large)
        if left < 0:
            continue
        chosen, left = _take_whole_groups(problem, large, left)
        rest = [index for index in problem.free if index not in chosen]
        yield from (chosen | extra for extra in _even_choices(problem, rest, left))
        yield chosen | _filled(problem, rest, left)


def _take_whole_groups(problem: _Problem, chosen: frozenset[int], left: int) -> tuple[frozenset[int], int]:
    """Take what saves most per byte: weights whose copy is mostly latency, then those that are used most often."""
    latency = max((tier.latency_ns for tier in problem.tiers), default=0)
    rest = [index for index in problem.free if index not in chosen]
    tiny = [i for i in rest if problem.sizes[i] * 10**9 <= latency * problem.rate]
    for index in sorted(tiny, key=lambda index: (problem.sizes[index], index)):
        if problem.sizes[index] > left:
            break
        chosen, left = chosen | {index}, left - problem.sizes[index]
    uses = problem.sweep.uses
    for count in sorted({len(uses[index]) for index in rest}, reverse=True)[:-1]:
        group = [index for index in rest if len(uses[index]) == count and index not in chosen]
        if problem.size_of(group) > left:
            break
        chosen, left = chosen.union(group), left - problem.size_of(group)
    return chosen, left


def _even_choices(problem: _Problem, rest: Sequence[int], left: int) -> Iterator[frozenset[int]]:
    """Error diffusion in order of use: a weight is streamed when the bytes streamed so far lag behind the time."""
    total = problem.size_of(rest)
    need = total - left
    if need <= 0 or not total:
        return
    clock = _elapsed(problem, rest, need, total)
    for phase in range(_PHASES + 1):
        streamed = 0
        resident: set[int] = set()
        for index, time in zip(rest, clock, strict=True):
            size = problem.sizes[index]
            if (_PHASES * streamed + size * phase) * clock[-1] <= _PHASES * need * time:
                streamed += size
            else:
                resident.add(index)
        yield _repaired(problem, rest, resident, left)


def _elapsed(problem: _Problem, rest: Sequence[int], need: int, total: int) -> list[int]:
    """For each weight the time by which it is used, if computation and copies of the average weight take turns."""
    until, now = [], 0
    for operator in problem.sweep.operators:
        now += operator.nanoseconds
        until.append(now)
    clock, copied = [], 0
    for index in rest:
        copied += problem.sizes[index]
        clock.append(until[problem.sweep.uses[index][0]] + copied * need * 10**9 // (total * problem.rate) + 1)
    return clock


def _repaired(problem: _Problem, rest: Sequence[int], resident: set[int], left: int) -> frozenset[int]:
    """Drop the smallest until the set fits, then add the largest that still do."""
    size = problem.size_of(resident)
    for index in sorted(resident, key=lambda index: (problem.sizes[index], index)):
        if size <= left:
            break
        resident.remove(index)
        size -= problem.sizes[index]
    for index in sorted(set(rest) - resident, key=lambda index: (-problem.sizes[index], index)):
        if size + problem.sizes[index] <= left:
            resident.add(index)
            size += problem.sizes[index]
    return frozenset(resident)


def _filled(problem: _Problem, rest: Sequence[int], left: int) -> frozenset[int]:
    """The first weights that fit, in order of use."""
    chosen: set[int] = set()
    for index in rest:
        if problem.sizes[index] <= left:
            chosen.add(index)
            left -= problem.sizes[index]
    return frozenset(chosen)


def _exchanged(problem: _Problem, best: _Candidate) -> _Candidate:
    """Exchange one resident with one streamed weight nearby, while that helps."""
    tried = 0
    improved = True
    while improved and tried < _SWAPS:
        improved = False
        for resident in _neighbours(problem, best.resident):
            tried += 1
            candidate = problem.evaluate(resident)
            if candidate is not None and candidate.rank < best.rank:
                best, improved = candidate, True
                break
            if tried >= _SWAPS:
                break
    return best


def _neighbours(problem: _Problem, resident: frozenset[int]) -> Iterator[frozenset[int]]:
    movable = [index for index in problem.free if index in resident]
    streamed = [index for index in problem.free if index not in resident]
    position = {index: place for place, index in enumerate(problem.order)}
    yield from (resident - {index} for index in sorted(movable, key=lambda index: problem.sizes[index])[:4])
    pairs = [(abs(position[a] - position[b]), a, b) for a in movable for b in streamed]
    for _, out, into in sorted(pairs)[:_SWAPS]:
        swapped = resident - {out} | {into}
        if problem.size_of(swapped) <= problem.room:
            yield swapped


def _with_less_ring(problem: _Problem, best: _Candidate) -> _Candidate:
    """The smallest ring that is as fast: what it does not need is left to the allocator."""
    for ring in _ring_sizes(problem):
        if ring >= best.ring_bytes:
            break
        candidate = problem.evaluate(best.resident, ring)
        if candidate is not None and candidate.step_ns <= best.step_ns:
            return candidate
    return best


def _feasible(sweep: Sweep, budget: int, tiers: tuple[Tier, ...], alignment: int) -> bool:
    problem = _Problem(sweep, budget, tiers, alignment)
    if problem.fits:
        return True
    if budget < problem.least_budget:
        return False
    sets = [problem.pinned] if len(problem.free) > _EXHAUSTIVE else list(_all_sets(problem))
    return _first(problem, sets) or any(_first(problem, _diffused_sets(problem, r)) for r in _ring_sizes(problem))


def _first(problem: _Problem, sets: Iterable[frozenset[int]]) -> bool:
    return any(problem.evaluate(resident) is not None for resident in sets)


def _validated(tiers: Sequence[Tier]) -> tuple[Tier, ...]:
    levels = [tier.level for tier in tiers]
    if len(set(levels)) != len(levels):
        raise ValueError(f"two tiers have the same level number: {levels}")
    direct = {tier.level for tier in tiers if tier.via is None}
    for tier in tiers:
        if tier.via is not None and tier.via not in direct:
            raise ValueError(f"level {tier.level} ({tier.name}) goes by level {tier.via}, which has no link to the device")
    return tuple(sorted(tiers, key=lambda tier: tier.level))


def _too_small(problem: _Problem) -> PlanError:
    groups = [problem.group(operator) for operator in range(len(problem.sweep.operators))]
    largest = max(range(len(groups)), key=lambda index: (groups[index], -index), default=None)
    name = problem.sweep.operators[largest].name if largest is not None else ""
    return PlanError(
        f"the device budget of {problem.budget} bytes is too small: {problem.sweep.reserve} bytes are needed beside the "
        f"weights, {problem.pinned_bytes} for weights that cannot be moved, and a ring of {problem.least_ring} for the "
        f"largest operator, {name!r}. The smallest budget that works is "
        f"{smallest_budget(problem.sweep, problem.tiers, alignment=problem.alignment)} bytes: raise the budget, or "
        "shorten the sequence or batch",
        budget=problem.budget,
        ring=problem.least_ring,
        largest_operator=name,
        largest_operator_bytes=problem.least_ring,
        minimum_budget=smallest_budget(problem.sweep, problem.tiers, alignment=problem.alignment),
    )


def _no_room(problem: _Problem) -> PlanError:
    least = smallest_budget(problem.sweep, problem.tiers, alignment=problem.alignment)
    places = ", ".join(f"{tier.name} {tier.capacity}" for tier in problem.tiers) or "none"
    error = _too_small(problem)
    return PlanError(
        f"with {problem.budget} bytes on the device the other weights do not fit beyond it (bytes: {places}). The "
        f"smallest budget that works is {least} bytes, with a ring of {problem.least_ring} for the largest operator, "
        f"{error.largest_operator!r}: raise the budget or the capacity of a level",
        budget=problem.budget,
        ring=problem.least_ring,
        largest_operator=error.largest_operator,
        largest_operator_bytes=problem.least_ring,
        minimum_budget=least,
    )


def _link(level: int, via: dict[int, int | None]) -> int:
    onward = via[level]
    return level if onward is None else onward


def _per_level(tiers: Sequence[Tier]) -> dict[int, int]:
    return {tier.level: 0 for tier in tiers}
