"""Which operand plays which role, and what speaks against fusing a site."""

import math
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vbcompile.passes.attention_contraction import Contraction, contraction_of
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_site import Operand, Site
from vbcompile.passes.graph_axes import Dim, Dims, Space
from vbcompile.passes.graph_effects import is_pure, upstream
from vbcompile.passes.graph_ops import (
    FLOATS,
    call_of,
    is_parameter,
    is_tensor,
    reads_metadata_only,
    shape_of,
    tensor_of,
    value_of,
)


def check_axes(site: Site) -> None:
    """Refuse a product that mixes what another one computed (talking heads): its "keys" are scores."""
    q, k, v = (atoms_of(site.space, operand.dims) for operand in (site.q, site.k, site.v))
    if k - q - v - {*site.space.resolve(site.keys), *site.space.resolve(site.features)}:
        raise Refusal("the scores are mixed along an axis that is neither of queries nor of values")
    if set(site.space.resolve(site.rows)) & v:
        raise Refusal("the values differ from row to row")
    if any(is_masked(operand.node) for operand in (site.q, site.k)):
        raise Refusal("queries or keys are masked scores themselves")


def is_masked(node: fx.Node) -> bool:
    """Whether a tensor was filled with -inf since the last matrix product: kernels take operands to be finite."""
    todo: list[Any] = [node]
    seen: set[fx.Node] = set()
    while todo and len(seen) < 40:
        n = todo.pop()
        if isinstance(n, (tuple, list)):
            todo.extend(n)
        elif isinstance(n, float) and n == -math.inf:
            return True
        elif isinstance(n, fx.Node) and n not in seen:
            seen.add(n)
            call = call_of(n)
            is_pointwise = call is not None and call.name not in _ENDS and contraction_of(call, n) is None
            todo += [*n.args, *n.kwargs.values()] if is_pointwise else []
    return False


_ENDS = {"linear", "softmax", "safe_softmax", "log_softmax", "sdpa", "arange"}  # finite, whatever goes in


def check_operands(site: Site) -> None:
    """Raise Refusal for dtypes, devices and sizes that the operator does not take."""
    tensors = [tensor_of(operand.node) for operand in (site.q, site.k, site.v)]
    if any(t.dtype not in FLOATS for t in tensors) or site.score_dtype not in FLOATS:
        raise Refusal(f"dtype {tensors[0].dtype}")
    if len({t.device for t in tensors}) != 1:
        raise Refusal("queries, keys and values are on different devices")
    if any(is_traceable_wrapper_subclass(t) for t in tensors):
        raise Refusal("a tensor subclass")
    if any(t.is_sparse or t.is_nested or t.layout != torch.strided for t in tensors):
        raise Refusal("sparse or nested tensors")
    if any(type(size) is int and size == 0 for t in tensors for size in t.shape):
        raise Refusal("an empty tensor")


class UsedElsewhere(Refusal):
    """Values inside a site are used outside of it, so that it would be computed twice.

    Attributes:
        region: the nodes that the fused call would make superfluous.
        readers: the nodes outside that read them.
    """

    def __init__(self, reason: str, region: Set[fx.Node], readers: Set[fx.Node]) -> None:
        super().__init__(reason)
        self.region = region
        self.readers = readers


def check_region(sites: Sequence[Site], out: fx.Node, fused: Set[fx.Node] = frozenset()) -> None:
    """Raise Refusal where a value inside the sites is used outside of them.

    Args:
        fused: nodes that other fused calls make superfluous. What they read is computed once more in each, but nowhere
            in memory.

    Raises:
        UsedElsewhere: where all that stands against the sites are nodes outside that might be fused as well.
    """
    region = set().union(*(site.region for site in sites)) | {out}
    log_sums = {node for site in sites for node, _ in site.log_sums}
    dropped = _dropped(sites, region)
    readers: dict[fx.Node, str] = {}
    for node in region - log_sums - {out}:
        for user in node.users:
            if user in region or user in log_sums or reads_metadata_only(user) or is_dead(user):
                continue
            what = "the attention weights are" if node in _weights_of(sites) else "an intermediate of the scores is"
            if user.op == "output":
                raise Refusal(f"{what} returned")
            if node in dropped:  # another call would draw other random numbers
                raise Refusal(f"{what} used elsewhere ({user.name})")
            if user not in fused:
                readers[user] = f"{what} used elsewhere ({user.name})"
    if readers:
        raise UsedElsewhere(next(iter(readers.values())), region, readers.keys())


