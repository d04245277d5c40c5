"""The attention pass: whatever way a model writes attention, it becomes one ``vblackwell::attention`` call.

A site is found at its second matrix product, whose operand comes from a softmax; walking back from there gives the
softmax, what happens to the scores, and the first matrix product (``attention_site``). Roles are bound by axis, the
pointwise part becomes a score function (``attention_lift``, ``attention_masks``), the call is planned
(``attention_plan``) and only then put into the graph (``attention_rewrite``). What cannot be proved is left alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch._dynamo.utils import counters

from vbcompile.passes.attention_contraction import Contraction, contraction_of
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_plan import Plan, plan
from vbcompile.passes.attention_rewrite import rewrite
from vbcompile.passes.attention_site import Matcher, Unplaced, check_region
from vbcompile.passes.attention_weights import Carriers
from vbcompile.passes.graph_axes import AxisError
from vbcompile.passes.graph_effects import Effects, make_functional
from vbcompile.passes.graph_ops import Call, call_of, describe_site, module_graphs, tensor_of, value_of
from vbcompile.report import Decision

PASS_NAME = "attention"


def fuse_attention(gm: fx.GraphModule, context: Any) -> list[Decision]:
    """Rewrite every provable attention site of ``gm`` (a torch-level graph, changed in place).

    Args:
        gm: the graph as Dynamo hands it over, with fake values in ``node.meta["example_value"]``; graphs of
            higher-order operators inside it (activation checkpointing) are rewritten too.
        context: what a pass may know (``pipeline.PassContext``).

    Returns:
        A decision for every softmax that might have been attention.
    """
    import vbcompile.kernels.attention  # noqa: F401  registers the operator

    decisions: list[Decision] = []
    for module in list(module_graphs(gm)):
        found = _GraphPass(module, _outer_nodes(gm, module)).run()
        decisions += found
        if any(d.action == "rewritten" for d in found):
            module.graph.lint()
            module.recompile()
    return decisions


class _GraphPass:
    """The pass over one graph."""

    def __init__(self, module: fx.GraphModule, outer: Mapping[fx.Node, fx.Node]) -> None:
        self.module = module
        self.graph = module.graph
        self.outer = outer
        self.decisions: list[Decision] = []
        self.settled: set[fx.Node] = set()

    def run(self) -> list[Decision]:
        calls = self._calls()
        if not any(_may_begin(call) for call in calls.values()):
            return []
        if make_functional(self.graph):
            self.module.recompile()
            calls = self._calls()
        carriers = Carriers()
        carriers.sweep(self.graph, calls)
        if not carriers.softmaxes:
            return []
        matcher = Matcher(Effects(self.graph), carriers, self.outer)
        for node, call in calls.items():
            if not any(i in carriers.carrying for i in node.all_input_nodes) or node._erased:
                continue
            contraction = contraction_of(call, node)
            if contraction is not None:
                self._try(matcher, contraction)
        self._report_rest(carriers, calls)
        return self.decisions

    def _calls(self) -> dict[fx.Node, Call]:
        return {node: call for node in self.graph.nodes if (call := call_of(node)) is not None}

    def _try(self, matcher: Matcher, contraction: Contraction) -> None:
        """Rewrite the site that ends at this product, whichever side its weights are on."""
        carrying = matcher.carriers.carrying
        sides = [c for c in (contraction, contraction.swapped()) if c.lhs in carrying]
        reason = ""
        softmaxes = _softmaxes_behind(contraction, matcher.carriers)
        site = describe_site(contraction.node)
        for side in sides:
            try:
                plans = _plan_all(matcher, side)
            except (Refusal, AxisError, Unplaced) as error:
                reason = reason or str(error)
                continue
            details = _details(plans)
            rewrite(plans, matcher.effects)
            self.settled |= softmaxes
            counters["vblackwell"]["fuse_attention"] += 1
            self.decisions.append(Decision(PASS_NAME, site, "rewritten", describe_plans(plans), details=details))
            return
        named = [s for s in softmaxes if (c := call_of(s)) is not None and c.name != "exp"]
        if named:
            self.settled |= softmaxes
            self.decisions.append(Decision(PASS_NAME, site, "left", reason))

    def _report_rest(self, carriers: Carriers, calls: Mapping[fx.Node, Call]) -> None:
        for node in calls:
            if node in carriers.softmaxes and node not in self.settled and not node._erased and calls[node].name != "exp":
                reason = "no matrix product sums values with these weights"
                self.decisions.append(Decision(PASS_NAME, describe_site(node), "left", reason))


def _may_begin(call: Call) -> bool:
    return call.name in ("softmax", "safe_softmax", "exp")


def _plan_all(matcher: Matcher, contraction: Contraction) -> list[Plan]:
    sites = matcher.match(contraction)
    check_region(sites, sites[0].out)
    return [plan(site, matcher.effects) for site in sites]


def _softmaxes_behind(contraction: Contraction, carriers: Carriers) -> set[fx.Node]:
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    todo = [n for n in (contraction.lhs, contraction.rhs) if n in carriers.carrying]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in carriers.softmaxes:
            found.add(node)
        else:
            todo += [i for i in node.all_input_nodes if i in carriers.carrying]
    return found


def _outer_nodes(gm: fx.GraphModule, inner: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """For each placeholder of a checkpointed body that is called once, the node around it that is passed."""
    if inner is gm:
        return {}
    names = [name for name, module in gm.named_modules() if module is inner]
    callers = [
        node
        for node in gm.graph.nodes
        if node.op == "call_function"
        and getattr(node.target, "__name__", "") in ("tag_activation_checkpoint", "wrap", "invoke_subgraph")
        and any(isinstance(a, fx.Node) and a.op == "get_attr" and a.target in names for a in node.args)
    ]
    if len(callers) != 1:
        return {}
    inside = [n for n in inner.graph.nodes if n.op == "placeholder"]
    passed = callers[0].args[len(callers[0].args) - len(inside) :]
    return {p: a for p, a in zip(inside, passed, strict=True) if isinstance(a, fx.Node)}


# ------------------------------------------------------------------------------------------------------- reporting
def describe_plans(plans: list[Plan]) -> str:
    """What a site became, for the report."""
    parts = [_describe(p) for p in plans]
    return parts[0] if len(parts) == 1 else f"sum of {len(parts)}: " + "; ".join(parts)


def _describe(made: Plan) -> str:
    function = made.function
    words = ["attention"]
    if function.mask is not None:
        words.append(_mask_word(made))
    if function.program[function.score] != ("score",):
        words.append("score function")
    heads = _shared_heads(made)
    if heads:
        words.append(heads)
    if function.sink is not None:
        words.append("sink")
    if made.site.dropout:
        words.append("dropout")
    words.append("no mask tensor" if not made.captured else f"{len(made.captured)} captured tensors")
    return ", ".join(words)


def _mask_word(made: Plan) -> str:
    from vbcompile.kernels.score_function import causal_offset

    function = made.function
    q, k = (_int_size(dim) for dim in (made.rows, made.keys))
    if q is not None and k is not None and causal_offset(function, q, k) is not None:
        return "causal"
    structured = function.depends_on(function.mask, "k_index")
    return "structured mask" if structured else "mask"


def _int_size(dim: Any) -> int | None:
    from vbcompile.passes.graph_axes import product

    size = product(dim)
    return size if type(size) is int else None


def _shared_heads(made: Plan) -> str:
    q = {a for dim in made.site.space.resolve_all(made.q.dims) for a in dim}
    k = {a for dim in made.site.space.resolve_all(made.k.dims) for a in dim}
    shared = [a for dim in made.lead for a in dim if a in q and a not in k]
    size = _int_size(tuple(shared)) if shared else None
    return f"{size} query heads per key head" if size else ""


def _details(plans: list[Plan]) -> dict[str, Any]:
    made = plans[0]
    return {
        "q": [str(s) for s in tensor_of(made.q.node).shape],
        "k": [str(s) for s in tensor_of(made.k.node).shape],
        "v": [str(s) for s in tensor_of(made.v.node).shape],
        "dtype": str(made.dtype).removeprefix("torch."),
        "score_function": [p.function.dumps() for p in plans],
        "captured": [[str(s) for s in tensor_of(n).shape] if hasattr(value_of(n), "shape") else [] for n, _ in made.captured],
        "calls": len(plans),
    }
