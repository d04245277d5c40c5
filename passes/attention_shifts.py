"""Numbers that a model subtracts from all scores of a row: the softmax does not see them.

``s - s.amax(-1, keepdim=True)`` is most often the last thing before the softmax, but masks and factors may follow. The
lifter reads such a number as a leaf of its own, and :func:`without_shifts` takes it out where it is proved to remain
one number for all keys of a row.
"""

from vbcompile.passes.attention_expression import Algebra, Expression
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_masks import LOW_FILL


def without_shifts(algebra: Algebra, e: Expression) -> Expression:
    """The logits, less a number per row; raises Refusal where a shift does more than that."""
    if "shift" not in e.leaves:
        return e
    strip = lambda x: without_shifts(algebra, x)
    make, arguments = algebra.make, e.arguments
    match e.name:
        case "shift":
            return algebra.const(0.0)
        case "neg":
            return make("neg", strip(arguments[0]))
        case "add":
            return make("add", *map(strip, arguments))
        case "sub":
            a, b = map(strip, arguments)
            return make("mul", b, algebra.const(-1.0)) if a.name == "const" and a.value == 0 else make("sub", a, b)
        case "mul" | "div" if _is_finite_number(arguments[1]):
            return make(e.name, strip(arguments[0]), arguments[1])
        case "mul" if _is_finite_number(arguments[0]):
            return make("mul", arguments[0], strip(arguments[1]))
        case "where" if "shift" not in arguments[0].leaves and any(map(_is_low, arguments[1:])):
            return make("where", arguments[0], *map(strip, arguments[1:]))
    raise Refusal("scores less a number of their row, which then does more than shift them")


def _is_finite_number(e: Expression) -> bool:
    return e.name == "const" and 0 < abs(e.value) < float("inf")


def _is_low(e: Expression) -> bool:
    """Whether a fill hides its keys, whatever is subtracted from the others."""
    return e.name == "const" and e.value <= LOW_FILL
