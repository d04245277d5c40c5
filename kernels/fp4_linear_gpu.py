"""Triton implementations of the FP4 linear layer, and what they cost beside the vendor's bfloat16 product.

Costs are in units of the time of that product for the same shape, so a cost above 1 means slower than the unpacked
weight. They are estimates for a device with about 260 bfloat16 operations a byte of memory traffic, as data-centre
accelerators have; shapes that were measured (:mod:`vbcompile.kernels.fp4_tuning`) cost what was measured.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels import fp4_linear_few, fp4_linear_fp8, fp4_linear_hopper, fp4_linear_triton, fp4_tuning
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_linear import Fp4LinearCase
from vbcompile.kernels.registry import Implementation, operator
from vbcompile.kernels.triton_target import refuses_triton

_OPERATIONS_A_BYTE = 260.0
_MEMORY_SHARE, _COMPUTE_SHARE = 0.8, 0.6  # of the limits that the fused kernel reaches
_DIAGONAL_MEMORY_SHARE = 0.9
_STREAM_MEMORY_SHARE, _STREAM_COMPUTE_SHARE = 0.82, 0.3
_FEW_MEMORY_SHARE, _FEW_COMPUTE_SHARE = 0.85, 0.08
_HOPPER_SHARE = 0.75
_HOPPER_FP8_SHARE = 0.6
_FP8_SHARE = 0.8  # of twice the rate of bfloat16


def bits_per_weight(format_name: str) -> float:
    """Stored bits of a weight, its share of the block scale included."""
    return 4 + 8 / fp4_format(format_name).block_size


def _dense(m: int, weight_bytes: float) -> float:
    """Time of a product per weight, in bytes of memory traffic."""
    return max(weight_bytes, 2 * m / _OPERATIONS_A_BYTE)


def _product_cost(target: Target, case: Fp4LinearCase) -> float:
    stored = bits_per_weight(case.format_name) / 8
    ours = max(stored / _MEMORY_SHARE, 2 * case.m / _OPERATIONS_A_BYTE / _COMPUTE_SHARE)
    return ours / _dense(case.m, 2)


def _few_cost(target: Target, case: Fp4LinearCase) -> float:
    stored = bits_per_weight(case.format_name) / 8
    ours = max(stored / _FEW_MEMORY_SHARE, 2 * case.m / _OPERATIONS_A_BYTE / _FEW_COMPUTE_SHARE)
    return ours / _dense(case.m, 2)


def _hopper_cost(target: Target, case: Fp4LinearCase) -> float:
    stored = bits_per_weight(case.format_name) / 8
    ours = max(stored / _MEMORY_SHARE, 2 * case.m / _OPERATIONS_A_BYTE / _HOPPER_SHARE)
    return ours / _dense(case.m, 2)


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
    stored = bits_per_weight(case.format_name) / 8
    quantize = 3 * case.m / case.n
    ours = quantize + max(stored / _MEMORY_SHARE, case.m / _OPERATIONS_A_BYTE / _HOPPER_FP8_SHARE)
    return ours / _dense(case.m, 2)


def _refuses_few(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    if case is None:
        return None if target.vendor == "nvidia" else "written for NVIDIA's mma instruction"
    return fp4_linear_few.refuses_few(target, case.dtype, case.m, case.k, case.layout)


def _refuses_diagonal(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := _refuses_few(target, case):
        return reason
    return None if case is None else fp4_linear_few.refuses_diagonal(target, case.dtype, case.m, case.k, case.layout)


def _diagonal_cost(target: Target, case: Fp4LinearCase) -> float:
    return bits_per_weight(case.format_name) / 8 / _DIAGONAL_MEMORY_SHARE / _dense(case.m, 2)


def _refuses_stream(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := _refuses_few(target, case):
        return reason
    return None if case is None else fp4_linear_few.refuses_stream(target, case.dtype, case.m, case.k, case.layout)


def _stream_cost(target: Target, case: Fp4LinearCase) -> float:
    stored = bits_per_weight(case.format_name) / 8
    ours = max(stored / _STREAM_MEMORY_SHARE, 2 * case.m / _OPERATIONS_A_BYTE / _STREAM_COMPUTE_SHARE)
    return ours / _dense(case.m, 2)


def _dequantize_cost(target: Target, case: Fp4LinearCase) -> float:
    size = case.dtype.itemsize
    decode = (bits_per_weight(case.format_name) / 8 + size) / _MEMORY_SHARE
    return (decode + _dense(case.m, size)) / _dense(case.m, 2)


def _fp8_cost(target: Target, case: Fp4LinearCase) -> float:
    decode = (bits_per_weight(case.format_name) / 8 + 1) / _MEMORY_SHARE
    quantize = 3 * case.m / case.n  # bytes per weight: reading x and writing half as much
    return (decode + quantize + max(1, case.m / _OPERATIONS_A_BYTE / _FP8_SHARE)) / _dense(case.m, 2)


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
    ("triton_diagonal", fp4_linear_few.product_diagonal, _refuses_diagonal, _diagonal_cost, _OWN_EPILOGUE),
    ("triton_stream", fp4_linear_few.product_stream, _refuses_stream, _stream_cost, _OWN_EPILOGUE),
    ("triton_few", fp4_linear_few.product_few, _refuses_few, _few_cost, _OWN_EPILOGUE),
    ("hopper", fp4_linear_hopper.product_wide, _refuses_hopper, _hopper_cost, _OWN_EPILOGUE),
    ("hopper_fp8", fp4_linear_hopper.product_wide_fp8, _refuses_hopper_fp8, _hopper_fp8_cost, _OWN_EPILOGUE),
    ("triton", fp4_linear_triton.product, _refuses_product, _product_cost, _OWN_EPILOGUE),
    ("triton_dequantize", dequantize_product, _refuses_dequantize, _dequantize_cost, frozenset()),
    ("triton_fp8", fp4_linear_fp8.product_fp8, _refuses_fp8, _fp8_cost, frozenset()),
):
    operator("fp4_linear").register(
        Implementation(_name, _run, _refuses, _measured_or(_name, _cost), _options, replays=True)
    )
operator("fp4_linear_backward").register(
    Implementation("triton_dequantize", dequantize_backward, _refuses_dequantize, _dequantize_cost, replays=True),
)
