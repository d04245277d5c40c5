"""Products with stacks of experts' weights, ``[E, N, K]`` or ``[E, K, N]``, as ``vblackwell::fp4_grouped_linear``.

Four forms, as models write mixtures of experts:

- ``grouped_mm(x, weight, offs)``, rows of x sorted by expert;
- ``bmm(x, weight)`` and ``matmul``, as many rows for every expert;
- ``linear(x, weight[e])`` and ``x @ weight[e]``, one expert at a time, ``e`` a number or a tensor;
- ``bmm(x, weight[ids])`` and ``bmm(weight[ids], x)``, an expert for every row of x.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vbcompile.passes.fp4_sites import is_transpose
from vbcompile.passes.fp4_weights import Packed
from vbcompile.passes.graph_emit import Emitter
from vbcompile.passes.graph_ops import Call, call_of, describe_site, known_equal, value_of

_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")


@dataclass(frozen=True)
class ExpertSite:
    """A product with a stack of experts.

    Attributes:
        node: the call.
        x: its other operand: ``[T, K]`` (grouped), ``[E, T, K]`` (batched), ``[..., K]`` (one expert), ``[T, 1, K]`` or
            ``[T, K, 1]`` (gathered).
        weight: placeholder of the stack.
        transposed: the stack is ``[E, K, N]``.
        form: ``grouped``, ``batched``, ``one`` or ``gathered``.
        which: ends of the groups (grouped), None (batched), the expert, a number or a node (one), or that of each row,
            a node ``[T]`` (gathered).
        bias: node or None; of ``linear`` alone.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    transposed: bool
    form: str
    which: Any
    bias: Any = None

    @property
    def name(self) -> str:
        return describe_site(self.node)


def expert_sites(graph: fx.Graph, weights: dict[fx.Node, tuple[int, Tensor]]) -> Iterator[ExpertSite]:
    """The products of the graph with stacks that are ``weights``, in order."""
    for node in graph.nodes:
        site = match_experts(node)
        if site is not None and site.weight in weights:
            yield site


def match_experts(node: fx.Node) -> ExpertSite | None:
    """The product with a stack of experts that ``node`` is, as its operands are now."""
    if node.op == "call_function" and _name(node.target) in _GROUPED:
        return _grouped(node)
    call = call_of(node)
    if call is None or call.in_place:
        return None
    if call.name == "linear":
        return _product(node, call, call.get("weight"), call.get("bias"), swapped=False)
    if call.name == "bmm" and (site := _gathered(node, call)) is not None:
        return site
    if call.name in ("matmul", "mm", "bmm"):
        return _product(node, call, call.get("other"), None, swapped=True)
    return None


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[-1])
    return str(getattr(target, "__name__", ""))


def _grouped(node: fx.Node) -> ExpertSite | None:
    extra = {k: v for k, v in node.kwargs.items() if k not in ("offs", "input", "weight")}
    if any(v is not None for v in extra.values()) or len(node.args) not in (2, 3):
        return None
    ends = node.args[2] if len(node.args) == 3 else node.kwargs.get("offs")
    x, (weight, flipped, index) = node.args[0], _stack(node.args[1])
    if not isinstance(x, fx.Node) or not isinstance(ends, fx.Node) or weight is None or index is not None:
        return None
    if getattr(value_of(x), "ndim", 0) != 2:
        return None
    return ExpertSite(node, x, weight, not flipped, "grouped", ends)


def _product(node: fx.Node, call: Call, factor: Any, bias: Any, swapped: bool) -> ExpertSite | None:
    x, (weight, flipped, index) = call.input, _stack(factor)
    if not isinstance(x, fx.Node) or weight is None or not isinstance(value_of(x), Tensor):
        return None
    transposed = flipped != swapped
    if index is not None:
        one = getattr(value_of(index), "ndim", 0) == 0
        return ExpertSite(node, x, weight, transposed, "one", index, bias) if one else None
    seen = value_of(x)
    if seen.ndim != 3 or not known_equal(seen.shape[0], value_of(weight).shape[0]) or call.name == "linear":
        return None
    return ExpertSite(node, x, weight, transposed, "batched", None)


def _gathered(node: fx.Node, call: Call) -> ExpertSite | None:
    """A product of ``[T, 1, K]`` with gathered matrices ``[T, K, N]``, or of ``[T, N, K]`` with ``[T, K, 1]``."""
    for factor, x, dim in ((call.get("other"), call.input, 1), (call.input, call.get("other"), 2)):
        weight, flipped, index = _stack(factor)
        if weight is None or getattr(value_of(index), "ndim", 0) != 1 or not isinstance(x, fx.Node):
            continue
        if known_equal(value_of(x).shape[dim], 1):
            return ExpertSite(node, x, weight, flipped != (dim == 1), "gathered", index)
    return None