def _dropped(sites: Sequence[Site], region: set[fx.Node]) -> set[fx.Node]:
    """Nodes of the region that hold dropped weights."""
    if not any(site.dropout for site in sites):
        return set()
    drops = [n for n in region if getattr(call_of(n), "name", "") == "dropout"]
    return set(upstream(drops, lambda n: region.intersection(n.users)))


def _weights_of(sites: Sequence[Site]) -> set[fx.Node]:
    return {
        n for site in sites for n in site.region if (c := call_of(n)) is not None and c.name in ("softmax", "dropout")
    }


def is_dead(node: fx.Node) -> bool:
    """Whether the node has no effect and nobody reads it."""
    call = call_of(node)
    has_effect = call.in_place if call is not None else not is_pure(node)
    return not has_effect and all(is_dead(user) for user in node.users)


def check_dropout(probability: Any) -> Any:
    """The probability of an active dropout (number or node); raises Refusal where the fused call cannot draw it."""
    import torch._inductor.config

    value = value_of(probability)
    if isinstance(value, torch.SymFloat) and value.node.maybe_as_float() is not None:
        probability = value.node.maybe_as_float()
    if isinstance(probability, fx.Node) and not isinstance(value, torch.SymFloat):
        raise Refusal("a dropout probability that is no number")
    if probability and torch._inductor.config.fallback_random:
        raise Refusal("dropout must repeat eager's random numbers (fallback_random)")
    if isinstance(probability, (int, float)):
        if not 0 <= probability < 1:
            raise Refusal(f"dropout probability {probability}")
        return float(probability)
    return probability


def bind_roles(space: Space, first: Contraction, dims: dict[str, Dim], keys: Dim) -> tuple[Operand, Operand, Dim]:
    """Which operand holds queries and which keys, and the axis of the rows; raises Refusal."""
    wanted = set(space.resolve(keys))
    sides = [atoms_of(space, first.lhs_dims(dims)), atoms_of(space, first.rhs_dims(dims))]
    holds = [bool(wanted & side) for side in sides]
    if all(holds) or not any(holds):
        raise Refusal("the softmax runs over an axis that both operands of the first matrix product share")
    one = first if holds[1] else first.swapped()  # rhs holds the keys
    if not wanted <= atoms_of(space, one.rhs_dims(dims)):
        raise Refusal("the softmax runs over axes of both operands of the first matrix product")
    if _is_parameter_matrix(one.rhs):
        raise Refusal("a linear layer followed by a softmax: the keys are a weight matrix")
    own = [x for x in first.out_labels if x in one.lhs_labels and x not in one.rhs_labels]
    rows = space.resolve(dims[own[-1]])[-1:] if own else ()
    return Operand(one.lhs, one.lhs_dims(dims)), Operand(one.rhs, one.rhs_dims(dims)), rows


def atoms_of(space: Space, dims: Dims) -> set[Any]:
    return {atom for dim in space.resolve_all(dims) for atom in dim}


def _is_parameter_matrix(node: fx.Node) -> bool:
    """Whether the node is a parameter of rank two, or a view of one."""
    while len(shape_of(node)) <= 2:
        if node.op == "get_attr" or (node.op == "placeholder" and is_parameter(node)):
            return True
        call = call_of(node)
        if call is None or not isinstance(call.input, fx.Node) or not is_tensor(call.input):
            return False
        if call.name not in ("transpose", "t", "T", "mT", "permute", "to", "contiguous", "clone", "float", "half"):
            return False
        node = call.input
    return False
