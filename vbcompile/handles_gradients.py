"""Gradients of offloaded weights: they leave the device as they are made, and add up in host memory.

The gradient of an offloaded parameter is an offloaded tensor itself, with its master in host memory. Reading it waits
for the copies that are under way.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vbcompile.handles import OffloadedTensor
from vbcompile.handles_memory import fill, host_payload
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
    """The gradients of one store's weights."""

    store: WeightStore
    payloads: dict[int, Payload] = field(default_factory=dict)
    arriving: list[_Arriving] = field(default_factory=list)
    scratch: dict[int, list[Tensor]] = field(default_factory=dict)

    def take(self, parameter: OffloadedTensor, gradient: Tensor) -> None:
        """Add a gradient on the device to ``parameter.grad``; the host does not wait for it."""
        payload = self._payload(parameter)
        gradient = gradient.to(payload.dtype).contiguous() if payload.stride == _contiguous(payload) else gradient
        laid_out = torch.empty_strided(payload.size, payload.stride, dtype=payload.dtype, device=gradient.device)
        same = gradient.dtype == payload.dtype and gradient.stride() == payload.stride
        data = gradient if same else laid_out.copy_(gradient)
        assert isinstance(payload.source, HostBytes)
        if parameter.grad is None:
            memory, target = payload.source.memory, None
        else:
            self._own(parameter, payload)
            memory, target = self._scratch(payload.nbytes), payload
        event = self.store.save(data.detach().as_strided((data.numel(),), (1,)), memory)
        self.arriving.append(_Arriving(event, memory, target))
        if parameter.grad is None:
            parameter.grad = OffloadedTensor.of(payload)

    def settle(self) -> None:
        """Wait for what is under way and add it up."""
        arriving, self.arriving = self.arriving, []
        for one in arriving:
            self.store.join(one.event)
            if one.target is not None:
                assert isinstance(one.target.source, HostBytes)
                total = one.target.shaped(one.target.source.memory)
                total.add_(one.target.shaped(one.memory))
                self.scratch.setdefault(one.memory.numel(), []).append(one.memory)

    def _payload(self, parameter: OffloadedTensor) -> Payload:
        number = parameter.payload.number
        if number not in self.payloads:
            like = torch.empty_strided(parameter.size(), parameter.payload.stride, dtype=parameter.dtype, device="cpu")
            payload = host_payload(f"{parameter.payload.name}.grad", like, parameter.device, self.store.host)
            payload.residence = _GradientResidence(self)
            self.payloads[number] = payload
        return self.payloads[number]

    def _own(self, parameter: nn.Parameter | OffloadedTensor, payload: Payload) -> None:
        """A gradient that somebody else has put there moves into our memory."""
        given = parameter.grad
        if isinstance(given, OffloadedTensor) and given.payload is payload:
            return
        assert given is not None and isinstance(payload.source, HostBytes)
        fill(payload.source.memory, given.cpu())
        parameter.grad = OffloadedTensor.of(payload)

    def _scratch(self, nbytes: int) -> Tensor:
        free = self.scratch.get(nbytes)
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


def gradients_of(store: WeightStore) -> Gradients:
    """The gradients of a store's weights."""
    found: Gradients = store.forms.setdefault(_KEY, Gradients(store))
    return found


def _contiguous(payload: Payload) -> tuple[int, ...]:
    return torch.empty(payload.size, device="meta").stride()
