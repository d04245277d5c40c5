"""Vendors' packages that are missing, broken or belong to another PyTorch: each gets its reason and its repair."""

import sys
from types import SimpleNamespace

import pytest
import torch
from fake_devices import make_bare, plug_in

import vbcompile as vb
from vbcompile import device_vendors
from vbcompile.device import DeviceError, forget_devices
from vbcompile.device_vendors import PLATFORMS, PRIORITY, Platform, pair_problem, platform_of, probe

MINOR = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    make_bare(monkeypatch)
    yield
    forget_devices()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch_npu", "habana_frameworks")]:
        del sys.modules[name]
    for kind in ("hpu", "npu"):
        if hasattr(torch, kind):
            delattr(torch, kind)


def _write_package(monkeypatch, folder, module: str, source: str, requires: str = "", version: str = "9.9.0") -> None:
    """Put a package on the import path; ``requires`` also gives it metadata with that requirement."""
    path = folder.joinpath(*module.split("."))
    path.mkdir(parents=True)
    (path / "__init__.py").write_text(source)
    if requires:
        info = folder / f"torch_npu-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {version}\nRequires-Dist: {requires}\n"
        )
    monkeypatch.syspath_prepend(str(folder))
    forget_devices()


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("npu", f"pip install 'torch-npu=={MINOR}.*'"),
        ("hpu", "habana-torch-plugin"),
        ("xpu", "whl/xpu"),
        ("cuda", "cu130"),
    ],
)
def test_a_missing_vendor_names_what_to_install(kind, package):
    assert probe(kind).state == "missing"
    with pytest.raises(DeviceError) as caught:
        vb.get_unified_backend(kind)
    assert package in str(caught.value) and "Fix: " in str(caught.value)


def test_a_package_without_its_libraries_is_broken_not_fatal(monkeypatch, tmp_path, caplog):
    source = "raise ImportError('libhccl.so: cannot open shared object file')"
    _write_package(monkeypatch, tmp_path, "torch_npu", source, f"torch=={MINOR}.*", f"{MINOR}.0")
    found = probe("npu")
    assert found.state == "broken" and not vb.is_npu_available()
    failure = "importing torch_npu failed with ImportError: libhccl.so: cannot open shared object file"
    assert found.reason == f"torch-npu {MINOR}.0 is installed, and {failure}"
    assert "CANN" in found.fix and f"{MINOR}.*" in found.fix
    assert vb.get_device().type == "cpu"  # nobody asked for it, but the package is there
    (message,) = caplog.messages
    assert message.startswith(f"passing over npu: {found.reason}. Fix: ") and message.endswith("Instead cpu is used")
    with pytest.raises(DeviceError, match=r"libhccl.*Devices that can be used: cpu"):
        vb.get_unified_backend("npu:0")


@pytest.mark.parametrize("error", ["AttributeError('exit')", "OSError('x')", "KeyError()"])
def test_any_failure_at_import_is_contained(monkeypatch, tmp_path, error):
    _write_package(monkeypatch, tmp_path, "habana_frameworks.torch", f"raise {error}")
    assert probe("hpu").state == "broken"
    assert error.partition("(")[0] in probe("hpu").reason


def test_a_package_for_another_torch_is_named_as_such(monkeypatch, tmp_path):
    _write_package(monkeypatch, tmp_path, "torch_npu", "raise RuntimeError('wrong')", "torch (==1.13.0)")
    reason = f"torch-npu 9.9.0 needs torch 1.13.0, this is torch {torch.__version__}"
    assert probe("npu").reason == reason
    assert pair_problem("torch-npu") == reason


def test_a_package_for_another_torch_that_loads_is_named_too(monkeypatch, tmp_path, caplog):
    cards = "is_available=lambda: True, device_count=lambda: 1, init=lambda: None"
    source = f"import torch, types\ntorch.npu = types.SimpleNamespace({cards})"
    _write_package(monkeypatch, tmp_path, "torch_npu", source, "torch==1.13.0")
    assert probe("npu").ready
    (message,) = caplog.messages
    assert message.startswith(f"torch-npu 9.9.0 needs torch 1.13.0, this is torch {torch.__version__}; it was loaded")


def test_a_driver_without_a_card_is_not_passed_over_in_silence(monkeypatch, tmp_path, caplog):
    cards = "is_available=lambda: False, device_count=lambda: 0, init=lambda: None"
    source = f"import torch, types\ntorch.npu = types.SimpleNamespace({cards})"
    _write_package(monkeypatch, tmp_path, "torch_npu", source, f"torch=={MINOR}.*", f"{MINOR}.0")
    assert vb.get_device().type == "cpu"
    (message,) = caplog.messages
    assert message.startswith(f"passing over npu: torch-npu {MINOR}.0 found no Huawei Ascend. Fix: install the CANN")


