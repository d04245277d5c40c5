"""The master copy of a tensor that does not live on the device: bytes in host memory or in a file."""

import itertools
import math
import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from vbcompile.runtime_disk import read_bytes
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_sources import DiskBytes, HostBytes, Source


class Residence(Protocol):
    """What knows more about payloads than they do themselves: which of them are on the device now."""

    host: HostMemory

    def add(self, payload: "Payload") -> None:
        """Take in a payload made from one that is there."""
        ...

    def fetch(self, payload: "Payload") -> Tensor:
        """A tensor of its own on the device."""
        ...

    def stop(self) -> None:
        """Give device memory back."""
        ...

    def twin(self) -> "Residence":
        """Another one with the same places, for a copy of the model."""
        ...

    def before_write(self, payload: "Payload") -> None:
        """The master is about to change: copies under way must be over."""
        ...

    def settle(self) -> None:
        """Wait until what was written on the device has reached the masters."""
        ...

    def lend(self, payload: "Payload", master: Tensor) -> None:
        """Somebody gets a tensor on the master's memory, and may write to it; its version counter tells."""
        ...


class Payload:
    """One tensor's master copy.

    Attributes:
        number: Unique in the process; what a compiled graph knows the tensor by.
        name: Qualified name in its model, for messages and statistics.
        size, stride, dtype: Of the tensor; the bytes are its memory in storage order.
        device: Where the tensor is used.
        source: Where the bytes are.
        residence: The runtime that streams it; None before the first compile.
    """

    def __init__(self, name: str, like: Tensor, device: torch.device, source: Source) -> None:
        self.number = next(_numbers)
        self.name = name
        self.size, self.stride = tuple(like.shape), dense_strides(like)
        self.dtype, self.device = like.dtype, device
        self.nbytes = like.numel() * like.element_size()
        self.source = source
        self._writes = 0
        self._lent: Tensor | None = None
        self.residence: Residence | None = None
        if source.nbytes != self.nbytes:
            raise ValueError(f"{name}: {source.nbytes} bytes given for a tensor of {self.nbytes}")
        _payloads[self.number] = self

    def __repr__(self) -> str:
        return f"Payload({self.name!r}, {self.place}, {self.nbytes} bytes)"

    @property
    def place(self) -> str:
        """``cpu``, ``ssd`` or a card's name."""
        if isinstance(self.source, DiskBytes):
            return "ssd"
        return "cpu" if isinstance(self.source, HostBytes) else str(self.source.memory.device)

    @property
    def version(self) -> int:
        """Counts writes, also those to tensors that :meth:`on_host` has given away."""
        return self._writes + (0 if self._lent is None else self._lent._version)

    def written(self) -> None:
        """The master's memory was written to, after :meth:`begin_write`."""
        self._writes += 1

    def shaped(self, memory: Tensor) -> Tensor:
        """``memory`` (uint8, one dimension, at least :attr:`nbytes`) as a tensor of this shape; no copy."""
        return memory[: self.nbytes].view(self.dtype).as_strided(self.size, self.stride)

    def on_host(self) -> Tensor:
        """The tensor on the CPU: the master itself where that is in host memory, else a copy.

        Raises:
            StorageError: its file cannot be read.
        """
        if self.residence is not None:
            self.residence.settle()
        if not isinstance(self.source, HostBytes):
            return self.shaped(self.load().to("cpu"))
        if self._lent is None:
            with torch.inference_mode(False):
                self._lent = self.shaped(own_storage(self.source.memory))
        if self.residence is not None:
            self.residence.lend(self, self._lent)
        return self._lent.detach()  # one version counter for all

    def load(self) -> Tensor:
        """The bytes, wherever they are: uint8, one dimension; a copy only where they come from a file."""
        if isinstance(self.source, DiskBytes):
            return read_bytes(self.source)
        return self.source.memory

    def fetch(self) -> Tensor:
        """A tensor of its own on the device."""
        if self.residence is not None:
            return self.residence.fetch(self)
        return self.shaped(self.load().to(self.device, copy=True))

    def begin_write(self) -> None:
        """The master's memory is about to be written to: what reads it must be over."""
        if self.residence is not None:
            self.residence.before_write(self)

    def write(self, value: Tensor) -> None:
        """Make ``value`` (any device and dtype, same shape) the new content.

        Raises:
            RuntimeError: the master is a file, which may be the user's checkpoint.
        """
        if not isinstance(self.source, HostBytes):
            raise RuntimeError(
                f"{self.name} lives in {_place_of(self.source)} and cannot be written to: "
                "raise max_memory['cpu'] so that it fits in host memory, or call vbcompile.materialize(model) first"
            )
        with _write_lock:
            self.begin_write()
            with torch.inference_mode(False), torch.no_grad():
                self.shaped(self.source.memory).copy_(value.detach())
            self.written()


class Bundle(Payload):
    """Several tensors that are always used together, such as codes and scales, as one master.

    Attributes:
        parts: First byte, shape and dtype of each.
        shard: Keeps the file of one that lives on disk.
    """

    parts: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]
    shard: object = None

    def split(self, memory: Tensor) -> tuple[Tensor, ...]:
        """The tensors in ``memory`` (uint8, one dimension); no copy."""
        found = []
        for begin, shape, dtype in self.parts:
            nbytes = math.prod(shape) * dtype.itemsize
            found.append(memory[begin : begin + nbytes].view(dtype).view(shape))
        return tuple(found)


_numbers = itertools.count()
_payloads: "weakref.WeakValueDictionary[int, Payload]" = weakref.WeakValueDictionary()
_write_lock = threading.RLock()


def payload_of(number: int) -> Payload:
    """The payload with a number. Raises KeyError for one that no tensor holds any more."""
    return _payloads[number]


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides under which the tensor's elements fill its memory without gaps: its own, or contiguous ones."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1 and stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()


def own_storage(memory: Tensor) -> Tensor:
    """The same bytes under a storage of their own, so that tensors of one slab do not look tied to each other."""
    return torch.from_numpy(memory.numpy())


def _place_of(source: Any) -> str:
    return str(source.file) if isinstance(source, DiskBytes) else f"the memory of {source.memory.device}"
