"""FP4 checkpoints: each producer's layout against a decoder of its own, streaming, damage, our own files."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vbcompile.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.kernels.fp4_quantize import quantize

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)


# --- the producers, and what their bytes mean -------------------------------------------------------------------------


def codes_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def elements(codes: torch.Tensor) -> torch.Tensor:
    """Float64 values of packed bytes ``[..., K / 2]``, one at a time."""
    flat = [VALUES[nibble] for byte in codes.flatten().tolist() for nibble in (byte % 16, byte // 16)]
    return torch.tensor(flat, dtype=torch.float64).view(*codes.shape[:-1], -1)


def compressed_nvfp4(n: int = 6, k: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, scale = codes_of(n, k // 2), E4M3[torch.randint(127, (n, k // 16))]
    divisor = torch.rand(1) * 3000 + 1
    value = elements(codes) * scale.double().repeat_interleave(16, 1) / divisor.double()
    return {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": divisor}, value


def compressed_mxfp4(n: int = 6, k: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, scale = codes_of(n, k // 2), torch.randint(100, 140, (n, k // 32), dtype=torch.uint8)
    value = elements(codes) * torch.pow(2.0, scale.double() - 127).repeat_interleave(32, 1)
    return {"weight_packed": codes, "weight_scale": scale}, value


def modelopt_nvfp4(n: int = 6, k: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, scale = codes_of(n, k // 2), E4M3[torch.randint(127, (n, k // 16))]
    factor = torch.rand(()) * 1e-3
    value = elements(codes) * scale.double().repeat_interleave(16, 1) * factor.double()
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": factor}, value


def gpt_oss(experts: int = 2, n: int = 6, k: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    blocks = codes_of(experts, n, k // 32, 16)
    scales = torch.randint(100, 140, (experts, n, k // 32), dtype=torch.uint8)
    value = elements(blocks) * torch.pow(2.0, scales.double() - 127).unsqueeze(-1)
    return {"blocks": blocks, "scales": scales}, value.flatten(-2)


PRODUCERS = {"compressed nvfp4": compressed_nvfp4, "compressed mxfp4": compressed_mxfp4, "modelopt": modelopt_nvfp4}


def under(module: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def write(folder: Path, *shards: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """A checkpoint folder: one file, or shards with an index."""
    folder.mkdir(exist_ok=True)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, tensors in zip(names, shards, strict=True):
            save_file(tensors, folder / name)
        weight_map = {t: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def compressed_config(format_name: str, group_size: int, **more) -> dict:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": group_size, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    declared = {"quant_method": "compressed-tensors", "format": format_name, "config_groups": groups, **more}
    return {"model_type": "llama", "quantization_config": declared}


# --- reading ----------------------------------------------------------------------------------------------------------


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


# --- refusing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes' is not read; valid: compressed"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "quant_algo 'FP8' is not read"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}},
            "group_size 32",
        ),
        (compressed_config("nvfp4-pack-quantized", 32), "group_size 32 of nvfp4-pack-quantized; valid: \\[16\\]"),
        (compressed_config("mixed-precision", 64), "group_size 64"),
        (compressed_config("nvfp4-pack-quantized", 16, transform_config={"config_groups": {"R1": {}}}), "rotates"),
        (compressed_config("nvfp4-pack-quantized", 16, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24"),
    ],
    ids=str,
)
def test_declarations_that_change_the_meaning_are_refused(config, reason, tmp_path):
    tensors, _ = compressed_nvfp4()
    with pytest.raises(CheckpointError, match=f"config.json: .*{reason}"):
        load_checkpoint(write(tmp_path, under("up", tensors), config=config))


def broken(change) -> dict[str, torch.Tensor]:
    tensors = under("up", compressed_nvfp4()[0])
    change(tensors)
    return tensors


def replaced(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


# --- FP8 beside FP4 ---------------------------------------------------------------------------------------------------


def mixed(scale: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A ModelOpt checkpoint of mixed precision: ``up`` in NVFP4, ``down`` in FP8 with ``scale``."""
    values = (torch.randn(6, 32) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    fp8 = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return under("up", modelopt_nvfp4()[0]) | under("down", fp8), values.float() * scale.float().reshape(-1, 1)


MIXED = {
    "quantization_config": {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"up": {"quant_algo": "NVFP4", "group_size": 16}, "down": {"quant_algo": "FP8"}},
    }
}


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)], ids=str)
def test_fp8_layers_beside_fp4_ones_become_bfloat16(shape, tmp_path):
    tensors, value = mixed(torch.rand(shape) * 0.01 + 0.001)
    loaded = load_checkpoint(write(tmp_path, tensors, config=MIXED))
    assert loaded.keys() == {"up.weight", "down.weight"} and isinstance(loaded["up.weight"], PackedWeight)
    assert loaded["down.weight"].dtype == torch.bfloat16
    assert torch.equal(loaded["down.weight"], value.bfloat16())


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("down.weight_scale", torch.ones(3), "is not one scale, or one a row, of 'down.weight'"),
        ("down.weight_scale", torch.tensor(-1.0), "not finite and positive"),
        ("down.weight_scale", torch.tensor(float("nan")), "not finite and positive"),
        ("down.weight", torch.full((6, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn), "holds NaN"),
        ("down.pre_quant_scale", torch.ones(32), "in a way that is not supported"),
        ("down.weight_scale_inv", torch.ones(1, 1), "in a way that is not supported"),
    ],
)
def test_fp8_layers_that_cannot_be_read(name, tensor, reason, tmp_path):
    tensors, _ = mixed(torch.tensor(0.01))
    tensors[name] = tensor
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(write(tmp_path, tensors, config=MIXED))


