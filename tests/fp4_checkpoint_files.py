"""Checkpoints of each FP4 producer, written for the tests, with what their bytes mean."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)


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
