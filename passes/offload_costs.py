"""What a stretch of a graph takes: its time with all weights on the device, and the memory beside weights."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from vbcompile.compat_symbols import bytes_hint, count_hint, size_hint
from vbcompile.handles import is_offloaded
from vbcompile.passes.graph_effects import storage_of_value
from vbcompile.passes.graph_ops import call_of, value_of
from vbcompile.vgpu_rates import Rates

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")


def bytes_of(value: Any) -> int:
    """Bytes of a tensor, symbolic sizes by their hints."""
    return bytes_hint(value) if isinstance(value, Tensor) else 0


def nanoseconds(nodes: Iterable[fx.Node], weights: Sequence[Tensor], rates: Rates) -> int:
    """Time of a compiled stretch: matrix work, or reading weights and operands, whichever takes longer."""
    flops, launches = 0, 1
    nbytes = sum(bytes_of(weight) for weight in weights)
    for node in nodes:
        work, operands = _work(node)
        if work:
            flops += work
            launches += 1
        nbytes += operands
    return rates.nanoseconds(nbytes, flops, launches)


def _work(node: fx.Node) -> tuple[int, int]:
    """Operations, and bytes of operands and result; an operator without matrix work is fused with another."""
    result = value_of(node)
    if not isinstance(result, Tensor) or node.op not in ("call_function", "call_method"):
        return 0, 0
    name = _name(node)
    sizes = [value_of(n) for n in node.all_input_nodes if isinstance(value_of(n), Tensor)]
    count = count_hint(result)
    operands = bytes_of(result) + sum(bytes_of(v) for v in sizes if v.dim() > 2)
    if name in _PRODUCTS and sizes:
        first = sizes[1] if name in ("addmm", "baddbmm") and len(sizes) > 1 else sizes[0]
        return 2 * count * size_hint(first.shape[-1]), operands
    if name == "fp4_linear":
        return 2 * count * size_hint(sizes[0].shape[-1]), operands
    if name in ("sdpa", "attention") and len(sizes) > 1 and sizes[0].dim() == 4:
        return 4 * count_hint(sizes[0]) * size_hint(sizes[1].shape[-2]), operands
    if "conv" in name and len(sizes) > 1:
        return 2 * count * count_hint(sizes[1]) // max(size_hint(sizes[1].shape[0]), 1), operands
    return 0, 0


def _name(node: fx.Node) -> str:
    call = call_of(node)
    if call is not None:
        return call.name
    target = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
    return str(target)


def reserve(graph: fx.Graph, weights: Iterable[fx.Node], training: bool = False) -> int:
    """Most bytes beside offloaded weights that are alive at once if every operator keeps its own result.

    Inputs of the graph stay alive throughout; in training everything does, and one weight's gradient is on its way.
    """
    weights = list(weights)
    gradient = max((bytes_of(value_of(node)) for node in weights), default=0) if training else 0
    skipped = {*weights, *(n for n in graph.find_nodes(op="placeholder") if is_offloaded(value_of(n)))}
    for node in graph.nodes:  # views of weights
        if node.op != "output" and node.all_input_nodes and skipped.issuperset(node.all_input_nodes):
            skipped.add(node)
    nodes = [node for node in graph.nodes if node not in skipped]
    last: dict[Any, int] = {}
    size: dict[Any, int] = {}
    born: dict[Any, int] = {}
    for place, node in enumerate(nodes):
        for value in _tensors(value_of(node)):
            key = _memory(value)
            born.setdefault(key, place)
            size[key] = max(size.get(key, 0), bytes_of(value))
            stays = training or node.op == "placeholder"
            last[key] = len(nodes) if stays else max(last.get(key, 0), place)
        for source in node.all_input_nodes:
            for value in _tensors(value_of(source)):
                key = _memory(value)
                if key in last:
                    last[key] = max(last[key], place)
    changes = [0] * (len(nodes) + 2)
    for key, place in born.items():
        changes[place] += size[key]
        changes[last[key] + 1] -= size[key]
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak + 2 * gradient


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [part for part in value if isinstance(part, Tensor)]
    return [value] if isinstance(value, Tensor) else []


def _memory(value: Tensor) -> Any:
    storage = storage_of_value(value)
    return id(value) if storage is None else storage
