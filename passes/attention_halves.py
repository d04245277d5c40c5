"""Maps that one softmax makes together and that are added up before they meet the values.

The differential transformer computes both of its maps as heads of one softmax and subtracts one from the other. The
values multiplied with each of them, and then subtracted, are the same.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.graph_axes import index_items, is_full_slice
from vbcompile.passes.graph_emit import Emitter
from vbcompile.passes.graph_ops import call_of, is_tensor, known_equal, positive_dim, shape_of, tensor_of

_SUMS: dict[str, Callable[..., Any]] = {"add": operator.add, "sub": operator.sub}
_SCALED: dict[str, Callable[..., Any]] = {"mul": operator.mul, "div": operator.truediv}
_SAME = {"to", "type_as", "float", "clone", "contiguous", "dropout"}
_LEAVES = 4  # more are no attention of a known kind


def is_product_of_maps(node: fx.Node) -> bool:
    """Whether the node is a matrix product whose first operand is a sum of maps that one tensor holds."""
    try:
        _maps_of(node)
    except Refusal:
        return False
    return True


def write_product_of_maps(emitter: Emitter, node: fx.Node) -> fx.Node:
    """The sum of products that the product of the sum is; raises Refusal."""
    maps, axis = _maps_of(node)
    call = call_of(node)
    assert call is not None
    product = emitter.function(torch.matmul, maps, emitter.method("unsqueeze", call.get("other"), axis))
    return _summed(emitter, call.input, product)


def _maps_of(node: fx.Node) -> tuple[fx.Node, int]:
    """The tensor that holds the maps, and its axis of maps; raises Refusal."""
    call = call_of(node)
    if call is None or call.name != "matmul" or not is_tensor(call.input) or not is_tensor(call.get("other")):
        raise Refusal("no matrix product")
    found: list[tuple[fx.Node, int, int]] = []
    _find_maps(call.input, found, tensor_of(node).dtype)
    maps, axis, _ = found[0]
    if len(found) < 2 or any(leaf[:2] != (maps, axis) for leaf in found):
        raise Refusal("maps of more than one softmax")
    if len(shape_of(call.get("other"))) != len(shape_of(maps)) - 1:
        raise Refusal("values of another rank than the maps")
    return maps, axis


def _find_maps(node: Any, found: list[tuple[fx.Node, int, int]], dtype: torch.dtype) -> None:
    """Collect ``(maps, axis, place)`` of every addend; raises Refusal where the arithmetic is no sum of maps."""
    call = call_of(node)
    if call is None or call.in_place or not is_tensor(node) or tensor_of(node).dtype != dtype or len(found) > _LEAVES:
        raise Refusal("weights that are no sum of maps")
    if call.name in _SUMS and "alpha" not in call.arguments:
        _find_maps(call.input, found, dtype)
        _find_maps(call.get("other"), found, dtype)
    elif call.name in _SCALED and "rounding_mode" not in call.arguments:
        _find_maps(_scaled_map(node), found, dtype)
    elif call.name in _SAME and not (call.name == "dropout" and call.get("training", True) and call.get("p", 0.5) != 0):
        _find_maps(call.input, found, dtype)
    else:
        found.append(_selected(node))


def _scaled_map(node: fx.Node) -> fx.Node:
    """The operand of a product or quotient that is a map: the other one is the same for all keys."""
    call = call_of(node)
    assert call is not None
    one, other = call.input, call.get("other")
    is_number = lambda x: not is_tensor(x) or not shape_of(x) or known_equal(shape_of(x)[-1], 1)
    if is_tensor(one) and shape_of(one) == shape_of(node) and is_number(other):
        return one
    if call.name == "mul" and is_tensor(other) and shape_of(other) == shape_of(node) and is_number(one):
        return other
    raise Refusal("maps that are multiplied with something that differs from key to key")


def _selected(node: fx.Node) -> tuple[fx.Node, int, int]:
    """``(maps, axis, place)`` where the node is one place of an axis of maps that is neither rows nor keys."""
    call = call_of(node)
    if call is None or call.in_place or not is_tensor(call.input):
        raise Refusal("weights that are no sum of maps")
    rank = len(shape_of(call.input))
    if call.name == "select":
        axis, place = positive_dim(call.get("dim"), rank), call.get("index")
    elif call.name == "getitem":
        items = index_items(call.get("index"), rank)
        axes = [d for d, item in enumerate(items) if type(item) is int]
        rest = [item for item in items if type(item) is not int]
        sizes = [size for d, size in enumerate(shape_of(call.input)) if d not in axes]
        if len(items) > rank or len(axes) != 1 or not all(map(is_full_slice, rest, sizes)):
            raise Refusal("weights that are no sum of maps")
        axis, place = axes[0], items[axes[0]]
    else:
        raise Refusal("weights that are no sum of maps")
    if type(place) is not int or axis >= rank - 2:
        raise Refusal("weights that are no sum of maps")
    return call.input, axis, place


def _summed(emitter: Emitter, node: Any, product: fx.Node) -> fx.Node:
    """The arithmetic that made ``node`` of its maps, on the products with the values."""
    call = call_of(node)
    assert call is not None
    if call.name in _SUMS:
        operands = (_summed(emitter, x, product) for x in (call.input, call.get("other")))
        return emitter.function(_SUMS[call.name], *operands)
    if call.name in _SCALED:
        scaled = _scaled_map(node)
        operands = (_summed(emitter, x, product) if x is scaled else x for x in (call.input, call.get("other")))
        return emitter.function(_SCALED[call.name], *operands)
    if call.name in _SAME:
        return _summed(emitter, call.input, product)
    _, axis, place = _selected(node)
    return emitter.function(operator.getitem, product, (*[slice(None)] * axis, place))
