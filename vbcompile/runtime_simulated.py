"""A device made of host memory: limited capacity, a thread per copy queue, and proof that nothing is read too early.

Computation is whatever the calling thread does. Copies run in threads of their own, so that an event that is not waited
for shows. Beside that, every access is checked against the events that order it (vector clocks: Mattern, "Virtual time
and global states of distributed systems", 1989), so that a missing wait is found in every run, whatever the timing.
"""

import queue as queues
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vbcompile.runtime_device import CopyQueue

_POISON = 0xFF  # NaN in every floating-point format: what a slot holds until its copy is done
_COMPUTE = "compute"
_HOST = "host"  # all its threads: what they hand to each other is ordered by locks


class RaceError(RuntimeError):
    """Two accesses to the same bytes, one of them a write, that no event orders."""


@dataclass(frozen=True)
class LinkRate:
    """Bytes per second of a queue, and seconds that each copy costs beside its bytes."""

    bytes_per_second: float
    latency: float = 0.0


class SimulatedEvent:
    """A point in a queue's order: over when the queue has come there."""

    def __init__(self, clock: Mapping[str, int], over: bool) -> None:
        self.clock = dict(clock)
        self.moment = time.perf_counter_ns()
        self._over = threading.Event()
        if over:
            self._over.set()

    def pass_by(self) -> None:
        self.moment = time.perf_counter_ns()
        self._over.set()

    def query(self) -> bool:
        return self._over.is_set()

    def synchronize(self) -> None:
        self._over.wait()


@dataclass
class _Access:
    """Bytes ``begin`` to ``end`` that ``actor`` touched at ``moment`` of its clock (None: is still reading)."""

    begin: int
    end: int
    writes: bool
    actor: str
    moment: int | None


@dataclass
class _Engine:
    """One copy queue: its thread and what is queued."""

    work: "queues.SimpleQueue[Callable[[], None] | None]" = field(default_factory=queues.SimpleQueue)
    thread: threading.Thread | None = None


