"""Activation functions as expressions of the instructions that score functions have.

Where one has a kink, the gradient at it is PyTorch's: ``clamp`` hands it on at its limits, ``hardtanh`` does not.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from vbcompile.passes.attention_expression import FLOAT, Expression
from vbcompile.passes.graph_ops import Call


class Activations:
    """Rules of ``attention_pointwise`` for activation functions, a method each."""

    call: Call
    make: Callable[..., Expression]
    const: Callable[[Any], Expression]
    opaque: Callable[..., Exception]
    read_as: Callable[..., Expression]

    def number(self, parameter: str, default: float | None = None) -> float:
        """An argument that is a Python number; raises Opaque for others."""
        value = self.call.get(parameter, default)
        if isinstance(value, fx.Node) or not isinstance(value, (int, float)):
            raise self.opaque()
        return float(value)

    def _where(self, condition: Expression, a: Expression | float, b: Expression | float) -> Expression:
        return self.make("where", condition, *(self.const(x) if isinstance(x, float) else x for x in (a, b)))

    def _is(self, comparison: str, e: Expression, number: float) -> Expression:
        return self.make(comparison, e, self.const(number))

    def _scaled(self, e: Expression, factor: float) -> Expression:
        return self.make("mul", e, self.const(factor))

    def _between(self, e: Expression, low: float, high: float) -> Expression:
        """The number in these limits, with no gradient at and beyond them."""
        below_high = self._where(self._is("ge", e, high), high, e)
        return self._where(self._is("le", e, low), low, below_high)

    def _softplus(self, e: Expression) -> Expression:
        tail = self.make("log1p", self.make("exp", self.make("neg", self.make("abs", e))))
        return self.make("add", self.make("maximum", e, self.const(0.0)), tail)

    def _exponential_unit(self, e: Expression, alpha: float, scale: float = 1.0, rate: float = 1.0) -> Expression:
        is_positive = self._is("gt", e, 0.0)
        below = self._where(is_positive, 0.0, self._scaled(e, rate))  # so that nothing overflows above
        decay = self._scaled(self.make("sub", self.make("exp", below), self.const(1.0)), alpha * scale)
        return self._where(is_positive, self._scaled(e, scale), decay)

    # --------------------------------------------------------------------------------------------- by operator
    def silu(self) -> Expression:
        value = self.read_as(FLOAT, "input")
        return self.make("mul", value, self.make("sigmoid", value))

    def logsigmoid(self) -> Expression:
        return self.make("neg", self._softplus(self.make("neg", self.read_as(FLOAT, "input"))))

    def softplus(self) -> Expression:
        beta, threshold = self.number("beta", 1.0), self.number("threshold", 20.0)
        if beta == 0:
            raise self.opaque()
        value = self.read_as(FLOAT, "input")
        inner = self._scaled(value, beta)
        smooth = self._scaled(self._softplus(inner), 1.0 / beta)
        return self._where(self._is("gt", inner, threshold), value, smooth)

    def mish(self) -> Expression:
        value = self.read_as(FLOAT, "input")
        return self.make("mul", value, self.make("tanh", self._softplus(value)))

    def leaky_relu(self) -> Expression:
        value = self.read_as(FLOAT, "input")
        slope = self.read_as(FLOAT, "negative_slope", 0.01)
        return self._where(self._is("gt", value, 0.0), value, self.make("mul", value, slope))

    def elu(self) -> Expression:
        return self._exponential_unit(self.read_as(FLOAT, "input"), self.number("alpha", 1.0))

    def celu(self) -> Expression:
        alpha = self.number("alpha", 1.0)
        return self._exponential_unit(self.read_as(FLOAT, "input"), alpha, rate=1.0 / alpha)

    def selu(self) -> Expression:
        alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
        return self._exponential_unit(self.read_as(FLOAT, "input"), alpha, scale)

    def gelu(self) -> Expression:
        if self.call.get("approximate") != "tanh":
            raise self.opaque("gelu by the error function")
        value = self.read_as(FLOAT, "input")
        cube = self.make("mul", self.make("mul", value, value), value)
        inner = self._scaled(self.make("add", value, self._scaled(cube, 0.044715)), math.sqrt(2.0 / math.pi))
        share = self.make("add", self.make("tanh", inner), self.const(1.0))
        return self.make("mul", self._scaled(value, 0.5), share)

    def hardtanh(self) -> Expression:
        return self._between(self.read_as(FLOAT, "input"), self.number("min_val", -1.0), self.number("max_val", 1.0))

    def relu6(self) -> Expression:
        return self._between(self.read_as(FLOAT, "input"), 0.0, 6.0)

    def hardsigmoid(self) -> Expression:
        shifted = self.make("add", self.read_as(FLOAT, "input"), self.const(3.0))
        return self._scaled(self._between(shifted, 0.0, 6.0), 1.0 / 6.0)

    def hardswish(self) -> Expression:
        return self.make("mul", self.read_as(FLOAT, "input"), self.hardsigmoid())

    def softsign(self) -> Expression:
        value = self.read_as(FLOAT, "input")
        return self.make("div", value, self.make("add", self.make("abs", value), self.const(1.0)))

    def tanhshrink(self) -> Expression:
        value = self.read_as(FLOAT, "input")
        return self.make("sub", value, self.make("tanh", value))

    def softshrink(self) -> Expression:
        value, limit = self.read_as(FLOAT, "input"), self.number("lambd", 0.5)
        lower = self._where(self._is("lt", value, -limit), self.make("add", value, self.const(limit)), 0.0)
        return self._where(self._is("gt", value, limit), self.make("sub", value, self.const(limit)), lower)

    def hardshrink(self) -> Expression:
        value, limit = self.read_as(FLOAT, "input"), self.number("lambd", 0.5)
        small = self.make("and", self._is("ge", value, -limit), self._is("le", value, limit))
        return self._where(small, 0.0, value)

    def threshold(self) -> Expression:
        value = self.read_as(FLOAT, "input")
        return self._where(self._is("le", value, self.number("threshold")), self.number("value"), value)

    def sign(self) -> Expression:
        value = self.read_as(FLOAT, "input")
        return self._where(self._is("gt", value, 0.0), 1.0, self._where(self._is("lt", value, 0.0), -1.0, 0.0))

    def expm1(self) -> Expression:
        return self.make("sub", self.make("exp", self.read_as(FLOAT, "input")), self.const(1.0))

    def sinh(self) -> Expression:
        return self._scaled(self.make("sub", *self._both_exponentials()), 0.5)

    def cosh(self) -> Expression:
        return self._scaled(self.make("add", *self._both_exponentials()), 0.5)

    def _both_exponentials(self) -> tuple[Expression, Expression]:
        value = self.read_as(FLOAT, "input")
        return self.make("exp", value), self.make("exp", self.make("neg", value))

    def logaddexp(self) -> Expression:
        a, b = self.read_as(FLOAT, "input"), self.read_as(FLOAT, "other")
        tail = self.make("log1p", self.make("exp", self.make("neg", self.make("abs", self.make("sub", a, b)))))
        return self.make("add", self.make("maximum", a, b), tail)
