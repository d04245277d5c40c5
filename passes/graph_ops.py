"""One name and one argument list per operator, whichever of its spellings a torch-level graph holds.

``torch.softmax(x, -1)``, ``x.softmax(dim=-1)`` and ``F.softmax(x, -1)`` are three different nodes; :func:`call_of`
gives the same :class:`Call` for all of them. Operators that the passes do not reason about have no :class:`Call`.
"""

import operator
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vbcompile.passes.graph_aten import aten_call, aten_write


@dataclass(frozen=True)
class Call:
    """A normalised operator call.

    Attributes:
        name: the operator, e.g. ``"matmul"``, ``"reshape"``, ``"getitem"``.
        arguments: by parameter name; parameters that were not given are absent. Tensor parameters are FX nodes.
        in_place: whether the call writes its result into its first argument.
    """

    name: str
    arguments: dict[str, Any]
    in_place: bool = False

    def get(self, parameter: str, default: Any = None) -> Any:
        return self.arguments.get(parameter, default)

    @property
    def input(self) -> Any:
        return self.arguments.get("input")


_UNARY = [
    "neg",
    "abs",
    "exp",
    "exp2",
    "log",
    "log1p",
    "log2",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tanh",
    "atan",
    "erf",
    "sigmoid",
    "square",
    "reciprocal",
    "bool",
    "int",
    "long",
    "float",
    "half",
    "bfloat16",
    "double",
    "detach",
    "contiguous",
    "clone",
    "positive",
    "cpu",
    "cuda",
]
_BINARY = [
    "mul",
    "floordiv",
    "mod",
    "pow",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "xor",
    "maximum",
    "minimum",
    "type_as",
    "view_as",
]

# functions of one tensor and numbers -> the names of the numbers
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("silu", "selu", "mish", "hardsigmoid", "hardswish", "relu6"), ("inplace",)),
    **dict.fromkeys(("elu", "celu"), ("alpha", "inplace")),
    **dict.fromkeys(("softshrink", "hardshrink"), ("lambd",)),
    **dict.fromkeys(("logsigmoid", "softsign", "tanhshrink", "expm1", "sinh", "cosh", "tan", "log10", "erfc"), ()),
    **dict.fromkeys(("sign", "isnan", "isinf"), ()),
    "leaky_relu": ("negative_slope", "inplace"), "hardtanh": ("min_val", "max_val", "inplace"),
    "softplus": ("beta", "threshold"), "threshold": ("threshold", "value", "inplace"), "gelu": ("approximate",),
    "nan_to_num": ("nan", "posinf", "neginf"),
}  # fmt: skip

