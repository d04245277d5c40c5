"""ATen operators called by their own name (``torch.ops.aten.mul.Tensor``), in the terms of ``graph_ops.Call``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# ATen's name -> ours, where they differ
_NAMES = {
    "view": "reshape", "_unsafe_view": "reshape", "_to_copy": "to", "_softmax": "softmax",
    "_log_softmax": "log_softmax", "_safe_softmax": "safe_softmax",
    "scaled_dot_product_attention": "sdpa", "swapaxes": "transpose",
    "remainder": "mod", "floor_divide": "floordiv", "logical_and": "and", "bitwise_and": "and", "logical_or": "or",
    "bitwise_or": "or", "logical_not": "not", "bitwise_not": "not", "constant_pad_nd": "pad",
}  # fmt: skip
# results that are views, contractions or pointwise, with parameters that mean what ours of that name mean
_KNOWN = {
    "abs", "add", "addmm", "amax", "atan", "baddbmm", "bmm", "cat", "clamp", "clone", "contiguous", "cos", "detach",
    "div", "dropout", "eq", "erf", "exp", "expand", "flatten", "ge", "gt", "le", "linear", "log", "logsumexp", "lt",
    "masked_fill", "matmul", "maximum", "minimum", "mm", "mul", "ne", "neg", "permute", "pow", "relu", "repeat",
    "rsqrt", "sigmoid", "sin", "softmax", "log_softmax", "sqrt", "squeeze", "sub", "sum", "t", "tanh", "transpose",
    "tril", "triu", "unsqueeze", "where", "arange", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like",
    *_NAMES.values(),
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
    return (name, readings[0]) if readings and all(r == readings[0] for r in readings) else None


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
