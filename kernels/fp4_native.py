"""FP4 weights on hardware that multiplies or decodes FP4 itself. Compiled ahead of time: it has run on no such card.

``native``
    W4A4, with ``fp4_activations="fp4"`` alone: x is rounded to the weight's format too, nearest codes, scales from the
    largest magnitude of a block (OCP for MXFP4; NVFP4 with a float32 scale a row besides), and FP4 is multiplied by
    FP4. Gaussian layers keep 18.0 dB of signal to noise with NVFP4 and 15.9 dB with MXFP4, of 21.8 and 19.1 dB.
``native_decode``
    MXFP4 weights times 16-bit activations on gfx950, whose instructions decode E2M1 with its scale.
``reference_fp4``
    The meaning of the first in plain PyTorch, on every device; never the cheapest, so that it has to be asked for by
    ``VB_IMPLEMENTATION=fp4_linear=reference_fp4`` besides.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.kernels.fp4_costs import roofline
from vbcompile.kernels.fp4_epilogue import epilogue_options, out_features
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import TILE, dequantize_weight, rows_of
from vbcompile.kernels.fp4_linear import Fp4LinearCase
from vbcompile.kernels.fp4_linear_triton import TileConfig, split_columns, with_splits
from vbcompile.kernels.fp4_quantize import rounded
from vbcompile.kernels.registry import Implementation, forced_implementation, last_resort, operator
from vbcompile.kernels.triton_target import refuses_triton

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_MEMORY_SHARE, _COMPUTE_SHARE = 0.8, 0.5  # guessed: nobody has measured
_MOST_DECODED_ROWS = 64
_FP4_RATE = 4.0  # of bfloat16's


# ------------------------------------------------------------------------------------------------------------- refusals
def multiplies_fp4(target: Target, format_name: str) -> bool:
    """Whether a target multiplies FP4 of a format by FP4, through Triton."""
    if refuses_triton(target):
        return False
    capability = target.compute_capability
    if target.vendor == "nvidia":
        return capability is not None and capability[0] in (10, 12)
    return target.arch == "gfx950" and format_name == "mxfp4"


def decodes_fp4(target: Target, format_name: str) -> bool:
    """Whether a target's instructions decode FP4 of a format to 16-bit floats."""
    return not refuses_triton(target) and target.arch == "gfx950" and format_name == "mxfp4"


def native_layout(
    target: Target, format_name: str, activations: str, dtype: torch.dtype, rows: int | None
) -> str | None:
    """The layout for these kernels where they will run, else None; other kernels do not read it.

    ``rows`` of x, None if unknown: with many, decoding to scratch memory is estimated to be faster.
    """
    wanted = forced_implementation("fp4_linear")
    if dtype not in _KINDS or wanted not in (None, "native", "native_decode"):
        return None
    if activations == "fp4" and multiplies_fp4(target, format_name):
        return "plain"
    few = rows is not None and rows <= _MOST_DECODED_ROWS
    return "plain" if few and decodes_fp4(target, format_name) else None


