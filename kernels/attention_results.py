"""Results of the attention operators: the output's memory order, gradients in the shapes of their inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vbcompile.kernels.quick_operator import quick_operator


def empty_output(lead: Sequence[Any], rows: Any, width: Any, rows_first: bool, like: Tensor) -> Tensor:
    """Uninitialised ``[*lead, rows, width]``; in memory ``[lead[0], rows, *lead[1:], width]`` if ``rows_first``.

    Sizes may be symbolic; dtype and device are those of ``like``.
    """
    shape = [*lead, rows, width]
    if not rows_first:
        return like.new_empty(shape)
    strides: list[Any] = [1]
    for size in reversed((rows, *lead[1:], width)):  # from the innermost axis out
        strides.append(strides[-1] * (max(size, 1) if type(size) is int else size))
    outer, of_rows, *of_lead, _ = reversed(strides)
    return like.new_empty_strided(shape, [outer, *of_lead, of_rows, 1])


def arrange(out: Tensor, rows_first: bool) -> Tensor:
    """``[*lead, Q, Dv]`` in the promised memory order, copied only where it lies otherwise."""
    if not rows_first:
        return out.contiguous()
    return out.movedim(-2, 1).contiguous().movedim(1, -2)


def sum_to(gradient: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Sum over the axes along which a tensor of ``shape`` was broadcast, then convert to ``dtype`` if given."""
    axes = [d for d, (have, want) in enumerate(zip(gradient.shape, shape, strict=True)) if want == 1 and have != 1]
    summed = gradient.sum(axes, keepdim=True) if axes else gradient
    return summed if dtype is None else summed.to(dtype)


@quick_operator("vblackwell::copy")
def copy(x: Tensor) -> Tensor:
    """A copy with the strides of ``x`` that no compiler takes away: one of the two is saved, the other written to."""
    return torch.empty_like(x).copy_(x)


@copy.register_fake
def _(x):
    return torch.empty_like(x)


copy.register_autograd(lambda ctx, gradient: gradient)
