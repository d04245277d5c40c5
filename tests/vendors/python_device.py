"""A device in Python alone: every operator runs on a CPU view of the same bytes.

What makes a tensor of the device is the subclass's. One process can have such a device once and for good, so tests run
it in a process of its own. Not to be had in Python: streams that overlap, generators, storages without tensors
(``torch.load`` straight onto the device), ``torch.accelerator.memory_*``.
"""

import ctypes
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from fake_devices import KIND, FakeCards
from torch import Tensor
from torch.utils._pytree import tree_map

from vbcompile.device import GIB

_CPU = torch._C.DispatchKey.CPU
# they change shape, strides or storage and touch no element, so the CPU's kernels do for any device
_SHAPE_OPERATORS = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "set_.source_Storage",
)


# autocast computes them in the lower precision
_LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")


class PythonDevice:
    """The cards of one vendor, their memory, and how operators run on them.

    Args:
        vendor: as in ``fake_devices``.
        key: the dispatch key of its tensors.
        arch: a product name other than the vendor's usual one.

    Attributes:
        name: PyTorch's name of the device.
        cards: what the vendor's module tells of them.
        calls: how often each operator ran on the device.
    """

    def __init__(self, vendor: str, key: str, count: int = 2, arch: str = "") -> None:
        self.name, self.key = KIND[vendor], key
        self.cards = FakeCards(vendor, count)
        self.arch = arch
        self.calls: dict[str, int] = {}
        self.libraries: list[torch.library.Library] = []

    def is_own(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.name

    # ------------------------------------------------------------------------------------------ memory
    def make(self, size: list[int], strides: list[int], dtype: torch.dtype, index: int, nbytes: int) -> Tensor:
        """A tensor over ``nbytes`` uninitialised bytes of its own."""
        raise NotImplementedError

    def new(self, size: Any, strides: Any, dtype: torch.dtype, index: int) -> Tensor:
        """An uninitialised tensor on a card, counted."""
        size, strides = [*map(int, size)], [*map(int, strides)]
        reach = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
        nbytes = reach * dtype.itemsize
        used = self.cards.allocated.get(index, 0)
        if used + nbytes > 64 * GIB:
            raise torch.OutOfMemoryError(f"{self.name}:{index} has no {nbytes} bytes left")
        self.cards.allocated[index] = used + nbytes
        tensor = self.make(size, strides, dtype, index, nbytes)
        weakref.finalize(tensor.untyped_storage(), self._release, index, nbytes)
        return tensor

    def _release(self, index: int, nbytes: int) -> None:
        self.cards.allocated[index] -= nbytes

    def put(self, t: Tensor, index: int) -> Tensor:
        """A copy of a CPU tensor on a card."""
        copy = self.new(t.size(), t.stride(), t.dtype, index)
        host(copy).copy_(t)
        return copy

    def index(self, device: torch.device | None) -> int:
        return self.cards.current if device is None or device.index is None else device.index

    # --------------------------------------------------------------------------------------- operators
    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Any operator: on CPU views of its tensors, results back on the card."""
        name = op._schema.name.partition("::")[2]
        self.calls[name] = self.calls.get(name, 0) + 1
        places: set[int] = set()

        def to_host(value: Any) -> Any:
            if self.is_own(value):
                if value.dim():
                    places.add(value.device.index)
                return host(value)
            if isinstance(value, torch.device) and value.type == self.name:
                places.add(self.index(value))
                return torch.device("cpu")
            return value

        host_args, host_kwargs = tree_map(to_host, (args, kwargs))
        host_args = tuple(_as_tensor(v, a) for v, a in zip(host_args, op._schema.arguments, strict=False))
        if len(places) > 1:
            raise RuntimeError(f"{op}: tensors on several cards: {sorted(places)}")
        index = places.pop() if places else self.cards.current
        result = op(*host_args, **host_kwargs)
        written = self._written(op, (args, kwargs), (host_args, host_kwargs))
        return self._results(op, result, written, index)

    def _written(self, op: Any, given: Any, hosted: Any) -> dict[str, Any]:
        """Arguments that the operator wrote to, by alias name; those that it resized get their new contents."""
        found: dict[str, Any] = {}
        for position, argument in enumerate(op._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            own, twin = (
                args[position] if position < len(args) else kwargs.get(argument.name)
                for args, kwargs in (given, hosted)
            )
            found.update(dict.fromkeys(argument.alias_info.before_set, own))
            if self.is_own(own) and own.shape != twin.shape:
                self.resize(own, twin.shape)
                host(own).copy_(twin)
        return found

    def _results(self, op: Any, result: Any, written: dict[str, Any], index: int) -> Any:
        def one(value: Any, position: int) -> Any:
            if not isinstance(value, Tensor):
                return value
            returned = op._schema.returns[position] if position < len(op._schema.returns) else None
            if returned is not None and returned.alias_info is not None and returned.alias_info.is_write:
                return next(written[alias] for alias in returned.alias_info.before_set)
            return self.put(value, index)

        if not isinstance(result, (tuple, list)):
            return one(result, 0)
        several = len(op._schema.returns) > 1
        return type(result)(one(value, n if several else len(op._schema.returns)) for n, value in enumerate(result))

    def resize(self, t: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
        set_ = torch.ops.aten.set_.source_Storage_storage_offset
        size = [*size]
        strides = torch.empty(size, device="meta").stride()
        needed = (t.storage_offset() + torch.Size(size).numel()) * t.dtype.itemsize
        enough = t.untyped_storage().nbytes() >= needed
        storage = t.untyped_storage() if enough else self.new(size, strides, t.dtype, t.device.index).untyped_storage()
        return set_._op_dk(_CPU, t, storage, t.storage_offset() if enough else 0, size, strides)

    # ------------------------------------------------------------------------------------ registration
    def register(self, module: Any) -> None:
        """Make PyTorch know the device's name and module."""
        torch._register_device_module(self.name, module)

    def install(self) -> None:
        """Give PyTorch the device; once a process."""
        self.register(self._module())
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(self.run, self.key)
        aten = torch.library.Library("aten", "IMPL")
        self.libraries += [everything, aten]
        for name, kernel in self._kernels().items():
            aten.impl(name, kernel, self.key)
        for name in _SHAPE_OPERATORS:
            base, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, base), overload or "default")
            aten.impl(name, lambda *args, _op=operator, **kwargs: _op._op_dk(_CPU, *args, **kwargs), self.key)

        self.install_autocast()

    def install_autocast(self) -> None:
        """What a vendor's package registers: products in the lower precision, everything else as it is."""
        everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        self.libraries += [everything, aten]
        everything.fallback(torch.library.fallthrough_kernel, f"Autocast{self.key}")
        autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{self.key}"))

        def lowered(op: Any, *args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(self.name)
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                return op(*(a.to(dtype) if self.is_own(a) and a.is_floating_point() else a for a in args), **kwargs)

        for name in _LOWERED:
            op = getattr(torch.ops.aten, name).default
            aten.impl(name, lambda *args, _op=op, **kwargs: lowered(_op, *args, **kwargs), f"Autocast{self.key}")

    def _kernels(self) -> dict[str, Callable[..., Any]]:
        def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
            given = {} if memory_format is None else {"memory_format": memory_format}
            like = torch.empty(size, dtype=dtype, device="meta", **given)
            return self.new(like.size(), like.stride(), like.dtype, self.index(device))

        def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
            return self.new(size, stride, dtype or torch.get_default_dtype(), self.index(device))

        def copy(target, source, non_blocking=False):
            (host(target) if self.is_own(target) else target).copy_(host(source) if self.is_own(source) else source)
            return target

        return {
            "empty.memory_format": empty,
            "empty_strided": empty_strided,
            "copy_": copy,
            "_copy_from": lambda source, target, non_blocking=False: copy(target, source),
            "_copy_from_and_resize": lambda source, target: copy(target, source),
            "_local_scalar_dense": lambda t: host(t).item(),
            "resize_": self.resize,
        }

    def _module(self) -> SimpleNamespace:
        """The vendor's module, ``torch.npu`` for one."""
        functions = self.cards.functions()
        if self.arch:
            functions["get_device_name"] = lambda index: self.arch

        def set_device(device: Any) -> None:
            self.cards.current = device if isinstance(device, int) else self.index(torch.device(device))

        @contextmanager
        def device(wanted: Any):
            before = self.cards.current
            set_device(wanted)
            try:
                yield
            finally:
                self.cards.current = before

        return SimpleNamespace(
            **functions,
            set_device=set_device,
            device=device,
            _lazy_init=lambda: None,
            is_initialized=lambda: True,
            _is_in_bad_fork=lambda: False,
            manual_seed=lambda seed: None,
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda state, device=None: torch.set_rng_state(state),
            get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
            is_bf16_supported=lambda: True,
        )

    def kernels(self, kernels: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Kernels for CPU tensors, as kernels for this device."""

        def on_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                first = next(t for t in args if self.is_own(t))
                result = kernel(*tree_map(lambda t: host(t) if self.is_own(t) else t, args),
                                **tree_map(lambda t: host(t) if self.is_own(t) else t, kwargs))  # fmt: skip
                return tree_map(lambda t: self.put(t, first.device.index) if isinstance(t, Tensor) else t, result)

            return run

        return {name: on_device(kernel) for name, kernel in kernels.items()}


def _as_tensor(value: Any, argument: Any) -> Any:
    """PyTorch hands a number on as a number even where the operator wants a tensor."""
    wants_tensor = isinstance(argument.type, torch.TensorType)
    return torch.tensor(value) if wants_tensor and isinstance(value, (bool, int, float)) else value


def host(t: Tensor) -> Tensor:
    """A CPU tensor over the same bytes."""
    nbytes = t.untyped_storage().nbytes()
    if nbytes == 0 or t.numel() == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    raw = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(t.untyped_storage().data_ptr()), dtype=torch.uint8)
    view = torch.empty(0, dtype=t.dtype)
    return view.set_(raw.untyped_storage(), t.storage_offset(), t.size(), t.stride())


def attention_by_parts(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """For devices whose own attention goes from autograd straight to the hardware; unrewritten models need it."""
    by_parts = torch.ops.aten._scaled_dot_product_attention_math
    return by_parts(q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]