def _refuses_native(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    if case is None:
        able = multiplies_fp4(target, "mxfp4")
        return None if able else f"{target.arch} does not multiply FP4 by FP4 (sm_100, sm_120 and gfx950 do)"
    if case.activations != "fp4":
        return "rounds activations to FP4, which was not asked for"
    if not multiplies_fp4(target, case.format_name):
        return f"{target.arch} does not multiply {case.format_name}"
    return _refuses_case(case)


def _refuses_decode(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    if case is None:
        return None if decodes_fp4(target, "mxfp4") else f"{target.arch} does not decode FP4 in hardware (gfx950 does)"
    if not decodes_fp4(target, case.format_name):
        return f"{target.arch} does not decode {case.format_name}"
    return _refuses_case(case)


def _refuses_case(case: Fp4LinearCase) -> str | None:
    if case.layout != "plain":
        return f"reads the plain layout, not {case.layout}"
    if case.dtype not in _KINDS:
        return f"takes float16 and bfloat16, not {case.dtype}"
    return "there are no rows" if case.m == 0 else None


def _refuses_reference(target: Target, case: Fp4LinearCase | None) -> str | None:
    asked = case is None or case.activations == "fp4"
    return None if asked else "rounds activations to FP4, which was not asked for"


# ------------------------------------------------------------------------------------------------------------ reference
def round_rows(x: Tensor, format_name: str) -> PackedWeight:
    """``x [m, k]`` as W4A4 rounds it, by the operator ``fp4_quantize``."""
    return rounded(x, format_name, "nearest", per_row=True)


def product_reference(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """The product of x and the weight, both in FP4, summed in float32 (float64 for float64)."""
    work = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize_weight(codes, block_scales, row_scale, k, format_name, layout, work)
    rows = x.reshape(-1, k).to(work)
    out = rows.new_empty(0, row_scale.shape[0])
    if rows.shape[0]:
        values = dequantize(round_rows(rows, format_name), work)
        out = F.linear(values, weight, None if bias is None else bias.to(work))
    return out.to(x.dtype).view(*x.shape[:-1], row_scale.shape[0])


# ------------------------------------------------------------------------------------------------------------- launches
def native_config(target: Target, m: int, n: int, k: int, rounded: bool) -> TileConfig:
    """The tile shape for ``x [m, k]`` and a weight ``[n, k]``: those that compile without spills, untimed."""
    stages = 2 if target.vendor == "amd" else 3
    if m <= 16:
        config = TileConfig(16, 2, 4 if rounded else 2, 1, 4, stages)
    elif m <= 128:
        config = TileConfig(64, 2, 2, 1, 8, stages)
    else:  # enough tiles; adding up splits of this one takes more registers than sm_120 has
        return TileConfig(128, 2, 2, 1, 8, stages)
    return with_splits(config, target, m, n, -(-k // (config.columns * TILE)) * config.columns)


def launch_options(format_name: str, kind: str, config: TileConfig, epilogue: str) -> dict[str, Any]:
    """Constants and compiler options of a launch; kind of x: ``e2m1``, ``bf16`` or ``fp16``."""
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.rows * TILE, "BLOCK_K": config.columns * TILE,
        "BLOCK": fp4_format(format_name).block_size, "KIND": kind, "STAGES": config.stages, "num_warps": config.warps,
        **epilogue_options(epilogue),
    }  # fmt: skip


def product(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, four_bits: bool = False, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """``epilogue(x [..., k] @ weight.T + bias)`` in the dtype of x, plain layout; ``four_bits``: x in FP4 too."""
    from vbcompile.kernels.fp4_native_kernels import fp4_native_kernel

    rows = rows_of(x, k)
    left = (rows, codes, row_scale)
    if four_bits:
        packed = round_rows(rows, format_name)
        left = (packed.codes, packed.block_scales, packed.tensor_scale)
    m, n = rows.shape[0], row_scale.shape[0]
    config = native_config(get_target(x.device), 1 << (m - 1).bit_length(), n, k, four_bits)
    out = torch.empty(m, out_features(n, epilogue), dtype=x.dtype, device=x.device)
    grid, steps_each, partial, arrived = split_columns(config, -(-k // (config.columns * TILE)), m, n, out)
    fp4_native_kernel[grid](
        *left, codes, block_scales, row_scale, row_scale if bias is None else bias, out, partial, arrived, m, n, k,
        rows.stride(0), steps_each, grid[1], SPLIT=grid[1] > 1, BIAS=bias is not None,
        **launch_options(format_name, "e2m1" if four_bits else _KINDS[x.dtype], config, epilogue),
    )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])


def product_fp4(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """:func:`product` with x rounded to FP4."""
    return product(x, codes, block_scales, row_scale, bias, k, format_name, layout, True, epilogue)


# ------------------------------------------------------------------------------------------------------ implementations
def _native_cost(target: Target, case: Fp4LinearCase) -> float:
    rounding = 3 * case.m / case.n  # bytes a weight: x is read, a quarter of it written
    return roofline(case, _MEMORY_SHARE, _COMPUTE_SHARE, faster=_FP4_RATE, before=rounding)


def _decode_cost(target: Target, case: Fp4LinearCase) -> float:
    return roofline(case, _MEMORY_SHARE, _COMPUTE_SHARE)


for _name, _run, _refuses, _cost, _options in (
    ("native", product_fp4, _refuses_native, _native_cost, frozenset({"epilogue"})),
    ("native_decode", product, _refuses_decode, _decode_cost, frozenset({"epilogue"})),
    ("reference_fp4", product_reference, _refuses_reference, last_resort, frozenset()),
):
    operator("fp4_linear").register(Implementation(_name, _run, _refuses, _cost, _options))
