"""Elementwise expressions over the axes of an attention site, simplified as they are built.

An expression stands for one number per point of the iteration space. Equal expressions of one :class:`Algebra` are one
object, so that they can be compared by identity. Integer comparisons are brought to one form (``le``, ``ge``, ``eq``,
``ne`` with the positive terms left) and decided where the ranges of the axes decide them; what remains of a mask that a
model built from ``arange``, ``tril``, ``cumsum`` and comparisons is then usually a single comparison.
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import SymInt, fx

from vbcompile.passes.graph_axes import Atom, Dim, Dims
from vbcompile.passes.graph_ops import FLOATS, known, known_equal

BOOL, INT, FLOAT = "b", "i", "f"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Opaque(Exception):
    """This tensor cannot be looked into at these coordinates."""


def kind_of(dtype: torch.dtype) -> str:
    """Kind of number of a dtype; raises Opaque for complex and quantised ones and floats of 8 bits."""
    if dtype == torch.bool:
        return BOOL
    if dtype in FLOATS:
        return FLOAT
    if dtype in _INTEGERS:
        return INT
    raise Opaque


class Expression:
    """A node of an expression graph: an operator of ``score_function.POINTWISE`` or a leaf.

    Leaves: ``score``; ``axis`` (Atom); ``const`` (bool, int, float); ``size`` (SymInt); ``scalar`` (an FX node with a
    symbolic float); ``tensor`` (an FX node and its dimensions); ``shift`` (an FX node: one number for a row of scores).
    ``kind`` is the kind of number: bool, int or float.
    ``empty_row`` of a mask is an operator besides: whether a row's mask hides all keys.
    """

    __slots__ = ("_affine", "_atoms", "_leaves", "arguments", "kind", "name")

    def __init__(self, name: str, arguments: tuple[Any, ...], kind: str) -> None:
        self.name = name
        self.arguments = arguments
        self.kind = kind
        self._atoms: frozenset[Atom] | None = None
        self._leaves: frozenset[str] | None = None
        self._affine: Affine | bool | None = False

    @property
    def is_leaf(self) -> bool:
        return self.name in LEAF_NAMES

    @property
    def value(self) -> Any:
        """The value of a ``const``; NaN-like None for anything else."""
        return self.arguments[0] if self.name == "const" else None

    @property
    def atoms(self) -> frozenset[Atom]:
        """The axes along which the value may vary, the score's own axes not included."""
        if self._atoms is None:
            if self.name == "axis":
                self._atoms = frozenset(self.arguments)
            elif self.name == "tensor":
                self._atoms = frozenset(atom for dim in self.arguments[1] for atom in dim)
            elif self.is_leaf:
                self._atoms = frozenset()
            else:
                self._atoms = frozenset().union(*(a.atoms for a in self.arguments))
        return self._atoms

    @property
    def leaves(self) -> frozenset[str]:
        """Names of the kinds of leaves that the expression reads."""
        if self._leaves is None:
            own = frozenset([self.name]) if self.is_leaf else frozenset()
            self._leaves = own if self.is_leaf else own.union(*(a.leaves for a in self.arguments))
        return self._leaves

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"


Coordinate = Dim | Expression
Coordinates = tuple[Coordinate, ...]


LEAF_NAMES: Final = {"score", "axis", "const", "size", "scalar", "tensor", "shift"}
Affine = tuple[dict[Atom, int], Any]  # coefficients, constant (int or SymInt)

_COMPARISONS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_BOOLEAN: Final = {*_COMPARISONS, "and", "or", "xor", "not", "to_bool", "empty_row"}
_FOLDS: Final[dict[str, Callable[..., Any]]] = {
    **_COMPARISONS,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs,
    "floordiv": operator.floordiv, "mod": operator.mod, "maximum": max, "minimum": min,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b, "not": lambda a: not a,
    "to_float": float, "to_int": int, "to_bool": bool, "exp": math.exp, "sqrt": math.sqrt,
    "log": lambda a: math.log(a) if a else -math.inf,
    "tanh": math.tanh, "sin": math.sin, "cos": math.cos, "div": operator.truediv, "pow": operator.pow,
    "rsqrt": lambda a: 1.0 / math.sqrt(a), "log1p": math.log1p, "atan": math.atan, "erf": math.erf,
}  # fmt: skip


