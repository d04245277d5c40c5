"""What becomes of each activation that the backward needs: kept, computed again, or moved to the host and back.

The plan is made of operator positions, not of times: before operator ``free_before`` the compute stream waits until an
offloaded tensor has left and its memory is given back; at operator ``back_at`` memory is taken again and the way back
begins. The memory in use at each operator follows from these positions alone, so that the peak keeps within the budget
however long the copies take. Times decide which positions cost nothing.
"""

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, cycle, product
from typing import Literal

from vbcompile.vgpu_plan import Operator, PlanError, Tier
from vbcompile.vgpu_size import exact_size, size_text

Choice = Literal["keep", "recompute", "offload"]

_EXHAUSTIVE = 5  # most tensors of which every combination of fates is tried
_TRIES = 256  # changes that are looked at beyond


@dataclass(frozen=True)
class Activation:
    """One tensor that the forward saves for the backward; positions count the operators of the whole step.

    Attributes:
        name: For messages.
        nbytes: Size.
        produced: Operator that makes it.
        last_forward: Last operator of the forward that reads it.
        first_backward: First operator of the backward that reads it.
        last_backward: Last operator that reads it.
        recompute_ns: Time to make it again from what is there in any case; None: it cannot be.
        can_offload: Whether it may leave the device (views of other tensors may not).
        gone_by: Operator before which it has left if it is offloaded, even if that is waited for; None: its next use.

    Raises:
        ValueError: positions out of order, or a negative size or time.
    """

    name: str
    nbytes: int
    produced: int
    last_forward: int
    first_backward: int
    last_backward: int
    recompute_ns: int | None = None
    can_offload: bool = True
    gone_by: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.produced <= self.last_forward < self.first_backward <= self.last_backward:
            raise ValueError(
                f"activation {self.name!r}: positions must satisfy 0 <= produced <= last_forward < first_backward <= "
                f"last_backward, not {self.produced}, {self.last_forward}, {self.first_backward}, {self.last_backward}"
            )
        if self.gone_by is not None and self.gone_by <= self.last_forward:
            raise ValueError(
                f"activation {self.name!r}: it is read by {self.last_forward}, and to be gone by {self.gone_by}"
            )
        if self.nbytes < 0 or (self.recompute_ns or 0) < 0:
            raise ValueError(f"activation {self.name!r}: its size and time to recompute must not be negative")


@dataclass(frozen=True)
class Fate:
    """What happens to one activation.

    Attributes:
        choice: ``keep``, ``recompute`` or ``offload``.
        free_before: Operator before which its memory is given back (``keep``: never, the end of its life).
        back_at: Operator at whose start its memory is taken again, and its way back or its recomputation begins.
    """

    choice: Choice
    free_before: int
    back_at: int


@dataclass(frozen=True)
class ActivationPlan:
    """Fates in the order of the activations given.

    Attributes:
        peak_bytes: Most bytes of these activations, and reserved, that are on the device at one operator.
        kept_peak_bytes: The same if all were kept.
        step_ns: Time of the step on the simulated clock.
        kept_step_ns: Time of the step if all were kept.
        budget: Bytes that were allowed.
        host_bytes: Bytes that wait on the other tier at the same time, at most.
    """

    activations: tuple[Activation, ...]
    fates: tuple[Fate, ...]
    budget: int
    peak_bytes: int
    kept_peak_bytes: int
    step_ns: int
    kept_step_ns: int
    host_bytes: int

    @property
    def declined(self) -> bool:
        """Whether all can be kept."""
        return all(fate.choice == "keep" for fate in self.fates)

    def chosen(self, choice: Choice) -> tuple[Activation, ...]:
        """The activations with this fate."""
        return tuple(a for a, fate in zip(self.activations, self.fates, strict=True) if fate.choice == choice)


