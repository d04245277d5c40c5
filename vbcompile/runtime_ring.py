"""The ring on the device: which copy of a plan is in it, which bytes may be overwritten, and after what."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vbcompile.runtime_device import CopyQueue, MemoryDevice
from vbcompile.runtime_feed import DiskFeed
from vbcompile.runtime_ledger import Ledger
from vbcompile.runtime_links import Links
from vbcompile.runtime_read import Destination, ReadRequest
from vbcompile.runtime_sources import DiskBytes, Source
from vbcompile.runtime_statistics import Recorder, Statistics
from vbcompile.vgpu_files import BLOCK
from vbcompile.vgpu_plan import Plan, padded


@dataclass
class _Slot:
    """What is known of one copy of the plan.

    ``filled``: its bytes are in the ring, or on their way there. ``in_use``: waited for and not yet released.
    """

    memory: Tensor
    queue: CopyQueue
    filled: bool = False
    used: bool = False  # since it was filled
    in_use: bool = False
    ready: Any = None
    free: Any = None
    request: ReadRequest | None = None
    behind: Sequence[Any] = ()  # what its copy waits for, as long as its read from disk is not over
    detour: Tensor | None = None  # memory of its own, where its place was in use

    @property
    def bytes(self) -> Tensor:
        return self.memory if self.detour is None else self.detour


class Ring:
    """The copies of a plan on the device. Not safe for use by several threads at once.

    Allocates the ring, and staging memory for reads from disk.

    Raises:
        torch.OutOfMemoryError: the device has not the memory.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Source],
        device: MemoryDevice,
        links: Links,
        statistics: Statistics,
        recorder: Recorder | None,
    ) -> None:
        self._plan, self._sources, self._device, self._links = plan, sources, device, links
        self._statistics, self._recorder = statistics, recorder
        self._ledger = Ledger()
        self._slots: list[_Slot] = []
        self._copies_of: dict[int, list[int]] = {}
        memory = device.allocate(plan.ring_bytes)
        for index, copy in enumerate(plan.copies):
            queue = links.towards(sources[copy.weight])
            # .data: a version counter for each place, since autograd would take a copy into one, which other threads
            # make at any moment, for a write to another that it has been given
            self._slots.append(_Slot(memory[copy.offset : copy.offset + copy.nbytes].data, queue))
            self._copies_of.setdefault(copy.weight, []).append(index)
        self._feed = self._make_feed() if plan.reads else None

    def prefetch(self, copy: int) -> bool:
        """Queue a copy unless it is there; False where its place is in use."""
        return self._slots[copy].filled or self._issue(copy)

    def wait(self, copy: int) -> Tensor:
        """The bytes of a copy, in use from here on.

        Raises:
            StorageError: they could not be read. The copy may be tried again.
            torch.OutOfMemoryError: its place is in use, and there is no memory beside the ring.
        """
        slot = self._slots[copy]
        if not slot.in_use:
            self._statistics.hits += slot.filled
            self._statistics.misses += not slot.filled
            if self.prefetch(copy):
                self._await(copy, slot)
            else:
                slot.detour = self._device.allocate(slot.memory.nbytes)
                self._links.load(self._plan.copies[copy].weight, slot.detour)
                self._statistics.detour_bytes += slot.detour.nbytes
                self._statistics.streamed_bytes += slot.detour.nbytes
            slot.in_use = True
        return slot.bytes

    def view(self, weight: int) -> Tensor | None:
        """The bytes of a weight that is in use; None where it is not."""
        slots = (self._slots[index] for index in self._copies_of.get(weight, ()))
        return next((slot.bytes for slot in slots if slot.in_use), None)

    def release(self, copy: int) -> None:
        """The computation queued so far was the last to read this copy. Nothing happens where it is not in use."""
        slot = self._slots[copy]
        if not slot.in_use:
            return
        slot.in_use = False
        if slot.detour is not None:
            slot.detour = None  # its allocator reuses it in the computation's order
        else:
            self._device.end_use(slot.memory)
            slot.free = self._device.record()

    def in_use(self) -> list[int]:
        """Copies that have been waited for and not released."""
        return [index for index, slot in enumerate(self._slots) if slot.in_use]

    def forget(self, weight: int) -> list[Any]:
        """A weight is about to change: its copies are void. Returns the events behind those that still read it."""
        slots = [self._slots[index] for index in self._copies_of.get(weight, ())]
        for slot in slots:
            slot.filled = False
        return [slot.ready for slot in slots if slot.ready is not None]

    def close(self) -> None:
        """Block until nothing is being read. What nobody waited for may have failed: that is of no interest now."""
        for slot in self._slots:
            if slot.request is not None:
                slot.request.settle()
        if self._feed is not None:
            self._feed.close()

    def _issue(self, index: int) -> bool:
        """Queue a copy into its place in the ring; False where that is in use."""
        slot, copy = self._slots[index], self._plan.copies[index]
        begin, end = copy.offset, copy.offset + padded(copy.nbytes, self._plan.alignment)
        owners = [self._slots[owner] for owner in self._ledger.owners(begin, end)]
        if any(owner.in_use and owner.detour is None for owner in (*owners, slot)):
            return False
        after = [event for owner in owners for event in self._evict(owner, slot)]
        stored = self._links.stored(copy.weight)
        if stored is not None:
            after.append(stored)
        self._ledger.claim(begin, end, index)
        slot.filled, slot.used, slot.request = True, False, None
        self._statistics.count(slot.queue.name, copy.nbytes)
        self._statistics.streamed_bytes += copy.nbytes
        source = self._sources[copy.weight]
        if isinstance(source, DiskBytes):
            self._take_from_disk(index, after)
        else:
            self._copy(index, after, slot.memory, source.memory)
            slot.ready = self._device.record(slot.queue)
        return True

    def _evict(self, old: _Slot, new: _Slot) -> Iterator[Any]:
        """The events after which another copy may overwrite this one's bytes."""
        if old.request is not None:
            old.request.settle()
        if old.filled and not old.used:
            self._statistics.wasted_bytes += old.memory.nbytes
        self._statistics.evictions += old.filled
        old.filled = False
        if old.behind:  # its read failed: part of it may be queued, and the place be in use from before
            yield from old.behind
            yield self._device.record(old.queue)
            old.behind = ()
        if old.ready is not None and old.queue is not new.queue:
            yield old.ready
        if old.free is not None:
            yield old.free

    def _copy(self, index: int, after: Sequence[Any], target: Tensor, source: Tensor) -> None:
        queue = self._slots[index].queue
        for event in after:
            self._device.wait(queue, event)
        if self._recorder is None:
            self._device.copy(queue, target, source)
            return
        with self._recorder.copy(index, queue, target.nbytes):
            self._device.copy(queue, target, source)

    def _take_from_disk(self, index: int, after: Sequence[Any]) -> None:
        slot, read = self._slots[index], self._plan.copies[index].read
        slot.behind = after
        assert self._feed is not None and read is not None

        def deliver(first: int, piece: Tensor) -> None:
            self._copy(index, after, slot.memory[first : first + piece.numel()], piece)

        def finish() -> Any:
            slot.ready, slot.behind = self._device.record(slot.queue), ()
            return slot.ready

        slot.request = self._feed.take(read)
        slot.request.attach(Destination(deliver, finish))
        self._feed.run_ahead()

    def _await(self, index: int, slot: _Slot) -> None:
        """Let the computation wait for a copy, and the host for what has still to be read from disk."""
        if slot.request is not None:
            self._join(slot, slot.request)
        self._statistics.late += not self._device.is_over(slot.ready)
        if self._recorder is None:
            self._device.wait(None, slot.ready)
        else:
            self._recorder.stall(index, lambda: self._device.wait(None, slot.ready))
        self._device.begin_use(slot.memory)
        slot.used = True

    def _join(self, slot: _Slot, request: ReadRequest) -> None:
        begun = time.perf_counter_ns()
        try:
            request.join()
        except BaseException:
            slot.filled = False
            raise
        self._statistics.host_wait_ns += time.perf_counter_ns() - begun

    def _make_feed(self) -> DiskFeed:
        (staging,) = self._links.host.allocate([self._plan.staging_bytes], alignment=BLOCK)
        return DiskFeed(self._plan, self._sources, self._device, self._links.reader, staging)
