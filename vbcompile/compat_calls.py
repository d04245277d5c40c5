"""Private parts of PyTorch that make a call cheaper for the host; tested as those of ``compat`` are."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def empty_on_device(device: torch.device) -> Callable[..., torch.Tensor]:
    """``torch.empty_strided(size, strides, dtype)`` on a device, the current one, in half the time where possible."""
    return _EMPTY.get(device.type) or (
        lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device=device)
    )


_EMPTY: dict[str, Callable[..., torch.Tensor]] = {
    kind: empty
    for kind in ("cpu", "cuda")
    if (empty := getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}", None)) is not None
}


def seen_as(t: torch.Tensor, size: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    """A view of ``t`` that begins ``offset`` elements behind it."""
    return _REINTERPRET(t, size, strides, offset)


_REINTERPRET: Callable[..., torch.Tensor] = getattr(torch._C._dynamo.guards, "_reinterpret_tensor")  # noqa: B009


def current_stream(device: torch.device) -> int:
    """The current stream of a device as the driver knows it; 0 where there is none."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def storage_identity(t: torch.Tensor) -> int:
    """Equal for tensors that lie in the same memory, as views do."""
    return t.untyped_storage()._cdata


below_autograd = torch._C._AutoDispatchBelowAutograd
is_autocast_on = torch._C._is_any_autocast_enabled
without_autocast = torch._C._DisableAutocast
any_requires_grad = torch._C._any_requires_grad


def autograd_kernel(defined: Any) -> Callable[..., Any]:
    """What ``torch.library.custom_op`` registers for autograd: ``kernel(keyset, *arguments, **keyword_only)``."""
    from torch._library.autograd import make_autograd_impl

    return make_autograd_impl(defined._opoverload, defined)


def is_plain_call(keyset: Any) -> bool:
    """Whether below autograd there is nothing but a device's kernel: no tracing, no subclass, no transformation."""
    return not keyset.raw_repr() & ~_PLAIN_KEYS


_PLAIN_KEYS = functools.reduce(
    lambda keys, name: keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr(),
    ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView", "BackendSelect"),
    0,
)


def is_watched_by_dynamo() -> bool:
    """Whether Dynamo would compile a function that is called now."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Whether ``register_hook`` has given a tensor a hook that is still there."""
    return bool(tensor._backward_hooks)