def removed(name: str):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "tensor", "reason"),
    [
        (removed("up.weight_scale"), "up.weight_packed", "'up.weight_scale' is missing"),
        (removed("up.weight_global_scale"), "up.weight_packed", "'up.weight_global_scale' is missing"),
        (removed("up.weight_packed"), "up.weight_global_scale", "without packed FP4 codes"),
        (replaced("up.weight_scale", E4M3[:12].view(3, 4)), "up.weight_scale", r"shape \[3, 4\] instead of \[6, 4\]"),
        (replaced("up.weight_scale", torch.ones(6, 2)), "up.weight_packed", "U8 with F32 scales is not packed FP4"),
        (replaced("up.weight_scale", torch.ones(6, 2, dtype=torch.uint8)), "up.weight_scale", "U8 with a tensor scale"),
        (replaced("up.weight_packed", torch.ones(6, 8, dtype=torch.int32)), "up.weight_packed", "I32 with F8_E4M3"),
        (replaced("up.weight_packed", codes_of(192)), "up.weight_packed", "not that of a matrix"),
        (replaced("up.weight_global_scale", torch.ones(3)), "up.weight_global_scale", "not one scale a matrix"),
        (replaced("up.weight_global_scale", torch.ones(1).int()), "up.weight_global_scale", "dtype I32"),
        (replaced("up.weight", torch.ones(6, 64)), "up.weight", "changes the packed weight"),
        (replaced("up.pre_quant_scale", torch.ones(64)), "up.pre_quant_scale", "changes the packed weight"),
        (replaced("up.comfy_quant", torch.ones(3).byte()), "up.comfy_quant", "changes the packed weight"),
        (replaced("up.weight_g_idx", torch.ones(64).int()), "up.weight_g_idx", "changes the packed weight"),
        (replaced("down.weight", torch.ones(2, 2).to(torch.float8_e4m3fn)), "down.weight", "F8_E4M3 is not read"),
        (replaced("down.weight", torch.ones(2, 2).byte()), "down.weight", "'down.weight_scale' is missing"),
        (replaced("x.up_blocks", codes_of(2, 2, 2, 16)), "x.up_blocks", "'x.up_scales' is missing"),
        (replaced("x.up_scales", codes_of(2, 2, 2)), "x.up_scales", "other parts are missing"),
        (replaced("x.up_weight_scale_2", torch.ones(2)), "x.up_weight_scale_2", "without packed FP4 codes"),
    ],
)
def test_inconsistent_checkpoints_name_the_file_and_tensor(change, tensor, reason, tmp_path):
    write(tmp_path, broken(change))
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor '{tensor}': .*{reason}"):
        next(read_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("part", "byte"), [("weight_scale", 0x7F), ("weight_scale", 0x81), ("weight_global_scale", None)]
)
def test_scales_that_are_no_numbers(part, byte, tmp_path):
    tensors, _ = compressed_nvfp4()
    if byte is None:
        tensors[part][0] = float("nan")
    else:
        tensors[part].view(torch.uint8)[2, 1] = byte
    with pytest.raises(CheckpointError, match=r"model.safetensors: up.weight: (block|tensor) scale"):
        load_checkpoint(write(tmp_path, under("up", tensors)))


