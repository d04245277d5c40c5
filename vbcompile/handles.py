"""Tensors that are elsewhere: the accelerator's in name, shape and type, with their bytes in host memory or on disk.

An :class:`OffloadedTensor` can be used like any other. ``torch.compile`` sees a tensor of the accelerator and the
backend decides when its bytes arrive; an operator that meets one outside of compiled code fetches it, and one that
writes to it writes to the master copy.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vbcompile.compat import is_fake, refuse_while_lowering
from vbcompile.handles_memory import copy_payload
from vbcompile.handles_payload import Payload, payload_of

__all__ = ["OffloadedTensor", "is_offloaded"]

_aten = torch.ops.aten


class OffloadedTensor(Tensor):
    """A tensor of the accelerator whose bytes are elsewhere.

    Attributes:
        key: Number of the payload (int64 on the CPU, no dimensions): what compiled code takes as input.
    """

    key: Tensor
    _payload: Payload | None
    _views: "tuple[_View, ...]"  # what makes this tensor of the payload's

    @staticmethod
    def __new__(
        cls,
        key: Tensor,
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        payload: Payload | None = None,
        requires_grad: bool = False,
    ) -> "OffloadedTensor":
        return Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=dtype, device=device, requires_grad=requires_grad
        )

    def __init__(
        self,
        key: Tensor,
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        payload: Payload | None = None,
        requires_grad: bool = False,
    ) -> None:
        self.key = key
        self._payload = payload
        self._views = ()

    @classmethod
    def of(cls, payload: Payload, requires_grad: bool = False) -> "OffloadedTensor":
        """A tensor that stands for ``payload``."""
        with torch.inference_mode(False):
            key = torch.tensor(payload.number)
            return cls(key, payload.size, payload.stride, payload.dtype, payload.device, payload, requires_grad)

    @property
    def payload(self) -> Payload:
        """The master copy."""
        if self._payload is None:
            self._payload = payload_of(int(self.key))
        return self._payload

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        """New values go to the master; nothing else of this tensor can be exchanged."""
        if value.shape != self.shape or value.dtype != self.dtype:
            raise RuntimeError(
                f"an offloaded tensor of {self.dtype} {tuple(self.shape)} cannot become {value.dtype} "
                f"{tuple(value.shape)}: put a new nn.Parameter in its place, or call vbcompile.materialize(model) first"
            )
        with torch.no_grad():
            self.detach().copy_(value)

    def __repr__(self) -> str:  # type: ignore[override]
        place = self._payload.place if self._payload is not None else "?"
        return f"OffloadedTensor({tuple(self.shape)}, {self.dtype}, device='{self.device}', bytes on {place!r})"

    # what torch.compile asks for

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        if self._views:
            raise RuntimeError("a view of an offloaded tensor is no input of compiled code: pass view.clone()")
        return ["key"], (self.dtype, self.device)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], metadata: Any, outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> "OffloadedTensor":
        return OffloadedTensor(inner["key"], outer_size, outer_stride, *metadata)

    def _stable_hash_for_caching(self) -> str:
        return f"{tuple(self.shape)} {tuple(self.stride())} {self.dtype} {self.device}"

    # copies and files: always ordinary tensors, or payloads of their own

    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadedTensor":
        if id(self) in memo:
            return memo[id(self)]
        if self._views:
            return _fetched(self)
        twin: Any = OffloadedTensor.of(copy_payload(self.payload, memo=memo), self.requires_grad)
        if isinstance(self, nn.Parameter):
            twin = nn.Parameter(twin.detach(), self.requires_grad)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = _on_host(self)
        plain = nn.Parameter(plain, self.requires_grad) if isinstance(self, nn.Parameter) else plain
        return plain.__reduce_ex__(protocol)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        if special is not None:
            result = special(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable:
            return _written_through(func, args, kwargs)
        if _is_view(func) and args and isinstance(args[0], OffloadedTensor) and not is_fake(args[0].key):
            return _viewed(func, args, kwargs)
        leaves, spec = tree_flatten((tuple(args), kwargs))
        args, kwargs = tree_unflatten([_fetched(leaf) for leaf in leaves], spec)
        return func(*args, **kwargs)


def is_offloaded(value: Any) -> bool:
    """Whether ``value`` is a tensor whose bytes are not on the device."""
    return isinstance(value, OffloadedTensor)


# a graph that the offload pass leaves alone reads its weights by this operator
torch.library.define(
    "vblackwell::fetch",
    "(Tensor key, SymInt[] size, SymInt[] stride, ScalarType dtype, Device device) -> Tensor",
)


@torch.library.impl("vblackwell::fetch", "CompositeExplicitAutograd")
def _fetch(key: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    payload = payload_of(int(key))
    if (payload.size, payload.stride, payload.dtype) != (tuple(size), tuple(stride), dtype):
        raise RuntimeError(f"{payload.name} is {payload.dtype} {payload.size}, and {dtype} {tuple(size)} was asked for")
    return payload.fetch()


@torch.library.register_fake("vblackwell::fetch")
def _fake_fetch(
    key: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


class _View(NamedTuple):
    """One step from a payload's tensor to a view of it; ``which`` of the operator's results."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    which: int | None

    def of(self, base: Tensor) -> Tensor:
        found = self.func(base, *self.args, **self.kwargs)
        return found if self.which is None else found[self.which]


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operator's results share the memory of its first argument."""
    arguments, results = func._schema.arguments, func._schema.returns
    return bool(arguments and results) and arguments[0].alias_info is not None and results[0].alias_info is not None


