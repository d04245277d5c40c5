"""The softmax itself, as a call or written by hand: its logits, its axis, its sink."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from vbcompile.passes.attention_gates import is_gate
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_weights import Gate, Kept, Weights
from vbcompile.passes.graph_axes import RESHAPES, Dim, Dims, Space, broadcast_input, permutation, view_input
from vbcompile.passes.graph_effects import ancestors, cuts_gradient, learned_leaves
from vbcompile.passes.graph_ops import FLOATS, Call, call_of, is_tensor, known_equal, positive_dim, shape_of, tensor_of

_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "detach", "clone", "contiguous"}


@dataclass(frozen=True)
class Softmax:
    """``exp(factor * logits) / (exp(factor * sink) + sum over keys of exp(factor * logits))``.

    Attributes:
        logits: the node that holds the logits, and its dimensions.
        factor: 1, or what another base of the powers stands for.
        masks: keys that take no part, beside what the logits say.
        shifts: numbers of a row that are subtracted, which the softmax does not see.
        others: the nodes between a sink and the sum that it is a part of.
        gates: factors of the exponentials, not negative, that are summed with them.
        sink: one more logit per row: a node or number and its dimensions, None where there is none.
        weights: the walk to the second product, without what belonged to the softmax.
        exact_logits: whether ``logits`` is what was exponentiated (so that a ``logsumexp`` of it is the row's own).
        bare: whether powers are taken of logits from which nothing is subtracted, so that those of low fills are zero.
        narrowed: whether float64 logits are converted to a narrower type before anything else.
        needs_a_key: whether rows whose logits are all ``-inf`` are NaN although there is a sink.
        less_log_sum: whether the logarithm of the sum is subtracted from the logits, which loses it beside low fills.
        late_sum: for weights that are divided by their sum only after the second product, the node that was summed.
    """

    logits: fx.Node
    dims: Dims
    weights: Weights
    sink: tuple[Any, Dims] | None = None
    exact_logits: bool = True
    late_sum: "Denominator | None" = None
    factor: float = 1.0
    masks: tuple[Kept, ...] = ()
    shifts: tuple[fx.Node, ...] = ()
    others: tuple[fx.Node, ...] = ()
    gates: tuple[Gate, ...] = ()
    bare: bool = False
    narrowed: bool = False
    needs_a_key: bool = False
    less_log_sum: bool = False


@dataclass(frozen=True)
class Denominator:
    """What a handwritten softmax is divided by: the sum over keys of the exponentials, after all of their gates."""

    weights: Weights

    @property
    def dims(self) -> Dims:
        return self.weights.dims


def read_softmax(space: Space, weights: Weights, keys: Dim) -> Softmax:
    """The softmax that the weights come from; raises Refusal unless it runs over exactly ``keys``."""
    call = call_of(weights.node)
    assert call is not None
    if exponential(call) is not None:
        found = _handwritten(space, weights, keys)
    else:
        dim = call.get("dim")
        if not isinstance(dim, int):
            raise Refusal("the softmax names no axis")
        _check_axis(space, weights.dims[positive_dim(dim, len(weights.dims))], keys)
        factor = -1.0 if call.name == "softmin" else 1.0
        own = _find_own_sum(space, weights, keys)  # masked afterwards, and divided by what was left
        rest, masks, gates = (weights, (), ()) if own is None else (own.rest, own.masks, own.gates)
        divides_zero = own is not None and not any(gate.guard for gate in gates)
        zero = weights.zero_empty or (call.name == "safe_softmax" and not divides_zero)
        found = Softmax(
            call.input, weights.dims, replace(rest, zero_empty=zero), exact_logits=not (masks or gates), factor=factor,
            masks=masks, gates=gates,
        )  # fmt: skip
    _check_factors(found.weights)
    return _strip(space, found, keys)


def exponential(call: Call | None) -> tuple[Any, float] | None:
    """``(x, factor)`` of ``exp(factor * x)``: powers of a number that is above one; None for other operators."""
    if call is None or call.in_place:
        return None
    if call.name in ("exp", "exp2"):
        return call.input, 1.0 if call.name == "exp" else math.log(2.0)
    base = call.input
    if call.name == "pow" and isinstance(base, (int, float)) and 1 < base < math.inf:
        return call.get("other"), math.log(base)
    return None


def _check_axis(space: Space, axis: Dim, keys: Dim) -> None:
    if not keys:
        raise Refusal("there is one key only, and its weight is one")
    if space.resolve(axis) != space.resolve(keys):
        raise Refusal("the softmax runs over another axis than the one that the second matrix product sums over")


def _check_factors(weights: Weights) -> None:
    if weights.zero_empty and len(weights.factors) > weights.late_factors:
        raise Refusal("nan_to_num after a factor of the weights")


# --------------------------------------------------------------------------------------------------- by hand
def _handwritten(space: Space, weights: Weights, keys: Dim) -> Softmax:
    numerator = weights.node
    power = exponential(call_of(numerator))
    assert power is not None
    logits, factor = power
    if not is_tensor(logits):
        raise Refusal("an exponential of a number")
    normalised = _already_normalised(space, logits, weights.dims, keys) if factor == 1.0 else None
    if normalised is not None:
        return Softmax(normalised, weights.dims, weights, less_log_sum=call_of(logits).name == "sub")  # type: ignore[union-attr]
    own = _find_own_sum(space, weights, keys)
    if own is not None:
        shift = None if own.sink is None else _shift(space, weights, keys)
        exact = not (own.masks or own.gates)
        found = Softmax(
            logits, weights.dims, own.rest, own.sink, exact_logits=exact, factor=factor, masks=own.masks,
            others=own.others, gates=own.gates, bare=True, needs_a_key=shift is not None and not _is_bounded(shift),
        )  # fmt: skip
        return found if shift is None else _without_shift(found, call_of(logits).input, shift)  # type: ignore[union-attr]
    if weights.kept or weights.zero_empty:
        raise Refusal("an exponential that is not divided by its own sum")
    _check_gates(weights.gates)
    return Softmax(
        logits, weights.dims, replace(weights, gates=()), late_sum=Denominator(weights), factor=factor,
        exact_logits=not weights.gates, gates=weights.gates, bare=True,
    )  # fmt: skip


def _inverted(node: Any) -> Any:
    """``x`` where the node is ``1 / x``."""
    call = call_of(node)
    if call is not None and call.name == "reciprocal":
        return call.input
    if call is not None and call.name == "div" and call.input == 1 and not isinstance(call.input, fx.Node):
        return call.get("other")
    return call.input if call is not None and call.name == "pow" and call.get("other") == -1 else None


def _already_normalised(space: Space, logits: fx.Node, dims: Dims, keys: Dim) -> fx.Node | None:
    """``x`` where the exponential is of ``log_softmax(x)`` or ``x - logsumexp(x)``."""
    call = call_of(logits)
    if call is None:
        return None
    if call.name == "log_softmax" and isinstance(call.get("dim"), int):
        _check_axis(space, dims[positive_dim(call.get("dim"), len(dims))], keys)
        return call.input
    if call.name != "sub" or not (is_tensor(call.input) and is_tensor(call.get("other"))) or "alpha" in call.arguments:
        return None
    reduced = _reduction(
        space, call.get("other"), broadcast_input(dims, shape_of(call.get("other"))), keys, {"logsumexp"}
    )
    if reduced is None or reduced[0] is not call.input or shape_of(call.input) != shape_of(logits):
        return None
    return call.input if space.resolve_all(reduced[1]) == space.resolve_all(dims) else None


def _reduction(space: Space, node: Any, dims: Dims, keys: Dim, names: set[str]) -> tuple[fx.Node, Dims] | None:
    """The tensor that ``node`` (of dimensions ``dims``) reduces over exactly the keys, and its dimensions."""
    while True:
        call = call_of(node)
        if call is None or call.in_place:
            return None
        if cuts_gradient(node):
            return None  # the sum's part of the gradient is left out
        if call.name in names:
            break
        if call.name in _CASTS and tensor_of(node).dtype in FLOATS:
            node = call.input
            continue
        moved = view_input(space, call, dims)
        if moved is None:
            return None
        node, dims = moved
    dim = call.get("dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not isinstance(dim, int) or not is_tensor(call.input):
        return None
    rank = len(shape_of(call.input))
    dim = positive_dim(dim, rank)
    if len(dims) == rank and dims[dim] == ():
        return call.input, (*dims[:dim], keys, *dims[dim + 1 :])
    if len(dims) == rank - 1 and not call.get("keepdim"):
        return call.input, (*dims[:dim], keys, *dims[dim:])
    return None


@dataclass(frozen=True)
class _OwnSum:
    """A division of the weights by their own sum.

    Attributes:
        rest: the walk without that division and what it makes a part of the softmax.
        sink: what the sum has beside the weights.
        others: the nodes between the sink and the sum.
        masks: conditions that set weights to zero before they were summed.
        gates: what weights were multiplied with before they were summed.
    """

    rest: Weights
    sink: tuple[Any, Dims] | None
    others: tuple[fx.Node, ...]
    masks: tuple[Kept, ...]
    gates: tuple[Gate, ...]


def _find_own_sum(space: Space, weights: Weights, keys: Dim) -> _OwnSum | None:
    for place, (operator, operand, dims) in enumerate(weights.factors):
        divisor = _inverted(operand) if operator == "mul" else operand
        if operator not in ("div", "mul") or not is_tensor(divisor):
            continue
        found = _denominator(space, divisor, dims, weights, keys)
        if found is None:
            continue
        sink, others, steps, guard = found
        masks = tuple(step for step in steps if isinstance(step, Kept))
        gates = tuple(replace(step, guard=guard) for step in steps if isinstance(step, Gate))
        _check_gates(gates)
        if guard and (masks or len(gates) != 1):
            raise Refusal("a number beside the sum of masked weights")
        factors = weights.factors[:place] + weights.factors[place + 1 :]
        late = min(weights.late_factors, len(factors)) if place >= weights.late_factors else weights.late_factors - 1
        if weights.zero_empty and tensor_of(weights.node).requires_grad and any(k.multiplies for k in masks):
            raise Refusal("rows without a key that get no gradient but NaN from their division")
        kept = tuple(k for k in weights.kept if k not in masks)
        later = tuple(gate for gate in weights.gates if gate not in steps)
        rest = replace(
            weights, factors=factors, late_factors=late, kept=kept, gates=(*later, *(gates if guard else ()))
        )
        return _OwnSum(rest, sink, others, masks, gates)
    return None


def _check_gates(gates: tuple[Gate, ...]) -> None:
    """Raise Refusal unless the gates' logarithms may be added to the logits."""
    for gate in gates:
        if gate.operator != "mul" or not is_gate(gate.factor):
            raise Refusal("exponentials that are multiplied with what may be negative")


def _denominator(
    space: Space, node: fx.Node, dims: Dims, weights: Weights, keys: Dim
) -> tuple[tuple[Any, Dims] | None, tuple[fx.Node, ...], tuple[Kept | Gate, ...], float] | None:
    """The sink and the nodes from there to the sum, the masks and gates, and a guard where ``node`` is the sum of the
    weights and one of these."""
    call = call_of(node)
    sink: tuple[Any, Dims] | None = None
    others: tuple[fx.Node, ...] = ()
    guard = 0.0
    if call is not None and call.name == "add" and call.get("alpha", 1) == 1:
        for total, extra in ((call.input, call.get("other")), (call.get("other"), call.input)):
            if is_tensor(total) and _reduction(space, total, broadcast_input(dims, shape_of(total)), keys, {"sum"}):
                if exponential(call_of(weights.node)) is None and type(extra) in (int, float) and 0 < extra < math.inf:
                    guard = float(extra)
                else:
                    sink = _sink_of(space, extra, dims, weights, keys)
                if sink is None and not guard:
                    return None
                others = () if sink is None else _up_to(extra, sink[0])
                node, dims = total, broadcast_input(dims, shape_of(total))
                break
    reduced = _reduction(space, node, dims, keys, {"sum"})
    if reduced is None or space.resolve_all(reduced[1]) != space.resolve_all(weights.dims):
        return None
    steps = _steps_before(reduced[0], weights)
    return None if steps is None else (sink, others, steps, guard)


def _up_to(node: Any, sink: Any) -> tuple[fx.Node, ...]:
    """The exponential of a sink, and what it is taken of where that is not the sink itself."""
    power = exponential(call_of(node))
    return tuple(n for n in (node, power and power[0]) if isinstance(n, fx.Node) and n is not sink)


def _steps_before(node: fx.Node, weights: Weights) -> tuple[Kept | Gate, ...] | None:
    """The masks and gates between the softmax and ``node``, one of the weights; None where anything else lies there."""
    steps: dict[fx.Node, Kept | Gate] = {kept.node: kept for kept in weights.kept}
    steps |= {gate.node: gate for gate in weights.gates}
    found: list[Kept | Gate] = []
    while node is not weights.node:
        call = call_of(node)
        if node in steps:
            found.append(steps[node])
            node = steps[node].weights
        elif call is None or tensor_of(node).dtype not in FLOATS:
            return None
        elif call.name in _CASTS - {"detach"} and isinstance(call.input, fx.Node):
            node = call.input
        else:
            return None
    return tuple(found)


def _sink_of(space: Space, extra: Any, dims: Dims, weights: Weights, keys: Dim) -> tuple[Any, Dims] | None:
    """The sink's logit where ``extra`` is its exponential, shifted as the numerator's logits are."""
    numerator = exponential(call_of(weights.node))
    if numerator is None:
        return None
    shift = _shift(space, weights, keys)
    if isinstance(extra, (int, float)) and not isinstance(extra, bool):  # "plus one", or a guard against zero
        positive = shift is None and 0 < extra < math.inf
        return (math.log(extra) / numerator[1], ()) if positive else None
    power = exponential(call_of(extra))
    if power is None or power[1] != numerator[1]:
        return None
    inner = call_of(power[0])
    if shift is None:
        return power[0], broadcast_input(dims, shape_of(power[0])) if is_tensor(power[0]) else ()
    if inner is not None and inner.name == "neg" and inner.input is shift:
        return 0.0, ()
    if inner is not None and inner.name == "sub" and inner.get("other") is shift and "alpha" not in inner.arguments:
        return inner.input, broadcast_input(dims, shape_of(inner.input)) if is_tensor(inner.input) else ()
    return None


def _shift(space: Space, weights: Weights, keys: Dim) -> fx.Node | None:
    """What a handwritten softmax subtracts from the logits of each row."""
    numerator = exponential(call_of(weights.node))
    assert numerator is not None
    call = call_of(numerator[0])
    if call is None or call.name != "sub" or not _is_row_constant(space, call, weights.dims, keys):
        return None
    return call.get("other")


def _is_bounded(shift: fx.Node) -> bool:
    """Whether what is subtracted from a row is finite where all of the row's logits are ``-inf``."""
    call = call_of(shift)
    while call is not None and call.name in _CASTS | RESHAPES | {"getitem"} and isinstance(call.input, fx.Node):
        call = call_of(call.input)
    if call is None or call.in_place:
        return False
    limits = [call.get("min")] if call.name in ("clamp", "clamp_min") else []
    of_two = call.name == "maximum" or (call.name == "max" and is_tensor(call.get("dim")))
    return of_two or any(isinstance(x, (int, float)) and x > -math.inf for x in limits)


def _is_row_constant(space: Space, call: Any, dims: Dims, keys: Dim) -> bool:
    """Whether a subtraction takes one number from all keys of a row."""
    other = call.get("other")
    if call.in_place or "alpha" in call.arguments or not is_tensor(call.input) or not is_tensor(other):
        return False
    if len(shape_of(call.input)) != len(dims) or _wants_gradient_besides(other, call.input):
        return False
    place = next(d for d, dim in enumerate(dims) if space.resolve(dim) == space.resolve(keys))
    offset = place - (len(dims) - len(shape_of(other)))
    broadcasts = known_equal(shape_of(call.input)[place], 1)
    return not broadcasts and (offset < 0 or known_equal(shape_of(other)[offset], 1))


def _wants_gradient_besides(shift: fx.Node, logits: fx.Node) -> bool:
    """Whether a number per row needs tensors in its gradient that the logits do not: it is zero there, not absent."""
    if not tensor_of(shift).requires_grad:
        return False
    own = learned_leaves([shift], {logits})
    return bool(own) and not own <= ancestors([logits])


# --------------------------------------------------------------------------------------- what softmax does not see
def _strip(space: Space, found: Softmax, keys: Dim) -> Softmax:
    """Remove subtractions of row constants, and split off a sink column."""
    while True:
        call = call_of(found.logits)
        if call is None or call.in_place:
            return _finish(found)
        if is_float_cast(call, found.logits):
            narrowed = found.narrowed or tensor_of(found.logits).dtype != torch.float64
            found = replace(found, logits=call.input, narrowed=narrowed)
        elif call.name == "sub" and found.sink is None and _is_row_constant(space, call, found.dims, keys):
            found = _without_shift(found, call.input, call.get("other"))
        elif found.sink is None and _scales_shifted(space, call, found.dims, keys):
            factor = call.get("other") if call.name == "mul" else 1 / call.get("other")
            found = replace(found, logits=call.input, factor=found.factor * factor, exact_logits=False)
        elif call.name == "pad" and found.weights.sink_column and found.sink is None:
            found = _split_padding(call, found)
        elif call.name == "cat" and found.weights.sink_column and found.sink is None:
            found = _split_sink(space, call, found, keys)
        else:
            return _finish(found)


def _scales_shifted(space: Space, call: Call, dims: Dims, keys: Dim) -> bool:
    """Whether numbers above zero multiply logits that are less a number per row: ``(x / 32 - max(x / 32)) * 32``."""
    while call.name in ("mul", "div") and "rounding_mode" not in call.arguments and not call.in_place:
        number, below = call.get("other"), call_of(call.input)
        if type(number) not in (int, float) or not 0 < number < math.inf or below is None:
            return False
        if below.name == "sub" and _is_row_constant(space, below, dims, keys):
            return True
        call = below
    return False


def _without_shift(found: Softmax, logits: fx.Node, shift: fx.Node) -> Softmax:
    """The softmax of ``logits``, from which ``shift`` is subtracted, a number per row that may have more axes."""
    dims = broadcast_input(found.dims, shape_of(logits))
    shifts = (*found.shifts, shift)
    return replace(found, logits=logits, dims=dims, exact_logits=False, shifts=shifts, bare=False)


def is_float_cast(call: Call | None, node: fx.Node) -> bool:
    """Whether the node is a conversion from one floating type to another that is no narrower by name."""
    if call is None or call.in_place or call.name not in ("to", "float", "double", "type", "type_as"):
        return False
    return is_tensor(call.input) and tensor_of(call.input).dtype in FLOATS and tensor_of(node).dtype in FLOATS


def _finish(found: Softmax) -> Softmax:
    if found.weights.sink_column and found.sink is None:
        raise Refusal("a part of the attention weights is used")
    return found


def _split_sink(space: Space, call: Any, found: Softmax, keys: Dim) -> Softmax:
    parts, dims = call.get("tensors"), found.dims
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or not all(is_tensor(p) for p in parts):
        raise Refusal("a concatenation before the softmax")
    axis = positive_dim(call.get("dim", 0), len(dims))
    _check_axis(space, dims[axis], keys)
    scores, sink = parts if found.weights.sink_column == "last" else reversed(parts)
    if not known_equal(shape_of(sink)[axis], 1):
        raise Refusal("a concatenation before the softmax")
    column = broadcast_input((*dims[:axis], (), *dims[axis + 1 :]), shape_of(sink))
    return replace(found, logits=scores, sink=(sink, column), exact_logits=False)


def _split_padding(call: Any, found: Softmax) -> Softmax:
    """``pad`` with one constant column."""
    wanted = (0, 1) if found.weights.sink_column == "last" else (1, 0)
    value = call.get("value")
    if tuple(call.get("pad")) != wanted or call.get("mode", "constant") != "constant":
        raise Refusal("a padding before the softmax")
    if not isinstance(value, (int, float, type(None))):
        raise Refusal("a padding before the softmax")
    return replace(found, logits=call.input, sink=(float(value or 0.0), ()), exact_logits=False)


# ----------------------------------------------------------------------------------------------- division afterwards
def find_late_division(
    space: Space, late: Denominator, product: fx.Node, dims: Dims, keys: Dim
) -> tuple[list[fx.Node], fx.Node, Dims]:
    """The division of the second product, maybe transposed first, by the sum of the weights.

    Returns the nodes from the product to the division, the divisor, and the dimensions of the quotient; raises Refusal
    where there is no such division.
    """
    way = [product]
    while len(users := list(way[-1].users)) == 1:
        call = call_of(users[0])
        if call is None or call.in_place or call.input is not way[-1]:
            break
        order = permutation(call, len(dims))
        if order is None:
            if call.name == "div" and _divides_by_sum(space, call, late, dims, keys):
                return [*way, users[0]], call.get("other"), dims
            break
        dims = tuple(dims[d] for d in order)
        way.append(users[0])
    raise Refusal("an exponential that is not divided by its own sum")


def _divides_by_sum(space: Space, call: Any, late: Denominator, dims: Dims, keys: Dim) -> bool:
    divisor = call.get("other")
    if not is_tensor(divisor) or call.get("rounding_mode") is not None or len(shape_of(divisor)) > len(dims):
        return False
    reduced = _reduction(space, divisor, broadcast_input(dims, shape_of(divisor)), keys, {"sum"})
    steps = None if reduced is None else _steps_before(reduced[0], late.weights)
    if reduced is None or steps is None or set(steps) != set(late.weights.gates):
        return False
    return space.resolve_all(reduced[1]) == space.resolve_all(late.dims)
