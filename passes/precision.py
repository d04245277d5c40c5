"""Mixed precision: matrix products in bfloat16 with float32 accumulation, weights and results in their own precision.

The graph is wrapped in PyTorch's own autocast, so which operators run in which precision is what its documentation
says; results leave the graph in the dtype that they had. A graph that already mixes precisions is left alone.
"""

import logging
from collections.abc import Iterable

import torch
import torch.fx as fx

import vbcompile.kernels.attention  # noqa: F401  registers the operator
from vbcompile.passes.pass_context import PassContext
from vbcompile.report import Decision
from vbcompile.said_once import is_first

log = logging.getLogger(__name__)
_LOW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def use_mixed_precision(gm: fx.GraphModule, context: PassContext) -> list[Decision]:
    """Wrap the graph in bfloat16 autocast where the configuration asks for it and the model mixes nothing itself."""
    config, device_type = context.config, context.target.device_type
    if not config.wants_mixed_precision(device_type):
        return []
    runs_on = _device_of_inputs(gm, device_type) if context.elsewhere else device_type
    reason = _reason_to_leave(gm, runs_on)
    if reason:
        return [Decision("mixed_precision", "graph", "left", reason)]
    _wrap(gm, dict.fromkeys((device_type, runs_on)))
    if is_first(("mixed_precision", device_type)):
        log.warning(
            "mode %s: matrix products run in bfloat16 on %s; mixed_precision=False turns this off",
            config.mode,
            device_type,
        )
    return [Decision("mixed_precision", "graph", "rewritten", "matrix products in bfloat16, float32 accumulation")]


def _reason_to_leave(gm: fx.GraphModule, device_type: str) -> str:
    if torch.is_autocast_enabled(device_type):
        return "the caller already runs autocast"
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.target is torch.amp.autocast_mode._enter_autocast:
                return "the model already runs autocast"
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor) and value.dtype in _LOW:
                return f"the model already computes in {value.dtype} ({node.name})"
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                return f"the model asks for {value.dtype} ({node.name})"
    if not any(_is_float(node) for node in gm.graph.nodes if node.op == "placeholder"):
        return "no float32 input"
    return ""


def _device_of_inputs(gm: fx.GraphModule, otherwise: str) -> str:
    """Where a graph runs that is compiled for another device, whose autocast does nothing there."""
    floats = (node for node in gm.graph.nodes if node.op == "placeholder" and _is_float(node))
    return next((node.meta["example_value"].device.type for node in floats), otherwise)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _wrap(gm: fx.GraphModule, device_types: Iterable[str]) -> None:
    graph = gm.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        entered = [
            graph.call_function(
                torch.amp.autocast_mode._enter_autocast,
                (device_type, torch.bfloat16, True, torch.is_autocast_cache_enabled()),
            )
            for device_type in device_types
        ]
    _cast_attention(gm)
    output = graph.output_node()
    with graph.inserting_before(output):
        for mode in reversed(entered):
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
        output.args = fx.map_arg(output.args, lambda node: _in_own_dtype(graph, node))
    gm.recompile()


def _cast_attention(gm: fx.GraphModule) -> None:
    """Autocast does not know our operator: its matrix products take bfloat16 like any other."""
    operator = torch.ops.vblackwell.attention.default
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.target is operator:
                with node.graph.inserting_before(node):
                    cast = [_cast(node.graph, t, torch.bfloat16) for t in node.args[:3]]
                node.args = (*cast, *node.args[3:])


def _in_own_dtype(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return _cast(graph, node, torch.float32) if _is_float(node) and node.op != "placeholder" else node


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_method("to", (node, dtype))
    cast.meta = dict(node.meta)
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        cast.meta["example_value"] = value.to(dtype)
    return cast
