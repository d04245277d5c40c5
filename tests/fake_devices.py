"""Stand-ins for vendors' modules: several cards each, with the functions (and the gaps) of the real ones."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from vbcompile.device import GIB, forget_devices
from vbcompile.device_vendors import Platform

PROPERTIES: dict[str, dict[str, Any]] = {
    "nvidia": {"name": "NVIDIA H100", "major": 9, "minor": 0, "total_memory": 80 * GIB, "multi_processor_count": 132},
    "amd": {
        "name": "AMD Instinct MI300X",
        "major": 9,
        "minor": 4,
        "gcnArchName": "gfx942:sramecc+:xnack-",
        "total_memory": 192 * GIB,
        "multi_processor_count": 304,
    },
    "habana": {"name": "GAUDI2"},
    "huawei": {"name": "Ascend910B1", "total_memory": 64 * GIB, "cube_core_num": 24},
    "intel": {
        "name": "Intel(R) Arc(TM) B580 Graphics",
        "total_memory": 12 * GIB,
        "gpu_subslice_count": 20,
        "max_compute_units": 160,
        "has_fp64": 1,
        "driver_version": "1.6.33578",
    },
}
KIND = {"nvidia": "cuda", "amd": "cuda", "habana": "hpu", "huawei": "npu", "intel": "xpu"}


@dataclass
class FakeCards:
    """What happened on the cards of one vendor."""

    vendor: str
    count: int = 2
    allocated: dict[int, int] = field(default_factory=dict)
    current: int = 0
    seeds: list[int] = field(default_factory=list)
    cleaned: int = 0
    waited: list[int] = field(default_factory=list)

    def functions(self) -> dict[str, Any]:
        properties = SimpleNamespace(**PROPERTIES[self.vendor])
        size = 96 * GIB if self.vendor == "habana" else properties.total_memory
        functions = {
            "is_available": lambda: self.count > 0,
            "device_count": lambda: self.count,
            "current_device": lambda: self.current,
            "get_device_name": lambda index: properties.name,
            "get_device_properties": lambda index: properties,
            "memory_allocated": lambda index: self.allocated.get(index, 0),
            "memory_reserved": lambda index: 2 * self.allocated.get(index, 0),
            "max_memory_allocated": lambda index: 3 * self.allocated.get(index, 0),
            "mem_get_info": lambda index: (size - self.allocated.get(index, 0), size),
            "manual_seed_all": self.seeds.append,
            "empty_cache": self._clean,
            "synchronize": self.waited.append,
            "init": lambda: None,
        }
        if self.vendor == "habana":  # as in its 1.19 release: no such function, and the card's size as reserve
            del functions["empty_cache"]
            functions["memory_reserved"] = lambda index: size
        return functions

    def _clean(self) -> None:
        self.cleaned += 1


def make_bare(monkeypatch, seen: tuple[str, ...] = ()) -> None:
    """Turn this machine into one without accelerators or vendors' packages; ``seen`` are cards without a driver."""
    for build in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, build, None, raising=False)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: False)
        monkeypatch.setattr(module, "device_count", lambda: 0)
    for name in ("hpu", "npu"):
        monkeypatch.delattr(torch, name, raising=False)
    monkeypatch.setattr(Platform, "card_seen", lambda self: self.vendor in seen)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    forget_devices()


def plug_in(monkeypatch, vendor: str, count: int = 2) -> FakeCards:
    """Add cards of a vendor to a bare machine; ``npu`` has no ``torch.device`` until PyTorch knows that name."""
    cards = FakeCards(vendor, count)
    kind = KIND[vendor]
    if kind in ("cuda", "xpu"):
        build = {"nvidia": "cuda", "amd": "hip", "intel": "xpu"}[vendor]
        monkeypatch.setattr(torch.version, build, "13.0")
        for name, function in cards.functions().items():
            monkeypatch.setattr(getattr(torch, kind), name, function, raising=False)
    else:
        monkeypatch.setattr(torch, kind, SimpleNamespace(**cards.functions()), raising=False)
    forget_devices()
    return cards
