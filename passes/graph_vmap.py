"""``torch.vmap`` in a torch-level graph: its regions, and the same computation with the mapped axes as dimensions."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from vbcompile.compat_transforms import no_transform_left
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.graph_autocast import under_autocast
from vbcompile.passes.graph_ops import nesting_change, value_of


def vmap_regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes of each outermost ``vmap``; nothing where other transforms (``grad``, ``jvp``) take part."""
    changes = [n for n in graph.nodes if nesting_change(n)]
    if not all(n.target.__name__.startswith("_vmap") for n in changes):  # type: ignore[union-attr]
        return
    depth, region = 0, []
    for node in graph.nodes if changes else ():
        depth += max(nesting_change(node), 0)
        if depth:
            region.append(node)
        if nesting_change(node) < 0:
            depth -= 1
            if depth == 0:
                yield region
                region = []


def batched(region: Sequence[fx.Node], low: torch.dtype | None) -> list[fx.Node]:
    """Replace a ``vmap`` by ATen operators on whole tensors, by PyTorch's own rules; the new nodes.

    Args:
        low: the dtype of an autocast around it.

    Raises:
        Refusal: it draws random numbers, writes to tensors, holds constants of its own, or switches a mode.
    """
    inside = set(region)
    inputs = list(dict.fromkeys(i for n in region for i in n.all_input_nodes if i not in inside))
    outputs = [n for n in region if any(u not in inside for u in n.users)]
    mode = next((v.fake_mode for v in map(value_of, inputs) if isinstance(v, FakeTensor)), None)
    random = [n for n in region if n.op == "call_function" and nesting_change(n) > 0 and "error" not in n.args]
    if any(not isinstance(value_of(n), (Tensor, SymInt, SymFloat)) for n in inputs) or _reads_attributes(region):
        raise Refusal("a vmap over something else than tensors and numbers")
    if mode is None or random or not all(isinstance(value_of(n), Tensor) for n in outputs):
        raise Refusal("a vmap with random numbers")
    if any(getattr(n.target, "__name__", "") in _MODES for n in region):
        raise Refusal("a mode that changes inside a vmap")
    device_type = next(v.device.type for v in map(value_of, inputs) if isinstance(v, Tensor))
    with ExitStack() as modes:
        modes.enter_context(mode)
        modes.enter_context(under_autocast(device_type, low))
        modes.enter_context(torch.set_grad_enabled(any(value_of(n).requires_grad for n in outputs)))
        modes.enter_context(sdpa_kernel(SDPBackend.MATH))  # an operator that the matcher reads
        traced = _trace(_extracted(region, inputs, outputs), inputs)
        return _insert(traced, region, inputs, outputs)


def _trace(function: fx.GraphModule, inputs: list[fx.Node]) -> fx.Graph:
    """The ATen operators of a function; raises Refusal where one of them writes to a tensor."""
    try:
        with no_transform_left():
            traced = make_fx(function)(*map(value_of, inputs)).graph
    except Exception as error:  # whatever an operator's rule raises
        raise Refusal(f"a vmap that cannot be traced: {error}") from error
    traced.eliminate_dead_code()
    for node in traced.nodes:
        if node.op == "get_attr":
            raise Refusal("a constant tensor inside a vmap")
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise Refusal("a write inside a vmap")
    return traced


def _reads_attributes(region: Sequence[fx.Node]) -> bool:
    return any(n.op not in ("call_function", "call_method") for n in region)


_MODES = {"_set_grad_enabled", "_enter_inference_mode", "_enter_autocast"}


def _extracted(region: Sequence[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[n] for n in outputs])
    return fx.GraphModule(torch.nn.Module(), graph)


def _insert(
    traced: fx.Graph, region: Sequence[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> list[fx.Node]:
    """Put the traced nodes before the region, then erase it."""
    graph, made = region[0].graph, []
    copies = dict(zip((n for n in traced.nodes if n.op == "placeholder"), inputs, strict=True))
    sizes = _known_sizes(region[0])
    kept = {k: v for k, v in outputs[0].meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
    for node in traced.nodes:
        if node.op != "call_function":
            continue
        value = node.meta["val"]
        if isinstance(value, SymInt) and str(value) in sizes:
            copies[node] = sizes[str(value)]
            continue
        with graph.inserting_before(region[0]):
            new = copies[node] = graph.node_copy(node, copies.__getitem__)
        new.meta = {**kept, "example_value": new.target(*_values(new.args), **_values(new.kwargs))}  # type: ignore
        made.append(new)
        if isinstance(value, SymInt):
            sizes[str(value)] = new
    (results,) = traced.output_node().args
    for old, result in zip(outputs, results, strict=True):  # type: ignore[arg-type]
        old.replace_all_uses_with(copies[result])
    for node in reversed(region):
        graph.erase_node(node)
    return made


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, value_of)


def _known_sizes(before: fx.Node) -> dict[str, fx.Node]:
    """Nodes that hold a size known at run time only, by its formula."""
    found: dict[str, fx.Node] = {}
    for node in before.graph.nodes:
        if node is before:
            break
        if isinstance(value_of(node), SymInt):
            found.setdefault(str(value_of(node)), node)
    return found