def _viewed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A view of a tensor that is elsewhere is elsewhere too, so that writing to it writes to the master."""
    base: OffloadedTensor = args[0]
    shape = torch.empty_strided(base.size(), base.stride(), dtype=base.dtype, device="meta")
    results = func(shape, *args[1:], **kwargs)
    found = []
    for index, like in enumerate(results if isinstance(results, (list, tuple)) else [results]):
        view = OffloadedTensor(base.key, like.size(), like.stride(), like.dtype, base.device, base._payload)
        which = index if isinstance(results, (list, tuple)) else None
        view._views = (*base._views, _View(func, tuple(args[1:]), kwargs, which))
        found.append(view)
    return found if isinstance(results, (list, tuple)) else found[0]


def _apply(views: Sequence[_View], base: Tensor) -> Tensor:
    for view in views:
        base = view.of(base)
    return base


def _on_host(handle: OffloadedTensor) -> Tensor:
    return _apply(handle._views, handle.payload.on_host())


def _fetched(value: Any) -> Any:
    if not isinstance(value, OffloadedTensor):
        return value
    if value._views:
        return _apply(value._views, value.payload.fetch())
    return torch.ops.vblackwell.fetch(value.key, value.size(), value.stride(), value.dtype, value.device)


def _written_through(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator that writes to its arguments, and write what it wrote to the masters."""
    for handle in _written(func, args, kwargs):
        if not is_fake(handle.key):
            handle.payload.begin_write()  # first: what is on the device makes room for the copy that is written to
    leaves, spec = tree_flatten((tuple(args), kwargs))
    bases: dict[int, Tensor] = {}
    plain = []
    for leaf in leaves:
        if isinstance(leaf, OffloadedTensor) and is_fake(leaf.key):
            plain.append(
                _fetched(leaf)
            )  # a graph is being captured: the backend sees the write, and refuses or does it
        elif isinstance(leaf, OffloadedTensor):
            number = leaf.payload.number
            bases[number] = bases[number] if number in bases else leaf.payload.fetch()
            plain.append(_apply(leaf._views, bases[number]))
        else:
            plain.append(leaf)
    plain_args, plain_kwargs = tree_unflatten(plain, spec)
    result = func(*plain_args, **plain_kwargs)
    for handle in _written(func, args, kwargs):
        if is_fake(handle.key):
            refuse_while_lowering(f"{func} writes to an offloaded tensor, in a graph that is not streamed")
            continue
        handle.payload.write(bases[handle.payload.number])
    results, result_spec = tree_flatten(result)
    originals = {id(value): leaf for leaf, value in zip(leaves, plain, strict=True)}
    return tree_unflatten([originals.get(id(value), value) for value in results], result_spec)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[OffloadedTensor]:
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, OffloadedTensor)]
    return list({id(handle): handle for handle in found}.values())


def _detach(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    source: OffloadedTensor = args[0]
    twin = OffloadedTensor(source.key, source.size(), source.stride(), source.dtype, source.device, source._payload)
    twin._views = source._views
    return twin


def _copy(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    target, source = args[0], args[1]
    if not isinstance(target, OffloadedTensor) or target._views:
        return NotImplemented
    if tuple(source.shape) != tuple(target.shape):
        source = source.expand(target.shape)
    target.payload.write(_on_host(source) if isinstance(source, OffloadedTensor) else source)
    return target


def _to(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``.cpu()`` reads the master; another dtype on the same device stays elsewhere."""
    source: OffloadedTensor = args[0]
    if is_fake(source.key):
        return NotImplemented
    device = torch.device(kwargs.get("device") or source.device)
    if device.type == "cpu" and source.device.type != "cpu":
        host = _on_host(source)
        options = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format")}
        return host.to(copy=True, **options)
    if device == source.device and not source._views and kwargs.get("dtype") not in (None, source.dtype):
        return OffloadedTensor.of(copy_payload(source.payload, kwargs["dtype"]))
    return NotImplemented


_SPECIAL: dict[Any, Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.copy_.default: _copy,
    _aten._to_copy.default: _to,
}
