"""Side effects in a torch-level graph: in-place operators, aliases, grad-mode switches.

FX does not know that ``x.add_(1)`` or ``x[m] = 0`` change other nodes' values, so every rewrite that moves a read has
to ask here first. :func:`make_functional` turns in-place operators on fresh tensors into ordinary ones.
"""

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vbcompile.compat import promoted_type
from vbcompile.compat_calls import storage_identity
from vbcompile.passes.graph_aten import out_of_place
from vbcompile.passes.graph_emit import Emitter
from vbcompile.passes.graph_ops import (
    ACTIVATIONS,
    Call,
    call_of,
    is_tensor,
    nesting_change,
    reads_metadata_only,
    rounded,
    switches_grad_mode,
    tensor_of,
    value_of,
)


class Effects:
    """Where the graph changes storages or switches grad mode, by position of the node.

    Attributes:
        position: place of every node of the graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.position: dict[fx.Node, int] = {}
        self._writes: dict[Any, list[int]] = {}
        self._switches: list[int] = []
        self._unknown: list[int] = []
        self._first_of: dict[Any, fx.Node] = {}
        self._transformed: set[fx.Node] = set()
        depth = 0
        for place, node in enumerate(graph.nodes):
            self.position[node] = place
            depth += nesting_change(node)
            if depth > 0:
                self._transformed.add(node)
            if switches_grad_mode(node):
                self._switches.append(place)
            written = written_tensors(node)
            if written is None:
                self._unknown.append(place)
            for tensor in written or ():
                self._writes.setdefault(storage_of(tensor), []).append(place)

    def is_written(self, node: fx.Node, after: int, before: int) -> bool:
        """Whether the storage of the node's tensor may be changed between two positions, both exclusive."""
        writes = self._writes.get(storage_of(node))
        if writes is not None and _any_between(writes, after, before):
            return True
        if None in self._writes and _any_between(self._writes[None], after, before):
            return True
        return _any_between(self._unknown, after, before)

    def representative(self, node: fx.Node, depth: int = 3) -> fx.Node:
        """A node asked for before that computes the same value earlier in the graph; else the node itself."""
        call = call_of(node)
        if call is None or call.in_place or call.name == "dropout" or depth == 0:
            return node
        inputs = node.all_input_nodes
        if any(self.is_written_at_all(i) for i in (node, *inputs)):
            return node
        alike = {i: self.representative(i, depth - 1).name for i in inputs}
        held = (tensor_of(node).dtype, tensor_of(node).requires_grad) if is_tensor(node) else None  # autocast, no_grad
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: alike[n])
        key = str((node.op, node.target, arguments, held))
        first = self._first_of.get(key)
        if first is None or first._erased or self.position.get(first, 0) > self.position.get(node, 0):
            first = self._first_of[key] = node
        return first

    def is_transformed(self, node: fx.Node) -> bool:
        """Whether the node is computed under a function transform (``vmap``, ``grad``, ``jvp``)."""
        return node in self._transformed

    def switches_grad_mode(self, after: int, before: int) -> bool:
        return _any_between(self._switches, after, before)

    def is_written_at_all(self, node: fx.Node) -> bool:
        return self.is_written(node, self.position.get(node, -1), len(self.position))


def _any_between(places: list[int], after: int, before: int) -> bool:
    at = bisect_right(places, after)
    return at < len(places) and places[at] < before


def storage_of(node: Any) -> Any:
    """Identity of the storage behind a node's fake tensor; None where it is unknown."""
    return storage_of_value(value_of(node))


def cuts_gradient(node: fx.Node) -> bool:
    """Whether no gradient goes from the node's numbers to an input that wants one: ``detach``, ``torch.no_grad``."""
    call = call_of(node)
    if call is not None and call.name in _READS_NO_NUMBERS:
        return False
    numbers = [v for v in _flat(value_of(node)) if isinstance(v, Tensor) and v.is_floating_point()]
    wants = lambda n: is_tensor(n) and tensor_of(n).is_floating_point() and tensor_of(n).requires_grad
    return any(not v.requires_grad for v in numbers) and any(map(wants, node.all_input_nodes))


