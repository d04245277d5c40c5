"""What a device can do, as plain data: kernels are chosen by it, and tests build it by hand."""

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vbcompile.device_backend import DeviceBackend, get_device_manager
from vbcompile.device_vendors import PLATFORMS

FEATURES = {
    "triton": "Triton is installed with a compiler for this vendor",
    "bf16": "bfloat16 matrix products in hardware",
    "fp8": "8-bit floating-point matrix products in hardware",
    "fp4": "4-bit floating-point (E2M1, block-scaled) matrix products in hardware",
    "tma": "NVIDIA's tensor memory accelerator (sm_90 and later)",
    "fp64": "double precision in hardware",
    "avx2": "x86 vectors of 256 bits",
    "avx512": "x86 vectors of 512 bits",
    "amx": "x86 matrix tiles",
    "neon": "Arm vectors of 128 bits",
    "sve": "Arm scalable vectors",
}
"""Every name that :attr:`Target.features` may hold, with its meaning."""

_TRITON_COMPILERS = {"nvidia": "nvidia", "amd": "amd", "intel": "intel", "huawei": "ascend"}

_INTEL_ARCHITECTURES = (  # product names as Level Zero gives them; first match wins
    (r"Data Center GPU Max", "pvc"),
    (r"Data Center GPU Flex|Arc\(TM\) A\d|Arc\(TM\) Pro A\d", "acm"),
    (r"Arc\(TM\) B\d|Arc\(TM\) Pro B\d", "bmg"),
    (r"Arc\(TM\) 1[34]0V", "lnl"),
)

_AMD_FEATURES = (  # matrix-core formats by architecture, from AMD's instruction set manuals
    (r"gfx950|gfx125.", {"bf16", "fp8", "fp4"}),
    (r"gfx94.|gfx12..", {"bf16", "fp8"}),
    (r"gfx90[8a]|gfx11..", {"bf16"}),
)


@dataclass(frozen=True)
class Target:
    """One device, described well enough to choose kernels for it.

    Attributes:
        vendor: ``nvidia``, ``amd``, ``intel``, ``habana``, ``huawei`` or ``cpu``.
        device_type: PyTorch's device string: ``cuda`` (NVIDIA and AMD), ``xpu``, ``hpu``, ``npu``, ``cpu``.
        arch: ``sm_90``, ``gfx942``, ``pvc``, ``gaudi2``, ``Ascend910B1``, ``cpu``.
        name: Product name.
        multiprocessors: Streaming multiprocessors, compute units or cores; None if not known.
        memory: Bytes of device memory; None if not known.
        features: Names from :data:`FEATURES`.

    Raises:
        ValueError: a vendor, device type or feature that does not exist, or a pair that does not belong together.
    """

    vendor: str
    device_type: str
    arch: str
    name: str = ""
    multiprocessors: int | None = None
    memory: int | None = None
    features: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        pairs = {row.vendor: row.device_type for row in PLATFORMS}
        if pairs.get(self.vendor) != self.device_type:
            valid = ", ".join(f"{vendor}/{kind}" for vendor, kind in pairs.items())
            raise ValueError(f"no target {self.vendor}/{self.device_type}; valid vendor/device_type: {valid}")
        unknown = set(self.features) - FEATURES.keys()
        if unknown:
            raise ValueError(f"unknown features {sorted(unknown)}; valid: {', '.join(FEATURES)}")
        object.__setattr__(self, "features", frozenset(self.features))

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """NVIDIA's (major, minor), or None for other vendors: ``sm_90`` is (9, 0), ``sm_120`` is (12, 0)."""
        found = re.fullmatch(r"sm_(\d+)(\d)[af]?", self.arch)
        return (int(found.group(1)), int(found.group(2))) if found else None


