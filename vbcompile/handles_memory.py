"""Masters in host memory: copied in batches, each the size of a slab, so that nothing is held twice."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbcompile.handles_payload import Bundle, Payload, dense_strides
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_shards import Shard
from vbcompile.runtime_sources import DiskBytes, HostBytes
from vbcompile.vgpu_plan import ALIGNMENT, padded

BATCH_BYTES = 1 << 30
"""Masters are copied together up to this many bytes: one slab of pinned memory."""


def host_payload(name: str, value: Tensor, device: torch.device, host: HostMemory) -> Payload:
    """A payload with a copy of ``value`` in host memory."""
    (memory,) = host.allocate([value.numel() * value.element_size()])
    fill(memory, value)
    return Payload(name, value, device, HostBytes(memory))


def bundle(name: str, parts: Sequence[Tensor], device: torch.device, host: HostMemory, folder: Path | None) -> Bundle:
    """A payload with copies of several contiguous tensors, each on an aligned byte.

    Args:
        folder: Where a file of its own is written, with checksums; None: host memory.

    Raises:
        StorageError: the folder cannot be written to, or the disk has no room.
    """
    begins, end = [], 0
    for part in parts:
        begins.append(end)
        end += padded(part.nbytes, ALIGNMENT)
    layout = tuple((begin, tuple(p.shape), p.dtype) for begin, p in zip(begins, parts, strict=True))
    if folder is None:
        (memory,) = host.allocate([end])
        found = Bundle(name, memory, device, HostBytes(memory))
    else:
        shard = Shard(folder, {name: end}, lambda _: _joined(parts, begins, end))
        found = Bundle(name, torch.empty(end, dtype=torch.uint8, device="meta"), device, shard.sources[name])
        found.shard = shard
    found.parts = layout
    if folder is None:
        refill(found, parts)
    return found


def refill(bundle: Bundle, parts: Sequence[Tensor]) -> None:
    """Give a bundle other contents of the same shapes."""
    if bundle.residence is not None:
        bundle.residence.before_write(bundle)
    bundle.written()
    if isinstance(bundle.source, DiskBytes):
        begins, folder = [begin for begin, _, _ in bundle.parts], bundle.source.file.parent
        shard = Shard(folder, {bundle.name: bundle.nbytes}, lambda _: _joined(parts, begins, bundle.nbytes))
        bundle.source, bundle.shard = shard.sources[bundle.name], shard
        return
    assert isinstance(bundle.source, HostBytes)
    for target, part in zip(bundle.split(bundle.source.memory), parts, strict=True):
        fill(target.view(-1).view(torch.uint8), part)


def _joined(parts: Sequence[Tensor], begins: Sequence[int], nbytes: int) -> Tensor:
    memory = torch.zeros(nbytes, dtype=torch.uint8)
    for begin, part in zip(begins, parts, strict=True):
        fill(memory[begin : begin + part.nbytes], part)
    return memory


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
