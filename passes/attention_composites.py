"""Operators that hide a matrix product of attention, written as the operators that the matcher reads.

``cosine_similarity``, ``vecdot``, ``multi_dot``, the mean of a product, ``einsum`` of three operands and more, and
whole ``vmap`` regions become simpler operators where that makes a site fusible. Which ones do is tried on a copy of
the graph; the others stay as they are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vbcompile.compat import copy_graph
from vbcompile.passes.attention_contraction import einsum_labels, is_product
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_weights import Carriers, is_on_the_way, may_begin
from vbcompile.passes.graph_autocast import autocast_at, under_autocast
from vbcompile.passes.graph_effects import upstream
from vbcompile.passes.graph_emit import Emitter
from vbcompile.passes.graph_ops import (
    call_of,
    is_tensor,
    known_equal,
    nesting_change,
    positive_dim,
    shape_of,
    tensor_of,
)
from vbcompile.passes.graph_vmap import batched, vmap_regions

Callers = Sequence[fx.Node] | None


@dataclass(frozen=True)
class Composite:
    """Nodes that :meth:`write` replaces.

    Attributes:
        nodes: one operator, or all nodes of a region.
    """

    nodes: tuple[fx.Node, ...]

    def write(self, callers: Callers, copies: dict[fx.Node, fx.Node] | None = None) -> list[fx.Node]:
        """Put simpler operators in place of the nodes, or of their ``copies``; the new nodes.

        Raises Refusal before anything is changed.
        """
        nodes = [n if copies is None else copies[n] for n in self.nodes]
        low = _autocast(nodes[0], callers)
        if len(nodes) > 1:
            return batched(nodes, low)
        node = nodes[0]
        emitter = Emitter(node, {node: 0}, lambda: _as_at(node, low))
        try:
            result = _writer(node)(emitter, node)  # type: ignore[misc]
            result = emitter.with_strides(result, tensor_of(node))
            if tensor_of(result).dtype != tensor_of(node).dtype:
                raise Refusal("mixed precision")
        except (Refusal, LookupError) as error:
            emitter.undo()
            raise Refusal(str(error)) from error
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)
        return emitter.made


def write_out(module: fx.GraphModule, callers: Callers, attempt: Callable[[fx.GraphModule], Any]) -> None:
    """Write out the composites of a graph with which ``attempt``, which rewrites attention, finds more.

    ``attempt`` is given a copy of the graph to try.
    """
    chosen = list(_composites(module.graph))
    while chosen:
        graph = copy_graph(module.graph)
        copies = dict(zip(module.graph.nodes, graph.nodes, strict=True))
        made = {composite: _tried(composite, callers, copies) for composite in chosen}
        attempt(fx.GraphModule(module, graph))
        used = [composite for composite in chosen if any(node._erased for node in made[composite])]
        if len(used) == len(chosen):
            break
        chosen = used
    for composite in chosen:
        composite.write(callers)
    if chosen:
        module.recompile()


def _tried(composite: Composite, callers: Callers, copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    try:
        return composite.write(callers, copies)
    except Exception:  # noqa: BLE001  # whatever an operator raises on fake values: the composite stays as it is
        return []


def _composites(graph: fx.Graph) -> Iterator[Composite]:
    regions = list(vmap_regions(graph))
    near = _near_weights(graph) if regions else set()
    yield from (Composite(tuple(r)) for r in regions if any(n in near or not _is_arithmetic(n) for n in r))
    depth = 0  # of function transforms, inside which values cannot be computed with
    for node in graph.nodes:
        depth += nesting_change(node)
        if depth == 0 and is_tensor(node) and _writer(node) is not None:
            yield Composite((node,))


def _is_arithmetic(node: fx.Node) -> bool:
    call = call_of(node)
    name = getattr(node.target, "__name__", "") if call is None else call.name
    return name in _ARITHMETIC


_ARITHMETIC = {
    "mul", "add", "sub", "div", "neg", "_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim",
    "_remove_batch_dim",
}  # fmt: skip


def _near_weights(graph: fx.Graph) -> set[fx.Node]:
    """What softmaxes are computed from, back to products, and what is computed from them before the next product.

    Arithmetic elsewhere is no part of attention: an associative scan maps it over slices, hundreds of times in a model.
    """
    calls = {node: call for node in graph.nodes if (call := call_of(node)) is not None}
    after = {node for node, call in calls.items() if may_begin(call)}
    near = set(upstream(after, lambda n: [] if is_product(n) else n.all_input_nodes))
    for node in graph.nodes:
        followed = _is_arithmetic(node) or (node in calls and is_on_the_way(calls[node]))
        if followed and any(i in after for i in node.all_input_nodes):
            after.add(node)
    return near | after


def _autocast(node: fx.Node, callers: Callers) -> torch.dtype | None:
    """The dtype of an autocast at the node; raises Refusal where it is not known."""
    tensor = next((n for n in node.graph.nodes if is_tensor(n)), None)
    if tensor is None:
        raise Refusal("it is not known whether autocast is on")
    try:
        return autocast_at(node, tensor_of(tensor).device.type, callers)
    except LookupError as error:
        raise Refusal(str(error)) from None


def _as_at(node: fx.Node, low: torch.dtype | None) -> ExitStack:
    """The modes that the node runs under, as far as its result shows them."""
    stack = ExitStack()
    stack.enter_context(torch.set_grad_enabled(tensor_of(node).requires_grad))
    stack.enter_context(under_autocast(tensor_of(node).device.type, low))
    return stack


# ------------------------------------------------------------------------------------------------------- operators
Writer = Callable[[Emitter, fx.Node], fx.Node]


def _writer(node: fx.Node) -> Writer | None:
    if node.op == "call_function" and "out" not in node.kwargs:
        found = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
        if found is not None:
            return found
    call = call_of(node)
    if call is None or call.in_place:
        return None
    if call.name == "einsum":
        return _einsum if len(call.get("operands")) > 2 else None
    product = (
        call_of(call.input) if call.name == "mean" and set(call.arguments) <= {"input", "dim", "keepdim"} else None
    )
    if product is None or product.name != "mul" or product.in_place or product.input is product.get("other"):
        return None
    return _mean_of_product


def _bound(node: fx.Node, *names: str) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _cosine_similarity(emitter: Emitter, node: fx.Node) -> fx.Node:
    """Each operand divided by its norm first, as PyTorch does; no gradient goes through the norm's lower limit."""
    given = _bound(node, "x1", "x2", "dim", "eps")
    one, other = given["x1"], given["x2"]
    dim, eps = given.get("dim", 1), given.get("eps", 1e-8)
    rank = len(shape_of(node)) + 1
    place = positive_dim(dim, rank) - rank
    sizes = [shape_of(x)[place] for x in (one, other) if is_tensor(x) and len(shape_of(x)) >= -place]
    if len(sizes) != 2 or not known_equal(*sizes) or not isinstance(eps, (int, float)):
        raise Refusal("cosine_similarity along a repeated axis")
    parts = []
    for x in (one, other):
        x = x if tensor_of(x).dtype == tensor_of(node).dtype else emitter.method("to", x, tensor_of(node).dtype)
        norm = emitter.function(torch.linalg.vector_norm, x, 2, place, True)
        short = emitter.method("clamp", emitter.function(torch.rsub, norm, eps), min=0)
        norm = emitter.function(torch.add, norm, emitter.method("detach", short))
        parts.append(emitter.function(torch.div, x, norm))
    return emitter.method("sum", emitter.function(torch.mul, *parts), place)


