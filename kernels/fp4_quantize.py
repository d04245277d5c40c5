"""The logical operator ``vblackwell::fp4_quantize``: choose the scales, then the nearest codes; no calibration data.

    codes, block_scales, tensor_scale = fp4_quantize(weight, format, method, per_row)

Weights come here to be packed (:func:`quantize`), trained weights to be rounded in each forward, and activations of
products in FP4. Blocks run along the last axis of ``weight [N, K]`` or ``[E, N, K]``.

Methods:
    ``mse``: each block takes the scale that minimises its squared error. NVFP4 tries the nine E4M3 scales from two
        below to six above the one that maps the block's largest magnitude to 6 (after "ScaleSweep", arXiv 2606.07618);
        MXFP4 tries the power of two of the OCP specification and its two neighbours, and the whole weight takes the
        tensor scale from 1 to 2 that suits it best: how far its magnitudes are from a power of two then costs nothing.
    ``nearest``: that scale alone, as NVIDIA's tools and the OCP specification compute it.
    ``four_over_six``: NVFP4 only; the better of mapping the largest magnitude to 6 or to 4 (arXiv 2512.02010).
    ``fp8``: as ``mse``, for products in FP8, where code times scale is rounded to E4M3: scales and codes have the least
        squared error after that rounding, to which the error without it is added with a weight of 0.2. MXFP4's
        products are exact there, so it means ``mse``.

A weight that was decoded from NVFP4 as NVIDIA's tools make it, or from MXFP4, comes back with the same value.

Relative error ``|W - Q| / |W|`` of Gaussian weights: NVFP4 0.081 / 0.095 / 0.087 / 0.0825, MXFP4 0.1115 / 0.115; after
rounding to E4M3 ``mse`` has 0.0835 and ``fp8`` 0.0818. With tensor scale 1 MXFP4 has 0.1112 to 0.1126, by the place of
the standard deviation in its octave.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels.fp4 import PackedWeight, decode_rows
from vbcompile.kernels.fp4_formats import Fp4Format, fp4_format
from vbcompile.kernels.fp4_rounding import norms, quantize_reference, row_chunks, scale_rule
from vbcompile.kernels.registry import Choice, Implementation, last_resort, never_refuses, operator
from vbcompile.kernels.triton_target import on_device

_SOURCE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Fp4QuantizeCase:
    """What an implementation is chosen by.

    Attributes:
        dtype: of the weight.
        k: its columns.
        method: how block scales are chosen, see the module.
        per_row: whether each row has a tensor scale of its own, where the format has them.
    """

    dtype: torch.dtype
    k: int
    format_name: str
    method: str
    per_row: bool


def choose(target: Target, case: Fp4QuantizeCase, asked: str = "") -> Choice:
    """The implementation that runs a case on a target."""
    return operator("fp4_quantize").choose(target, case, asked)


# ------------------------------------------------------------------------------------------------------------- operator
@torch.library.custom_op("vblackwell::fp4_quantize", mutates_args=())
def fp4_quantize(
    weight: Tensor, format_name: str, method: str = "mse", per_row: bool = False, *, implementations: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the cheapest implementation that takes this case, on the weight's device, without waiting for it.

    Args:
        weight, format_name, method, per_row: those of :func:`quantize`.
        implementations: the option of that name; see :mod:`vbcompile.kernels.registry`.

    Returns:
        The fields of that name of :class:`vbcompile.kernels.fp4.PackedWeight`. A block that holds NaN or infinity (as
        float32) has the scale of NaN; nothing is promised for the rest of its row.

    Raises:
        ValueError: unknown format or method; a weight that :func:`refuse_weight` refuses.
    """
    fmt = fp4_format(format_name)
    scale_rule(fmt, method)
    if refusal := refuse_weight(weight, fmt):
        raise ValueError(f"fp4_quantize: {refusal}")
    case = Fp4QuantizeCase(weight.dtype, weight.shape[-1], format_name, method, per_row and fmt.has_tensor_scale)
    chosen = choose(get_target(weight.device), case, implementations).implementation
    with on_device(weight.device):
        codes, block_scales, tensor_scale = chosen.run(weight.detach(), format_name, method, case.per_row)
    return codes, block_scales, tensor_scale


