"""Attention in training by a vendor's own autograd function, where the target has one (Gaudi's ``FusedSDPA``)."""

import torch
import torch.fx as fx

from vbcompile.device import Target
from vbcompile.kernels.attention_training import NAME, attend
from vbcompile.kernels.registry import operator
from vbcompile.passes.graph_ops import module_graphs


def has_training_kernel(target: Target) -> bool:
    """Whether anything but the operators themselves trains attention on a target."""
    training = operator("attention_training")
    training.load()
    return any(i.refuses(target, None) is None for i in training.implementations if i.name != NAME)


def reads_more(call: fx.Node) -> bool:
    """Whether a graph reads more of an attention call than its result."""
    return any(user.args[1] != 0 for user in call.users)


def use_training_kernels(gm: fx.GraphModule, target: Target) -> None:
    """Let the calls of attention choose when autograd records them (in place); those whose ``lse`` is read stay."""
    if not has_training_kernel(target):
        return
    for module in module_graphs(gm):
        calls = module.graph.find_nodes(op="call_function", target=torch.ops.vblackwell.attention.default)
        for call in calls:
            if not reads_more(call):
                call.target = attend
        if calls:
            module.recompile()
