"""Record an ordinary function as the graph that Dynamo would hand to a backend, in a few milliseconds.

Dynamo costs a tenth of a second a function, too much for thousands of random programs. Straight-line code needs no
bytecode analysis: every torch function, method and operator is recorded as it is called, with a fake tensor as
``meta["example_value"]``, in Dynamo's own vocabulary: ``call_function`` of torch functions and of ``operator``,
``call_method`` of tensor methods, ``getattr`` for ``.mT``. Sizes are constants, as in Dynamo's static graphs.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map

_PROPERTIES = {"T", "mT", "H", "mH", "real", "imag"}
_FACTS = {"size", "dim", "numel", "is_contiguous", "is_floating_point"}


class Traced:
    """A value of the recorded program: a node and its example value."""

    def __init__(self, recorder: "_Recorder", node: fx.Node, value: Tensor) -> None:
        self._recorder, self._node, self._value = recorder, node, value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{resolve_name(func)} was called outside of a recording")

    def __getattr__(self, name: str) -> Any:
        if name in _PROPERTIES:
            return self._recorder.call("call_function", getattr, (self, name), {})
        with torch._C.DisableTorchFunction():
            attribute = getattr(self._value, name)
        if not callable(attribute):
            return attribute
        if name in _FACTS:
            return lambda *args: self._recorder.fact(attribute, args)
        return lambda *args, **kwargs: self._recorder.call("call_method", name, (self, *args), kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._recorder.call("call_function", operator.setitem, (self, index, value), {})


def _binary(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: Traced, *others: Any) -> Any:
        args = (*others, self) if reflected else (self, *others)
        return self._recorder.call("call_function", function, args, {})

    return method


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow", "mod", "floordiv", "and_", "or_", "xor"):
    _function = getattr(operator, _name)
    _short = _name.rstrip("_")
    setattr(Traced, f"__{_short}__", _binary(_function))
    setattr(Traced, f"__r{_short}__", _binary(_function, reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "getitem", "iadd", "isub", "imul", "itruediv"):
    setattr(Traced, f"__{_name}__", _binary(getattr(operator, _name)))


class _Fakes:
    """Fake twins of real tensors: computing with small real tensors costs a fifth of computing with fake ones."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._alive: list[Tensor] = []  # or another tensor would get the same storage's address

    def of(self, real: Tensor) -> FakeTensor:
        """A fake tensor with the same metadata; twins of tensors that share storage share theirs."""
        self._alive.append(real)
        storage = real.untyped_storage()
        twin = self._storages.setdefault(storage._cdata, torch.UntypedStorage(storage.nbytes(), device="meta"))
        meta = torch.empty(0, dtype=real.dtype, device="meta")
        meta.set_(twin, real.storage_offset(), real.shape, real.stride())
        return FakeTensor(self._mode, meta.requires_grad_(real.requires_grad), real.device)


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.graph, self._fakes = fx.Graph(), _Fakes()

    def placeholder(self, name: str, real: Tensor) -> Traced:
        node = self.graph.placeholder(name)
        return self._wrap(node, real.detach().clone().requires_grad_(real.requires_grad))

    def call(self, kind: str, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        node = self.graph.create_node(kind, target, *tree_map(_to_node, (tuple(args), kwargs)))
        args, kwargs = tree_map(_to_value, (tuple(args), kwargs))
        with torch._C.DisableTorchFunction():
            result = getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)
        return self._wrap(node, result)

    @staticmethod
    def fact(method: Any, args: Any) -> Any:
        """Metadata of an example value, which is a constant of the graph."""
        with torch._C.DisableTorchFunction():
            return method(*args)

    def _wrap(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            with torch._C.DisableTorchFunction():
                node.meta["example_value"] = self._fakes.of(value)
            return Traced(self, node, value)
        if not isinstance(value, tuple | list):
            node.meta["example_value"] = value
            return value
        parts = [
            self._wrap(self.graph.call_function(operator.getitem, (node, i)), part) for i, part in enumerate(value)
        ]
        node.meta["example_value"] = tuple(part._node.meta["example_value"] for part in parts)
        return tuple(parts)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call("call_function", func, args, kwargs or {})


def _to_node(x: Any) -> Any:
    return x._node if isinstance(x, Traced) else x


def _to_value(x: Any) -> Any:
    return x._value if isinstance(x, Traced) else x


def record(
    function: Callable[..., Any], inputs: Sequence[Tensor], fake: FakeTensorMode | None = None
) -> fx.GraphModule:
    """The graph of ``function(*inputs)``; its outputs are a flat tuple, as Dynamo's are.

    Args:
        inputs: real tensors.
    """
    recorder = _Recorder()
    values = [recorder.placeholder(f"l_x{i}_", x) for i, x in enumerate(inputs)]
    with recorder:
        result = function(*values)
    results = result if isinstance(result, tuple) else (result,)
    recorder.graph.output(tuple(_to_node(x) for x in results))
    return fx.GraphModule({}, recorder.graph)
