"""A clock for plans: one compute stream, and one queue per link that carries its copies in order.

    time of operator k = max(end of operator k - 1, arrival of each weight that it waits for) + duration
    time of copy j     = max(link free, slot freed, bytes staged) + latency + bytes / bandwidth

The same clock runs the policies that the plan is compared with: least-recently-used replacement, and copying a weight
when its operator is reached.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vbcompile.vgpu_plan import Copy, Operator, Plan, Read, Sweep, Tier

_STEPS = 8  # a step repeats exactly after the second or third, unless copies and slots drift against each other


class Pace(NamedTuple):
    """Time of one step in the long run, and the part of it in which computation waits, in nanoseconds."""

    step_ns: int
    stall_ns: int


class Event(NamedTuple):
    """Something that occupies one lane (``compute`` or a tier's name) for a while, in ns from the step's begin."""

    lane: str
    name: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class PolicyOutcome:
    """What a replacement policy makes of one step in the long run.

    Attributes:
        step_ns: Time of one step.
        stall_ns: Part of it in which computation waits for a copy.
        streamed_bytes: Bytes copied to the device per step.
        hits: Uses per step that found their weight on the device.
        misses: Uses per step that did not.
    """

    step_ns: int
    stall_ns: int
    streamed_bytes: int
    hits: int
    misses: int


class _Clock:
    """State of the machine between steps."""

    def __init__(
        self, operators: Sequence[Operator], copies: Sequence[Copy], reads: Sequence[Read], tiers: Sequence[Tier]
    ) -> None:
        by_level = {tier.level: tier for tier in tiers}
        self.durations = [operator.nanoseconds for operator in operators]
        self.copies, self.reads = copies, reads
        self.copy_ns = [by_level[copy.link].read_ns(copy.nbytes) for copy in copies]
        self.read_ns = [by_level[read.level].read_ns(read.nbytes) for read in reads]
        self.waits: list[list[int]] = [[] for _ in operators]
        for index, copy in enumerate(copies):
            self.waits[copy.first_use].append(index)
        self.now = self.stalled = 0
        self.link = dict.fromkeys(by_level, 0)
        self.operator_ends = [0] * len(operators)  # of the step before: index k - count is operator k of that step
        self.copy_ends = [0] * len(copies)

    def step(self, events: list[tuple[str | int, int, int, int]] | None = None) -> None:
        """Run one step; ``events`` collects (what, index, start, end)."""
        before, before_copies = self.operator_ends, self.copy_ends
        ends, copy_ends = [0] * len(before), [0] * len(before_copies)
        for index, duration in enumerate(self.durations):
            start = self.now
            for j in self.waits[index]:
                copy = self.copies[j]
                free = before[copy.free_after] if copy.free_after < 0 else ends[copy.free_after]
                if copy.read is not None:
                    free = max(free, self._read(copy.read, copy_ends, before_copies, events))
                begin = max(self.link[copy.link], free)
                self.link[copy.link] = copy_ends[j] = begin + self.copy_ns[j]
                start = max(start, copy_ends[j])
                if events is not None:
                    events.append((copy.link, copy.weight, begin, copy_ends[j]))
            self.stalled += start - self.now
            self.now = ends[index] = start + duration
            if events is not None:
                events.append(("compute", index, start, self.now))
        self.operator_ends, self.copy_ends = ends, copy_ends

    def _read(
        self,
        index: int,
        ends: list[int],
        before: list[int],
        events: list[tuple[str | int, int, int, int]] | None,
    ) -> int:
        read = self.reads[index]
        free = before[read.free_after] if read.free_after < 0 else ends[read.free_after]
        begin = max(self.link[read.level], free)
        self.link[read.level] = begin + self.read_ns[index]
        if events is not None:
            events.append((read.level, read.weight, begin, self.link[read.level]))
        return self.link[read.level]

    def shape(self) -> tuple[int, ...]:
        """What the next step depends on, relative to now: equal shapes are followed by equal steps."""
        now = self.now
        times = (*self.link.values(), *self.operator_ends, *self.copy_ends)
        return tuple(time - now for time in times)


def pace(operators: Sequence[Operator], copies: Sequence[Copy], reads: Sequence[Read], tiers: Sequence[Tier]) -> Pace:
    """Time per step once the first steps' start-up is over; exact where steps become equal, else an average."""
    clock = _Clock(operators, copies, reads, tiers)
    shape, marks = None, [(0, 0)]
    for _ in range(_STEPS):
        clock.step()
        marks.append((clock.now, clock.stalled))
        reached = clock.shape()
        if reached == shape:
            return Pace(clock.now - marks[-2][0], clock.stalled - marks[-2][1])
        shape = reached
    half = _STEPS // 2
    return Pace(-((marks[half][0] - clock.now) // half), -((marks[half][1] - clock.stalled) // half))


def timeline(plan: Plan) -> list[Event]:
    """One even step of a plan, as it runs on the simulated clock, in order of start.

    Copies that run ahead into the next step begin before 0.
    """
    clock = _Clock(plan.sweep.operators, plan.copies, plan.reads, plan.tiers)
    for _ in range(_STEPS):
        clock.step()
    origin = clock.now
    collected: list[tuple[str | int, int, int, int]] = []
    clock.step(collected)
    events = []
    for what, index, start, end in collected:
        if isinstance(what, int):
            events.append(Event(plan.tier(what).name, plan.sweep.weights[index].name, start - origin, end - origin))
        else:
            events.append(Event(what, plan.sweep.operators[index].name, start - origin, end - origin))
    return sorted(events, key=lambda event: (event.start_ns, event.end_ns, event.lane))


def simulate_lru(sweep: Sweep, budget: int, tier: Tier, lookahead: int = 0) -> PolicyOutcome:
    """Least-recently-used replacement: a weight is copied when it is missed, in place of the one used longest ago.

    Args:
        budget: Bytes of device memory, ``sweep.reserve`` included.
        tier: Where all weights live and what carries them.
        lookahead: Number of following weights that are fetched ahead, if there is room without touching what the next
            operators need.

    Raises:
        ValueError: the weights of one operator do not fit.
    """
    policy = _Lru(sweep, budget - sweep.reserve, tier, lookahead)
    for _ in range(_STEPS // 2):
        policy.step()
    return _average(policy, _STEPS // 2)


def simulate_on_demand(sweep: Sweep, resident: frozenset[int], tier: Tier) -> PolicyOutcome:
    """A fixed resident set, and each other weight copied when its operator is reached: no copy runs ahead."""
    policy = _OnDemand(sweep, resident, tier)
    return _average(policy, 1)


class _Policy:
    """A clock with one link, whose subclass decides what is copied before an operator."""

    def __init__(self, sweep: Sweep, tier: Tier) -> None:
        self.sweep, self.tier = sweep, tier
        self.now = self.stalled = self.moved = self.hits = self.misses = self.link = 0
        self.needed: frozenset[int] = frozenset()

    def arrival(self, weight: int) -> int:
        raise NotImplementedError

    def after_wait(self, position: int) -> None:
        """Called when the operator's weights are on the device."""

    def step(self) -> None:
        position = 0
        for operator in self.sweep.operators:
            weights = tuple(dict.fromkeys(operator.weights))
            self.needed = frozenset(weights)
            start = max((self.now, *(self.arrival(weight) for weight in weights)))
            self.stalled += start - self.now
            self.now = start
            position += len(weights)
            self.after_wait(position)
            self.now += operator.nanoseconds

    def copy(self, weight: int) -> int:
        nbytes = self.sweep.weights[weight].nbytes
        self.link = max(self.link, self.now) + self.tier.read_ns(nbytes)
        self.moved += nbytes
        return self.link


class _OnDemand(_Policy):
    def __init__(self, sweep: Sweep, resident: frozenset[int], tier: Tier) -> None:
        super().__init__(sweep, tier)
        self.resident = resident

    def arrival(self, weight: int) -> int:
        if weight in self.resident:
            self.hits += 1
            return 0
        self.misses += 1
        return self.copy(weight)


class _Lru(_Policy):
    def __init__(self, sweep: Sweep, room: int, tier: Tier, lookahead: int) -> None:
        super().__init__(sweep, tier)
        self.room, self.lookahead = room, lookahead
        self.cache: OrderedDict[int, int] = OrderedDict()  # weight -> arrival, least recently used first
        self.used = 0
        self.order = [w for operator in sweep.operators for w in dict.fromkeys(operator.weights)]

    def arrival(self, weight: int) -> int:
        if weight in self.cache:
            self.hits += 1
            self.cache.move_to_end(weight)
            return self.cache[weight]
        self.misses += 1
        if not self._fetch(weight, self.needed):
            raise ValueError(f"the weights of one operator do not fit in {self.room} bytes")
        return self.cache[weight]

    def after_wait(self, position: int) -> None:
        count = len(self.order)
        ahead = [self.order[(position + step) % count] for step in range(self.lookahead if count else 0)]
        for place, weight in enumerate(ahead):
            if weight not in self.cache and not self._fetch(weight, self.needed | set(ahead[: place + 1])):
                return

    def _fetch(self, weight: int, keep: frozenset[int]) -> bool:
        size = self.sweep.weights[weight].nbytes
        while self.used + size > self.room:
            victim = next((other for other in self.cache if other not in keep), None)
            if victim is None:
                return False
            del self.cache[victim]
            self.used -= self.sweep.weights[victim].nbytes
        self.cache[weight] = self.copy(weight)
        self.used += size
        return True


def _average(policy: _Policy, steps: int) -> PolicyOutcome:
    """Figures per step over the next ``steps`` steps, rounded up."""
    before = (policy.now, policy.stalled, policy.moved, policy.hits, policy.misses)
    for _ in range(steps):
        policy.step()
    after = (policy.now, policy.stalled, policy.moved, policy.hits, policy.misses)
    return PolicyOutcome(*(-((a - b) // steps) for a, b in zip(before, after, strict=True)))


def resident_prefix(sweep: Sweep, room: int) -> frozenset[int]:
    """The weights that a split at one point keeps on the device: in order of first use, as many as fit."""
    chosen: set[int] = set()
    for weight in dict.fromkeys(w for operator in sweep.operators for w in operator.weights):
        room -= sweep.weights[weight].nbytes
        if room < 0:
            break
        chosen.add(weight)
    return frozenset(chosen)


__all__ = [
    "Event",
    "Pace",
    "PolicyOutcome",
    "pace",
    "resident_prefix",
    "simulate_lru",
    "simulate_on_demand",
    "timeline",
]