_READS_NO_NUMBERS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor"}


def ancestors(nodes: Iterable[fx.Node], ends: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and all that they are computed from, no further than ``ends``."""
    stops = set(ends)
    return stops.union(upstream(nodes, lambda node: () if node in stops else node.all_input_nodes))


def upstream(nodes: Iterable[fx.Node], sources: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """The nodes and all that is reached from them by ``sources``, each once; a caller may stop before the end."""
    found, todo = set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            yield node
            todo += sources(node)


def learned_leaves(nodes: Iterable[fx.Node], ends: Iterable[fx.Node]) -> set[fx.Node]:
    """Inputs of the graph that want a gradient and that nodes are computed from other than by way of ``ends``."""
    stops = set(ends)
    leaves = {n for n in ancestors(nodes, stops) - stops if n.op in ("placeholder", "get_attr")}
    return {n for n in leaves if is_tensor(n) and tensor_of(n).requires_grad}


_IN_PLACE_METHODS = {"__setitem__"} | {
    f"__i{name}__"
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
}


def written_tensors(node: fx.Node) -> list[fx.Node] | None:
    """The tensors that a node changes; None where it may change any of its inputs, or others."""
    if node.op == "call_method":
        target = str(node.target)
        writes = (target.endswith("_") and not target.endswith("__")) or target in _IN_PLACE_METHODS
        return [node.args[0]] if writes and isinstance(node.args[0], fx.Node) else []  # type: ignore[list-item]
    if node.op != "call_function":
        return []
    written = [value for value in _flat(node.kwargs.get("out")) if isinstance(value, fx.Node)]
    name = getattr(node.target, "__name__", "")
    in_place = node.target in _IN_PLACE_FUNCTIONS or node.kwargs.get("inplace") is True
    place = _INPLACE_ARGUMENT.get(name)
    in_place = in_place or (place is not None and len(node.args) > place and node.args[place] is not False)
    in_place = in_place or (name.endswith("_") and not name.endswith("__") and name not in _OPERATOR_NAMES)
    call = call_of(node)
    if in_place or (call is not None and call.in_place):
        written += [a for a in _flat(node.args[:1]) if isinstance(a, fx.Node)]
    written += [a for a in _changed_besides(name, node) if isinstance(a, fx.Node)]
    if _has_mutable_schema(node.target):
        written += [n for n in node.all_input_nodes if is_tensor(n)]
    if "mutation" in name:
        written += [n for n in node.all_input_nodes if is_tensor(n)]
    return written + _written_in_bodies(node)


def _changed_besides(name: str, node: fx.Node) -> list[Any]:
    """What functions of ``torch.nn.functional`` change that are not in place by name."""
    given: dict[Any, Any] = {**dict(enumerate(node.args)), **node.kwargs}
    if name in ("batch_norm", "instance_norm"):
        return [given.get(key) for key in (1, 2, "running_mean", "running_var")]
    if name in ("embedding", "embedding_bag") and given.get(3, given.get("max_norm")) is not None:
        return [given.get(1, given.get("weight"))]  # long rows are cut
    return []


def _written_in_bodies(node: fx.Node) -> list[fx.Node]:
    """The operands of a higher-order operator that one of its inner graphs changes; operands are its last arguments."""
    written = []
    for body in node.all_input_nodes:
        inner = _attribute(node.graph.owning_module, body.target) if body.op == "get_attr" else None
        if not isinstance(inner, fx.GraphModule):
            continue
        effects, inside = Effects(inner.graph), inner.graph.find_nodes(op="placeholder")
        passed = _flat(node.args)[-len(inside) :] if inside else []
        pairs = zip(inside, passed, strict=len(passed) == len(inside))
        written += [a for p, a in pairs if isinstance(a, fx.Node) and is_tensor(a) and effects.is_written_at_all(p)]
    return written


def _attribute(module: Any, path: Any) -> Any:
    for name in str(path).split("."):
        module = getattr(module, name, None)
    return module


def _has_mutable_schema(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, overload)._schema.is_mutable for overload in target.overloads())
    return False


# place of the parameter ``inplace`` of functions in torch.nn.functional
_INPLACE_ARGUMENT = {
    **dict.fromkeys(("relu", "relu6", "silu", "selu", "mish", "hardswish", "hardsigmoid"), 1),
    **dict.fromkeys(("leaky_relu", "elu", "celu"), 2),
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"), 3),
    **dict.fromkeys(("hardtanh", "threshold"), 3),
    "rrelu": 4,
}
_OPERATOR_NAMES = {"and_", "or_", "not_", "is_"}
_IN_PLACE_FUNCTIONS = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior,
    operator.ixor, operator.ipow, operator.ifloordiv, operator.imod, operator.imatmul, operator.ilshift,
    operator.irshift,
}  # fmt: skip


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [x for v in value for x in _flat(v)]
    return [value]


# ------------------------------------------------------------------------------------------ functionalisation
_FUNCTIONAL = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "pow": operator.pow,
}  # fmt: skip
_METHODS = {
    "masked_fill", "clamp", "clamp_min", "clamp_max", "tanh", "exp", "sigmoid", "relu", "neg", "abs", "tril", "triu",
    "log", "sqrt", "rsqrt", "square", "nan_to_num", "maximum", "minimum",
}  # fmt: skip
_CONTIGUOUS_RESULTS = {"masked_fill", "tril", "triu"}
_ACTIVATIONS = {name for name, options in ACTIVATIONS.items() if "inplace" in options}


def make_functional(graph: fx.Graph) -> bool:
    """Replace in-place operators on fresh tensors that have no other live alias by ordinary ones.

    Returns whether anything was replaced. Values, dtypes and gradients stay the same.
    """
    candidates = [n for n in graph.nodes if _can_be_functional(n)]
    if not candidates:
        return False
    aliases = _Aliases(graph)
    switches = [place for node, place in aliases.position.items() if switches_grad_mode(node)]
    changed = False
    for node in candidates:
        base = node.args[0]
        assert isinstance(base, fx.Node)
        same_grad_mode = not any(aliases.position[base] < s < aliases.position[node] for s in switches)
        if same_grad_mode and aliases.is_private(base, node):
            aliases.replace(node, base)
            changed = True
    return changed


def _can_be_functional(node: fx.Node) -> bool:
    if not node.args or not is_tensor(node.args[0]):
        return False
    if node.op == "call_function" and node.target is operator.setitem:
        return _mask_of_setitem(node) is not None
    call = call_of(node)
    return call is not None and call.in_place and call.name in {*_FUNCTIONAL, *_METHODS, *_ACTIVATIONS, "dropout"}


def _mask_of_setitem(node: fx.Node) -> fx.Node | None:
    """The boolean mask of ``x[..., mask] = number``, where the mask covers the last dimensions or all of them."""
    base, index, value = node.args
    items = index if isinstance(index, tuple) else (index,)
    mask = items[-1]
    if not is_tensor(mask) or isinstance(value, fx.Node) or not isinstance(value, (int, float)):
        return None
    if tensor_of(mask).dtype != torch.bool:  # type: ignore[arg-type]
        return None
    rank, covered = tensor_of(base).dim(), tensor_of(mask).dim()  # type: ignore[arg-type]
    lead = items[:-1]
    if lead == (Ellipsis,) or (not lead and covered == rank):
        return mask  # type: ignore[return-value]
    full = all(i == slice(None) for i in lead) and len(lead) + covered == rank
    return mask if full else None  # type: ignore[return-value]


class _Aliases:
    """Who shares a storage with whom, kept up to date while nodes are replaced."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.position = {node: place for place, node in enumerate(graph.nodes)}
        self.sharing: dict[Any, list[fx.Node]] = {}
        for node in graph.nodes:
            for storage in {storage_of_value(v) for v in _flat(value_of(node))} - {None}:
                self.sharing.setdefault(storage, []).append(node)

    def is_private(self, base: fx.Node, writer: fx.Node) -> bool:
        """Whether only ``base`` (and results of writing into it) are read after ``writer``."""
        storage = storage_of(base)
        if storage is None or base.op in ("placeholder", "get_attr"):
            return False
        here = self.position[writer]
        for other in self.sharing[storage]:
            if other.op in ("placeholder", "get_attr"):
                return False
            if other is base or other is writer or self.position[other] > here:
                continue
            if any(self.position[u] > here and not reads_metadata_only(u) for u in other.users):
                return False
        return tensor_of(base).is_contiguous() or not _is_overlapping(tensor_of(base))

    def replace(self, node: fx.Node, base: fx.Node) -> None:
        dtype = tensor_of(base).dtype
        with self.graph.inserting_before(node):
            new = _functional(self.graph, node)
            new.meta = {**node.meta, "example_value": tensor_of(base)}
            self.position[new] = self.position[node]
            if _result_dtype(node) != dtype:
                new = self.graph.call_method("to", (new,), {"dtype": dtype})
                new.meta = {**node.meta, "example_value": tensor_of(base)}
                self.position[new] = self.position[node]
        new = self._as_it_lay(new, base)
        here = self.position[node]  # all that was made is there too
        for user in [*base.users, *node.users]:
            if user is not new and self.position[user] > here:
                user.replace_input_with(base, new)
                user.replace_input_with(node, new)
        self.sharing[storage_of(base)].append(new)
        self.graph.erase_node(node)
        self.sharing[storage_of(base)] = [n for n in self.sharing[storage_of(base)] if n is not node]

    def _as_it_lay(self, new: fx.Node, base: fx.Node) -> fx.Node:
        """The result in the memory order of ``base``: ``masked_fill`` and the like give contiguous ones."""
        held = tensor_of(base)
        if new.target not in _CONTIGUOUS_RESULTS or held.is_contiguous():
            return new
        new.meta["example_value"] = torch.empty_like(
            held, memory_format=torch.contiguous_format, requires_grad=held.requires_grad
        )
        ordered = Emitter(new.next, self.position).with_strides(new, held)
        ordered.meta = {**ordered.meta, "example_value": held}
        return ordered


def storage_of_value(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    try:
        return storage_identity(value)
    except (NotImplementedError, RuntimeError):
        return None


def _is_overlapping(t: Tensor) -> bool:
    return any(stride == 0 for stride in t.stride())


def _functional(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if node.target is operator.setitem:
        value: Any = node.args[2]
        dtype = tensor_of(node.args[0]).dtype  # type: ignore[arg-type]
        if dtype.is_floating_point:
            value = rounded(value, dtype)  # infinite where it is beyond the type, for which ``masked_fill`` raises
        return graph.call_method("masked_fill", (node.args[0], _mask_of_setitem(node), value))
    call = call_of(node)
    assert isinstance(call, Call)
    if isinstance(node.target, torch._ops.OpOverload):
        return graph.call_function(out_of_place(node.target), node.args, node.kwargs)  # type: ignore[arg-type]
    if call.name == "dropout":
        return graph.call_function(F.dropout, (call.input, call.get("p", 0.5), call.get("training", True)))
    if call.name in _ACTIVATIONS:
        options = {k: v for k, v in call.arguments.items() if k not in ("input", "inplace")}
        return graph.call_function(getattr(F, call.name), (call.input,), options)
    extra = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if node.op == "call_method":
        return graph.call_method(str(node.target)[:-1], node.args, extra)
    if call.name in _FUNCTIONAL and node.target is not None and not extra and len(node.args) == 2:
        return graph.call_function(_FUNCTIONAL[call.name], node.args)
    return graph.call_method(call.name, (call.input,))


def _result_dtype(node: fx.Node) -> torch.dtype:
    """The dtype that the ordinary operator gives for these operands."""
    base = tensor_of(node.args[0])  # type: ignore[arg-type]
    other = value_of(node.args[1]) if len(node.args) > 1 else None
    call = call_of(node)
    if call is None or call.name not in _FUNCTIONAL or other is None:
        return base.dtype
    promoted = promoted_type(base, other)
    if call.name == "div" and not promoted.is_floating_point:
        return torch.get_default_dtype()
    return promoted