# canonical name -> positional parameters
_PARAMETERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_UNARY, ("input",)),
    **dict.fromkeys(_BINARY, ("input", "other")),
    "add": ("input", "other"),
    "sub": ("input", "other"),
    "div": ("input", "other"),
    "not": ("input",),
    "where": ("condition", "input", "other"),
    "masked_fill": ("input", "mask", "value"),
    "clamp": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "clamp_max": ("input", "max"),
    "addcmul": ("input", "tensor1", "tensor2"),
    "relu": ("input", "inplace"),
    "prelu": ("input", "weight"),
    "rsub": ("input", "other"),
    "lerp": ("input", "end", "weight"),
    "hypot": ("input", "other"),
    "logaddexp": ("input", "other"),
    **{name: ("input", *parameters) for name, parameters in ACTIVATIONS.items()},
    "softmax": ("input", "dim", "dtype"),
    "log_softmax": ("input", "dim", "dtype"),
    "softmin": ("input", "dim", "_stacklevel", "dtype"),
    "safe_softmax": ("input", "dim", "dtype"),
    "logsumexp": ("input", "dim", "keepdim"),
    "sum": ("input", "dim", "keepdim"),
    "amax": ("input", "dim", "keepdim"),
    "mean": ("input", "dim", "keepdim"),
    "max": ("input", "dim", "keepdim"),
    "min": ("input", "dim", "keepdim"),
    "dropout": ("input", "p", "training", "inplace"),
    "matmul": ("input", "other"),
    "bmm": ("input", "other"),
    "mm": ("input", "other"),
    "inner": ("input", "other"),
    "tensordot": ("input", "other", "dims"),
    "linear": ("input", "weight", "bias"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addmm": ("input", "mat1", "mat2"),
    "reshape": ("input", "size"),
    "flatten": ("input", "start_dim", "end_dim"),
    "unflatten": ("input", "dim", "sizes"),
    "unsqueeze": ("input", "dim"),
    "squeeze": ("input", "dim"),
    "transpose": ("input", "dim0", "dim1"),
    "t": ("input",),
    "mT": ("input",),
    "T": ("input",),
    "permute": ("input", "dims"),
    "movedim": ("input", "source", "destination"),
    "expand": ("input", "size"),
    "expand_as": ("input", "other"),
    "repeat": ("input", "repeats"),
    "repeat_interleave": ("input", "repeats", "dim"),
    "getitem": ("input", "index"),
    "narrow": ("input", "dim", "start", "length"),
    "select": ("input", "dim", "index"),
    "cat": ("tensors", "dim"),
    "pad": ("input", "pad", "mode", "value"),
    "to": ("input", "other", "another"),
    "type": ("input", "other"),
    "tril": ("input", "diagonal"),
    "triu": ("input", "diagonal"),
    "diff": ("input", "n", "dim", "prepend", "append"),
    "cumsum": ("input", "dim"),
    "any": ("input", "dim", "keepdim"),
    "sdpa": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    "zeros": ("size",),
    "ones": ("size",),
    "empty": ("size",),
    "full": ("size", "fill_value"),
    "zeros_like": ("input",),
    "ones_like": ("input",),
    "full_like": ("input", "fill_value"),
    "new_zeros": ("input", "size"),
    "new_ones": ("input", "size"),
    "new_full": ("input", "size", "fill_value"),
    "arange": (),
    "tensor": ("data",),
    "new_tensor": ("input", "data"),
    "scalar_tensor": ("data",),
    "einsum": (),
}
_SIZE_LISTS = {"reshape": "size", "permute": "dims", "expand": "size", "repeat": "repeats", "new_zeros": "size"}
_SIZE_LISTS |= {"zeros": "size", "ones": "size", "new_ones": "size", "empty": "size"}
_ALIASES = {"self": "input", "axis": "dim", "mat2": "other", "axis0": "dim0", "axis1": "dim1", "shape": "size"}
_ALIASES |= {"train": "training", "exponent": "other", "a": "input", "b": "other"}


def _functions() -> dict[Any, str]:
    table: dict[Any, str] = {}
    spellings = {
        "div": "div divide true_divide", "sub": "sub subtract", "mul": "mul multiply", "neg": "neg negative",
        "abs": "abs absolute", "clamp": "clamp clip", "transpose": "transpose swapaxes swapdims", "mod": "remainder",
        "floordiv": "floor_divide", "and": "logical_and bitwise_and", "or": "logical_or bitwise_or",
        "xor": "logical_xor bitwise_xor", "not": "logical_not bitwise_not", "eq": "eq", "ne": "ne not_equal",
        "lt": "lt less", "le": "le less_equal", "gt": "gt greater", "ge": "ge greater_equal",
        "movedim": "movedim moveaxis", "cat": "cat concat concatenate", "permute": "permute",
        "safe_softmax": "_safe_softmax", "bool": "", "int": "", "long": "", "float": "", "half": "",
        "bfloat16": "", "double": "", "cpu": "", "cuda": "", "contiguous": "", "type": "", "to": "",
        "mT": "", "T": "", "linear": "", "sdpa": "", "view_as": "", "type_as": "", "expand_as": "", "new_zeros": "",
        "new_ones": "", "new_full": "", "repeat": "", "sign": "sign sgn", "expand": "broadcast_to",
        "flatten": "flatten ravel", "arange": "arange", "einsum": "einsum", "atan": "atan arctan",
    }  # fmt: skip
    for name in _PARAMETERS:
        for spelling in spellings.get(name, name).split():
            if hasattr(torch, spelling):
                table[getattr(torch, spelling)] = name
    for spelling, name in {
        "matmul": "matmul", "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floordiv",
        "mod": "mod", "pow": "pow", "neg": "neg", "abs": "abs", "and_": "and", "or_": "or", "xor": "xor",
        "invert": "not", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "getitem": "getitem",
    }.items():  # fmt: skip
        table[getattr(operator, spelling)] = name
    for function in (
        *("softmax", "softmin", "log_softmax", "dropout", "relu", "tanh", "sigmoid", "prelu"),
        *(name for name in ACTIVATIONS if hasattr(F, name)),
    ):
        table[getattr(F, function)] = function
    table |= {
        F.linear: "linear", F.scaled_dot_product_attention: "sdpa",
        torch.functional.einsum: "einsum",
        torch.special.expit: "sigmoid", torch.special.softmax: "softmax", torch.special.log_softmax: "log_softmax",
        torch.special.expm1: "expm1", operator.pos: "positive", torch.float_power: "pow",
        torch.special.logsumexp: "logsumexp", torch.special.exp2: "exp2", torch.special.log1p: "log1p",
        torch.special.erf: "erf", torch.special.erfc: "erfc", torch.linalg.matmul: "matmul",
        F.pad: "pad", torch._C._nn.pad: "pad",
    }  # fmt: skip
    return table