@fp4_quantize.register_fake
def _(weight, format_name, method="mse", per_row=False, *, implementations=""):
    fmt, lead = fp4_format(format_name), weight.shape[:-1]
    blocks = (weight.shape[-1] + fmt.block_size - 1) // fmt.block_size
    codes = weight.new_empty([*lead, blocks * fmt.block_size // 2], dtype=torch.uint8)
    own = per_row and fmt.has_tensor_scale
    scale = weight.new_empty(lead if own else [*lead[:-1], 1], dtype=torch.float32)
    return codes, weight.new_empty([*lead, blocks], dtype=torch.uint8), scale


operator("fp4_quantize").register(Implementation("reference", quantize_reference, never_refuses, last_resort))


def rounded(
    weight: Tensor, format_name: str, method: str = "mse", per_row: bool = False, implementations: str = ""
) -> PackedWeight:
    """:func:`fp4_quantize` as a packed weight, whose value is NaN in blocks that hold NaN or infinity."""
    codes, block_scales, tensor_scale = fp4_quantize(
        weight, format_name, method, per_row, implementations=implementations
    )
    return PackedWeight(codes, block_scales, tensor_scale, format_name, tuple(weight.shape))


# -------------------------------------------------------------------------------------------------------------- weights
def quantize(
    weight: Tensor,
    format_name: str = "nvfp4",
    *,
    method: str = "mse",
    per_row: bool = False,
    block_size: int | None = None,
    name: str = "weight",
    implementations: str = "",
) -> PackedWeight:
    """Pack ``weight`` on its own device; scratch is a few MiB on a CPU, up to 200 MiB on an accelerator, at any size.

    Args:
        weight: ``[N, K]`` or a stack of experts ``[E, N, K]``, any strides; float64, float32, bfloat16 or float16.
        format_name: ``nvfp4`` or ``mxfp4``.
        method: how block scales are chosen, see the module.
        per_row: NVFP4 gets one tensor scale a row instead of one a matrix; for rows of very different magnitude.
        block_size: checked against the format's when given.
        name: what errors call the weight.
        implementations: the option of that name; see :mod:`vbcompile.kernels.registry`.

    Returns:
        The packed weight; K is padded with zeros to whole blocks.

    Raises:
        ValueError: unknown format, method or block size; a weight that is not of these shapes and dtypes, has a row
            shorter than a block, holds NaN or infinity, or has no data (``meta``).
    """
    try:
        fmt = fp4_format(format_name, block_size)
        scale_rule(fmt, method)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if refusal := refuse_weight(weight, fmt):
        raise ValueError(f"{name}: {refusal}")
    with torch.no_grad():
        packed = rounded(weight, format_name, method, per_row, implementations)
        if bool((packed.block_scales > fmt.largest_scale).any()):
            raise ValueError(f"{name}: holds NaN or infinity (as float32), which FP4 cannot represent")
    return packed


def refuse_weight(weight: Tensor, fmt: Fp4Format) -> str | None:
    """Why ``weight`` cannot be packed, judged without reading its data; None where it can."""
    if weight.is_meta:
        return "the weight is on the meta device and has no data; load or initialise it first"
    if weight.dtype not in _SOURCE_DTYPES:
        return f"{weight.dtype} weights cannot be quantized; valid: {', '.join(map(str, _SOURCE_DTYPES))}"
    if weight.layout != torch.strided:
        return f"the weight is {weight.layout}, not dense"
    if weight.ndim not in (2, 3) or weight.numel() == 0:
        return f"shape {list(weight.shape)} is not a matrix [N, K] or a stack [E, N, K] with elements"
    if weight.shape[-1] < fmt.block_size:
        return f"K = {weight.shape[-1]} is too small: {fmt.name} has blocks of {fmt.block_size} elements"
    return None


def relative_error(weight: Tensor, packed: PackedWeight) -> float:
    """``|weight - dequantize(packed)| / |weight|`` (Frobenius norms), 0 for zeros; waits for the device once."""
    parts = [
        torch.hstack(norms(rows - decode_rows(packed, start, stop), rows)) for start, stop, rows in row_chunks(weight)
    ]
    error = total = 0.0
    for peak, error_norm, norm in torch.stack(parts).tolist():  # products of these may not fit float32
        error, total = math.hypot(error, peak * error_norm), math.hypot(total, peak * norm)
    return error / total if total else 0.0