def test_packed_weight_that_is_also_there_unpacked(tmp_path):
    tensors, _ = gpt_oss()
    blocks = {"up_blocks": tensors["blocks"], "up_scales": tensors["scales"], "up": torch.ones(2)}
    with pytest.raises(CheckpointError, match="tensor 'up': also present packed, as 'up_blocks'"):
        load_checkpoint(write(tmp_path, blocks))


def test_comfy_files_are_refused(tmp_path):
    save_file(under("up", modelopt_nvfp4()[0]), tmp_path / "x.safetensors", metadata={"_quantization_metadata": "{}"})
    with pytest.raises(CheckpointError, match="ComfyUI"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_files_that_can_run_code_are_refused_with_the_conversion(suffix, tmp_path):
    path = tmp_path / f"pytorch_model.{suffix}"
    path.write_bytes(b"")
    for target in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"only safetensors are read.*weights_only=True"):
            load_checkpoint(target)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        load_checkpoint(tmp_path)


def test_the_conversion_hint_works(tmp_path):
    weight = torch.randn(3, 4)
    torch.save({"a": weight}, tmp_path / "old.bin")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "old.bin")
    program = str(caught.value).split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert torch.equal(load_checkpoint(tmp_path / "old.safetensors")["a"], weight)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "",
        7,
    ],
)
def test_an_index_cannot_leave_its_folder(file, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=r"tensor 'a' is placed in .* not a file of this folder"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is given twice"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "missing.safetensors: no such file; the index expects 'a'"),
        ('{"weight_map": {"b": "x.safetensors"}}', "tensor 'b' is named in the index but not in the file"),
        ("\udcff", "not readable as JSON"),
    ],
)
def test_broken_indexes(text, reason, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(tmp_path)


def test_folders_that_do_not_say_what_they_hold(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        load_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file({"t": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot tell .*a\.safetensors, b\.safetensors"):
        load_checkpoint(tmp_path)
    assert "t" in load_checkpoint(tmp_path / "b.safetensors")


def test_truncated_and_damaged_files(tmp_path):
    path = write(tmp_path, under("up", compressed_nvfp4()[0])) / "model.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    damaged = [whole[:cut] for cut in (0, 4, 8, 40, 8 + header, len(whole) - 1)]
    damaged += [whole + b"x", struct.pack("<Q", 2**62) + whole[8:], b"PK\3\4" + whole]
    damaged.append(whole.replace(b"F8_E4M3", b"F8_XXXX"))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
            load_checkpoint(tmp_path)


# --- our own files ----------------------------------------------------------------------------------------------------


def own_entries() -> dict:
    embedding = torch.randn(10, 8).bfloat16()
    shared = quantize(torch.randn(5, 40))
    return {
        "a.weight": shared,
        "b.weight": quantize(torch.randn(2, 7, 65), "mxfp4"),
        "c.weight": quantize(torch.randn(6, 32), per_row=True),
        "tied.weight": shared,
        "embedding": embedding,
        "head": embedding,
        "view": embedding[2:5, ::2],
        "flat": embedding.view(-1),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }


def test_own_files_come_back_bit_for_bit(tmp_path):
    compressed = load_checkpoint(write(tmp_path / "in", under("d", compressed_nvfp4()[0])))
    entries = own_entries() | compressed
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, entries)
    loaded = load_checkpoint(tmp_path / "packed.safetensors")
    assert loaded.keys() == entries.keys()
    for name, entry in entries.items():
        if isinstance(entry, PackedWeight):
            for part in ("codes", "block_scales", "tensor_scale"):
                assert torch.equal(getattr(loaded[name], part), getattr(entry, part))
            for part in ("format_name", "shape", "scale_divides"):
                assert getattr(loaded[name], part) == getattr(entry, part)
        else:
            assert loaded[name].dtype == entry.dtype and torch.equal(loaded[name], entry)
    assert loaded["tied.weight"] is loaded["a.weight"] and loaded["head"] is loaded["embedding"]
    assert list(tmp_path.glob(".*")) == [] and sum(f.is_file() for f in tmp_path.iterdir()) == 1


def test_any_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, {"a.weight": quantize(torch.randn(4, 32)), "b": torch.randn(3)})
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    for position in range(8, len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x04
        path.write_bytes(changed)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:  # bytes of the metadata's format entry, which is for other readers
            assert loaded.keys() == {"a.weight", "b"} and position < 8 + size
    path.write_bytes(whole)
    assert load_checkpoint(path).keys() == {"a.weight", "b"}


def rewrite_manifest(path: Path, change) -> None:
    """Change a manifest and give it a right checksum: what a hostile file could hold."""
    import hashlib

    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["vbcompile_fp4"])
    text = json.dumps(change(manifest))
    header["__metadata__"] |= {"vbcompile_fp4": text, "vbcompile_fp4_sha256": hashlib.sha256(text.encode()).hexdigest()}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + whole[8 + size :])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m | {"version": 2}, "format version 2; this release reads 1"),
        (lambda m: [], "format version None"),
        (lambda m: m | {"weights": []}, "malformed"),
        (lambda m: m | {"weights": {"a.weight": {"format": "nvfp4"}}}, "malformed"),
        (lambda m: m | {"aliases": {"x": "nothing"}}, "malformed"),
        (lambda m: m | {"sha256": {}}, "in the manifest or in the file, not in both"),
        (lambda m: m | {"sha256": dict.fromkeys(m["sha256"], "0")}, "does not match its checksum"),
        (lambda m: m | {"weights": {"z": m["weights"]["a.weight"]}}, "tensor 'z.codes' is missing"),
        (lambda m: m | {"weights": {"a.weight": m["weights"]["a.weight"] | {"format": "int4"}}}, "unknown FP4 format"),
        (lambda m: m | {"weights": {"a.weight": m["weights"]["a.weight"] | {"shape": [4, -32]}}}, "is not \\[N, K\\]"),
        (lambda m: m | {"weights": {"a.weight": m["weights"]["a.weight"] | {"shape": [2, 64]}}}, "codes must be"),
    ],
)
def test_hostile_manifests(change, reason, tmp_path):
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, {"a.weight": quantize(torch.randn(4, 32)), "b": torch.randn(3)})
    rewrite_manifest(path, change)
    with pytest.raises(CheckpointError, match=f"packed.safetensors: .*{reason}"):
        load_checkpoint(path)


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "vbcompile.checkpoint_state.save_file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_failed_save_leaves_the_old_file(failing, error, tmp_path, monkeypatch):
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(failing, fail)
    with pytest.raises(KeyboardInterrupt if not error.args else CheckpointError, match=r"cannot be written|^$"):
        save_checkpoint(path, {"a": torch.ones(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"a": quantize(torch.ones(2, 32)), "a.codes": torch.ones(1)}, "two entries need the tensor name 'a.codes'"),
        ({"a.codes": torch.ones(1), "a": quantize(torch.ones(2, 32))}, "two entries need the tensor name 'a.codes'"),
        ({"a": torch.ones(1, device="meta")}, "'a' is not a tensor with data"),
        ({"a": 3}, "'a' is not a tensor with data"),
    ],
)
def test_entries_that_cannot_be_saved(entries, reason, tmp_path):
    with pytest.raises(CheckpointError, match=reason):
        save_checkpoint(tmp_path / "x.safetensors", entries)
    assert os.listdir(tmp_path) == []


def test_other_file_names_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        save_checkpoint(tmp_path / "x.bin", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "no folder" / "x.safetensors", {"a": torch.ones(1)})


def test_own_file_among_other_shards(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    save_file({"b": torch.ones(1)}, tmp_path / "y.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not one file of ours"):
        load_checkpoint(tmp_path)
