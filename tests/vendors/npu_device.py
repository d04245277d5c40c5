"""An ``npu`` device of two cards in Python alone: PyTorch's PrivateUse1 key under that name, over host memory.

Tensors are real (storage, strides, device index); they come out of DLPack capsules that own a block of host memory.
Every operator runs on a CPU view of the same bytes. One process can do this once and for good, so tests run it in a
process of its own.

What Python cannot give a device: autograd on the second card, ``torch.accelerator.memory_*``, streams that overlap,
generators, storages without tensors (``torch.load`` straight onto the device).
"""

import ctypes
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from fake_devices import FakeCards
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from vbcompile.device import GIB

NAME = "npu"
_CPU = torch._C.DispatchKey.CPU
_EXTENSION = 12  # DLPack's number for devices that it does not list
_ALIGNMENT = 64
_CODES = {  # DLPack's (code, bits, lanes)
    torch.bool: (6, 8, 1),
    torch.uint8: (1, 8, 1),
    torch.int8: (0, 8, 1),
    torch.int16: (0, 16, 1),
    torch.int32: (0, 32, 1),
    torch.int64: (0, 64, 1),
    torch.float16: (2, 16, 1),
    torch.bfloat16: (4, 16, 1),
    torch.float32: (2, 32, 1),
    torch.float64: (2, 64, 1),
    torch.float8_e4m3fn: (10, 8, 1),
}
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


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Npu:
    """The cards, their memory, and how operators run on them.

    Attributes:
        cards: what ``torch.npu`` tells of them.
        calls: how often each operator ran on the device.
    """

    def __init__(self, count: int = 2, arch: str = "") -> None:
        self.cards = FakeCards("huawei", count)
        self.arch = arch
        self.calls: dict[str, int] = {}
        self._libraries: list[torch.library.Library] = []

    # ------------------------------------------------------------------------------------------ memory
    def new(self, size: Any, strides: Any, dtype: torch.dtype, index: int) -> Tensor:
        """An uninitialised tensor on a card."""
        size, strides = [*map(int, size)], [*map(int, strides)]
        reach = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
        nbytes = reach * dtype.itemsize
        used = self.cards.allocated.get(index, 0)
        if used + nbytes > 64 * GIB:
            raise torch.OutOfMemoryError(f"npu:{index} has no {nbytes} bytes left")
        self.cards.allocated[index] = used + nbytes
        tensor = torch._C._from_dlpack(self._block(size, strides, dtype, index, nbytes))
        weakref.finalize(tensor.untyped_storage(), self._release, index, nbytes)
        return tensor

    def _block(self, size: list[int], strides: list[int], dtype: torch.dtype, index: int, nbytes: int) -> Any:
        """A capsule over one block of memory: description, sizes and strides, then the elements."""
        rank, header = len(size), ctypes.sizeof(_Managed)
        block = _libc.malloc(header + 16 * rank + nbytes + _ALIGNMENT)
        numbers = (ctypes.c_int64 * (2 * rank)).from_address(block + header)
        numbers[:] = size + strides
        managed = _Managed.from_address(block)
        managed.data = -(-(block + header + 16 * rank) // _ALIGNMENT) * _ALIGNMENT
        managed.device, managed.dtype = _Device(_EXTENSION, index), _Type(*_CODES[dtype])
        managed.ndim, managed.byte_offset, managed.context = rank, 0, None
        managed.shape, managed.strides = block + header, block + header + 8 * rank
        managed.deleter = _FREE  # the description is the head of the block
        return _capsule(block, b"dltensor", None)

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
            if is_npu(value):
                if value.dim():
                    places.add(value.device.index)
                return host(value)
            if isinstance(value, torch.device) and value.type == NAME:
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
            if is_npu(own) and own.shape != twin.shape:
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
    def install(self) -> None:
        """Give PyTorch the device ``npu``; once a process."""
        _setup_privateuseone_for_python_backend(NAME, backend_module=self._module())
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(self.run, "PrivateUse1")
        aten = torch.library.Library("aten", "IMPL")
        self._libraries += [everything, aten]
        for name, kernel in self._kernels().items():
            aten.impl(name, kernel, "PrivateUse1")
        for name in _SHAPE_OPERATORS:
            base, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, base), overload or "default")
            aten.impl(name, lambda *args, _op=operator, **kwargs: _op._op_dk(_CPU, *args, **kwargs), "PrivateUse1")

        self._install_autocast()

    def _install_autocast(self) -> None:
        everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        self._libraries += [everything, aten]
        everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

        def lowered(op: Any, *args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(NAME)
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                return op(*(a.to(dtype) if is_npu(a) and a.is_floating_point() else a for a in args), **kwargs)

        for name in _LOWERED:
            op = getattr(torch.ops.aten, name).default
            aten.impl(name, lambda *args, _op=op, **kwargs: lowered(_op, *args, **kwargs), "AutocastPrivateUse1")

    def _kernels(self) -> dict[str, Callable[..., Any]]:
        def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
            given = {} if memory_format is None else {"memory_format": memory_format}
            like = torch.empty(size, dtype=dtype, device="meta", **given)
            return self.new(like.size(), like.stride(), like.dtype, self.index(device))

        def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
            return self.new(size, stride, dtype or torch.get_default_dtype(), self.index(device))

        def copy(target, source, non_blocking=False):
            (host(target) if is_npu(target) else target).copy_(host(source) if is_npu(source) else source)
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
        """``torch.npu``."""
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
                first = next(t for t in args if is_npu(t))
                result = kernel(*tree_map(lambda t: host(t) if is_npu(t) else t, args),
                                **tree_map(lambda t: host(t) if is_npu(t) else t, kwargs))  # fmt: skip
                return tree_map(lambda t: self.put(t, first.device.index) if isinstance(t, Tensor) else t, result)

            return run

        return {name: on_device(kernel) for name, kernel in kernels.items()}


def _as_tensor(value: Any, argument: Any) -> Any:
    """PyTorch hands a number on as a number even where the operator wants a tensor."""
    wants_tensor = isinstance(argument.type, torch.TensorType)
    return torch.tensor(value) if wants_tensor and isinstance(value, (bool, int, float)) else value


def is_npu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def host(t: Tensor) -> Tensor:
    """A CPU tensor over the same bytes."""
    nbytes = t.untyped_storage().nbytes()
    if nbytes == 0 or t.numel() == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    raw = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(t.untyped_storage().data_ptr()), dtype=torch.uint8)
    view = torch.empty(0, dtype=t.dtype)
    return view.set_(raw.untyped_storage(), t.storage_offset(), t.size(), t.stride())
