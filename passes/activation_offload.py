"""Inserts the way out into the forward and the way back into the backward, for what the plan moves to the host.

The operators carry what correctness needs as arguments; where they stand decides only how long something waits. See
:mod:`vbcompile.runtime_activations`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from vbcompile import runtime_activations  # noqa: F401  (defines the operators)


@dataclass(frozen=True)
class Trip:
    """When a tensor is away, by names of nodes.

    Attributes:
        free_before: Forward node before which its memory is given back; None: the end of the forward.
        back_at: Backward node before which it begins to return; None: right before its first use.
    """

    free_before: str | None
    back_at: str | None


def insert_trips(
    forward: fx.GraphModule, backward: fx.GraphModule, outputs: int, trips: Mapping[str, Trip]
) -> list[str]:
    """Rewrite both graphs in place; what a graph turned out not to save stays as it is.

    Args:
        forward: Forward graph; its outputs from ``outputs`` on are what it saves.
        backward: Backward graph; its inputs bear the names of the saved nodes.
        trips: By name of the saved node.

    Returns:
        Names of the tensors that are moved, in the order of the forward's outputs.
    """
    end = forward.graph.output_node()
    values = list(end.args[0])  # type: ignore[arg-type]
    inputs = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    early = set(values[:outputs])
    moved = []
    for position, node in enumerate(values[outputs:], outputs):
        if not isinstance(node, fx.Node) or node.name not in trips or node in early or node.op != "call_function":
            continue
        if node.name not in inputs or not inputs[node.name].users:
            continue
        host = torch.ops.vblackwell.activation_offload.default(node.meta["val"])
        if str(host.stride()) != str(node.meta["val"].stride()):
            continue  # with holes, or of sizes that leave it open: it would come back in another form
        values[position] = _send(forward.graph, node, host, trips[node.name])
        _fetch(backward.graph, inputs[node.name], host, trips[node.name])
        moved.append(node.name)
    end.args = (tuple(values), *end.args[1:])
    for module in (forward, backward):
        module.graph.lint()
        module.recompile()
    return moved


def _send(graph: fx.Graph, node: fx.Node, value: torch.Tensor, trip: Trip) -> fx.Node:
    ops = torch.ops.vblackwell
    with graph.inserting_after(node):
        host = graph.call_function(ops.activation_offload.default, (node,))
    host.meta["val"] = value
    later = _find(graph, trip.free_before)
    order = {n: i for i, n in enumerate(graph.nodes)}
    if later is None or order[later] <= order[host]:
        later = graph.output_node()
    with graph.inserting_before(later):
        wait = graph.call_function(ops.activation_departed.default, (host, node))
    wait.meta["val"] = None
    return host


def _fetch(graph: fx.Graph, node: fx.Node, host: torch.Tensor, trip: Trip) -> None:
    ops = torch.ops.vblackwell
    value = node.meta["val"]
    order = {n: i for i, n in enumerate(graph.nodes)}
    first = min(node.users, key=order.__getitem__)
    users = list(node.users)
    begin = _find(graph, trip.back_at)
    if begin is None or order[begin] > order[first] or begin.op == "placeholder":
        begin = first
    with graph.inserting_before(begin):
        restored = graph.call_function(ops.activation_reload.default, (node, value.device))
    with graph.inserting_before(first):
        wait = graph.call_function(ops.activation_arrived.default, (restored, node))
    restored.meta["val"], wait.meta["val"] = value, None
    node.meta["val"] = host
    node.meta.pop("tensor_meta", None)
    for user in users:
        user.replace_input_with(node, restored)


def _find(graph: fx.Graph, name: str | None) -> fx.Node | None:
    return None if name is None else next((node for node in graph.nodes if node.name == name), None)
