"""The logical operator ``vblackwell::fp4_grouped_linear``: rows of x, sorted by expert, times that expert's FP4 weight.

    out[r] = weight[e] @ x[r]   for ends[e - 1] <= r < ends[e]

x ``[T, K]`` in float16, bfloat16, float32 or float64; ends int32 ``[E]``, not decreasing, the last one at most T, on
the device of x, as ``torch.nn.functional.grouped_mm`` takes them; the weights a stack of E matrices ``[N, K]`` in one
layout of :mod:`vbcompile.kernels.fp4_layout`; out ``[T, N]`` in the dtype of x, zero in rows past the last end. The
weights are frozen: the gradient is with respect to x. No implementation for an accelerator waits for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels import fp4_linear_triton
from vbcompile.kernels.fp4 import PackedWeight, row_scales
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import TILE, LinearWeight, check_operands, dequantize_weight, rows_of, to_layout
from vbcompile.kernels.registry import Implementation, always, last_resort, never_refuses, operator
from vbcompile.kernels.triton_target import on_device, refuses_triton

_MOST_EXPERTS = 1024


@dataclass(frozen=True)
class Fp4GroupedCase:
    """What an implementation is chosen by: dtype of x, its rows rounded up to a power of two, shape of the stack."""

    dtype: torch.dtype
    rows: int
    experts: int
    n: int
    k: int
    format_name: str
    layout: str


def to_grouped_layout(packed: PackedWeight, layout: str) -> LinearWeight:
    """A packed stack of experts ``[E, N, K]`` in ``layout``: each tensor with an axis for the expert in front.

    Raises:
        ValueError: not a stack, or as :func:`vbcompile.kernels.fp4_layout.to_layout` for one of its matrices.
    """
    if len(packed.shape) != 3:
        raise ValueError(f"fp4_grouped_linear takes a stack of experts [E, N, K], not {list(packed.shape)}")
    scales = row_scales(packed)
    parts = [
        to_layout(PackedWeight(codes, blocks, scale, packed.format_name, packed.shape[1:]), layout)
        for codes, blocks, scale in zip(packed.codes, packed.block_scales, scales, strict=True)
    ]
    codes, blocks, scale = (torch.stack(tensors) for tensors in zip(*(p.tensors for p in parts), strict=True))
    return LinearWeight(codes, blocks, scale, packed.shape[2], packed.format_name, layout)


# ------------------------------------------------------------------------------------------------------------- operator
@torch.library.custom_op("vblackwell::fp4_grouped_linear", mutates_args=())
def fp4_grouped_linear(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, ends: Tensor, k: int, format_name: str,
    layout: str, *, implementations: str = "",
) -> Tensor:  # fmt: skip
    """Run the cheapest implementation that takes this case; see the module's docstring for the meaning.

    Args:
        x: ``[T, K]``.
        codes, block_scales: uint8, shaped as the layout says, with an axis E in front.
        row_scale: float32 ``[E, N]``.
        ends: int32 ``[E]``.
        implementations: the option of that name; see :mod:`vbcompile.kernels.registry`.

    Raises:
        ValueError: unknown format or layout; shapes, dtypes or devices that do not fit together.
    """
    _check(x, codes, block_scales, row_scale, ends, k, format_name, layout)
    case = _case(x, row_scale, k, format_name, layout)
    choice = operator("fp4_grouped_linear").choose(get_target(x.device), case, implementations)
    with on_device(x.device):
        return choice.implementation.run(x, codes, block_scales, row_scale, ends, k, format_name, layout).contiguous()


@fp4_grouped_linear.register_fake
def _(x, codes, block_scales, row_scale, ends, k, format_name, layout, *, implementations=""):
    return x.new_empty([x.shape[0], row_scale.shape[1]])


@torch.library.custom_op("vblackwell::fp4_grouped_linear_backward", mutates_args=())
def fp4_grouped_linear_backward(
    grad: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, ends: Tensor, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """Gradient with respect to x, ``[T, K]``, of ``grad [T, N]`` through the decoded weights."""
    weights = _decoded(codes, block_scales, row_scale, k, format_name, layout, grad.dtype)
    return _grouped(grad, weights, ends)


@fp4_grouped_linear_backward.register_fake
def _(grad, codes, block_scales, row_scale, ends, k, format_name, layout):
    return grad.new_empty([grad.shape[0], k])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, block_scales, row_scale, ends, ctx.k, ctx.format_name, ctx.layout = inputs
    ctx.save_for_backward(codes, block_scales, row_scale, ends)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    _setup_context(ctx, inputs, output)  # the gradient is one operation, which leaves no choice


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(fp4_grouped_linear_backward, ctx, grad)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(fp4_grouped_linear, ctx, grad)


def _gradient(function: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return function(grad, *ctx.saved_tensors, ctx.k, ctx.format_name, ctx.layout), *[None] * 7


fp4_grouped_linear.register_autograd(_backward, setup_context=_setup_forward)
fp4_grouped_linear_backward.register_autograd(_double_backward, setup_context=_setup_context)


def _case(x: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str) -> Fp4GroupedCase:
    rows = 1 << (x.shape[0] - 1).bit_length() if x.shape[0] else 0
    experts, n = row_scale.shape
    return Fp4GroupedCase(x.dtype, rows, experts, n, k, format_name, layout)


def _check(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, ends: Tensor, k: int, format_name: str,
    layout: str,
) -> None:  # fmt: skip
    """Raise ValueError where operands do not fit together; values of ``ends`` are not looked at."""
    experts = ends.shape[0] if ends.ndim == 1 else -1
    if experts < 1 or ends.dtype != torch.int32 or ends.device != x.device:
        raise ValueError(f"fp4_grouped_linear: ends must be int32 [E] on {x.device}, not {ends.dtype} {ends.shape}")
    if x.ndim != 2:
        raise ValueError(f"fp4_grouped_linear: x must be [T, {k}], not {list(x.shape)}")
    for name, tensor in (("codes", codes), ("block scales", block_scales), ("row_scale", row_scale)):
        if tensor.ndim < 2 or tensor.shape[0] != experts or not tensor.is_contiguous():
            raise ValueError(f"fp4_grouped_linear: {name} must be contiguous [{experts}, ...], not {tensor.shape}")
    block = fp4_format(format_name).block_size
    check_operands(x, codes[0], block_scales[0], row_scale[0], None, k, layout, block)


# ------------------------------------------------------------------------------------------------------ implementations
def fp4_grouped_linear_reference(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, ends: Tensor, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """The meaning of the operator in plain PyTorch: decode the weights to the dtype of x, then their products."""
    weights = _decoded(codes, block_scales, row_scale, k, format_name, layout, x.dtype)
    return _grouped(x, weights.transpose(1, 2), ends)


def _decoded(
    codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str, dtype: torch.dtype
) -> Tensor:
    """The weights ``[E, N, K]``."""
    parts = zip(codes, block_scales, row_scale, strict=True)
    return torch.stack([dequantize_weight(*p, k, format_name, layout, dtype) for p in parts])


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``x [T, A]`` times ``weights [E, A, B]`` by groups of rows, ``[T, B]``."""
    vendor = x.device.type == "cuda" and x.dtype == torch.bfloat16 and weights.shape[1] % 8 == weights.shape[2] % 8 == 0
    if vendor and x.shape[0]:
        inside = torch.arange(x.shape[0], device=x.device) < ends[-1]
        return torch.where(inside[:, None], F.grouped_mm(x.contiguous(), weights, offs=ends), 0)
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    expert = torch.searchsorted(ends, row, right=True)
    out = x.new_zeros(x.shape[0], weights.shape[2])
    for e, weight in enumerate(weights):
        if x.device.type == "cpu":
            out[expert == e] = x[expert == e] @ weight
        else:  # all rows: the sizes of groups stay on the device
            out = torch.where((expert == e)[:, None], x @ weight, out)
    return out