class SimulatedDevice:
    """See :class:`vbcompile.runtime_device.MemoryDevice`.

    Args:
        capacity: Bytes that tensors on it may take together; None: no limit.
        rates: Speed of queues by name; a queue that is not named copies as fast as it can.
        check: Prove the order of all accesses; a violation raises :class:`RaceError` where it is queued.

    Attributes:
        copied: Bytes copied per queue.
    """

    def __init__(
        self, capacity: int | None = None, rates: Mapping[str, LinkRate] | None = None, *, check: bool = True
    ) -> None:
        self.device = torch.device("cpu")
        self.capacity = capacity
        self.copied: dict[str, int] = {}
        self._rates = dict(rates or {})
        self._check = check
        self._lock = threading.RLock()
        self._used = self._peak = 0
        self._clocks: dict[str, dict[str, int]] = {}
        self._engines: dict[str, _Engine] = {}
        self._accesses: list[_Access] = []

    def __repr__(self) -> str:
        return f"SimulatedDevice(capacity={self.capacity}, used={self._used})"

    def allocate(self, nbytes: int) -> Tensor:
        """Raises torch.OutOfMemoryError beyond the capacity."""
        with self._lock:
            if self.capacity is not None and self._used + nbytes > self.capacity:
                raise torch.OutOfMemoryError(
                    f"simulated device: {nbytes} bytes asked, {self._used} of {self.capacity} in use"
                )
            self._used += nbytes
            self._peak = max(self._peak, self._used)
        with torch.inference_mode(False):
            tensor = torch.full((nbytes,), _POISON, dtype=torch.uint8)
        weakref.finalize(tensor.untyped_storage(), self._free, tensor.data_ptr(), nbytes).atexit = False
        return tensor

    def queue(self, name: str, peer: torch.device | None = None) -> CopyQueue:
        with self._lock:
            actor = name if name not in self._engines else f"{name}#{len(self._engines)}"
            engine = self._engines[actor] = _Engine()
            self.copied.setdefault(name, 0)
        engine.thread = threading.Thread(target=_serve, args=(engine.work,), name=f"simulated {actor}", daemon=True)
        engine.thread.start()
        return CopyQueue(name, actor)

    def copy(self, queue: CopyQueue, target: Tensor, source: Tensor) -> None:
        if target.numel() != source.numel():
            raise ValueError(f"copy of {source.numel()} bytes into {target.numel()}")
        with self._lock:
            moment = self._tick(queue.stream)
            self._access(source, queue.stream, moment, writes=False)
            self._access(target, queue.stream, moment, writes=True)
            self.copied[queue.name] += target.nbytes
            if self._check:
                target.fill_(_POISON)
            self._engines[queue.stream].work.put(self._delayed(queue.name, target, source))

    def record(self, queue: CopyQueue | None = None, *, timing: bool = False) -> SimulatedEvent:
        with self._lock:
            actor = _COMPUTE if queue is None else queue.stream
            self._tick(actor)
            event = SimulatedEvent(self._clock(actor), over=queue is None)
            if queue is not None:
                self._engines[actor].work.put(event.pass_by)
        return event

    def wait(self, queue: CopyQueue | None, event: SimulatedEvent) -> None:
        if queue is None:
            event.synchronize()
        with self._lock:
            _merge(self._clock(_COMPUTE if queue is None else queue.stream), event.clock)
            if queue is not None:
                self._engines[queue.stream].work.put(event.synchronize)

    def is_over(self, event: SimulatedEvent) -> bool:
        over = event.query()
        if over:  # the host knows it now, and so does all that it queues from here on
            with self._lock:
                _merge(self._clock(_HOST), event.clock)
        return over

    def join(self, event: SimulatedEvent) -> None:
        event.synchronize()
        with self._lock:
            _merge(self._clock(_HOST), event.clock)

    def elapsed_ns(self, begin: SimulatedEvent, end: SimulatedEvent) -> int:
        return end.moment - begin.moment

    def peak_bytes(self) -> int:
        return self._peak

    def allocated_bytes(self) -> int:
        return self._used

    def begin_use(self, memory: Tensor) -> None:
        """Raises :class:`RaceError` if a copy into these bytes has not been waited for."""
        with self._lock:
            self._tick(_COMPUTE)
            self._access(memory, _COMPUTE, None, writes=False)

    def end_use(self, memory: Tensor) -> None:
        begin = memory.data_ptr()
        with self._lock:
            moment = self._tick(_COMPUTE)
            for access in self._accesses:
                if access.moment is None and (access.begin, access.end) == (begin, begin + memory.nbytes):
                    access.moment = moment

    def host_writes(self, memory: Tensor) -> None:
        """Raises :class:`RaceError` if the host has not waited for a copy from or into these bytes."""
        with self._lock:
            self._access(memory, _HOST, self._tick(_HOST), writes=True)

    def __del__(self) -> None:
        for engine in self._engines.values():
            engine.work.put(None)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.work.put(None)
        for engine in self._engines.values():
            if engine.thread is not None:
                engine.thread.join()

    def _free(self, address: int, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes
            self._accesses = [a for a in self._accesses if a.end <= address or address + nbytes <= a.begin]

    def _delayed(self, name: str, target: Tensor, source: Tensor) -> Callable[[], None]:
        rate = self._rates.get(name)

        def run() -> None:
            if rate is not None:
                time.sleep(rate.latency + target.nbytes / rate.bytes_per_second)
            target.copy_(source)

        return run

    def _clock(self, actor: str) -> dict[str, int]:
        return self._clocks.setdefault(actor, {})

    def _tick(self, actor: str) -> int:
        """Advance an actor's clock. Whatever is queued also comes after all that the host has waited for."""
        clock = self._clock(actor)
        _merge(clock, self._clock(_HOST))
        clock[actor] = clock.get(actor, 0) + 1
        return clock[actor]

    def _access(self, memory: Tensor, actor: str, moment: int | None, *, writes: bool) -> None:
        if not self._check:
            return
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        clock = self._clock(actor)
        kept = []
        for old in self._accesses:
            if old.end <= begin or end <= old.begin:
                kept.append(old)
                continue
            ordered = old.actor == actor or (old.moment is not None and clock.get(old.actor, 0) >= old.moment)
            if (writes or old.writes) and not ordered:
                raise RaceError(_describe(old, actor, writes))
            if not (writes and begin <= old.begin and old.end <= end):
                kept.append(old)
        self._accesses = [*kept, _Access(begin, end, writes, actor, moment)]


def _describe(old: _Access, actor: str, writes: bool) -> str:
    before = (
        f"{'a write' if old.writes else 'a read'} by {old.actor}{' that is not over' if old.moment is None else ''}"
    )
    return f"{'write' if writes else 'read'} by {actor} is not ordered after {before} of the same bytes"


def _merge(clock: dict[str, int], other: Mapping[str, int]) -> None:
    for actor, moment in other.items():
        if clock.get(actor, 0) < moment:
            clock[actor] = moment


def _serve(work: Any) -> None:
    while True:
        task = work.get()
        if task is None:
            return
        task()
        task = None  # and with it the memory that it copied
