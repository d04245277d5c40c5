"""One attention site: matched from its second matrix product back to its first, with every role bound to axes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import fx

from vbcompile.passes.attention_contraction import Contraction, contraction_of
from vbcompile.passes.attention_expression import Algebra, Expression
from vbcompile.passes.attention_lift import Lifter, Refusal
from vbcompile.passes.attention_masks import Logits, conjuncts, split_logits
from vbcompile.passes.attention_softmax import Softmax, find_late_division, read_softmax
from vbcompile.passes.attention_weights import Carriers, Weights, walk_back
from vbcompile.passes.graph_axes import AxisError, Dim, Dims, Space, broadcast_input
from vbcompile.passes.graph_effects import Effects
from vbcompile.passes.graph_ops import (
    call_of,
    is_tensor,
    reads_metadata_only,
    shape_of,
    tensor_of,
    value_of,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Planned = TypeVar("Planned")
_SEARCH_LIMIT = 300  # nodes looked at between the softmax and the first matrix product


@dataclass
class Operand:
    """A tensor of the site and its dimensions."""

    node: fx.Node
    dims: Dims


@dataclass
class Site:
    """Everything that a fused call needs, in terms of graph nodes and axes.

    Attributes:
        out: the node that the fused result replaces, ``out_dims`` its dimensions.
        rows, keys, features, values: axes of queries, keys, the summed and the value features.
        logits: scale, logits and mask as expressions.
        sink: one more logit per row.
        factors: ``(operator, operand, dims)`` applied to whole rows of the result, first applied first.
        region: nodes that the fused call makes superfluous.
        log_sums: ``logsumexp`` nodes over the same logits that come before the result, with their dimensions, in order.
        residual: ``(node, dims, factor)`` added to ``alpha`` times the result, as ``baddbmm`` does.
    """

    space: Space
    algebra: Algebra
    q: Operand
    k: Operand
    v: Operand
    out: fx.Node
    out_dims: Dims
    rows: Dim
    keys: Dim
    features: Dim
    values: Dim
    logits: Logits
    sink: Expression | None = None
    dropout: Any = 0.0
    empty_rows: str = "nan"
    factors: list[tuple[str, Any, Dims]] = field(default_factory=list)
    region: set[fx.Node] = field(default_factory=set)
    log_sums: list[tuple[fx.Node, Dims]] = field(default_factory=list)
    score_dtype: torch.dtype = torch.float32
    residual: tuple[Any, Dims, Any] | None = None
    alpha: Any = 1
    first: int = 0

    @property
    def insert_before(self) -> fx.Node:
        """Where the fused call goes: at the result, or at the first ``logsumexp`` of the same logits."""
        return self.log_sums[0][0] if self.log_sums else self.out


class Matcher:
    """Matches the sites of one graph.

    Args:
        effects: side effects of the graph.
        carriers: nodes that carry softmax weights.
        outer: for the placeholders of an inner graph, the nodes outside that they stand for.
    """

    def __init__(self, effects: Effects, carriers: Carriers, outer: Mapping[fx.Node, fx.Node]) -> None:
        self.effects = effects
        self.carriers = carriers
        self.outer = outer
        self._recalled: dict[Any, Any] = {}

    # ------------------------------------------------------------------------------------------------ from the end
    def match(self, second: Contraction, finish: Callable[[Site], Planned]) -> list[Planned]:
        """The sites whose sum the second product (its ``lhs`` being the weights) computes; raises Refusal.

        ``finish`` makes the rest of the plan; it too may raise Refusal, and Retry to have the site read in less detail.
        """
        summed = second.summed
        if len(summed) == 0:
            raise Refusal("the second matrix product sums over no axis")
        space = Space()
        labels = {x: space.dim(size, x) for x, size in zip(second.out_labels, shape_of(second.node), strict=True)}
        for label, size in zip(second.lhs_labels, shape_of(second.lhs), strict=True):
            if label in summed:
                labels[label] = space.dim(size, "k")
        dims = second.lhs_dims(labels)
        keys = tuple(atom for label in second.lhs_labels if label in summed for atom in labels[label])
        found = walk_back(space, second.lhs, dims, self.carriers)
        if len(found) > 1 and second.addend is not None:
            raise Refusal("a sum of weights whose second matrix product adds something")
        return [self._site(space, second, labels, keys, weights, len(found) > 1, finish) for weights in found]

    def _site(
        self,
        space: Space,
        second: Contraction,
        labels: dict[str, Dim],
        keys: Dim,
        weights: Weights,
        joint: bool,
        finish: Callable[[Site], Planned],
    ) -> Planned:
        softmax = read_softmax(space, weights, keys)
        if softmax.late_sum is not None and (joint or weights.factors or second.addend is not None):
            raise Refusal("an exponential that is not divided by its own sum")
        reason = "no matrix product computes the scores"
        for first in self._candidates(softmax.logits):
            for detail in Detail:
                cuts = space.snapshot()
                try:
                    return finish(self._bind(space, second, labels, keys, softmax, first, detail))
                except Retry as error:
                    reason = str(error)
                    space.restore(cuts)
                except (Refusal, AxisError) as error:
                    reason = str(error)
                    space.restore(cuts)
                    break
        raise Refusal(reason)

    def _candidates(self, logits: fx.Node) -> list[Contraction]:
        """Matrix products behind the logits, smallest operands first."""
        found: list[Contraction] = []
        seen: set[fx.Node] = set()
        todo = [logits]
        while todo and len(seen) < _SEARCH_LIMIT:
            node = todo.pop(0)
            if node in seen or node.op not in ("call_function", "call_method"):
                continue
            seen.add(node)
            if is_tensor(node) and not tensor_of(node).is_floating_point():
                continue
            call = call_of(node)
            contraction = contraction_of(call, node)
            if contraction is not None:
                found.append(contraction)
                todo += [contraction.addend] if isinstance(contraction.addend, fx.Node) else []
            elif call is None or call.name != "linear":
                todo += node.all_input_nodes
        return sorted(found, key=_operand_size)

    # ------------------------------------------------------------------------------------------------------ binding
    def _bind(
        self,
        space: Space,
        second: Contraction,
        labels: dict[str, Dim],
        keys: Dim,
        softmax: Softmax,
        first: Contraction,
        detail: "Detail",
    ) -> Site:
        algebra = Algebra()
        out_dims = tuple(labels[x] for x in second.out_labels)
        way, divisor = [second.node], None
        if softmax.late_sum is not None:
            way, divisor, out_dims = find_late_division(space, softmax.late_sum, second.node, out_dims, keys)
        out = way[-1]
        begin, end = self.effects.position[first.node], self.effects.position[out]
        lifter = self.lifter(space, algebra, first, begin, end, detail)
        logits = algebra.make("to_float", lifter.lift(softmax.logits, softmax.dims))
        if lifter.score_dims is None:
            raise Refusal("the softmax does not depend on the matrix product behind it")
        split = split_logits(algebra, logits, keys)
        weights = softmax.weights
        split, empty = self._keep(lifter, split, logits, weights, keys)
        dims = first.label_dims(space, lifter.score_dims)
        query, key, rows = _roles(space, first, dims, keys)
        site = Site(
            space, algebra, query, key, Operand(second.rhs, second.rhs_dims(labels)), out, out_dims, rows, keys,
            features=tuple(atom for x in first.summed for atom in dims[x]),
            values=tuple(a for x in second.out_labels if x not in second.lhs_labels for a in labels[x]),
            logits=split, sink=self._sink(lifter, softmax), dropout=_dropout(weights),
            empty_rows=empty, factors=list(reversed(weights.factors)), score_dtype=tensor_of(first.node).dtype,
            residual=_residual(second, out_dims), alpha=second.alpha, first=begin,
        )  # fmt: skip
        site.region = {first.node, *way, *weights.region, *lifter.region}
        site.region |= self._dependents(lifter, [weights.node, divisor, *weights.region])
        self._check(site, softmax, keys)
        return site

    def lifter(
        self, space: Space, algebra: Algebra, first: Contraction | None, begin: int, end: int, detail: "Detail"
    ) -> Lifter:
        position, is_written = self.effects.position, self.effects.is_written

        def stable(node: fx.Node, direct: bool) -> bool:
            return not is_written(node, begin if direct else position.get(node, -1), end)

        return Lifter(
            space, algebra, contraction=first, position=position, stable=stable,
            recalled=self._recalled,
            representative=self.effects.representative, outer=self.outer,
            may_cut=detail is Detail.FULL, symbolic_sizes=detail is not Detail.LOADED,
        )  # fmt: skip

    def _keep(
        self, lifter: Lifter, split: Logits, logits: Expression, weights: Weights, keys: Dim
    ) -> tuple[Logits, str]:
        """Check masks that are applied to the weights; returns what rows without a key give."""
        if not weights.kept:
            return split, "zero" if weights.zero_empty else "nan"
        after: set[Expression] = set()
        for mask, dims, keep in weights.kept:
            condition = lifter.algebra.make("to_bool", lifter.lift(mask, dims))
            after |= set(conjuncts(condition if keep else lifter.algebra.make("not", condition)))
        after -= {lifter.algebra.true}
        if not after <= set(split.mask):
            split = split_logits(lifter.algebra, logits, keys, low_fills=True)
            if after != set(split.mask):
                raise Refusal("the weights are masked where the softmax is not")
        if after != set(split.mask) and not split.every_row and not weights.zero_empty:
            raise Refusal("the weights are masked by a part of the mask only")
        return split, "zero"

    def _sink(self, lifter: Lifter, softmax: Softmax) -> Expression | None:
        if softmax.sink is None:
            return None
        node, dims = softmax.sink
        if isinstance(node, fx.Node) and lifter.depends(node):
            raise Refusal("the sink depends on the scores")
        return lifter.algebra.make("to_float", lifter.lift(node, dims))

    def _dependents(self, lifter: Lifter, readers: Sequence[fx.Node | None]) -> set[fx.Node]:
        """Nodes between the logits and ``readers`` that the fused call makes superfluous."""
        found: set[fx.Node] = set()
        todo = [i for reader in readers if reader is not None for i in (reader, *reader.all_input_nodes)]
        while todo:
            node = todo.pop()
            if node in found or not lifter.depends(node) or node in lifter.region:
                continue
            found.add(node)
            todo += node.all_input_nodes
        return found

    def _check(self, site: Site, softmax: Softmax, keys: Dim) -> None:
        begin, end = site.first, self.effects.position[site.out]
        _check_axes(site)
        for operand in (site.q, site.k):
            if self.effects.is_written(operand.node, begin, end):
                raise Refusal("queries or keys are modified in place before the values are weighted")
        if self.effects.switches_grad_mode(begin, end):
            raise Refusal("the gradient mode changes inside the attention")
        self._find_log_sums(site, softmax, keys)
        check_operands(site)

    def _find_log_sums(self, site: Site, softmax: Softmax, keys: Dim) -> None:
        if not softmax.exact_logits or site.sink is not None:
            return
        for user in softmax.logits.users:
            call = call_of(user)
            if call is None or call.name != "logsumexp" or user in site.region:
                continue
            dim = call.get("dim")
            dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
            if not isinstance(dim, int):
                continue
            dim = dim % len(softmax.dims)
            if site.space.resolve(softmax.dims[dim]) == site.space.resolve(keys):
                kept = ((),) if call.get("keepdim") else ()
                site.log_sums.append((user, (*softmax.dims[:dim], *kept, *softmax.dims[dim + 1 :])))
        self._check_early(site)

    def _check_early(self, site: Site) -> None:
        """Refuse where the operands are not there yet when a ``logsumexp`` is read."""
        place = self.effects.position
        site.log_sums.sort(key=lambda found: place[found[0]])
        if not site.log_sums:
            return
        early = place[site.insert_before]
        if early > place[site.out]:
            raise Refusal("the scores are used again after the attention")
        if place.get(site.v.node, 0) >= early or self.effects.is_written(site.v.node, early, place[site.out]):
            raise Refusal("the scores are used before the values are known")


class Detail(Enum):
    """How closely masks and biases are looked at, in the order of trying.

    ``FULL``; ``WHOLE``: no axis is cut for their sake; ``LOADED``: nor do run-time sizes become part of a formula.
    """

    FULL = 0
    WHOLE = 1
    LOADED = 2


class Retry(Exception):
    """The site cannot be planned in this detail."""


def _residual(second: Contraction, out_dims: Dims) -> tuple[Any, Dims, Any] | None:
    """What the second product adds to its result."""
    if second.addend is None or second.beta == 0:
        return None
    if not is_tensor(second.addend):
        raise Refusal("the second matrix product adds something that is no tensor")
    return second.addend, broadcast_input(out_dims, shape_of(second.addend)), second.beta


def _check_axes(site: Site) -> None:
    """Refuse a product that mixes what another one computed (talking heads): its "keys" are scores."""
    q, k, v = (_atoms(site.space, operand.dims) for operand in (site.q, site.k, site.v))
    if k - q - v - {*site.space.resolve(site.keys), *site.space.resolve(site.features)}:
        raise Refusal("the scores are mixed along an axis that is neither of queries nor of values")
    if set(site.space.resolve(site.rows)) & v:
        raise Refusal("the values differ from row to row")


def check_operands(site: Site) -> None:
    """Raise Refusal for dtypes, devices and sizes that the operator does not take."""
    tensors = [tensor_of(operand.node) for operand in (site.q, site.k, site.v)]
    if any(t.dtype not in FLOATS for t in tensors) or site.score_dtype not in FLOATS:
        raise Refusal(f"dtype {tensors[0].dtype}")
    if len({t.device for t in tensors}) != 1:
        raise Refusal("queries, keys and values are on different devices")
    if any(t.is_sparse or t.is_nested or t.layout != torch.strided for t in tensors):
        raise Refusal("sparse or nested tensors")
    if any(type(size) is int and size == 0 for t in tensors for size in t.shape):
        raise Refusal("an empty tensor")


def check_region(sites: Sequence[Site], out: fx.Node) -> None:
    """Raise Refusal where a value inside the sites is used outside of them."""
    region = set().union(*(site.region for site in sites)) | {out}
    allowed = region | {node for site in sites for node, _ in site.log_sums}
    for node in region - {out}:
        for user in node.users:
            if user not in allowed and not reads_metadata_only(user) and not is_dead(user):
                what = "the attention weights are" if node in _weights_of(sites) else "an intermediate of the scores is"
                how = "returned" if user.op == "output" else f"used elsewhere ({user.name})"
                raise Refusal(f"{what} {how}")


def _weights_of(sites: Sequence[Site]) -> set[fx.Node]:
    return {n for site in sites for n in site.region if (c := call_of(n)) is not None and c.name in ("softmax", "dropout")}


def is_dead(node: fx.Node) -> bool:
    """Whether the node has no effect and nobody reads it."""
    call = call_of(node)
    return call is not None and not call.in_place and all(is_dead(user) for user in node.users)


def _dropout(weights: Weights) -> Any:
    """The one dropout probability; raises Refusal for several."""
    if len(weights.dropout) > 1:
        raise Refusal("more than one dropout of the weights")
    return check_dropout(weights.dropout[0] if weights.dropout else 0.0)


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


def _operand_size(contraction: Contraction) -> int:
    total = 0
    for node in (contraction.lhs, contraction.rhs):
        size = 1
        for s in shape_of(node):
            size *= s if type(s) is int else 64
        total += size
    return total


def _roles(space: Space, first: Contraction, dims: dict[str, Dim], keys: Dim) -> tuple[Operand, Operand, Dim]:
    """Which operand holds queries and which keys, and the axis of the rows; raises Refusal."""
    wanted = set(space.resolve(keys))
    sides = [_atoms(space, first.lhs_dims(dims)), _atoms(space, first.rhs_dims(dims))]
    holds = [bool(wanted & side) for side in sides]
    if all(holds) or not any(holds):
        raise Refusal("the softmax runs over an axis that both operands of the first matrix product share")
    one = first if holds[1] else first.swapped()  # rhs holds the keys
    if not wanted <= _atoms(space, one.rhs_dims(dims)):
        raise Refusal("the softmax runs over axes of both operands of the first matrix product")
    if _is_parameter_matrix(one.rhs):
        raise Refusal("a linear layer followed by a softmax: the keys are a weight matrix")
    own = [x for x in first.out_labels if x in one.lhs_labels and x not in one.rhs_labels]
    rows = space.resolve(dims[own[-1]])[-1:] if own else ()
    return Operand(one.lhs, one.lhs_dims(dims)), Operand(one.rhs, one.rhs_dims(dims)), rows


def _atoms(space: Space, dims: Dims) -> set[Any]:
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


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder is a module's parameter."""
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter) or "parameters_" in str(node.target)
