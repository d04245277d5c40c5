"""Put the planned fused call into the graph, in place of what it replaces."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

import vbcompile.kernels.attention  # noqa: F401  registers the operator
from vbcompile.kernels.attention_results import empty_output
from vbcompile.kernels.score_function import accumulation_dtype
from vbcompile.kernels.score_gradient import learns_from
from vbcompile.passes.attention_aliases import may_be_written
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_order import reads_rows_first
from vbcompile.passes.attention_plan import Plan
from vbcompile.passes.attention_rows import EmptyRows, EmptyRowsOfGraph, emit_empty_rows
from vbcompile.passes.attention_site import Operand
from vbcompile.passes.graph_axes import Dim, Dims, product
from vbcompile.passes.graph_effects import Effects, cuts_gradient
from vbcompile.passes.graph_emit import Emitter
from vbcompile.passes.graph_ops import call_of, is_tensor, known_equal, reads_metadata_only, shape_of, tensor_of

_SEED_BOUND = 2**62


def rewrite(plans: Sequence[Plan], effects: Effects, empty_rows: EmptyRowsOfGraph) -> fx.Node:
    """Replace the site (a sum of fused calls, where there are several plans) and erase what nobody reads any more.

    ``empty_rows`` is what other sites of the graph have computed. Returns the node that now holds the site's result.
    Raises Refusal, with the graph as before, where a run-time size that is needed is in no node.
    """
    out = plans[0].site.out
    early = Emitter(plans[0].site.insert_before, effects.position)
    emitter = early if early.before is out else Emitter(out, effects.position)
    try:
        result, log_sums = _emit(early, emitter, plans, effects, empty_rows)
    except LookupError as error:
        emitter.undo()
        early.undo()
        raise Refusal(str(error)) from error
    if tensor_of(out).requires_grad and may_be_written(out):
        result = _copy(emitter, result)  # the operator's result is saved for its backward
        result.meta["example_value"] = tensor_of(out)
    for node, lse in log_sums:
        node.replace_all_uses_with(lse)
    out.replace_all_uses_with(result)
    region = set().union(*(plan.site.region for plan in plans)) | {out} | {node for node, _ in log_sums}
    _erase(out.graph, region, effects)
    return result


def _copy(emitter: Emitter, node: fx.Node) -> fx.Node:
    return emitter.operator(torch.ops.vblackwell.copy.default, node, value=lambda: torch.empty_like(tensor_of(node)))


def _emit(
    early: Emitter, emitter: Emitter, plans: Sequence[Plan], effects: Effects, empty_rows: EmptyRowsOfGraph
) -> tuple[fx.Node, list[tuple[fx.Node, fx.Node]]]:
    """The result and, for each ``logsumexp`` node that is replaced, its replacement.

    The calls go where ``early`` puts them, what happens to their results where ``emitter`` does.
    """
    out = plans[0].site.out
    result: fx.Node | None = None
    log_sums: list[tuple[fx.Node, fx.Node]] = []
    for plan in plans:
        term, sums = _emit_call(early, plan, effects, empty_rows)
        term = _finish(emitter, plan, term)
        log_sums += sums
        result = term if result is None else emitter.function(operator.add, result, term)
    assert result is not None
    if tensor_of(result).dtype != tensor_of(out).dtype:
        result = emitter.method("to", result, tensor_of(out).dtype)
    if not plans[0].function.rows_first or len(plans) > 1:
        result = emitter.with_strides(result, tensor_of(out))
    result.meta["example_value"] = tensor_of(out)
    return result, log_sums


def _emit_call(
    emitter: Emitter, plan: Plan, effects: Effects, empty_rows: EmptyRowsOfGraph
) -> tuple[fx.Node, list[tuple[fx.Node, fx.Node]]]:
    site, space = plan.site, plan.site.space
    lead = plan.lead or [()]
    features, values = space.resolve(site.features), space.resolve(site.values)
    out_dims = space.resolve_all(site.out_dims)
    rows_first = reads_rows_first(site.out, out_dims, plan.lead, plan.rows, values)
    plan.function = replace(plan.function, rows_first=rows_first)
    q = _operand(emitter, plan, plan.q, [*lead, plan.rows, features])
    k = _operand(emitter, plan, plan.k, [*lead, plan.keys, features])
    v = _gated_values(emitter, plan, [*lead, plan.keys, values])
    for more_q, more_k, axis in plan.terms:
        q = _joined(emitter, q, _operand(emitter, plan, more_q, [*lead, plan.rows, space.resolve(axis)]))
        k = _joined(emitter, k, _operand(emitter, plan, more_k, [*lead, plan.keys, space.resolve(axis)]))
    q = _over_every_lead(emitter, plan, q)
    captured = [_captured(emitter, plan, node, dims, empty_rows) for node, dims in plan.captured]
    captured = _without_flat(emitter, plan, captured)
    if tensor_of(site.out).requires_grad:
        pairs = zip(captured, plan.captured, strict=True)  # what is added to scores is saved here alone
        captured = [_copy(emitter, x) if _is_shared(node) else x for x, (node, _) in pairs]
        q, k, v, *captured = (_kept(emitter, x, effects, site.out) for x in (q, k, v, *captured))
    seed = None
    if site.dropout:
        device = tensor_of(q).device
        seed = emitter.function(torch.randint, 0, _SEED_BOUND, (1,), dtype=torch.int64, device=device)
    sizes = [product(dim) for dim in lead]
    call = emitter.operator(
        torch.ops.vblackwell.attention.default,
        q, k, v, captured, _scale(emitter, plan), site.dropout, seed, plan.function.dumps(),
        value=lambda: fake_result(tensor_of(q), sizes, product(values), plan.function.rows_first),
    )  # fmt: skip
    result = emitter.function(operator.getitem, call, 0)
    result = emitter.arrange(result, (*lead, plan.rows, values), list(out_dims))
    return result, _emit_log_sums(emitter, plan, call, (*lead, plan.rows))


def _finish(emitter: Emitter, plan: Plan, result: fx.Node) -> fx.Node:
    site, space = plan.site, plan.site.space
    out_dims = list(space.resolve_all(site.out_dims))
    for name, factor, dims in site.factors:
        result = _apply_factor(emitter, result, name, factor, space.resolve_all(dims), out_dims)
    return _add_residual(emitter, plan, result, out_dims)


def _add_residual(emitter: Emitter, plan: Plan, result: fx.Node, target: list[Dim]) -> fx.Node:
    site = plan.site
    if site.alpha != 1:
        result = emitter.function(operator.mul, result, site.alpha)
    if site.residual is None:
        return result
    node, dims, beta = site.residual
    node = emitter.arrange(node, site.space.resolve_all(dims), target)
    if beta != 1:
        node = emitter.function(operator.mul, node, beta)
    return emitter.function(operator.add, result, node)


def fake_result(q: Tensor, lead: list[Any], features: Any, rows_first: bool) -> tuple[Tensor, Tensor]:
    """What the operator's own fake gives for these sizes."""
    out = empty_output(lead, q.shape[-2], features, rows_first, q)
    return out, q.new_empty([*lead, q.shape[-2]], dtype=accumulation_dtype(q.dtype))


