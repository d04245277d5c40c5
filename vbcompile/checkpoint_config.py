"""What a checkpoint's configuration declares, judged for what the weights alone would not show.

A method that is not FP4, or FP4 with a rotation or sparsity that the running model would have to undo, is refused:
its weights would load and give wrong results.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vbcompile.checkpoint_files import CheckpointError, read_json
from vbcompile.kernels.fp4_formats import FORMATS

_METHODS = ("compressed-tensors", "modelopt", "modelopt_fp4", "modelopt_mixed", "mxfp4")
_COMPRESSED_FORMATS = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4", "mixed-precision": None}
_MODELOPT_ALGORITHMS = {"NVFP4": 16, "W4A16_NVFP4": 16, "W4A8_MXFP4_FP8": 32, "MIXED_PRECISION": None}


def check_declarations(folder: Path) -> None:
    """Read ``config.json`` and ``hf_quant_config.json`` where ``folder`` has them.

    Raises:
        CheckpointError: they declare a method, format, block size, transform or sparsity that is not read.
    """
    config = folder / "config.json"
    if config.is_file():
        for declared in _quantization_configs(read_json(config)):
            _check(declared, config)
    modelopt = folder / "hf_quant_config.json"
    if modelopt.is_file():
        _check_modelopt(_section(read_json(modelopt), "quantization"), modelopt)


def _quantization_configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The model's own declaration and those of its parts (``text_config``, ...)."""
    for part in (config, *config.values()):
        if isinstance(part, dict) and isinstance(part.get("quantization_config"), dict):
            yield part["quantization_config"]


def _check(declared: dict[str, Any], file: Path) -> None:
    method = declared.get("quant_method")
    if method not in _METHODS:
        raise CheckpointError(f"{file}: quant_method {method!r} is not read; valid: {', '.join(_METHODS)}")
    if method == "compressed-tensors":
        _check_compressed_tensors(declared, file)
    elif method != "mxfp4":
        _check_modelopt(declared, file)


def _check_compressed_tensors(declared: dict[str, Any], file: Path) -> None:
    if _section(declared, "transform_config").get("config_groups"):
        raise CheckpointError(f"{file}: transform_config rotates the activations at run time, which is not supported")
    sparsity = _section(declared, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(f"{file}: sparsity_config {sparsity!r} is not supported")
    for group in _section(declared, "config_groups").values():
        if isinstance(group, dict):
            _check_group(group, group.get("format") or declared.get("format"), file)


def _check_group(group: dict[str, Any], format_name: Any, file: Path) -> None:
    """One group of layers; those of another format than FP4 are judged by their tensors."""
    weights = _section(group, "weights")
    if format_name not in _COMPRESSED_FORMATS:
        if format_name and (weights.get("num_bits"), weights.get("type")) == (4, "float"):
            known = ", ".join(_COMPRESSED_FORMATS)
            raise CheckpointError(f"{file}: format {format_name!r} of 4-bit float weights is not read; valid: {known}")
        return
    if weights.get("num_bits", 4) != 4 or weights.get("type", "float") != "float":
        return
    fp4 = _COMPRESSED_FORMATS[format_name]
    valid = [FORMATS[fp4].block_size] if fp4 else [f.block_size for f in FORMATS.values()]
    if weights.get("group_size", valid[0]) not in valid:
        raise CheckpointError(f"{file}: group_size {weights['group_size']!r} of {format_name}; valid: {valid}")


def _check_modelopt(declared: dict[str, Any], file: Path) -> None:
    algorithm = declared.get("quant_algo")
    if algorithm is None:  # the key-value cache alone
        return
    if algorithm not in _MODELOPT_ALGORITHMS:
        valid = ", ".join(_MODELOPT_ALGORITHMS)
        raise CheckpointError(f"{file}: quant_algo {algorithm!r} is not read; valid: {valid}")
    block_size = _MODELOPT_ALGORITHMS[algorithm]
    if block_size and (declared.get("group_size") or block_size) != block_size:
        raise CheckpointError(f"{file}: group_size {declared['group_size']!r} of {algorithm}; valid: {block_size}")


def _section(declared: dict[str, Any], key: str) -> dict[str, Any]:
    """A nested object, empty where it is missing or null."""
    found = declared.get(key)
    return found if isinstance(found, dict) else {}
