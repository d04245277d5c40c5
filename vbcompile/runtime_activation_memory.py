"""Host memory for what leaves the device: pinned, reused, and given back when the last tensor on it is gone."""

import collections
import ctypes
import functools
import mmap
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vbcompile.runtime_host import HostMemory
from vbcompile.vgpu_plan import padded
from vbcompile.vgpu_size import MIB

_SPARE_BYTES = 256 * MIB  # of free buffers are kept even where less is in use: pinning anew is slow


@dataclass(eq=False)
class HostBuffer:
    """One stretch of host memory.

    Attributes:
        memory: The bytes, whole pages.
        read: Event behind the last copy out of this buffer, or None: who writes into it waits for that.
    """

    memory: Tensor
    read: Any = None

    @property
    def nbytes(self) -> int:
        return self.memory.numel()


@dataclass
class BufferPool:
    """Buffers of whole pages, kept for the next step; those that no step took for long are returned to the system.

    Tensors are handed out; a buffer comes back by itself when nothing refers to its tensor's storage any more.

    Attributes:
        device: The device whose driver pins the memory; the CPU: nothing is pinned.
        total_bytes: What is held, in use or kept.
    """

    device: torch.device
    total_bytes: int = 0
    _free: dict[int, list[HostBuffer]] = field(default_factory=lambda: collections.defaultdict(list))
    _returned: "collections.deque[HostBuffer]" = field(default_factory=collections.deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._host = HostMemory(self.device)

    def take(self, nbytes: int) -> tuple[HostBuffer, Tensor]:
        """A buffer of at least so many bytes, and a tensor (uint8) of exactly so many on it.

        Raises:
            MemoryError: there is no such memory. What cannot be pinned is pageable, with one warning.
        """
        size = padded(max(nbytes, 1), mmap.PAGESIZE)
        with self._lock:
            self._collect()
            found = self._free[size]
            buffer = found.pop() if found else self._new(size)
        lease = _lease_type(max(nbytes, 1)).from_address(buffer.memory.data_ptr())
        # the finalizer may run inside of any statement, this class's own too: it takes no lock
        weakref.finalize(lease, self._returned.append, buffer).atexit = False
        return buffer, torch.frombuffer(lease, dtype=torch.uint8)[:nbytes]

    @property
    def free_bytes(self) -> int:
        """Bytes that are kept for later."""
        with self._lock:
            self._collect()
            return self._kept()

    def trim(self, keep: int = 0) -> None:
        """Return kept buffers to the system until at most ``keep`` bytes are kept."""
        with self._lock:
            self._collect()
            self._trim(keep)

    def _collect(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            self._free[buffer.nbytes].append(buffer)

    def _kept(self) -> int:
        return sum(size * len(buffers) for size, buffers in self._free.items())

    def _trim(self, keep: int) -> None:
        """Sizes that were asked for longest ago go first."""
        for size in list(self._free):
            buffers = self._free[size]
            while buffers and self._kept() > keep:
                buffer = buffers.pop()
                if buffer.read is not None:
                    buffer.read.synchronize()
                self.total_bytes -= size
            if not buffers:
                del self._free[size]

    def _new(self, size: int) -> HostBuffer:
        """A new buffer; where sizes change from step to step, those of earlier steps make room."""
        self._trim(max(self.total_bytes - self._kept(), _SPARE_BYTES))
        (memory,) = self._host.allocate([size], alignment=mmap.PAGESIZE)
        self.total_bytes += size
        return HostBuffer(memory)


@functools.lru_cache(256)
def _lease_type(nbytes: int) -> Any:
    """An array type whose instances can be watched for their end, unlike those of ctypes itself."""
    return type("Lease", (ctypes.Array,), {"_type_": ctypes.c_ubyte, "_length_": nbytes})
