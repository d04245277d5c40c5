"""Operators that move what the forward saves for the backward to host memory and back, beside the computation.

    host = activation_offload(source)        copy away, queued behind what was computed so far
    activation_departed(host, source)        the computation goes on when that copy is done: source's memory is free
    restored = activation_reload(host, device)   copy back, queued behind what was computed so far
    activation_arrived(restored, host)       the computation goes on when that copy is done: restored may be read

Each device has one queue for either direction. The compiler may move these calls within what their arguments allow:
results do not change, only how long something is waited for. ``departed`` holds ``source`` until its copy is done, so
that nobody reuses its memory; ``host`` has its own memory for as long as any tensor refers to it, so that a backward
may run twice, late, or never. On the CPU copies are made at once, into memory of the same pool.
"""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vbcompile.compat import is_dense
from vbcompile.runtime_activation_memory import BufferPool, HostBuffer
from vbcompile.runtime_device import AcceleratorDevice, CopyQueue

_LIBRARY = torch.library.Library("vblackwell", "FRAGMENT")
for _schema in (
    "activation_offload(Tensor source) -> Tensor",
    "activation_departed(Tensor(a!) host, Tensor source) -> ()",
    "activation_reload(Tensor host, Device device) -> Tensor",
    "activation_arrived(Tensor(a!) restored, Tensor host) -> ()",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.flexible_layout,))  # no copy for the sake of strides


@dataclass
class MovedBytes:
    """What one device's queues have carried since the process began, or since :func:`reset_statistics`.

    Attributes:
        offloaded: Bytes copied to the host.
        reloaded: Bytes copied back.
        offloads: Number of tensors copied to the host.
        reloads: Number of tensors copied back.
        host_bytes: Host memory held for it now, in use or kept for the next step.
    """

    offloaded: int = 0
    reloaded: int = 0
    offloads: int = 0
    reloads: int = 0
    host_bytes: int = 0


@dataclass(eq=False)
class _Copy:
    """A copy under way: the event behind it, and the device's memory that it reads or writes, until it is over."""

    event: Any
    memory: Tensor | None


@dataclass(eq=False)
class _Traffic:
    """One device's queues, and the copies whose end nobody has waited for; keys are addresses."""

    device: torch.device
    memory: BufferPool
    link: AcceleratorDevice | None = None
    away: CopyQueue | None = None
    back: CopyQueue | None = None
    departures: dict[int, _Copy] = field(default_factory=dict)
    arrivals: dict[int, _Copy] = field(default_factory=dict)
    buffers: weakref.WeakValueDictionary[int, HostBuffer] = field(default_factory=weakref.WeakValueDictionary)
    moved: MovedBytes = field(default_factory=MovedBytes)


_traffic: dict[torch.device, _Traffic] = {}
_lock = threading.Lock()


def _traffic_of(device: torch.device) -> _Traffic:
    found = _traffic.get(device)
    if found is None:
        with _lock:
            found = _traffic.get(device)
            if found is None:
                found = _traffic[device] = _open(device)
    return found


def _open(device: torch.device) -> _Traffic:
    memory = BufferPool(device)
    if device.type == "cpu":
        return _Traffic(device, memory)
    link = AcceleratorDevice(device)
    return _Traffic(device, memory, link, link.queue("d2h"), link.queue("h2d"))


def statistics(device: str | torch.device) -> MovedBytes:
    """What was moved from and to a device, as a copy."""
    traffic = _traffic.get(_indexed(torch.device(device)))
    if traffic is None:
        return MovedBytes()
    return MovedBytes(**{**vars(traffic.moved), "host_bytes": traffic.memory.total_bytes})


def reset_statistics() -> None:
    """Count from zero again, on every device."""
    for traffic in _traffic.values():
        traffic.moved = MovedBytes()


def release_host_memory() -> None:
    """Return the host memory that is kept for the next step to the system."""
    for traffic in _traffic.values():
        traffic.memory.trim()


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cpu" or device.index is not None:
        return torch.device("cpu") if device.type == "cpu" else device
    return torch.device(device.type, torch.accelerator.current_device_index())


def _dense_strides(source: Tensor) -> tuple[Any, ...]:
    """The source's own strides where its elements lie without holes, else contiguous ones; host and device agree."""
    if is_dense(source):
        return source.stride()
    return torch.empty(source.shape, device="meta").stride()


def _offload(source: Tensor) -> Tensor:
    traffic = _traffic_of(source.device)
    strides = _dense_strides(source)
    dense = source if source.stride() == strides else source.contiguous()
    nbytes = dense.numel() * dense.element_size()
    buffer, memory = traffic.memory.take(nbytes)
    host = memory.view(dense.dtype).as_strided(dense.shape, strides)
    traffic.buffers[host.data_ptr()] = buffer
    traffic.moved.offloads += 1
    traffic.moved.offloaded += nbytes
    if traffic.link is None or traffic.away is None:
        host.copy_(dense)
        return host
    _forget_finished(traffic)
    traffic.link.wait(traffic.away, traffic.link.record())
    if buffer.read is not None:
        traffic.link.wait(traffic.away, buffer.read)
    traffic.link.copy(traffic.away, host, dense)
    traffic.departures[host.data_ptr()] = _Copy(traffic.link.record(traffic.away), dense)
    return host


def _departed(host: Tensor, source: Tensor) -> None:
    traffic = _traffic_of(source.device)
    copy = traffic.departures.pop(host.data_ptr(), None)
    if copy is not None and traffic.link is not None:
        traffic.link.wait(None, copy.event)


def _reload(host: Tensor, device: torch.device) -> Tensor:
    traffic = _traffic_of(_indexed(device))
    restored = torch.empty_strided(host.shape, _dense_strides(host), dtype=host.dtype, device=device)
    traffic.moved.reloads += 1
    traffic.moved.reloaded += host.numel() * host.element_size()
    if traffic.link is None or traffic.back is None:
        return restored.copy_(host)
    _forget_finished(traffic)
    traffic.link.wait(traffic.back, traffic.link.record())  # whoever had this memory before is done with it
    traffic.link.copy(traffic.back, restored, host)
    event = traffic.link.record(traffic.back)
    traffic.arrivals[restored.data_ptr()] = _Copy(event, restored)
    buffer = traffic.buffers.get(host.data_ptr())
    if buffer is not None:
        buffer.read = event
    return restored


def _arrived(restored: Tensor, host: Tensor) -> None:
    traffic = _traffic_of(restored.device)
    copy = traffic.arrivals.pop(restored.data_ptr(), None)
    if copy is not None and traffic.link is not None:
        traffic.link.wait(None, copy.event)


def _forget_finished(traffic: _Traffic) -> None:
    """Memory of copies that are over need not be held; a step that ended in an exception left nobody to wait."""
    for copy in (*traffic.departures.values(), *traffic.arrivals.values()):  # other threads may begin and end some
        if copy.memory is not None and copy.event.query():
            copy.memory = None


def _offload_fake(source: Tensor) -> Tensor:
    return torch.empty_strided(source.shape, _dense_strides(source), dtype=source.dtype, device="cpu")


def _reload_fake(host: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(host.shape, _dense_strides(host), dtype=host.dtype, device=device)


def _nothing(*tensors: Tensor) -> None:
    """A wait has no result."""


for _name, _run, _fake in (
    ("activation_offload", _offload, _offload_fake),
    ("activation_departed", _departed, _nothing),
    ("activation_reload", _reload, _reload_fake),
    ("activation_arrived", _arrived, _nothing),
):
    # one implementation for every device: the arguments of one call are on different ones
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vblackwell::{_name}", _fake, lib=_LIBRARY)
