"""FP4 weights as four producers lay them out in safetensors, found by name, dtype and shape.

===================  ============================================================================================
producer             tensors of the weight of module ``m``
===================  ============================================================================================
compressed-tensors   ``m.weight_packed`` U8 ``[N, K/2]``, ``m.weight_scale`` F8_E4M3 ``[N, K/16]`` with
                     ``m.weight_global_scale`` F32 ``[1]`` that **divides** (nvfp4), or U8 ``[N, K/32]`` (mxfp4)
NVIDIA ModelOpt      ``m.weight`` U8 ``[N, K/2]``, ``m.weight_scale`` F8_E4M3 ``[N, K/16]``, ``m.weight_scale_2`` F32
                     that **multiplies**
gpt-oss              ``m_blocks`` U8 ``[E, N, K/32, 16]``, ``m_scales`` U8 ``[E, N, K/32]``; in the original release
                     ``m.blocks``, ``m.scales``
both of the first    layers in FP8 beside those in FP4: ``m.weight`` F8_E4M3 ``[N, K]``, ``m.weight_scale`` a number or
                     one a row, that multiplies; read as bfloat16
===================  ============================================================================================
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vbcompile.checkpoint_files import CheckpointError, Shards, TensorInfo
from vbcompile.kernels.fp4 import PackedWeight, check_scales
from vbcompile.kernels.fp4_formats import MXFP4, NVFP4, Fp4Format

_FLOATS = ("F64", "F32", "F16", "BF16")
_SCALE_FORMATS = {"F8_E4M3": NVFP4, "U8": MXFP4, "F8_E8M0": MXFP4}
# scales of activations and of the key-value cache: not needed when activations stay in high precision
_ACTIVATION_SCALES = ("input_scale", "input_global_scale", "output_scale", "q_scale", "k_scale", "v_scale")


@dataclass(frozen=True)
class PackedTensors:
    """Where a packed weight's parts are. ``tensor_scale`` is None for mxfp4; ``shape`` is ``[(E,) N, K]``."""

    name: str
    format: Fp4Format
    codes: str
    block_scales: str
    tensor_scale: str | None
    scale_divides: bool
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in (self.codes, self.block_scales, self.tensor_scale) if part)


@dataclass(frozen=True)
class Fp8Tensors:
    """A weight in FP8: its own tensor and that of its scale, one number or one for each of the ``rows``."""

    name: str
    scale: str
    rows: int

    @property
    def parts(self) -> tuple[str, ...]:
        return self.name, self.scale


@dataclass(frozen=True)
class Contents:
    """The packed weights of a checkpoint, those in FP8 beside them, its other tensors, and activation scales that
    weights do not need."""

    packed: list[PackedTensors]
    fp8: list[Fp8Tensors]
    plain: list[str]
    activation_scales: list[str]


def find_packed(shards: Shards) -> Contents:
    """Sort a checkpoint's tensors by their headers; no data is read.

    Raises:
        CheckpointError: parts that are missing, of the wrong dtype or shape, or that change the weight in a way that is
            not supported.
    """
    for file, metadata in shards.metadata.items():
        if "_quantization_metadata" in metadata:
            raise CheckpointError(f"{file}: has ComfyUI's quantization metadata, whose scale order is not supported")
    packed = [found for name in shards.tensors if (found := _recognise(name, shards.tensors)) is not None]
    fp8 = [layer for name in shards.tensors if packed and (layer := _recognise_fp8(name, shards.tensors)) is not None]
    quantized: list[PackedTensors | Fp8Tensors] = [*packed, *fp8]
    used = {part for p in quantized for part in p.parts}
    children = defaultdict(list)
    for name in shards.tensors:
        children[name.rpartition(".")[0]].append(name)
    activation_scales = [name for p in quantized for name in _activation_scales(p, children, shards.tensors)]
    known = used.union(activation_scales)
    plain = [name for name in shards.tensors if name not in known]
    for name in plain:
        _refuse_leftover(name, shards.tensors)
    for parts in packed:
        if parts.name in shards.tensors and parts.name != parts.codes:
            raise _error(shards.tensors[parts.name].file, parts.name, f"also present packed, as {parts.codes!r}")
    return Contents(packed, fp8, plain, activation_scales)