_IN_PLACE_OPERATORS = {
    operator.iadd: "add", operator.isub: "sub", operator.imul: "mul", operator.itruediv: "div", operator.iand: "and",
    operator.ior: "or", operator.ixor: "xor", operator.ipow: "pow",
    **{getattr(F, f"{name}_"): name for name in (*ACTIVATIONS, "relu") if hasattr(F, f"{name}_")},
}  # fmt: skip
_METHODS = {
    "view": "reshape", "swapaxes": "transpose", "swapdims": "transpose", "multiply": "mul", "divide": "div",
    "true_divide": "div", "subtract": "sub", "clip": "clamp", "__getitem__": "getitem", "__matmul__": "matmul",
    "reshape_as": "view_as", "floor_divide": "floordiv", "remainder": "mod", "logical_and": "and", "logical_or": "or",
    "logical_xor": "xor", "logical_not": "not", "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor",
    "bitwise_not": "not", "moveaxis": "movedim", "negative": "neg", "absolute": "abs", "concat": "cat",
    "not_equal": "ne", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "adjoint": "mT",
    "broadcast_to": "expand", "ravel": "flatten", "sgn": "sign", "float_power": "pow", "arctan": "atan",
}  # fmt: skip
# Dynamo of some releases records `a == b` as a.__eq__(b); reflected ones only where the order does not matter
_METHODS |= {f"__{name}__": name for name in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "neg", "abs")}
_METHODS |= {f"__{name}__": name for name in ("add", "sub", "mul", "floordiv", "mod", "pow")}
_METHODS |= {f"__r{name}__": name for name in ("add", "mul", "and", "or", "xor")}
_METHODS |= {"__invert__": "not", "__truediv__": "div"}
_FUNCTIONS: dict[Any, str] = _functions()
_METHOD_PARAMETERS = {"where": ("input", "condition", "other")}
# F.softmax and F.log_softmax have one more positional parameter than their torch namesakes
_SPECIAL_PARAMETERS: dict[Any, tuple[str, ...]] = {
    F.softmax: ("input", "dim", "_stacklevel", "dtype"),
    F.log_softmax: ("input", "dim", "_stacklevel", "dtype"),
}


