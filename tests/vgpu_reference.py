"""References for the planner's tests, written from the rules alone: a machine of queues, and small random sweeps."""

import random
from itertools import combinations

from vbcompile.vgpu_plan import Operator, Sweep, Tier, Weight, padded
from vbcompile.vgpu_slots import place, stays


def random_sweep(seed: int, count: int, *, twice: bool = False) -> Sweep:
    """A sweep of ``count`` weights of a few sizes; with ``twice`` each is used again in reverse order."""
    random_ = random.Random(seed)
    sizes = [random_.choice((1000, 1000, 1000, 2000, 3000)) for _ in range(count)]
    weights = tuple(Weight(f"w{index}", size) for index, size in enumerate(sizes))
    forward = [Operator(f"f{i}", int(random_.uniform(0.05, 1.5) * size), (i,)) for i, size in enumerate(sizes)]
    if random_.random() < 0.3 and count > 2:
        forward[1] = Operator("pair", forward[1].nanoseconds, (1, 2))
    backward = [Operator(f"b{i}", 2 * forward[i].nanoseconds, (i,)) for i in reversed(range(count))] if twice else []
    return Sweep(weights, (*forward, *backward), reserve=random_.choice((0, 500)))


def link(rate: int = 10**9, level: int = 1, **rest) -> Tier:
    """One byte per nanosecond unless told otherwise."""
    return Tier(level, rest.pop("name", "cpu"), rest.pop("capacity", 10**12), rate, **rest)


class Machine:
    """A compute queue and link queues advanced event by event: whatever can start, starts."""

    def __init__(self, plan, steps: int) -> None:
        self.plan, self.steps = plan, steps
        self.operators = [(s, k) for s in range(steps) for k in range(len(plan.sweep.operators))]
        self.queues = {tier.level: [] for tier in plan.tiers}
        for step in range(steps):
            for index, copy in enumerate(plan.copies):
                self.queues[copy.link].append(("copy", step, index))
            for index, read in enumerate(plan.reads):
                self.queues[read.level].append(("read", step, index))
        self.done: dict[tuple, int] = {}

    def run(self) -> list[int]:
        """End of each step."""
        queues = {"compute": [("operator", *o) for o in self.operators], **self.queues}
        free_at = dict.fromkeys(queues, 0)
        while any(queues.values()):
            startable = []
            for lane, queue in queues.items():
                if queue:
                    ready = self._ready(queue[0])
                    if ready is not None:
                        startable.append((max(ready, free_at[lane]), str(lane), lane))
            assert startable, f"deadlock at {[queue[0] for queue in queues.values() if queue]}"
            start, _, lane = min(startable)
            job = queues[lane].pop(0)
            free_at[lane] = self.done[job] = start + self._duration(job)
        last = len(self.plan.sweep.operators) - 1
        return [self.done["operator", step, last] for step in range(self.steps)]

    def _ready(self, job) -> int | None:
        needs = self._needs(job)
        if any(need not in self.done for need in needs):
            return None
        return max((self.done[need] for need in needs), default=0)

    def _needs(self, job) -> list[tuple]:
        kind, step, index = job
        if kind == "operator":
            return [("copy", step, j) for j in self.plan.waits[index]]
        if kind == "read":
            read = self.plan.reads[index]
            return self._earlier("copy", step, read.free_after, len(self.plan.copies))
        copy = self.plan.copies[index]
        own = [] if copy.read is None else [("read", step, copy.read)]
        return own + self._earlier("operator", step, copy.free_after, len(self.plan.sweep.operators))

    @staticmethod
    def _earlier(kind: str, step: int, index: int, count: int) -> list[tuple]:
        if index >= 0:
            return [(kind, step, index)]
        return [(kind, step - 1, index + count)] if step else []

    def _duration(self, job) -> int:
        kind, _, index = job
        if kind == "operator":
            return self.plan.sweep.operators[index].nanoseconds
        if kind == "read":
            read = self.plan.reads[index]
            return self.plan.tier(read.level).read_ns(read.nbytes)
        return self.plan.tier(self.plan.copies[index].link).read_ns(self.plan.copies[index].nbytes)


def brute_force(sweep: Sweep, budget: int, tier: Tier, alignment: int) -> int | None:
    """Least step time over every resident set, each with the whole rest of the budget as ring; None: none works."""
    sizes = [padded(weight.nbytes, alignment) for weight in sweep.weights]
    everything = range(len(sizes))
    found = []
    for count in range(len(sizes) + 1):
        for resident in combinations(everything, count):
            ring = budget - sweep.reserve - sum(sizes[index] for index in resident)
            if ring < 0:
                continue
            streamed = frozenset(everything) - set(resident)
            for hold in {-1, 0, ring // 4, ring // 2, ring - ring // 4}:
                step = naive_step(sweep, streamed, sizes, ring, hold, tier)
                if step is not None:
                    found.append(step)
    return min(found, default=None)


def naive_step(sweep: Sweep, streamed, sizes, ring: int, hold: int, tier: Tier) -> int | None:
    """Step time by plain recurrences over many steps, as an average over the later ones."""
    entries = stays(sweep, streamed, sizes, hold)
    places = place(entries, ring, len(sweep.operators))
    if places is None:
        return None
    now = busy = 0
    ends: list[int] = []
    marks = []
    for step in range(8):
        for index, operator in enumerate(sweep.operators):
            for entry, slot in zip(entries, places, strict=True):
                if entry.first == index:
                    freed = step * len(sweep.operators) + slot.free_after
                    busy = max(busy, ends[freed] if freed >= 0 else 0)
                    busy += tier.read_ns(sweep.weights[entry.weight].nbytes)
                    now = max(now, busy)
            now += operator.nanoseconds
            ends.append(now)
        marks.append(now)
    return -((marks[3] - marks[7]) // 4)


def llama_sweep(name: str, bits: float, tokens: int, *, training: bool = False) -> Sweep:
    """Llama 3's matrices in order of use on a card of 2.68 TB/s and 593 TFLOPS.

    The head stays in 16 bits, and is used for the last token only, except in training.
    """
    hidden, inner, layers, keys, words = {
        "8B": (4096, 14336, 32, 1024, 128256),
        "70B": (8192, 28672, 80, 1024, 128256),
    }[name]
    parts = {
        "q": hidden * hidden,
        "k": hidden * keys,
        "v": hidden * keys,
        "o": hidden * hidden,
        "gate": hidden * inner,
        "up": hidden * inner,
        "down": inner * hidden,
    }
    rows = [(f"layers.{n}.{part}", count, bits) for n in range(layers) for part, count in parts.items()]
    rows.append(("lm_head", hidden * words, 16))
    weights = tuple(Weight(row, int(count * width / 8)) for row, count, width in rows)
    used_for = [tokens] * (len(rows) - 1) + [tokens if training else 1]
    forward = [
        Operator(row, int(max(weights[i].nbytes / 2.68e12, 2 * count * used_for[i] / 593e12) * 1e9) + 5000, (i,))
        for i, (row, count, _) in enumerate(rows)
    ]
    backward = [Operator(f"{o.name} backward", 2 * o.nanoseconds, o.weights) for o in reversed(forward)]
    return Sweep(weights, (*forward, *(backward if training else ())))