def plan_activations(
    operators: Sequence[Operator],
    activations: Sequence[Activation],
    budget: int,
    tier: Tier,
    reserved: Sequence[int] = (),
) -> ActivationPlan:
    """Choose fates with the least time among those whose peak keeps within the budget.

    Up to five activations are searched completely; more by price (time per byte relieved at the peak), then improved.

    Args:
        operators: Forward and backward of one step.
        activations: What the forward saves.
        budget: Bytes of device memory for them.
        tier: Where offloaded ones go; its capacity holds.
        reserved: Bytes within the budget that other things take during each operator; empty: none.

    Raises:
        PlanError: even with everything away whenever it is not in use, the peak is over the budget; it names the
            smallest budget that works.
        ValueError: an activation's position is beyond the operators, the budget is negative, or ``reserved`` does not
            have one number for each operator.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ValueError(f"the budget must be a number of bytes of at least 0, not {budget!r}")
    for activation in activations:
        if activation.last_backward >= len(operators):
            raise ValueError(
                f"activation {activation.name!r} is used by operator {activation.last_backward}, "
                f"and there are {len(operators)}"
            )
    if reserved and len(reserved) != len(operators):
        raise ValueError(f"{len(reserved)} reserved sizes for {len(operators)} operators")
    problem = _Problem(tuple(operators), tuple(activations), budget, tier, tuple(reserved))
    kept = problem.evaluate(("keep",) * len(activations))
    if kept.fits:
        return problem.finish(kept, kept)
    least = problem.evaluate(problem.tightest)
    if not least.fits:
        raise _too_small(problem, least, kept)
    best = _exhaustive(problem) if len(activations) <= _EXHAUSTIVE else _by_price(problem, least)
    return problem.finish(best, kept)


@dataclass(frozen=True)
class _Outcome:
    ways: tuple[str, ...]
    fates: tuple[Fate, ...]
    step_ns: int
    peak: int
    peak_operator: int
    host_bytes: int
    fits: bool

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.step_ns, sum(way != "keep" for way in self.ways), self.peak


class _Problem:
    """Ways are the three choices, and ``away``: offloaded with all the haste that the budget asks for, which waits."""

    def __init__(
        self,
        operators: tuple[Operator, ...],
        activations: tuple[Activation, ...],
        budget: int,
        tier: Tier,
        reserved: tuple[int, ...],
    ) -> None:
        self.reserved = reserved or (0,) * len(operators)
        self.operators, self.activations, self.budget, self.tier = operators, activations, budget, tier
        self.write_ns = [tier.write_ns(a.nbytes) for a in activations]
        self.read_ns = [tier.read_ns(a.nbytes) for a in activations]
        self.by_production = sorted(range(len(activations)), key=lambda i: (activations[i].produced, i))
        self.by_need = sorted(range(len(activations)), key=lambda i: (activations[i].first_backward, i))

    def ways_of(self, index: int) -> tuple[str, ...]:
        activation = self.activations[index]
        moved = ("offload", "away") if activation.can_offload and activation.nbytes else ()
        return ("keep", *(("recompute",) if activation.recompute_ns is not None else ()), *moved)

    @cached_property
    def tightest(self) -> tuple[str, ...]:
        """Each activation on the device only while it is in use; recomputed where either is possible, for capacity."""
        return tuple(
            "recompute" if "recompute" in ways else ways[-1] for ways in map(self.ways_of, range(len(self.activations)))
        )

    def starts(self, ways: Sequence[str]) -> list[int]:
        """Begin of each operator if nothing is waited for, and the end of the last."""
        return [0, *accumulate(self._durations(ways))]

    def _durations(self, ways: Sequence[str]) -> list[int]:
        durations = [operator.nanoseconds for operator in self.operators]
        for activation, way in zip(self.activations, ways, strict=True):
            if way == "recompute":
                durations[activation.first_backward] += activation.recompute_ns or 0
        return durations

    def evaluate(self, ways: Sequence[str]) -> _Outcome:
        unhurried = self._unhurried(ways)
        fates = [
            unhurried[index] if way == "offload" else self._simple_fate(activation, way)
            for index, (activation, way) in enumerate(zip(self.activations, ways, strict=True))
        ]
        live, away = self._memory(fates)
        self._relax(ways, fates, unhurried, live)
        peak = max(live, default=0)
        host = max(away, default=0)
        fits = peak <= self.budget and host <= self.tier.capacity
        step = self._step_ns(ways, fates)
        return _Outcome(tuple(ways), tuple(fates), step, peak, live.index(peak) if live else 0, host, fits)

    def _unhurried(self, ways: Sequence[str]) -> dict[int, Fate]:
        """For each offloaded one the positions at which nothing has to wait, if the step runs at its own pace."""
        starts = self.starts(ways)
        moved = [index for index in self.by_production if ways[index] in ("offload", "away")]
        gone, link = {}, 0
        for index in moved:
            activation = self.activations[index]
            link = max(link, starts[activation.produced + 1]) + self.write_ns[index]
            free = max(bisect_left(starts, link), activation.last_forward + 1)
            gone[index] = min(free, activation.first_backward, activation.gone_by or free)
        fates, link = {}, starts[-1]
        for index in sorted(moved, key=lambda i: (self.activations[i].first_backward, i), reverse=True):
            activation = self.activations[index]
            link = min(link, starts[activation.first_backward]) - self.read_ns[index]
            earliest = min(gone[index] + 1, activation.first_backward)
            fates[index] = Fate("offload", gone[index], max(bisect_right(starts, link) - 1, earliest))
        return fates

    def _relax(self, ways: Sequence[str], fates: list[Fate], unhurried: dict[int, Fate], live: list[int]) -> None:
        """Let those that are hurried away stay longer and return earlier where memory is left."""
        hurried = [index for index in self.by_production if ways[index] == "away"]
        for index in hurried:
            size, position = self.activations[index].nbytes, fates[index].free_before
            last = min(unhurried[index].free_before, fates[index].back_at - 1)
            while position < last and live[position] + size <= self.budget:
                live[position] += size
                position += 1
            fates[index] = dataclasses.replace(fates[index], free_before=position)
        for index in reversed(hurried):
            size, position = self.activations[index].nbytes, fates[index].back_at
            first = max(unhurried[index].back_at, fates[index].free_before + 1)
            while position > first and live[position - 1] + size <= self.budget:
                position -= 1
                live[position] += size
            fates[index] = dataclasses.replace(fates[index], back_at=position)

    @staticmethod
    def _simple_fate(activation: Activation, way: str) -> Fate:
        if way == "keep":
            return Fate("keep", activation.last_backward + 1, activation.last_backward + 1)
        choice: Choice = "recompute" if way == "recompute" else "offload"
        return Fate(choice, activation.last_forward + 1, activation.first_backward)

    def _memory(self, fates: Sequence[Fate]) -> tuple[list[int], list[int]]:
        """Bytes on the device, and on the other tier, during each operator."""
        here, there = [0] * (len(self.operators) + 1), [0] * (len(self.operators) + 1)
        for activation, fate in zip(self.activations, fates, strict=True):
            here[activation.produced] += activation.nbytes
            here[activation.last_backward + 1] -= activation.nbytes
            if fate.choice != "keep" and fate.free_before < fate.back_at:
                here[fate.free_before] -= activation.nbytes
                here[fate.back_at] += activation.nbytes
            if fate.choice == "offload":
                there[activation.produced] += activation.nbytes
                there[activation.last_backward + 1] -= activation.nbytes
        live = [used + size for used, size in zip(accumulate(here[:-1]), self.reserved, strict=True)]
        return live, list(accumulate(there[:-1]))

    def _step_ns(self, ways: Sequence[str], fates: Sequence[Fate]) -> int:
        """Compute queue, a queue to the host in order of production, a queue back in order of need."""
        leaving, returning = _grouped(len(self.operators), self.activations, fates)
        written = [0] * len(fates)
        arrived = [0] * len(fates)
        out = back = now = 0
        due: list[list[int]] = [[] for _ in self.operators]
        for index, fate in enumerate(fates):
            if fate.choice == "offload":
                due[fate.free_before].append(index)
        for position, duration in enumerate(self._durations(ways)):
            now = max((now, *(written[index] for index in due[position])))
            for index in returning[position]:
                back = arrived[index] = max(back, now) + self.read_ns[index]
            needed = (i for i in self._needed[position] if fates[i].choice == "offload")
            now = max((now, *(arrived[index] for index in needed))) + duration
            for index in leaving[position]:
                out = written[index] = max(out, now) + self.write_ns[index]
        return now

    @cached_property
    def _needed(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.operators]
        for index, activation in enumerate(self.activations):
            found[activation.first_backward].append(index)
        return found

    def finish(self, best: _Outcome, kept: _Outcome) -> ActivationPlan:
        return ActivationPlan(
            self.activations,
            best.fates,
            self.budget,
            best.peak,
            kept.peak,
            best.step_ns,
            kept.step_ns,
            best.host_bytes,
        )


def _grouped(
    count: int, activations: Sequence[Activation], fates: Sequence[Fate]
) -> tuple[list[list[int]], list[list[int]]]:
    """For each operator, the activations whose way out begins at its end, and whose way back begins at its start."""
    leaving: list[list[int]] = [[] for _ in range(count)]
    returning: list[list[int]] = [[] for _ in range(count)]
    for index, fate in enumerate(fates):
        if fate.choice == "offload":
            leaving[activations[index].produced].append(index)
            returning[fate.back_at].append(index)
    for indices in returning:
        indices.sort(key=lambda index: (activations[index].first_backward, index))
    return leaving, returning


def _exhaustive(problem: _Problem) -> _Outcome:
    every = product(*map(problem.ways_of, range(len(problem.activations))))
    return min((o for o in map(problem.evaluate, every) if o.fits), key=lambda outcome: outcome.rank)


def _by_price(problem: _Problem, least: _Outcome) -> _Outcome:
    """From all kept, relieve the peak at the best price until it fits; then take back what turned out unneeded."""
    ways = ["keep"] * len(problem.activations)
    outcome = problem.evaluate(ways)
    while not outcome.fits:
        step = _cheapest(problem, ways, outcome)
        if step is None:
            outcome = least
            break
        ways[step[0]] = step[1]
        outcome = problem.evaluate(ways)
    return _improved(problem, outcome)


def _cheapest(problem: _Problem, ways: Sequence[str], outcome: _Outcome) -> tuple[int, str] | None:
    """The change that relieves the peak operator at the lowest estimated time per byte."""
    peak = outcome.peak_operator
    starts = problem.starts(ways)
    late_out, late_back = _lateness(problem, ways, starts, peak)
    found: list[tuple[float, int, str]] = []
    for index, activation in enumerate(problem.activations):
        if not _idle_at(activation, peak) or not activation.nbytes:
            continue
        possible = problem.ways_of(index)
        if ways[index] == "keep" and "recompute" in possible:
            found.append(((activation.recompute_ns or 0) / activation.nbytes, index, "recompute"))
        if ways[index] == "keep" and "offload" in possible:
            found.append((max(late_out[index], late_back[index], 0) / activation.nbytes, index, "offload"))
        if ways[index] in ("keep", "offload") and "away" in possible:
            price = problem.write_ns[index] + problem.read_ns[index]
            found.append((price / activation.nbytes, index, "away"))
    useful = [item for item in found if ways[item[1]] == "keep" or _holds(outcome.fates[item[1]], peak)]
    return min(useful)[1:] if useful else None


def _lateness(
    problem: _Problem, ways: Sequence[str], starts: Sequence[int], peak: int
) -> tuple[dict[int, int], dict[int, int]]:
    """By how much each activation, offloaded too, would make the link overrun: on the way out, and back.

    On the way out, what is produced from some operator on has to leave between there and the peak; on the way back,
    what is needed up to some operator has to return between the peak and there. One more activation counts in the
    windows of all that are produced before it, or needed after it.
    """
    acts = problem.activations
    out_windows = [max(starts[peak] - starts[min(a.produced + 1, peak)], 0) for a in acts]
    back_windows = [max(starts[max(a.first_backward, peak)] - starts[peak], 0) for a in acts]
    late_out = _overrun(problem.by_production[::-1], ways, problem.write_ns, out_windows)
    return late_out, _overrun(problem.by_need, ways, problem.read_ns, back_windows)


def _overrun(order: Sequence[int], ways: Sequence[str], cost: Sequence[int], windows: Sequence[int]) -> dict[int, int]:
    """Each one's cost beyond the least slack of the windows that it would count in; those grow along ``order``."""
    queued, before = 0, {}
    for index in order:
        before[index] = queued
        queued += cost[index] if ways[index] == "offload" else 0
    late, slack = {}, None
    for index in reversed(order):
        own = windows[index] - before[index]
        if ways[index] == "offload":
            slack = own - cost[index] if slack is None else min(slack, own - cost[index])
        late[index] = cost[index] - (own if slack is None else min(slack, own))
    return late