@pytest.mark.parametrize(
    "pin", ["torch==" + torch.__version__.split("+")[0], f"torch=={MINOR}.*", "torch>=2", "torchvision==1.0"]
)
def test_a_package_for_this_torch_is_no_problem(monkeypatch, tmp_path, pin):
    _write_package(monkeypatch, tmp_path, "torch_npu", "raise RuntimeError('other reason')", pin)
    assert pair_problem("torch-npu") == ""
    assert "other reason" in probe("npu").reason


def test_a_package_that_adds_no_device_is_broken(monkeypatch, tmp_path):
    _write_package(monkeypatch, tmp_path, "torch_npu", "")
    assert probe("npu").state == "broken"
    assert "added no torch.npu" in probe("npu").reason


def test_a_package_is_imported_only_when_its_device_is_asked_for(monkeypatch, tmp_path):
    source = "import torch, types\ntorch.hpu = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 4)"
    _write_package(monkeypatch, tmp_path, "habana_frameworks.torch", source)
    plug_in(monkeypatch, "nvidia")
    assert vb.get_device().type == "cuda"
    assert "habana_frameworks" not in sys.modules  # CUDA comes first, so nothing else was touched
    assert vb.get_device(prefer_hpu=True).type == "hpu"
    assert vb.DeviceBackend("hpu").device_count() == 4


def test_no_card_gives_the_drivers_own_words(monkeypatch):
    plug_in(monkeypatch, "nvidia", count=0)

    def refuse():
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore text")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    found = probe("cuda")
    assert found.state == "no device"
    found_by = f"torch {torch.__version__} can use no NVIDIA GPU"
    assert found.reason == f"{found_by} (RuntimeError: Found no NVIDIA driver on your system.)"
    assert "nvidia-smi" in found.fix


def test_hidden_cards_are_explained_by_the_variable(monkeypatch):
    plug_in(monkeypatch, "amd", count=0)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    assert "HIP_VISIBLE_DEVICES='-1'" in probe("cuda").reason
    assert probe("cuda").fix.startswith("unset it")


def test_a_driver_that_fails_while_counting_is_a_finding(monkeypatch):
    plug_in(monkeypatch, "intel")

    def crash():
        raise OSError("level zero is gone")

    monkeypatch.setattr(torch.xpu, "device_count", crash)
    assert probe("xpu").state == "broken" and "level zero is gone" in probe("xpu").reason


def test_answers_are_kept_until_forgotten(monkeypatch):
    cards = plug_in(monkeypatch, "nvidia")
    assert probe("cuda").count == 2
    cards.count = 1
    assert probe("cuda").count == 2
    forget_devices()
    assert probe("cuda").count == 1


def test_cuda_row_is_amds_in_a_rocm_build_or_beside_its_card(monkeypatch):
    assert platform_of("cuda").vendor == "nvidia"
    make_bare(monkeypatch, seen=("amd",))
    assert platform_of("cuda").vendor == "amd"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert platform_of("cuda").vendor == "nvidia"
    monkeypatch.setattr(torch.version, "cuda", None)
    make_bare(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert platform_of("cuda").vendor == "amd"


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Wed Jul 20 14:00:58 UTC 2025",
    ],
)
def test_driver_version_is_read_from_the_system(tmp_path, text):
    (tmp_path / "version").write_text(text + "\nGCC version:  gcc version 12.2.0")
    pattern = next(row for row in PLATFORMS if row.vendor == "nvidia").driver[0][1]
    files = ((str(tmp_path / "absent"), r"(.*)"), (str(tmp_path / "ver*"), pattern))
    row = Platform("nvidia", "cuda", "NVIDIA GPU", driver=files)
    assert row.driver_version() == "580.65.06"
    assert Platform("cpu", "cpu", "CPU").driver_version() is None


def test_card_seen_looks_for_device_nodes(monkeypatch, tmp_path):
    monkeypatch.undo()
    (tmp_path / "card7").touch()
    assert Platform("intel", "xpu", "x", cards=(str(tmp_path / "card[0-9]*"),)).card_seen()
    assert not Platform("intel", "xpu", "x", cards=(str(tmp_path / "other*"),)).card_seen()


def test_table_is_complete():
    assert {row.device_type for row in PLATFORMS} == set(PRIORITY)
    for row in PLATFORMS[:-1]:
        assert row.install and row.repair and row.label and (row.build or (row.module and row.distribution))


def test_a_module_blocked_in_sys_modules_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert not device_vendors.is_installed("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace())
    assert device_vendors.is_installed("torch_npu")
