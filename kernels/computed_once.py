"""The operator ``vblackwell::computed_once``: its argument, copied, where a compiler must not compute it anew.

Inductor puts the computation of an elementwise value into every kernel that reads it. What is behind this operator is
computed into memory once.
"""

from typing import Any

import torch
from torch import Tensor

from vbcompile.kernels.quick_operator import quick_operator


@quick_operator("vblackwell::computed_once")
def computed_once(x: Tensor) -> Tensor:
    """A copy of x, contiguous."""
    return x.clone(memory_format=torch.contiguous_format)


@computed_once.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad


computed_once.register_autograd(_backward)
