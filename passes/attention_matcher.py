"""Matches attention from its second matrix product back to its first, with every role bound to axes."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx

from vbcompile.passes.attention_checks import bind_roles, check_axes, check_dropout, check_operands
from vbcompile.passes.attention_contraction import Contraction, contraction_of
from vbcompile.passes.attention_expression import Algebra, Expression
from vbcompile.passes.attention_gates import gated
from vbcompile.passes.attention_infinities import may_be_nan
from vbcompile.passes.attention_lift import Lifter, Refusal
from vbcompile.passes.attention_masks import (
    LOW_FILL,
    LOWEST_FILL,
    POWERLESS,
    Guard,
    Logits,
    conjuncts,
    may_absorb,
    may_hide,
    may_hold_fills,
    may_lose_scores_of_float64,
    may_underflow,
    may_vanish,
    split_logits,
)
from vbcompile.passes.attention_shifts import may_lose_scores, without_shifts
from vbcompile.passes.attention_site import Detail, Operand, Retry, Site
from vbcompile.passes.attention_softmax import Softmax, find_late_division, is_float_cast, read_softmax
from vbcompile.passes.attention_terms import split_term
from vbcompile.passes.attention_weights import Carriers, Weights, walk_back
from vbcompile.passes.graph_autocast import autocast_at
from vbcompile.passes.graph_axes import AxisError, Dim, Dims, Space, broadcast_input
from vbcompile.passes.graph_effects import Effects, cuts_gradient
from vbcompile.passes.graph_ops import (
    call_of,
    is_tensor,
    positive_dim,
    reads_metadata_only,
    shape_of,
    tensor_of,
    value_of,
)

Planned = TypeVar("Planned")
_SEARCH_LIMIT = 300  # nodes looked at between the softmax and the first matrix product


class Matcher:
    """Matches the sites of one graph.

    Args:
        effects: side effects of the graph.
        carriers: nodes that carry softmax weights.
        outer: for the placeholders of an inner graph, the nodes outside that they stand for.
        outer_effects: side effects of the graph around an inner one.
        skips_tiles: whether a mask saves work, so that low finite fills are worth being made one.
        callers: the nodes that run an inner graph; None where they are not known.
    """

    def __init__(
        self,
        effects: Effects,
        carriers: Carriers,
        outer: Mapping[fx.Node, fx.Node],
        outer_effects: Effects | None,
        skips_tiles: bool,
        callers: Sequence[fx.Node] | None,
    ) -> None:
        self.effects = effects
        self.skips_tiles = skips_tiles
        self._callers = callers
        self.outer_effects = outer_effects
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
        self.check_place(second.node)
        space = Space()
        labels = {x: space.dim(size, x) for x, size in zip(second.out_labels, shape_of(second.node), strict=True)}
        for label, size in zip(second.lhs_labels, shape_of(second.lhs), strict=True):
            if label in summed:
                labels[label] = space.dim(size, "k")
        dims = second.lhs_dims(labels)
        keys = tuple(atom for label in second.lhs_labels if label in summed for atom in labels[label])
        found = walk_back(space, second.lhs, dims, keys, self.carriers)
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
        reason, was_bound = "no matrix product computes the scores", False
        for first in self._candidates(softmax.logits):
            for detail in Detail:
                cuts = space.snapshot()
                try:
                    return finish(self._bind(space, second, labels, keys, softmax, first, detail))
                except Retry as error:
                    reason, was_bound = str(error), True
                    space.restore(cuts)
                except (Refusal, AxisError) as error:
                    reason = reason if was_bound else str(error)  # other products say less of it
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
        self.check_place(first.node)
        begin, end = self.effects.position[first.node], self.effects.position[out]
        lifter = self.lifter(space, algebra, first, begin, end, detail, keys)
        logits = self._logits(lifter, softmax)
        if "shift" in logits.leaves:
            if softmax.sink is not None:
                raise Refusal("scores less a number of their row, beside a sink")
            logits, softmax = without_shifts(algebra, logits), replace(softmax, exact_logits=False, bare=False)
        if may_lose_scores({*softmax.shifts, *lifter.shifts}, first.node, lifter.depends):
            raise Refusal("an average or a minimum of scores and fills is subtracted from the scores")
        if lifter.score_dims is None:
            raise Refusal("the softmax does not depend on the matrix product behind it")
        weights = softmax.weights
        factors = [*(factor for _, factor, _ in weights.factors), *(gate.factor for gate in weights.gates)]
        if any(is_tensor(factor) and lifter.depends(factor) for factor in factors):
            raise Refusal("the weights are multiplied with something that depends on the scores")
        dims = first.label_dims(space, lifter.score_dims)
        query, key, rows = bind_roles(space, first, dims, keys)
        features = tuple(atom for x in first.summed for atom in dims[x])
        readable = partial(self._readable, begin=begin, end=end)
        logits, term = split_term(space, algebra, logits, query, key, features, (rows, keys), readable)
        kept, empty, softmax = self._split(lifter, logits, softmax, keys, first.node)
        site = Site(
            space, algebra, query, key, Operand(second.rhs, second.rhs_dims(labels)), out, out_dims, rows, keys,
            features=features, terms=[] if term is None else [term],
            values=tuple(a for x in second.out_labels if x not in second.lhs_labels for a in labels[x]),
            logits=kept, sink=self._sink(lifter, softmax), dropout=_dropout(weights),
            empty_rows=empty, factors=list(reversed(weights.factors)), gates=list(weights.gates),
            score_dtype=tensor_of(first.node).dtype, logits_dtype=tensor_of(softmax.logits).dtype,
            residual=_residual(second, out_dims), alpha=second.alpha, first=begin, spread=detail is Detail.SPREAD,
        )  # fmt: skip
        site.region = {first.node, *way, *weights.region, *lifter.region}
        site.region |= set() if second.before is None else {second.before}
        readers = [weights.node, divisor, *weights.region]
        site.region |= self._dependents(lifter, readers)
        essential = self._dependents(lifter, readers, lifter.shifts | set(softmax.shifts))
        self._check(site, softmax, keys, essential.union(way, softmax.others))
        return site

    def _split(
        self, lifter: Lifter, logits: Expression, softmax: Softmax, keys: Dim, score: fx.Node
    ) -> tuple[Logits, str, Softmax]:
        """Scale, logits with gates, and mask; what rows without a key give; the softmax with what that says of it."""
        algebra, weights = lifter.algebra, softmax.weights
        split = split_logits(algebra, logits, keys, guard=None if weights.kept else self.guard(score))
        if softmax.needs_a_key and not split_logits(algebra, logits, keys).every_row:
            raise Refusal("a sink beside scores less their own maximum, which is infinite in rows that have no key")
        if softmax.less_log_sum and may_absorb(split, tensor_of(softmax.logits).dtype):
            raise Refusal("the logarithm of a sum of fills is lost beside them")
        full = split_logits(algebra, logits, keys, POWERLESS) if softmax.bare else split
        if softmax.bare and not _has_sink(softmax) and may_underflow(full):
            raise Refusal("powers of low fills, which may all be zero")
        kept, empty = self._keep(lifter, full, logits, weights, keys)
        if weights.zero_empty and may_be_nan(kept.value):
            raise Refusal("nan_to_num where a mask's infinity may become NaN, or more than the scores")
        widened = tensor_of(softmax.logits).dtype == torch.float64 != tensor_of(score).dtype
        if widened and not softmax.narrowed and may_lose_scores_of_float64(kept):
            raise Refusal("fills of float64 scores, beside which the scores' own type has no digits left")
        if kept is not split and not kept.every_row and kept.mask != split.mask:
            softmax = replace(softmax, exact_logits=False)  # the logarithm of the sum still has the fills of such rows
        gates = [(algebra.make("to_float", lifter.lift(g.factor, g.dims)), g.guard) for g in softmax.gates]
        return gated(algebra, kept, gates), empty, softmax

    def guard(self, score: fx.Node) -> Guard | None:
        """How a low finite fill becomes a mask; None where it stays a number."""
        return Guard(absorbs=not tensor_of(score).requires_grad) if self.skips_tiles else None

    def _readable(self, second: Contraction, begin: int, end: int) -> bool:
        """Whether the operands of a product hold the same values at the end of the site, under one gradient mode."""
        begin = min(begin, self.effects.position[second.node])
        written = any(self.effects.is_written(x, begin, end) for x in (second.lhs, second.rhs))
        return not written and not self.effects.switches_grad_mode(begin, end)

    def check_place(self, *nodes: fx.Node) -> None:
        """Raise Refusal for nodes under a function transform, for which the operator has no rule."""
        if any(self.effects.is_transformed(node) for node in nodes):
            raise Refusal("a function transform (vmap, grad, jvp) around the attention")

    def autocast_at(self, node: fx.Node) -> torch.dtype | None:
        """The dtype that autocast gives products at the node, None where it is off; raises Refusal if it is unknown."""
        try:
            return autocast_at(node, tensor_of(node.all_input_nodes[0]).device.type, self._callers)
        except LookupError as error:
            raise Refusal(str(error)) from None

    def lifter(
        self,
        space: Space,
        algebra: Algebra,
        first: Contraction | None,
        begin: int,
        end: int,
        detail: "Detail",
        keys: Dim = (),
    ) -> Lifter:
        position, is_written = self.effects.position, self.effects.is_written

        def stable(node: fx.Node, direct: bool) -> bool:
            if node not in position and self.outer_effects is not None:
                return not self.outer_effects.is_written_at_all(node)
            return not is_written(node, begin if direct else position.get(node, -1), end)

        return Lifter(
            space, algebra, contraction=first, position=position, stable=stable,
            recalled=self._recalled, keys=keys,
            representative=self.effects.representative, outer=self.outer,
            may_cut=detail in (Detail.FULL, Detail.SPREAD), symbolic_sizes=detail is not Detail.LOADED,
        )  # fmt: skip

    @staticmethod
    def _logits(lifter: Lifter, softmax: Softmax) -> Expression:
        """What is exponentiated, ``-inf`` where a mask belongs to the softmax."""
        make, const = lifter.algebra.make, lifter.algebra.const
        logits = make("to_float", lifter.lift(softmax.logits, softmax.dims))
        logits = logits if softmax.factor == 1.0 else make("mul", logits, const(softmax.factor))
        conditions = []
        for kept in softmax.masks:
            condition = make("to_bool", lifter.lift(kept.condition, kept.dims))
            conditions.append(condition if kept.keep else make("not", condition))
        if conditions and may_vanish(lifter.algebra, logits, conditions):
            raise Refusal("weights that are left may all be zero already where they are divided by their sum")
        for condition in conditions:
            logits = make("where", condition, logits, const(-math.inf))
        return logits

    def _keep(
        self, lifter: Lifter, split: Logits, logits: Expression, weights: Weights, keys: Dim
    ) -> tuple[Logits, str]:
        """Check masks that are applied to the weights; returns what rows without a key give."""
        if not weights.kept:
            return split, "zero" if weights.zero_empty else "nan"
        rows = weights.kept[0].rows(lifter.space, keys) if len(weights.kept) == 1 and not weights.factors else None
        if rows is not None:
            return self._keep_rows(lifter, split, logits, rows, keys)
        after: set[Expression] = set()
        for kept in weights.kept:
            condition = lifter.algebra.make("to_bool", lifter.lift(kept.condition, kept.dims))
            after |= set(conjuncts(condition if kept.keep else lifter.algebra.make("not", condition)))
        after -= {lifter.algebra.true}
        is_fill_infinite = after <= set(split.mask)
        if is_fill_infinite and not split.every_row and not weights.zero_empty:
            if all(kept.multiplies for kept in weights.kept):
                return split, "nan"
            if any(kept.multiplies for kept in weights.kept):
                raise Refusal("weights that are filled and multiplied in rows that may have no key")
        if not is_fill_infinite:
            splits = (split_logits(lifter.algebra, logits, keys, fill) for fill in (LOWEST_FILL, LOW_FILL))
            fitting = next((found for found in splits if after == set(found.mask)), None)
            if fitting is None:
                raise Refusal("the weights are masked where the softmax is not")
            split = fitting
        if not split.every_row and not weights.zero_empty and (after != set(split.mask) or may_hide(split)):
            raise Refusal("the weights are masked by a part of the mask only")
        return split, "zero"

    def _keep_rows(
        self, lifter: Lifter, split: Logits, logits: Expression, rows: tuple[fx.Node, Dims], keys: Dim
    ) -> tuple[Logits, str]:
        """Check that the rows set to zero are those without a key, told by ``keep.any(-1)``."""
        shown = set(conjuncts(lifter.algebra.make("to_bool", lifter.lift(*rows)))) - {lifter.algebra.true}
        for found in (split, *(split_logits(lifter.algebra, logits, keys, fill) for fill in (LOWEST_FILL, LOW_FILL))):
            if shown == set(found.mask) and (found.every_row or not may_hide(found)):
                return found, "zero"
        raise Refusal("rows of weights are set to zero by something else than the softmax's mask")

    def _sink(self, lifter: Lifter, softmax: Softmax) -> Expression | None:
        if softmax.sink is None:
            return None
        sink = lifter.algebra.make("to_float", lifter.lift(*softmax.sink))
        if not sink.leaves.isdisjoint({"score", "shift"}):
            raise Refusal("the sink depends on the scores")
        factor = lifter.algebra.const(softmax.factor)
        return sink if softmax.factor == 1.0 else lifter.algebra.make("mul", sink, factor)

    def _dependents(
        self, lifter: Lifter, readers: Sequence[fx.Node | None], ends: Collection[fx.Node] = ()
    ) -> set[fx.Node]:
        """Nodes between the first product and ``readers``, no further than ``ends``; the fused call replaces them."""
        found: set[fx.Node] = set()
        todo = [i for reader in readers if reader is not None for i in (reader, *reader.all_input_nodes)]
        while todo:
            node = todo.pop()
            holds_tensors = isinstance(value_of(node), (torch.Tensor, tuple, list)) and not reads_metadata_only(node)
            if node in found or node in ends or not holds_tensors or not lifter.depends(node):
                continue
            found.add(node)
            todo += node.all_input_nodes
        return found

    def _check(self, site: Site, softmax: Softmax, keys: Dim, essential: set[fx.Node]) -> None:
        """Raise Refusal for what stands against the site; ``essential``: its nodes but those that only shift scores."""
        begin, end = site.first, self.effects.position[site.out]
        check_axes(site)
        for operand in (site.q, site.k):
            if self.effects.is_written(operand.node, begin, end):
                raise Refusal("queries or keys are modified in place before the values are weighted")
        wants = any(is_tensor(node) and tensor_of(node).requires_grad for node in essential)
        if (wants or self.effects.switches_grad_mode(begin, end)) and any(map(cuts_gradient, essential)):
            raise Refusal("the gradient mode changes inside the attention, or a gradient is cut off there")
        read_late = [site.v.node, *(factor for _, factor, _ in site.factors), *(gate.factor for gate in site.gates)]
        read_late += (site.residual or ())[:1]
        if any(is_tensor(node) and self.effects.is_written(node, begin, end) for node in read_late):
            raise Refusal("a tensor that the result depends on is modified in place inside the attention")
        self._find_log_sums(site, softmax, keys)
        check_operands(site)

    def _find_log_sums(self, site: Site, softmax: Softmax, keys: Dim) -> None:
        if not softmax.exact_logits or softmax.factor != 1.0 or site.sink is not None:
            return
        for node in (softmax.logits, *self._widened(softmax.logits, site)):
            for user in node.users:
                self._find_log_sum(site, user, softmax.dims, keys)
        self._check_early(site)

    @staticmethod
    def _widened(logits: fx.Node, site: Site) -> list[fx.Node]:
        """Casts of the logits that nothing but the site and ``logsumexp`` reads."""
        reads_no_more = lambda n: all(getattr(call_of(u), "name", "") == "logsumexp" for u in n.users)
        casts = [n for n in logits.users if is_float_cast(call_of(n), n)]
        return [n for n in casts if n in site.region or reads_no_more(n)]

    def _find_log_sum(self, site: Site, user: fx.Node, dims: Dims, keys: Dim) -> None:
        call = call_of(user)
        if call is None or call.name != "logsumexp" or user.users.keys() <= site.region:
            return
        dim = call.get("dim")
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if not isinstance(dim, int):
            return
        dim = positive_dim(dim, len(dims))
        if site.space.resolve(dims[dim]) == site.space.resolve(keys):
            kept = ((),) if call.get("keepdim") else ()
            site.log_sums.append((user, (*dims[:dim], *kept, *dims[dim + 1 :])))
            site.region |= {call.input} - {site.out}

    def _check_early(self, site: Site) -> None:
        """Place the call before a ``logsumexp`` of its logits; refuse where the values are not there yet."""
        place = self.effects.position
        site.log_sums.sort(key=lambda found: place[found[0]])
        if not site.log_sums:
            return
        site.insert_before = min(site.log_sums[0][0], site.out, key=place.__getitem__)
        early = place[site.insert_before]
        values = [node for node in (site.v.node, *(gate.factor for gate in site.gates)) if is_tensor(node)]
        if any(place.get(x, 0) >= early or self.effects.is_written(x, early, place[site.out]) for x in values):
            raise Refusal("the scores are used before the values are known")
        if self.effects.switches_grad_mode(early, place[site.out]):
            raise Refusal("the scores are used under another gradient mode")


def _has_sink(softmax: Softmax) -> bool:
    """Whether there is a sink that is no mask itself, so that no row's sum is zero."""
    sink = None if softmax.sink is None else softmax.sink[0]
    return sink is not None and not (is_tensor(sink) and may_hold_fills(sink, -POWERLESS))


def _residual(second: Contraction, out_dims: Dims) -> tuple[Any, Dims, Any] | None:
    """What the second product adds to its result."""
    if second.addend is None or second.beta == 0:
        return None
    if not is_tensor(second.addend):
        raise Refusal("the second matrix product adds something that is no tensor")
    return second.addend, broadcast_input(out_dims, shape_of(second.addend)), second.beta


def _dropout(weights: Weights) -> Any:
    """The one dropout probability; raises Refusal for several."""
    if len(weights.dropout) > 1:
        raise Refusal("more than one dropout of the weights")
    return check_dropout(weights.dropout[0] if weights.dropout else 0.0)


def _operand_size(contraction: Contraction) -> int:
    total = 0
    for node in (contraction.lhs, contraction.rhs):
        size = 1
        for s in shape_of(node):
            size *= s if type(s) is int else 64
        total += size
    return total
