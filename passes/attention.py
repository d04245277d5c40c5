"""The attention pass: whatever way a model writes attention, it becomes one ``vblackwell::attention`` call.

A site is found at its second matrix product, whose operand comes from a softmax; walking back from there gives the
softmax, what happens to the scores, and the first matrix product (``attention_site``). Roles are bound by axis, the
pointwise part becomes a score function (``attention_lift``, ``attention_masks``), the call is planned
(``attention_plan``) and only then put into the graph (``attention_rewrite``). What cannot be proved is left alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import fx

from vbcompile.passes.attention_checks import check_region
from vbcompile.passes.attention_composites import write_out
from vbcompile.passes.attention_contraction import Contraction, contraction_of
from vbcompile.passes.attention_encoder_layer import expand_encoder_layer, is_encoder_layer
from vbcompile.passes.attention_fused_calls import (
    expand_multi_head,
    is_multi_head,
    match_inner,
    match_sdpa,
    without_weights,
)
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_matcher import Matcher
from vbcompile.passes.attention_plan import Plan, check_gradients, plan
from vbcompile.passes.attention_report import describe, details
from vbcompile.passes.attention_rewrite import rewrite
from vbcompile.passes.attention_rows import EmptyRowsOfGraph
from vbcompile.passes.attention_site import Detail, Retry, Site
from vbcompile.passes.attention_small import ask_for_quick_calls
from vbcompile.passes.attention_weights import Carriers, may_begin
from vbcompile.passes.graph_aten import erase_proven_checks
from vbcompile.passes.graph_axes import AxisError
from vbcompile.passes.graph_effects import Effects, make_functional, upstream
from vbcompile.passes.graph_gradients import correct_gradients
from vbcompile.passes.graph_ops import Call, call_of, describe_site, module_graphs
from vbcompile.passes.pass_context import PassContext
from vbcompile.report import Decision

PASS_NAME = "attention"


def fuse_attention(gm: fx.GraphModule, context: PassContext) -> list[Decision]:
    """Rewrite every provable attention site of ``gm`` (a torch-level graph, changed in place).

    Args:
        gm: the graph as Dynamo hands it over, with fake values in ``node.meta["example_value"]``; graphs of
            higher-order operators inside it (activation checkpointing) are rewritten too.
        context: what a pass may know.

    Returns:
        A decision for every softmax that might have been attention.
    """
    decisions: list[Decision] = []
    for module in list(module_graphs(gm)):
        callers = _callers(gm, module)
        run = partial(_run, callers=callers, skips_tiles=_skips_tiles(context))
        write_out(module, callers, run)
        found = run(module)
        decisions += found
        if any(d.action == "rewritten" for d in found):
            ask_for_quick_calls(module.graph, context)
            module.graph.lint()
            module.recompile()
    return decisions


def _run(module: fx.GraphModule, callers: Sequence[fx.Node] | None, skips_tiles: bool) -> list[Decision]:
    return _GraphPass(module, callers, skips_tiles).run()


class _GraphPass:
    """The pass over one graph."""

    def __init__(self, module: fx.GraphModule, callers: Sequence[fx.Node] | None, skips_tiles: bool) -> None:
        self.module = module
        self.graph = module.graph
        self.callers = callers
        self.outer = _outer_nodes(module, callers or ())
        self.skips_tiles = skips_tiles
        self.decisions: list[tuple[int, fx.Node | None, Decision]] = []
        self.settled: set[fx.Node] = set()

    def run(self) -> list[Decision]:
        calls = self._calls()
        if not any(may_begin(call) for call in calls.values()) and not any(map(_is_composite, self.graph.nodes)):
            return []
        erase_proven_checks(self.graph)
        correct_gradients(self.graph, self.callers != [] or torch.is_grad_enabled())
        if make_functional(self.graph):
            self.module.recompile()
            calls = self._calls()
        carriers = Carriers()
        carriers.sweep(calls)
        around = next((Effects(node.graph) for node in self.outer.values()), None)
        effects = Effects(self.graph)
        self.empty_rows = EmptyRowsOfGraph(effects)
        matcher = Matcher(effects, carriers, self.outer, around, self.skips_tiles, self.callers)
        self._fused_calls(matcher, calls)
        for node in calls:
            if not any(i in carriers.carrying for i in node.all_input_nodes) or node._erased:
                continue
            contraction = contraction_of(call_of(node), node)  # earlier rewrites may have changed its arguments
            if contraction is not None:
                self._try(matcher, contraction)
        self._report_rest(matcher)
        kept = [(place, decision) for place, left, decision in self.decisions if left is None or not left._erased]
        return [decision for _, decision in sorted(kept, key=lambda entry: entry[0])]

    def _calls(self) -> dict[fx.Node, Call]:
        return {node: call for node in self.graph.nodes if (call := call_of(node)) is not None}

    def _try(self, matcher: Matcher, contraction: Contraction) -> None:
        """Rewrite the site that ends at this product, whichever side its weights are on."""
        carriers = matcher.carriers
        softmaxes = _softmaxes_behind(contraction, carriers)
        reason = ""
        for side in (contraction, contraction.swapped()):
            if side.lhs not in carriers.carrying:
                continue
            try:
                self._replace(matcher, _plan_all(matcher, side))
            except (Refusal, AxisError, Retry) as error:
                reason = reason or str(error)
                continue
            self.settled |= softmaxes
            return
        if any(is_named_softmax(s) for s in softmaxes):
            self.settled |= softmaxes
            self._leave(matcher, contraction.node, reason)

    def _fused_calls(self, matcher: Matcher, calls: Mapping[fx.Node, Call]) -> None:
        for node in filter(_is_composite, list(self.graph.nodes)):
            reason = (self._encoder_layer if is_encoder_layer(node) else self._multi_head)(matcher, node)
            if reason:
                self._leave(matcher, node, reason)
        for node, call in calls.items():
            if call.name == "sdpa":
                reason = self._fused(matcher, partial(match_sdpa, matcher, node))
                if reason:
                    self._leave(matcher, node, reason)

    def _encoder_layer(self, matcher: Matcher, node: fx.Node) -> str:
        """Replace a layer by its parts around a fused call; returns why not, or nothing."""
        try:
            expanded = expand_encoder_layer(matcher, node)
        except Refusal as error:
            return str(error)
        reason = self._multi_head(matcher, expanded.multi_head)
        (expanded.undo if reason else expanded.finish)()
        return reason

    def _multi_head(self, matcher: Matcher, node: fx.Node) -> str:
        """Replace a multi-head call by its projections around a fused call; returns why not, or nothing."""
        try:
            expanded = expand_multi_head(matcher, without_weights(node))
        except Refusal as error:
            return str(error)
        reason = self._fused(matcher, partial(match_inner, matcher, expanded))
        (expanded.undo if reason else expanded.finish)()
        return reason

    def _fused(self, matcher: Matcher, match: Callable[[Detail], Site]) -> str:
        """Rewrite the site that ``match`` finds; returns why not, or nothing."""
        reason = ""
        for detail in Detail:
            try:
                self._replace(matcher, [plan(match(detail), matcher.effects)])
                return ""
            except Retry as error:
                reason = str(error)
            except (Refusal, AxisError) as error:
                return str(error)
        return reason

    def _replace(self, matcher: Matcher, plans: list[Plan]) -> None:
        out = plans[0].site.out
        place, site = matcher.effects.position[out], describe_site(out)
        rewrite(plans, matcher.effects, self.empty_rows)
        for made in plans:
            decision = Decision(PASS_NAME, site, "rewritten", describe(made), details=details(made))
            self.decisions.append((place, None, decision))

    def _leave(self, matcher: Matcher, node: fx.Node, reason: str) -> None:
        decision = Decision(PASS_NAME, describe_site(node), "left", reason)
        self.decisions.append((matcher.effects.position[node], node, decision))

    def _report_rest(self, matcher: Matcher) -> None:
        for node in self.graph.nodes:
            if node in matcher.carriers.softmaxes and node not in self.settled and is_named_softmax(node):
                self._leave(matcher, node, "no matrix product sums values with these weights")


def _skips_tiles(context: PassContext) -> bool:
    """Whether kernels of the target leave out hidden tiles; those of CPUs read a mask as a tensor like any other."""
    return context.target.device_type != "cpu"


def is_named_softmax(node: fx.Node) -> bool:
    """Whether the node is a softmax call; an exponential is one only together with its sum."""
    call = call_of(node)
    return call is not None and call.name in ("softmax", "safe_softmax", "softmin")


def _is_composite(node: fx.Node) -> bool:
    return is_multi_head(node) or is_encoder_layer(node)


def _plan_all(matcher: Matcher, contraction: Contraction) -> list[Plan]:
    plans = matcher.match(contraction, lambda site: plan(site, matcher.effects))
    sites = [made.site for made in plans]
    if len(sites) > 1 and any(site.log_sums for site in sites):
        raise Refusal("the scores of a sum of attentions are used elsewhere")
    check_region(sites, sites[0].out)
    check_gradients(plans)
    return plans


def _softmaxes_behind(contraction: Contraction, carriers: Carriers) -> set[fx.Node]:
    carrying = lambda nodes: [n for n in nodes if n in carriers.carrying]
    sources = lambda n: [] if n in carriers.softmaxes else carrying(n.all_input_nodes)
    return carriers.softmaxes.intersection(upstream(carrying((contraction.lhs, contraction.rhs)), sources))


def _callers(gm: fx.GraphModule, inner: fx.GraphModule) -> list[fx.Node] | None:
    """The nodes of ``gm`` that run an inner graph; none for ``gm`` itself, None where they are not known."""
    if inner is gm:
        return []
    names = [name for name, module in gm.named_modules() if module is inner]
    reads = lambda n: any(isinstance(a, fx.Node) and a.op == "get_attr" and a.target in names for a in n.args)
    return [node for node in gm.graph.nodes if node.op == "call_function" and reads(node)] or None


def _outer_nodes(inner: fx.GraphModule, callers: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For each placeholder of a checkpointed body that is called once, the node around it that is passed."""
    if len(callers) != 1 or getattr(callers[0].target, "__name__", "") not in _RUNS_AS_IT_IS:
        return {}
    inside = [n for n in inner.graph.nodes if n.op == "placeholder"]
    passed = callers[0].args[len(callers[0].args) - len(inside) :]
    return {p: a for p, a in zip(inside, passed, strict=True) if isinstance(a, fx.Node)}


_RUNS_AS_IT_IS = ("tag_activation_checkpoint", "wrap", "invoke_subgraph")
