"""Whether an expression's value is exactly the source's: nothing may be decided by what only rounding tells apart.

Expressions compute in the accumulation type and in integers of 64 bits. A comparison of numbers that the source rounded
to 16 bits, or divided, may come out otherwise there, and an integer that wraps in the source does not wrap there. Such
a decision is left to the source's own operators, and their result is loaded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymFloat, SymInt

from vbcompile.compat import promoted_type
from vbcompile.passes.attention_expression import BOOL, FLOAT, INT, Algebra, Expression, bounds
from vbcompile.passes.graph_ops import known, tensor_of, value_of

_WITHOUT_ROUNDING = {"neg", "abs", "maximum", "minimum", "relu"}
_NARROW = {torch.uint8, torch.int8, torch.int16}
_SMALL_FACTOR = 2**16  # times a position, this fits 32 bits
LARGEST_EXACT = {torch.float16: 2**8, torch.bfloat16: 2**6}  # a few such integers add up to a number of the dtype


def is_exact(e: Expression, computed_in: torch.dtype, scores: torch.dtype | None) -> bool:
    """Whether a float expression's value is what operators of dtype ``computed_in`` gave in the source.

    Args:
        scores: their dtype, in whose accumulation type expressions are evaluated; None where it is not known.
    """
    both_double = scores == computed_in == torch.float64
    narrowed = computed_in == torch.float64 and not both_double
    if _is_integral(e, LARGEST_EXACT.get(computed_in)) and not (narrowed and _reads_wide_integers(e)):
        return True
    if narrowed:
        return False
    alike = both_double or (computed_in == torch.float32 and scores not in (None, torch.float64))
    return _is_read(e, both_double) or (alike and _is_same(e, both_double))


def cancels(e: Expression, computed_in: torch.dtype, scores: torch.dtype | None) -> bool:
    """Whether float64 arithmetic would be done in a narrower type, in which differences lose what they are made of."""
    if computed_in != torch.float64 or scores == torch.float64:
        return False
    return not (_is_read(e, True) or is_exact(e, computed_in, scores))


def _reads_wide_integers(e: Expression) -> bool:
    """Whether an element of a tensor takes part that float32 may not hold."""
    if e.name == "tensor":
        return e.kind == INT and tensor_of(e.arguments[0]).dtype not in _NARROW
    return not e.is_leaf and any(map(_reads_wide_integers, e.arguments))


def _is_read(e: Expression, doubles: bool) -> bool:
    """A constant, an element of a tensor, or a choice of such: nothing is computed."""
    if e.name == "where":
        return all(_is_read(a, doubles) for a in e.arguments[1:])
    return e.name == "const" or (e.name == "tensor" and (doubles or tensor_of(e.arguments[0]).dtype != torch.float64))


def _is_same(e: Expression, doubles: bool) -> bool:
    """Made by operators that round once, so that every evaluation gives the same."""
    if e.kind != FLOAT or _is_read(e, doubles) or _is_integral(e, None):
        return True
    if e.name == "where":
        return all(_is_same(a, doubles) for a in e.arguments[1:])
    return e.name in _WITHOUT_ROUNDING | {"add", "sub"} and all(_is_same(a, doubles) for a in e.arguments)


def _is_integral(e: Expression, small: int | None) -> bool:
    """Whether the value is an integer that floats hold exactly; ``small``: in 16 bits, constants below that alone."""
    if e.name == "const":
        return float(e.value).is_integer() and abs(e.value) < (small or 2**24)
    if e.kind != FLOAT:
        return e.kind == BOOL or small is None
    if e.name == "to_float":
        return _is_integral(e.arguments[0], small)
    parts = e.arguments[1:] if e.name == "where" else e.arguments
    plain = {"where", "add", "sub", *_WITHOUT_ROUNDING} | ({"mul"} if small is None else set())
    return e.name in plain and all(_is_integral(a, small) for a in parts)


def compared_in(operands: Sequence[Any]) -> torch.dtype:
    """The dtype in which PyTorch combines operands: nodes, or numbers."""
    plain = {SymInt: 0, SymFloat: 0.0}
    values = [plain.get(type(v), v) for v in map(value_of, operands)]
    return values[0].dtype if len(values) == 1 else promoted_type(*values)


# ------------------------------------------------------------------------------------------------------- integers
def may_wrap(name: str, dtype: torch.dtype, arguments: Sequence[Expression]) -> bool:
    """Whether integer arithmetic in ``dtype`` may wrap where 64 bits would not."""
    if dtype in _NARROW:
        return name not in ("maximum", "minimum")
    numbers = [abs(a.value) for a in arguments if a.name == "const"]
    if dtype != torch.int32:
        return False
    if name in ("add", "sub"):
        return any(number >= 2**30 for number in numbers)
    return name in ("mul", "pow", "square") and not any(number <= _SMALL_FACTOR for number in numbers)


def may_be_cut(algebra: Algebra, e: Expression, dtype: torch.dtype) -> bool:
    """Whether a conversion to the integer ``dtype`` may change the value of an integer expression."""
    if e.kind == BOOL or dtype == torch.int64:
        return False
    if e.name == "where":
        return any(may_be_cut(algebra, a, dtype) for a in e.arguments[1:])
    limits = torch.iinfo(dtype)
    if e.name == "tensor":
        own = torch.iinfo(tensor_of(e.arguments[0]).dtype)
        return own.min < limits.min or own.max > limits.max
    affine = algebra.affine(e) if e.kind == INT else None
    if affine is None:
        return True
    lowest, highest = bounds(affine)
    if dtype == torch.int32 and any(isinstance(x, SymInt) for x in (lowest, highest)):
        return any(abs(c) > _SMALL_FACTOR for c in affine[0].values())
    return not (known(lowest >= limits.min) and known(highest <= limits.max))
