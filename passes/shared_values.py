"""Tables that every layer reads, such as cosines and sines of rotary positions, are computed once for all layers.

Inductor computes an elementwise value anew in every kernel that reads it, which for two transcendental functions an
element costs more than reading them.
"""

import torch
from torch import fx

import vbcompile.kernels.computed_once  # noqa: F401  registers the operator
from vbcompile.compat_symbols import count_hint
from vbcompile.passes.graph_effects import Effects
from vbcompile.passes.graph_ops import call_of, describe_site, is_tensor, shape_of, tensor_of
from vbcompile.passes.pass_context import PassContext
from vbcompile.report import Decision

PASS_NAME = "shared_values"
_LEAST_READERS = 4
_LEAST_ELEMENTS = 2**14  # below, the copy's launch takes longer than what it spares
_DEAR = {"sin", "cos", "tanh", "exp", "exp2", "log", "log1p", "log2", "pow"}
_CHEAP = {  # what Inductor puts into the kernel of its reader, along with what it reads
    "add", "sub", "mul", "div", "neg", "to", "type", "type_as", "float", "half", "bfloat16", "reshape", "flatten",
    "unsqueeze", "squeeze", "transpose", "permute", "expand", "expand_as", "getitem", "contiguous", "detach", "cat",
}  # fmt: skip


def compute_once(gm: fx.GraphModule, context: PassContext) -> list[Decision]:
    """Put ``vblackwell::computed_once`` behind every value that is dear to compute and that many nodes read.

    Args:
        gm: torch-level graph, changed in place.
        context: what a pass may know.
    """
    if context.training or context.target.device_type == "cpu":
        return []
    effects, decisions = Effects(gm.graph), []
    dear: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        call = call_of(node)
        if call is None or not is_tensor(node):
            continue
        if call.name not in _DEAR and not (call.name in _CHEAP and not dear.isdisjoint(node.all_input_nodes)):
            continue
        dear.add(node)
        elements = count_hint(tensor_of(node))
        if len(node.users) < _LEAST_READERS or elements < _LEAST_ELEMENTS or effects.is_written_at_all(node):
            continue
        readers = list(node.users)
        with gm.graph.inserting_after(node):
            once = gm.graph.call_function(torch.ops.vblackwell.computed_once.default, (node,))
        once.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, once)
        dear.discard(node)
        reason = f"{list(map(str, shape_of(node)))} elements, read by {len(readers)} nodes, are computed once"
        decisions.append(Decision(PASS_NAME, describe_site(node), "rewritten", reason.replace("'", "")))
    if decisions:
        gm.recompile()
    return decisions
