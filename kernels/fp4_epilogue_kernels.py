"""Triton device code of :mod:`vbcompile.kernels.fp4_epilogue`, and the kernel that runs it alone."""

import triton
import triton.language as tl
from torch import Tensor

from vbcompile.kernels.fp4_epilogue import TURN, epilogue_options, out_features
from vbcompile.kernels.launches import launch

_BLOCK = 1024


@triton.jit
def _inverse(x, MODE: tl.constexpr):
    if MODE == "ptx":
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def _exp2(x, MODE: tl.constexpr):
    if MODE == "ptx":
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _half_erfc(x, MODE: tl.constexpr):
    """``erfc(|x| / sqrt(2)) / 2``, relative error 5e-6: a polynomial in ``t = 1 / (1 + |x| / sqrt(8))``, fitted to
    ``exp(x * x / 2) * erfc`` for the least relative error."""
    t = _inverse(1.0 + tl.abs(x) * 0.3535533905932738, MODE)
    value = 0.042450162 * t - 0.172608595
    value = value * t + 0.186646015
    value = value * t + 0.024497722
    value = value * t + 0.138710688
    value = value * t + 0.139163453
    value = value * t + 0.141139536
    return value * t * _exp2(x * x * -0.7213475204444817, MODE)


@triton.jit
def activation(x, FUNCTION: tl.constexpr, MODE: tl.constexpr):
    """An activation of float32 ``x``; FUNCTION ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``none``.

    MODE ``exact`` is for results in float32; ``quick``, for 16 bits, spares the error function, which takes more
    registers than a tile leaves; ``ptx`` does so with NVIDIA's approximate instructions.
    """
    if FUNCTION == "silu":
        return x * _inverse(1.0 + _exp2(x * -1.4426950408889634, MODE), MODE)
    if FUNCTION == "gelu":
        if MODE == "exact":
            return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        tail = _half_erfc(x, MODE)
        return x * tl.where(x < 0, tail, 1.0 - tail)
    if FUNCTION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2 u
        return x * _inverse(1.0 + _exp2(-2.302208198144325 * (x + 0.044715 * x * x * x), MODE), MODE)
    if FUNCTION == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays
    return x


@triton.jit
def activate(x, FUNCTION: tl.constexpr):
    """An activation on its way to 16 bits, on NVIDIA's devices: for kernels in Gluon."""
    return activation(x, FUNCTION, "ptx")


@triton.jit
def gate_rows(total, FUNCTION: tl.constexpr):
    """``f(gate) * up`` of float32 ``[rows, M]`` whose rows come in turns of eight: ``[rows / 2, M]``."""
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    pairs = tl.permute(tl.reshape(total, (rows // 16, 2, 8, columns)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    return tl.reshape(activation(gate, FUNCTION, "quick") * up, (rows // 2, columns))


@triton.jit
def epilogue_kernel(
    y_ptr, out_ptr, size, FUNCTION: tl.constexpr, GATED: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr
):
    """out, ``size`` elements, from y of as many or (GATED) twice as many; float32 in between."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if GATED:
        place = y_ptr + at // TURN * (2 * TURN) + at % TURN
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        value = activation(gate, FUNCTION, "exact") * tl.load(place + TURN, mask=inside, other=0.0).to(tl.float32)
    else:
        value = activation(tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32), FUNCTION, "exact")
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def epilogue_alone(y: Tensor, epilogue: str) -> Tensor:
    """The epilogue of a contiguous ``y [..., N]`` by a kernel of its own, for products that cannot do it themselves."""
    out = y.new_empty([*y.shape[:-1], out_features(y.shape[-1], epilogue)])
    if out.numel():
        launch(
            epilogue_kernel,
            (-(-out.numel() // _BLOCK),),
            y,
            out,
            out.numel(),
            TURN=TURN,
            BLOCK=_BLOCK,
            **epilogue_options(epilogue),
        )
    return out
