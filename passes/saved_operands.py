"""What attention saves for the backward is saved so that a write in between is found out, or changes nothing.

PyTorch finds out that a saved input was written to between forward and backward, and a saved tensor that is itself a
result of the graph; of a view that compiled code made of either, it does not. The model's own products copy operands
that are views, and do not save what is added to the scores, so that such a write may have been harmless there. Here it
has to be an error, or to change a tensor that nothing reads, not a wrong gradient.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

import vbcompile.kernels.attention  # noqa: F401  registers the operator
from vbcompile import compat
from vbcompile.passes.graph_ops import module_graphs


def partition_for(gm: fx.GraphModule, training: bool) -> Callable[..., Any] | None:
    """:func:`partition` for a torch-level graph that is trained and has fused attention, also one inside it."""
    has_attention = any(module.graph.find_nodes(op="call_function", target=_FORWARD) for module in module_graphs(gm))
    return partition if training and has_attention else None


def guard_saved(joint: fx.Graph, outputs: int) -> None:
    """Change a joint graph in place, so that operands of attention are saved as inputs, as results, or as copies.

    Args:
        joint: forward and backward, from AOTAutograd.
        outputs: how many of its outputs belong to the forward.
    """
    views = _Views(joint, outputs)
    backwards = joint.find_nodes(op="call_function", target=_BACKWARD)
    for node in dict.fromkeys(node for backward in backwards for node in backward.all_input_nodes):
        base, *way = views.way_to(node)
        results = views.results_in_the_memory_of(base, way)
        if base.op == "placeholder" or results == [base]:
            for view in way:
                compat.mark_recomputed(view)
        elif results:
            _copy(joint, node)


def partition(
    joint: fx.GraphModule, inputs: Sequence[Any], *, num_fwd_outputs: int, **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """PyTorch's own partition, with operands of attention guarded."""
    guard_saved(joint.graph, num_fwd_outputs)
    return compat.partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)


_FORWARD = torch.ops.vblackwell.attention.default
_BACKWARD = torch.ops.vblackwell.attention_backward.default


class _Views:
    """Which nodes of a joint graph share memory."""

    def __init__(self, joint: fx.Graph, outputs: int) -> None:
        self._kinds = compat.OperatorKinds()
        (values,) = joint.output_node().args
        self._results = {v for v in values[:outputs] if isinstance(v, fx.Node)}  # type: ignore[index, union-attr]

    def way_to(self, node: fx.Node) -> list[fx.Node]:
        """The node that owns the memory, and the views from there to ``node``."""
        way = [node]
        while self._is_view(way[0]):
            way.insert(0, way[0].all_input_nodes[0])
        return way

    def results_in_the_memory_of(self, base: fx.Node, way: Sequence[fx.Node]) -> list[fx.Node]:
        """The forward's results that are ``base`` or views of it, without parts beside the one that ``way`` takes."""
        found, todo = [], [base]
        while todo:
            node = todo.pop()
            found += [node] if node in self._results else []
            views = [user for user in node.users if self._is_view(user) and user.all_input_nodes[0] is node]
            own = [view for view in views if _is_part(view) and view in way]
            todo += own + [view for view in views if not (own and _is_part(view))]
        return found

    def _is_view(self, node: fx.Node) -> bool:
        return node.op == "call_function" and self._kinds.is_view(node)


def _is_part(node: fx.Node) -> bool:
    """Whether the node is one of several results."""
    return node.target is operator.getitem


def _copy(joint: fx.Graph, node: fx.Node) -> None:
    """Let attention, forward and backward, read a copy of ``node``."""
    with joint.inserting_after(node):
        made = joint.call_function(torch.ops.vblackwell.copy.default, (node,))
    made.meta = {**node.meta, "val": torch.empty_like(node.meta["val"])}
    compat.mark_saved(made)
    for user in list(node.users):
        if user.target in (_FORWARD, _BACKWARD):
            user.replace_input_with(node, made)