def _recognise(name: str, tensors: dict[str, TensorInfo]) -> PackedTensors | None:
    """The packed weight whose codes the tensor ``name`` holds, or None."""
    info, last = tensors[name], name.rpartition(".")[2]
    if last == "weight_packed":
        weight = name.removesuffix("_packed")
        return _two_level(tensors, weight, name, f"{weight}_global_scale", divides=True)
    if last == "weight" and info.dtype == "U8":
        return _two_level(tensors, name, name, f"{name}_scale_2", divides=False)
    for codes, scales in (("_blocks", "_scales"), (".blocks", ".scales")):
        if name.endswith(codes) and info.dtype == "U8" and len(info.shape) >= 3:
            weight = name.removesuffix(codes)
            rows = (*info.shape[:-2], info.shape[-2] * info.shape[-1])
            return _described(tensors, weight, name, weight + scales, None, False, rows)
    return None


def _recognise_fp8(name: str, tensors: dict[str, TensorInfo]) -> Fp8Tensors | None:
    """The FP8 weight ``name`` of a checkpoint of mixed precision, or None."""
    info, scale = tensors[name], f"{name}_scale"
    is_weight = name.rpartition(".")[2] == "weight" and info.dtype == "F8_E4M3" and len(info.shape) == 2
    if not is_weight or scale not in tensors:
        return None
    found, rows = tensors[scale], info.shape[0]
    if found.dtype not in _FLOATS or found.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise _error(
            found.file, scale, f"{found.dtype} {list(found.shape)} is not one scale, or one a row, of {name!r}"
        )
    return Fp8Tensors(name, scale, rows)


def _two_level(
    tensors: dict[str, TensorInfo], weight: str, codes: str, tensor_scale: str, *, divides: bool
) -> PackedTensors:
    """A weight with ``weight_scale``, and a tensor scale if its block scales are E4M3."""
    scales = f"{weight}_scale"
    needs_scale = scales in tensors and tensors[scales].dtype == "F8_E4M3"
    part = tensor_scale if needs_scale or tensor_scale in tensors else None
    return _described(tensors, weight, codes, scales, part, divides, tensors[codes].shape)


