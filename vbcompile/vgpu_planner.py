"""Which weights stay on the device, and in which bytes of a ring the others pass through.

A forward pass is a cyclic sweep. For a given resident set, copying the rest in order of use as early as their slots
allow is optimal on each link, so that two questions are left: which set, and how large the ring. Every byte that is
resident saves the same traffic; what differs is how evenly the link is loaded. Resident weights are therefore spread by
error diffusion (bytes handed to the link so far follow the time that has passed), for each size of the ring, and the
simulated clock decides. Sweeps of few weights are searched exhaustively. Everything is integer arithmetic.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from vbcompile.vgpu_plan import ALIGNMENT, Plan, PlanError, Sweep, Tier, padded
from vbcompile.vgpu_problem import Candidate, Problem
from vbcompile.vgpu_size import exact_size, size_text

_EXHAUSTIVE = 8
"""Sweeps with at most this many weights are searched completely."""

# How far the search goes beyond that: two to four times as much of any of these made plans for 70 billion weights in
# tests/test_vgpu_planner.py at most 0.3 % faster, and the search up to twice as long as the second that it takes.
_RING_STEPS = (2, 3, 4, 6, 8, 12)  # weights of one size that a ring is made for
_RING_SIZES = 12  # distinct weight sizes that ring sizes are made of, largest first
_PHASES = 2  # error diffusion counts none, half or all of the weight that it decides on
_SWAPS = 24  # exchanges of one resident for one streamed weight
_GOOD_ENOUGH = 2000  # search ends at 1/2000 above the least possible time


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
    problem = Problem(sweep, budget, _validated(tiers), alignment)
    if problem.fits:
        return problem.declined()
    if budget < problem.least_budget:
        raise _too_small(problem)
    best = _search(problem)
    if best is None:
        raise _no_room(problem)
    return problem.finish(_with_less_ring(problem, best))


def fits_on_device(sweep: Sweep, budget: int) -> bool:
    """Whether all weights, and what else the step needs, are within the budget: then a plan is declined."""
    return Problem(sweep, budget, (), ALIGNMENT).fits


def smallest_budget(sweep: Sweep, tiers: Sequence[Tier], *, alignment: int = ALIGNMENT) -> int:
    """Bytes of device memory below which :func:`plan_weights` refuses.

    Where the tiers' capacities decide, the figure is found by bisection: a plan exists for it.
    """
    tiers = _validated(tiers)
    low = max(Problem(sweep, 1, tiers, alignment).least_budget, 1)
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


def _search(problem: Problem) -> Candidate | None:
    if len(problem.free) <= _EXHAUSTIVE:
        problem.thorough = True
        return _best(problem, _all_sets(problem), problem.bound(0))
    best: Candidate | None = None
    enough = problem.bound(0) + problem.bound(0) // _GOOD_ENOUGH
    for ring in _ring_sizes(problem):
        if best is not None and (problem.bound(ring) >= best.step_ns or best.step_ns <= enough):
            break
        best = _better(best, _best(problem, _diffused_sets(problem, ring), enough))
    best = best or _best(problem, [problem.pinned], enough)
    if best is None or best.step_ns <= enough:
        return best
    return _exchanged(problem, best)


def _best(problem: Problem, sets: Iterable[frozenset[int]], enough: int) -> Candidate | None:
    best: Candidate | None = None
    for resident in sets:
        best = _better(best, problem.evaluate(resident))
        if best is not None and best.step_ns <= enough:
            break
    return best


def _better(one: Candidate | None, other: Candidate | None) -> Candidate | None:
    return min((c for c in (one, other) if c is not None), key=lambda candidate: candidate.rank, default=None)


def _all_sets(problem: Problem) -> Iterator[frozenset[int]]:
    for count in range(len(problem.free), -1, -1):
        for chosen in combinations(problem.free, count):
            if problem.size_of(chosen) + problem.pinned_bytes <= problem.room:
                yield problem.pinned.union(chosen)


def _ring_sizes(problem: Problem) -> list[int]:
    distinct = sorted({problem.sizes[index] for index in problem.free}, reverse=True)[:_RING_SIZES]
    least = problem.least_ring
    groups = sorted({problem.group(operator) for operator in range(len(problem.sweep.operators))} - {0})
    sizes = {count * size for size in distinct for count in _RING_STEPS} | {least, 2 * least}
    sizes |= {2 * group for group in groups[-_RING_SIZES:]}
    return sorted(size for size in sizes if size <= problem.room - problem.pinned_bytes)


def _diffused_sets(problem: Problem, ring: int) -> Iterator[frozenset[int]]:
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


def _take_whole_groups(problem: Problem, chosen: frozenset[int], left: int) -> tuple[frozenset[int], int]:
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


def _even_choices(problem: Problem, rest: Sequence[int], left: int) -> Iterator[frozenset[int]]:
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


def _elapsed(problem: Problem, rest: Sequence[int], need: int, total: int) -> list[int]:
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


def _repaired(problem: Problem, rest: Sequence[int], resident: set[int], left: int) -> frozenset[int]:
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


def _filled(problem: Problem, rest: Sequence[int], left: int) -> frozenset[int]:
    """The first weights that fit, in order of use."""
    chosen: set[int] = set()
    for index in rest:
        if problem.sizes[index] <= left:
            chosen.add(index)
            left -= problem.sizes[index]
    return frozenset(chosen)


def _exchanged(problem: Problem, best: Candidate) -> Candidate:
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


def _neighbours(problem: Problem, resident: frozenset[int]) -> Iterator[frozenset[int]]:
    movable = [index for index in problem.free if index in resident]
    streamed = [index for index in problem.free if index not in resident]
    position = {index: place for place, index in enumerate(problem.order)}
    yield from (resident - {index} for index in sorted(movable, key=lambda index: problem.sizes[index])[:4])
    pairs = [(abs(position[a] - position[b]), a, b) for a in movable for b in streamed]
    for _, out, into in sorted(pairs)[:_SWAPS]:
        swapped = resident - {out} | {into}
        if problem.size_of(swapped) <= problem.room:
            yield swapped


def _with_less_ring(problem: Problem, best: Candidate) -> Candidate:
    """The smallest ring that is as fast: what it does not need is left to the allocator."""
    for ring in _ring_sizes(problem):
        if ring >= best.ring_bytes:
            break
        candidate = problem.evaluate(best.resident, ring)
        if candidate is not None and candidate.step_ns <= best.step_ns:
            return candidate
    return best


def _feasible(sweep: Sweep, budget: int, tiers: tuple[Tier, ...], alignment: int) -> bool:
    problem = Problem(sweep, budget, tiers, alignment)
    if problem.fits:
        return True
    if budget < problem.least_budget:
        return False
    sets = [problem.pinned] if len(problem.free) > _EXHAUSTIVE else list(_all_sets(problem))
    return _first(problem, sets) or any(_first(problem, _diffused_sets(problem, r)) for r in _ring_sizes(problem))


def _first(problem: Problem, sets: Iterable[frozenset[int]]) -> bool:
    return any(problem.evaluate(resident) is not None for resident in sets)


def _validated(tiers: Sequence[Tier]) -> tuple[Tier, ...]:
    levels = [tier.level for tier in tiers]
    if len(set(levels)) != len(levels):
        raise ValueError(f"two tiers have the same level number: {levels}")
    direct = {tier.level for tier in tiers if tier.via is None}
    for tier in tiers:
        if tier.via is not None and tier.via not in direct:
            raise ValueError(f"level {tier.level} ({tier.name}) goes by level {tier.via}, which leads nowhere")
    return tuple(sorted(tiers, key=lambda tier: tier.level))


def _too_small(problem: Problem) -> PlanError:
    return _refusal(
        problem,
        f"the device budget of {size_text(problem.budget)} is too small: {size_text(problem.sweep.reserve)} are needed "
        f"beside the weights and {size_text(problem.pinned_bytes)} for weights that cannot be moved",
        "raise the budget, or shorten the sequence or batch",
    )


def _no_room(problem: Problem) -> PlanError:
    places = ", ".join(f"{tier.name} {size_text(tier.capacity)}" for tier in problem.tiers) or "none"
    return _refusal(
        problem,
        f"with a device budget of {size_text(problem.budget)} the other weights do not fit beyond it ({places})",
        "raise the budget or the capacity of a level",
    )


def _refusal(problem: Problem, reason: str, remedy: str) -> PlanError:
    groups = [problem.group(operator) for operator in range(len(problem.sweep.operators))]
    largest = max(range(len(groups)), key=lambda index: (groups[index], -index), default=None)
    name = problem.sweep.operators[largest].name if largest is not None else ""
    least = smallest_budget(problem.sweep, problem.tiers, alignment=problem.alignment)
    return PlanError(
        f"{reason}; the ring needs {size_text(problem.least_ring)} for the largest operator, {name!r}. The smallest "
        f"budget that works is {exact_size(least)}: {remedy}",
        budget=problem.budget,
        ring=problem.least_ring,
        largest_operator=name,
        largest_operator_bytes=problem.least_ring,
        minimum_budget=least,
    )
