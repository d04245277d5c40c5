"""Numbers that a model subtracts from all scores of a row: the softmax does not see them.

``s - s.amax(-1, keepdim=True)`` is most often the last thing before the softmax, but masks and factors may follow. The
lifter reads such a number as a leaf of its own, and :func:`without_shifts` takes it out where it is proved to remain
one number for all keys of a row.
"""

import math
from collections.abc import Callable, Iterable

from torch import fx

from vbcompile.passes.attention_expression import Algebra, Expression
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_masks import LOW_FILL, POWERLESS, holds_fill, may_hold_fills
from vbcompile.passes.graph_axes import index_items, is_full_slice
from vbcompile.passes.graph_effects import ancestors
from vbcompile.passes.graph_ops import ACTIVATIONS, call_of, is_tensor, shape_of, tensor_of

_AS_LARGE = {
    "amax", "max", "maximum", "logsumexp", "getitem", "masked_fill", "where", "tril", "triu", "clamp", "clamp_min",
    "clamp_max", "tanh", "detach", "add", "sub", "mul", "div", "neg", "to", "float", "double", "type", "type_as",
    "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "transpose", "mT", "permute", "expand", "contiguous",
    "clone", "cat", "pad", "relu", "sigmoid", "abs", "exp", "log", "log1p", "sqrt", "pow", "square",
    *(ACTIVATIONS.keys() - {"nan_to_num", "isnan", "isinf", "sign", "threshold", "hardshrink"}),
}  # fmt: skip


def may_lose_scores(shifts: Iterable[fx.Node], score: fx.Node, depends: Callable[[fx.Node], bool]) -> bool:
    """Whether a number that shifts a row may be one beside which the row's scores are lost, or infinite.

    A row's maximum is a score that is seen. An average, a minimum or a median of scores and of a mask's fills is not.
    """
    made = {n for n in ancestors(shifts, [score]) if depends(n)} - {score}
    added = {score} if getattr(call_of(score), "name", "") in ("baddbmm", "addmm") else set[fx.Node]()
    return not all(map(_is_as_large, made)) and any(_reads_fills(n, depends) for n in made | added)


def _is_as_large(node: fx.Node) -> bool:
    """Whether an operator keeps a row's largest score, or computes with it."""
    call = call_of(node)
    if call is None or call.name not in _AS_LARGE:
        return False
    if call.name != "getitem" or not is_tensor(call.input):  # of the pair that ``max`` gives
        return True
    shape = shape_of(call.input)
    items = [item for item in index_items(call.get("index"), len(shape)) if item is not None]
    return all(map(is_full_slice, items, shape))


def _reads_fills(node: fx.Node, depends: Callable[[fx.Node], bool]) -> bool:
    call = call_of(node)
    if call is None or holds_fill(call) or any(type(a) is float and math.isinf(a) for a in call.arguments.values()):
        return True
    tensors = [i for i in node.all_input_nodes if is_tensor(i) and tensor_of(i).is_floating_point() and not depends(i)]
    return any(may_hold_fills(t, -POWERLESS) for t in tensors)


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
