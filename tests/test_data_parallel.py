"""The device-neutral DataParallel, on the CPU as several devices; on two cards in test_vendor_npu_device.py."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import vbcompile as vb
from vbcompile.data_parallel import DataParallel, gather, replicate, scatter
from vbcompile.device import DeviceError

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "left right")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3))


def test_it_is_public():
    assert vb.DataParallel is DataParallel


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_same_results_and_gradients_as_one_device(batch):
    alone, model = mlp(), mlp()
    parallel = DataParallel(model, device_ids=[0, 0, 0])
    x = torch.randn(batch, 6)
    out, expected = parallel(x), alone(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_it_trains():
    torch.manual_seed(1)
    parallel = DataParallel(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), device_ids=[0, 1])
    optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-2)
    x, y = torch.randn(32, 16), torch.randn(32, 16)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(parallel(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *, scale, extra):
        y = self.linear(x) * scale + extra["bias"]
        return OrderedDict(out=y, pair=Pair(y + 1, [y.sum()]), name="fixed")


def test_nested_inputs_and_outputs():
    model = Structured()
    x, bias, scale = torch.randn(6, 4), torch.randn(6, 4), torch.tensor(2.0)
    result = DataParallel(model, device_ids=[0, 0])(x, scale=scale, extra={"bias": bias})
    y = model.linear(x) * 2 + bias
    assert isinstance(result, OrderedDict) and isinstance(result["pair"], Pair) and result["name"] == "fixed"
    torch.testing.assert_close(result["out"], y)
    torch.testing.assert_close(result["pair"].left, y + 1)
    torch.testing.assert_close(result["pair"].right[0], torch.stack([y[:3].sum(), y[3:].sum()]))  # one a device


def test_scatter_and_gather_are_inverse():
    value = (torch.arange(10).view(5, 2), [torch.arange(5)], "text", None)
    parts = scatter(value, [CPU, CPU])
    assert [p[0].shape[0] for p in parts] == [3, 2] and parts[1][2] == "text"
    back = gather(parts, CPU)
    assert torch.equal(back[0], value[0]) and torch.equal(back[1][0], value[1][0]) and back[2:] == ("text", None)


def test_statistics_of_batch_norm_are_the_first_devices():
    model = nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    DataParallel(model, device_ids=[0, 0])(x)
    torch.testing.assert_close(model.running_mean, 0.1 * x[:4].mean(0))


def test_copies_lead_gradients_back():
    model = mlp()
    copies = replicate(model, CPU)
    copies["0.weight"].sum().backward()
    assert torch.equal(model[0].weight.grad, torch.ones(12, 6))


def test_what_cannot_be():
    with pytest.raises(DeviceError, match="names no device"):
        DataParallel(mlp(), device_ids=[])
    with pytest.raises(DeviceError, match="cuda"):
        DataParallel(mlp(), device_ids=[0], output_device="cuda:99")
    with pytest.raises(ValueError, match="different sizes along axis 0"):
        scatter((torch.ones(6, 2), torch.ones(1, 2)), [CPU, CPU])
