"""From an expression of the logits to scale, logits and mask.

A fill of ``-inf`` becomes the mask. A row whose keys are all filled with a finite number must come out as in the
source, so such a fill keeps its value, unless every row is proved to keep a key, or rows without one are found at run
time (``Guard``): then a fill so low that its weight is zero is a mask too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

from vbcompile.passes.attention_contraction import contraction_of, is_product
from vbcompile.passes.attention_expression import (
    FLOAT,
    INT,
    Affine,
    Algebra,
    Expression,
    bounds,
    combine_affine,
    parts,
)
from vbcompile.passes.graph_axes import Dim
from vbcompile.passes.graph_effects import upstream
from vbcompile.passes.graph_ops import Call, call_of, is_parameter, is_tensor, known, tensor_of, value_of

LOWEST_FILL = -1e30  # below this, exp(fill - largest logit) is zero for every logit that a model computes
LOW_FILL = -6.5e4  # below this, the same holds for logits of a size that float16 has room for on both sides
COVERED_FILL = -9e3  # keys below this, their weights set to zero afterwards, take nothing from the weights of others
POWERLESS = -2e3  # exp of this is zero in float64, beside every score whose own power is finite
MASK_SIZED = 1e3  # no learned number is as large, and beside a larger one scores lose digits
_ABSORBS = 1e20  # float64 too has no digit left for a score beside it
_DECIDES = 700.0  # no weight is left in float64 that is so far below another
_VANISHES = -15.0  # float16 holds no weight of exp(-18)
_BEYOND = 2**30  # no index is as large
_MOST_READ = 200  # nodes that are looked at for where a tensor comes from


@dataclass
class Logits:
    """``where(and of mask, value, -inf)`` of ``scale * score``.

    Attributes:
        scale: constant factor of the score.
        scalar: symbolic factor of the score, or None.
        inverse: whether the score is divided by ``scalar``.
        features_of: a tensor by the square root of whose last size the score is divided.
        mask: conditions that all hold where a key takes part.
        every_row: whether each row is proved to keep a key.
    """

    value: Expression
    mask: list[Expression]
    scale: float = 1.0
    scalar: fx.Node | None = None
    inverse: bool = False
    features_of: fx.Node | None = None
    every_row: bool = False


@dataclass(frozen=True)
class Guard:
    """Rows without a key are found at run time, and keep the source's meaning there.

    Attributes:
        absorbs: whether a number so low that the score vanishes beside it may be added instead of put in the score's
            place: the same values, another gradient.
    """

    absorbs: bool


def split_logits(
    algebra: Algebra, logits: Expression, keys: Dim, low_fills: float | None = None, guard: Guard | None = None
) -> Logits:
    """Separate the mask and the scale from the logits; ``keys`` are the axes of the softmax.

    ``low_fills``: rows without a key do not matter, so that every fill down there is a mask.
    """
    low = value, mask = _split(algebra, logits, low_fills or LOWEST_FILL)
    every_row = keeps_a_key(algebra, mask, keys) and _is_finite(value)
    if not every_row and low_fills is None:
        value, mask = _split(algebra, logits, float("-inf"))
        every_row = keeps_a_key(algebra, mask, keys) and _is_finite(value)
        may_guard = _is_finite(low[0]) and not any("score" in condition.leaves for condition in low[1])
        if guard is not None and may_guard:
            value, mask, every_row = *_guarded(algebra, low, (value, mask), keys, guard), False
    if any("score" in condition.leaves for condition in mask):  # such a mask stays a part of the logits
        value, mask, every_row = logits, [], False
    return _extract_scale(algebra, Logits(value, _unique(algebra, mask), every_row=every_row))


def may_vanish(algebra: Algebra, logits: Expression, shown: list[Expression]) -> bool:
    """Whether all weights where ``shown`` holds may be zero by fills elsewhere in the row, which divided gives NaN."""
    value, _ = _split(algebra, logits, float("-inf"))
    value, low = _split(algebra, value, _VANISHES)
    covered = set(_unique(algebra, low)) <= set(_unique(algebra, shown)) and _is_finite(value)
    return not covered or _holds_number_beyond(value, _DECIDES)


def may_absorb(logits: Logits, dtype: torch.dtype) -> bool:
    """Whether a row may hold nothing but finite fills beside which ``dtype`` loses the logarithm of their number."""
    return _may_be_filled(logits, max(MASK_SIZED, 0.1 / torch.finfo(dtype).eps))


def may_lose_scores_of_float64(logits: Logits) -> bool:
    """Whether there may be finite fills beside which float64 holds the scores and float32 does not."""
    floats = (abs(e.value) for e in parts(logits.value) if e.name == "const" and e.kind == FLOAT)
    return any(MASK_SIZED < number < _ABSORBS for number in floats) or _adds_fills(logits.value, MASK_SIZED)


def may_underflow(logits: Logits) -> bool:
    """Whether a row may hold nothing but finite fills, whose powers are zero."""
    return _may_be_filled(logits, _DECIDES)


def may_share(logits: Logits) -> bool:
    """Whether all keys that a row keeps may be filled too, by another mask, so that hidden ones share their weight."""
    return _may_be_filled(logits, -POWERLESS)


def _may_be_filled(logits: Logits, limit: float) -> bool:
    """Whether logits may be finite fills beyond ``limit``: constants, or tensors that are added."""
    return _holds_number_beyond(logits.value, limit) or _adds_fills(logits.value, limit)


def _adds_fills(value: Expression, limit: float) -> bool:
    """Whether a tensor that is added to the score, or takes its place, may hold finite fills beyond ``limit``."""
    tensors = (x.arguments[0] for e in _addends(value) for x in parts(e) if x.name == "tensor" and x.kind == FLOAT)
    return any(may_hold_fills(node, limit) for node in tensors)


def may_hold_fills(node: fx.Node, limit: float) -> bool:
    """Whether a tensor of floats may be, or be made of, a mask of numbers beyond ``limit``."""
    return _is_made_of_fills(node) or not holds_learned_numbers(node, limit, activations=True)


def _addends(e: Expression) -> list[Expression]:
    """What beside the score the logits are a sum, or a choice, of; what multiplies the score is left out."""
    if "score" not in e.leaves:
        return [e]
    inner = e.arguments if e.name in ("add", "sub", "maximum", "minimum") else ()
    inner = e.arguments[1:] if e.name == "where" else inner
    inner = inner or tuple(a for a in e.arguments if e.name != "score" and "score" in a.leaves)
    return [x for a in inner for x in _addends(a)]


def _is_made_of_fills(node: fx.Node) -> bool:
    """Whether arithmetic that makes a tensor reads a number from which no weight is left: ``1e9 * (1 - mask)``."""
    is_end = lambda n: call_of(n) is None or contraction_of(call_of(n), n) is not None
    reached = upstream([node], lambda n: () if is_end(n) else n.all_input_nodes)
    return any(call is not None and holds_fill(call) for call in map(call_of, reached))


def holds_fill(call: Call) -> bool:
    """Whether an operator adds, or puts in place of others, a finite number of which no weight is left."""
    numbers = [a for a in call.arguments.values() if type(a) in (int, float)]
    return call.name in _FILLS and any(_DECIDES < abs(a) < float("inf") for a in numbers)


_FILLS = {"mul", "add", "sub", "rsub", "div", "where", "masked_fill", "full", "full_like"}


def _holds_number_beyond(value: Expression, limit: float) -> bool:
    """Whether a finite constant in the expression is larger than ``limit``, or as far below zero."""
    floats = (e.value for e in parts(value) if e.name == "const" and e.kind == FLOAT)
    return any(limit < abs(number) < float("inf") for number in floats)


def _guarded(
    algebra: Algebra,
    low: tuple[Expression, list[Expression]],
    exact: tuple[Expression, list[Expression]],
    keys: Dim,
    guard: Guard,
) -> tuple[Expression, list[Expression]]:
    """``low``, where every low fill is a mask, in rows that keep a key; ``exact``, where none is, in the others."""
    terms, hidden = (_unique(algebra, mask) for mask in (low[1], exact[1]))
    shown = conjunction(algebra, terms)
    if shown is None or not set(hidden) <= set(terms) or len(set(terms)) == len(set(hidden)):
        return exact
    empty = algebra.make("empty_row", shown)
    relaxed = [_relaxed(algebra, term, empty, keys) for term in terms if term not in hidden]
    return _in_rows(algebra, empty, exact[0], low[0], shown, guard), [*hidden, *relaxed]


def _relaxed(algebra: Algebra, term: Expression, empty: Expression, keys: Dim) -> Expression:
    """``term`` or ``empty``; of a comparison that bounds the keys, one with a bound beyond all of them."""
    if term.name not in ("le", "ge") or any(side.kind != INT for side in term.arguments):
        return algebra.make("or", term, empty)
    left, right = term.arguments
    beyond = _BEYOND if term.name == "le" else -_BEYOND
    if left.atoms.isdisjoint(keys):
        return algebra.raw(term.name, algebra.raw("where", empty, algebra.const(-beyond), left), right)
    return algebra.raw(term.name, left, algebra.raw("where", empty, algebra.const(beyond), right))


def _in_rows(
    algebra: Algebra, empty: Expression, there: Expression, elsewhere: Expression, shown: Expression, guard: Guard
) -> Expression:
    """``there`` in empty rows, else ``elsewhere``; as a sum with the score where it is one."""
    there = _where_hidden(algebra, there, shown)
    zero = algebra.const(0.0)
    if there.name == "const" and there.value <= LOWEST_FILL and guard.absorbs:
        return algebra.make("add", elsewhere, algebra.make("where", empty, there, zero))
    for one, other in (there.arguments, tuple(reversed(there.arguments))) if there.name == "add" else ():
        if one is elsewhere:
            return algebra.make("add", one, algebra.make("where", empty, _where_hidden(algebra, other, shown), zero))
    return algebra.make("where", empty, there, elsewhere)


def _where_hidden(algebra: Algebra, e: Expression, shown: Expression) -> Expression:
    """The expression where ``shown`` is False."""
    if e.name != "where":
        return e
    condition, a, b = e.arguments
    if set(conjuncts(condition)) == set(conjuncts(shown)):
        return b
    return a if set(conjuncts(algebra.make("not", condition))) == set(conjuncts(shown)) else e


def conjunction(algebra: Algebra, terms: list[Expression]) -> Expression | None:
    """All of the terms; None for no terms."""
    result: Expression | None = None
    for term in terms:
        result = term if result is None else algebra.make("and", result, term)
    return result


def conjuncts(e: Expression) -> list[Expression]:
    if e.name == "and":
        return [t for a in e.arguments for t in conjuncts(a)]
    return [e]


def _unique(algebra: Algebra, mask: list[Expression]) -> list[Expression]:
    terms = [t for m in mask for t in conjuncts(m)]
    return [t for t in dict.fromkeys(terms) if t is not algebra.true]


def _split(algebra: Algebra, e: Expression, fill: float) -> tuple[Expression, list[Expression]]:
    """``(value, conditions)``: where a condition does not hold, the logit is at most ``fill``."""
    limited = _limited_below(e, fill)
    if limited is not None:
        value, masked = _split(algebra, limited[0], fill)
        if e.name == "maximum":
            return algebra.make("maximum", value, limited[1]), masked
        return algebra.make("where", algebra.make("lt", value, limited[1]), limited[1], value), masked
    if e.name == "where":
        return _split_where(algebra, e, fill)
    if e.name == "add":
        (a, masked_a), (b, masked_b) = (_split(algebra, x, fill) for x in e.arguments)
        return algebra.make("add", a, b), masked_a + masked_b
    if e.name == "sub":
        a, masked = _split(algebra, e.arguments[0], fill)
        b, masked_b = _split(algebra, algebra.make("neg", e.arguments[1]), fill)  # ``score - 1e9 * (1 - mask)``
        rest = algebra.make("add", a, b) if masked_b else algebra.make("sub", a, e.arguments[1])
        return rest, masked + masked_b
    if e.name in ("mul", "div"):
        return _split_scaled(algebra, e, fill)
    return e, []


def _limited_below(e: Expression, fill: float) -> tuple[Expression, Expression] | None:
    """``(x, limit)`` of ``max(x, limit)``, the limit a finite fill; ``clamp`` is written as a choice."""
    pairs: list[tuple[Expression, Expression]] = []
    if e.name == "maximum":
        pairs = [e.arguments, e.arguments[::-1]]
    elif e.name == "where" and e.arguments[0].name == "lt" and e.arguments[0].arguments == e.arguments[:0:-1]:
        pairs = [e.arguments[:0:-1]]
    return next((p for p in pairs if p[1].name == "const" and float("-inf") < p[1].value <= fill), None)


def _split_where(algebra: Algebra, e: Expression, fill: float) -> tuple[Expression, list[Expression]]:
    condition, a, b = e.arguments
    if _is_fill(b, fill):
        value, masked = _split(algebra, a, fill)
        return value, [*masked, condition]
    if _is_fill(a, fill):
        value, masked = _split(algebra, b, fill)
        return value, [*masked, algebra.make("not", condition)]
    (a, masked_a), (b, masked_b) = _split(algebra, a, fill), _split(algebra, b, fill)
    if not masked_a and not masked_b:
        return e, []
    if masked_a == masked_b:
        return algebra.make("where", condition, a, b), masked_a
    in_a = conjunction(algebra, [condition, *masked_a])
    in_b = conjunction(algebra, [algebra.make("not", condition), *masked_b])
    assert in_a is not None and in_b is not None
    return algebra.make("where", condition, a, b), [algebra.make("or", in_a, in_b)]


def _split_scaled(algebra: Algebra, e: Expression, fill: float) -> tuple[Expression, list[Expression]]:
    a, b = e.arguments
    if e.name == "mul" and a.name == "const":
        a, b = b, a
    if b.name != "const" or not 0 < b.value < float("inf"):
        return e, []
    value, masked = _split(algebra, a, fill / b.value if e.name == "mul" else fill * b.value)
    return algebra.make(e.name, value, b), masked


def _is_finite(value: Expression, activations: bool = False) -> bool:
    """Whether no tensor in the logits can itself hold ``-inf``: a mask that is added takes keys from rows, too.

    ``activations``: what matrix products give counts as finite.
    """
    for e in parts(value):
        if (
            e.name == "tensor"
            and e.kind == FLOAT
            and not holds_learned_numbers(e.arguments[0], activations=activations)
        ):
            return False
        if e.name == "const" and e.value == float("-inf"):
            return False
        if e.name == "log" and any(a.kind != FLOAT and a.name == "tensor" for a in parts(e)):
            return False  # of counts and flags, which may be zero
    return True


def may_hide(logits: Logits) -> bool:
    """Whether a tensor in the logits may itself be a mask of ``-inf``, which hides keys that ``logits.mask`` shows."""
    return not _is_finite(logits.value, activations=True)


_BOUNDED = {"sigmoid", "tanh", "sin", "cos", "softmax", "atan", "erf"}
_MAY_BE_INFINITE = {"log", "log2", "log1p", "logsigmoid", "log_softmax", "reciprocal", "rsqrt", "logsumexp"}


def holds_learned_numbers(node: fx.Node, largest: float = -LOWEST_FILL, activations: bool = False) -> bool:
    """Whether a tensor is computed from parameters, integers and constants below ``largest`` alone: biases, slopes.

    A parameter that wants no gradient may be a mask; one that is looked up in, or a layer's weight, is frozen. With
    ``activations`` what matrix products give counts too.
    """
    is_end = lambda n: not _may_hold_floats(n) or (activations and is_product(n))
    made_from = lambda n: [] if is_end(n) else pytree.tree_leaves(_made_from(n))
    nodes = upstream([node], lambda n: [a for a in made_from(n) if isinstance(a, fx.Node)])
    return all(
        count < _MOST_READ
        and (is_end(n) or _is_learned(n))
        and all(abs(a) < largest for a in made_from(n) if isinstance(a, float))
        for count, n in enumerate(nodes)
    )


def _made_from(node: fx.Node) -> Any:
    """The arguments that decide how large the numbers of the result are."""
    call = call_of(node)
    if call is not None and call.name in _BOUNDED:
        return []
    if node.target is F.embedding:
        return _unless_parameters(node.args[1:2])  # the table alone gives elements
    if call is not None and (call.name == "linear" or _is_lookup(call)):
        return _unless_parameters(call.arguments.values())
    return [node.args, *node.kwargs.values()]


def _is_learned(node: fx.Node) -> bool:
    """Whether finite numbers give finite ones here, and a leaf is a parameter that is trained."""
    if node.op in ("placeholder", "get_attr"):
        return is_parameter(node) and tensor_of(node).requires_grad
    call = call_of(node)
    return call is None or not (
        call.in_place or call.name in _MAY_BE_INFINITE or (call.name == "div" and is_tensor(call.get("other")))
    )


def _unless_parameters(arguments: Iterable[Any]) -> list[Any]:
    return [a for a in arguments if not (isinstance(a, fx.Node) and is_parameter(a))]


def _is_lookup(call: Call) -> bool:
    """Whether the call is ``x[indices]``, the indices a tensor."""
    return call.name == "getitem" and is_tensor(call.get("index"))


def _may_hold_floats(node: fx.Node) -> bool:
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return not isinstance(value, (int, torch.SymInt, torch.Size))


def _is_fill(e: Expression, fill: float) -> bool:
    return e.name == "const" and e.value <= fill


# ------------------------------------------------------------------------------------------------ proof about rows
def keeps_a_key(algebra: Algebra, mask: list[Expression], keys: Dim) -> bool:
    """Whether it is proved that in every row some key satisfies all conditions."""
    terms = [t for m in mask for t in conjuncts(m)]
    if not terms:
        return True
    if len(keys) != 1 or len(terms) > 12:
        return False
    return _interval_never_empty(algebra, terms, keys[0], [({}, 0)], [({}, keys[0].size - 1)])


def _interval_never_empty(
    algebra: Algebra, terms: list[Expression], key: Any, low: list[Affine], high: list[Affine]
) -> bool:
    """Whether ``max(low) <= key <= min(high)`` and the terms leave a key for every value of the other axes."""
    for place, term in enumerate(terms):
        rest = terms[place + 1 :]
        if term is algebra.true:
            continue
        if term.name == "or":
            return any(_interval_never_empty(algebra, [*conjuncts(a), *rest], key, low, high) for a in term.arguments)
        bound = _key_bound(algebra, term, key)
        if bound is None:
            return False
        sense, affine = bound
        low = [*low, affine] if sense in ("ge", "eq") else low
        high = [*high, affine] if sense in ("le", "eq") else high
    return all(known(bounds(combine_affine(h, lo, -1))[0] >= 0) for lo in low for h in high)


def _key_bound(algebra: Algebra, term: Expression, key: Any) -> tuple[str, Affine] | None:
    """``(sense, bound)`` with ``key <sense> bound``, the bound affine in other axes."""
    if term.name not in ("le", "ge", "eq"):
        return None
    left, right = (algebra.affine(a) for a in term.arguments)
    if left is None or right is None:
        return None
    coefficients, constant = combine_affine(left, right, -1)
    factor = coefficients.pop(key, 0)
    if factor not in (1, -1):
        return None
    bound = combine_affine(({}, 0), (coefficients, constant), -factor)
    sense = term.name if factor == 1 or term.name == "eq" else {"le": "ge", "ge": "le"}[term.name]
    return sense, bound


# ----------------------------------------------------------------------------------------------------------- scale
def _extract_scale(algebra: Algebra, logits: Logits) -> Logits:
    """Move factors that the score is always multiplied with into ``scale``."""
    while True:
        parents = parents_of_score(algebra, [logits.value, *logits.mask])
        if len(parents) != 1:
            return logits
        (parent,) = parents
        if parent.name not in ("mul", "div") or parent.arguments.count(algebra.score) != 1:
            return logits
        factor = parent.arguments[1] if parent.arguments[0] is algebra.score else parent.arguments[0]
        if parent.name == "div" and parent.arguments[0] is not algebra.score:
            return logits
        if (
            factor.name == "const"
            and factor.value not in (0, float("inf"), float("-inf"))
            and factor.value == factor.value
        ):
            logits.scale = logits.scale * factor.value if parent.name == "mul" else logits.scale / factor.value
        elif factor.name == "scalar" and logits.scalar is None:
            logits.scalar, logits.inverse = factor.arguments[0], parent.name == "div"
        else:
            return logits
        replaced: dict[Expression, Expression] = {parent: algebra.score}
        logits.value = substitute(algebra, logits.value, replaced)
        logits.mask = [substitute(algebra, m, replaced) for m in logits.mask]


def parents_of_score(algebra: Algebra, roots: list[Expression]) -> set[Expression]:
    """The operators that read the score; none where it is a root itself."""
    parents: set[Expression] = set()
    seen: set[Expression] = set()
    todo = list(roots)
    while todo:
        e = todo.pop()
        if e is algebra.score:
            return set()  # a root itself
        if e in seen or e.is_leaf or "score" not in e.leaves:
            continue
        seen.add(e)
        if algebra.score in e.arguments:
            parents.add(e)
        todo.extend(a for a in e.arguments if a is not algebra.score)
    return parents


def substitute(algebra: Algebra, e: Expression, replaced: dict[Expression, Expression]) -> Expression:
    """The expression with some sub-expressions replaced; ``replaced`` serves as memory between calls."""
    if e not in replaced:
        if e.is_leaf or "score" not in e.leaves:
            replaced[e] = e
        else:
            replaced[e] = algebra.make(e.name, *(substitute(algebra, a, replaced) for a in e.arguments))
    return replaced[e]