def _joined(emitter: Emitter, a: fx.Node, b: fx.Node) -> fx.Node:
    """Features of two tensors side by side; axes that only one of them has are broadcast."""
    parts = []
    for one, other in ((a, b), (b, a)):
        sizes = [(x, y) for x, y in zip(shape_of(one)[:-1], shape_of(other)[:-1], strict=True)]
        if any(known_equal(x, 1) and not known_equal(y, 1) for x, y in sizes):
            wanted = [emitter.size(y) if known_equal(x, 1) else -1 for x, y in sizes]
            one = emitter.method("expand", one, (*wanted, -1))
        parts.append(one)
    return emitter.function(torch.cat, parts, -1)


def _operand(emitter: Emitter, plan: Plan, operand: Operand, target: list[Dim]) -> fx.Node:
    node, dims = operand.node, operand.dims
    if tensor_of(node).dtype != plan.dtype:
        node = emitter.method("to", node, plan.dtype)
    return emitter.arrange(node, plan.site.space.resolve_all(dims), target)


def _gated_values(emitter: Emitter, plan: Plan, target: list[Dim]) -> fx.Node:
    """The values, times the factors of the weights that differ from key to key."""
    v = _operand(emitter, plan, plan.v, target)
    for gate in plan.site.gates:
        factor = emitter.arrange(gate.factor, plan.site.space.resolve_all(gate.dims), [*target[:-1], ()])
        if gate.guard:
            factor = emitter.function(operator.truediv, factor, emitter.function(operator.add, factor, gate.guard))
        v = emitter.function(_OPERATORS[gate.operator], v, factor)
    return v if tensor_of(v).dtype == plan.dtype else emitter.method("to", v, plan.dtype)