def call_of(node: Any) -> Call | None:
    """The normalised call of a node; None for placeholders, attributes, outputs and operators not known here."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_function":
        return _function_call(node)
    if node.op != "call_method" or not isinstance(node.target, str):
        return None
    target = node.target
    in_place = target.endswith("_") and not target.endswith("__")
    target = target[:-1] if in_place else target
    name = _METHODS.get(target, target)
    return _bind(name, _METHOD_PARAMETERS.get(name, _PARAMETERS.get(name)), node, in_place)


def _function_call(node: fx.Node) -> Call | None:
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    if target in _IN_PLACE_OPERATORS:
        name = _IN_PLACE_OPERATORS[target]
        return _bind(name, _PARAMETERS[name], node, in_place=True)
    if target is getattr and node.args[1] in ("T", "mT", "H", "mH"):
        name = {"T": "T", "H": "T"}.get(str(node.args[1]), "mT")
        return Call(name, {"input": node.args[0]})
    if (getattr(target, "__module__", ""), getattr(target, "__name__", "")) == ("einops.einops", "einsum"):
        return _bind_einops_einsum(node)
    known = _FUNCTIONS.get(target) if _is_hashable(target) else None
    if known is None:
        found = aten_call(target, node.args, node.kwargs)
        if found is not None:
            return None if _is_bitcast(found[0], node) else Call(*found)
        found = aten_write(target, node.args, node.kwargs)
        return None if found is None else Call(*found, in_place=True)
    call = _bind(known, _SPECIAL_PARAMETERS.get(target, _PARAMETERS.get(known)), node, in_place=False)
    return call if call is None or call.get("inplace") is not True else Call(call.name, call.arguments, True)


def _is_hashable(target: Any) -> bool:
    return getattr(type(target), "__hash__", None) is not None


def _bind(name: str, parameters: tuple[str, ...] | None, node: fx.Node, in_place: bool) -> Call | None:
    if parameters is None or "out" in node.kwargs or _is_bitcast(name, node):
        return None
    if name == "einsum":
        return _bind_einsum(node)
    if name == "arange":
        return _bind_arange(node)
    arguments: dict[str, Any] = {_ALIASES.get(key, key): value for key, value in node.kwargs.items()}
    positional = list(node.args)
    size_list = _SIZE_LISTS.get(name)
    if size_list is not None and size_list in parameters and size_list not in arguments:
        first = parameters.index(size_list)
        rest = positional[first:]
        if rest and not isinstance(rest[0], (list, tuple)):
            positional[first:] = [tuple(rest)]
    if len(positional) > len(parameters):
        return None
    for parameter, value in zip(parameters, positional, strict=False):
        arguments[parameter] = value
    return Call(name, arguments, in_place)


def _is_bitcast(name: str, node: fx.Node) -> bool:
    """Whether the node is ``view(dtype)``, which reads the bits as other numbers."""
    return name == "reshape" and any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))


def _bind_einops_einsum(node: fx.Node) -> Call | None:
    """``einops.einsum(*operands, pattern)``, which some releases of PyTorch record as it is; axes have names there."""
    *operands, pattern = node.args
    if node.kwargs or not isinstance(pattern, str):
        return None
    names = re.findall(r"\w+", pattern)
    if len(set(names)) > len(string.ascii_letters) or not re.fullmatch(r"[\s\w.,]*->[\s\w.]*", pattern):
        return None
    letters = dict(zip(dict.fromkeys(names), string.ascii_letters, strict=False))
    equation = re.sub(r"\w+", lambda match: letters[match[0]], pattern)
    return Call("einsum", {"equation": equation, "operands": tuple(operands)})


def _bind_einsum(node: fx.Node) -> Call | None:
    if node.kwargs or len(node.args) < 2:
        return None
    if not isinstance(node.args[0], str):
        return _bind_numbered_einsum(node)
    operands = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    return Call("einsum", {"equation": node.args[0], "operands": tuple(operands)})


def _bind_numbered_einsum(node: fx.Node) -> Call | None:
    """``einsum(x, [0, 1], y, [1, 2], [0, 2])``: axes have numbers below 52, in the order of the letters."""
    axes = [[part] if part is Ellipsis else part for part in node.args[1::2]]
    operands = node.args[0 : 2 * (len(node.args) // 2) : 2]
    axes += [node.args[-1]] if len(node.args) % 2 else []
    spelt, letters = [], string.ascii_uppercase + string.ascii_lowercase
    for numbers in axes:
        if not isinstance(numbers, (list, tuple)) or not all(n is Ellipsis or type(n) is int for n in numbers):
            return None
        spelt.append("".join("..." if n is Ellipsis else letters[n] for n in numbers))
    if not all(isinstance(x, fx.Node) for x in operands):
        return None
    arrow = f"->{spelt.pop()}" if len(node.args) % 2 else ""
    return Call("einsum", {"equation": ",".join(spelt) + arrow, "operands": tuple(operands)})


def _bind_arange(node: fx.Node) -> Call | None:
    arguments = dict(node.kwargs)
    names = {1: ("end",), 2: ("start", "end"), 3: ("start", "end", "step")}.get(len(node.args), ())
    if len(names) != len(node.args):
        return None
    return Call("arange", {**arguments, **dict(zip(names, node.args, strict=True))})


# ------------------------------------------------------------------------------------------------- facts about nodes
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # floating types that models compute in


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as a tensor of ``dtype`` holds it."""
    return value if dtype == torch.float64 else float(torch.tensor(value, dtype=dtype).item())


