"""FP4 checkpoints: each producer's layout against a decoder of its own, shard by shard."""

import json

import pytest
import torch
from fp4_checkpoint_files import (
    E4M3,
    PRODUCERS,
    codes_of,
    compressed_config,
    compressed_mxfp4,
    compressed_nvfp4,
    elements,
    gpt_oss,
    modelopt_nvfp4,
    under,
    write,
)

from vbcompile.checkpoint import load_checkpoint, read_checkpoint
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.kernels.fp4_quantize import quantize


@pytest.mark.parametrize("producer", PRODUCERS)
def test_layouts_arrive_bit_for_bit(producer, tmp_path):
    tensors, value = PRODUCERS[producer]()
    norm = torch.randn(64).bfloat16()
    write(tmp_path, under("model.layers.0.up", tensors) | {"norm.weight": norm, "model.layers.0.up.bias": norm + 1})
    loaded = load_checkpoint(tmp_path)
    assert loaded.keys() == {"model.layers.0.up.weight", "norm.weight", "model.layers.0.up.bias"}
    packed = loaded["model.layers.0.up.weight"]
    assert isinstance(packed, PackedWeight) and packed.shape == (6, 64) and packed.padding == 0
    assert torch.equal(packed.codes, tensors["weight_packed" if "weight_packed" in tensors else "weight"])
    assert torch.equal(packed.block_scales, tensors["weight_scale"].view(torch.uint8))
    assert torch.equal(dequantize(packed, torch.float64), value)
    assert torch.equal(dequantize(packed, torch.bfloat16), value.float().bfloat16())
    assert torch.equal(loaded["norm.weight"], norm)


@pytest.mark.parametrize(
    ("suffixes", "name"), [("_blocks _scales", "gate_up_proj"), (".blocks .scales", "mlp1_weight")]
)
def test_gpt_oss_layouts(suffixes, name, tmp_path):
    tensors, value = gpt_oss()
    blocks, scales = suffixes.split()
    prefix = f"block.0.mlp.{name}"
    bias = torch.randn(2, 6)
    write(tmp_path, {prefix + blocks: tensors["blocks"], prefix + scales: tensors["scales"], f"{prefix}_bias": bias})
    loaded = load_checkpoint(tmp_path)
    assert loaded.keys() == {prefix, f"{prefix}_bias"}
    assert loaded[prefix].shape == (2, 6, 64) and loaded[prefix].format_name == "mxfp4"
    assert torch.equal(dequantize(loaded[prefix], torch.float64), value)


def test_the_global_scale_of_compressed_tensors_divides_and_that_of_modelopt_multiplies(tmp_path):
    ours = quantize(torch.randn(4, 64), method="nearest")
    common = {"weight_scale": ours.block_scales.view(torch.float8_e4m3fn)}
    divisor = ours.tensor_scale.reciprocal()
    compressed = common | {"weight_packed": ours.codes, "weight_global_scale": divisor}
    modelopt = common | {"weight": ours.codes, "weight_scale_2": ours.tensor_scale.squeeze()}
    values = {}
    for name, tensors in (("compressed", compressed), ("modelopt", modelopt)):
        values[name] = load_checkpoint(write(tmp_path / name, under("up", tensors)))["up.weight"]
    assert torch.equal(dequantize(values["modelopt"]), dequantize(ours))
    torch.testing.assert_close(dequantize(values["compressed"]), dequantize(ours), rtol=2**-22, atol=0)
    assert values["compressed"].scale_divides and torch.equal(values["compressed"].tensor_scale, divisor)


def test_parts_of_a_weight_in_different_shards(tmp_path):
    first, value = compressed_nvfp4()
    second, other = compressed_mxfp4(4, 96)
    a, b = under("a", first), under("b", second)
    write(
        tmp_path,
        {"a.weight_packed": a["a.weight_packed"], "b.weight_scale": b["b.weight_scale"]},
        {"a.weight_scale": a["a.weight_scale"], "z": torch.ones(3)},
        {"a.weight_global_scale": a["a.weight_global_scale"], "b.weight_packed": b["b.weight_packed"]},
    )
    loaded = load_checkpoint(tmp_path)
    assert list(loaded) == ["a.weight", "z", "b.weight"]
    assert torch.equal(dequantize(loaded["a.weight"], torch.float64), value)
    assert torch.equal(dequantize(loaded["b.weight"], torch.float64), other)
    from_index = load_checkpoint(tmp_path / "model.safetensors.index.json")
    assert torch.equal(from_index["a.weight"].codes, loaded["a.weight"].codes)


