"""Tells the partitioner what to save: everything else that the backward needs is made again there."""

import torch.fx as fx

from vbcompile import compat
from vbcompile.passes.activation_graph import JointGraph


def mark(joint: JointGraph, saved: dict[fx.Node, None]) -> None:
    """Mark the forward operators of a joint graph, so that exactly ``saved`` and inputs reach the backward.

    Operators whose results are not tensors, and those that the backward does not need, are left to the partitioner.
    """
    stack = [node for node in joint.needed if node not in saved]
    again = dict.fromkeys(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in joint.forward and source not in saved and source not in again:
                again[source] = None
                stack.append(source)
    for node in again:
        if joint.is_cheap(node) or joint.is_costly(node):
            compat.mark_recomputed(node)
    for node in saved:
        compat.mark_saved(node)
