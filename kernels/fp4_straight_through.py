"""Training with FP4 weights in mind: ``vblackwell::fp4_fake_quantize`` rounds a master weight in every forward.

    out = dequantize(quantize(weight)),   grad_weight = grad_out   (straight-through estimator, arXiv 1308.3432)

The values are exactly those that the trained weight has once it is packed; the gradient passes as if nothing had been
rounded, so the optimizer moves the master weight.
"""

from typing import Any

import torch
from torch import Tensor

from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_quantize import pack_finite, refuse_weight, row_maxima


@torch.library.custom_op("vblackwell::fp4_fake_quantize", mutates_args=())
def fp4_fake_quantize(weight: Tensor, format_name: str, transposed: bool) -> Tensor:
    """The FP4 values of ``weight``, in its shape and dtype, contiguous. Does not wait for the device.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, with ``transposed`` ``[..., K, N]``; floating point.
        format_name: ``nvfp4`` or ``mxfp4``.
        transposed: whether blocks run along the last dimension but one.

    Returns:
        The values; all NaN where the weight holds NaN or infinity.

    Raises:
        ValueError: unknown format, or a weight that cannot be packed.
    """
    fmt = fp4_format(format_name)
    oriented = weight.transpose(-2, -1) if transposed else weight
    if reason := refuse_weight(oriented, fmt):
        raise ValueError(f"fp4_fake_quantize: {reason}")
    finite = torch.isfinite(row_maxima(oriented)).all()
    safe = torch.where(finite, oriented, 0)
    values = dequantize(pack_finite(safe, row_maxima(safe), fmt, "mse"), weight.dtype)
    values.masked_fill_(~finite, torch.nan)
    return (values.transpose(-2, -1) if transposed else values).contiguous()


@fp4_fake_quantize.register_fake
def _(weight, format_name, transposed):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


fp4_fake_quantize.register_autograd(_backward)
