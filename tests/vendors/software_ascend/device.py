"""Compute kernels for the real torch-npu over the software runtime: every operator runs on CPU views of its tensors."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from vendors.python_device import PythonDevice, attention_by_parts, host

# allocation, shapes and reads of one element are the vendor's own
_KEPT = (
    *("empty", "new_empty", "resize_", "set_", "is_set_to", "record_stream", "npu_", "_has_compatible"),
    *("as_strided", "view", "_reshape_alias", "_unsafe_view", "unfold", "alias", "detach"),
    *("pin_memory", "is_pinned", "_pin", "_local_scalar_dense"),
)
# 2.13.0's shape function of this one fails on every call: it asks for empty_like of a list
_NO_SHAPES = {"npu_fusion_attention_grad_v2"}


class SoftNpu(PythonDevice):
    """torch-npu's device with our kernels.

    Attributes:
        checked: vendor operators whose calls went through the vendor's own shape functions, with the number of calls.
    """

    def __init__(self) -> None:
        super().__init__("huawei", "PrivateUse1", torch.npu.device_count())
        self.checked: dict[str, int] = {}

    def new(self, size: Any, strides: Any, dtype: torch.dtype, index: int) -> Tensor:
        return torch.empty_strided(size, strides, dtype=dtype, device=f"npu:{index}")

    def index(self, device: torch.device | None) -> int:
        return torch.npu.current_device() if device is None or device.index is None else device.index

    def resize(self, t: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
        return t.resize_(size)

    def install(self) -> None:
        """Override the vendor's kernels; its Python layer, allocator, streams and autograd stay."""
        aten = torch.library.Library("aten", "IMPL")
        self.libraries.append(aten)
        own = {
            "copy_": self._copy,
            "_copy_from": lambda s, t, non_blocking=False: self._copy(t, s),
            "_to_copy": _to_copy,
        }
        for full in torch._C._dispatch_get_all_op_names():
            if not full.startswith("aten::") or not torch._C._dispatch_has_kernel_for_dispatch_key(full, "PrivateUse1"):
                continue
            name = full.removeprefix("aten::")
            base, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
            if op is None or base.startswith(_KEPT) or _is_view(op):
                continue
            aten.impl(name, own.get(name, partial(self.run, op)), "PrivateUse1", allow_override=True)
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            aten.impl("scaled_dot_product_attention", attention_by_parts, key, allow_override=True)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        (host(target) if _is_npu(target) else target).copy_(host(source) if _is_npu(source) else source)
        return target

    def override(self, kernels: Mapping[str, Callable[..., Any]]) -> list[str]:
        """Give the vendor's operators kernels that compute; returns the list that their calls are noted in."""
        calls: list[str] = []
        library = torch.library.Library("npu", "IMPL")
        self.libraries.append(library)
        for name, kernel in self.kernels(dict(kernels)).items():
            library.impl(name, partial(self._call, name, kernel, calls), "PrivateUse1", allow_override=True)
        return calls

    def _call(self, name: str, kernel: Callable[..., Any], calls: list[str], *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        result = kernel(*args, **kwargs)
        if name not in _NO_SHAPES:
            self._check_shapes(name, result, args, kwargs)
        return result

    def _check_shapes(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        """The vendor's shape function accepts the call and promises what came out."""
        meta_args, meta_kwargs = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs))
        promised = getattr(torch.ops.npu, name)(*meta_args, **meta_kwargs)
        ours, theirs = ([t for t in _flat(r) if isinstance(t, Tensor)] for r in (result, promised))
        for mine, other in zip(ours, theirs, strict=False):
            if other.numel() and mine.numel() and (mine.shape, mine.dtype) != (other.shape, other.dtype):
                raise RuntimeError(f"{name}: {mine.dtype} {tuple(mine.shape)}, torch-npu promises {other}")
        self.checked[name] = self.checked.get(name, 0) + 1


def _is_npu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "npu"


def _flat(value: Any) -> list[Any]:
    return [v for item in value for v in _flat(item)] if isinstance(value, (tuple, list)) else [value]


def _is_view(op: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def _to_copy(x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    place = x.device if device is None else torch.device(device)
    source = host(x) if _is_npu(x) else x
    copy = torch.ops.aten._to_copy.default(source, dtype=dtype, memory_format=memory_format)
    if place.type != "npu":
        return copy
    target = torch.empty_strided(copy.size(), copy.stride(), dtype=copy.dtype, device=place)
    host(target).copy_(copy)
    return target
