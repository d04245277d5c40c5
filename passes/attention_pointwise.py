"""Pointwise operators of PyTorch as expressions."""

import math
from typing import Any

import torch
from torch import fx

from vbcompile.passes.attention_activations import activation
from vbcompile.passes.attention_contraction import contraction_of
from vbcompile.passes.attention_exact import LARGEST_EXACT, compared_in, is_exact, may_be_cut, may_wrap
from vbcompile.passes.attention_expression import BOOL, FLOAT, INT, Coordinates, Expression, Opaque, kind_of
from vbcompile.passes.attention_masks import MASK_SIZED
from vbcompile.passes.attention_reader import Reader
from vbcompile.passes.graph_ops import ACTIVATIONS, Call, call_of, is_tensor, known_equal, rounded, shape_of, tensor_of

_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
_LOGICAL = {"and", "or", "xor"}
_SAME_NAME = {"mul", "maximum", "minimum", "neg", "abs", "relu", "mod"}
_FLOAT_ONLY = {"exp", "log", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "atan", "erf"}
_JUMPS = {"sign", "isnan", "isinf", "nan_to_num", "hardshrink", "threshold"}  # rounding may decide what they give
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "bool", "int", "long", "cpu", "cuda"}


def pointwise(lifter: Reader, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
    """The expression of a pointwise operator's result; raises Opaque for anything else."""
    rule = getattr(_Rules, call.name, None) or _RULES.get(call.name)
    if rule is None:
        raise Opaque
    rules = _Rules(lifter, call, node, coordinates)
    return rules.as_stored(rule(rules))


class _Rules:
    """One call in hand; a method per operator that needs more than its own name."""

    def __init__(self, lifter: Reader, call: Call, node: fx.Node, coordinates: Coordinates) -> None:
        self.make = lifter.algebra.make
        self.const = lifter.algebra.const
        self.call = call
        self._dtype = tensor_of(node).dtype
        self._is_differentiated = tensor_of(node).requires_grad
        self.kind = kind_of(self._dtype)
        self._lifter = lifter
        self._coordinates = coordinates
        self._direct = lifter.score is not None and lifter.depends(node)

    def read(self, parameter: str, default: Any = None) -> Expression:
        argument = self.call.get(parameter, default)
        return self._as_held(self._lifter.operand(argument, self._coordinates, self._direct), argument)

    def _as_held(self, e: Expression, argument: Any) -> Expression:
        """A number as large as a mask's, as a result of 16 bits holds it: masks that the source made must equal it."""
        if is_tensor(argument) or e.name != "const" or e.kind != FLOAT or self._dtype not in LARGEST_EXACT:
            return e
        held = rounded(e.value, self._dtype)
        return self.const(held) if MASK_SIZED <= abs(held) < math.inf else e

    def as_stored(self, e: Expression) -> Expression:
        """Numbers that a result of 16 bits is chosen from, folded or converted, as the source rounded them."""
        if self._dtype not in LARGEST_EXACT or e.kind != FLOAT:
            return e
        if e.name == "where":
            return self.make("where", e.arguments[0], *map(self.as_stored, e.arguments[1:]))
        held = rounded(e.value, self._dtype) if e.name == "const" else 0.0
        return self.const(held) if abs(held) >= MASK_SIZED else e

    def read_as(self, kind: str, parameter: str) -> Expression:
        return self.convert(kind, self.read(parameter))

    def convert(self, kind: str, e: Expression) -> Expression:
        return self.make({BOOL: "to_bool", INT: "to_int", FLOAT: "to_float"}[kind], e)

    def opaque(self, reason: str = "") -> Exception:
        return Opaque(reason)

    def check_decision(self, arguments: list[Expression], dtype: torch.dtype) -> None:
        """Raise Opaque where rounding may decide an operator that jumps; what depends on the scores is theirs."""
        if self._direct:
            return
        score = self._lifter.score
        scores = None if score is None else tensor_of(score).dtype
        if not all(is_exact(e, dtype, scores) for e in arguments):
            raise self.opaque()

    def check_range(self, arguments: list[Expression]) -> None:
        """Raise Opaque where integers of the result's dtype may wrap."""
        if self.kind == INT and may_wrap(self.call.name, self._dtype, arguments):
            raise self.opaque()

    # --------------------------------------------------------------------------------------------- by operator
    def same_name(self) -> Expression:
        """Arithmetic in the kind of the result."""
        if self.kind == BOOL and self.call.name != "mul":
            raise self.opaque()
        names = ("input", "other") if "other" in self.call.arguments else ("input",)
        arguments = [self.read_as(self.kind, name) for name in names]
        arguments[1:] = [self._times_alpha(e) for e in arguments[1:]]
        self.check_range(arguments)
        if self.call.name == "mod" and self.kind == FLOAT:
            self.check_decision(arguments, self._dtype)
        result = self.make(self.call.name, *arguments)
        return self._overflown(result, 1.0) if self.call.name == "mul" else result

    def float_only(self) -> Expression:
        return self.make(self.call.name, self.read_as(FLOAT, "input"))

    def comparison(self) -> Expression:
        a, b = self.read("input"), self.read("other")
        if FLOAT in (a.kind, b.kind):
            a, b = self._compared(a), self._compared(b)
        elif a.kind != b.kind and not any(e.name == "const" for e in (a, b)):
            a, b = self.convert(INT, a), self.convert(INT, b)
        return self.make(self.call.name, a, b)

    def _compared(self, e: Expression) -> Expression:
        """One side of a comparison of floats; a number is rounded as the other side's dtype wants it."""
        dtype = compared_in([self.call.input, self.call.get("other")])
        if dtype.is_floating_point:
            e = self.const(rounded(float(e.value), dtype)) if e.name == "const" else e
            self.check_decision([e], dtype)
        return self.convert(FLOAT, e)

    def _truth(self, parameter: str) -> Expression:
        """Whether an operand differs from zero."""
        value = self.read(parameter)
        if value.kind == FLOAT:
            self.check_decision([value], compared_in([self.call.get(parameter)]))
        return self.convert(BOOL, value)

    def logical(self) -> Expression:
        if self.kind != BOOL:
            raise self.opaque()
        return self.make(self.call.name, self._truth("input"), self._truth("other"))

    def cast(self) -> Expression:
        value = self.read("input")
        if self.kind == BOOL:
            return self._truth("input")
        if self.kind == INT and value.kind == FLOAT:
            if self._direct:
                raise self.opaque("a conversion to integers")
            self.check_decision([value], compared_in([self.call.input]))
        if self.kind == INT and may_be_cut(self._lifter.algebra, value, self._dtype):
            raise self.opaque()
        if value.kind == INT and self._dtype in (torch.float16, torch.bfloat16) and "axis" in value.leaves:
            raise self.opaque()  # positions would be rounded
        return self.convert(self.kind, value)

    def add(self) -> Expression:
        if self.kind == BOOL:
            return self.make("or", self.read_as(BOOL, "input"), self.read_as(BOOL, "other"))
        return self._rounded(self.same_name())

    def sub(self) -> Expression:
        return self._rounded(self.same_name())

    def _rounded(self, total: Expression) -> Expression:
        """A float16 sum with a mask of -65504 as the source rounds it: to multiples of 32, so that the score vanishes.

        In float32 the score would survive, and rows without a key would not come out as the mean of all values. Two
        such masks are beyond float16 together: -inf.
        """
        operands = self.call.input, self.call.get("other")
        if self._dtype != torch.float16 or not self._direct or not any(map(_may_be_very_low, operands)):
            return total
        shift = self.const(1.5 * 2.0**23 * 32.0)  # float32 numbers around it are 32 apart
        rounded = self.make("sub", self.make("add", total, shift), shift)
        lost = self.make("le", total, self.const(-65520.0))  # nearer to -65536 than to float16's lowest
        rounded = self.make("where", lost, self.const(-math.inf), rounded)
        return self.make("where", self.make("lt", total, self.const(-(2.0**15))), rounded, total)

    def _overflown(self, product: Expression, sign: float) -> Expression:
        """A product of scores; a factor above one takes a mask of -65504 to -inf in float16, and so here."""
        if self._dtype != torch.float16 or not self._direct:
            return product
        operands = self.call.input, self.call.get("other")
        factors = [f for f in operands if isinstance(f, (int, float))]
        scores = [x for x in operands if is_tensor(x) and self._lifter.depends(x)]
        if any(0 <= f <= 1 if sign > 0 else f >= 1 for f in factors) or not any(map(_may_be_very_low, scores)):
            return product
        if any(f < 0 for f in factors):
            high = self.make("ge", product, self.const(65520.0))
            product = self.make("where", high, self.const(math.inf), product)
        return self.make("where", self.make("le", product, self.const(-65520.0)), self.const(-math.inf), product)

    def div(self) -> Expression:
        mode = self.call.get("rounding_mode")
        if mode == "floor":
            return self.floordiv()
        if mode is not None:
            raise self.opaque()
        quotient = self.make("div", self.read_as(FLOAT, "input"), self.read_as(FLOAT, "other"))
        return self._overflown(quotient, -1.0)

    def floordiv(self) -> Expression:
        if self.kind == BOOL:
            raise self.opaque()
        arguments = [self.read_as(self.kind, name) for name in ("input", "other")]
        self.check_range(arguments)
        if self.kind == FLOAT:
            self.check_decision(arguments, self._dtype)
        return self.make("floordiv", *arguments)

    def pow(self) -> Expression:
        base, exponent = self.read_as(self.kind, "input"), self.read("other")
        self.check_range([base])
        if exponent.name == "const" and exponent.value == 2:
            return self.make("mul", base, base)
        if self.kind != FLOAT:
            raise self.opaque()
        if exponent.name == "const" and exponent.value in (0.5, 1, -1):
            return {0.5: lambda: self.make("sqrt", base), 1: lambda: base, -1: lambda: self._inverse(base)}[
                exponent.value
            ]()
        return self.make("pow", base, self.convert(FLOAT, exponent))

    def _inverse(self, e: Expression) -> Expression:
        return self.make("div", self.const(1.0), e)

    def square(self) -> Expression:
        value = self.read_as(self.kind, "input")
        self.check_range([value])
        return self.make("mul", value, value)

    def reciprocal(self) -> Expression:
        return self._inverse(self.read_as(FLOAT, "input"))

    def positive(self) -> Expression:
        return self.read("input")

    def exp2(self) -> Expression:
        return self.make("exp", self.make("mul", self.read_as(FLOAT, "input"), self.const(math.log(2.0))))

    def log2(self) -> Expression:
        return self.make("div", self.make("log", self.read_as(FLOAT, "input")), self.const(math.log(2.0)))

    def activation(self) -> Expression:
        """One of :mod:`attention_activations`."""
        if self.call.name in _JUMPS and not self._direct:
            raise self.opaque()
        x = self.read_as(FLOAT, "input")
        dtype = tensor_of(self.call.input).dtype
        made = activation(self._lifter, self.call.name, x, dtype, self.call.arguments)
        if made is None or not dtype.is_floating_point:
            raise self.opaque()
        return made

    def rsub(self) -> Expression:
        return self.make("sub", self.read_as(self.kind, "other"), self._times_alpha(self.read_as(self.kind, "input")))

    def _times_alpha(self, e: Expression) -> Expression:
        if "alpha" not in self.call.arguments:
            return e
        return self.make("mul", e, self.convert(self.kind, self.read("alpha")))

    def lerp(self) -> Expression:
        """From the nearer end, as PyTorch does: the other one may be infinite."""
        make = self.make
        start, end, weight = (self.read_as(FLOAT, name) for name in ("input", "end", "weight"))
        way = make("sub", end, start)
        from_start = make("add", start, make("mul", weight, way))
        from_end = make("sub", end, make("mul", make("sub", self.const(1.0), weight), way))
        return make("where", make("lt", make("abs", weight), self.const(0.5)), from_start, from_end)

    def hypot(self) -> Expression:
        a, b = (self.read_as(FLOAT, name) for name in ("input", "other"))
        return self.make("sqrt", self.make("add", self.make("mul", a, a), self.make("mul", b, b)))

    def logaddexp(self) -> Expression:
        a, b = (self.read_as(FLOAT, name) for name in ("input", "other"))
        distance = self.make("abs", self.make("sub", a, b))
        distance = self.make("where", self.make("eq", a, b), self.const(0.0), distance)  # both may be infinite
        tail = self.make("log1p", self.make("exp", self.make("neg", distance)))
        return self.make("add", self.make("maximum", a, b), tail)

    def prelu(self) -> Expression:
        """One slope, or one for each index of the second axis."""
        weight = self.call.get("weight")
        at = self._coordinates[1:2] if known_equal(shape_of(weight)[0], 1) is False else ((),)
        slope = self._lifter.lift(weight, at) if self._direct else self._lifter.value(weight, at)
        value = self.read_as(FLOAT, "input")
        return self.make("where", self.make("gt", value, self.const(0.0)), value, self.make("mul", value, slope))

    def where(self) -> Expression:
        if "input" not in self.call.arguments:
            raise self.opaque()
        condition = self.read_as(BOOL, "condition")
        return self.make("where", condition, self.read_as(self.kind, "input"), self.read_as(self.kind, "other"))

    def masked_fill(self) -> Expression:
        value = self.read_as(self.kind, "value")
        return self.make("where", self.read_as(BOOL, "mask"), value, self.read_as(self.kind, "input"))

    def logical_not(self) -> Expression:
        if self.kind != BOOL:
            raise self.opaque()
        return self.make("not", self._truth("input"))

    def clamp(self) -> Expression:
        value = self.read_as(self.kind, "input")
        if self.kind == BOOL:
            raise self.opaque()
        for bound, name in (("min", "maximum"), ("max", "minimum")):
            if self.call.get(bound) is not None:
                value = self._limited(name, value, self.read_as(self.kind, bound))
        return value

    clamp_min = clamp_max = clamp

    def _limited(self, name: str, value: Expression, limit: Expression) -> Expression:
        """At the limit itself ``clamp`` hands on the whole gradient, ``maximum`` and ``minimum`` half of it."""
        if not self._is_differentiated:
            return self.make(name, value, limit)
        beyond = self.make("lt" if name == "maximum" else "gt", value, limit)
        return self.make("where", beyond, limit, value)

    def addcmul(self) -> Expression:
        factor = self.make("mul", self.read_as(self.kind, "tensor1"), self.read_as(self.kind, "tensor2"))
        scaled = self.make("mul", self.convert(self.kind, self.read("value", 1)), factor)
        if self.kind == INT:
            raise self.opaque()
        return self.make("add", self.read_as(self.kind, "input"), scaled)

    def max(self) -> Expression:
        """Only ``max(a, b)`` of two tensors is pointwise."""
        other = self.call.get("dim")
        if not isinstance(other, fx.Node) or self.kind == BOOL:
            raise self.opaque("a reduction")
        name = {"max": "maximum", "min": "minimum"}[self.call.name]
        return self.make(name, self.read_as(self.kind, "input"), self.read_as(self.kind, "dim"))

    min = max

    def dropout(self) -> Expression:
        if self.call.get("training", True) is not False and self.call.get("p", 0.5) != 0:
            raise self.opaque("dropout of the scores")
        return self.read("input")


def _may_be_very_low(node: Any, limit: int = 64) -> bool:
    """Whether a float16 operand may be a mask that holds -65504: such a constant, or an input, is on its way."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo and len(seen) < limit:
        n = todo.pop()
        if not isinstance(n, fx.Node):
            low = isinstance(n, (int, float)) and -math.inf < n <= -(2.0**15)
            if low or (isinstance(n, float) and 2.0**15 <= n < math.inf):
                return True
            continue
        if n in seen or not is_tensor(n):
            continue
        seen.add(n)
        call = call_of(n)
        if n.op in ("placeholder", "get_attr"):
            if tensor_of(n).is_floating_point() and not tensor_of(n).requires_grad:
                return True
        elif call is not None and contraction_of(call, n) is None:
            todo += call.arguments.values()
    return False


_RULES: dict[str, Any] = {
    **dict.fromkeys(_SAME_NAME, _Rules.same_name),
    **dict.fromkeys(_FLOAT_ONLY, _Rules.float_only),
    **dict.fromkeys(_COMPARISONS, _Rules.comparison),
    **dict.fromkeys(_LOGICAL, _Rules.logical),
    **dict.fromkeys(_CASTS, _Rules.cast),
    **dict.fromkeys(ACTIVATIONS, _Rules.activation),
    "not": _Rules.logical_not,
}
