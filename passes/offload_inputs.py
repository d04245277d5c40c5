"""What the inputs of a segment look like: for compiling it, and for telling whether another one is the same."""

from typing import Any

import torch
from torch import Tensor, fx

from vbcompile.compat_symbols import free_symbols_of, symbol_of
from vbcompile.handles_payload import Payload
from vbcompile.passes.graph_ops import value_of
from vbcompile.passes.offload_segments import Segment


def plain_fake(payload: Payload, node: fx.Node, fake_mode: Any) -> Tensor:
    """A fake tensor of the device in place of an offloaded one."""
    with fake_mode, torch.inference_mode(False):
        fake = torch.empty_strided(payload.size, payload.stride, dtype=payload.dtype, device=payload.device)
        return fake.requires_grad_(bool(getattr(value_of(node), "requires_grad", False)))


def missing_sizes(graph: fx.Graph, segment: Segment) -> tuple[fx.Node, ...]:
    """Nodes that hold the symbols of the segment's inputs, as far as these are not inputs themselves."""
    needed: set[Any] = set()
    for node in segment.inputs:
        needed |= free_symbols_of(value_of(node))
    needed -= {symbol_of(value_of(node)) for node in segment.inputs}
    found: dict[Any, fx.Node] = {}
    own = set(segment.nodes)
    for node in graph.nodes:
        symbol = symbol_of(value_of(node)) if node not in own and needed else None
        if symbol in needed:
            found.setdefault(symbol, node)
    return tuple(found.values())


def describe(value: Any) -> Any:
    """Equal for two inputs that one compiled segment can take."""
    if isinstance(value, Tensor):
        sizes = tuple(map(str, value.shape)), tuple(map(str, value.stride())), str(value.storage_offset())
        return (*sizes, value.dtype, str(value.device), value.requires_grad, value.is_inference(), value.is_leaf)
    return str(value)
