"""Models with the weights of FP4 checkpoints: exactly their codes run, and an error leaves the model as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import FEED, Feed, interpreted
from torch import nn

import vbcompile
from vbcompile.checkpoint import CheckpointError, save_checkpoint
from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.passes import fp4_weights

pytestmark = pytest.mark.usefixtures("fresh_weights")


def packed_entries(model, method="four_over_six"):
    """A state whose matrices are packed by a method that is not the default: rounding them again would show."""
    return {
        name: quantize(tensor, method=method) if name.endswith("weight") else tensor
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("on_meta", [True, False])
def test_exactly_the_codes_run(keep, on_meta, tmp_path):
    entries, x = packed_entries(Feed()), torch.randn(2, 128)
    save_checkpoint(tmp_path / "model.safetensors", entries)
    twin = Feed()
    twin.load_state_dict({n: e if isinstance(e, torch.Tensor) else dequantize(e) for n, e in entries.items()})
    with torch.device("meta" if on_meta else "cpu"):
        model = Feed().requires_grad_(False)
    assert vbcompile.load_packed(model, tmp_path, keep=keep) == list(FEED)
    run = interpreted(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(x), twin(x), rtol=1e-5, atol=1e-5)
    for name in FEED:
        state = fp4_weights.state_of(model.get_parameter(name))
        assert state.canonical["nvfp4", False, ""][0].codes.equal(entries[name].codes)
        assert model.get_parameter(name).isnan().all() == (not keep)
    if keep:
        torch.testing.assert_close(model(x), twin(x))
        with torch.no_grad():  # a write ends the adoption
            model.gate.weight.mul_(2)
            twin.gate.weight.copy_(dequantize(quantize(model.gate.weight)))
            torch.testing.assert_close(run(x), twin(x), rtol=1e-5, atol=1e-5)


def test_the_format_of_the_checkpoint_runs(tmp_path):
    layer, x = nn.Linear(192, 192, bias=False), torch.randn(2, 192)
    packed = quantize(layer.weight, "mxfp4")
    save_checkpoint(tmp_path / "model.safetensors", {"weight": packed})
    vbcompile.load_packed(layer, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(interpreted(layer)(x), F.linear(x, dequantize(packed)), rtol=1e-5, atol=1e-5)


class Experts(nn.Module):
    """A stack as gpt-oss has it in Transformers: ``[E, K, N]``, while checkpoints hold ``[E, N, K]``."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 64, 192), requires_grad=False)

    def forward(self, x):
        return torch.bmm(x, self.gate_up_proj)


@pytest.mark.parametrize("keep", [True, False])
def test_stacks_that_the_model_has_transposed(keep, tmp_path):
    packed, x, model = quantize(torch.randn(3, 192, 64), "mxfp4"), torch.randn(3, 2, 64), Experts()
    save_checkpoint(tmp_path / "model.safetensors", {"gate_up_proj": packed})
    assert vbcompile.load_packed(model, tmp_path, keep=keep) == ["gate_up_proj"]
    want = torch.bmm(x, dequantize(packed).mT)
    torch.testing.assert_close(interpreted(model)(x), want, rtol=1e-4, atol=1e-4)


class Square(nn.Module):
    """Square stacks: their shape does not say how they lie."""

    def __init__(self, **attributes):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(2, 64, 64), requires_grad=False)
        vars(self).update(attributes)


def test_square_stacks_lie_as_their_module_says(tmp_path):
    down, up = quantize(torch.randn(2, 64, 64), "mxfp4"), quantize(torch.randn(2, 192, 64), "mxfp4")
    save_checkpoint(tmp_path / "model.safetensors", {"down_proj": down})
    for is_transposed, want in ((True, dequantize(down).mT), (False, dequantize(down))):
        model = Square(is_transposed=is_transposed)
        vbcompile.load_packed(model, tmp_path)
        assert model.down_proj.equal(want)
    with pytest.raises(CheckpointError, match="nothing says whether the model holds them transposed"):
        vbcompile.load_packed(Square(), tmp_path)
    save_checkpoint(tmp_path / "model.safetensors", {"down_proj": down, "gate_up_proj": up})
    model = Square()
    model.gate_up_proj = nn.Parameter(torch.randn(2, 64, 192), requires_grad=False)
    vbcompile.load_packed(model, tmp_path)
    assert model.down_proj.equal(dequantize(down).mT) and model.gate_up_proj.equal(dequantize(up).mT)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(300, 128), nn.Linear(128, 300, bias=False)
        self.lm_head.weight = self.embedding.weight


@pytest.mark.parametrize("on_meta", [True, False])
def test_tied_weights_stay_tied(on_meta, tmp_path):
    packed = quantize(torch.randn(300, 128))
    save_checkpoint(tmp_path / "model.safetensors", {"embedding.weight": packed})
    with torch.device("meta" if on_meta else "cpu"):
        model = Tied()
    vbcompile.load_packed(model, tmp_path)
    assert model.lm_head.weight is model.embedding.weight and model.lm_head.weight.equal(dequantize(packed))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.update(extra=torch.ones(2)), "'extra' is not in the model"),
        (lambda e: e.pop("down.bias"), "has no 'down.bias', which the model needs"),
        (lambda e: e.update({"down.weight": quantize(torch.randn(128, 64))}), r"'down.weight' has shape \[128, 64\]"),
        (lambda e: e.update({"down.bias": torch.ones(3)}), r"'down.bias' has shape \[3\], in the model \[128\]"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(change, reason, tmp_path):
    model, entries = Feed(), packed_entries(Feed())
    before = copy.deepcopy(model.state_dict())
    change(entries)
    save_checkpoint(tmp_path / "model.safetensors", entries)
    with pytest.raises(CheckpointError, match=reason):
        vbcompile.load_packed(model, tmp_path)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not fp4_weights._states
