"""Where the bytes of a weight are while they are not on the device."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class HostBytes:
    """Bytes in host memory.

    Attributes:
        memory: uint8, one dimension, on the CPU. Pinned memory is copied beside the computation; pageable memory is
            copied as well, but slowly, and the host waits for it.
    """

    memory: Tensor

    def __post_init__(self) -> None:
        _require_bytes(self.memory, "cpu")

    @property
    def nbytes(self) -> int:
        return self.memory.numel()


@dataclass(frozen=True)
class PeerBytes:
    """Bytes in the memory of a neighbouring card.

    Attributes:
        memory: uint8, one dimension, on that card.
        master: The same bytes in host memory, which every store keeps up to date as well; None: there are none.
    """

    memory: Tensor
    master: Tensor | None = None

    def __post_init__(self) -> None:
        _require_bytes(self.memory, None)
        if self.master is not None:
            _require_bytes(self.master, "cpu")

    @property
    def nbytes(self) -> int:
        return self.memory.numel()


@dataclass(frozen=True)
class DiskBytes:
    """A stretch of a file.

    Attributes:
        file: The file; it must not change while this is in use.
        offset: First byte.
        nbytes: Length.
        identity: Size in bytes and modification time in ns of the file when this was made; a read from a file that has
            others is refused.
        checksums: CRC-32 of each piece of ``checksum_bytes`` (the last one may be shorter), verified at the first read.
            Empty: the file has none.
        checksum_bytes: Length of a piece.
    """

    file: Path
    offset: int
    nbytes: int
    identity: tuple[int, int]
    checksums: tuple[int, ...] = ()
    checksum_bytes: int = 0


Source = HostBytes | PeerBytes | DiskBytes


def _require_bytes(memory: Tensor, device: str | None) -> None:
    import torch

    if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
        raise ValueError(f"expected contiguous uint8 of one dimension, not {memory.dtype} of {tuple(memory.shape)}")
    if device is not None and memory.device.type != device:
        raise ValueError(f"expected memory on {device}, not on {memory.device}")
