"""One offloaded model at run time: its payloads, the graphs that read them, the plan for all of them, and its streamer.

Several graphs (prefill and decode, or the pieces between graph breaks) share one resident set and one ring. The plan's
step is their concatenation, in the order in which they were compiled; a graph that reads the same weights in the same
order as one before it uses that one's part. Graphs that run in another order cost copies made in vain, never results.
"""

import contextlib
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vbcompile.handles_payload import Bundle, Payload
from vbcompile.runtime import Streamer
from vbcompile.runtime_device import MemoryDevice
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_neighbours import copy_to_neighbours
from vbcompile.runtime_statistics import combined
from vbcompile.vgpu import VGPUStack
from vbcompile.vgpu_plan import DEVICE, Operator, Plan, PlanError, Sweep, Tier, Weight
from vbcompile.vgpu_planner import plan_weights
from vbcompile.vgpu_rates import Rates

log = logging.getLogger(__name__)

_MARGIN = (1, 8)  # of the memory beside weights: the allocator's fragments
_LIBRARIES = 96 << 20  # bytes: workspaces of vendors' libraries on an accelerator
_SLOWEST_MEMORY = 600 * 10**9  # bytes per second assumed for operators of graphs that were not compiled yet


class Planned(Protocol):
    """A compiled graph that runs by a plan."""

    def rebuild(self, plan: Plan, start: int) -> None:
        """The plan has changed."""
        ...


@dataclass
class Part:
    """What a compiled graph asks of the plan.

    Attributes:
        operators: Name, nanoseconds and payloads of each segment, in order.
        fixed: Payloads that have to be resident, each with the reason.
        rows: Payloads that only embeddings read: they are read on the host where they are not resident.
        reserve: Device memory beside offloaded weights at its peak, in bytes.
        graph: The compiled graph, as long as it exists; told the plan, and the index of its first operator, whenever
            these have changed.
    """

    operators: Sequence[tuple[str, int, tuple[Payload, ...]]]
    fixed: dict[Payload, str]
    rows: frozenset[Payload]
    reserve: int
    graph: "weakref.ref[Planned]" = field(repr=False)

    @property
    def order(self) -> tuple[Any, ...]:
        """Equal for two graphs that read the same weights in the same order."""
        return tuple(tuple(p.number for p in payloads) for _, _, payloads in self.operators), self.rows