def nesting_change(node: fx.Node) -> int:
    """+1 where a function transform begins, forward-mode differentiation included, -1 where it ends."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    begins = name.endswith("_increment_nesting") or name == "_enter_dual_level"
    return begins - (name.endswith("_decrement_nesting") or name == "_exit_dual_level")


def switches_grad_mode(node: fx.Node) -> bool:
    """Whether the gradient mode changes here."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in (
        "_set_grad_enabled",
        "_enter_inference_mode",
        "_exit_inference_mode",
    )


def value_of(node: Any) -> Any:
    """The node's fake value as Dynamo recorded it; the argument itself where it is no node; None where unknown."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    """Whether the argument is a node whose value is known to be a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("example_value"), Tensor)


def tensor_of(node: fx.Node) -> Tensor:
    """The node's fake tensor; raises TypeError for a node that holds none."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node} holds no tensor")
    return value


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of the node's tensor: int or SymInt."""
    return tuple(tensor_of(node).shape)


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, without adding a guard: False where it cannot be known."""
    if type(a) is int and type(b) is int:
        return a == b
    return known(a == b)


def known(condition: Any) -> bool:
    """Whether a possibly symbolic condition is known to hold, without adding a guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def positive_dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


_METADATA_METHODS = {"size", "dim", "stride", "numel", "element_size", "is_contiguous", "ndimension", "storage_offset"}
_METADATA_METHODS |= {"get_device", "is_floating_point"}
_METADATA_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout"}


def reads_metadata_only(node: fx.Node) -> bool:
    """Whether the node asks a tensor for its shape, dtype or device only."""
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA_ATTRIBUTES


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder is a module's parameter."""
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter) or "parameters_" in str(node.target)


def module_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph module and every graph module inside it (bodies of higher-order operators), each once."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield module


_MODEL = re.compile(r"^L\['\w+'\](\.__self__)?\.?")  # Dynamo's name of the outermost model
_SWITCH = f'File "{Path(__file__).parent.parent / "global_switch.py"}"'  # calls models of PyTorch's own layers


def describe_site(node: fx.Node) -> str:
    """Where a node comes from, in the user's terms: module path and source line where known, else the node's name."""
    stack = node.meta.get("nn_module_stack")
    path = ""
    if stack:
        path = _MODEL.sub("", str(list(stack.values())[-1][0]))
    line = _source_line(node.meta.get("stack_trace"))
    return " ".join(part for part in (path, f"({line})" if line else "") if part) or node.name


def _source_line(trace: str | None) -> str:
    if not trace:
        return ""
    lines = (line.strip() for line in trace.splitlines())
    files = [line for line in lines if line.startswith("File ") and not line.startswith(_SWITCH)]
    if not files:
        return ""
    parts = files[-1].split(", ")
    return parts[0].removeprefix("File ").strip('"').rsplit("/", 1)[-1] + ":" + parts[1].removeprefix("line ")
