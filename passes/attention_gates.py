"""Factors of attention weights that differ from key to key.

Before the weights are divided by their sum, such a factor is a part of the softmax: its logarithm is added to the
logits. Afterwards it belongs to the values.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from vbcompile.passes.attention_expression import FLOAT, Algebra, Expression, parts
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_masks import MASK_SIZED, Logits, holds_learned_numbers
from vbcompile.passes.graph_ops import Call, call_of, is_tensor, tensor_of

_NOT_NEGATIVE = {"sigmoid", "exp", "exp2", "softmax", "softplus", "relu", "abs", "square"}
_SAME = {
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "reshape", "flatten", "unflatten", "unsqueeze",
    "squeeze", "transpose", "mT", "t", "T", "permute", "movedim", "expand", "expand_as", "contiguous", "clone",
    "getitem", "narrow", "select", "repeat", "repeat_interleave", "detach", "amax", "mean", "sum",
}  # fmt: skip


def is_gate(node: fx.Node, depth: int = 20) -> bool:
    """Whether no element is negative, and no gradient goes on from an element that is zero.

    Where it is zero, a key with the logarithm as its logit gets no gradient at all.
    """
    call = call_of(node)
    if call is None or call.in_place or depth == 0 or not tensor_of(node).is_floating_point():
        return False
    below = lambda x: is_tensor(x) and is_gate(x, depth - 1)
    number = lambda x: isinstance(x, (int, float)) and 0 < x < math.inf
    match call.name:
        case name if name in _NOT_NEGATIVE:
            return True
        case name if name in _SAME:
            return below(call.input)
        case "mul":
            return all(below(x) or number(x) for x in (call.input, call.get("other")))
        case "add":
            return call.get("alpha", 1) == 1 and all(below(x) or number(x) for x in (call.input, call.get("other")))
        case "div":
            return below(call.input) and number(call.get("other"))
        case "pow":
            return call.get("other") == 2
        case "sub" | "rsub":
            return _is_opposite(call)
        case "clamp" | "clamp_min":
            return number(call.get("min"))
    return False


def _is_opposite(call: Call) -> bool:
    """``1 - sigmoid(x)``."""
    a, b = call.input, call.get("other")
    one, gate = (a, b) if call.name == "sub" else (b, a)
    inner = call_of(gate)
    return one == 1 and inner is not None and inner.name == "sigmoid" and "alpha" not in call.arguments


def gated(algebra: Algebra, logits: Logits, gates: Sequence[tuple[Expression, float]]) -> Logits:
    """Logits whose exponentials are those of ``logits`` times ``gate + guard`` for each of the pairs.

    Raises Refusal where all logits of a row may be so low that a logarithm vanishes beside them: weights are equal
    there, and the gates alone tell them apart.
    """
    if gates and not _is_moderate(logits.value):
        raise Refusal("weights that are multiplied and divided by their sum, in rows that may have no key")
    make, const = algebra.make, algebra.const
    for gate, guard in gates:
        shown = algebra.true if guard else make("gt", gate, const(0.0))
        raised = make("add", gate, const(guard)) if guard else make("where", shown, gate, const(1.0))
        mask = logits.mask if guard else [*logits.mask, shown]
        every_row = logits.every_row and bool(guard)
        logits = replace(logits, value=make("add", logits.value, make("log", raised)), mask=mask, every_row=every_row)
    return logits


def _is_moderate(e: Expression) -> bool:
    """Whether no number in it is known or suspected to be of a size that hides a key."""
    return not any(_may_be_large(x) for x in parts(e))


def _may_be_large(x: Expression) -> bool:
    if x.name == "const":
        return MASK_SIZED <= abs(x.value) < math.inf
    return x.name == "tensor" and x.kind == FLOAT and not holds_learned_numbers(x.arguments[0], largest=MASK_SIZED)
