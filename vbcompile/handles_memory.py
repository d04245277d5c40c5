"""Masters in host memory: copied in batches, each the size of a slab, so that nothing is held twice."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vbcompile.handles_payload import Bundle, Payload, dense_strides
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_sources import HostBytes
from vbcompile.vgpu_plan import ALIGNMENT, padded

BATCH_BYTES = 1 << 30
"""Masters are copied together up to this many bytes: one slab of pinned memory."""


def host_payload(name: str, value: Tensor, device: torch.device, host: HostMemory) -> Payload:
    """A payload with a copy of ``value`` in host memory."""
    (memory,) = host.allocate([value.numel() * value.element_size()])
    fill(memory, value)
    return Payload(name, value, device, HostBytes(memory))


def host_bundle(name: str, parts: Sequence[Tensor], device: torch.device, host: HostMemory) -> Bundle:
    """A payload with copies of several contiguous tensors in host memory, each on an aligned byte."""
    begins, end = [], 0
    for part in parts:
        begins.append(end)
        end += padded(part.nbytes, ALIGNMENT)
    (memory,) = host.allocate([end])
    bundle = Bundle(name, memory, device, HostBytes(memory))
    bundle.parts = tuple((begin, tuple(p.shape), p.dtype) for begin, p in zip(begins, parts, strict=True))
    refill(bundle, parts)
    return bundle


def refill(bundle: Bundle, parts: Sequence[Tensor]) -> None:
    """Give a bundle other contents of the same shapes."""
    assert isinstance(bundle.source, HostBytes)
    if bundle.residence is not None:
        bundle.residence.before_write(bundle)
    for target, part in zip(bundle.split(bundle.source.memory), parts, strict=True):
        fill(target.view(-1).view(torch.uint8), part)


def fill(memory: Tensor, value: Tensor) -> None:
    """Copy a tensor (any device) into host bytes, in the order of :func:`dense_strides`."""
    if not value.numel():
        return
    with torch.inference_mode(False), torch.no_grad():
        target = memory.view(value.dtype).as_strided(value.shape, dense_strides(value))
        target.copy_(value.detach())


def copy_payload(payload: Payload, dtype: torch.dtype | None = None, memo: dict[int, Any] | None = None) -> Payload:
    """A payload of its own with the same content, in host memory.

    Args:
        memo: Of a deep copy: the copies belong to a store of their own. None: to the store of the original.
    """
    value = payload.on_host()
    value = value if dtype is None else value.to(dtype)
    store = payload.residence
    if store is not None and memo is not None:
        key = id(store)
        if key not in memo:
            memo[key] = store.twin()
        store = memo[key]
    host = store.host if store is not None else HostMemory(payload.device)
    twin = host_payload(payload.name, value, payload.device, host)
    if store is not None:
        store.add(twin)
    return twin


def batches(values: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors that go together into one slab."""
    chosen: list[int] = []
    total = 0
    for index, value in enumerate(values):
        nbytes = value.numel() * value.element_size()
        if chosen and total + nbytes > BATCH_BYTES:
            yield chosen
            chosen, total = [], 0
        chosen.append(index)
        total += nbytes
    if chosen:
        yield chosen
