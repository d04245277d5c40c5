"""Answers to two common failures: a model on the wrong device, and a device out of memory."""

from collections import Counter

import torch

from vbcompile.device import DeviceBackend, DeviceError, get_unified_backend
from vbcompile.vgpu_size import size_text

_MANY = 0.25  # share of the reserved memory that must lie idle before fragmentation is worth a word


def check_model_device(model: torch.nn.Module, device: str | torch.device) -> list[str]:
    """Say which parameters and buffers of a model are not on the device, and how to move them.

    Args:
        model: Any module.
        device: Where it should be; without an index, any card of that type will do.

    Returns:
        One sentence per wrong place, with the fix; empty if all is well.

    Raises:
        DeviceError: unknown or unusable device.
    """
    wanted = get_unified_backend(device).device
    tensors = [*model.named_parameters(), *model.named_buffers()]
    wrong = [(name, tensor.device) for name, tensor in tensors if not _is_on(tensor.device, wanted)]
    answers = []
    for place, count in Counter(place for _, place in wrong).items():
        first = next(name for name, at in wrong if at == place)
        fix = "load its weights first" if place.type == "meta" else f"call model.to('{wanted}')"
        answers.append(f"{count} of {len(tensors)} tensors are on {place}, not {wanted} (first: {first}): {fix}")
    return answers


def out_of_memory_advice(device: str | torch.device | None = None) -> list[str]:
    """What to do about a device that is out of memory, with the figures of now.

    Args:
        device: The device; None: the best one.

    Returns:
        Sentences, the first with the memory in use, then advice in the order in which to try it.

    Raises:
        DeviceError: unknown or unusable device.
    """
    backend = get_unified_backend(device)
    advice = [_memory_sentence(backend)]
    idle = backend.memory_reserved() - backend.memory_allocated()
    if idle > _MANY * max(backend.memory_reserved(), 1):
        advice.append(f"{size_text(idle)} are reserved and not in use: call vbcompile.memory_cleanup()")
        if backend.device_type == "cuda":
            advice.append("if it comes back, set PYTORCH_ALLOC_CONF=expandable_segments:True against fragmentation")
    advice.append("turn memory mode on: vbcompile.enable_memory_mode() or VB_MODE=memory")
    advice.append("use a smaller batch or shorter sequences")
    return advice


def _memory_sentence(backend: DeviceBackend) -> str:
    holder = "taken by this process" if backend.device_type == "cpu" else "in tensors"
    used = f"{size_text(backend.memory_allocated())} {holder}"
    try:
        free, total = backend.mem_get_info()
    except DeviceError:
        return f"{backend.device}: {used}; the driver does not tell what is free"
    return f"{backend.device}: {used}, {size_text(free)} of {size_text(total)} free"


def _is_on(place: torch.device, wanted: torch.device) -> bool:
    return place.type == wanted.type and wanted.index in (None, place.index)
