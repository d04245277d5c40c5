"""Activation functions of ``torch.nn.functional`` and rarer functions of scores, spelled in the operators of kernels.

Differences of nearly equal numbers (``exp(x) - 1``) are as exact as logits need: their absolute error counts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from vbcompile.passes.attention_expression import Algebra, Expression
from vbcompile.passes.graph_ops import ACTIVATIONS

_SELU = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717  # scale, alpha


class Activations:
    """A method per operator, named as the operator; each takes the element and the operator's other numbers.

    Args:
        algebra: makes the expressions.
        dtype: of the tensor that the operator is applied to.
    """

    def __init__(self, algebra: Algebra, dtype: torch.dtype) -> None:
        self._make = algebra.make
        self._const = algebra.const
        self._limits = torch.finfo(dtype) if dtype.is_floating_point else None

    def _join(self, name: str, *arguments: Expression | float) -> Expression:
        return self._make(name, *(self._const(float(a)) if isinstance(a, (int, float)) else a for a in arguments))

    def _grow(self, x: Expression, alpha: float, rate: float) -> Expression:
        """``alpha * (exp(rate * x) - 1)`` of the part of ``x`` below zero."""
        power = self._join("exp", self._join("mul", self._join("minimum", x, 0.0), rate))
        return self._join("mul", self._join("sub", power, 1.0), alpha)

    def elu(self, x: Expression, alpha: float = 1.0) -> Expression:
        return self._join("where", self._join("gt", x, 0.0), x, self._grow(x, alpha, 1.0))

    def celu(self, x: Expression, alpha: float = 1.0) -> Expression:
        return self._join("where", self._join("gt", x, 0.0), x, self._grow(x, alpha, 1.0 / alpha))

    def selu(self, x: Expression) -> Expression:
        return self._join("mul", self.elu(x, _SELU[1]), _SELU[0])

    def softplus(self, x: Expression, beta: float = 1.0, threshold: float = 20.0) -> Expression:
        inner = self._join("mul", x, beta)
        tail = self._join("log1p", self._join("exp", self._join("neg", self._join("abs", inner))))
        smooth = self._join("div", self._join("add", self._join("maximum", inner, 0.0), tail), beta)
        return self._join("where", self._join("gt", inner, threshold), x, smooth)

    def mish(self, x: Expression) -> Expression:
        return self._join("mul", x, self._join("tanh", self.softplus(x)))

    def hardsigmoid(self, x: Expression) -> Expression:
        return self._join("div", self.relu6(self._join("add", x, 3.0)), 6.0)

    def hardswish(self, x: Expression) -> Expression:
        return self._join("mul", x, self.hardsigmoid(x))

    def relu6(self, x: Expression) -> Expression:
        return self._join("minimum", self._join("relu", x), 6.0)

    def softsign(self, x: Expression) -> Expression:
        return self._join("div", x, self._join("add", self._join("abs", x), 1.0))

    def tanhshrink(self, x: Expression) -> Expression:
        return self._join("sub", x, self._join("tanh", x))

    def softshrink(self, x: Expression, lambd: float = 0.5) -> Expression:
        return self._join("sub", x, self._join("minimum", self._join("maximum", x, -lambd), lambd))

    def hardshrink(self, x: Expression, lambd: float = 0.5) -> Expression:
        return self._join("where", self._join("le", self._join("abs", x), lambd), 0.0, x)

    def threshold(self, x: Expression, threshold: float, value: float) -> Expression:
        return self._join("where", self._join("le", x, threshold), value, x)

    def gelu(self, x: Expression, approximate: str = "none") -> Expression | None:
        """Only the approximation by ``tanh``: kernels have no error function."""
        if approximate != "tanh":
            return None
        cubed = self._join("mul", self._join("mul", self._join("mul", x, x), x), 0.044715)
        inner = self._join("mul", self._join("add", x, cubed), math.sqrt(2.0 / math.pi))
        return self._join("mul", self._join("mul", x, 0.5), self._join("add", self._join("tanh", inner), 1.0))

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
        return self._join("where", self._join("gt", x, 0.0), 1.0, self._where_below(x))

    def _where_below(self, x: Expression) -> Expression:
        return self._join("where", self._join("lt", x, 0.0), -1.0, self._const(0.0))

    def isnan(self, x: Expression) -> Expression:
        return self._join("ne", x, x)

    def isinf(self, x: Expression) -> Expression:
        return self._join("eq", self._join("abs", x), math.inf)

    def nan_to_num(
        self, x: Expression, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
    ) -> Expression | None:
        if self._limits is None:
            return None
        high = self._limits.max if posinf is None else posinf
        low = self._limits.min if neginf is None else neginf
        result = self._join("where", self._join("eq", x, math.inf), high, x)
        result = self._join("where", self._join("eq", x, -math.inf), low, result)
        return self._join("where", self.isnan(x), nan or 0.0, result)


def activation(algebra: Algebra, name: str, x: Expression, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    """The expression of ``name(x)`` with other arguments ``given``; None where it is not known or not of numbers."""
    options = {k: v for k, v in given.items() if k in ACTIVATIONS[name] and k != "inplace"}
    if any(isinstance(v, bool) or not isinstance(v, (int, float, str, type(None))) for v in options.values()):
        return None
    method: Callable[..., Expression | None] = getattr(Activations(algebra, dtype), name)
    return method(x, **options)
