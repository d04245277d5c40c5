"""The disk's side of a plan: which read goes to which bytes of the staging memory, and how far reading runs ahead.

Reads need room in host memory only. They are therefore submitted in the plan's order as soon as the bytes that they
overwrite have been given a place on the device, which is long before their own place there is free.
"""

from collections.abc import Sequence

from torch import Tensor

from vbcompile.runtime_device import MemoryDevice
from vbcompile.runtime_ledger import Ledger
from vbcompile.runtime_read import DiskReader, ReadRequest
from vbcompile.runtime_sources import DiskBytes
from vbcompile.vgpu_plan import Plan, staged


class DiskFeed:
    """Requests for the plan's reads, in cyclic order.

    Args:
        sources: Where each weight's bytes are, by index of the weight.
        staging: ``plan.staging_bytes`` of host memory that begins on a block.

    Not safe for use by several threads at once.
    """

    def __init__(
        self, plan: Plan, sources: Sequence[object], device: MemoryDevice, reader: DiskReader, staging: Tensor
    ) -> None:
        self._plan, self._sources, self._device = plan, sources, device
        self._reader, self._staging = reader, staging
        self._ledger = Ledger()
        self._requests: dict[int, ReadRequest] = {}  # the latest one of each read
        self._fresh: set[int] = set()  # reads whose latest request nobody has taken
        self._next = 0

    def take(self, read: int) -> ReadRequest:
        """The request for a read of the plan; the caller attaches a destination at once."""
        if read not in self._fresh or self._requests[read].failed:  # ahead, in a step that was given up: again
            self._submit(read)
            self._next = (read + 1) % len(self._plan.reads)
        self._fresh.discard(read)
        return self._requests[read]

    def run_ahead(self) -> None:
        """Submit what comes next, as far as there is room."""
        while self._next not in self._fresh and self._has_room(self._next):
            self._submit(self._next)
            self._next = (self._next + 1) % len(self._plan.reads)

    def close(self) -> None:
        """Give up what nobody has taken."""
        for read in self._fresh:
            self._requests[read].cancel()
        self._fresh.clear()

    def _span(self, read: int) -> tuple[int, int]:
        entry = self._plan.reads[read]
        return entry.offset, entry.offset + staged(entry.nbytes)

    def _has_room(self, read: int) -> bool:
        return not any(owner in self._fresh for owner in self._ledger.owners(*self._span(read)))

    def _submit(self, read: int) -> None:
        begin, end = self._span(read)
        before = []
        for owner in self._ledger.owners(begin, end):
            if owner in self._fresh:  # read for an order that did not come
                self._fresh.discard(owner)
                self._requests[owner].cancel()
            elif owner in self._requests:
                before.append(self._requests[owner])
        self._ledger.claim(begin, end, read)
        source = self._sources[self._plan.reads[read].weight]
        assert isinstance(source, DiskBytes)
        self._requests[read] = self._reader.submit(source, self._staging[begin:end], lambda: self._wait_for(before))
        self._fresh.add(read)

    def _wait_for(self, requests: Sequence[ReadRequest]) -> None:
        """Until the staging bytes of these requests have been copied on."""
        for request in requests:
            request.settle()
            if request.after_copy is not None:
                self._device.join(request.after_copy)
