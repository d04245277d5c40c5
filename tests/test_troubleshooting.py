"""A model on the wrong device, and a device out of memory."""

import pytest
import torch
from fake_devices import plug_in

from vbcompile.device import GIB, DeviceError
from vbcompile.troubleshooting import check_model_device, out_of_memory_advice

pytestmark = pytest.mark.usefixtures("bare_machine")


def test_a_model_in_its_place_gets_no_advice():
    assert check_model_device(torch.nn.BatchNorm1d(3), "cpu") == []
    assert check_model_device(torch.nn.ReLU(), "cpu") == []


def test_a_model_on_the_wrong_device_is_told_how_to_move(monkeypatch):
    plug_in(monkeypatch, "nvidia")
    answers = check_model_device(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)), "cuda:1")
    assert answers == ["7 of 7 tensors are on cpu, not cuda:1 (first: 0.weight): call model.to('cuda:1')"]


def test_a_model_without_data_is_told_to_load_it():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    (answer,) = check_model_device(model, "cpu")
    assert answer == "2 of 4 tensors are on meta, not cpu (first: 1.weight): load its weights first"


def test_an_unusable_device_is_refused():
    with pytest.raises(DeviceError, match="torch-npu is not installed"):
        check_model_device(torch.nn.ReLU(), "npu")
    with pytest.raises(DeviceError):
        out_of_memory_advice("cuda")


def test_advice_for_a_full_card_has_its_figures(monkeypatch):
    cards = plug_in(monkeypatch, "nvidia")
    cards.allocated = {1: 30 * GIB}
    advice = out_of_memory_advice("cuda:1")
    assert advice[0] == "cuda:1: 30.00 GiB in tensors, 50.00 GiB of 80.00 GiB free"
    assert advice[1].startswith("30.00 GiB are reserved and not in use") and "expandable_segments" in advice[2]
    assert any("VB_MODE=memory" in sentence for sentence in advice)


def test_advice_without_idle_memory_skips_the_clean_up(monkeypatch):
    cards = plug_in(monkeypatch, "habana")
    cards.allocated = {0: 90 * GIB}
    advice = out_of_memory_advice()
    assert len(advice) == 3 and "memory mode" in advice[1] and "smaller batch" in advice[2]


def test_advice_where_the_driver_is_silent(monkeypatch):
    plug_in(monkeypatch, "intel")

    def refuse(index):
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.xpu, "mem_get_info", refuse)
    assert out_of_memory_advice("xpu:0")[0].endswith("the driver does not tell what is free")
