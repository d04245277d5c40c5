"""Host memory for what leaves the device: pinned, reused, and given back when the last tensor on it is gone."""

import collections
import ctypes
import functools
import logging
import mmap
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
_SPARE_BYTES = 256 * 2**20


@dataclass(eq=False)
class HostBuffer:
    """One stretch of host memory.

    Attributes:
        nbytes: Size, whole pages.
        mapping: The memory itself.
        pinned: Whether devices copy from and to it beside the computation.
        read: Event behind the last copy out of this buffer, or None: who writes into it waits for that.
    """

    nbytes: int
    mapping: mmap.mmap
    pinned: bool
    read: Any = None

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))


@dataclass
class HostMemory:
    """Buffers of whole pages, kept for the next step; those that no step took for long are returned to the system.

    Pages are mapped and registered one buffer at a time: PyTorch's own pinned memory rounds each up to a power of two.
    Tensors are handed out; a buffer comes back by itself when nothing refers to its tensor's storage any more.

    Attributes:
        device: The device whose driver pins the memory; the CPU: nothing is pinned.
    """

    device: torch.device
    _free: dict[int, list[HostBuffer]] = field(default_factory=lambda: collections.defaultdict(list))
    _returned: "collections.deque[HostBuffer]" = field(default_factory=collections.deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _warned: bool = False
    total_bytes: int = 0

    def take(self, nbytes: int) -> tuple[HostBuffer, Tensor]:
        """A buffer of at least so many bytes, and a tensor (uint8) of exactly so many on it."""
        size = -(-max(nbytes, 1) // _PAGE) * _PAGE
        with self._lock:
            self._collect()
            found = self._free[size]
            buffer = found.pop() if found else self._map(size)
        lease = _lease_type(nbytes).from_buffer(buffer.mapping)
        # the finalizer may run inside of any statement, this class's own too: it takes no lock
        weakref.finalize(lease, self._returned.append, buffer).atexit = False
        return buffer, torch.frombuffer(lease, dtype=torch.uint8)

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
                self._unmap(buffers.pop())
            if not buffers:
                del self._free[size]

    def _map(self, size: int) -> HostBuffer:
        """A new buffer; where sizes change from step to step, those of earlier steps make room."""
        self._trim(max(self.total_bytes - self._kept(), _SPARE_BYTES))
        buffer = HostBuffer(size, mmap.mmap(-1, size), False)
        buffer.pinned = self._pin(buffer)
        self.total_bytes += size
        return buffer

    def _unmap(self, buffer: HostBuffer) -> None:
        if buffer.read is not None:
            buffer.read.synchronize()
        if buffer.pinned:
            from vbcompile.compat import unregister_host_memory

            unregister_host_memory(buffer.address)
        self.total_bytes -= buffer.nbytes
        buffer.mapping.close()

    def _pin(self, buffer: HostBuffer) -> bool:
        if self.device.type == "cpu":
            return False
        from vbcompile.compat import register_host_memory

        reason = register_host_memory(self.device, buffer.address, buffer.nbytes)
        if reason and not self._warned:
            self._warned = True
            log.warning(
                "%d bytes of host memory could not be pinned (%s; %d are): activations move through pageable memory, "
                "which is slower. Free host memory, or raise the limit of locked memory (ulimit -l)",
                buffer.nbytes,
                reason,
                self.total_bytes,
            )
        return not reason


@functools.lru_cache(256)
def _lease_type(nbytes: int) -> Any:
    """An array type whose instances can be watched for their end, unlike those of ctypes itself."""
    return type("Lease", (ctypes.Array,), {"_type_": ctypes.c_ubyte, "_length_": nbytes})