def _described(
    tensors: dict[str, TensorInfo],
    weight: str,
    codes: str,
    block_scales: str,
    tensor_scale: str | None,
    divides: bool,
    packed_shape: tuple[int, ...],
) -> PackedTensors:
    """Check the parts' dtypes and shapes against each other; ``packed_shape`` is ``[(E,) N, K/2]``."""
    codes_info = tensors[codes]
    for part in (block_scales, tensor_scale):
        if part is not None and part not in tensors:
            raise _error(codes_info.file, codes, f"its scale {part!r} is missing from the checkpoint")
    scales_info = tensors[block_scales]
    fmt = _SCALE_FORMATS.get(scales_info.dtype)
    if codes_info.dtype != "U8" or fmt is None:
        raise _error(codes_info.file, codes, f"{codes_info.dtype} with {scales_info.dtype} scales is not packed FP4")
    if (tensor_scale is not None) != fmt.has_tensor_scale:
        beside = "with" if tensor_scale else "without"
        raise _error(scales_info.file, block_scales, f"{scales_info.dtype} {beside} a tensor scale is neither format")
    if len(packed_shape) not in (2, 3) or 0 in packed_shape:
        raise _error(codes_info.file, codes, f"shape {list(codes_info.shape)} is not that of a matrix or of experts")
    k = packed_shape[-1] * 2
    expected = (*packed_shape[:-1], -(-k // fmt.block_size))
    if scales_info.shape != expected:
        reason = f"shape {list(scales_info.shape)} instead of {list(expected)}, which {codes!r} needs"
        raise _error(scales_info.file, block_scales, reason)
    if tensor_scale is not None:
        _check_tensor_scale(tensors[tensor_scale], tensor_scale, packed_shape)
    return PackedTensors(
        weight, fmt, codes, block_scales, tensor_scale, divides and fmt.has_tensor_scale, (*packed_shape[:-1], k)
    )


def _check_tensor_scale(info: TensorInfo, name: str, packed_shape: tuple[int, ...]) -> None:
    if info.dtype not in _FLOATS:
        raise _error(info.file, name, f"dtype {info.dtype} is not that of a tensor scale")
    if prod(info.shape) not in (1, prod(packed_shape[:-2])):
        raise _error(info.file, name, f"shape {list(info.shape)} is not one scale a matrix")


def _activation_scales(
    packed: PackedTensors | Fp8Tensors, children: Mapping[str, list[str]], tensors: dict[str, TensorInfo]
) -> Iterator[str]:
    """Activation scales of a packed weight's module; whatever else would change the weight is refused."""
    module, _, last = packed.name.rpartition(".")
    if last != "weight":
        return
    for name in children[module]:
        child = name.rpartition(".")[2]
        if child in _ACTIVATION_SCALES:
            yield name
        elif name not in packed.parts and child != "bias":
            reason = f"changes the packed weight {packed.name!r} in a way that is not supported"
            raise _error(tensors[name].file, name, reason)


def _refuse_leftover(name: str, tensors: dict[str, TensorInfo]) -> None:
    """Tensors that mean something only together with a weight that was not recognised."""
    info = tensors[name]
    last = name.rpartition(".")[2]
    if info.dtype.startswith(("F8", "F4", "F6")):
        raise _error(info.file, name, f"{info.dtype} is not read; only packed FP4 and unquantized tensors are")
    if last.endswith(("weight_scale", "weight_scale_2", "weight_global_scale")):
        raise _error(info.file, name, "a weight's scale without packed FP4 codes that it belongs to")
    if info.dtype == "U8" and last.endswith(("blocks", "scales", "weight_scale_inv")):
        raise _error(info.file, name, "part of a packed weight whose other parts are missing")


def read_packed(shards: Shards, parts: PackedTensors, device: torch.device | str) -> PackedWeight:
    """Read one packed weight to ``device``, codes and scales bit for bit.

    Raises:
        CheckpointError: a scale is NaN, infinite, negative or, for the tensor scale, zero.
    """
    rows = parts.shape[:-1]
    codes = shards.read(parts.codes).view(*rows, -1)
    scales = shards.read(parts.block_scales).view(torch.uint8).view(*rows, -1)
    if parts.format is NVFP4:
        scales = scales.masked_fill_(scales == 0x80, 0)  # zero with a sign: the value is the same
    padding = scales.shape[-1] * parts.format.block_size // 2 - codes.shape[-1]
    tensor_scale = torch.ones(*rows[:-1], 1)
    if parts.tensor_scale is not None:
        tensor_scale = _tensor_scale(shards.read(parts.tensor_scale), rows[:-1])
    packed = PackedWeight(
        torch.nn.functional.pad(codes, (0, padding)) if padding else codes,
        scales,
        tensor_scale,
        parts.format.name,
        parts.shape,
        parts.scale_divides,
    )
    try:
        check_scales(packed, parts.name)
    except ValueError as error:
        raise CheckpointError(f"{shards.tensors[parts.block_scales].file}: {error}") from error
    return packed.to(device)


def read_fp8(shards: Shards, parts: Fp8Tensors, device: torch.device | str) -> Tensor:
    """Read a weight in FP8 to ``device`` as bfloat16: value times scale, rounded once from float32.

    Raises:
        CheckpointError: a value or the scale is NaN, or the scale is infinite or not positive.
    """
    values, scale = shards.read(parts.name).float(), shards.read(parts.scale).float().reshape(-1, 1)
    info = shards.tensors
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise _error(info[parts.scale].file, parts.scale, "a scale that is not finite and positive")
    if not bool(torch.isfinite(values).all()):
        raise _error(info[parts.name].file, parts.name, "holds NaN")
    return (values * scale).to(torch.bfloat16).to(device)


def _tensor_scale(scale: Tensor, lead: tuple[int, ...]) -> Tensor:
    """One float32 scale a matrix, ``[..., 1]``."""
    return scale.float().reshape(-1).expand(prod(lead)).reshape(*lead, 1).contiguous()


def _error(file: Path, name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{file}: tensor {name!r}: {reason}")
