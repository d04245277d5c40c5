"""Linear layers that share their input run as one product: query, key and value; gate and up.

The packed rows lie below one another, each with its own scale, so every weight has the values that it has alone.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

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
    """

    site: Any
    key: PackKey
    dtype: torch.dtype
    rows: int | None
    n: int
    k: int

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


def shared_bias(graph: fx.Graph, sites: Sequence[LinearSite]) -> fx.Node | None:
    """The biases of a group behind one another; emits at the graph's insertion point."""
    biases = [site.bias for site in sites if site.bias is not None]
    if len(biases) < 2:
        return biases[0] if biases else None
    node = graph.call_function(torch.cat, (biases,))
    node.meta["example_value"] = torch.cat([value_of(bias) for bias in biases])
    return node


def split_result(graph: fx.Graph, fused: fx.Node, sites: Sequence[LinearSite], sizes: Sequence[int]) -> None:
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
