"""Host memory that copies reach beside the computation: pinned slabs, cut to size.

PyTorch's own pinned allocator rounds each tensor up to a power of two. Here tensors are packed into a few slabs that
are exactly as large as their contents, and each slab is registered with the driver as a whole.
"""

import logging
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from vbcompile import compat
from vbcompile.vgpu_plan import padded
from vbcompile.vgpu_size import MIB, size_text

log = logging.getLogger(__name__)

_SLAB = 1024 * MIB
_SMALLEST_SLAB = 16 * MIB
_HUGE_PAGE = 2 * MIB


@dataclass
class HostUse:
    """Bytes handed out, bytes pinned for them, and bytes that could not be pinned."""

    payload: int = 0
    pinned: int = 0
    pageable: int = 0


class HostMemory:
    """Allocates host memory for copies to and from a device.

    Args:
        device: The device that copies; the CPU needs no pinning.
        slab_bytes: Largest slab.

    Attributes:
        use: What has been handed out so far.
    """

    def __init__(self, device: torch.device, *, slab_bytes: int = _SLAB) -> None:
        self.use = HostUse()
        self._device, self._slab = device, slab_bytes
        self._warned = False
        self._registers = device.type in ("cuda", "cpu")

    def allocate(self, sizes: Sequence[int], *, alignment: int = 256) -> list[Tensor]:
        """Memory for several tensors; each stays alive as long as any tensor of its slab does.

        Where the system refuses to pin, smaller slabs are tried, and then the rest is ordinary memory, which copies
        slower: one warning names the request and the limits.

        Args:
            sizes: Bytes of each tensor.
            alignment: Of each tensor's first byte: 256, or 4096 for reads from disk.

        Returns:
            uint8 tensors of one dimension on the CPU, uninitialised.

        Raises:
            MemoryError: there is no such memory at all.
        """
        found: list[Tensor] = []
        limit = self._slab
        start = 0
        while start < len(sizes):
            room = limit if self._registers else _power_of_two(sizes[start:], alignment, limit)
            end = _next_slab(sizes, start, alignment, room)
            total = sum(padded(size, alignment) for size in sizes[start:end])
            slab, refused = self._pinned(total)
            if slab is None and limit > _SMALLEST_SLAB and end - start > 1:
                limit = max(min(limit, total) // 4, _SMALLEST_SLAB)
                continue
            if slab is None and total > available_memory():
                raise MemoryError(f"{size_text(total)} of HOST memory are not to be had. Limits: {describe_limits()}")
            if slab is None:
                self._warn(sum(padded(size, alignment) for size in sizes), sum(t.numel() for t in found), refused)
                slab = mapped_memory(total)
                self.use.pageable += total
            found += _cut(slab, sizes[start:end], alignment)
            start = end
        self.use.payload += sum(sizes)
        return found

    def _pinned(self, nbytes: int) -> tuple[Tensor | None, str]:
        """A pinned slab, or None and what the system said."""
        if not nbytes or self._device.type == "cpu":
            self.use.pinned += nbytes
            return mapped_memory(nbytes), ""
        if nbytes > available_memory():  # pinning takes the pages at once, and the system would end the process
            return None, "not as much is available"
        try:
            slab = registered_memory(nbytes, self._device) if self._registers else _vendors(nbytes)
        except (RuntimeError, MemoryError) as error:
            return None, str(error).strip().partition("\n")[0]
        self.use.pinned += slab.untyped_storage().nbytes()
        return slab[:nbytes], ""

    def _warn(self, wanted: int, pinned: int, refused: str) -> None:
        if not self._warned:
            log.warning(
                "HOST memory: the system pinned %s of %s (%s). The rest is pageable, and its copies are slower "
                "and hold up the host. Limits: %s. Raise the limit, or give less to the 'cpu' level",
                size_text(pinned),
                size_text(wanted),
                refused,
                describe_limits(),
            )
        self._warned = True


class _Mapping(mmap.mmap):
    """Anonymous memory that is unregistered before it is unmapped, which is when its last tensor goes."""

    registered: int = 0

    def __del__(self) -> None:
        if self.registered and not sys.is_finalizing():
            compat.unregister_host_memory(self.registered)


def _mapping(nbytes: int) -> _Mapping:
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    try:
        found = _Mapping(-1, nbytes, flags=private) if private else _Mapping(-1, nbytes)
    except OSError as error:
        raise MemoryError(f"{size_text(nbytes)} of HOST memory are not to be had: {error.strerror or error}") from error
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # only a wish: fewer pages to pin
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


def mapped_memory(nbytes: int) -> Tensor:
    """Pages of our own, pageable."""
    return torch.frombuffer(_mapping(nbytes), dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)


def registered_memory(nbytes: int, device: torch.device) -> Tensor:
    """Pages of our own, registered with the driver of CUDA or ROCm. Raises RuntimeError where it refuses."""
    mapping = _mapping(padded(nbytes, mmap.PAGESIZE))
    slab = torch.frombuffer(mapping, dtype=torch.uint8)
    slab.zero_()  # several threads take the pages; the driver alone takes them one by one, in more than twice the time
    refused = compat.register_host_memory(device, slab.data_ptr(), slab.numel())
    if refused:
        raise RuntimeError(refused)
    mapping.registered = slab.data_ptr()
    return slab


def _vendors(nbytes: int) -> Tensor:
    """PyTorch's allocator of the other vendors; what it would round up to is asked for, so that it shows."""
    return torch.empty(1 << (nbytes - 1).bit_length(), dtype=torch.uint8, pin_memory=True)


def _next_slab(sizes: Sequence[int], start: int, alignment: int, limit: int) -> int:
    """End of the longest stretch of tensors from ``start`` that fits in a slab; one tensor may be larger than that."""
    total, end = padded(sizes[start], alignment), start + 1
    while end < len(sizes) and total + padded(sizes[end], alignment) <= limit:
        total += padded(sizes[end], alignment)
        end += 1
    return end


def _power_of_two(sizes: Sequence[int], alignment: int, limit: int) -> int:
    """Size of the next slab where the allocator rounds up to powers of two: one that these tensors fill."""
    total, first = sum(padded(size, alignment) for size in sizes), padded(sizes[0], alignment)
    largest = 1 << (max(min(total, limit), 1).bit_length() - 1)
    return largest if first <= largest else 1 << (first - 1).bit_length()


def _cut(slab: Tensor, sizes: Sequence[int], alignment: int) -> list[Tensor]:
    found, offset = [], 0
    for size in sizes:
        found.append(slab[offset : offset + size])
        offset += padded(size, alignment)
    return found


def available_memory() -> int:
    """Bytes of main memory that this process may still take, its container's limit included."""
    from vbcompile.device import DeviceBackend

    return DeviceBackend("cpu").mem_get_info()[0]


def describe_limits() -> str:
    """What bounds host memory here, for messages: available memory, the container's limit, the limit on locking."""
    from vbcompile.device import DeviceBackend

    available, total = DeviceBackend("cpu").mem_get_info()
    return (
        f"{size_text(available)} available of {size_text(total)} (container included), locked memory (RLIMIT_MEMLOCK) "
        f"{_lockable()}"
    )


def _lockable() -> str:
    try:
        import resource
    except ImportError:
        return "not limited here"
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else size_text(soft)


__all__ = ["HostMemory", "HostUse", "describe_limits"]
