"""From the second matrix product back to the softmax: what happens to the attention weights on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.graph_axes import (
    AxisError,
    Dim,
    Dims,
    Space,
    broadcast_input,
    index_items,
    is_full_slice,
    view_input,
)
from vbcompile.passes.graph_ops import (
    FLOATS,
    Call,
    call_of,
    is_tensor,
    known_equal,
    positive_dim,
    shape_of,
    tensor_of,
    value_of,
)

_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16"}


@dataclass(frozen=True)
class Kept:
    """Weights that are set to zero where ``condition`` is not ``keep``.

    Attributes:
        condition: a boolean tensor, and its dimensions.
        node: the operator that sets them, and the weights that it is applied to.
    """

    condition: fx.Node
    dims: Dims
    keep: bool
    node: fx.Node
    weights: fx.Node

    @property
    def multiplies(self) -> bool:
        """Whether the mask is a factor, which leaves NaN as it is."""
        call = call_of(self.node)
        return call is not None and call.name == "mul"

    def rows(self, space: Space, keys: Dim) -> tuple[fx.Node, Dims] | None:
        """The mask and its dimensions where only rows are kept in which it shows ``any`` key."""
        node, dims, keep = self.condition, self.dims, self.keep
        while (call := call_of(node)) is not None and not call.in_place and call.name != "any":
            moved = (call.input, dims) if call.name == "not" else view_input(space, call, dims)
            if moved is None:
                return None
            keep = keep != (call.name == "not")
            node, dims = moved
        dim = None if call is None or self.multiplies or not keep else call.get("dim")
        if call is None or call.in_place or not isinstance(dim, int) or tensor_of(call.input).dtype != torch.bool:
            return None
        dim = positive_dim(dim, len(shape_of(call.input)))
        return call.input, (*dims[:dim], keys, *dims[dim + bool(call.get("keepdim")) :])


@dataclass(frozen=True)
class Gate:
    """Weights that are multiplied with (``operator`` ``mul``) or divided by a tensor that differs from key to key.

    Attributes:
        factor: that tensor, and its dimensions.
        node: the operator that applies it, and the weights that it is applied to.
        guard: ``e`` of ``p * g / (sum(p * g) + e)``, which is ``p' * g / (g + e)`` with the weights ``p'`` of logits
            plus ``log(g + e)``.
    """

    operator: str
    factor: fx.Node
    dims: Dims
    node: fx.Node
    weights: fx.Node
    guard: float = 0.0


@dataclass(frozen=True)
class Weights:
    """One softmax and the operators between it and the second matrix product.

    Attributes:
        node: the node whose value is the softmax (or, handwritten, its numerator).
        dims: dimensions of that node; with a sink column, those without it.
        dropout: probabilities of the dropouts on the way (numbers or nodes with a symbolic float).
        zero_empty: whether rows without a key become zero (``nan_to_num``).
        kept: masks of the weights, last applied first.
        gates: factors that differ from key to key, last applied first.
        factors: ``(operator, operand, dims)`` applied to whole rows: ``mul``, ``div``, ``neg``; last applied first.
        late_factors: with ``zero_empty``, how many of the factors were applied after ``nan_to_num``.
        sink_column: ``"last"`` or ``"first"`` where one column of the softmax is cut off.
        region: the nodes on the way, the softmax included.
    """

    node: fx.Node
    dims: Dims
    dropout: tuple[Any, ...] = ()
    zero_empty: bool = False
    kept: tuple[Kept, ...] = ()
    gates: tuple[Gate, ...] = ()
    factors: tuple[tuple[str, Any, Dims], ...] = ()
    late_factors: int = 0
    sink_column: str = ""
    region: tuple[fx.Node, ...] = ()


@dataclass
class Carriers:
    """Which nodes carry softmax weights, found in one sweep over the graph."""

    softmaxes: set[fx.Node] = field(default_factory=set)
    carrying: set[fx.Node] = field(default_factory=set)

    def sweep(self, calls: dict[fx.Node, Call]) -> None:
        for node, call in calls.items():
            if is_softmax(call, node):
                self.softmaxes.add(node)
                self.carrying.add(node)
            elif is_on_the_way(call) and any(i in self.carrying for i in node.all_input_nodes):
                self.carrying.add(node)


_WAY = _CASTS | {
    "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "contiguous", "clone", "transpose", "mT", "t",
    "T", "permute", "movedim", "expand", "expand_as", "repeat", "repeat_interleave", "getitem", "narrow",
    "dropout", "nan_to_num", "masked_fill", "where", "mul", "div", "neg", "add", "sub",
}  # fmt: skip


def may_begin(call: Call) -> bool:
    """Whether attention may be where an operator of that name is, of which little is known yet."""
    return call.name in ("softmax", "safe_softmax", "softmin", "exp", "exp2", "pow", "sdpa")


def is_on_the_way(call: Call) -> bool:
    """Whether the walk from the second product may pass the operator on its way to a softmax."""
    return call.name in _WAY


def is_softmax(call: Call, node: fx.Node) -> bool:
    """Whether the node may be where weights begin: a softmax, or the exponential of a handwritten one."""
    if not is_tensor(node) or not tensor_of(node).is_floating_point() or tensor_of(node).dim() < 2:
        return False
    if call.name == "pow":
        return isinstance(call.input, (int, float))
    return call.name in ("softmax", "safe_softmax", "softmin", "exp", "exp2")


def walk_back(space: Space, start: fx.Node, dims: Dims, keys: Dim, carriers: Carriers) -> list[Weights]:
    """The softmaxes that ``start`` is a sum of, with what happened to each; raises Refusal."""
    try:
        return _Walk(space, keys, carriers).terms(start, dims, Weights(start, dims))
    except AxisError as error:
        raise Refusal(f"the attention weights are rearranged: {error}") from None


class _Walk:
    def __init__(self, space: Space, keys: Dim, carriers: Carriers) -> None:
        self.space = space
        self.keys = keys
        self.carriers = carriers

    def terms(self, node: fx.Node, dims: Dims, later: Weights) -> list[Weights]:
        """``later`` describes what lies between ``node`` and the second matrix product."""
        call = call_of(node)
        if call is None or call.in_place or node not in self.carriers.carrying:
            raise Refusal(f"{node.name} carries no softmax weights")
        here = replace(later, node=node, dims=dims, region=(*later.region, node))
        if node in self.carriers.softmaxes:
            return [here]
        if later.sink_column and call.name not in _CASTS | {"dropout", "nan_to_num"}:
            raise Refusal(f"{call.name} between the softmax and its cut")
        step = getattr(self, f"_{call.name}", None)
        if step is not None:
            return step(call, dims, here)
        if call.name in _CASTS:
            return self._cast(call, node, dims, here)
        moved = view_input(self.space, call, dims)
        if moved is None:
            raise Refusal(f"{call.name} between the softmax and the second matrix product")
        return self.terms(*moved, here)

    def _cast(self, call: Call, node: fx.Node, dims: Dims, here: Weights) -> list[Weights]:
        if tensor_of(node).dtype not in FLOATS:
            raise Refusal(f"the attention weights are converted to {tensor_of(node).dtype}")
        return self.terms(call.input, dims, here)

    def _dropout(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        probability, training = call.get("p", 0.5), call.get("training", True)
        if not isinstance(training, bool):
            raise Refusal("whether dropout is active is known only at run time")
        if training and probability != 0:
            here = replace(here, dropout=(*here.dropout, probability))
        return self.terms(call.input, dims, here)

    def _nan_to_num(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        if call.get("nan") not in (None, 0):
            raise Refusal("nan_to_num with another value than zero")
        return self._without_nan(call.input, dims, here)

    def _masked_fill(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        if not _is_zero(call.get("value")) or not is_tensor(call.get("mask")):
            raise Refusal("the attention weights are filled with another value than zero")
        if is_nan_of(call.get("mask"), call.input):
            return self._without_nan(call.input, dims, here)
        return self.terms(call.input, dims, self._keep(here, call.get("mask"), dims, False, call.input))

    def _where(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        kept, filled, keep = call.input, call.get("other"), True
        if kept not in self.carriers.carrying:
            kept, filled, keep = filled, kept, False
        if not _is_zero(filled) or not is_tensor(kept):
            raise Refusal("where() on the attention weights")
        if not keep and is_nan_of(call.get("condition"), kept):
            return self._without_nan(kept, dims, here)
        return self.terms(kept, dims, self._keep(here, call.get("condition"), dims, keep, kept))

    def _keep(self, here: Weights, mask: fx.Node, dims: Dims, keep: bool, weights: fx.Node) -> Weights:
        made = Kept(mask, broadcast_input(dims, shape_of(mask)), keep, here.node, weights)
        return replace(here, kept=(*here.kept, made))

    def _without_nan(self, weights: fx.Node, dims: Dims, here: Weights) -> list[Weights]:
        return self.terms(weights, dims, replace(here, zero_empty=True, late_factors=len(here.factors)))

    def _mul(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        a, b = call.input, call.get("other")
        if a not in self.carriers.carrying:
            a, b = b, a
        if is_tensor(b) and b in self.carriers.carrying:
            whole = [self._along_rows_and_keys(x, dims) for x in (a, b)]
            if whole[0] == whole[1]:
                raise Refusal("attention weights are multiplied with each other")
            a, b = (a, b) if whole[0] else (b, a)  # the other one is an exponential, too, but a factor
        return self._scaled("mul", a, b, dims, here)

    def _div(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        if call.input not in self.carriers.carrying or call.get("rounding_mode") is not None:
            raise Refusal("a division by attention weights")
        return self._scaled("div", call.input, call.get("other"), dims, here)

    def _scaled(self, operator: str, weights: fx.Node, factor: Any, dims: Dims, here: Weights) -> list[Weights]:
        factor_dims: Dims = broadcast_input(dims, shape_of(factor)) if is_tensor(factor) else ()
        if is_tensor(factor) and tensor_of(factor).is_complex():
            raise Refusal("a complex factor")
        mask = flags_of(factor) if operator == "mul" else None
        if mask is not None and self._along_keys(factor_dims):
            broadcast = broadcast_input(dims, shape_of(weights))
            return self.terms(weights, broadcast, self._keep(here, mask, dims, True, weights))
        if is_tensor(factor) and self._along_keys(factor_dims):
            if here.zero_empty:
                raise Refusal("nan_to_num after a factor of the weights")
            here = replace(here, gates=(*here.gates, Gate(operator, factor, factor_dims, here.node, weights)))
        else:
            here = replace(here, factors=(*here.factors, (operator, factor, factor_dims)))
        return self.terms(weights, broadcast_input(dims, shape_of(weights)), here)

    def _along_rows_and_keys(self, node: fx.Node, dims: Dims) -> bool:
        """Whether a tensor of that shape has all axes of the weights."""
        return all(
            bool(own) or not whole
            for own, whole in zip_longest(reversed(broadcast_input(dims, shape_of(node))), reversed(dims), fillvalue=())
        )

    def _along_keys(self, dims: Dims) -> bool:
        return not {a for dim in self.space.resolve_all(dims) for a in dim}.isdisjoint(self.space.resolve(self.keys))

    def _neg(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        return self.terms(call.input, dims, replace(here, factors=(*here.factors, ("neg", None, ()))))

    def _add(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        return self._sum(call, dims, here, here)

    def _sub(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        return self._sum(call, dims, here, replace(here, factors=(*here.factors, ("neg", None, ()))))

    def _sum(self, call: Call, dims: Dims, first: Weights, second: Weights) -> list[Weights]:
        a, b = call.input, call.get("other")
        if not (is_tensor(a) and is_tensor(b)) or not {a, b} <= self.carriers.carrying or call.get("alpha", 1) != 1:
            raise Refusal("something is added to the attention weights")
        if first.dropout or first.zero_empty or first.kept:
            raise Refusal("dropout or a mask after attention weights were added")
        terms = self.terms(a, broadcast_input(dims, shape_of(a)), first)
        return terms + self.terms(b, broadcast_input(dims, shape_of(b)), second)

    def _getitem(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        moved = view_input(self.space, call, dims)
        if moved is not None:
            return self.terms(*moved, here)
        return self.terms(call.input, dims, replace(here, sink_column=_cut_column(call)))

    def _narrow(self, call: Call, dims: Dims, here: Weights) -> list[Weights]:
        items: list[Any] = [slice(None)] * len(dims)
        start, length = call.get("start"), value_of(call.get("length"))
        if type(start) is not int:
            raise Refusal("a part of the attention weights is used")
        items[call.get("dim")] = slice(start, start + length)
        cut = Call("getitem", {"input": call.input, "index": tuple(items)})
        return self.terms(call.input, dims, replace(here, sink_column=_cut_column(cut)))


def is_nan_of(condition: Any, weights: Any) -> bool:
    """Whether ``condition`` says where ``weights`` are NaN."""
    call = call_of(condition)
    if call is None or call.in_place or call.input is not weights:
        return False
    return call.name == "isnan" or (call.name == "ne" and call.get("other") is weights)


def flags_of(factor: Any) -> fx.Node | None:
    """The boolean tensor that ``factor`` is, as it is or converted to numbers; None for any other factor."""
    while is_tensor(factor) and tensor_of(factor).dtype != torch.bool:
        call = call_of(factor)
        if call is None or call.in_place or call.name not in _CASTS | {"int", "long"}:
            return None
        factor = call.input
    return factor if is_tensor(factor) else None


def _is_zero(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return value == 0
    call = call_of(value)
    if call is None or call.in_place:
        return False
    return call.name in ("zeros", "zeros_like", "new_zeros") or 0 in (call.get("data"), call.get("fill_value"))


def _cut_column(call: Call) -> str:
    """Which end of the last dimension is cut by one; raises Refusal where anything else is."""
    shape = shape_of(call.input)
    items = index_items(call.get("index"), len(shape))
    if len(items) != len(shape) or not _full(items[:-1], shape):
        raise Refusal("a part of the attention weights is used")
    item, size = items[-1], shape[-1]
    start, stop = (value_of(x) for x in (getattr(item, "start", 0), getattr(item, "stop", 0)))
    if isinstance(item, slice) and item.step in (None, 1):
        if start in (None, 0) and stop is not None and (known_equal(stop, -1) or known_equal(stop, size - 1)):
            return "last"
        if type(start) is int and start == 1 and (stop is None or known_equal(stop, size)):
            return "first"
    raise Refusal("a part of the attention weights is used")


def _full(items: Sequence[Any], shape: Sequence[Any]) -> bool:
    return all(is_full_slice(item, size) for item, size in zip(items, shape, strict=False))
