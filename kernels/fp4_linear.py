"""The logical operator ``vblackwell::fp4_linear``: a linear layer whose weight is packed FP4.

    out = epilogue(x @ weight.T + bias),   weight[n, k] = code[n, k] * block_scale[n, k // block] * row_scale[n]

``x [..., K]`` in float16, bfloat16, float32 or float64; the weight in one of the layouts of
:mod:`vbcompile.kernels.fp4_layout`; ``out [..., N]`` in the dtype of x, contiguous, accumulated in float32 (float64 for
float64). The epilogue is an activation or the gate of a SwiGLU (:mod:`vbcompile.kernels.fp4_epilogue`). The weight is
frozen: gradients are with respect to x and bias, exact ones of the decoded weight, and nothing but the packed weight is
kept for them; there is none through an epilogue.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.config import FP4_ACTIVATIONS
from vbcompile.device import Target, get_target
from vbcompile.kernels.compiled_calls import OPERATORS, RepeatedOperator
from vbcompile.kernels.fp4_epilogue import apply_epilogue, check_epilogue, out_features
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import check_operands, dequantize_weight
from vbcompile.kernels.quick_operator import quick_operator
from vbcompile.kernels.registry import (
    Choice,
    Implementation,
    forced_implementation,
    last_resort,
    never_refuses,
    operator,
    to_be_run,
)
from vbcompile.kernels.triton_target import interpreted, on_device, refuses_triton


@dataclass(frozen=True)
class Fp4LinearCase:
    """What an implementation is chosen by.

    Attributes:
        dtype: of x.
        m: rows of x, rounded up to a power of two; 0 for none.
        n, k: rows and columns of the weight.
        activations: what x may be rounded to on the way: ``same``, nothing, or ``fp8``.
    """

    dtype: torch.dtype
    m: int
    n: int
    k: int
    format_name: str
    layout: str
    activations: str = "same"


def make_case(
    dtype: torch.dtype, rows: int, n: int, k: int, format_name: str, layout: str, activations: str = "same"
) -> Fp4LinearCase:
    """The case of ``rows`` rows of x."""
    return Fp4LinearCase(dtype, 1 << (rows - 1).bit_length() if rows else 0, n, k, format_name, layout, activations)


def choose(target: Target, case: Fp4LinearCase, asked: str = "") -> Choice:
    """The implementation that runs a case on a target."""
    return operator("fp4_linear").choose(target, case, asked)


# ------------------------------------------------------------------------------------------------------------ reference
def fp4_linear_reference(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """The meaning of the operator in plain PyTorch: decode the weight to the dtype of x, then its own linear layer."""
    weight = dequantize_weight(codes, block_scales, row_scale, k, format_name, layout, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def fp4_linear_backward_reference(
    grad: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str
) -> Tensor:
    """``grad @ weight`` in plain PyTorch, the weight decoded to the dtype of grad."""
    return grad @ dequantize_weight(codes, block_scales, row_scale, k, format_name, layout, grad.dtype)


# ------------------------------------------------------------------------------------------------------------- operator
@quick_operator("vblackwell::fp4_linear")
def fp4_linear(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    k: int,
    format_name: str,
    layout: str,
    activations: str = "same",
    epilogue: str = "none",
    *,
    implementations: str = "",
) -> Tensor:
    """Run the cheapest implementation that takes this case; see the module's docstring for the meaning.

    Args:
        x: ``[..., K]``, any strides, any number of leading axes, possibly empty.
        codes, block_scales: uint8, shaped as the layout says.
        row_scale: float32 ``[N]``.
        bias: ``[N]``, floating point, or None.
        k: K.
        format_name: ``nvfp4`` or ``mxfp4``.
        layout: one of :data:`vbcompile.kernels.fp4_layout.LAYOUTS`.
        activations: ``same`` multiplies x as it is; ``fp8`` allows implementations that round x and the decoded weight
            to E4M3 with a scale a row (about 0.6 dB of the weight's own error), where that is faster.
        epilogue: one of :data:`vbcompile.kernels.fp4_epilogue.EPILOGUES`; gated ones want the weight's rows in turns.
        implementations: the option of that name, for the gradient too; see :mod:`vbcompile.kernels.registry`.

    Raises:
        ValueError: unknown format, layout or kind of activations; shapes, dtypes or devices that do not fit together.
    """

    def run() -> Tensor:
        check_operands(x, codes, block_scales, row_scale, bias, k, layout, fp4_format(format_name).block_size)
        if activations not in FP4_ACTIVATIONS:
            raise ValueError(f"unknown activations {activations!r}; valid: {', '.join(FP4_ACTIVATIONS)}")
        n = row_scale.shape[0]
        check_epilogue(n, epilogue)
        case = make_case(x.dtype, math.prod(x.shape[:-1]), n, k, format_name, layout, activations)
        chosen = to_be_run(choose(get_target(x.device), case, implementations))
        arguments = (x, codes, block_scales, row_scale, bias, k, format_name, layout)
        with on_device(x.device):
            if epilogue == "none":
                return chosen.run(*arguments).contiguous()
            if "epilogue" in chosen.options:
                return chosen.run(*arguments, epilogue=epilogue).contiguous()
            return _apply(chosen.run(*arguments).contiguous(), epilogue)

    given = x, codes, block_scales, row_scale, bias, k, format_name, layout, activations, epilogue, implementations
    return OPERATORS["fp4_linear"].remembered(run, *given)


OPERATORS["fp4_linear"] = RepeatedOperator("fp4_linear", fp4_linear, lambda x: forced_implementation("fp4_linear"))


def _apply(y: Tensor, epilogue: str) -> Tensor:
    """The epilogue of a product that came without it."""
    if refuses_triton(get_target(y.device)) or y.dtype in (torch.float64, torch.bfloat16 if interpreted() else None):
        return apply_epilogue(y, epilogue)
    from vbcompile.kernels.fp4_epilogue_kernels import epilogue_alone

    return epilogue_alone(y, epilogue)


@fp4_linear.register_fake
def _(
    x, codes, block_scales, row_scale, bias, k, format_name, layout, activations="same", epilogue="none", *,
    implementations="",
):  # fmt: skip
    return x.new_empty([*x.shape[:-1], out_features(row_scale.shape[0], epilogue)])


@quick_operator("vblackwell::fp4_linear_backward")
def fp4_linear_backward(
    grad: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str,
    *, implementations: str = "",
) -> Tensor:  # fmt: skip
    """Gradient with respect to x, ``[..., K]``, of ``grad [..., N]`` through the decoded weight."""

    def run() -> Tensor:
        rows, n = math.prod(grad.shape[:-1]), row_scale.shape[0]
        case = make_case(grad.dtype, rows, n, k, format_name, layout)
        choice = operator("fp4_linear_backward").choose(get_target(grad.device), case, implementations)
        with on_device(grad.device):
            return to_be_run(choice).run(grad, codes, block_scales, row_scale, k, format_name, layout).contiguous()

    given = grad, codes, block_scales, row_scale, k, format_name, layout
    return OPERATORS["fp4_linear_backward"].remembered(run, *given, implementations)


OPERATORS["fp4_linear_backward"] = RepeatedOperator(
    "fp4_linear_backward", fp4_linear_backward, lambda grad: forced_implementation("fp4_linear_backward")
)


@fp4_linear_backward.register_fake
def _(grad, codes, block_scales, row_scale, k, format_name, layout, *, implementations=""):
    return grad.new_empty([*grad.shape[:-1], k])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    _, codes, block_scales, row_scale, bias, ctx.k, ctx.format_name, ctx.layout, _, epilogue = inputs
    ctx.implementations = keyword_only_inputs["implementations"]
    if epilogue != "none":
        raise NotImplementedError(f"fp4_linear has no gradient through its epilogue {epilogue}")
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(codes, block_scales, row_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, block_scales, row_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = codes, block_scales, row_scale
        arguments = ctx.k, ctx.format_name, ctx.layout
        grad_x = fp4_linear_backward(grad, *weight, *arguments, implementations=ctx.implementations)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(tuple(range(grad.ndim - 1))).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None, None


fp4_linear.register_autograd(_backward, setup_context=_setup_context)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    _, codes, block_scales, row_scale, ctx.k, ctx.format_name, ctx.layout = inputs
    ctx.implementations = keyword_only_inputs["implementations"]
    ctx.save_for_backward(codes, block_scales, row_scale)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient is linear in ``grad``, so its own gradient is the product without bias."""
    codes, block_scales, row_scale = ctx.saved_tensors
    twice = fp4_linear(
        grad, codes, block_scales, row_scale, None, ctx.k, ctx.format_name, ctx.layout,
        implementations=ctx.implementations,
    )  # fmt: skip
    return twice, None, None, None, None, None, None


fp4_linear_backward.register_autograd(_double_backward, setup_context=_backward_setup)


# ------------------------------------------------------------------------------------------------------ implementations
operator("fp4_linear").register(Implementation("reference", fp4_linear_reference, never_refuses, last_resort))
operator("fp4_linear_backward").register(
    Implementation("reference", fp4_linear_backward_reference, never_refuses, last_resort)
)
