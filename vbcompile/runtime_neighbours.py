"""Weights that wait in the memory of a neighbouring card, from where they arrive faster than from the host."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vbcompile.runtime_sources import HostBytes, PeerBytes, Source
from vbcompile.vgpu_plan import DEVICE, Plan, padded
from vbcompile.vgpu_size import size_text

log = logging.getLogger(__name__)

_ELSEWHERE = ("cpu", "ssd")


def copy_to_neighbours(
    plan: Plan, sources: Sequence[Source], allocate: Callable[[str, int], Tensor] | None = None
) -> list[Source]:
    """Copies on their card of the weights that the plan wants on one; the host keeps the masters.

    A card that has not the memory leaves its weights with the host, with one warning: the step is slower, not wrong.

    Args:
        sources: Where the bytes of each weight of the plan are now.
        allocate: ``(device name, bytes)`` -> uint8 on it; None: PyTorch's allocator.

    Returns:
        The same sources, but :class:`PeerBytes` for each such weight that is in host memory.
    """
    found = list(sources)
    for tier in plan.tiers:
        chosen = [
            (index, source.memory)
            for index, (level, source) in enumerate(zip(plan.levels, sources, strict=True))
            if level == tier.level != DEVICE and tier.name not in _ELSEWHERE and isinstance(source, HostBytes)
        ]
        total = sum(padded(memory.numel(), plan.alignment) for _, memory in chosen)
        arena = _arena(tier.name, total, allocate or _on_card) if chosen else None
        if arena is not None:
            for index, part in _filled(arena, chosen, plan.alignment):
                found[index] = part
    return found


def _arena(name: str, nbytes: int, allocate: Callable[[str, int], Tensor]) -> Tensor | None:
    try:
        with torch.inference_mode(False):
            return allocate(name, nbytes)
    except torch.OutOfMemoryError as error:
        log.warning(
            "%s has not the %s that the plan wants to keep there (%s): these weights stay in host memory, and "
            "their copies are slower. Give %s less in max_memory",
            name,
            size_text(nbytes),
            str(error).partition("\n")[0],
            name,
        )
        return None


def _on_card(name: str, nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=name)


def _filled(arena: Tensor, chosen: Sequence[tuple[int, Tensor]], alignment: int) -> list[tuple[int, PeerBytes]]:
    parts, offset = [], 0
    for index, master in chosen:
        part = arena[offset : offset + master.numel()]
        part.copy_(master)
        parts.append((index, PeerBytes(part, master)))
        offset += padded(master.numel(), alignment)
    return parts