def get_target(device: str | torch.device | None = None) -> Target:
    """Describe a device; each is asked once.

    Args:
        device: The device; without an index, the card that PyTorch would use now. None: the best device here.

    Raises:
        DeviceError: unknown device, or one that cannot be used, with the repair.
    """
    if isinstance(device, torch.device) and (device.index is not None or device.type == "cpu"):
        return _read_target(device.type, device.index or 0)  # the short way: kernels ask at every call
    backend = get_device_manager().get_backend(device)
    index = backend.device.index
    return _read_target(backend.device_type, backend.current_index() if index is None else index)


def forget_targets() -> None:
    """Drop the descriptions kept by :func:`get_target`."""
    _read_target.cache_clear()


@functools.cache
def _read_target(device_type: str, index: int) -> Target:
    backend = DeviceBackend(f"{device_type}:{index}")
    properties, name = backend.get_device_properties(), backend.get_device_name()
    arch = _architecture(backend.vendor, name, properties)
    return Target(
        vendor=backend.vendor,
        device_type=device_type,
        arch=arch,
        name=name,
        multiprocessors=_multiprocessors(properties),
        memory=backend.total_memory(),
        features=features_of(backend.vendor, arch, properties) | _triton_feature(backend.vendor),
    )


def _architecture(vendor: str, name: str, properties: Any) -> str:
    match vendor:
        case "nvidia":
            return f"sm_{properties.major}{properties.minor}"
        case "amd":
            return properties.gcnArchName.partition(":")[0]  # gfx942:sramecc+:xnack-
        case "intel":
            return next((arch for pattern, arch in _INTEL_ARCHITECTURES if re.search(pattern, name)), "xe")
        case "habana":
            return name.lower()
        case "huawei":
            return name
    return "cpu"


def _multiprocessors(properties: Any) -> int | None:
    for attribute in ("multi_processor_count", "gpu_subslice_count", "max_compute_units", "cube_core_num"):
        count = getattr(properties, attribute, None)
        if count:
            return int(count)
    return None


def features_of(vendor: str, arch: str, properties: Any) -> frozenset[str]:
    match vendor:
        case "nvidia":
            capability = (properties.major, properties.minor)
            since = {"bf16": (8, 0), "fp8": (8, 9), "tma": (9, 0), "fp4": (10, 0), "fp64": (0, 0)}
            found = {feature for feature, first in since.items() if capability >= first}
        case "amd":
            found = next((set(names) for pattern, names in _AMD_FEATURES if re.fullmatch(pattern, arch)), set())
            found.add("fp64")
        case "intel":
            found = {"bf16"} | ({"fp64"} if getattr(properties, "has_fp64", False) else set())
        case "habana":
            found = {"bf16"} | (set() if arch == "gaudi" else {"fp8"})
        case "huawei":
            found = {"bf16", "fp8", "fp4"} if arch.startswith("Ascend950") else _ascend_bf16(arch)
        case _:
            found = _cpu_features()
    return frozenset(found)


def _ascend_bf16(arch: str) -> set[str]:
    return {"bf16"} if re.match(r"Ascend910(B|_9)", arch) else set()


def _cpu_features() -> set[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = {"AVX2": {"avx2"}, "AVX512": {"avx2", "avx512"}, "NEON": {"neon"}}.get(capability, set())
    if capability.startswith("SVE"):
        vectors = {"neon", "sve"}
    amx = {"amx", "bf16"} if _cpu_says("_is_amx_tile_supported") else set()
    return vectors | {"fp64"} | amx | ({"bf16"} if _cpu_says("_is_avx512_bf16_supported") else set())


def _cpu_says(question: str) -> bool:
    """One of PyTorch's private questions about the processor; no where this release does not have it."""
    ask = getattr(torch.cpu, question, None)
    return bool(ask()) if ask is not None else False


def _triton_feature(vendor: str) -> frozenset[str]:
    """Look for the compiler's folder: importing Triton would cost more than the whole description."""
    compiler, spec = _TRITON_COMPILERS.get(vendor), importlib.util.find_spec("triton")
    if compiler is None or spec is None or not spec.submodule_search_locations:
        return frozenset()
    present = any((Path(place) / "backends" / compiler).is_dir() for place in spec.submodule_search_locations)
    return frozenset({"triton"}) if present else frozenset()