def _stack(node: Any) -> tuple[fx.Node | None, bool, Any]:
    """The placeholder of a stack behind transposes and the choice of one expert; whether the number of transposes of
    the last two dimensions is odd; the expert."""
    flipped, index = False, None
    while isinstance(node, fx.Node) and node.op != "placeholder":
        call = call_of(node)
        rank = getattr(value_of(call.input), "ndim", 0) if call is not None else 0
        if call is None or call.in_place or rank not in (2, 3):
            return None, False, None
        if is_transpose(call):
            flipped = not flipped
        elif rank == 3 and index is None and (expert := _expert(call)) is not None:
            index = expert
        else:
            return None, False, None
        node = call.input
    if not isinstance(node, fx.Node) or getattr(value_of(node), "ndim", 0) != 3:
        return None, False, None
    return node, flipped, index


def _expert(call: Call) -> Any:
    """The expert that a call picks out of a stack: a number, a node that holds one or many, or None."""
    if call.name == "select" and call.get("dim") == 0:
        index = call.get("index")
    elif call.name == "getitem":
        index = call.get("index")
        if isinstance(index, tuple):
            index = index[0] if len(index) == 1 else None
    else:
        return None
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    value = value_of(index) if isinstance(index, fx.Node) else None
    numbers = isinstance(value, Tensor) and value.ndim <= 1 and value.dtype in (torch.int32, torch.int64)
    return index if numbers else None


def rewrite_experts(
    site: ExpertSite, packed: Packed, placeholders: tuple[fx.Node, ...], dtype: torch.dtype | None
) -> None:
    """Replace a site by the operator on packed tensors; x is cast to ``dtype`` first where that is given."""
    fresh = match_experts(site.node)  # its operands may have been rewritten
    assert fresh is not None
    emit, linear = Emitter(fresh.node, {fresh.node: 0}), packed.linear
    x = fresh.x if dtype is None else emit.method("to", fresh.x, dtype)
    k, experts = linear.k, linear.row_scale.shape[0]
    flat, order = x if fresh.form == "grouped" else emit.method("reshape", x, -1, k), None
    if fresh.form == "gathered":
        order = emit.function(torch.argsort, _from_zero(emit, fresh.which, experts))
        flat = emit.function(operator.getitem, flat, order)
    ends = _ends(emit, fresh, flat, experts)
    n = linear.row_scale.shape[1]
    out = emit.operator(
        torch.ops.vblackwell.fp4_grouped_linear.default,
        flat, *placeholders, ends, k, linear.format_name, linear.layout,
        value=lambda: value_of(flat).new_empty([value_of(flat).shape[0], n]),
    )  # fmt: skip
    if order is not None:
        out = emit.function(operator.getitem, out, emit.function(torch.argsort, order))
        on_the_right = known_equal(value_of(fresh.x).shape[2], 1)
        out = emit.method("unsqueeze", out, 2 if on_the_right else 1)
    if fresh.bias is not None:
        bias, wanted = fresh.bias, value_of(flat).dtype
        bias = bias if value_of(bias).dtype == wanted else emit.method("to", bias, wanted)  # as autocast does
        out = emit.function(operator.add, out, bias)
    if fresh.form == "batched":
        out = emit.method("reshape", out, experts, -1, n)
    elif fresh.form == "one" and value_of(x).ndim != 2:
        sizes = [emit.method("size", x, dim) for dim in range(value_of(x).ndim - 1)]
        out = emit.method("reshape", out, *sizes, n)
    fresh.node.replace_all_uses_with(out)
    fresh.node.graph.erase_node(fresh.node)


def _ends(emit: Emitter, site: ExpertSite, flat: fx.Node, experts: int) -> fx.Node:
    """Where each expert's rows of ``flat`` end, int32 ``[E]``."""
    if site.form == "grouped":
        if value_of(site.which).dtype == torch.int32:
            return site.which
        return emit.method("to", site.which, torch.int32)
    rows = emit.method("size", flat, 0)
    numbers = emit.function(torch.arange, experts, device=value_of(flat).device)
    if site.form == "gathered":  # how many rows are of an expert up to this one
        expert = emit.method("unsqueeze", _from_zero(emit, site.which, experts), 0)
        upto = emit.function(operator.le, expert, emit.method("unsqueeze", numbers, 1))
        return emit.method("sum", upto, 1, dtype=torch.int32)
    if site.form == "batched":
        each = emit.function(operator.floordiv, rows, experts)
        ends = emit.function(operator.mul, emit.function(operator.add, numbers, 1), each)
    else:  # all rows are one expert's: those before it end at 0
        index = site.which
        if isinstance(index, int):
            index = index % experts
        else:
            index = _from_zero(emit, index, experts)
        ends = emit.function(operator.mul, emit.function(operator.ge, numbers, index), rows)
    return emit.method("to", ends, torch.int32)


def _from_zero(emit: Emitter, index: fx.Node, experts: int) -> fx.Node:
    """Indices that may count from the end, as ones that count from the start."""
    return emit.function(torch.remainder, index, experts)
