"""Training with FP4 weights in mind: ``vblackwell::fp4_fake_quantize`` rounds a master weight in every forward.

    out = dequantize(quantize(weight)),   grad_weight = grad_out   (straight-through estimator, arXiv 1308.3432)

The values are exactly those that the trained weight has once it is packed; the gradient passes as if nothing had been
rounded, so the optimizer moves the master weight.
"""

from typing import Any

import torch
from torch import Tensor

from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_quantize import rounded


@torch.library.custom_op("vblackwell::fp4_fake_quantize", mutates_args=())
def fp4_fake_quantize(weight: Tensor, format_name: str, transposed: bool, *, implementations: str = "") -> Tensor:
    """The FP4 values of ``weight``, in its shape and dtype, contiguous. Does not wait for the device.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, with ``transposed`` ``[..., K, N]``; floating point.
        format_name: ``nvfp4`` or ``mxfp4``.
        transposed: whether blocks run along the last dimension but one.
        implementations: the option of that name; see :mod:`vbcompile.kernels.registry`.

    Returns:
        The values; NaN throughout a block that holds NaN or infinity.

    Raises:
        ValueError: unknown format, or a weight that cannot be packed.
    """
    oriented = weight.transpose(-2, -1) if transposed else weight
    values = dequantize(rounded(oriented, format_name, implementations=implementations), weight.dtype)
    return (values.transpose(-2, -1) if transposed else values).contiguous()


@fp4_fake_quantize.register_fake
def _(weight, format_name, transposed, *, implementations=""):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


fp4_fake_quantize.register_autograd(_backward)
