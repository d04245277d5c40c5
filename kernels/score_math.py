"""Arithmetic of score functions in Triton, where Triton has no operation with PyTorch's meaning."""

import triton
import triton.language as tl


@triton.jit
def floor_divide(a, b):
    """``torch.floor_divide`` of integers, whatever way the hardware rounds its quotient."""
    quotient = a // b
    rest = a - quotient * b
    return quotient - ((rest != 0) & ((rest < 0) != (b < 0))).to(quotient.dtype)


@triton.jit
def floor_divide_float(a, b):
    """``torch.floor_divide`` of floats: the quotient rounded down, corrected where the division rounded up."""
    quotient = tl.floor(tl.div_rn(a, b))
    rest = tl.fma(-quotient, b, a)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1.0, quotient)


@triton.jit
def remainder(a, b):
    """``torch.remainder`` of integers: the sign of the divisor."""
    return a - floor_divide(a, b) * b


@triton.jit
def remainder_float(a, b):
    """``torch.remainder`` of floats: the sign of the divisor."""
    return tl.fma(-floor_divide_float(a, b), b, a)


@triton.jit
def power(x, y):
    """``torch.pow`` of floats by exponential and logarithm; NaN for negative ``x`` unless ``y`` is integral."""
    integral = tl.floor(y) == y
    odd = tl.floor(y * 0.5) * 2.0 != y
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    signed = tl.where((x < 0) & odd, -size, size)
    undefined = (x < 0) & (tl.abs(x) != float("inf")) & (integral == 0)
    result = tl.where(undefined, float("nan"), signed)
    return tl.where((y == 0) | (x == 1.0), 1.0, result)


@triton.jit
def sigmoid(x):
    """By the reciprocal square root, one instruction where a division takes several; it is 0 for infinity."""
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def tanh(x):
    """Hyperbolic tangent, absolute error about 1e-6: logits enter an exponential, so absolute error is what counts."""
    root = tl.rsqrt(tl.exp(2.0 * x) + 1.0)
    return 1.0 - 2.0 * (root * root)


@triton.jit
def tanh_nvidia(x):
    """By NVIDIA's instruction: relative error 2 ** -11, an eighth of the spacing of bfloat16."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid_precise(x):
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def tanh_precise(x):
    """Hyperbolic tangent to a few units in the last place: an odd polynomial (minimax on |x| < 0.55) near zero."""
    y = x * x
    series = tl.fma(y, -5.70498872745e-3, 2.06390887954e-2)
    series = tl.fma(y, series, -5.37397155531e-2)
    series = tl.fma(y, series, 1.33314422036e-1)
    series = tl.fma(y, series, -3.33332819422e-1)
    return tl.where(y < 0.3, tl.fma(x * y, series, x), 1.0 - tl.div_rn(2.0, tl.exp(2.0 * x) + 1.0))


@triton.jit
def atan(x):
    """Arc tangent to about 2 units in the last place: an odd polynomial up to tan(pi / 8), and two symmetries."""
    size = tl.abs(x)
    steep, high = size > 2.414213562, size > 0.4142135624
    above = tl.where(steep, -1.0, size - 1.0)
    below = tl.where(steep, size, size + 1.0)
    z = tl.where(high, above / below, size)
    y = z * z
    series = tl.fma(y, 8.05374449538e-2, -1.38776856032e-1)
    series = tl.fma(y, series, 1.99777106478e-1)
    series = tl.fma(y, series, -3.33329491539e-1)
    angle = tl.where(steep, 1.5707963268, tl.where(high, 0.7853981634, 0.0)) + tl.fma(z * y, series, z)
    return tl.where(x < 0, -angle, angle)


@triton.jit
def maximum(a, b):
    """``torch.maximum``: NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """``torch.minimum``: NaN wins."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log1p(x):
    """``torch.log1p``, precise near zero by the correction of rounding in ``1 + x`` (Kahan)."""
    u = 1.0 + x
    exact = (u == 1.0) | (u == float("inf"))
    return tl.where(exact, x, tl.log(u) * (x / (u - 1.0)))
