"""Rounding with calibration inputs: better than without, readable by our loader, nothing half-done after an error."""

import copy
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import vbcompile
from vbcompile import __main__ as command_line
from vbcompile import calibrate, load_packed
from vbcompile.checkpoint import load_checkpoint
from vbcompile.fp4_calibration import calibration_tokens
from vbcompile.kernels.fp4 import PackedWeight, check_scales, dequantize
from vbcompile.kernels.fp4_formats import NVFP4, encode_e2m1, round_e2m1
from vbcompile.kernels.fp4_gptq import quantize_with_inputs
from vbcompile.kernels.fp4_quantize import quantize


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def correlated(rows, k):
    """Inputs whose columns depend on one another, some much larger than others, as activations are."""
    return torch.randn(rows, k // 4) @ torch.randn(k // 4, k) * torch.rand(k).pow(2) + 0.1 * torch.randn(rows, k)


def output_error(weight, packed, x):
    return float(((weight - dequantize(packed)) @ x.T).norm() / (weight @ x.T).norm())


def test_rounding_equals_the_codes_of_the_format():
    x = torch.cat((torch.randn(1000) * 4, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 9.0, 0.0])))
    x = torch.cat((x, -x))
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[(encode_e2m1(x) & 7).int()]
    assert torch.equal(round_e2m1(x).abs(), values)
    assert torch.equal(torch.sign(round_e2m1(x)), torch.sign(x) * (values > 0))


@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("k", [128, 100])
def test_the_output_error_falls(format_name, k):
    weight, x = torch.randn(48, k), correlated(512, k)
    packed = quantize_with_inputs(weight, x.T @ x, format_name)
    check_scales(packed, "weight")
    assert packed.shape == (48, k) and packed.format_name == format_name
    plain, nearest = quantize(weight, format_name), quantize(weight, format_name, method="nearest")
    ours = output_error(weight, packed, x)
    assert ours < 0.7 * output_error(weight, plain, x) and ours < 0.7 * output_error(weight, nearest, x)
    fresh = correlated(512, k)  # other inputs of another distribution: no worse than a little
    assert output_error(weight, packed, fresh) < 3 * output_error(weight, plain, fresh)


def test_against_a_plain_float64_rendering_of_the_method():
    """Column by column with the inverse Hessian updated explicitly (the method before its Cholesky form)."""
    n, k, damping = 5, 32, 0.01
    weight, x = torch.randn(n, k), correlated(200, k)
    moment = x.T @ x
    packed = quantize_with_inputs(weight, moment, damping=damping)
    scaled = moment.double() / moment.diagonal().mean().double()
    inverse = torch.linalg.inv(scaled + damping * torch.eye(k, dtype=torch.float64))
    rest, values = weight.double().clone(), dequantize(packed, torch.float64)
    for column in range(k):
        step = (rest[:, column] - values[:, column]) / inverse[column, column]
        scale = packed.tensor_scale.double() * NVFP4_SCALES[packed.block_scales[:, column // 16].int()]
        assert (
            (rest[:, column] - values[:, column]).abs() <= scale.clamp_min(1e-12) * nearest_gap(rest[:, column], scale)
        ).all()
        rest -= step[:, None] * inverse[column]
        inverse = inverse - inverse[:, column : column + 1] @ inverse[column : column + 1] / inverse[column, column]
        inverse[column, :] = inverse[:, column] = 0
        inverse[column, column] = 1


NVFP4_SCALES = torch.tensor(NVFP4.scale_values, dtype=torch.float64)


def nearest_gap(x, scale):
    """Distance in units of the scale from x to the nearest value, and a little more for float32."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    units = (x / scale.clamp_min(1e-12)).abs()
    return (units[:, None] - values).abs().amin(1) + 1e-3


def test_inputs_that_say_nothing():
    weight = torch.randn(8, 64)
    assert quantize_with_inputs(weight, torch.zeros(64, 64)).shape == (8, 64)
    one = torch.zeros(64, 64)
    one[3, 3] = 5.0
    assert output_error(weight, quantize_with_inputs(weight, one), one) < 0.2
    with pytest.raises(ValueError, match=r"^w: the second moment of the inputs must be finite \[64, 64\]"):
        quantize_with_inputs(weight, torch.full((64, 64), torch.nan), name="w")
    with pytest.raises(ValueError, match=r"^w: holds NaN"):
        quantize_with_inputs(weight / 0, torch.eye(64), name="w")


class Language(nn.Module):
    """Embedding, two layers of one input, one after them, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 192)
        self.a, self.b, self.c = (nn.Linear(192, 192) for _ in range(3))
        self.unused, self.small = nn.Linear(192, 192), nn.Linear(192, 8)
        self.lm_head = nn.Linear(192, 200, bias=False)

    def forward(self, tokens, scale=1.0):
        x = self.embedding(tokens) * scale
        x = F.silu(self.a(x)) * self.b(x) + x
        return self.lm_head(x + self.c(x)), self.small(x)


def test_a_model_is_calibrated_in_one_forward(tmp_path):
    model, tokens = Language(), torch.randint(50, (8, 40))
    before, seen = copy.deepcopy(model), []
    result = calibrate(model, (tokens,), done=seen.append)
    assert [layer.name for layer in result.layers] == ["a", "b", "c"] and seen == result.layers
    assert dict(result.left) == {
        "unused": "not reached by the calibration inputs",
        "small": "1536 elements: too small to gain",
        "lm_head": "projection onto the vocabulary",
    }
    for layer in result.layers:
        assert layer.error <= layer.nearest_error and layer.shape == (192, 192)
    assert any(layer.method == "gptq" for layer in result.layers)
    result.save(tmp_path / "model.safetensors")
    entries = load_checkpoint(tmp_path)
    assert {name for name, entry in entries.items() if isinstance(entry, PackedWeight)} == {
        "a.weight", "b.weight", "c.weight",
    }  # fmt: skip
    load_packed(before, tmp_path)
    with torch.no_grad():
        for ours, theirs in zip(before(tokens), model(tokens), strict=True):
            assert torch.equal(ours, theirs)


def test_the_head_by_option_and_keywords():
    result = calibrate(Language(), {"tokens": torch.randint(50, (4, 20)), "scale": 2.0}, lm_head=True)
    assert [layer.name for layer in result.layers] == ["a", "b", "c", "lm_head"]


def test_an_error_leaves_the_model_as_it_was():
    model, tokens = Language(), torch.randint(50, (8, 40))
    with torch.no_grad():
        model.c.weight[3, 4] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^c\.weight: holds NaN or infinity"):
        calibrate(model, (tokens,))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not model.a._forward_pre_hooks
    with pytest.raises(ValueError, match="unknown FP4 format 'fp4'"):
        calibrate(model, (tokens,), format_name="fp4")


def test_wrong_inputs_are_the_layers_own_error_and_named_ones_are_seen():
    layer = nn.Linear(192, 192)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate(layer, torch.randn(4, 3))
    (found,) = calibrate(layer, {"input": torch.randn(64, 192)}).layers
    assert found.method == "gptq"


class Words:
    """A tokenizer: one token a word."""

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


def test_calibration_text(tmp_path):
    (tmp_path / "text").write_text("a bb ccc dddd eeeee " * 10)
    tokens = calibration_tokens(Words(), str(tmp_path / "text"), 23, 10)
    assert tokens.shape == (2, 10) and tokens[0, :5].tolist() == [1, 2, 3, 4, 5]
    assert calibration_tokens(Words(), None, 1000, 100).shape == (10, 100)  # Python's own documentation
    with pytest.raises(ValueError, match="50 tokens are not one sequence of 512"):
        calibration_tokens(Words(), str(tmp_path / "text"), 1000, 512)


MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192)), (torch.randn(64, 192),)