class WeightStore:
    """See the module's text.

    Args:
        device: Where the weights are used.
        make_device: Called once, when something is streamed for the first time.
        budget: Bytes of device memory that may be used in all.
        tiers: The places beyond it.
        host: Allocates masters.
        rates: Speeds of the device.
        beside: Bytes of parameters and buffers that stay ordinary tensors on the device.

    Attributes:
        key: What compiled graphs know it by.
        plan: The current plan; None before the first graph.
        stack: Levels whose counters are kept up to date, or None.
        record: Whether streamers keep a timeline; takes effect with the next one.
        file: Keeps the file of weights that host memory has no room for.
        forms: Other forms of payloads (packed ones), by what their makers know them by.
    """

    def __init__(
        self,
        device: torch.device,
        make_device: Callable[[], MemoryDevice],
        budget: int,
        tiers: Sequence[Tier],
        host: HostMemory,
        rates: Rates,
        beside: int = 0,
    ) -> None:
        self.key = f"offload{next(_numbers)}"
        self.device, self.budget, self.tiers, self.beside = device, budget, tuple(tiers), beside
        self.host, self.rates = host, rates
        self.plan: Plan | None = None
        self.stack: VGPUStack | None = None
        self.record = False
        self.payloads: dict[int, Payload] = {}
        self.file: object | None = None
        self._make_device = make_device
        self._memory_device: MemoryDevice | None = None
        self._parts: list[Part] = []
        self._starts: list[int] = []
        self._superseded: set[int] = set()
        self.forms: dict[Any, Any] = {}
        self._index: dict[int, int] = {}
        self._order: list[Payload] = []
        self._streamer: Streamer | None = None
        self._closer: weakref.finalize | None = None
        self._views: dict[int, tuple[Tensor, Any]] = {}
        self._resident_views: dict[int, Any] = {}
        self._position: int | None = None  # first operator of the graph that runs, within a step
        self._whole: dict[int, Any] | None = None
        self._past: list[dict[str, Any]] = []
        self._lent: dict[int, Tensor] = {}  # masters that others may write to
        self._seen = 0  # writes to them
        self._lock = threading.RLock()
        _stores[self.key] = self

    # payloads

    def add(self, payload: Payload) -> None:
        """Take a payload in; its order of addition is taken for the order of use of graphs that are not known yet."""
        with self._lock:
            self.payloads[payload.number] = payload
            payload.residence = self

    def twin(self) -> "WeightStore":
        """An empty store with the same places, for a copy of the model."""
        twin = WeightStore(self.device, self._make_device, self.budget, self.tiers, self.host, self.rates, self.beside)
        twin.stack, twin.record = self.stack, self.record
        return twin

    @property
    def host_room(self) -> int | None:
        """Bytes of host memory that further masters may take; None where nobody has said how much there is."""
        levels = self.stack.levels if self.stack is not None else ()
        host = [level.capacity for level in levels if level.kind == "host"]
        return max(sum(host) - self.masters().get("cpu", 0), 0) if host else None

    @property
    def folder(self) -> Path | None:
        """The folder of the disk level; None where there is none in use."""
        levels = self.stack.levels if self.stack is not None else ()
        return next((Path(level.path) for level in levels if level.kind == "disk" and level.path is not None), None)

    def supersede(self, payload: Payload) -> None:
        """No graph reads this payload any more: others were made from it."""
        self._superseded.add(payload.number)

    def fetch(self, payload: Payload) -> Tensor:
        with self._lock:
            streamer, index = self._streamer, self._index.get(payload.number)
            if streamer is None or index is None or self._lent_writes() != self._seen:
                found = payload.load().to(self.device, copy=True)
            else:
                try:
                    found = streamer.fetch(index)
                except torch.OutOfMemoryError:
                    self.stop()  # the ring and the resident weights make room; the next step loads them again
                    return self.fetch(payload)
                if self.plan is not None and self.plan.levels[index] == DEVICE:
                    found = found.clone()  # the caller may write to what it gets
            return payload.shaped(found)

    def before_write(self, payload: Payload) -> None:
        self.stop()

    def settle(self) -> None:
        if self._streamer is not None:
            self._streamer.finish_stores()

    def lend(self, payload: Payload, master: Tensor) -> None:
        with self._lock:
            self._lent[payload.number] = master

    def _lent_writes(self) -> int:
        return sum(master._version for master in self._lent.values())

    # graphs

    def add_part(self, part: Part) -> Plan:
        """Plan for one more graph, and for those before it.

        Raises:
            PlanError: nothing works within the budget.
        """
        with self._lock:
            alive = [n for n, old in enumerate(self._parts) if old.graph() is not None]
            self._parts, self._starts = [self._parts[n] for n in alive], [self._starts[n] for n in alive]
            known = next((n for n, old in enumerate(self._parts) if self._covers(old, part)), None)
            if known is not None and self.plan is not None:
                self._parts.append(part)
                self._starts.append(self._starts[known])
                _tell(part, self.plan, self._starts[known])
                return self.plan
            parts = [*self._parts, part]
            plan, order, starts = self._planned(parts)
            self._parts = parts
            self._take(plan, order, starts)
            return plan

    def replan(self, budget: int) -> Plan:
        """Plan all graphs anew for another budget; nothing is compiled for that.

        Raises:
            PlanError: nothing works within it; everything stays as it is.
        """
        with self._lock:
            before, self.budget = self.budget, budget
            try:
                plan, order, starts = self._planned([p for p in self._parts if p.graph() is not None])
            except PlanError:
                self.budget = before
                raise
            self._parts = [p for p in self._parts if p.graph() is not None]
            self._take(plan, order, starts)
            return plan

    def _take(self, plan: Plan, order: list[Payload], starts: list[int]) -> None:
        self.stop()
        self._order, self._starts, self.plan = order, starts, plan
        self._index = {payload.number: index for index, payload in enumerate(order)}
        for part, start in zip(self._parts, starts, strict=True):
            _tell(part, plan, start)
        log.info("offload: %s", plan.summary())

    def index_of(self, payload: Payload) -> int:
        """Index of a payload in the plan."""
        return self._index[payload.number]

    def _covers(self, old: Part, new: Part) -> bool:
        """Whether the plan serves a new graph where it serves an old one."""
        return (
            old.order == new.order
            and self._reserve([new]) <= self._reserve(self._parts)
            and all(self._is_resident(payload) for payload in new.fixed)
        )

    def _is_resident(self, payload: Payload) -> bool:
        return self.plan is not None and self.plan.levels[self._index[payload.number]] == DEVICE

    def _reserve(self, parts: Sequence[Part]) -> int:
        peak = max((part.reserve for part in parts), default=0)
        libraries = 0 if self.device.type == "cpu" else _LIBRARIES
        return self.beside + peak + max(peak * _MARGIN[0] // _MARGIN[1], libraries)

    def _planned(self, parts: Sequence[Part]) -> tuple[Plan, list[Payload], list[int]]:
        read = {p.number for part in parts for _, _, payloads in part.operators for p in payloads}
        read |= {p.number for part in parts for p in part.rows}
        order = [p for p in self.payloads.values() if p.number in read or p.number not in self._superseded]
        index = {payload.number: position for position, payload in enumerate(order)}
        fixed = {payload.number for part in parts for payload in part.fixed}
        operators: list[Operator] = []
        starts: list[int] = []
        first_of: dict[Any, int] = {}
        for number, part in enumerate(parts):
            if part.order in first_of:
                starts.append(first_of[part.order])
                continue
            first_of[part.order] = len(operators)
            starts.append(len(operators))
            for name, ns, payloads in part.operators:
                used = tuple(dict.fromkeys(index[p.number] for p in payloads))
                operators.append(Operator(f"{number}:{name}", ns, used))
        for payload in order:
            if payload.number not in read:  # read by graphs that will be compiled later
                ns = payload.nbytes * 10**9 // _SLOWEST_MEMORY
                operators.append(Operator(payload.name, ns, (index[payload.number],)))
        disk = next((tier.level for tier in self.tiers if tier.via is not None), None)
        weights = tuple(
            Weight(f"{p.number}:{p.name}", p.nbytes, p.number in fixed, disk if p.place == "ssd" else None)
            for p in order
        )
        sweep = Sweep(weights, tuple(operators), self._reserve(parts))
        return plan_weights(sweep, self.budget, self.tiers), order, starts

    # a step, as compiled graphs call it

    @property
    def turn(self) -> threading.RLock:
        """Held while a graph runs: threads that call one model take turns, and writes wait for their end."""
        return self._lock

    def begin(self, first: int) -> None:
        """A graph begins whose first operator is ``first``."""
        if (writes := self._lent_writes()) != self._seen:
            self._seen = writes
            self.stop()  # copies on the device are those of before
        streamer = self._streamer or self.start()
        if self._position is not None and first <= self._position:
            streamer.step_end()
            self._position = None
        if self._position is None:
            streamer.step_begin()
        self._position = first

    def end(self, last: int) -> None:
        """A graph has been queued whose last operator is ``last``."""
        streamer, plan = self._streamer, self.plan
        if streamer is not None and plan is not None and last + 1 >= len(plan.sweep.operators):
            streamer.step_end()
            self._position = None

    def abandon(self) -> None:
        """A graph raised an exception."""
        self._position = None
        if self._streamer is not None:
            self._streamer.abandon()

    def operator_begin(self, operator: int) -> None:
        """For timelines: an operator of the plan is queued next."""
        if self.record and self._streamer is not None:
            self._streamer.operator_begin(operator)

    def operator_end(self, operator: int) -> None:
        """For timelines: the operator has been queued."""
        if self.record and self._streamer is not None:
            self._streamer.operator_end(operator)

    def write_back(self, weight: int) -> None:
        """The computation has written to a resident weight: its master gets the new bytes."""
        self._streamer.store(weight, self._resident_views[weight])  # type: ignore[union-attr]

    def prefetch(self, copy: int) -> None:
        self._streamer.prefetch(copy)  # type: ignore[union-attr]

    def wait(self, copy: int) -> Any:
        """The weight of a copy, in its own shape; of a bundle, its tensors."""
        if self._whole is not None:
            return self._fetched(self.plan.copies[copy].weight)  # type: ignore[union-attr]
        memory = self._streamer.wait(copy)  # type: ignore[union-attr]
        known = self._views.get(copy)
        if known is not None and known[0] is memory:
            return known[1]
        payload = self._order[self.plan.copies[copy].weight]  # type: ignore[union-attr]
        with torch.inference_mode(False), torch.no_grad():
            view = _view(payload, memory)
        self._views[copy] = (memory, view)
        return view

    def release(self, copy: int) -> None:
        self._streamer.release(copy)  # type: ignore[union-attr]

    def waits(self, operator: int) -> tuple[int, ...]:
        """Copies that an operator waits for."""
        return self.plan.waits[operator] if self.plan is not None else ()

    def releases(self, operator: int) -> tuple[int, ...]:
        """Copies that are over with an operator."""
        return self.plan.releases[operator] if self.plan is not None else ()

    def payload_at(self, weight: int) -> Payload:
        """The payload with an index in the plan."""
        return self._order[weight]

    def weight_bytes(self, payload: Payload) -> tuple[Tensor, int | None]:
        """A weight's bytes on the device, and the copy that holds them where the caller has to release it."""
        streamer, weight = self._streamer or self.start(), self._index.get(payload.number)
        if weight is None or self.plan is None:
            return payload.load().to(self.device, copy=True), None
        with contextlib.suppress(KeyError):
            return streamer.view(weight), None
        copy = next(index for index, copy in enumerate(self.plan.copies) if copy.weight == weight)
        return streamer.wait(copy), copy

    def save(self, memory: Tensor, target: Tensor) -> Any:
        """Copy device memory into host memory beside the computation; the event behind it."""
        return (self._streamer or self.start()).save(memory, target)

    def join(self, event: Any) -> None:
        """Block until an event of the device is over."""
        if self._memory_device is not None:
            self._memory_device.join(event)

    def resident(self, weight: int) -> Any:
        """A resident weight, in its own shape; of a bundle, its tensors."""
        if self._whole is not None:
            return self._fetched(weight)
        return self._resident_views[weight]

    def rows(self, weight: int, indices: Tensor) -> Tensor:
        """Rows of a matrix that lives on the host; ``indices`` are on the device."""
        table = self._order[weight].on_host()
        return torch.nn.functional.embedding(indices.to("cpu"), table).to(indices.device, non_blocking=True)

    @contextlib.contextmanager
    def everything_fetched(self) -> Iterator[None]:
        """Graphs that are called in here read weights that were copied whole, one by one, and stay on the device.

        The same compiled segments then run without any transfer beside them: what a streamed step is compared with.
        """
        self._whole = {}
        try:
            yield
        finally:
            self._whole = None

    def _fetched(self, weight: int) -> Any:
        assert self._whole is not None
        if weight not in self._whole:
            payload = self._order[weight]
            with torch.inference_mode(False), torch.no_grad():
                self._whole[weight] = _view(payload, payload.load().to(self.device, copy=True))
        return self._whole[weight]

    # life

    def start(self) -> Streamer:
        """Load the resident weights and begin to stream."""
        with self._lock:
            if self._streamer is not None:
                return self._streamer
            assert self.plan is not None, "no graph has been planned"
            if self._memory_device is None:
                self._memory_device = self._make_device()
            sources = copy_to_neighbours(self.plan, [payload.source for payload in self._order])
            streamer = Streamer(
                self.plan, sources, self._memory_device, host=self.host, stack=self.stack, record=self.record
            )
            streamer.start()
            with torch.inference_mode(False), torch.no_grad():
                self._resident_views = {
                    index: _view(self._order[index], streamer.view(index))
                    for index, level in enumerate(self.plan.levels)
                    if level == DEVICE
                }
            self._streamer = streamer
            # the model may go, or the process end, while copies out of its memory are under way
            self._closer = weakref.finalize(self, streamer.close)
            return streamer

    def stop(self) -> None:
        """Give all device memory back; the next step begins anew."""
        with self._lock:
            if self._streamer is None:
                return
            streamer, self._streamer = self._streamer, None
            if self._closer is not None:
                self._closer.detach()
            self._position = None
            streamer.finish_stores()
            self._past.append(streamer.statistics())
            streamer.close()
            self._views.clear()
            self._resident_views.clear()

    def counters(self) -> dict[str, Any]:
        """What the runtime has counted since the weights were offloaded; step times are those of the current plan."""
        with self._lock:
            runs = [*self._past, *([self._streamer.statistics()] if self._streamer is not None else [])]
        return combined(runs)

    def masters(self) -> dict[str, int]:
        """Bytes of masters by place."""
        places: dict[str, int] = {}
        for payload in self.payloads.values():
            places[payload.place] = places.get(payload.place, 0) + payload.nbytes
        return places


def _tell(part: Part, plan: Plan, start: int) -> None:
    graph = part.graph()
    if graph is not None:
        graph.rebuild(plan, start)


def _view(payload: Payload, memory: Tensor) -> Any:
    return payload.split(memory) if isinstance(payload, Bundle) else payload.shaped(memory)


_numbers = itertools.count()
_stores: "weakref.WeakValueDictionary[str, WeightStore]" = weakref.WeakValueDictionary()


def store_of(key: str) -> WeightStore:
    """The store of a key. Raises RuntimeError where its model is gone."""
    store = _stores.get(key)
    if store is None:
        raise RuntimeError("the offloaded model that this graph was compiled for does not exist any more")
    return store


def all_stores() -> list[WeightStore]:
    return [_stores[key] for key in sorted(_stores, key=lambda key: int(key.removeprefix("offload")))]
