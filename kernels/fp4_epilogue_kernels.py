"""Triton device code of :mod:`vbcompile.kernels.fp4_epilogue`, and the kernel that runs it alone."""

import triton
import triton.language as tl
from torch import Tensor

from vbcompile.kernels.fp4_epilogue import TURN, epilogue_options, out_features

_BLOCK = 1024


@triton.jit
def activate(x, FUNCTION: tl.constexpr):
    """An activation of float32 ``x``; FUNCTION ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``none``."""
    if FUNCTION == "silu":
        return x / (1.0 + tl.exp(-x))
    if FUNCTION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if FUNCTION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2 u
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    if FUNCTION == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays
    return x


@triton.jit
def gate_rows(total, FUNCTION: tl.constexpr):
    """``f(gate) * up`` of float32 ``[rows, M]`` whose rows come in turns of eight: ``[rows / 2, M]``."""
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    pairs = tl.permute(tl.reshape(total, (rows // 16, 2, 8, columns)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    return tl.reshape(activate(gate, FUNCTION) * up, (rows // 2, columns))


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
        value = activate(gate, FUNCTION) * tl.load(place + TURN, mask=inside, other=0.0).to(tl.float32)
    else:
        value = activate(tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32), FUNCTION)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def epilogue_alone(y: Tensor, epilogue: str) -> Tensor:
    """The epilogue of a contiguous ``y [..., N]`` by a kernel of its own, for products that cannot do it themselves."""
    out = y.new_empty([*y.shape[:-1], out_features(y.shape[-1], epilogue)])
    if out.numel():
        epilogue_kernel[(-(-out.numel() // _BLOCK),)](
            y, out, out.numel(), TURN=TURN, BLOCK=_BLOCK, **epilogue_options(epilogue)
        )
    return out
