"""Linear layers that share their input run as one product: query, key and value; gate and up.

The packed rows lie below one another, each with its own scale, so every weight has the values that it has alone.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from vbcompile.kernels.fp4_epilogue import TURN
from vbcompile.passes.fp4_epilogues import Epilogue
from vbcompile.passes.fp4_sites import LinearSite
from vbcompile.passes.fp4_weights import PackKey
from vbcompile.passes.graph_effects import Effects, written_tensors
from vbcompile.passes.graph_ops import call_of, reads_metadata_only, value_of

_VIEWS = {
    "reshape", "view_as", "transpose", "permute", "movedim", "unsqueeze", "squeeze", "expand", "expand_as", "flatten",
    "unflatten", "getitem", "narrow", "select", "t", "T", "mT", "detach", "chunk", "split",
}  # fmt: skip
_STRIDED = {"as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", "untyped_storage", "numpy"}
_NAMESPACES = ("aten", "prims", "vblackwell")


@dataclass(frozen=True)
class Candidate:
    """A product that will run on a packed weight.

    Attributes:
        site: a ``LinearSite`` or an ``ExpertSite``.
        dtype: that it computes in.
        rows: of its input; None where symbolic.
        n, k: rows and columns of the weight as a linear layer has them.
        epilogue: what the product does to its sums; the same for all members of a group.
    """

    site: Any
    key: PackKey
    dtype: torch.dtype
    rows: int | None
    n: int
    k: int
    epilogue: Epilogue | None = None

    def alone(self) -> "Candidate":
        """The same without the partner that an epilogue needs."""
        if self.epilogue is None or len(self.epilogue.layers) == 1:
            return self
        return replace(self, key=replace(self.key, gate=""), epilogue=None)

    @property
    def name(self) -> str:
        """What messages call the weight."""
        return self.site.name.split(" ")[0] or self.site.weight.name


def with_shared_inputs(candidates: Sequence[Candidate], graph: fx.Graph) -> list[list[Candidate]]:
    """The candidates in order, those together that can be one product."""
    effects = Effects(graph)
    groups: list[list[Candidate]] = []
    open_groups: dict[Any, list[Candidate]] = {}
    for candidate in candidates:
        kind = _kind(candidate)
        group = open_groups.get(kind)
        if group is not None and _can_join(candidate, group, effects):
            group.append(candidate)
            continue
        groups.append([candidate])
        open_groups[kind] = groups[-1]
    return groups


def with_epilogues(
    candidates: Sequence[Candidate], graph: fx.Graph, epilogues: Sequence[Epilogue]
) -> list[list[Candidate]]:
    """Groups of the candidates whose products can do what follows them; the gate before up."""
    found = {candidate.site.node: candidate for candidate in candidates}
    groups = []
    for epilogue in epilogues:
        members = [found[layer] for layer in epilogue.layers if layer in found]
        if len(members) < len(epilogue.layers) or members[0].dtype != value_of(epilogue.result).dtype:
            continue
        if len(members) == 2 and len(with_shared_inputs([c for c in candidates if c in members], graph)) > 1:
            continue
        groups.append([replace(c, key=replace(c.key, gate=epilogue.gate), epilogue=epilogue) for c in members])
    return groups


def _kind(candidate: Candidate) -> Any:
    site = candidate.site
    bias = None if site.bias is None else value_of(site.bias).dtype
    return site.x, candidate.key, candidate.dtype, bias, value_of(site.node).ndim


def _can_join(candidate: Candidate, group: list[Candidate], effects: Effects) -> bool:
    """Whether the product may run as early as the first of the group."""
    site, first = candidate.site, group[0].site
    if any(site.weight is other.site.weight for other in group):
        return False
    if site.bias is not None and (
        site.bias.op != "placeholder" or first.bias is None or first.bias.op != "placeholder"
    ):
        return False
    begin, end = effects.position[first.node], effects.position[site.node]
    read = (site.x, site.weight, *(() if site.bias is None else (site.bias,)))
    return not (
        any(effects.is_written(node, begin, end) for node in read)
        or effects.switches_grad_mode(begin, end)
        or effects.is_transformed(site.node) != effects.is_transformed(first.node)
    )


def rewrite_products(
    graph: fx.Graph,
    group: Sequence[Candidate],
    sites: Sequence[LinearSite],
    packed: Sequence[fx.Node],
    settings: tuple[int, str, str, str],
    cast: bool,
) -> None:
    """Let one ``vblackwell::fp4_linear`` take the place of the products of a group, in place.

    Args:
        sites: of the group, as they are now.
        packed: the nodes of the packed tensors.
        settings: columns of the weight, format, layout, kind of activations.
        cast: whether autocast casts what the products read.
    """
    first, epilogue = sites[0], group[0].epilogue
    with graph.inserting_before(first.node):
        x = first.x
        if cast:
            x = graph.call_method("to", (x, group[0].dtype))
            x.meta["example_value"] = value_of(first.x).to(group[0].dtype)
        bias = _in_turns(graph, _shared_bias(graph, sites), group[0].key.gate)
        then = () if epilogue is None else (epilogue.name,)
        new = graph.call_function(torch.ops.vblackwell.fp4_linear.default, (x, *packed, bias, *settings, *then))
    new.meta = dict(first.node.meta)
    if epilogue is not None:
        _put_in_place(graph, new, epilogue)
    elif len(group) == 1:
        first.node.replace_all_uses_with(new)
        graph.erase_node(first.node)
    else:
        value = value_of(first.node)
        fused = value.new_empty([*value.shape[:-1], sum(c.n for c in group)])
        new.meta["example_value"] = fused.requires_grad_(value.requires_grad)
        _split_result(graph, new, sites, [c.n for c in group])


def _shared_bias(graph: fx.Graph, sites: Sequence[LinearSite]) -> fx.Node | None:
    """The biases of a group behind one another; emits at the graph's insertion point."""
    biases = [site.bias for site in sites if site.bias is not None]
    if len(biases) < 2:
        return biases[0] if biases else None
    node = graph.call_function(torch.cat, (biases,))
    node.meta["example_value"] = torch.cat([value_of(bias) for bias in biases])
    return node


