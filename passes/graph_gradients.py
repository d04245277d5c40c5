"""Which tensors of a torch-level graph want a gradient, where the fake values that Dynamo recorded are wrong about it.

A fake view that is made under ``torch.no_grad`` claims the gradient of what it is a view of; a real one wants none.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vbcompile.passes.graph_ops import nesting_change, switches_grad_mode, value_of

_MAKES_LEAVES = {"requires_grad_", "Parameter"}


def correct_gradients(graph: fx.Graph, recording: bool) -> None:
    """Detach the fake values of tensors that want no gradient, in place.

    Args:
        recording: the gradient mode in which the graph begins.
    """
    before: list[bool] = []
    depth = 0
    for node in graph.nodes:
        depth += nesting_change(node)
        if depth > 0:
            continue  # values of a function transform are none outside of it
        if switches_grad_mode(node):
            recording = _next_mode(node, recording, before)
        elif node.op in ("call_function", "call_method") and _claims(node):
            inputs = node.all_input_nodes
            if not recording or (inputs and not any(map(_claims, inputs))):
                _detach(node)


def _next_mode(node: fx.Node, recording: bool, before: list[bool]) -> bool:
    name = getattr(node.target, "__name__", "")
    if name == "_exit_inference_mode":
        return before.pop() if before else recording
    if name == "_enter_inference_mode":
        before.append(recording)
        return recording and not node.args[0]
    return bool(node.args[0])


def recording_at(graph: fx.Graph) -> Iterator[tuple[fx.Node, bool]]:
    """The nodes of a graph that is compiled now, each with whether autograd records there."""
    recording, before = torch.is_grad_enabled(), list[bool]()
    for node in graph.nodes:
        yield node, recording
        if switches_grad_mode(node):
            recording = _next_mode(node, recording, before)


def records_at(place: fx.Node) -> bool:
    """Whether autograd records at a node of the graph that is compiled now."""
    return next((recording for node, recording in recording_at(place.graph) if node is place), torch.is_grad_enabled())


def wants_gradient(value: Any) -> bool:
    """Whether a tensor among these wants a gradient."""
    return any(isinstance(v, Tensor) and v.requires_grad for v in pytree.tree_leaves(value))


def _claims(node: fx.Node) -> bool:
    return wants_gradient(value_of(node))


def _detach(node: fx.Node) -> None:
    if str(getattr(node.target, "__name__", node.target)) in _MAKES_LEAVES:
        return
    detached: Any = pytree.tree_map_only(Tensor, lambda t: t.detach(), value_of(node))
    node.meta["example_value"] = detached