def count_instructions(expression: Expression) -> int:
    """Number of different operators in the expression."""
    return sum(not e.is_leaf for e in parts(expression))


def parts(*expressions: Expression) -> Iterator[Expression]:
    """The expressions and all that they are made of, each once."""
    seen: set[Expression] = set()
    todo = [*expressions]
    while todo:
        e = todo.pop()
        if e not in seen:
            seen.add(e)
            yield e
            todo += () if e.is_leaf else e.arguments


class Algebra:
    """Builds expressions; equal ones are one object."""

    def __init__(self) -> None:
        self._made: dict[Any, Expression] = {}
        self.true, self.false = self.const(True), self.const(False)
        self.score = self._leaf("score", (), FLOAT)

    # ------------------------------------------------------------------------------------------------- leaves
    def _leaf(self, name: str, arguments: tuple[Any, ...], kind: str, key: Any = None) -> Expression:
        key = (name, key if key is not None else arguments)
        if key not in self._made:
            self._made[key] = Expression(name, arguments, kind)
        return self._made[key]

    def const(self, value: bool | int | float) -> Expression:
        kind = BOOL if isinstance(value, bool) else INT if isinstance(value, int) else FLOAT
        return self._leaf("const", (value,), kind, (type(value), repr(value)))

    def axis(self, atom: Atom) -> Expression:
        return self._leaf("axis", (atom,), INT)

    def size(self, value: Any) -> Expression:
        """An int or SymInt that is the same everywhere."""
        if isinstance(value, SymInt):
            value = value.node.maybe_as_int() if value.node.maybe_as_int() is not None else value
        return self._leaf("size", (value,), INT, str(value)) if isinstance(value, SymInt) else self.const(value)

    def scalar(self, node: fx.Node) -> Expression:
        """A symbolic float."""
        return self._leaf("scalar", (node,), FLOAT)

    def shift(self, node: fx.Node) -> Expression:
        """A number that all scores of a row share, computed from them."""
        return self._leaf("shift", (node,), FLOAT)

    def tensor(self, node: fx.Node, dims: Dims, kind: str) -> Expression:
        """Elements of a tensor, not looked into."""
        return self._leaf("tensor", (node, dims), kind)

    # ---------------------------------------------------------------------------------------------- operators
    def make(self, name: str, *arguments: Expression) -> Expression:
        """The expression ``name(*arguments)``, simplified."""
        simple = self._simplify(name, arguments)
        if simple is not None:
            return simple
        key = (name, *map(id, arguments))
        if key not in self._made:
            self._made[key] = Expression(name, arguments, self._kind(name, arguments))
        return self._made[key]

    def _kind(self, name: str, arguments: tuple[Expression, ...]) -> str:
        if name in _BOOLEAN:
            return BOOL
        if name == "to_int":
            return INT
        kinds = {a.kind for a in (arguments[1:] if name == "where" else arguments)}
        if FLOAT in kinds or name in (
            "to_float",
            "div",
            "exp",
            "log",
            "sqrt",
            "rsqrt",
            "tanh",
            "sigmoid",
            "sin",
            "cos",
        ):
            return FLOAT
        return BOOL if kinds == {BOOL} and name in ("where", "maximum", "minimum") else INT

    def _simplify(self, name: str, arguments: tuple[Expression, ...]) -> Expression | None:
        if all(a.name == "const" for a in arguments):
            folded = self._fold(name, arguments)
            if folded is not None:
                return folded
        rule = getattr(self, f"_simplify_{name}", None)
        simple = rule(*arguments) if rule is not None else None
        if simple is None and name in _COMPARISONS:
            simple = self._compare(name, *arguments)
        if simple is None and len(arguments) <= 2 and name != "where":
            simple = self._through_where(name, arguments)
        return simple

    def _fold(self, name: str, arguments: tuple[Expression, ...]) -> Expression | None:
        if name == "where":
            return arguments[1] if arguments[0].value else arguments[2]
        if name not in _FOLDS:
            return None
        try:
            value = _FOLDS[name](*(a.value for a in arguments))
        except (ArithmeticError, ValueError):
            return None
        if isinstance(value, complex):
            return None
        return self.const(float(value) if self._kind(name, arguments) == FLOAT else value)

    def _through_where(self, name: str, arguments: tuple[Expression, ...]) -> Expression | None:
        """An operator on a choice between two constants is a choice between two constants."""
        choices = [a for a in arguments if is_constant_choice(a)]
        if len(choices) != 1 or any(a.name != "const" for a in arguments if a is not choices[0]):
            return None
        condition, *branches = choices[0].arguments
        results = [self._fold(name, tuple(b if a is choices[0] else a for a in arguments)) for b in branches]
        if any(r is None for r in results):
            return None
        return self.make("where", condition, *results)  # type: ignore[arg-type]

    def _simplify_where(self, condition: Expression, a: Expression, b: Expression) -> Expression | None:
        if condition.name == "const":
            return a if condition.value else b
        if a is b:
            return a
        if a is self.true and b is self.false:
            return condition
        if a is self.false and b is self.true:
            return self.make("not", condition)
        if condition.name == "not":
            return self.make("where", condition.arguments[0], b, a)
        return None

    def _simplify_and(self, a: Expression, b: Expression) -> Expression | None:
        if a is self.false or b is self.false:
            return self.false
        if a is self.true or a is b:
            return b
        return a if b is self.true else None

    def _simplify_or(self, a: Expression, b: Expression) -> Expression | None:
        if a is self.true or b is self.true:
            return self.true
        if a is self.false or a is b:
            return b
        return a if b is self.false else None

    def _simplify_not(self, a: Expression) -> Expression | None:
        if a.name == "not":
            return a.arguments[0]
        if a.name in ("and", "or"):
            return self.make("or" if a.name == "and" else "and", *(self.make("not", x) for x in a.arguments))
        opposite = {"le": "gt", "ge": "lt", "eq": "ne", "ne": "eq"}.get(a.name)
        if opposite is not None and all(x.kind != FLOAT for x in a.arguments):  # NaN compares False both ways
            return self.make(opposite, *a.arguments)
        return None

    def _simplify_to_bool(self, a: Expression) -> Expression | None:
        return a if a.kind == BOOL else None

    def _simplify_to_int(self, a: Expression) -> Expression | None:
        if a.kind == BOOL:
            return self.make("where", a, self.const(1), self.const(0))
        return a if a.kind == INT else None

    def _simplify_to_float(self, a: Expression) -> Expression | None:
        if a.kind == BOOL:
            return self.make("where", a, self.const(1.0), self.const(0.0))
        return a if a.kind == FLOAT else None

    def _simplify_minimum(self, a: Expression, b: Expression) -> Expression | None:
        return self._both_choices(a, b, lambda x, y: "and" if x > y else "or")

    def _simplify_maximum(self, a: Expression, b: Expression) -> Expression | None:
        return self._both_choices(a, b, lambda x, y: "or" if x > y else "and")

    def _both_choices(self, a: Expression, b: Expression, joint: Callable[[Any, Any], str]) -> Expression | None:
        """Least, greatest or product of two choices between the same two constants."""
        if not (is_constant_choice(a) and is_constant_choice(b)) or a.arguments[1:] != b.arguments[1:]:
            return None
        (p, x, y), q = a.arguments, b.arguments[0]
        return self.make("where", self.make(joint(x.value, y.value), p, q), x, y)

    def _simplify_add(self, a: Expression, b: Expression) -> Expression | None:
        if _is_zero(a) and b.kind != BOOL and (a.kind != FLOAT or b.kind == FLOAT):
            return b
        if _is_zero(b) and a.kind != BOOL and (b.kind != FLOAT or a.kind == FLOAT):
            return a
        return self._integers(a, b, lambda x, y: x + y)

    def _simplify_sub(self, a: Expression, b: Expression) -> Expression | None:
        if _is_zero(b) and a.kind != BOOL and (b.kind != FLOAT or a.kind == FLOAT):
            return a
        return self._integers(a, b, lambda x, y: x - y)

    def _simplify_mul(self, a: Expression, b: Expression) -> Expression | None:
        for one, other in ((a, b), (b, a)):
            if one.name == "const" and one.value == 1 and (one.kind != FLOAT or other.kind == FLOAT):
                return other if other.kind != BOOL or one.kind == BOOL else self.make("to_int", other)
            if one.name == "const" and one.kind == INT and one.value == 0 and other.kind == INT:
                return one
        if a.kind == BOOL and b.kind == BOOL:
            return self.make("and", a, b)
        if is_constant_choice(a) and {a.arguments[1].value, a.arguments[2].value} == {0, 1}:
            return self._both_choices(a, b, lambda x, y: "and" if x > y else "or")
        return None

    def _simplify_div(self, a: Expression, b: Expression) -> Expression | None:
        return a if b.name == "const" and b.value == 1 and a.kind == FLOAT else None

    def _simplify_eq(self, a: Expression, b: Expression) -> Expression | None:
        return self._truth(a, b, True)

    def _simplify_ne(self, a: Expression, b: Expression) -> Expression | None:
        return self._truth(a, b, False)

    def _truth(self, a: Expression, b: Expression, equal: bool) -> Expression | None:
        """``flag == 0``, ``flag != True`` and the like."""
        for flag, constant in ((a, b), (b, a)):
            if flag.kind == BOOL and constant.name == "const" and constant.value in (0, 1):
                return flag if bool(constant.value) == equal else self.make("not", flag)
        return None

    # ---------------------------------------------------------------------------------- integers and ranges
    def affine(self, e: Expression) -> Affine | None:
        """Coefficients and constant of an integer expression that is affine in the axes; None for any other."""
        if e._affine is False:
            e._affine = self._find_affine(e)
        return e._affine  # type: ignore[return-value]

    def _find_affine(self, e: Expression) -> Affine | None:
        if e.kind == FLOAT or (e.kind == BOOL and e.name != "const"):
            return None
        if e.name in ("const", "size"):
            return {}, e.arguments[0] + 0
        if e.name == "axis":
            return {e.arguments[0]: 1}, 0
        if e.name == "neg":
            inner = self.affine(e.arguments[0])
            return None if inner is None else combine_affine(({}, 0), inner, -1)
        if e.name not in ("add", "sub", "mul"):
            return None
        left, right = (self.affine(a) for a in e.arguments)
        if left is None or right is None:
            return None
        if e.name != "mul":
            return combine_affine(left, right, 1 if e.name == "add" else -1)
        for (coefficients, constant), (others, factor) in ((left, right), (right, left)):
            if not others and type(factor) is int:
                return {atom: c * factor for atom, c in coefficients.items()}, constant * factor
        return None

    def _integers(self, a: Expression, b: Expression, combine: Callable[[Any, Any], Any]) -> Expression | None:
        """Constants collected: ``(x + 1) - 1`` is ``x``."""
        if a.kind == FLOAT or b.kind == FLOAT or not (a.name == "add" or b.name in ("const", "size") or a is b):
            return None
        left, right = self.affine(a), self.affine(b)
        if left is None or right is None:
            return None
        sign = 1 if combine(0, 1) == 1 else -1
        total = combine_affine(left, right, sign)
        if a.name in ("axis", "const", "size") and total[0]:
            return None  # already simple
        return self.from_affine(total)

    def from_affine(self, affine: Affine) -> Expression:
        """An integer expression: axes with their coefficients, then the constant."""
        result: Expression | None = None
        for atom, coefficient in affine[0].items():
            term = self.axis(atom) if coefficient == 1 else self.raw("mul", self.axis(atom), self.const(coefficient))
            result = term if result is None else self.raw("add", result, term)
        constant = self.size(affine[1])
        if result is None:
            return constant
        return result if _is_zero(constant) else self.raw("add", result, constant)

    def _compare_distance(self, name: str, x: Expression, limit: Expression) -> Expression | None:
        """``abs(x) < limit`` as a band, ``abs(x) > limit`` as its two sides."""
        if self.affine(x) is None or self.affine(limit) is None:
            return None
        below = self.make(name, x, limit)
        above = self.make(_mirrored(name), x, self.make("sub", self.const(0), limit))
        return self.make("and" if name in ("lt", "le") else "or", below, above)

    def raw(self, name: str, *arguments: Expression) -> Expression:
        """An operator without simplification."""
        key = (name, *map(id, arguments))
        if key not in self._made:
            self._made[key] = Expression(name, arguments, self._kind(name, arguments))
        return self._made[key]

    def _compare(self, name: str, a: Expression, b: Expression) -> Expression | None:
        """A comparison of affine integers: decided by the ranges of the axes, or in standard form."""
        if a.name == "abs" and a.kind == INT and b.kind == INT and name in ("lt", "le", "gt", "ge"):
            return self._compare_distance(name, a.arguments[0], b)
        left, right = self.affine(a), self.affine(b)
        if left is None or right is None:
            return None
        coefficients, constant = combine_affine(left, right, -1)
        if name == "lt":
            name, constant = "le", constant + 1
        elif name == "gt":
            name, constant = "ge", constant - 1
        lowest, highest = bounds((coefficients, constant))
        decided = _decide(name, lowest, highest)
        if decided is not None:
            return self.const(decided)
        positive = {atom: c for atom, c in coefficients.items() if c > 0}
        negative = {atom: -c for atom, c in coefficients.items() if c < 0}
        if not positive:  # keep an axis on the left
            positive, negative, constant = negative, positive, -constant
            name = {"le": "ge", "ge": "le"}.get(name, name)
        return self.raw(name, self.from_affine((positive, 0)), self.from_affine((negative, -constant)))