def test_reading_is_lazy_and_independent_of_the_file(tmp_path):
    tensors = {f"{i}.weight": torch.full((64, 64), float(i)) for i in range(8)}
    path = write(tmp_path, tensors) / "model.safetensors"
    entries = read_checkpoint(path)
    name, first = next(entries)
    with path.open("r+b") as file:  # zeros over all data: what was read stays, what was not is read now
        file.seek(path.stat().st_size - 8 * 64 * 64 * 4)
        file.write(bytes(8 * 64 * 64 * 4))
    rest = dict(entries)
    assert torch.equal(first, tensors[name]) and len(rest) == 7
    assert not any(value.any() for value in rest.values())


def test_activation_scales_are_left_out_and_said(tmp_path, caplog):
    tensors, _ = compressed_nvfp4()
    write(tmp_path, under("up", tensors) | {"up.input_global_scale": torch.ones(1), "attention.k_scale": torch.ones(1)})
    with caplog.at_level("INFO", logger="vbcompile.checkpoint"):
        assert load_checkpoint(tmp_path).keys() == {"up.weight", "attention.k_scale"}
    assert "1 activation scales left out, up.input_global_scale" in caplog.text


def test_experts_with_a_scale_each_or_one_for_all(tmp_path):
    parts, values = zip(*(modelopt_nvfp4() for _ in range(3)), strict=True)
    stacked = {key: torch.stack([p[key] for p in parts]) for key in ("weight", "weight_scale", "weight_scale_2")}
    loaded = load_checkpoint(write(tmp_path / "each", under("experts.up", stacked)))["experts.up.weight"]
    assert loaded.shape == (3, 6, 64) and loaded.tensor_scale.shape == (3, 1)
    assert torch.equal(dequantize(loaded, torch.float64), torch.stack(values))
    one = stacked | {"weight_scale_2": parts[0]["weight_scale_2"]}
    loaded = load_checkpoint(write(tmp_path / "one", under("experts.up", one)))["experts.up.weight"]
    assert torch.equal(dequantize(loaded, torch.float64)[0], values[0])


def test_modules_without_a_prefix_and_rows_that_end_inside_a_block(tmp_path):
    codes, scale = codes_of(3, 20), E4M3[torch.randint(127, (3, 3))]
    tensors = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": torch.ones(1)}
    packed = load_checkpoint(write(tmp_path, tensors))["weight"]
    assert packed.shape == (3, 40) and packed.padding == 8 and packed.codes.shape == (3, 24)
    expected = elements(codes) * scale.double().repeat_interleave(16, 1)[:, :40]
    assert torch.equal(dequantize(packed, torch.float64), expected)


def test_zero_scales_with_a_sign_are_zero(tmp_path):
    tensors, value = compressed_nvfp4()
    tensors["weight_scale"].view(torch.uint8)[0, 0] = 0x80
    packed = load_checkpoint(write(tmp_path, under("up", tensors)))["up.weight"]
    assert packed.block_scales[0, 0] == 0 and not dequantize(packed)[0, :16].any()
    assert torch.equal(dequantize(packed, torch.float64)[1:], value[1:])


@pytest.mark.parametrize(
    "config",
    [
        compressed_config("nvfp4-pack-quantized", 16),
        compressed_config("nvfp4-pack-quantized", 16, transform_config={}, sparsity_config={}),
        compressed_config("mixed-precision", 16),
        {"text_config": compressed_config("nvfp4-pack-quantized", 16)},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}},
        {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
        {"model_type": "llama"},
    ],
    ids=str,
)
def test_declarations_that_fit_are_accepted(config, tmp_path):
    tensors, _ = compressed_nvfp4()
    assert "up.weight" in load_checkpoint(write(tmp_path, under("up", tensors), config=config))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert "up.weight" in load_checkpoint(tmp_path / "model.safetensors")
