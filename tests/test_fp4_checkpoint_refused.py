"""FP4 checkpoints that are inconsistent, damaged or hostile: refused with the file and the tensor."""

import json
import struct

import pytest
import torch
from fp4_checkpoint_files import (
    E4M3,
    codes_of,
    compressed_config,
    compressed_nvfp4,
    gpt_oss,
    modelopt_nvfp4,
    under,
    write,
)
from safetensors.torch import save_file

from vbcompile.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from vbcompile.kernels.fp4 import PackedWeight


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
        (
            compressed_config("nvfp4-packed", 16),
            "format 'nvfp4-packed' of 4-bit float weights is not read",
        ),
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


def test_the_conversion_hint_works(tmp_path, warm_python):
    weight = torch.randn(3, 4)
    torch.save({"a": weight}, tmp_path / "old.bin")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "old.bin")
    program = str(caught.value).split('python -c "')[1].removesuffix('"')
    assert warm_python.run(["-c", program], tmp_path).returncode == 0
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