_OPERATORS = {"mul": operator.mul, "div": operator.truediv}


def _over_every_lead(emitter: Emitter, plan: Plan, q: fx.Node) -> fx.Node:
    """The queries, repeated along leading axes that no operand has: of repeated scores, weights or operands."""
    operands = [plan.q, plan.k, plan.v, *(x for pair in plan.terms for x in pair[:2])]
    dims = [operand.dims for operand in operands] + [dims for _, dims in plan.captured]
    held = {atom for each in dims for dim in plan.site.space.resolve_all(each) for atom in dim}
    sizes = [product(group) if held.isdisjoint(group) else 1 for group in plan.lead]
    if all(known_equal(size, 1) for size in sizes):
        return q
    return emitter.method("expand", q, (*(-1 if known_equal(n, 1) else emitter.size(n) for n in sizes), -1, -1))


def _captured(
    emitter: Emitter, plan: Plan, node: fx.Node | EmptyRows, dims: Dims, empty_rows: EmptyRowsOfGraph
) -> fx.Node:
    device, target = tensor_of(plan.q.node).device, [*(plan.lead or [()]), plan.rows, plan.keys]
    if isinstance(node, EmptyRows):
        return _find_empty_rows(emitter, plan, node, target, empty_rows)
    if not is_tensor(node):
        return emitter.function(torch.full, (1,) * len(target), node, dtype=torch.float32, device=device)
    if tensor_of(node).device != device:
        node = emitter.method("to", node, device)
    node, dims = emitter.spread(node, plan.site.space.resolve_all(dims), target)
    return emitter.arrange(node, dims, target)


def _kept(emitter: Emitter, node: fx.Node, effects: Effects, out: fx.Node) -> fx.Node:
    """A copy of what the graph writes to after the attention, which saves it; everything else as it is."""
    is_written = effects.is_written(node, effects.position[out], len(effects.position))
    return _copy(emitter, node) if is_written else node


