"""Devices under one set of calls: which are here, which to use, their memory, seeds.

``get_device()`` chooses in the order CUDA (NVIDIA or AMD) > Gaudi > Ascend > Intel GPU > CPU. PyTorch's device strings
are ``cuda``, ``hpu``, ``npu``, ``xpu``, ``cpu``. A device that was asked for by name and cannot be used raises
:class:`DeviceError`, which names the package to install or the repair; a preference that cannot be met is logged.
"""

import operator
import random
from typing import Any

import numpy
import torch

from vbcompile import device_backend, device_target, device_vendors
from vbcompile.device_backend import (
    DeviceBackend,
    DeviceChoice,
    UnifiedDeviceManager,
    get_device_manager,
    parse_device,
    valid_devices,
)
from vbcompile.device_host import HostModule
from vbcompile.device_target import FEATURES, Target, get_target
from vbcompile.device_vendors import PRIORITY, DeviceError, package_version, probe
from vbcompile.vgpu_size import GIB

__all__ = [
    "FEATURES",
    "GIB",
    "PRIORITY",
    "DeviceBackend",
    "DeviceChoice",
    "DeviceError",
    "Target",
    "UnifiedDeviceManager",
    "forget_devices",
    "get_accelerator_type",
    "get_device",
    "get_device_info",
    "get_device_manager",
    "get_memory_info",
    "get_target",
    "get_unified_backend",
    "is_cuda_available",
    "is_hpu_available",
    "is_npu_available",
    "is_xpu_available",
    "memory_cleanup",
    "parse_device",
    "set_seed",
    "valid_devices",
]


def get_device(
    force_cpu: bool = False,
    prefer_hpu: bool = False,
    prefer_npu: bool = False,
    prefer_xpu: bool = False,
) -> torch.device:
    """The best usable device: CUDA (NVIDIA or AMD) > Gaudi > Ascend > Intel GPU > CPU.

    Args:
        force_cpu: The CPU, whatever else is asked for.
        prefer_hpu: Gaudi first. Likewise ``prefer_npu`` (Ascend) and ``prefer_xpu`` (Intel GPU). A preference that
            cannot be met is logged as a warning with its reason and kept in ``get_device_manager().last_choice``;
            then the order above decides.

    Returns:
        A device without an index, so that ``torch.cuda.set_device`` and its like decide which card it means.
    """
    return get_device_manager().get_best_device(
        prefer_npu=prefer_npu, prefer_hpu=prefer_hpu, prefer_xpu=prefer_xpu, force_cpu=force_cpu
    )


def get_accelerator_type() -> str:
    """Device type of the best usable device: ``cuda``, ``hpu``, ``npu``, ``xpu`` or ``cpu``.

    AMD cards are ``cuda``, as in PyTorch; ``get_target().vendor`` or ``get_device_info()["vendor"]`` tells them apart.
    """
    return get_device_manager().choose().device.type


def is_cuda_available() -> bool:
    """Whether PyTorch's ``cuda`` device can be used: an NVIDIA card, or an AMD card under ROCm."""
    return probe("cuda").ready


def is_hpu_available() -> bool:
    """Whether an Intel Gaudi card can be used."""
    return probe("hpu").ready


def is_npu_available() -> bool:
    """Whether a Huawei Ascend card can be used."""
    return probe("npu").ready


def is_xpu_available() -> bool:
    """Whether an Intel GPU can be used."""
    return probe("xpu").ready


def get_unified_backend(device: str | torch.device | None = None) -> DeviceBackend:
    """The backend of a device; None: of the best usable device.

    Raises:
        DeviceError: unknown device (the valid ones are listed), or one that cannot be used here (with the repair).
    """
    return get_device_manager().get_backend(device)


def get_device_info() -> dict[str, Any]:
    """What is here, for people and logs.

    Returns:
        ``cuda_available``, ``hpu_available``, ``npu_available``, ``xpu_available``: usable now. ``cuda_available`` is
        true for AMD cards too, as in PyTorch.
        ``device_type``, ``vendor``, ``device_name``, ``device_count``: of the best usable device; the CPU counts 1.
        ``cuda_version``, ``rocm_version``, ``xpu_version``: what PyTorch was built with; ``hpu_version``,
        ``npu_version``: the vendor's package. None where absent.
    """
    backend = get_unified_backend()
    return {f"{kind}_available": probe(kind).ready for kind in PRIORITY if kind != "cpu"} | {
        "device_type": backend.device_type,
        "vendor": backend.vendor,
        "device_name": backend.get_device_name(),
        "device_count": backend.device_count(),
        "cuda_version": torch.version.cuda,
        "rocm_version": torch.version.hip,
        "xpu_version": getattr(torch.version, "xpu", None),
        "hpu_version": package_version("hpu"),
        "npu_version": package_version("npu"),
    }


def get_memory_info() -> dict[str, Any]:
    """Memory in use, in gb of 2**30 bytes.

    Returns:
        ``ram``: ``{"total_gb", "available_gb", "used_gb", "percent"}`` of main memory, within the container's limit.
        ``vram`` (keys ``cuda_0``, ...), ``hpu_memory`` (``hpu_0``, ...), ``npu_memory``, ``xpu_memory``: for each card
        ``{"allocated_gb", "reserved_gb", "max_allocated_gb"}`` of this process. Empty where there is no such card. A
        figure that the vendor does not tell is None.
    """
    available, total = HostModule().mem_get_info()
    used = total - available
    ram = {"total_gb": total / GIB, "available_gb": available / GIB, "used_gb": used / GIB}
    ram["percent"] = 100.0 * used / total
    return {
        "ram": ram,
        "vram": _memory_of_cards("cuda"),
        "hpu_memory": _memory_of_cards("hpu"),
        "npu_memory": _memory_of_cards("npu"),
        "xpu_memory": _memory_of_cards("xpu"),
    }


def memory_cleanup() -> None:
    """Collect garbage and give unused device memory back, on every device that is present."""
    get_device_manager().cleanup_all()


def set_seed(seed: int) -> None:
    """Seed Python's ``random``, NumPy and PyTorch on every device that is present, the CPU included.

    Args:
        seed: 0 <= seed < 2**32, the range that NumPy accepts.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    seed = operator.index(seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is out of range; valid: 0 <= seed < 2**32")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    for kind in PRIORITY:  # torch.manual_seed leaves out Gaudi
        if probe(kind).ready:
            probe(kind).module.manual_seed_all(seed)


def forget_devices() -> None:
    """Drop everything known about devices, so that the next call probes again (after a driver was repaired)."""
    device_vendors.forget_devices()
    device_target.forget_targets()
    device_backend.get_device_manager.cache_clear()


def _memory_of_cards(kind: str) -> dict[str, dict[str, float | None]]:
    backend = DeviceBackend(kind)
    return {f"{kind}_{index}": backend.memory_use(index) for index in range(backend.device_count())}
