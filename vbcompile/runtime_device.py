"""What the offload runtime needs of a device: memory, copy queues beside the computation, and events between them.

:class:`AcceleratorDevice` is any device of PyTorch; :class:`vbcompile.runtime_simulated.SimulatedDevice` one made of
host memory, for tests and for machines without an accelerator. Neither is waited for as a whole during a step, and no
tensor is handed to the caching allocator's stream bookkeeping: whoever reuses memory waits for an event.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class CopyQueue:
    """Copies that run in order, beside the computation and beside other queues.

    Attributes:
        name: ``h2d``, ``d2h``, ``disk`` or the name of a neighbouring card.
        stream: The device's own handle.
        remote: Handle on the card at the other end, where there is one.
    """

    name: str
    stream: Any
    remote: Any = None


class MemoryDevice(Protocol):
    """A device with memory of its own. ``None`` for a queue means the stream on which the caller computes now.

    Queues and events may be used from several threads.
    """

    device: torch.device

    def allocate(self, nbytes: int) -> Tensor:
        """Uninitialised bytes (uint8) on the device, aligned to 256. Raises torch.OutOfMemoryError."""
        ...

    def queue(self, name: str, peer: torch.device | None = None) -> CopyQueue:
        """A new queue; ``peer`` is the card at the other end of a link between cards."""
        ...

    def copy(self, queue: CopyQueue, target: Tensor, source: Tensor) -> None:
        """Append a copy of equally many bytes. Both tensors must stay alive until an event behind it is over."""
        ...

    def record(self, queue: CopyQueue | None = None, *, timing: bool = False) -> Any:
        """An event that is over when everything queued so far is done."""
        ...

    def wait(self, queue: CopyQueue | None, event: Any) -> None:
        """What is queued from here on runs after the event; the host does not wait."""
        ...

    def is_over(self, event: Any) -> bool:
        """Whether the event has come to pass."""
        ...

    def join(self, event: Any) -> None:
        """Block the calling thread until the event is over."""
        ...

    def elapsed_ns(self, begin: Any, end: Any) -> int:
        """Nanoseconds between two events that are over and were recorded with ``timing``."""
        ...

    def peak_bytes(self) -> int:
        """Most bytes allocated at once so far."""
        ...

    def allocated_bytes(self) -> int:
        """Bytes allocated now."""
        ...

    def begin_use(self, memory: Tensor) -> None:
        """From here on the computation reads these bytes. For devices that check; nothing elsewhere."""
        ...

    def end_use(self, memory: Tensor) -> None:
        """The computation queued so far was the last to read these bytes."""
        ...

    def host_writes(self, memory: Tensor) -> None:
        """The calling thread is about to write these host bytes. For devices that check; nothing elsewhere."""
        ...

    def close(self) -> None:
        """Stop what the device runs in the background; queued copies are finished first."""
        ...


class AcceleratorDevice:
    """A card of any vendor that PyTorch supports, through ``torch.Stream``, ``torch.Event`` and ``torch.accelerator``.

    Args:
        device: For example ``"cuda"``, ``"cuda:1"``, ``"xpu"``; without an index the current card.

    Raises:
        DeviceError: the device is not here, or is the CPU.
    """

    def __init__(self, device: str | torch.device) -> None:
        from vbcompile.device import DeviceError, get_unified_backend

        self._backend = get_unified_backend(device)
        found = self._backend.device
        if found.type == "cpu":
            raise DeviceError("the CPU has no memory beside main memory: use SimulatedDevice to try streaming on it")
        index = self._backend.current_index() if found.index is None else found.index
        self.device = torch.device(found.type, index)
        self._index = index

    def __repr__(self) -> str:
        return f"AcceleratorDevice({str(self.device)!r})"

    def allocate(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # an arena made in inference mode could never be written outside of it
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def queue(self, name: str, peer: torch.device | None = None) -> CopyQueue:
        return CopyQueue(name, torch.Stream(self.device), None if peer is None else torch.Stream(peer))

    def copy(self, queue: CopyQueue, target: Tensor, source: Tensor) -> None:
        if queue.remote is None:
            with queue.stream:
                target.copy_(source, non_blocking=True)
            return
        # a copy between cards is queued on both ends' current streams, each of which then waits for the other
        with queue.remote, queue.stream:
            target.copy_(source, non_blocking=True)

    def record(self, queue: CopyQueue | None = None, *, timing: bool = False) -> torch.Event:
        event = torch.Event(self.device, enable_timing=timing)
        event.record(self._stream(queue))
        return event

    def wait(self, queue: CopyQueue | None, event: torch.Event) -> None:
        self._stream(queue).wait_event(event)

    def is_over(self, event: torch.Event) -> bool:
        return event.query()

    def join(self, event: torch.Event) -> None:
        event.synchronize()

    def elapsed_ns(self, begin: torch.Event, end: torch.Event) -> int:
        return int(begin.elapsed_time(end) * 1e6)

    def peak_bytes(self) -> int:
        return self._backend.max_memory_allocated(self._index)

    def allocated_bytes(self) -> int:
        return self._backend.memory_allocated(self._index)

    def reset_peak(self) -> None:
        """Count :meth:`peak_bytes` from now on."""
        torch.accelerator.reset_peak_memory_stats(self.device)

    def begin_use(self, memory: Tensor) -> None:
        """Nothing: cards do not tell who reads their memory."""

    def end_use(self, memory: Tensor) -> None:
        """Nothing."""

    def host_writes(self, memory: Tensor) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing: streams end with their last reference."""

    def _stream(self, queue: CopyQueue | None) -> torch.Stream:
        return torch.accelerator.current_stream(self.device) if queue is None else queue.stream
