"""DeviceBackend and UnifiedDeviceManager over fake cards."""

import json
import mmap

import pytest
import torch
from fake_devices import KIND, plug_in

import vbcompile as vb
from vbcompile.device import GIB, DeviceError

pytestmark = pytest.mark.usefixtures("bare_machine")


@pytest.mark.parametrize("vendor", KIND)
def test_every_call_reaches_the_right_card(monkeypatch, vendor):
    cards = plug_in(monkeypatch, vendor)
    cards.allocated = {0: 1 * GIB, 1: 5 * GIB}
    backend = vb.DeviceBackend(KIND[vendor])
    assert backend.is_available() and backend.device_count() == 2
    assert (backend.device_type, backend.vendor) == (KIND[vendor], vendor)
    assert [backend.memory_allocated(index) for index in (None, 0, 1)] == [GIB, GIB, 5 * GIB]
    assert backend.max_memory_allocated(1) == 15 * GIB
    assert backend.memory_reserved(1) == (5 * GIB if vendor == "habana" else 10 * GIB)
    assert backend.get_device_name(1) == backend.get_device_properties(1).name
    backend.synchronize(1)
    backend.empty_cache()
    assert cards.waited == [1]
    assert cards.cleaned == (0 if vendor == "habana" else 1)


def test_a_backend_with_an_index_means_that_card(monkeypatch):
    cards = plug_in(monkeypatch, "nvidia")
    cards.allocated = {1: GIB}
    backend = vb.DeviceBackend(torch.device("cuda:1"))
    assert backend.device == torch.device("cuda:1")
    assert backend.memory_allocated() == GIB and backend.memory_allocated(0) == 0
    assert repr(backend) == "DeviceBackend('cuda:1')"


def test_an_index_beyond_the_cards_is_refused_everywhere(monkeypatch):
    plug_in(monkeypatch, "nvidia")
    backend = vb.DeviceBackend("cuda")
    for index in (2, -1, True, "0", 0.0):
        for call in (backend.memory_allocated, backend.synchronize, backend.get_device_name, backend.mem_get_info):
            with pytest.raises(DeviceError, match="valid devices: cuda:0, cuda:1, cpu"):
                call(index)
    with pytest.raises(DeviceError, match="no device cuda:2"):
        vb.DeviceBackend("cuda:2")


def test_an_absent_device_answers_is_available_and_refuses_the_rest():
    backend = vb.DeviceBackend("npu:3")
    assert not backend.is_available() and backend.device_count() == 0
    assert backend.get_memory_summary() == {"device_type": "npu", "vendor": "huawei", "device_count": 0, "devices": []}
    calls = (backend.empty_cache, backend.synchronize, backend.memory_allocated, lambda: backend.device)
    for call in calls:
        with pytest.raises(DeviceError, match="torch-npu is not installed"):
            call()
    with pytest.raises(DeviceError, match="torch-npu is not installed"):
        vb.get_unified_backend("npu")


def test_the_cpu_has_the_same_calls():
    backend = vb.get_unified_backend("cpu")
    before = backend.memory_allocated()
    pages = mmap.mmap(-1, 2**27)  # not from malloc, which may hold as much that was freed
    pages.write(b"\1" * 2**27)
    ballast = torch.ones(4)
    assert backend.memory_allocated() - before > 2**26
    assert backend.max_memory_allocated() >= backend.memory_allocated() > 0
    assert backend.memory_reserved() > 0
    free, total = backend.mem_get_info()
    assert 0 < free < total
    assert backend.to_device(ballast) is ballast
    assert backend.get_device_properties().multi_processor_count >= 1
    backend.synchronize()
    backend.empty_cache()
    assert vb.DeviceBackend("cpu:0").device == torch.device("cpu")


def test_memory_summary_lists_each_card(monkeypatch):
    cards = plug_in(monkeypatch, "intel")
    cards.allocated = {1: GIB}
    summary = vb.get_unified_backend().get_memory_summary()
    assert (summary["device_type"], summary["vendor"], summary["device_count"]) == ("xpu", "intel", 2)
    assert summary["devices"][1] == {
        "index": 1,
        "name": "Intel(R) Arc(TM) B580 Graphics",
        "allocated_gb": 1.0,
        "reserved_gb": 2.0,
        "max_allocated_gb": 3.0,
        "free_gb": 11.0,
        "total_gb": 12.0,
    }


def test_a_card_that_does_not_tell_its_free_memory_still_has_a_summary(monkeypatch):
    plug_in(monkeypatch, "intel", count=1)

    def refuse(index):
        raise RuntimeError("The device doesn't support querying the available free memory")

    monkeypatch.setattr(torch.xpu, "mem_get_info", refuse)
    backend = vb.get_unified_backend("xpu")
    card = backend.get_memory_summary()["devices"][0]
    assert card["free_gb"] is None and card["total_gb"] == 12.0
    with pytest.raises(DeviceError, match="does not tell the free memory"):
        backend.mem_get_info()


def test_torch_accelerator_answers_where_the_vendor_module_does_not(monkeypatch):
    plug_in(monkeypatch, "habana", count=1)
    monkeypatch.delattr(torch.hpu, "memory_allocated")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda index: 17)
    assert vb.get_unified_backend("hpu").memory_allocated() == 17


def test_all_devices_come_in_order_of_priority(monkeypatch):
    plug_in(monkeypatch, "intel", count=1)
    plug_in(monkeypatch, "nvidia")
    plug_in(monkeypatch, "habana", count=1)
    devices = vb.get_device_manager().get_all_devices()
    assert [str(device) for device in devices] == ["cuda:0", "cuda:1", "hpu:0", "xpu:0", "cpu"]


def test_device_summary_counts_and_describes(monkeypatch):
    plug_in(monkeypatch, "amd")
    plug_in(monkeypatch, "huawei", count=1)
    manager = vb.get_device_manager()
    monkeypatch.setattr(vb.DeviceBackend, "device", property(lambda self: self._name(self._index)))  # no 'npu' here
    summary = manager.get_device_summary()
    counts = {key: value for key, value in summary.items() if key != "devices"}
    assert counts == {
        "total_devices": 4,
        "cuda_devices": 2,
        "hpu_devices": 0,
        "npu_devices": 1,
        "xpu_devices": 0,
        "cpu_devices": 1,
    }
    assert [(card["device"], card["vendor"]) for card in summary["devices"]] == [
        ("cuda:0", "amd"),
        ("cuda:1", "amd"),
        ("npu:0", "huawei"),
        ("cpu", "cpu"),
    ]
    assert summary["devices"][1]["total_gb"] == 192.0
    assert json.loads(json.dumps(summary)) == summary


def test_manager_is_one_and_gives_backends(monkeypatch):
    plug_in(monkeypatch, "nvidia")
    manager = vb.get_device_manager()
    assert vb.get_device_manager() is manager
    assert manager.get_backend("cuda:1").get_device_name() == "NVIDIA H100"
    assert manager.get_best_device(prefer_hpu=True).type == "cuda"
    assert manager.get_best_device(force_cpu=True).type == "cpu"
    assert vb.get_unified_backend().device_type == "cuda"


def test_current_card_is_the_one_that_torch_would_use(monkeypatch):
    cards = plug_in(monkeypatch, "nvidia")
    cards.current = 1
    assert vb.DeviceBackend("cuda").current_index() == 1
