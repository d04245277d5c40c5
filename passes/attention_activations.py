"""Activation functions of ``torch.nn.functional`` and rarer functions of scores, spelled in the operators of kernels.

Differences of nearly equal numbers (``exp(x) - 1``) are as exact as logits need: their absolute error counts. Where a
function has a kink, the choice between its pieces is the one whose gradient PyTorch gives.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from vbcompile.passes.attention_expression import Algebra, Expression
from vbcompile.passes.attention_reader import Reader
from vbcompile.passes.graph_ops import ACTIVATIONS, value_of

Number = Expression | float
_SELU = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717  # scale, alpha


class Activations:
    """A method per operator, named as the operator; each takes the element and the operator's other numbers, which are
    expressions where they are known only at run time.

    Args:
        algebra: makes the expressions.
        dtype: of the tensor that the operator is applied to.
    """

    def __init__(self, algebra: Algebra, dtype: torch.dtype) -> None:
        self._make = algebra.make
        self._const = algebra.const
        self._limits = torch.finfo(dtype) if dtype.is_floating_point else None

    def _join(self, name: str, *arguments: Number) -> Expression:
        return self._make(name, *(self._const(float(a)) if isinstance(a, (int, float)) else a for a in arguments))

    def _where(self, x: Expression, comparison: str, limit: Number, a: Number, b: Expression) -> Expression:
        return self._join("where", self._join(comparison, x, limit), a, b)

    def _grow(self, x: Expression, alpha: Number, rate: Number) -> Expression:
        """``x`` above zero, and ``alpha * (exp(rate * x) - 1)`` below."""
        low = self._where(x, "gt", 0.0, 0.0, x)  # nothing overflows where it is not wanted
        power = self._join("exp", self._join("mul", low, rate))
        return self._where(x, "gt", 0.0, x, self._join("mul", self._join("sub", power, 1.0), alpha))

    def _between(self, x: Expression, low: Number, high: Number) -> Expression:
        """``x`` within limits, at which the gradient ends."""
        return self._where(x, "le", low, low, self._where(x, "ge", high, high, x))

    def _soften(self, x: Expression) -> Expression:
        """``log(1 + exp(x))``."""
        tail = self._join("log1p", self._join("exp", self._join("neg", self._join("abs", x))))
        return self._join("add", self._join("maximum", x, 0.0), tail)

    def silu(self, x: Expression) -> Expression:
        return self._join("mul", x, self._join("sigmoid", x))

    def leaky_relu(self, x: Expression, negative_slope: Number = 0.01) -> Expression:
        return self._where(x, "gt", 0.0, x, self._join("mul", x, negative_slope))

    def elu(self, x: Expression, alpha: Number = 1.0) -> Expression:
        return self._grow(x, alpha, 1.0)

    def celu(self, x: Expression, alpha: Number = 1.0) -> Expression:
        return self._grow(x, alpha, self._join("div", 1.0, alpha))

    def selu(self, x: Expression) -> Expression:
        return self._join("mul", self.elu(x, _SELU[1]), _SELU[0])

    def softplus(self, x: Expression, beta: Number = 1.0, threshold: Number = 20.0) -> Expression:
        inner = self._join("mul", x, beta)
        return self._where(inner, "gt", threshold, x, self._join("div", self._soften(inner), beta))

    def logsigmoid(self, x: Expression) -> Expression:
        return self._join("neg", self._soften(self._join("neg", x)))

    def mish(self, x: Expression) -> Expression:
        return self._join("mul", x, self._join("tanh", self._soften(x)))

    def hardsigmoid(self, x: Expression) -> Expression:
        return self._join("div", self.relu6(self._join("add", x, 3.0)), 6.0)

    def hardswish(self, x: Expression) -> Expression:
        return self._join("mul", x, self.hardsigmoid(x))

    def hardtanh(self, x: Expression, min_val: Number = -1.0, max_val: Number = 1.0) -> Expression:
        return self._between(x, min_val, max_val)

    def relu6(self, x: Expression) -> Expression:
        return self._between(x, 0.0, 6.0)

    def softsign(self, x: Expression) -> Expression:
        return self._join("div", x, self._join("add", self._join("abs", x), 1.0))

    def tanhshrink(self, x: Expression) -> Expression:
        return self._join("sub", x, self._join("tanh", x))

    def softshrink(self, x: Expression, lambd: Number = 0.5) -> Expression:
        low = self._where(x, "lt", self._join("neg", lambd), self._join("add", x, lambd), self._const(0.0))
        return self._where(x, "gt", lambd, self._join("sub", x, lambd), low)

    def hardshrink(self, x: Expression, lambd: Number = 0.5) -> Expression:
        return self._where(self._join("abs", x), "le", lambd, 0.0, x)

    def threshold(self, x: Expression, threshold: Number, value: Number) -> Expression:
        return self._where(x, "le", threshold, value, x)

    def gelu(self, x: Expression, approximate: str = "none") -> Expression | None:
        half = self._join("mul", x, 0.5)
        if approximate == "none":
            inner = self._join("erf", self._join("mul", x, math.sqrt(0.5)))
            return self._join("mul", half, self._join("add", inner, 1.0))
        if approximate != "tanh":
            return None
        cubed = self._join("mul", self._join("mul", self._join("mul", x, x), x), 0.044715)
        inner = self._join("mul", self._join("add", x, cubed), math.sqrt(2.0 / math.pi))
        return self._join("mul", half, self._join("add", self._join("tanh", inner), 1.0))

    def erfc(self, x: Expression) -> Expression:
        return self._join("sub", 1.0, self._join("erf", x))

    def expm1(self, x: Expression) -> Expression:
        return self._join("sub", self._join("exp", x), 1.0)

    def sinh(self, x: Expression) -> Expression:
        return self._join("mul", self._join("sub", *self._both_powers(x)), 0.5)

    def cosh(self, x: Expression) -> Expression:
        return self._join("mul", self._join("add", *self._both_powers(x)), 0.5)

    def _both_powers(self, x: Expression) -> tuple[Expression, Expression]:
        return self._join("exp", x), self._join("exp", self._join("neg", x))

    def tan(self, x: Expression) -> Expression:
        return self._join("div", self._join("sin", x), self._join("cos", x))

    def log10(self, x: Expression) -> Expression:
        return self._join("div", self._join("log", x), math.log(10.0))

    def sign(self, x: Expression) -> Expression:
        return self._where(x, "gt", 0.0, 1.0, self._where(x, "lt", 0.0, -1.0, self._const(0.0)))

    def isnan(self, x: Expression) -> Expression:
        return self._join("ne", x, x)

    def isinf(self, x: Expression) -> Expression:
        return self._join("eq", self._join("abs", x), math.inf)

    def nan_to_num(
        self, x: Expression, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
    ) -> Expression | None:
        if self._limits is None or any(isinstance(number, Expression) for number in (nan, posinf, neginf)):
            return None
        high = self._limits.max if posinf is None else posinf
        low = self._limits.min if neginf is None else neginf
        result = self._where(x, "eq", -math.inf, low, self._where(x, "eq", math.inf, high, x))
        return self._join("where", self.isnan(x), nan or 0.0, result)


def activation(
    lifter: Reader, name: str, x: Expression, dtype: torch.dtype, given: dict[str, Any]
) -> Expression | None:
    """The expression of ``name(x)`` with other arguments ``given``; None where it is not known or not of numbers."""
    options = {k: v for k, v in given.items() if k in ACTIVATIONS[name] and k != "inplace"}
    for option, value in options.items():
        if isinstance(value_of(value), torch.SymFloat):
            options[option] = lifter.number(value)
        elif isinstance(value, bool) or not isinstance(value, (int, float, str, type(None))):
            return None
    method: Callable[..., Expression | None] = getattr(Activations(lifter.algebra, dtype), name)
    return method(x, **options)
