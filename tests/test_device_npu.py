"""Ascend cards under PyTorch's own name for them.

The name ``npu`` can be given to PyTorch once per process and for good, so a second process plays the machine: its
``torch_npu`` is a package of a few lines that does what the real one does at import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PACKAGE = """
import torch
from fake_devices import FakeCards
from types import SimpleNamespace

__version__ = "2.13.0.fake"
torch.utils.rename_privateuse1_backend("npu")
cards = FakeCards("huawei", count=2, allocated={1: 2 * 2**30})
torch._register_device_module("npu", SimpleNamespace(**cards.functions()))
"""

_SESSION = """
import json, logging, sys
import torch
import vbcompile as vb
from vbcompile.device import DeviceError, get_target

logging.basicConfig(stream=sys.stderr)
manager = vb.get_device_manager()
answers = {
    "imported_early": "torch_npu" in sys.modules,
    "best": str(vb.get_device(prefer_npu=True)),
    "type": vb.get_accelerator_type(),
    "info": vb.get_device_info(),
    "memory": vb.get_memory_info()["npu_memory"],
    "devices": [str(device) for device in manager.get_all_devices()],
    "summary": manager.get_device_summary(),
    "backend": vb.get_unified_backend("npu:1").get_memory_summary(),
    "device": str(vb.get_unified_backend("npu:1").device),
    "arch": get_target("npu").arch,
    "passed_over": manager.last_choice.passed_over,
}
vb.set_seed(11)
vb.memory_cleanup()
import torch_npu
answers["seeds"], answers["cleaned"] = sorted(set(torch_npu.cards.seeds)), torch_npu.cards.cleaned
try:
    vb.get_unified_backend("npu:2")
except DeviceError as error:
    answers["beyond"] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(_PACKAGE)
    places = [str(folder), str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", _SESSION], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_chosen(answers):
    assert (answers["best"], answers["type"], answers["arch"]) == ("npu", "npu", "Ascend910B1")
    assert answers["passed_over"] == []
    assert not answers["imported_early"]


def test_it_is_described(answers):
    info = answers["info"]
    assert info["npu_available"] and info["npu_version"] == "2.13.0.fake"
    assert (info["device_type"], info["vendor"], info["device_count"]) == ("npu", "huawei", 2)
    assert answers["devices"] == ["npu:0", "npu:1", "cpu"]
    assert (answers["summary"]["npu_devices"], answers["summary"]["total_devices"]) == (2, 3)


def test_its_memory_is_in_gb(answers):
    assert answers["memory"] == {
        "npu_0": {"allocated_gb": 0.0, "reserved_gb": 0.0, "max_allocated_gb": 0.0},
        "npu_1": {"allocated_gb": 2.0, "reserved_gb": 4.0, "max_allocated_gb": 6.0},
    }
    assert answers["backend"]["devices"][1]["free_gb"] == 62.0


def test_its_cards_are_addressed_and_bounded(answers):
    assert answers["device"] == "npu:1"
    assert answers["beyond"] == "no device npu:2; valid devices: npu:0, npu:1, cpu"


def test_it_is_seeded_and_cleaned(answers):
    assert answers["seeds"] == [11]
    assert answers["cleaned"] == 1
