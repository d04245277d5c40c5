"""Devices that are not here, by architecture: which kernel would run there (``doctor --device``, ``explain --as``)."""

import difflib
from types import SimpleNamespace

from vbcompile.device_target import Target, features_of
from vbcompile.device_vendors import DeviceError
from vbcompile.vgpu_size import GIB

_ASSUMED_TRITON = {"nvidia", "amd", "intel"}  # vendors whose PyTorch comes with Triton

# architecture: vendor, device type, a typical product, its processors, its memory in GiB (vendors' data sheets)
ARCHITECTURES = {
    "sm_80": ("nvidia", "cuda", "NVIDIA A100", 108, 80),
    "sm_86": ("nvidia", "cuda", "NVIDIA GeForce RTX 3090", 82, 24),
    "sm_89": ("nvidia", "cuda", "NVIDIA GeForce RTX 4090", 128, 24),
    "sm_90": ("nvidia", "cuda", "NVIDIA H100", 132, 80),
    "sm_100": ("nvidia", "cuda", "NVIDIA B200", 148, 180),
    "sm_120": ("nvidia", "cuda", "NVIDIA GeForce RTX 5090", 170, 32),
    "gfx90a": ("amd", "cuda", "AMD Instinct MI250X", 110, 64),
    "gfx942": ("amd", "cuda", "AMD Instinct MI300X", 304, 192),
    "gfx950": ("amd", "cuda", "AMD Instinct MI355X", 256, 288),
    "gfx1100": ("amd", "cuda", "AMD Radeon RX 7900 XTX", 96, 24),
    "pvc": ("intel", "xpu", "Intel Data Center GPU Max 1550", 64, 64),
    "bmg": ("intel", "xpu", "Intel Arc B580", 20, 12),
    "gaudi2": ("habana", "hpu", "Intel Gaudi 2", 24, 96),
    "gaudi3": ("habana", "hpu", "Intel Gaudi 3", 64, 128),
    "Ascend910B1": ("huawei", "npu", "Ascend910B1", 24, 64),
    "Ascend910_9391": ("huawei", "npu", "Ascend910_9391", 24, 64),
    "Ascend950PR_9589": ("huawei", "npu", "Ascend950PR_9589", 32, 128),
    "cpu": ("cpu", "cpu", "CPU", 16, 64),
}


def catalog_target(arch: str) -> Target:
    """A typical device of an architecture, with the vendor's compiler assumed to be installed.

    Args:
        arch: ``sm_90``, ``gfx942``, ``pvc``, ``gaudi2``, ``Ascend910B1``, ``cpu``, ...; case does not matter.

    Raises:
        DeviceError: unknown name; the message lists the known ones.
    """
    names = {name.lower(): name for name in ARCHITECTURES}
    name = names.get(arch.lower())
    if name is None:
        near = difflib.get_close_matches(arch.lower(), names, 1)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise DeviceError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}{hint}")
    vendor, device_type, product, processors, memory = ARCHITECTURES[name]
    features = features_of(vendor, name, _properties(name, vendor))
    if vendor in _ASSUMED_TRITON:
        features |= {"triton"}
    return Target(vendor, device_type, name, product, processors, memory * GIB, features)


def _properties(arch: str, vendor: str) -> SimpleNamespace:
    """The card's properties as far as features are read from them."""
    if vendor == "nvidia":
        return SimpleNamespace(major=int(arch[3:-1]), minor=int(arch[-1]))
    return SimpleNamespace(has_fp64=arch == "pvc")
