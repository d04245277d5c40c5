"""Targets: read from cards, built by hand, checked."""

import dataclasses

import pytest
import torch
from fake_devices import PROPERTIES, plug_in

from vbcompile.device import FEATURES, GIB, DeviceError, Target, forget_devices, get_target

pytestmark = pytest.mark.usefixtures("bare_machine")


@pytest.mark.parametrize(
    ("vendor", "device", "arch", "memory", "processors"),
    [
        ("nvidia", "cuda:1", "sm_90", 80, 132),
        ("amd", "cuda:1", "gfx942", 192, 304),
        ("habana", "hpu:1", "gaudi2", 96, None),
        ("huawei", "npu:1", "Ascend910B1", 64, 24),
        ("intel", "xpu:1", "bmg", 12, 20),
    ],
)
def test_a_card_is_described(monkeypatch, vendor, device, arch, memory, processors):
    plug_in(monkeypatch, vendor)
    if device.startswith("npu"):  # PyTorch has no such device here: ask below the string
        target = _read(device)
    else:
        target = get_target(device)
    assert (target.vendor, target.arch, target.memory, target.multiprocessors) == (
        vendor,
        arch,
        memory * GIB,
        processors,
    )
    assert target.device_type == device.partition(":")[0]
    assert target.name == PROPERTIES[vendor]["name"]
    assert target.features <= FEATURES.keys() and "bf16" in target.features


def _read(device: str) -> Target:
    from vbcompile import device_target

    kind, _, index = device.partition(":")
    return device_target._read_target(kind, int(index))


@pytest.mark.parametrize(
    ("capability", "arch", "has", "lacks"),
    [
        ((7, 5), "sm_75", {"fp64"}, {"bf16", "fp8", "fp4", "tma"}),
        ((8, 0), "sm_80", {"bf16"}, {"fp8", "fp4", "tma"}),
        ((8, 9), "sm_89", {"bf16", "fp8"}, {"fp4", "tma"}),
        ((9, 0), "sm_90", {"bf16", "fp8", "tma"}, {"fp4"}),
        ((10, 0), "sm_100", {"fp4", "tma"}, set()),
        ((12, 0), "sm_120", {"fp4", "tma"}, set()),
    ],
)
def test_nvidia_generations(monkeypatch, capability, arch, has, lacks):
    major, minor = capability
    monkeypatch.setitem(PROPERTIES, "nvidia", {**PROPERTIES["nvidia"], "major": major, "minor": minor})
    plug_in(monkeypatch, "nvidia")
    target = get_target("cuda:0")
    assert target.arch == arch and target.compute_capability == capability
    assert has <= target.features and not lacks & target.features


@pytest.mark.parametrize(
    ("vendor", "change", "arch", "has", "lacks"),
    [
        ("amd", {"gcnArchName": "gfx950:sramecc+"}, "gfx950", {"fp4", "fp8"}, {"tma"}),
        ("amd", {}, "gfx942", {"fp8", "bf16"}, {"fp4"}),
        ("amd", {"gcnArchName": "gfx1100"}, "gfx1100", {"bf16"}, {"fp8", "fp4"}),
        ("amd", {"gcnArchName": "gfx906"}, "gfx906", {"fp64"}, {"bf16"}),
        ("habana", {"name": "GAUDI"}, "gaudi", {"bf16"}, {"fp8"}),
        ("habana", {"name": "GAUDI3"}, "gaudi3", {"bf16", "fp8"}, {"fp4"}),
        ("intel", {"name": "Intel(R) Data Center GPU Max 1550"}, "pvc", {"fp64"}, {"fp4"}),
        ("intel", {"name": "Intel(R) Arc(TM) A770 Graphics", "has_fp64": 0}, "acm", {"bf16"}, {"fp64"}),
        ("intel", {"name": "Intel(R) Something New"}, "xe", {"bf16"}, {"fp4"}),
    ],
)
def test_other_generations(monkeypatch, vendor, change, arch, has, lacks):
    monkeypatch.setitem(PROPERTIES, vendor, PROPERTIES[vendor] | change)
    plug_in(monkeypatch, vendor)
    target = get_target()
    assert target.arch == arch
    assert has <= target.features and not lacks & target.features


@pytest.mark.parametrize(
    ("name", "has"),
    [("Ascend950PR_9589", {"bf16", "fp8", "fp4"}), ("Ascend910_9391", {"bf16"}), ("Ascend310P3", set())],
)
def test_ascend_generations(monkeypatch, name, has):
    monkeypatch.setitem(PROPERTIES, "huawei", PROPERTIES["huawei"] | {"name": name})
    plug_in(monkeypatch, "huawei")
    target = _read("npu:0")
    assert target.arch == name and target.features - {"triton"} == has


def test_the_cpu_has_the_features_that_torch_reports():
    target = get_target()
    assert (target.vendor, target.device_type, target.arch) == ("cpu", "cpu", "cpu")
    assert ("avx512" in target.features) == (torch.backends.cpu.get_cpu_capability() == "AVX512")
    assert "triton" not in target.features and target.compute_capability is None


def test_triton_is_a_feature_only_with_a_compiler_for_the_vendor(monkeypatch):
    plug_in(monkeypatch, "nvidia")
    plug_in(monkeypatch, "habana")
    pytest.importorskip("triton")
    assert "triton" in get_target("cuda").features
    assert "triton" not in get_target("hpu").features
    forget_devices()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton" not in get_target("cuda").features


def test_without_an_index_the_current_card_is_meant(monkeypatch):
    cards = plug_in(monkeypatch, "nvidia")
    cards.current = 1
    assert get_target("cuda") is get_target(torch.device("cuda:1"))
    assert get_target("cuda") is not get_target("cuda:0")


@pytest.mark.parametrize(
    "device", ["cuda", torch.device("cuda:0"), torch.device("meta"), "npu", torch.device("cpu", 3), "x"]
)
def test_a_device_that_cannot_be_used_is_refused(device):
    with pytest.raises(DeviceError):
        get_target(device)


def test_targets_are_built_by_hand():
    target = Target("amd", "cuda", "gfx950", features={"triton", "fp4"})
    assert target.features == frozenset({"triton", "fp4"})
    assert target == Target("amd", "cuda", "gfx950", features=frozenset({"fp4", "triton"}))
    assert len({target, Target("amd", "cuda", "gfx950", features={"fp4", "triton"})}) == 1
    assert target.compute_capability is None
    assert Target("nvidia", "cuda", "sm_100a").compute_capability == (10, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.arch = "gfx942"


@pytest.mark.parametrize(
    ("vendor", "kind", "features", "message"),
    [
        ("amd", "hip", (), "amd/cuda"),
        ("apple", "mps", (), "nvidia/cuda"),
        ("nvidia", "cuda", ("tritom",), "tritom"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(vendor, kind, features, message):
    with pytest.raises(ValueError, match=message):
        Target(vendor, kind, "x", features=frozenset(features))