def _vecdot(emitter: Emitter, node: fx.Node) -> fx.Node:
    given = _bound(node, "x", "y", "dim")
    if any(tensor_of(given[x]).is_complex() for x in "xy"):
        raise Refusal("complex operands")
    return emitter.method("sum", emitter.function(torch.mul, given["x"], given["y"]), given.get("dim", -1))


def _mean_of_product(emitter: Emitter, node: fx.Node) -> fx.Node:
    call = call_of(node)
    assert call is not None
    shape, dims = shape_of(call.input), call.get("dim")
    dims = range(len(shape)) if dims is None else dims if isinstance(dims, (tuple, list)) else (dims,)
    dims = [positive_dim(d, len(shape)) for d in dims]
    count = math.prod(shape[d] for d in dims)
    total = emitter.method("sum", call.input, dims, bool(call.get("keepdim")))
    return emitter.function(torch.div, total, emitter.size(count))


def _products(emitter: Emitter, node: fx.Node) -> fx.Node:
    """A chain of matrix products, from the left."""
    matrices: Any = node.args[0] if isinstance(node.args[0], (tuple, list)) else node.args
    result, *rest = matrices
    for matrix in rest:
        result = emitter.function(torch.matmul, result, matrix)
    return result


def _einsum(emitter: Emitter, node: fx.Node) -> fx.Node:
    """Operands along whose axes another one lies are multiplied into that one, the rest two at a time."""
    call = call_of(node)
    assert call is not None
    labels = einsum_labels(call, node)
    if labels is None or len({tensor_of(x).dtype for x in call.get("operands")}) > 1:
        raise Refusal("an einsum with repeated axes")
    *inputs, out = labels
    weights = _weights(node)
    parts = list(zip(call.get("operands"), inputs, strict=True))
    while len(parts) > 2:
        factor = _factor(parts, weights)
        if factor is not None:
            small, large = factor
            parts = [p for p in parts if p is not small]
            parts[parts.index(large)] = _scaled(emitter, large, small)
        else:
            a, b = _first_pair(parts, out, weights)
            parts = [p for p in parts if p is not a and p is not b]
            kept = _kept(parts, out)
            both = tuple(x for x in dict.fromkeys((*a[1], *b[1])) if x in kept)
            parts.append((_contract(emitter, a, b, both), both))
    factor = _factor(parts, weights)
    if factor is None or set(factor[1][1]) != set(out):
        return _contract(emitter, parts[0], parts[1], out)
    result, order = _scaled(emitter, factor[1], factor[0])
    return result if order == out else emitter.method("permute", result, [order.index(x) for x in out])


