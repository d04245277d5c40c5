"""Triton implementations of the FP4 linear layer, and what they cost beside the vendor's bfloat16 product.

Costs are in units of the time of that product for the same shape, so a cost above 1 means slower than the unpacked
weight. They are estimates for a device with about 260 bfloat16 operations a byte of memory traffic, as data-centre
accelerators have; shapes that were measured (:mod:`vbcompile.kernels.fp4_tuning`) cost what was measured.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels import fp4_linear_few, fp4_linear_fp8, fp4_linear_hopper, fp4_linear_triton, fp4_tuning
from vbcompile.kernels.fp4_costs import BALANCE, bits_per_weight, dense, roofline
from vbcompile.kernels.fp4_linear import Fp4LinearCase
from vbcompile.kernels.registry import Implementation, operator
from vbcompile.kernels.triton_target import refuses_triton

# shares of a device's memory bandwidth and matrix rate that kernels reach
_MEMORY_SHARE = 0.8
_HOPPER_FP8_SHARE = 0.6
_FP8_SHARE = 0.8  # of the vendor's product


def _fused(memory_share: float, compute_share: float) -> Callable[[Target, Fp4LinearCase], float]:
    return lambda target, case: roofline(case, memory_share, compute_share)


def _measured_or(name: str, estimate: Callable[[Target, Fp4LinearCase], float]) -> Callable[..., float]:
    """The cost from the tables of measured times where they have the shape, else the estimate."""

    def cost(target: Target, case: Fp4LinearCase) -> float:
        measured = None
        if case.dtype in (torch.float16, torch.bfloat16):
            measured = fp4_tuning.relative_cost(target, name, case.format_name, case.n, case.k, case.m)
        return estimate(target, case) if measured is None else measured

    return cost


def _refuses_hopper(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    if case is None:
        return None if target.arch == "sm_90" else f"written for sm_90, this is {target.arch}"
    if case.m == 0:
        return "there are no rows"
    return fp4_linear_hopper.refuses_wide(target, case.dtype, case.n, case.k, case.layout)


def _refuses_hopper_fp8(target: Target, case: Fp4LinearCase | None) -> str | None:
    return _refuses_hopper(target, case) or _refuses_fp8(target, case)


def _hopper_fp8_cost(target: Target, case: Fp4LinearCase) -> float:
    return roofline(case, _MEMORY_SHARE, _HOPPER_FP8_SHARE, faster=2, before=_rounding(case))


def _rounding(case: Fp4LinearCase) -> float:
    """Bytes per weight that rounding x to FP8 moves: reading it and writing half as much."""
    return 3 * case.m / case.n


def _refuses_few(target: Target, case: Fp4LinearCase | None) -> str | None:
    if case is None:
        return fp4_linear_few.refuses_target(target)
    return fp4_linear_few.refuses_few(target, case.dtype, case.m, case.k, case.layout)


def _refuses_diagonal(target: Target, case: Fp4LinearCase | None) -> str | None:
    if case is None:
        return fp4_linear_few.refuses_diagonal_target(target)
    known = target, case.dtype, case.m, case.k, case.layout
    return fp4_linear_few.refuses_few(*known) or fp4_linear_few.refuses_diagonal(*known)


def _refuses_stream(target: Target, case: Fp4LinearCase | None) -> str | None:
    if case is None:
        return fp4_linear_few.refuses_diagonal_target(target)
    known = target, case.dtype, case.m, case.k, case.layout
    return fp4_linear_few.refuses_few(*known) or fp4_linear_few.refuses_stream(*known)


def _dequantize_cost(target: Target, case: Fp4LinearCase) -> float:
    size = case.dtype.itemsize
    decode = (bits_per_weight(case.format_name) / 8 + size) / _MEMORY_SHARE
    return (decode + dense(case.m, size)) / dense(case.m)


def _fp8_cost(target: Target, case: Fp4LinearCase) -> float:
    decode = (bits_per_weight(case.format_name) / 8 + 1) / _MEMORY_SHARE
    product = dense(case.m, 1, 2 * BALANCE * _FP8_SHARE)
    return (decode + _rounding(case) + product) / dense(case.m)


def _refuses_fp8(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    if case is None:
        return None if fp4_linear_fp8.multiplies_fp8(target) else fp4_linear_fp8.NEEDS
    return fp4_linear_fp8.refuses_fp8(target, case.dtype, case.n, case.k, case.layout, case.activations)


def _refuses_product(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    return None if case is None else fp4_linear_triton.refuses_product(target, case.dtype, case.m, case.layout)


def _refuses_dequantize(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    if case is None:
        return None
    if case.layout == "plain":
        return "the weight is in the plain layout"
    if case.layout.endswith("t") and target.vendor != "nvidia":
        return f"layout {case.layout} is NVIDIA's"
    if target.vendor == "cpu" and case.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return "no kernel for float64" if case.dtype == torch.float64 else None


def dequantize_product(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """Decode the weight to scratch memory, then the vendor's product."""
    weight = fp4_linear_triton.dequantize(codes, block_scales, row_scale, k, format_name, layout, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def dequantize_backward(
    grad: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str
) -> Tensor:
    """Decode the weight to scratch memory, then ``grad @ weight``."""
    return grad @ fp4_linear_triton.dequantize(codes, block_scales, row_scale, k, format_name, layout, grad.dtype)


_OWN_EPILOGUE = frozenset({"epilogue"})
for _name, _run, _refuses, _cost, _options in (
    ("triton_diagonal", fp4_linear_few.product_diagonal, _refuses_diagonal, _fused(0.9, math.inf), _OWN_EPILOGUE),
    ("triton_stream", fp4_linear_few.product_stream, _refuses_stream, _fused(0.82, 0.3), _OWN_EPILOGUE),
    ("triton_few", fp4_linear_few.product_few, _refuses_few, _fused(0.85, 0.08), _OWN_EPILOGUE),
    ("hopper", fp4_linear_hopper.product_wide, _refuses_hopper, _fused(_MEMORY_SHARE, 0.75), _OWN_EPILOGUE),
    ("hopper_fp8", fp4_linear_hopper.product_wide_fp8, _refuses_hopper_fp8, _hopper_fp8_cost, _OWN_EPILOGUE),
    ("triton", fp4_linear_triton.product, _refuses_product, _fused(_MEMORY_SHARE, 0.6), _OWN_EPILOGUE),
    ("triton_dequantize", dequantize_product, _refuses_dequantize, _dequantize_cost, frozenset()),
    ("triton_fp8", fp4_linear_fp8.product_fp8, _refuses_fp8, _fp8_cost, frozenset()),
):
    operator("fp4_linear").register(
        Implementation(_name, _run, _refuses, _measured_or(_name, _cost), _options, replays=True)
    )
operator("fp4_linear_backward").register(
    Implementation("triton_dequantize", dequantize_backward, _refuses_dequantize, _dequantize_cost, replays=True),
)
