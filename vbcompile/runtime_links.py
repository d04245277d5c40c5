"""The links of a device: one queue of copies each, what is loaded through them outside of a plan, and the way back."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vbcompile.runtime_device import CopyQueue, MemoryDevice
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_read import DiskReader, load_from_disk
from vbcompile.runtime_sources import DiskBytes, HostBytes, PeerBytes, Source
from vbcompile.runtime_statistics import Statistics
from vbcompile.vgpu_size import MIB

_MOST_LEAVING = 64 * MIB  # what is kept alive on the device for copies that leave it, or as much as the ring


class _Leaving(NamedTuple):
    """A copy out of the device; ``memory`` stays alive until ``event`` is over."""

    event: Any
    memory: Tensor


class Links:
    """Queues, loads and stores of one device. Not safe for use by several threads at once.

    Args:
        sources: Where the bytes of each weight are.
        host: Where buffers for disk reads come from; None: made when needed.
        reader: Disk threads; None: made when needed, and closed with this.
        most_leaving: Bytes on the device that copies out of it may keep alive.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        device: MemoryDevice,
        statistics: Statistics,
        host: HostMemory | None,
        reader: DiskReader | None,
        most_leaving: int,
    ) -> None:
        self._sources, self._device, self._statistics = sources, device, statistics
        self._host, self._reader, self._own_reader = host, reader, reader is None
        self._most_leaving = max(most_leaving, _MOST_LEAVING)
        self._queues: dict[str, CopyQueue] = {}
        self._leaving: list[_Leaving] = []
        self._last_sent: dict[str, Any] = {}
        self._stored: dict[int, Any] = {}

    @property
    def host(self) -> HostMemory:
        if self._host is None:
            self._host = HostMemory(self._device.device)
        return self._host

    @property
    def reader(self) -> DiskReader:
        if self._reader is None:
            self._reader = DiskReader(self._device)
        return self._reader

    def towards(self, source: Source) -> CopyQueue:
        """The queue that brings these bytes to the device."""
        return self._queue(link_name(source), source)

    def stored(self, weight: int) -> Any:
        """Event behind the last store of a weight; None where there was none."""
        return self._stored.get(weight)

    def load(self, weight: int, target: Tensor) -> None:
        """Fill memory that the computation may have used before; the computation waits for it.

        Raises:
            StorageError: the bytes could not be read.
        """
        if not target.numel():
            return
        source = self._sources[weight]
        queue = self.towards(source)
        self._device.wait(queue, self._device.record())
        if weight in self._stored:
            self._device.wait(queue, self._stored[weight])
        if isinstance(source, DiskBytes):
            load_from_disk(self.reader, self.host, self._device, queue, source, target)
        else:
            self._device.copy(queue, target, source.memory)
        self._statistics.count(queue.name, target.nbytes)
        self._device.wait(None, self._device.record(queue))

    def store(self, weight: int, data: Tensor, after: Iterable[Any]) -> None:
        """Queue a weight's way back, behind the computation so far and some events."""
        source = self._sources[weight]
        assert not isinstance(source, DiskBytes)
        if isinstance(source, PeerBytes) and source.master is not None:
            self.send(data, HostBytes(source.master))
        self._stored[weight] = self.send(data, source, after)

    def send(self, data: Tensor, target: HostBytes | PeerBytes, after: Iterable[Any] = ()) -> Any:
        """Queue a copy out of the device, behind the computation so far; returns the event behind it."""
        queue = self._queue("d2h" if isinstance(target, HostBytes) else f"to {link_name(target)}", target)
        self._device.wait(queue, self._device.record())
        for event in after:
            self._device.wait(queue, event)
        self._device.copy(queue, target.memory, data)
        self._statistics.count(queue.name, data.nbytes)
        event = self._last_sent[queue.name] = self._device.record(queue)
        self._leaving.append(_Leaving(event, data))
        self._bound_leaving()
        return event

    def last_sent(self) -> list[Any]:
        """For each queue out of the device, the event behind its last copy."""
        return list(self._last_sent.values())

    def forget_sent(self) -> None:
        """Let go of the memory of what has arrived."""
        self._leaving = [entry for entry in self._leaving if not self._device.is_over(entry.event)]

    def join(self) -> None:
        """Block until every queue is empty."""
        for queue in self._queues.values():
            self._device.join(self._device.record(queue))

    def close(self) -> None:
        """Let go of everything; nothing may be under way."""
        if self._reader is not None and self._own_reader:
            self._reader.close()
        self._leaving.clear()
        self._last_sent.clear()
        self._stored.clear()

    def _bound_leaving(self) -> None:
        """Let the computation wait for the oldest copies where too many keep memory alive."""
        self.forget_sent()
        outstanding = sum(entry.memory.nbytes for entry in self._leaving)
        while len(self._leaving) > 1 and outstanding > self._most_leaving:
            oldest = self._leaving.pop(0)
            self._device.wait(None, oldest.event)  # so that its memory may be used again behind this
            outstanding -= oldest.memory.nbytes

    def _queue(self, name: str, source: Source) -> CopyQueue:
        if name not in self._queues:
            peer = source.memory.device if isinstance(source, PeerBytes) else self._device.device
            self._queues[name] = self._device.queue(name, None if peer == self._device.device else peer)
        return self._queues[name]


def link_name(source: Source) -> str:
    """Name of the link that brings these bytes to the device, in statistics and timelines."""
    match source:
        case HostBytes():
            return "h2d"
        case DiskBytes():
            return "disk"
        case _:
            return str(source.memory.device) if source.memory.device.type != "cpu" else "peer"


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's bytes as uint8 of one dimension; a copy where it is not contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