Part = tuple[fx.Node, tuple[str, ...]]


def _weights(node: fx.Node) -> set[fx.Node]:
    """Softmax weights among the operands."""
    carriers = Carriers()
    carriers.sweep({n: call for n in node.graph.nodes if (call := call_of(n)) is not None})
    return carriers.carrying & set(node.all_input_nodes)


def _factor(parts: list[Part], weights: set[fx.Node]) -> tuple[Part, Part] | None:
    """An operand whose axes all belong to another one, and the smallest such other one; weights only if none else."""
    for small in sorted(parts, key=lambda p: len(p[1])):
        fitting = [p for p in parts if p is not small and set(small[1]) <= set(p[1]) and not _repeats(small, p)]
        if fitting and small[0] not in weights:
            return small, min(fitting, key=lambda p: (p[0] in weights, len(p[1])))
    return None


def _repeats(small: Part, large: Part) -> bool:
    """Whether the larger operand is repeated along an axis of the smaller one."""
    sizes = dict(zip(large[1], shape_of(large[0]), strict=True))
    return any(
        known_equal(sizes[x], 1) and not known_equal(n, 1) for x, n in zip(small[1], shape_of(small[0]), strict=True)
    )


def _scaled(emitter: Emitter, large: Part, small: Part) -> Part:
    node, labels = small
    order = sorted(range(len(labels)), key=lambda d: large[1].index(labels[d]))
    if order != sorted(order):
        node = emitter.method("permute", node, order)
    for place, label in enumerate(large[1]):
        if label not in labels:
            node = emitter.method("unsqueeze", node, place)
    return emitter.function(torch.mul, large[0], node), large[1]


def _first_pair(parts: list[Part], out: tuple[str, ...], weights: set[fx.Node]) -> tuple[Part, Part]:
    """The two operands to begin with: those that make it cheapest, weights first where that takes no twice as long."""
    pairs = [(a, b) for n, a in enumerate(parts) for b in parts[n + 1 :]]
    sizes = {x: n for p in parts for x, n in zip(p[1], shape_of(p[0]), strict=True) if not known_equal(n, 1)}
    cost = lambda labels: math.prod(n if type(n := sizes.get(x, 1)) is int else 64 for x in labels)

    def total(pair: tuple[Part, Part]) -> float:
        rest = [p for p in parts if p not in pair]
        both = {*pair[0][1], *pair[1][1]}
        return cost(both) + cost((both & _kept(rest, out)).union(*(p[1] for p in rest)))

    cheapest = min(pairs, key=total)
    early = [p for p in pairs if (p[0][0] in weights) != (p[1][0] in weights) and total(p) < 2 * total(cheapest)]
    summed = lambda p: len(({*p[0][1]} & {*p[1][1]}) - _kept([q for q in parts if q not in p], out))
    return max(early, key=summed, default=cheapest)


def _kept(parts: list[Part], out: tuple[str, ...]) -> set[str]:
    """Axes that the result or one of the parts still needs."""
    return {*out, *(x for p in parts for x in p[1])}


def _contract(emitter: Emitter, a: Part, b: Part, out: tuple[str, ...]) -> fx.Node:
    letters = {x: chr(ord("a") + n) for n, x in enumerate(dict.fromkeys((*a[1], *b[1])))}
    spell = lambda labels: "".join(letters[x] for x in labels)
    return emitter.function(torch.einsum, f"{spell(a[1])},{spell(b[1])}->{spell(out)}", a[0], b[0])


_FUNCTIONS: dict[Any, Writer] = {
    torch.cosine_similarity: _cosine_similarity,
    torch.linalg.vecdot: _vecdot,
    torch.linalg.multi_dot: _products,
    torch.chain_matmul: _products,
}