def _is_shared(node: fx.Node | EmptyRows) -> bool:
    """Whether a tensor made in the graph may be written to; PyTorch finds out about inputs."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and may_be_written(node)


def _without_flat(emitter: Emitter, plan: Plan, captured: list[fx.Node]) -> list[fx.Node]:
    """The captured tensors, detached where the source gives none of them a gradient: they are only compared."""
    tensors = [(n, node) for n, (node, _) in enumerate(plan.captured) if isinstance(node, fx.Node) and is_tensor(node)]
    learned = {n for n, node in tensors if tensor_of(node).requires_grad}
    flat = learned - learns_from(plan.function) if learned else set()
    return [emitter.method("detach", node) if n in flat else node for n, node in enumerate(captured)]


def _find_empty_rows(
    emitter: Emitter, plan: Plan, wanted: EmptyRows, target: list[Dim], empty_rows: EmptyRowsOfGraph
) -> fx.Node:
    """The rows without a key, computed at the first of the sites that share a mask."""
    resolve = plan.site.space.resolve_all
    key = wanted.key([(node, resolve(dims)) for node, dims in wanted.captured], target)
    found = empty_rows.find(key, [node for node, _ in wanted.captured], emitter.before)
    if found is None:
        captured = [_captured(emitter, plan, node, dims, empty_rows) for node, dims in wanted.captured]
        sizes = [emitter.size(product(dim)) for dim in target]
        found = emit_empty_rows(emitter, wanted.mask, captured, sizes, tensor_of(plan.q.node))
        empty_rows.made[key] = found
    return found


def _scale(emitter: Emitter, plan: Plan) -> Any:
    logits = plan.site.logits
    scale = logits.scale * plan.factor
    if logits.features_of is not None:
        size = emitter.method("size", logits.features_of, -1)
        return emitter.function(operator.truediv, float(scale), emitter.function(torch.sym_sqrt, size))
    if logits.scalar is None:
        return float(scale)
    if logits.inverse:
        return emitter.function(operator.truediv, float(scale), logits.scalar)
    return logits.scalar if scale == 1 else emitter.function(operator.mul, logits.scalar, float(scale))


def _apply_factor(emitter: Emitter, result: fx.Node, name: str, factor: Any, dims: Dims, target: list[Dim]) -> fx.Node:
    if name == "neg":
        return emitter.function(operator.neg, result)
    if is_tensor(factor) and dims:
        factor = emitter.arrange(factor, dims, target)
    return emitter.function(_OPERATORS[name], result, factor)


def _emit_log_sums(emitter: Emitter, plan: Plan, call: fx.Node, dims: Dims) -> list[tuple[fx.Node, fx.Node]]:
    found = []
    for node, wanted in plan.site.log_sums:
        lse = emitter.function(operator.getitem, call, 1)
        lse = emitter.arrange(lse, dims, list(plan.site.space.resolve_all(wanted)))
        if tensor_of(lse).dtype != tensor_of(node).dtype:
            lse = emitter.method("to", lse, tensor_of(node).dtype)
        lse = emitter.with_strides(lse, tensor_of(node))
        only_the_result_learns = tensor_of(plan.site.out).requires_grad and not tensor_of(node).requires_grad
        if only_the_result_learns or cuts_gradient(node):
            lse = emitter.method("detach", lse)
        if only_the_result_learns:
            lse = _copy(emitter, lse)  # may be written to, and is saved for the backward
        lse.meta["example_value"] = tensor_of(node)
        found.append((node, lse))
    return found


# -------------------------------------------------------------------------------------------------------- erasing
def _erase(graph: fx.Graph, region: set[fx.Node], effects: Effects) -> None:
    """Erase nodes of the region without readers, then pure inputs that lost their last reader."""
    inputs: set[fx.Node] = set()
    pending = sorted(region, key=lambda n: effects.position.get(n, -1), reverse=True)
    for node in pending:
        _erase_dead_users(graph, node)
        if not node.users and not node._erased:
            inputs.update(node.all_input_nodes)
            graph.erase_node(node)
    todo = [n for n in inputs if n not in region]
    while todo:
        node = todo.pop()
        if node._erased or node.users or not _is_pure(node):
            continue
        todo.extend(node.all_input_nodes)
        graph.erase_node(node)


def _erase_dead_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        if _is_pure(user) or reads_metadata_only(user):
            _erase_dead_users(graph, user)
            if not user.users:
                graph.erase_node(user)


def _is_pure(node: fx.Node) -> bool:
    call = call_of(node)
    if call is None or call.in_place:
        return False
    return call.name != "dropout" or not call.get("training", True)
