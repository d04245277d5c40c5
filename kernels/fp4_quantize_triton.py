"""Triton as an implementation of ``vblackwell::fp4_quantize``: one pass over the weight, or over activations two."""

import math
from typing import Any

import torch
from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels.fp4_formats import Fp4Format, fp4_format
from vbcompile.kernels.fp4_quantize import Fp4QuantizeCase
from vbcompile.kernels.fp4_rounding import EXACT_WEIGHT, SEARCHED, choose_tensor_scale
from vbcompile.kernels.registry import Implementation, operator
from vbcompile.kernels.triton_target import refuses_triton

METHODS = ("mse", "nearest", "fp8")
_ELEMENTS = 4096  # of a tile of rows
_SEARCHED = 2048  # of a tile whose scales are searched


def quantize(weight: Tensor, format_name: str, method: str, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and tensor scale of ``weight [..., N, K]``."""
    fmt = fp4_format(format_name)
    if method == "nearest" and (per_row or not fmt.has_tensor_scale):
        return _by_rows(weight, fmt)
    scale = choose_tensor_scale(weight, fmt, method, per_row)
    return (*_search(weight, scale, fmt, method), scale)


def _by_rows(weight: Tensor, fmt: Fp4Format) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest codes; the scale of a row, where there is one, is found on the way."""
    from vbcompile.kernels.fp4_quantize_kernels import fp4_rows_kernel

    lead, k = weight.shape[:-1], weight.shape[-1]
    rows = weight.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    codes, scales = _empty(weight, fmt)
    size = lead if fmt.has_tensor_scale else (*lead[:-1], 1)
    scale = torch.ones(size, dtype=torch.float32, device=weight.device)
    together = min(_ELEMENTS // fmt.block_size, 1 << (scales.shape[-1] - 1).bit_length())
    fp4_rows_kernel[(rows.shape[0],)](
        rows, codes, scales, scale, k, rows.stride(0), BLOCK=fmt.block_size, BLOCKS=together, num_warps=4
    )
    return codes, scales, scale


def _search(weight: Tensor, scale: Tensor, fmt: Fp4Format, method: str) -> tuple[Tensor, Tensor]:
    """Codes and block scales for a tensor scale."""
    from vbcompile.kernels.fp4_quantize_kernels import fp4_search_kernel

    stack = weight if weight.ndim == 3 else weight[None]
    codes, scales = _empty(weight, fmt)
    options = search_options(fmt, method, scales.shape[-1])
    unit = scale.expand(weight.shape[:-1]).contiguous()
    grid = (stack.shape[0] * stack.shape[1], -(-scales.shape[-1] // options["BLOCKS"]))
    fp4_search_kernel[grid](stack, unit, codes, scales, *stack.shape[1:], *stack.stride(), **options)
    return codes, scales


def search_options(fmt: Fp4Format, method: str, blocks: int) -> dict[str, Any]:
    """Constants of a launch for rows of so many blocks."""
    together = min(_SEARCHED // fmt.block_size, 1 << (blocks - 1).bit_length())
    below, above = (0, 0) if method == "nearest" else SEARCHED[fmt.name]
    return {
        "BLOCK": fmt.block_size, "BLOCKS": together, "BELOW": below, "ABOVE": above,
        "FP8": method == "fp8" and fmt.has_tensor_scale, "EXACT_WEIGHT": EXACT_WEIGHT, "num_warps": 4,
    }  # fmt: skip


def _empty(weight: Tensor, fmt: Fp4Format) -> tuple[Tensor, Tensor]:
    blocks = -(-weight.shape[-1] // fmt.block_size)
    codes = weight.new_empty(*weight.shape[:-1], blocks * fmt.block_size // 2, dtype=torch.uint8)
    return codes, weight.new_empty(*weight.shape[:-1], blocks, dtype=torch.uint8)


def _refuses(target: Target, case: Fp4QuantizeCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    if case is None:
        return None
    if case.dtype == torch.float64:
        return "computes in float32, and torch.float64 weights are rounded to it on the way by the reference alone"
    return None if case.method in METHODS else f"knows the methods {', '.join(METHODS)}, not {case.method}"


def _cost(target: Target, case: Fp4QuantizeCase) -> float:
    return math.inf if target.vendor == "cpu" else 1.0  # the interpreter: where it is asked for


operator("fp4_quantize").register(Implementation("triton", quantize, _refuses, _cost))