def _in_turns(graph: fx.Graph, bias: fx.Node | None, gate: str) -> fx.Node | None:
    """A bias in the order of the rows of a gated weight; emits at the graph's insertion point."""
    if bias is None or not gate:
        return bias
    node = graph.call_method("view", (bias, 2, -1, TURN))
    node.meta["example_value"] = value = value_of(bias).view(2, -1, TURN)
    if gate == "second":
        node = graph.call_method("flip", (node, 0))
        node.meta["example_value"] = value = value.flip(0)
    node = graph.call_method("transpose", (node, 0, 1))
    node.meta["example_value"] = value = value.transpose(0, 1)
    node = graph.call_method("reshape", (node, -1))
    node.meta["example_value"] = value.reshape(-1)
    return node


def _put_in_place(graph: fx.Graph, fused: fx.Node, epilogue: Epilogue) -> None:
    """Let ``fused`` take the place of an epilogue's result, and erase what led there."""
    fused.meta = dict(epilogue.result.meta)
    epilogue.result.replace_all_uses_with(fused)
    for node in (epilogue.result, *epilogue.between, *epilogue.layers):
        graph.erase_node(node)


def _split_result(graph: fx.Graph, fused: fx.Node, sites: Sequence[LinearSite], sizes: Sequence[int]) -> None:
    """Let the parts of ``fused [..., sum(sizes)]`` take the place of the sites' results."""
    whole = value_of(fused)
    with graph.inserting_after(fused):
        parts = graph.call_function(torch.split, (fused, list(sizes), -1))
    values = parts.meta["example_value"] = torch.split(whole, list(sizes), -1)
    last = parts
    for index, site in enumerate(sites):
        with graph.inserting_after(last):
            part = graph.call_function(operator.getitem, (parts, index))
        part.meta = {**site.node.meta, "example_value": values[index]}
        last = part
        if _needs_contiguous(site.node, values[index]):
            with graph.inserting_after(part):
                last = graph.call_method("clone", (part,), {"memory_format": torch.contiguous_format})
            last.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(last)
        graph.erase_node(site.node)


def _needs_contiguous(node: fx.Node, value: Tensor) -> bool:
    """Whether someone may depend on the strides that ``node`` has alone; ``value`` has those of a part."""
    for user in node.users:
        if reads_metadata_only(user) and user.target not in ("stride", "is_contiguous", "storage_offset"):
            continue
        written = written_tensors(user)
        if user.op == "output" or written is None or node in written or not _is_plain(user):
            return True
        call = call_of(user)
        name = call.name if call is not None else user.target
        if name in _STRIDED:
            return True
        if name in _VIEWS:
            try:
                seen = _evaluate(user, node, value)
            except (RuntimeError, ValueError, TypeError):  # a view that these strides do not allow
                return True
            if isinstance(seen, Tensor) and _needs_contiguous(user, seen):
                return True
            if isinstance(seen, (tuple, list)):
                return True
    return False


def _is_plain(user: fx.Node) -> bool:
    """Whether a call is PyTorch's own, or ours: those mean the same for any strides."""
    target = user.target
    if user.op != "call_function":
        return user.op == "call_method"
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _NAMESPACES
    if isinstance(target, (torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return False
    module = str(getattr(target, "__module__", None) or "torch")
    return module.split(".")[0] in ("torch", "operator", "_operator", "math")


def _evaluate(user: fx.Node, node: fx.Node, value: Tensor) -> Any:
    args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: value if n is node else value_of(n))
    if user.op == "call_method":
        return getattr(args[0], str(user.target))(*args[1:], **kwargs)
    assert callable(user.target)
    return user.target(*args, **kwargs)