def grouped_product(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, ends: Tensor, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """The Triton kernel: every program finds its expert from ``ends`` on the device."""
    from vbcompile.kernels.fp4_grouped_kernels import fp4_grouped_kernel

    if x.shape[0] == 0:
        return x.new_empty(0, row_scale.shape[1])
    target = get_target(x.device)
    rows = rows_of(x, k)
    (t, _), (experts, n) = rows.shape, row_scale.shape
    config = fp4_linear_triton.tile_config(target, min(128, 1 << (max(1, t // experts) - 1).bit_length()), n, k)
    out = torch.zeros(t, n, dtype=x.dtype, device=x.device)
    slots = min(t, -(-t // config.block_m) + experts)
    row_tiles, column_tiles = codes.shape[1:3]
    fp4_grouped_kernel[(-(-n // (config.rows * TILE)), slots)](
        rows, codes.view(torch.int32), block_scales, row_scale, ends, out, experts, n, k, rows.stride(0), row_tiles,
        column_tiles, EXPERTS=1 << (experts - 1).bit_length(), BLOCK_M=config.block_m, ROWS=config.rows,
        COLUMNS=config.columns, STAGES=config.stages, num_warps=config.warps,
        **fp4_linear_triton.decoding(target, format_name, layout, x.dtype),
    )  # fmt: skip
    return out


def _refuses_product(target: Target, case: Fp4GroupedCase | None) -> str | None:
    if reason := refuses_triton(target):
        return reason
    if case is None:
        return None
    if case.experts > _MOST_EXPERTS:
        return f"more than {_MOST_EXPERTS} experts"
    rows = -(-case.rows // case.experts)
    return fp4_linear_triton.refuses_product(target, case.dtype, rows, case.layout)


operator("fp4_grouped_linear").register(Implementation("triton", grouped_product, _refuses_product, always(1.0)))
operator("fp4_grouped_linear").register(
    Implementation("reference", fp4_grouped_linear_reference, never_refuses, last_resort)
)
