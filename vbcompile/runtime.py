"""Streams weights through a device that is too small for them, as a plan says.

A step is a sequence of ``prefetch``, ``wait`` and ``release`` for the copies of a :class:`vbcompile.vgpu_plan.Plan`.
That sequence is what makes it fast; what makes it right does not depend on it: a copy that was not prefetched is made
when it is waited for, one whose bytes were overwritten meanwhile is made again, and one whose place is in use goes to
memory of its own.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from vbcompile.runtime_device import MemoryDevice
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_links import Links, bytes_of
from vbcompile.runtime_read import DiskReader
from vbcompile.runtime_ring import Ring
from vbcompile.runtime_sources import DiskBytes, HostBytes, Source
from vbcompile.runtime_statistics import MemorySample, Recorder, Span, StackReport, Statistics
from vbcompile.vgpu import VGPUStack
from vbcompile.vgpu_plan import DEVICE, Plan, padded
from vbcompile.vgpu_size import MIB

_SMALL = MIB  # bytes that are copied on the device rather than waited for


class Streamer:
    """Moves the weights of one plan.

    Args:
        plan: Which weights stay, and how the others pass through the ring. A declined plan keeps all of them.
        sources: Where the bytes of each weight of ``plan.sweep.weights`` are, in that order. The runtime reads
            resident weights once, in :meth:`start`, the others in every step; host and peer memory stays referenced.
        device: The device with the ring.
        host: Where staging memory for disk reads comes from; None: made when needed.
        reader: Disk threads that may be shared between streamers; None: made when needed, and closed with this.
        stack: Its counters are kept up to date, step by step.
        record: Keep a timeline and the memory of every step (see :meth:`timeline`); costs a few events per copy.

    Methods may be called from several threads (autograd runs backward passes in one of its own). The stream that is
    current on the device when a method is called counts as the stream of the computation.

    Raises:
        ValueError: sources that do not match the plan.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Source],
        device: MemoryDevice,
        *,
        host: HostMemory | None = None,
        reader: DiskReader | None = None,
        stack: VGPUStack | None = None,
        record: bool = False,
    ) -> None:
        _require_match(plan, sources)
        self.plan, self.sources, self.device = plan, tuple(sources), device
        self._lock = threading.RLock()
        self._statistics = Statistics(plan)
        self._links = Links(self.sources, device, self._statistics, host, reader, plan.ring_bytes)
        self._recorder = Recorder(device, plan) if record else None
        self._report = StackReport(stack) if stack is not None else None
        self._ring: Ring | None = None
        self._resident: dict[int, Tensor] = {}
        self._started = self._closed = self._in_step = False

    # life

    def start(self) -> None:
        """Allocate the ring and the resident weights' memory, load these, and begin the first copies.

        Raises:
            torch.OutOfMemoryError: the device has not the memory that the plan counts on.
            StorageError: a file does not hold what it should.
            RuntimeError: it has been started or closed before.
        """
        with self._lock:
            if self._started or self._closed:
                raise RuntimeError("this streamer has been started before: make a new one")
            self._started = True
            try:
                self._load_resident()
                if self.plan.copies:
                    self._ring = Ring(
                        self.plan, self.sources, self.device, self._links, self._statistics, self._recorder
                    )
                self._issue_prologue()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Finish what is under way and give all memory back. Views handed out before must not be used any more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._ring is not None:
                self._ring.close()
            self.device.join(self.device.record())
            self._links.join()
            times = self._recorder.times() if self._recorder is not None else None
            if self._report is not None and times is not None:
                self._report.add_times(times)
            self._links.close()
            self._ring = None
            self._resident.clear()

    def __del__(self) -> None:
        """Copies that are under way write to memory that is about to be given back: they have to end first."""
        if not getattr(self, "_started", False) or self._closed or sys.is_finalizing():
            return
        if threading.current_thread() is threading.main_thread():
            self.close()
        else:  # the garbage collector may run in a thread that close() waits for
            threading.Thread(target=self.close, name="vbcompile close").start()

    def __enter__(self) -> "Streamer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # a step

    def step_begin(self) -> None:
        """A step begins: whatever an abandoned one left in use is released, and the first copies get under way."""
        with self._lock:
            self._require_running()
            if self._in_step:
                self.abandon()
            self._in_step = True
            self._statistics.step_begin(self.device)
            if self._recorder is not None:
                self._recorder.step_begin()
            self._issue_prologue()

    def step_end(self) -> None:
        """The step has been queued; nothing of it is waited for."""
        with self._lock:
            self._release_all()
            self._in_step = False
            self._links.forget_sent()
            self._statistics.step_end(self.device)
            if self._report is not None:
                self._report.update(self._statistics)
            if self._recorder is not None:
                self._recorder.step_end()

    def abandon(self) -> None:
        """The step ended early, for example by an exception. The next one begins as if it had not been."""
        with self._lock:
            self._release_all()
            self._in_step = False
            self._statistics.abandon()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """:meth:`step_begin`, and at the end :meth:`step_end` or, after an exception, :meth:`abandon`."""
        self.step_begin()
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self.step_end()

    def prefetch(self, copy: int) -> bool:
        """Queue a copy of the plan; the host does not wait.

        Returns:
            Whether it is under way or there. False: its place is in use; :meth:`wait` will find a way.
        """
        with self._lock:
            return self._running_ring().prefetch(copy)

    def wait(self, copy: int) -> Tensor:
        """The weight's bytes for the computation queued from here on, until :meth:`release`.

        The computation waits for the copy; the host waits for reads from disk alone. A copy that was not prefetched is
        queued now. Waiting for a copy that is in use already returns the same bytes.

        Returns:
            uint8, one dimension, on the device. They are overwritten after :meth:`release` and must not be written.

        Raises:
            StorageError: the bytes could not be read. The copy may be tried again.
            torch.OutOfMemoryError: its place is in use by another weight that was to be released before, and there is
                no memory beside the ring.
        """
        with self._lock:
            return self._running_ring().wait(copy)

    def view(self, weight: int) -> Tensor:
        """A weight's bytes: uint8, one dimension, on the device.

        Raises:
            KeyError: it is neither resident nor in use, that is, between :meth:`wait` and :meth:`release`.
        """
        with self._lock:
            self._require_running()
            if weight in self._resident:
                return self._resident[weight]
            memory = self._ring.view(weight) if self._ring is not None else None
            if memory is None:
                name = self.plan.sweep.weights[weight].name
                raise KeyError(f"weight {name!r} is not on the device: wait for its copy, or fetch it")
            return memory

    def release(self, copy: int) -> None:
        """The computation queued so far was the last to read this copy. Nothing happens where it is not in use."""
        with self._lock:
            self._running_ring().release(copy)

    def fetch(self, weight: int) -> Tensor:
        """A weight's bytes at any time, plan or no plan: a resident weight's own ones, else a copy for the caller.

        The copy takes memory beyond the plan's. Its bytes are those of the last :meth:`store`.

        Raises:
            StorageError: they could not be read.
            torch.OutOfMemoryError: there is no memory for them.
        """
        with self._lock:
            self._require_running()
            if weight in self._resident:
                return self._resident[weight]
            tensor = self.device.allocate(self.sources[weight].nbytes)
            self._links.load(weight, tensor)
            self._statistics.fetched_bytes += tensor.nbytes
            return tensor

    # the way back

    def store(self, weight: int, tensor: Tensor) -> None:
        """Write a weight: where it lives, and on the device where it is resident. Later copies bring the new bytes.

        The host does not wait, and host memory holds the new bytes after :meth:`finish_stores`. Until then ``tensor``
        may be dropped but not written to, unless it is the resident weight itself (:meth:`view`).

        Args:
            tensor: Any dtype and shape, with as many bytes as the weight, on the device.

        Raises:
            ValueError: the weight lives on disk, or the sizes differ.
        """
        with self._lock:
            self._require_running()
            source, data = self.sources[weight], bytes_of(tensor)
            name = self.plan.sweep.weights[weight].name
            if isinstance(source, DiskBytes):
                raise ValueError(f"weight {name!r} lives on disk, which a step does not write: keep it in host memory")
            if data.numel() != source.nbytes:
                raise ValueError(f"weight {name!r} has {source.nbytes} bytes, not {data.numel()}")
            resident = self._resident.get(weight)
            in_place = resident is not None and data.data_ptr() == resident.data_ptr()
            if resident is not None and not in_place:
                resident.copy_(data)
            elif in_place and data.numel() <= _SMALL:
                data = data.clone()  # the computation may write to it again before the copy is done
            readers = self._ring.forget(weight) if self._ring is not None else []
            self._links.store(weight, data, readers)
            if in_place and data.numel() > _SMALL:
                self.device.wait(None, self._links.stored(weight))

    def save(self, tensor: Tensor, target: Tensor) -> Any:
        """Copy a tensor (a gradient, an activation) from the device into host memory, beside the computation.

        Until the returned event is over the tensor may be dropped but not written to.

        Args:
            target: Contiguous host memory with as many bytes; pinned, or the host waits.

        Returns:
            An event of the device, over when ``target`` holds the bytes (``device.join`` waits for it).
        """
        with self._lock:
            self._require_running()
            data, goal = bytes_of(tensor), bytes_of(target)
            if data.numel() != goal.numel():
                raise ValueError(f"the target has {goal.numel()} bytes, the tensor {data.numel()}")
            return self._links.send(data, HostBytes(goal))

    def finish_stores(self) -> None:
        """Block until all :meth:`store` and :meth:`save` calls so far have reached their memory."""
        with self._lock:
            events = self._links.last_sent()
        for event in events:
            self.device.join(event)
        with self._lock:
            self._links.forget_sent()

    # to look at

    def operator_begin(self, operator: int) -> None:
        """For timelines: operator ``operator`` of the plan is queued next. Free of cost unless recording."""
        if self._recorder is not None:
            self._recorder.operator_begin(operator)

    def operator_end(self, operator: int) -> None:
        """For timelines: the operator has been queued."""
        if self._recorder is not None:
            self._recorder.operator_end(operator)

    def statistics(self) -> dict[str, Any]:
        """What has been moved, found and waited for since the start; see :mod:`vbcompile.runtime_statistics`."""
        with self._lock:
            return self._statistics.to_dict(self.device, self._recorder)

    def timeline(self) -> list[Span]:
        """The last complete step that was recorded, as :class:`vbcompile.runtime_statistics.Span`; waits for its end.

        Raises:
            ValueError: the streamer was made without ``record``, or no step is complete.
        """
        with self._lock:
            return self._recorded().timeline()

    def memory_timeline(self) -> list[MemorySample]:
        """Device memory over the last recorded step, as :class:`vbcompile.runtime_statistics.MemorySample`.

        Raises:
            ValueError: the streamer was made without ``record``, or no step is complete.
        """
        with self._lock:
            return self._recorded().memory()

    # within

    def _recorded(self) -> Recorder:
        if self._recorder is None:
            raise ValueError("nothing was recorded: make the streamer with record=True")
        return self._recorder

    def _require_running(self) -> None:
        if not self._started or self._closed:
            raise RuntimeError("this streamer is closed" if self._closed else "this streamer has not been started")

    def _running_ring(self) -> Ring:
        self._require_running()
        if self._ring is None:
            raise IndexError("the plan copies nothing: every weight is resident")
        return self._ring

    def _issue_prologue(self) -> None:
        for copy in self.plan.prologue:
            self.prefetch(copy)

    def _release_all(self) -> None:
        for copy in self._ring.in_use() if self._ring is not None else ():
            self.release(copy)

    def _load_resident(self) -> None:
        weights = self.plan.sweep.weights
        arena, offset = self.device.allocate(self.plan.resident_bytes), 0
        for index, level in enumerate(self.plan.levels):
            if level == DEVICE:
                self._resident[index] = arena[offset : offset + weights[index].nbytes]
                offset += padded(weights[index].nbytes, self.plan.alignment)
                self._links.load(index, self._resident[index])
        self._links.join()


def _require_match(plan: Plan, sources: Sequence[Source]) -> None:
    if len(sources) != len(plan.sweep.weights):
        raise ValueError(f"{len(sources)} sources for {len(plan.sweep.weights)} weights")
    for weight, source in zip(plan.sweep.weights, sources, strict=True):
        if source.nbytes != weight.nbytes:
            raise ValueError(f"weight {weight.name!r} has {weight.nbytes} bytes, its source {source.nbytes}")
    for copy in plan.copies:
        on_disk = isinstance(sources[copy.weight], DiskBytes)
        if on_disk != (copy.read is not None):
            name, tier = plan.sweep.weights[copy.weight].name, plan.tier(copy.level).name
            where = "on disk" if on_disk else "in memory"
            raise ValueError(f"weight {name!r} is planned on {tier}, and its bytes are {where}")
