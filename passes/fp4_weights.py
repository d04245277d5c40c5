"""Packed copies of live weights: each made once, shared by all graphs, and made again when the weight changes.

A weight is known by identity. Its version counter and its address tell whether it was written to or given other memory
since it was packed; both are compared at every call of a compiled graph. Writing through ``weight.data`` or a NumPy
view changes neither: after such writes call :func:`forget`.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbcompile.kernels.fp4_layout import LinearWeight, refuses_layout, to_layout
from vbcompile.kernels.fp4_quantize import quantize, relative_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackKey:
    """How a weight is packed.

    Attributes:
        layout: the layout to use where it can hold the weight, else ``plain``.
        transposed: the parameter is ``[K, N]``.
    """

    format_name: str
    layout: str
    transposed: bool


@dataclass(eq=False)
class Packed:
    """A weight's packed copy.

    Attributes:
        weight: the live weight.
        linear: tensors for the operator; their memory stays the same when the weight is packed again.
        error: relative error ``|W - Q| / |W|``.
        version, address: of the weight when it was packed.
        dropped: whether the weight's own memory was given up.
    """

    weight: Callable[[], Tensor | None]
    linear: LinearWeight
    error: float
    version: int
    address: int
    dropped: bool = False

    def is_current(self, weight: Tensor) -> bool:
        return self.weight() is weight and weight._version == self.version and weight.data_ptr() == self.address


_packed: dict[int, dict[PackKey, Packed]] = {}
_lock = threading.RLock()


def pack(weight: Tensor, key: PackKey, name: str) -> Packed:
    """The current packed copy of ``weight``; quantizes it where there is none or where it has changed.

    Raises:
        ValueError: the weight cannot be packed, for the reasons of :func:`vbcompile.kernels.fp4_quantize.quantize`, or
            no longer in the layout that it had.
    """
    with _lock:
        copies = _packed.get(id(weight))
        old = None if copies is None else copies.get(key)
        if old is not None and old.is_current(weight):
            return old
        if old is not None and old.weight() is not weight:
            copies = old = None  # another tensor had this address in Python
        new = _quantize(weight, key, name)
        if old is not None and old.linear.layout == new.linear.layout:
            for mine, fresh in zip(old.linear.tensors, new.linear.tensors, strict=True):
                mine.copy_(fresh)  # compiled graphs and CUDA graphs hold these addresses
            old.error, old.version, old.address, old.dropped = new.error, new.version, new.address, False
            return old
        if copies is None:
            copies = _packed[id(weight)] = {}
        copies[key] = new
        return new


def _quantize(weight: Tensor, key: PackKey, name: str) -> Packed:
    version, address = weight._version, weight.data_ptr()
    with torch.inference_mode(False), torch.no_grad():
        source = weight.detach()
        source = source.t().contiguous() if key.transposed else source
        packed = quantize(source, key.format_name, name=name)
        error = relative_error(source, packed)
        layout = "plain" if refuses_layout(packed, key.layout) else key.layout
        linear = to_layout(packed, layout)
    identity = id(weight)
    return Packed(weakref.ref(weight, lambda _: _packed.pop(identity, None)), linear, error, version, address)


def drop(packed: Packed) -> None:
    """Give up the memory of the weight itself: it keeps its shape and dtype and reads as NaN."""
    weight = packed.weight()
    if weight is None or packed.dropped:
        return
    with _lock:
        weight.data = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        packed.version, packed.address, packed.dropped = weight._version, weight.data_ptr(), True


def forget(weight: Tensor | None = None) -> None:
    """Forget the packed copy of one weight, or of all, so that the next compile packs it again.

    Compiled graphs keep the copies that they hold until ``torch._dynamo.reset()``.
    """
    with _lock:
        if weight is None:
            _packed.clear()
        else:
            _packed.pop(id(weight), None)


class WeightFeed:
    """Supplies the packed tensors to a compiled graph, after the caller's own arguments.

    The same compiled graph may be called with other weights, as happens when one compiled block serves many layers:
    each weight brings its own packed copy.
    """

    def __init__(
        self,
        positions: Sequence[int],
        keys: Sequence[PackKey],
        names: Sequence[str],
        packed: Sequence[Packed],
        max_error: float,
        drop_masters: Sequence[bool],
        unpacked: Callable[..., Any],
    ) -> None:
        self._positions, self._keys, self._names = positions, keys, names
        self._last = list(packed)
        self._layouts = [p.linear.layout for p in packed]
        self._max_error, self._drop = max_error, drop_masters
        self._unpacked = unpacked
        self._warned = False

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` called with the packed tensors added."""

        def with_packed_weights(*args: Any) -> Any:
            try:
                extra = self._tensors(args)
            except _Unsuitable as reason:
                return self._run_unpacked(args, str(reason))
            out = compiled(*args, *extra)
            if any(self._drop):
                self._drop_masters()
            return out

        return with_packed_weights

    def _tensors(self, args: Sequence[Any]) -> list[Tensor]:
        extra: list[Tensor] = []
        for n, position in enumerate(self._positions):
            weight, last = args[position], self._last[n]
            if not last.is_current(weight) or last.error > self._max_error:
                last = self._last[n] = self._packed_again(n, weight)
            extra += last.linear.tensors
        return extra

    def _packed_again(self, n: int, weight: Tensor) -> Packed:
        try:
            packed = pack(weight, self._keys[n], self._names[n])
        except ValueError as error:
            raise _Unsuitable(str(error)) from error
        if packed.error > self._max_error:
            raise _Unsuitable(f"{self._names[n]}: relative error {packed.error:.3f} is above {self._max_error}")
        if packed.linear.layout != self._layouts[n]:
            raise _Unsuitable(f"{self._names[n]}: the new weight does not fit the layout {self._layouts[n]}")
        return packed

    def _run_unpacked(self, args: Sequence[Any], reason: str) -> Any:
        if any(p.dropped for p in self._last):
            raise RuntimeError(f"{reason}; the high-precision weights were dropped, so nothing can run without FP4")
        if not self._warned:
            self._warned = True
            log.warning("FP4 does not suit the weights this graph is called with; it runs uncompiled: %s", reason)
        return self._unpacked(*args)

    def _drop_masters(self) -> None:
        for wanted, packed in zip(self._drop, self._last, strict=True):
            if wanted and not packed.dropped:
                drop(packed)


class _Unsuitable(Exception):
    """A weight that cannot take the place of the one that the graph was compiled for."""