def _mirrored(name: str) -> str:
    return {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}[name]


def bounds(affine: Affine) -> tuple[Any, Any]:
    """Least and greatest value over the ranges of the axes."""
    lowest = highest = affine[1]
    for atom, coefficient in affine[0].items():
        reach = coefficient * (atom.size - 1)
        if coefficient > 0:
            highest = highest + reach
        else:
            lowest = lowest + reach
    return lowest, highest


def _decide(name: str, lowest: Any, highest: Any) -> bool | None:
    if name == "le":
        return True if known(highest <= 0) else False if known(lowest > 0) else None
    if name == "ge":
        return True if known(lowest >= 0) else False if known(highest < 0) else None
    if known(lowest > 0) or known(highest < 0):
        return name == "ne"
    if known_equal(lowest, 0) and known_equal(highest, 0):
        return name == "eq"
    return None


def combine_affine(a: Affine, b: Affine, sign: int) -> Affine:
    coefficients = dict(a[0])
    for atom, c in b[0].items():
        total = coefficients.get(atom, 0) + sign * c
        if total:
            coefficients[atom] = total
        else:
            coefficients.pop(atom, None)
    return coefficients, a[1] + sign * b[1]


def _is_zero(e: Expression) -> bool:
    return e.name == "const" and e.kind != BOOL and e.value == 0


def is_constant_choice(e: Expression) -> bool:
    """Whether the expression is one of two constants."""
    return e.name == "where" and all(a.name == "const" for a in e.arguments[1:])


def tensors_and_axes(e: Expression) -> tuple[list[tuple[fx.Node, frozenset[Any]]], set[Any]]:
    """Captured tensors with their axes, and the axes whose index is used as a number."""
    tensors: dict[Expression, tuple[fx.Node, frozenset[Any]]] = {}
    axes: set[Any] = set()
    for x in parts(e):
        if x.name == "tensor":
            tensors[x] = x.arguments[0], x.atoms
        elif x.name == "axis":
            axes.add(x.arguments[0])
    return list(tensors.values()), axes