def _idle_at(activation: Activation, operator: int) -> bool:
    return activation.last_forward < operator < activation.first_backward


def _holds(fate: Fate, operator: int) -> bool:
    """Whether an activation with this fate is on the device at an operator between its two uses."""
    return not fate.free_before <= operator < fate.back_at


def _improved(problem: _Problem, best: _Outcome) -> _Outcome:
    """Change one fate at a time while that saves time, the largest first, for a bounded number of tries."""
    order = sorted(range(len(best.ways)), key=lambda i: (best.ways[i] == "keep", -problem.activations[i].nbytes, i))
    changes = [(index, way) for index in order for way in problem.ways_of(index)]
    tries, since = 0, 0
    for index, way in cycle(changes):
        if way != best.ways[index]:
            tries += 1
            candidate = problem.evaluate((*best.ways[:index], way, *best.ways[index + 1 :]))
            if candidate.fits and candidate.rank < best.rank:
                best, since = candidate, 0
        since += 1
        if tries >= _TRIES or since >= len(changes):
            break
    return best


def _too_small(problem: _Problem, least: _Outcome, kept: _Outcome) -> PlanError:
    name = problem.operators[least.peak_operator].name if problem.operators else ""
    crowded = least.peak <= problem.budget
    works = kept.peak if crowded else least.peak
    if crowded:
        reason = (
            f"{size_text(least.host_bytes)} would have to leave, and {problem.tier.name} has "
            f"{size_text(problem.tier.capacity)}"
        )
        remedy = (
            f"A budget of {exact_size(works)} works, in which all are kept: raise it, or the capacity of that level"
        )
    else:
        reason = f"{size_text(least.peak)} are in use there even if everything else is moved away or recomputed"
        remedy = f"The smallest budget that works is {exact_size(works)}: raise it, or shorten the sequence or batch"
    return PlanError(
        f"the activation budget of {size_text(problem.budget)} is too small for the largest operator, {name!r}: "
        f"{reason}. {remedy}",
        budget=problem.budget,
        largest_operator=name,
        largest_operator_bytes=least.peak,
        minimum_budget=works,
    )