def wrong():
    return nn.Linear(192, 192), (torch.full((4, 192), torch.nan),)

def small():
    return nn.Linear(8, 8), torch.ones(1, 8)
"""


def test_one_tensor_is_one_input():
    layer = nn.Linear(192, 192)
    shapes = []
    layer.register_forward_pre_hook(lambda layer, inputs: shapes.append(inputs[0].shape))
    calibrate(layer, torch.randn(1, 192))
    assert shapes == [(1, 192)]


def test_the_command(tmp_path, capsys):
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL))
    out = tmp_path / "packed.safetensors"
    assert command_line.main(["calibrate", f"{tmp_path}/model.py:make", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "0 [192x192]: gptq, output error 0.0" in said and f"2 layers packed to {out}" in said
    assert isinstance(load_checkpoint(out)["0.weight"], PackedWeight)
    assert command_line.main(["calibrate", f"{tmp_path}/model.py:wrong", "--out", str(out)]) == 1
    assert "that reach this layer hold NaN or infinity" in capsys.readouterr().err
    assert command_line.main(["calibrate", f"{tmp_path}/model.py:small", "--out", str(out)]) == 1
    assert capsys.readouterr().out.splitlines()[1].startswith("no layer packed; the weights are in")
    assert command_line.main(["calibrate", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_command_reads_a_folder_of_transformers(tmp_path, capsys):
    """A model folder with a tokenizer, as ``save_pretrained`` writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=192, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("a b c d " * 100)
    arguments = ["--out", str(tmp_path / "out.safetensors"), "--text", str(tmp_path / "text"), "--length", "32"]
    assert command_line.main(["calibrate", str(tmp_path / "model"), *arguments, "--tokens", "128"]) == 0
    said = capsys.readouterr().out
    assert "7 layers packed" in said and "lm_head: left" in said
    packed = load_checkpoint(tmp_path / "out.safetensors")
    assert packed["model.layers.0.mlp.down_proj.weight"].shape == (192, 256)


@pytest.mark.parametrize("way", ["switch", "compile", "method"])
def test_a_compiled_model_is_calibrated_uncompiled(way):
    layer, x = nn.Linear(192, 192), torch.randn(64, 192)
    if way == "method":
        layer.compile(backend="vblackwell")
    if way == "switch":
        vbcompile.enable(verbose=False)
    before = counters["stats"]["unique_graphs"]
    try:
        result = calibrate(torch.compile(layer, backend="vblackwell") if way == "compile" else layer, x)
    finally:
        vbcompile.disable()
    assert [found.method for found in result.layers] == ["gptq"] and "weight" in result.entries
    assert counters["stats"]["unique_graphs"] == before
