"""Optimizers whose parameters, gradients and state are in host memory, for models whose weights are offloaded."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vbcompile.handles import OffloadedTensor
from vbcompile.handles_payload import Payload
from vbcompile.runtime_sources import HostBytes


def optimizer(kind: type[Optimizer], params: Iterable[Any], **options: Any) -> Optimizer:
    """An optimizer that updates offloaded weights where they live, in host memory, with its state beside them.

    Args:
        kind: A class of optimizers, such as ``torch.optim.AdamW``.
        params: As for ``kind``: parameters, or dictionaries with ``params``. Ordinary parameters may be among them.
        options: For ``kind``.

    Returns:
        An instance of ``kind``. Its parameter groups hold tensors on the CPU that share the masters' memory; learning
        rate schedulers and ``state_dict`` work as usual. ``step`` waits for gradients under way.

    Raises:
        ValueError: a weight lives on disk, where nothing is written to.
        TypeError: ``kind`` is no class of optimizers, or one that evaluates the model within a step (LBFGS).
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"expected a class of optimizers, such as torch.optim.AdamW, not {kind!r}")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"{kind.__name__} evaluates the model within a step, for which gradients and weights "
            f"would have to travel each time: use torch.optim.{kind.__name__} itself, which works on the device"
        )
    mirrors: list[tuple[OffloadedTensor, nn.Parameter]] = []
    groups: list[Any] = []
    for entry in params:
        group = dict(entry) if isinstance(entry, dict) else None
        found = [_mirror(p, mirrors) for p in (_listed(group["params"]) if group is not None else [entry])]
        groups += [{**group, "params": found}] if group is not None else found
    made = _host_class(kind)(groups, **options)
    made._mirrors = mirrors  # type: ignore[attr-defined]
    return made


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _mirror(parameter: Any, mirrors: list[tuple[OffloadedTensor, nn.Parameter]]) -> Any:
    """The parameter that the optimizer sees: for an offloaded one its master."""
    if not isinstance(parameter, OffloadedTensor):
        return parameter
    payload = parameter.payload
    if not isinstance(payload.source, HostBytes):
        raise ValueError(f"{payload.name} lives on {payload.place} and cannot be trained: raise max_memory['cpu']")
    mirror = nn.Parameter(payload.shaped(payload.source.memory), parameter.requires_grad)
    mirrors.append((parameter, mirror))
    return mirror


def _host_class(kind: type[Optimizer]) -> type[Optimizer]:
    class HostOptimizer(kind):  # type: ignore[valid-type,misc]
        _mirrors: list[tuple[OffloadedTensor, nn.Parameter]] = []

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for payload in _take_gradients(self._mirrors):
                payload.begin_write()
            super().step()
            for handle, mirror in self._mirrors:
                if mirror.grad is not None:
                    handle.payload.written()
                mirror.grad = None
            return loss

        def zero_grad(self, set_to_none: bool = True) -> None:
            """Gradients of offloaded weights are always dropped; their memory is used again."""
            super().zero_grad(set_to_none)
            for handle, _ in self._mirrors:
                handle.grad = None

    HostOptimizer.__name__ = kind.__name__
    return HostOptimizer


def _take_gradients(mirrors: list[tuple[OffloadedTensor, nn.Parameter]]) -> list[Payload]:
    """Give the mirrors the gradients of their weights; the payloads that will be written to."""
    changed = []
    for handle, mirror in mirrors:
        gradient = handle.grad
        if gradient is None:
            mirror.grad = None
            continue
        mirror.grad = gradient.payload.on_host() if isinstance(gradient, OffloadedTensor) else gradient.cpu()
        changed.append(handle.payload)
    return changed
