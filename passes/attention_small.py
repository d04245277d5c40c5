"""Small calls of attention in inference run by PyTorch's own operator, which compiled graphs hold themselves.

What such a call takes on the device is less than what a call of a custom operator takes on the host
(``bench/host_time.py``), so the quicker call is the faster one, unless CUDA graphs leave the host out. Where no fused
operator of PyTorch's computes a call, as under a mask, and it is smaller still, the graph holds its meaning.
"""

import math
from typing import Any

import torch
from torch import fx

from vbcompile.compat import uses_cudagraphs
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.registry import Implementation, operator
from vbcompile.passes.attention_inlined import has_fixed_layout
from vbcompile.passes.implementation_choice import case_of
from vbcompile.passes.pass_context import PassContext

_OPERATIONS, _BYTES = 2e9, 8e6  # 2 to 4 microseconds of a card that the host cannot keep busy otherwise
_PLAIN_OPERATIONS = 1e7  # up to here the products in float32, keys repeated for each head, take 10 microseconds


def ask_for_quick_calls(graph: fx.Graph, context: PassContext) -> None:
    """Name PyTorch's operator in the small calls of a torch-level graph, in place; nothing where the user named one."""
    if context.training or context.elsewhere:
        return
    config = context.config
    if config.implementations or config.downstream != "inductor":
        return
    if uses_cudagraphs(config.inductor_mode, config.inductor_options):
        return
    for node in graph.find_nodes(op="call_function", target=torch.ops.vblackwell.attention.default):
        case = case_of(node)
        fixed = has_fixed_layout(n.meta["example_value"] for n in node.all_input_nodes)
        if case is not None and fixed and _is_small(case):
            quick = _quick(context.target, case)
            if quick is not None:
                node.kwargs = {**node.kwargs, "implementations": f"attention={quick.name}"}


def _is_small(case: AttentionCase) -> bool:
    return _operations(case) <= _OPERATIONS and (math.prod(case.k) + math.prod(case.v)) * case.dtype.itemsize <= _BYTES


def _operations(case: AttentionCase) -> int:
    lead = math.prod(max(sizes) for sizes in zip(case.q[:-2], case.k[:-2], case.v[:-2], strict=True))
    return 2 * lead * case.q_length * case.k_length * (case.q[-1] + case.v[-1])


def _quick(target: Any, case: AttentionCase) -> Implementation | None:
    """The cheapest one made of PyTorch's operators, where none of them would be chosen anyway."""
    attention = operator("attention")
    choice = attention.choose(target, case)
    if choice.asked or choice.implementation.inlines:
        return None
    found = attention.cheapest_inlined(target, case)
    if found is None:
        return None
    cost, quick = found  # infinite: the reference; other vendors' operators are called by their compilers
    is_worth = math.isfinite(cost) or (target.device_type == "cuda" and _operations(case) <= _PLAIN_OPERATIONS)
    return quick if is_worth else None
