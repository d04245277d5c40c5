"""Which implementation each rewritten site will run, and why: fills in the decisions of the attention pass, and hands
the option ``implementations`` to the operators' calls."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from vbcompile.compat_symbols import size_hint
from vbcompile.device import Target
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.attention_training import NAME as BY_OPERATORS
from vbcompile.kernels.attention_training import training_case
from vbcompile.kernels.registry import Choice, as_text, operator
from vbcompile.passes.attention_training import has_training_kernel, reads_more
from vbcompile.passes.graph_ops import module_graphs
from vbcompile.report import Decision


def _operators() -> tuple[Any, ...]:
    """Those whose calls carry the option."""
    ours = torch.ops.vblackwell
    rounding = ours.fp4_fake_quantize.default
    return ours.attention.default, ours.fp4_linear.default, ours.fp4_grouped_linear.default, rounding


def name_implementations(graph: fx.Graph, implementations: Mapping[str, str]) -> None:
    """Have the operators of a graph follow the option, in place."""
    if not implementations:
        return
    text, operators = as_text(implementations), _operators()
    for node in graph.nodes:
        if node.op == "call_function" and node.target in operators:
            node.kwargs = {**node.kwargs, "implementations": text}


def explain_choices(gm: fx.GraphModule, target: Target, training: bool, decisions: list[Decision]) -> list[Decision]:
    """The decisions with ``implementation`` set where they put calls of the attention operator into the graph.

    Decisions and calls are in the order of the graph; a decision that has a score function belongs to one call.
    """
    calls = [
        n
        for module in module_graphs(gm)
        for n in module.graph.nodes
        if n.target is torch.ops.vblackwell.attention.default
    ]
    remaining = iter(calls)
    explained = []
    for decision in decisions:
        call = next(remaining, None) if decision.details.get("score_function") else None
        explained.append(replace(decision, implementation=_explain(call, target, training)) if call else decision)
    return explained


def _explain(node: fx.Node, target: Target, training: bool) -> str:
    case = case_of(node)
    if case is None:
        return "chosen at the first call"
    together = _in_training(node, target) if training else None
    if together is not None and together.implementation.name != BY_OPERATORS:
        return together.explain()
    choice = operator("attention").choose(target, case)
    text = choice.explain()
    asked = node.kwargs.get("implementations")
    if asked and not choice.asked:  # not by the user: attention_small's
        name = operator("attention").choose(target, case, str(asked)).implementation.name
        return f"{name}, since the call is small and the graph holds this one itself (otherwise {text})"
    if not training:
        return text
    if together is not None:
        text = f"{text}; together with its backward: {together.explain()}"
    needs = (True, True, True, *(dtype.is_floating_point for _, dtype in case.captured))
    backward = operator("attention_backward").choose(target, replace(case, needs=needs))
    return f"{text}; backward: {backward.explain()}"


def _in_training(node: fx.Node, target: Target) -> Choice | None:
    """What trains a call where the target has something that does both directions."""
    if not has_training_kernel(target) or reads_more(node):
        return None
    arguments: tuple[Any, ...] = node.args
    q, k, v, captured, _, dropout_p, _, function = arguments
    q, k, v, *captured = (t.meta["example_value"] for t in (q, k, v, *captured))
    dropout = isinstance(dropout_p, fx.Node) or dropout_p > 0
    return operator("attention_training").choose(target, training_case(q, k, v, captured, dropout, function))


def case_of(node: fx.Node) -> AttentionCase | None:
    """The case with size hints for symbolic sizes; None where a tensor's metadata is missing."""
    arguments: tuple[Any, ...] = node.args
    q, k, v, captured, _, dropout_p, _, function = arguments
    values = [t.meta.get("example_value") for t in (q, k, v, *captured)]
    if not all(isinstance(t, torch.Tensor) for t in values):
        return None
    shapes = [tuple(map(size_hint, t.shape)) for t in values]
    return AttentionCase(
        dtype=values[0].dtype,
        q=shapes[0],
        k=shapes[1],
        v=shapes[2],
        captured=tuple((shape, t.dtype) for shape, t in zip(shapes[3:], values[3:], strict=True)),
        dropout=isinstance(dropout_p, fx.Node) or dropout_p > 0,
        function=function,
        contiguous_rows=all(size_hint(t.stride(-1)) == 1 for t in values[:3]),
    )
