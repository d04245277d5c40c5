"""Logits that are NaN, or infinitely high, where all scores are finite.

``nan_to_num`` makes zeros of a row of such weights, as of a row without a key. The fused call tells the two apart: it
gives NaN for the one, and zeros for the other.
"""

import math
from collections.abc import Callable

from vbcompile.passes.attention_expression import FLOAT, Expression
from vbcompile.passes.attention_masks import holds_learned_numbers

_LOW, _NAN = 1, 2  # may be -inf; may be NaN or +inf
_SMOOTH = {"tanh", "sigmoid", "exp", "relu", "atan", "erf"}  # finite where their argument is -inf


def may_be_nan(logits: Expression) -> bool:
    """Whether a logit may be NaN or ``+inf`` by a mask's infinity alone, as ``s - mask`` and ``0 * -inf`` are."""
    return bool(_infinities(logits, {}) & _NAN)


def _infinities(e: Expression, known: dict[Expression, int]) -> int:
    if e not in known:
        known[e] = _of_operator(e, lambda argument: _infinities(argument, known))
    return known[e]


def _of_operator(e: Expression, of: Callable[[Expression], int]) -> int:
    arguments = e.arguments
    match e.name:
        case "const":
            value = float(e.value)
            return 0 if math.isfinite(value) else _LOW if value < 0 else _NAN
        case "tensor":
            return _LOW if e.kind == FLOAT and not holds_learned_numbers(arguments[0], activations=True) else 0
        case _ if e.is_leaf:
            return 0
        case "add" | "maximum" | "minimum":
            return of(arguments[0]) | of(arguments[1])
        case "where":
            return of(arguments[1]) | of(arguments[2])
        case "sub":
            return of(arguments[0]) | _turned(of(arguments[1]))
        case "to_float":
            return of(arguments[0])
        case "mul" if _is_positive(arguments[0]) or _is_positive(arguments[1]):
            return of(arguments[1] if _is_positive(arguments[0]) else arguments[0])
        case "mul":
            return _NAN if any(a.name != "tensor" and of(a) for a in arguments) else 0
        case "div" if _is_positive(arguments[1]):
            return of(arguments[0])
        case "div":
            by_zero = arguments[1].name not in ("const", "tensor", "scalar")
            return _NAN if by_zero or of(arguments[0]) else 0
        case "log":
            return _LOW | _turned(of(arguments[0]))
        case name if name in _SMOOTH:
            return of(arguments[0]) & _NAN
        case _:
            return _NAN if any(map(of, arguments)) else 0


def _turned(found: int) -> int:
    return _NAN if found else 0


def _is_positive(e: Expression) -> bool:
    return e.name == "const" and 0 < e.value < math.inf
