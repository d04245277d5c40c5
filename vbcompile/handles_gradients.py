"""Gradients of offloaded weights: they leave the device as they are made, and add up in host memory.

The gradient of an offloaded parameter is an offloaded tensor itself, with its master in host memory. Reading it waits
for the copies that are under way.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vbcompile.handles import OffloadedTensor
from vbcompile.handles_memory import fill
from vbcompile.handles_payload import Payload
from vbcompile.handles_store import WeightStore
from vbcompile.runtime_sources import HostBytes

_KEY = "gradients"


@dataclass
class _Arriving:
    """A gradient on its way to host memory.

    Attributes:
        target: Where it is to be added; None: it was copied to its place.
    """

    event: Any
    memory: Tensor
    target: Payload | None


@dataclass
class Gradients:
    """The gradients of one store's weights. Each has memory of its own for as long as somebody holds it."""

    store: WeightStore
    arriving: list[_Arriving] = field(default_factory=list)
    adding: set[int] = field(default_factory=set)  # numbers of gradients that something arriving is added to
    free: dict[int, list[Tensor]] = field(default_factory=dict)  # by size

    def take(self, parameter: OffloadedTensor, gradient: Tensor) -> None:
        """Add a gradient on the device to ``parameter.grad``; the host does not wait for it."""
        first = parameter.grad is None
        payload = self._new(parameter) if first else self._own(parameter)
        gradient = gradient.to(payload.dtype).contiguous() if payload.stride == _contiguous(payload) else gradient
        laid_out = torch.empty_strided(payload.size, payload.stride, dtype=payload.dtype, device=gradient.device)
        same = gradient.dtype == payload.dtype and gradient.stride() == payload.stride
        data = gradient if same else laid_out.copy_(gradient)
        assert isinstance(payload.source, HostBytes)
        memory = payload.source.memory
        if not first:
            if payload.number in self.adding:
                self.settle()  # the one of the backward before: else each would wait in memory of its own
            self.adding.add(payload.number)
            memory = self._memory(payload.nbytes)
        event = self.store.save(data.detach().as_strided((data.numel(),), (1,)), memory)
        self.arriving.append(_Arriving(event, memory, None if first else payload))
        if first:
            parameter.grad = OffloadedTensor.of(payload)

    def settle(self) -> None:
        """Wait for what is under way and add it up."""
        arriving, self.arriving = self.arriving, []
        self.adding.clear()
        for one in arriving:
            self.store.join(one.event)
            if one.target is not None:
                assert isinstance(one.target.source, HostBytes)
                total = one.target.shaped(one.target.source.memory)
                total.add_(one.target.shaped(one.memory))
                self.free.setdefault(one.memory.numel(), []).append(one.memory)

    def _new(self, parameter: OffloadedTensor) -> Payload:
        weight = parameter.payload
        like = torch.empty_strided(parameter.size(), weight.stride, dtype=parameter.dtype, device="meta")
        memory = self._memory(weight.nbytes)
        payload = Payload(f"{weight.name}.grad", like, parameter.device, HostBytes(memory))
        payload.residence = _GradientResidence(self)
        # copies are queued one behind the other: one into this memory that is under way comes first
        weakref.finalize(payload, self.free.setdefault(memory.numel(), []).append, memory).atexit = False
        return payload

    def _own(self, parameter: OffloadedTensor) -> Payload:
        """What ``parameter.grad`` is kept in; what somebody else has put there moves into our memory."""
        given: Tensor | None = parameter.grad
        assert given is not None
        if isinstance(given, OffloadedTensor) and not given._views:
            ours, same = given.payload.residence, given.payload.stride == parameter.payload.stride
            if isinstance(ours, _GradientResidence) and same:
                return given.payload
        payload = self._new(parameter)
        assert isinstance(payload.source, HostBytes)
        self.settle()
        fill(payload.source.memory, given.cpu())
        parameter.grad = OffloadedTensor.of(payload)
        return payload

    def _memory(self, nbytes: int) -> Tensor:
        free = self.free.get(nbytes)
        if free:
            return free.pop()
        (memory,) = self.store.host.allocate([nbytes])
        return memory


class _GradientResidence:
    """Reading a gradient waits for it."""

    def __init__(self, gradients: Gradients) -> None:
        self.gradients, self.host = gradients, gradients.store.host

    def add(self, payload: Payload) -> None:
        payload.residence = self

    def fetch(self, payload: Payload) -> Tensor:
        self.settle()
        return payload.shaped(payload.load().to(payload.device, copy=True))

    def stop(self) -> None:
        """Gradients hold no memory of the device."""

    def twin(self) -> "_GradientResidence":
        return self

    def before_write(self, payload: Payload) -> None:
        self.settle()

    def settle(self) -> None:
        self.gradients.settle()

    def lend(self, payload: Payload, master: Tensor) -> None:
        """No copies of gradients are kept on the device."""


def gradients_of(store: WeightStore) -> Gradients:
    """The gradients of a store's weights."""
    found: Gradients = store.forms.setdefault(_KEY, Gradients(store))
    return found


def _contiguous(payload: Payload) -> tuple[int, ...]:
    return torch.empty(payload.size, device="meta").stride()
