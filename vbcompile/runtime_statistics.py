"""What the runtime counts in every step, and what it records on request: a timeline, and memory over time."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vbcompile.runtime_device import CopyQueue, MemoryDevice
from vbcompile.vgpu import VGPUStack
from vbcompile.vgpu_plan import Plan

_KEPT_STEPS = 64
_COUNTERS = (
    *("steps", "abandoned", "streamed_bytes", "hits", "misses", "late", "evictions"),
    *("wasted_bytes", "detour_bytes", "fetched_bytes", "host_wait_ns"),
)


class Span(NamedTuple):
    """Something that occupied one lane (``compute``, ``stall``, or a link's name) for a while.

    Times in ns from the step's begin; a copy that ran ahead begins before 0. ``nbytes`` is 0 for what moves nothing.
    """

    lane: str
    name: str
    start_ns: int
    end_ns: int
    nbytes: int


class MemorySample(NamedTuple):
    """Bytes allocated on the device when the host queued something, in ns of the host's clock from the step's begin."""

    time_ns: int
    nbytes: int


@dataclass
class LinkCount:
    """Copies and bytes that a link has carried."""

    copies: int = 0
    nbytes: int = 0


class _Step(NamedTuple):
    begin: Any
    end: Any
    streamed: int


@dataclass
class Statistics:
    """Counters since the start.

    Attributes:
        links: By name of the link: ``h2d``, ``d2h``, ``disk``, ``cuda:1``, ``to cuda:1``.
        streamed_bytes: Copied into the ring, or on a detour around it.
        hits: Waits that found their copy under way or done.
        misses: Waits that had to begin it.
        late: Waits whose copy was not done yet when the host queued them.
        evictions: Copies whose bytes in the ring were given to another.
        wasted_bytes: Copied and overwritten before anybody waited for them.
        detour_bytes: Copied to memory of their own because their place was in use.
        fetched_bytes: Copied on demand, outside of the plan.
        host_wait_ns: Time for which the host waited for reads from disk.
        steps: Complete steps; ``abandoned`` the others.
    """

    plan: Plan
    links: dict[str, LinkCount] = field(default_factory=dict)
    streamed_bytes: int = 0
    hits: int = 0
    misses: int = 0
    late: int = 0
    evictions: int = 0
    wasted_bytes: int = 0
    detour_bytes: int = 0
    fetched_bytes: int = 0
    host_wait_ns: int = 0
    steps: int = 0
    abandoned: int = 0
    _begin: Any = None
    _before: int = 0
    _open: list[_Step] = field(default_factory=list)  # their events may still lie ahead
    _times: list[tuple[int, int]] = field(default_factory=list)  # (ns, streamed bytes)

    def count(self, link: str, nbytes: int) -> None:
        found = self.links.setdefault(link, LinkCount())
        found.copies += 1
        found.nbytes += nbytes

    def step_begin(self, device: MemoryDevice) -> None:
        self._begin, self._before = device.record(timing=True), self.streamed_bytes

    def step_end(self, device: MemoryDevice) -> None:
        if self._begin is not None:
            self._open.append(_Step(self._begin, device.record(timing=True), self.streamed_bytes - self._before))
        self.steps += 1
        self._begin = None
        self._harvest(device)

    def abandon(self) -> None:
        self.abandoned += 1
        self._begin = None

    def to_dict(self, device: MemoryDevice, recorder: "Recorder | None" = None) -> dict[str, Any]:
        """Counters, ready for JSON.

        ``step_ns`` is the shortest of the last steps that are over (None before the first), ``predicted_step_ns`` what
        the plan expects. ``stall_ns`` and ``gbps`` of the last recorded step are there only while recording.
        """
        self._harvest(device)
        measured = min((ns for ns, _ in self._times), default=None)
        found = {
            "links": {name: {"copies": link.copies, "bytes": link.nbytes} for name, link in self.links.items()},
            "streamed_bytes_per_step": self._times[-1][1] if self._times else None,
            "planned_bytes_per_step": self.plan.streamed_bytes,
            "resident_bytes": self.plan.resident_bytes,
            "ring_bytes": self.plan.ring_bytes,
            "peak_bytes": device.peak_bytes(),
            "step_ns": measured,
            "predicted_step_ns": self.plan.prediction.step_ns,
        }
        found |= {name: getattr(self, name) for name in _COUNTERS}
        return found | (recorder.summary() if recorder is not None else {})

    def _harvest(self, device: MemoryDevice) -> None:
        while self._open and device.is_over(self._open[0].end):
            step = self._open.pop(0)
            self._times.append((device.elapsed_ns(step.begin, step.end), step.streamed))
        del self._times[:-_KEPT_STEPS]


def combined(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counters of several streamers of one model, one after the other; figures of a step are the last one's."""
    found: dict[str, Any] = dict(runs[-1]) if runs else {}
    for name in _COUNTERS if runs else ():
        found[name] = sum(run[name] for run in runs)
    links: dict[str, Counter[str]] = {}
    for run in runs:
        for name, link in run["links"].items():
            links.setdefault(name, Counter()).update(link)
    return found | ({"links": {name: dict(link) for name, link in links.items()}} if runs else {})


def table(found: Mapping[str, Any]) -> str:
    """The counters of :meth:`Statistics.to_dict` as lines of text: one per link, then steps and uses."""
    rates = found.get("gbps", {})
    lines = [f"{'link':<10} {'copies':>9} {'GB':>10}  GB/s while busy (last recorded step)"]
    for name, link in sorted(found["links"].items()):
        rate = f"{rates[name]:.1f}" if name in rates else "-"
        lines.append(f"{name:<10} {link['copies']:>9} {link['bytes'] / 1e9:>10.3f}  {rate}")
    step = "none yet" if found["step_ns"] is None else f"{found['step_ns'] / 1e6:.2f} ms"
    lines.append(f"step: {step} measured, {found['predicted_step_ns'] / 1e6:.2f} ms predicted; {found['steps']} steps")
    stall = f", computation waited {found['stall_ns'] / 1e6:.2f} ms in the last recorded step" if rates else ""
    lines.append(f"host waited {found['host_wait_ns'] / 1e6:.2f} ms for reads from disk{stall}")
    lines.append(
        f"uses: {found['hits']} prefetched, {found['misses']} not, {found['late']} not there yet when queued; "
        f"{found['evictions']} evictions"
    )
    extra = {name: found[f"{name}_bytes"] for name in ("wasted", "detour", "fetched") if found[f"{name}_bytes"]}
    if extra:
        lines.append("; ".join(f"{name} {nbytes / 1e6:.1f} MB" for name, nbytes in extra.items()))
    lines.append(f"device memory at its peak: {found['peak_bytes'] / 1e9:.3f} GB")
    return "\n".join(lines)


class _Mark(NamedTuple):
    lane: str
    name: str
    begin: Any
    end: Any
    nbytes: int


class StackReport:
    """Keeps the counters of a :class:`vbcompile.vgpu.VGPUStack` in step with a streamer's."""

    def __init__(self, stack: VGPUStack) -> None:
        self._stack = stack
        self._seen: Counter[str] = Counter()

    def update(self, statistics: Statistics) -> None:
        """Count what has happened since the last call."""
        for name, link in statistics.links.items():
            level = self._level(name.removeprefix("to "))
            copies, nbytes = self._since(f"{name} copies", link.copies), self._since(f"{name} bytes", link.nbytes)
            if level is not None and copies:
                ends = (0, level) if name == "d2h" or name.startswith("to ") else (level, 0)
                self._stack.record_transfer(*ends, nbytes, count=copies)
        hits, misses = self._since("hits", statistics.hits), self._since("misses", statistics.misses)
        self._stack.record_use(0, hits, misses)
        self._stack.record_eviction(0, self._since("evictions", statistics.evictions))

    def add_times(self, times: "StepTimes") -> None:
        """Count what a recorded step took."""
        for name, (nbytes, busy_ns) in times.links.items():
            level = self._level(name.removeprefix("to "))
            if level is not None:
                self._stack.record_time(level, nbytes, busy_ns)
        self._stack.record_time(0, 0, 0, times.stall_ns)

    def _level(self, link: str) -> int | None:
        kind = {"h2d": "host", "d2h": "host", "disk": "disk"}.get(link)
        return next((lv.number for lv in self._stack.levels[1:] if lv.kind == kind or lv.device == link), None)

    def _since(self, name: str, value: int) -> int:
        before, self._seen[name] = self._seen[name], value
        return value - before


class StepTimes(NamedTuple):
    """What one step took: bytes and busy time of each link, and the computation's waiting."""

    links: dict[str, tuple[int, int]]
    stall_ns: int


class Recorder:
    """Timing events around copies, waits and operators of each step; the last complete step is kept."""

    def __init__(self, device: MemoryDevice, plan: Plan) -> None:
        self._device, self._plan = device, plan
        self._marks: list[_Mark] = []
        self._samples: list[MemorySample] = []
        self._complete: tuple[Any, Any, list[_Mark], list[MemorySample]] | None = None
        self._origin: Any = None
        self._host_origin = 0
        self._operators: dict[int, Any] = {}

    def step_begin(self) -> None:
        self._origin, self._host_origin = self._device.record(timing=True), time.perf_counter_ns()
        self._samples = []
        self._sample()

    def step_end(self) -> None:
        self._sample()
        if self._origin is not None:
            self._complete = (self._origin, self._device.record(timing=True), self._marks, self._samples)
        self._marks, self._origin = [], None

    @contextlib.contextmanager
    def copy(self, index: int, queue: CopyQueue, nbytes: int) -> Iterator[None]:
        name = self._plan.sweep.weights[self._plan.copies[index].weight].name
        begin = self._device.record(queue, timing=True)
        yield
        end = self._device.record(queue, timing=True)
        self._marks.append(_Mark(queue.name, name, begin, end, nbytes))
        self._sample()

    def stall(self, index: int, wait: Callable[[], None]) -> None:
        begin = self._device.record(timing=True)
        wait()
        end = self._device.record(timing=True)
        name = self._plan.sweep.weights[self._plan.copies[index].weight].name
        self._marks.append(_Mark("stall", name, begin, end, 0))

    def operator_begin(self, operator: int) -> None:
        self._operators[operator] = self._device.record(timing=True)

    def operator_end(self, operator: int) -> None:
        begin = self._operators.pop(operator, None)
        if begin is not None:
            end = self._device.record(timing=True)
            self._marks.append(_Mark("compute", self._plan.sweep.operators[operator].name, begin, end, 0))
        self._sample()

    def timeline(self) -> list[Span]:
        """Spans of the last complete step in order of start; waits for its end."""
        origin, end, marks, _ = self._last()
        self._device.join(end)
        found = []
        for mark in marks:
            self._device.join(mark.end)
            start = self._device.elapsed_ns(origin, mark.begin)
            span = self._device.elapsed_ns(mark.begin, mark.end)
            found.append(Span(mark.lane, mark.name, start, start + span, mark.nbytes))
        return sorted(found, key=lambda span: (span.start_ns, span.end_ns, span.lane))

    def memory(self) -> list[MemorySample]:
        return list(self._last()[3])

    def summary(self) -> dict[str, Any]:
        """Stall and GB/s per link of the last complete step."""
        times = self.times()
        if times is None:
            return {}
        return {
            "stall_ns": times.stall_ns,
            "gbps": {link: nbytes / busy for link, (nbytes, busy) in times.links.items() if busy},
        }

    def times(self) -> StepTimes | None:
        """Of the last complete step; None before the first."""
        if self._complete is None:
            return None
        busy, moved = Counter[str](), Counter[str]()
        for span in self.timeline():
            busy[span.lane] += span.end_ns - span.start_ns
            moved[span.lane] += span.nbytes
        return StepTimes({lane: (moved[lane], busy[lane]) for lane in moved if moved[lane]}, busy["stall"])

    def _last(self) -> tuple[Any, Any, list[_Mark], list[MemorySample]]:
        if self._complete is None:
            raise ValueError("no step is complete")
        return self._complete

    def _sample(self) -> None:
        self._samples.append(MemorySample(time.perf_counter_ns() - self._host_origin, self._device.allocated_bytes()))
