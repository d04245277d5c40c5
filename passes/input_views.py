"""Inputs of attention are saved for the backward as they are, not as views.

PyTorch finds out that a saved input was written to between forward and backward; of a view of it that compiled code
made, it does not. The model's own products copy operands that are views, and do not save what is added to the scores,
so that such a write may have been harmless there. Here it has to be an error, not a wrong gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from vbcompile import compat
from vbcompile.passes.graph_ops import module_graphs


def partition_for(gm: fx.GraphModule, training: bool) -> Callable[..., Any] | None:
    """:func:`partition` for a torch-level graph that is trained and has fused attention, also one inside it."""
    target = torch.ops.vblackwell.attention.default
    has_attention = any(module.graph.find_nodes(op="call_function", target=target) for module in module_graphs(gm))
    return partition if training and has_attention else None


def save_inputs_whole(joint: fx.Graph) -> None:
    """Mark the views between inputs and the backward of attention, so that the inputs are saved."""
    kinds = compat.OperatorKinds()
    for backward in joint.find_nodes(op="call_function", target=torch.ops.vblackwell.attention_backward.default):
        for node in backward.all_input_nodes:
            way = []
            while node.op == "call_function" and kinds.is_view(node):
                way.append(node)
                node = node.all_input_nodes[0]
            if node.op == "placeholder":
                for view in way:
                    compat.mark_recomputed(view)


def partition(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """PyTorch's own partition, with inputs saved whole."""
    save_inputs_whole(joint.graph)
    return compat.partition(joint, inputs, **options)
