"""``DataParallel`` for every device: the call of :class:`torch.nn.DataParallel`, which PyTorch has for CUDA alone.

The batch is cut among the cards of one process, each runs the module with copies of its parameters, and the results
come together on one card; gradients flow back to the parameters through the copies. Every call sends all parameters to
the other cards, so training on several cards goes faster with one process a card
(``torch.nn.parallel.DistributedDataParallel``, see ``docs/vendors``).
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vbcompile.device import DeviceBackend, DeviceError, get_unified_backend


class DataParallel(nn.Module):
    """Runs a module on several cards of one kind.

    Args:
        module: All its parameters and buffers are on the first card.
        device_ids: Indices of cards, or devices; None: all cards of the kind that the module is on.
        output_device: Where results are gathered; None: the first card.
        dim: The axis along which inputs are cut and results put together.

    Raises:
        DeviceError: a card that is not there, cards of several kinds, or a module that is on another one.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | str | torch.device] | None = None,
        output_device: int | str | torch.device | None = None,
        dim: int = 0,
    ) -> None:
        super().__init__()
        self.module, self.dim = module, dim
        kind = _kind_of(module)
        wanted = range(DeviceBackend(kind).device_count()) if device_ids is None else device_ids
        self.devices = [_device(kind, d) for d in wanted]
        if not self.devices:
            raise DeviceError("DataParallel: device_ids names no device")
        if len({d.type for d in self.devices}) > 1:
            raise DeviceError(f"DataParallel: devices of several kinds: {', '.join(map(str, self.devices))}")
        self.output_device = self.devices[0] if output_device is None else _device(kind, output_device)

    def forward(self, *inputs: Any, **keyword_inputs: Any) -> Any:
        """The module's result, as if it had seen the whole batch; results without axes are stacked, one a card.

        Raises:
            DeviceError: a parameter or buffer that is not on the first card.
        """
        self._check_place()
        parts = scatter((inputs, keyword_inputs), self.devices, self.dim)
        if len(parts) == 1:
            args, kwargs = parts[0]
            return _to(self.module(*args, **kwargs), self.output_device)
        results: list[Any] = []
        for device, (args, kwargs) in zip(self.devices, parts, strict=False):
            with _current(device):
                if results:
                    results.append(functional_call(self.module, replicate(self.module, device), args, kwargs))
                else:  # the first card works on the parameters and buffers themselves
                    results.append(self.module(*args, **kwargs))
        return gather(results, self.output_device, self.dim)

    def _check_place(self) -> None:
        first = self.devices[0]
        for name, t in (*self.module.named_parameters(), *self.module.named_buffers()):
            if not _same(t.device, first):
                raise DeviceError(f"DataParallel: {name} is on {t.device}, not on {first}: call module.to('{first}')")


def replicate(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Copies of a module's parameters and buffers on a device; the parameters' lead gradients back."""
    tensors = [*module.named_parameters(), *((name, buffer.detach()) for name, buffer in module.named_buffers())]
    return {name: t.to(device, copy=not t.requires_grad) for name, t in tensors}


def scatter(value: Any, devices: Sequence[torch.device], dim: int = 0) -> list[Any]:
    """Cut every tensor within nested tuples, lists and dictionaries along ``dim``, one piece a device.

    Everything else goes to each device as it is. There are as many pieces as the tensors have; where there are no
    tensors, or none with axes, one.
    """
    sizes = [t.shape[dim] for t in _tensors(value) if t.dim()]
    if not sizes:
        return [_to(value, devices[0])]
    count = len(torch.empty(max(sizes), device="meta").chunk(len(devices)))
    return [_piece(value, n, devices, count, dim) for n in range(count)]


def _piece(value: Any, n: int, devices: Sequence[torch.device], count: int, dim: int) -> Any:
    if isinstance(value, Tensor):
        if not value.dim():
            return value.to(devices[n])
        pieces = value.chunk(len(devices), dim)
        if len(pieces) != count:
            raise ValueError(
                f"DataParallel: inputs of different sizes along axis {dim}: one of them {value.shape[dim]}"
            )
        return pieces[n].to(devices[n])
    return _rebuilt(value, [_piece(v, n, devices, count, dim) for v in _values(value)])


def gather(results: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """Put the tensors of nested results together on one device; the inverse of :func:`scatter`."""
    first = results[0]
    if isinstance(first, Tensor):
        moved = [t.to(device) for t in results]
        return torch.cat(moved, dim) if first.dim() else torch.stack(moved)
    columns = zip(*map(_values, results), strict=True)
    return _rebuilt(first, [gather(column, device, dim) for column in columns])


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return _rebuilt(value, [_to(v, device) for v in _values(value)])


def _values(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (tuple, list)) else []


def _rebuilt(value: Any, values: list[Any]) -> Any:
    """A container like ``value`` with other values; anything else as it is."""
    if isinstance(value, Mapping):
        return type(value)(zip(value, values, strict=True))  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*values)
    return type(value)(values) if isinstance(value, (tuple, list)) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in _values(value) for t in _tensors(v)]


def _kind_of(module: nn.Module) -> str:
    first = next((t for t in (*module.parameters(), *module.buffers())), None)
    return get_unified_backend().device_type if first is None else first.device.type


def _device(kind: str, wanted: int | str | torch.device) -> torch.device:
    """A card that exists; the CPU has no cards, so every index means the CPU."""
    if isinstance(wanted, int):
        wanted = kind if kind == "cpu" else f"{kind}:{wanted}"
    return get_unified_backend(wanted).device


def _same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index or 0) == (b.index or 0)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The card that operators without tensors use inside the block."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device.index)
