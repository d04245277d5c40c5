"""ATen operators called by their own name (``torch.ops.aten.mul.Tensor``), in the terms of ``graph_ops.Call``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

# ATen's name -> ours, where they differ
_NAMES = {
    "view": "reshape", "_unsafe_view": "reshape", "_to_copy": "to", "_softmax": "softmax",
    "_log_softmax": "log_softmax", "_safe_softmax": "safe_softmax",
    "scaled_dot_product_attention": "sdpa", "swapaxes": "transpose",
    "remainder": "mod", "floor_divide": "floordiv", "logical_and": "and", "bitwise_and": "and", "logical_or": "or",
    "bitwise_or": "or", "logical_not": "not", "bitwise_not": "not", "constant_pad_nd": "pad", "__and__": "and",
    "__or__": "or", "slice": "getitem", "index": "getitem",
}  # fmt: skip
# results that are views, contractions or pointwise, with parameters that mean what ours of that name mean
_KNOWN = {
    "abs", "add", "addmm", "amax", "atan", "baddbmm", "bmm", "cat", "clamp", "clone", "contiguous", "cos", "cumsum",
    "detach", "diff", "div", "dropout", "eq", "erf", "exp", "expand", "flatten", "ge", "gt", "le", "linear", "log",
    "logsumexp", "lt", "masked_fill", "matmul", "maximum", "minimum", "mm", "mul", "ne", "neg", "new_ones",
    "permute", "pow", "relu", "repeat", "rsqrt", "select", "sigmoid", "sin", "softmax", "log_softmax", "sqrt",
    "squeeze", "sub", "sum", "t", "tanh", "transpose", "tril", "triu", "unsqueeze", "where", "arange", "full",
    "full_like", "ones", "ones_like", "zeros", "zeros_like", *_NAMES.values(),
}  # fmt: skip
_PARAMETERS = {"self": "input", "mat2": "other", "train": "training", "exponent": "other"}
_WITHOUT_MEANING = {"half_to_float", "implicit", "memory_format"}  # beside the dtypes and strides of the result


def aten_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call of an ATen operator; None for other targets and operators not known here."""
    overloads = _overloads(target)
    if not overloads or "out" in kwargs:
        return None
    own = overloads[0]._schema.name.removeprefix("aten::")
    name = _NAMES.get(own, own)
    if name not in _KNOWN:
        return None
    readings = [found for found in (_bind(o._schema, args, kwargs) for o in overloads) if found is not None]
    if not readings or any(r != readings[0] for r in readings):
        return None
    return name, _INDEXED[own](readings[0]) if own in _INDEXED else readings[0]


def _sliced(given: Mapping[str, Any]) -> dict[str, Any]:
    dim, end = given.get("dim", 0), given.get("end")
    end = None if type(end) is int and end >= torch.iinfo(torch.int64).max else end
    cut, whole = slice(given.get("start"), end, given.get("step", 1)), slice(None)
    index = (*[whole] * dim, cut) if dim >= 0 else (..., cut, *[whole] * (-dim - 1))
    return {"input": given["input"], "index": index}


def _indexed(given: Mapping[str, Any]) -> dict[str, Any]:
    index = tuple(slice(None) if x is None else x for x in given["indices"])
    return {"input": given["input"], "index": index}


_INDEXED = {"slice": _sliced, "index": _indexed}


def _overloads(target: Any) -> list[torch._ops.OpOverload]:
    """The operator itself, or all that a name without an overload (``torch.ops.aten.mul``) may stand for."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        found = [getattr(target, name) for name in target.overloads()]
    else:
        found = [target] if isinstance(target, torch._ops.OpOverload) else []
    return [o for o in found if o.namespace == "aten" and not o._schema.is_mutable and "Dimname" not in str(o._schema)]


def _bind(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    names = [a.name for a in schema.arguments]
    if len(args) > len(names) or not set(kwargs) <= set(names):
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {_PARAMETERS.get(k, k): v for k, v in given.items() if k not in _WITHOUT_MEANING}


def erase_proven_checks(graph: fx.Graph) -> None:
    """Erase assertions that ``torch.export`` puts behind every cast, where the recorded values prove them.

    They would keep the tensor that they look at from being replaced.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        given = _bind(node.target._schema, node.args, node.kwargs) or {}
        tensor = given.pop("a", None)
        value = tensor.meta.get("example_value") if isinstance(tensor, fx.Node) else None
        if isinstance(value, torch.Tensor) and all(_holds(value, name, x) for name, x in given.items()):
            graph.erase_node(node)


def _holds(value: torch.Tensor, name: str, expected: Any) -> bool:
    return expected is None or (name in ("dtype", "device", "layout") and getattr(value, name) == expected)
