"""Whether a training step really keeps to its budget: what the allocator held at most, against what was allowed.

A plan is made from the graph; what compilers and libraries allocate beside it shows on the device alone. The
allocator's peak belongs to whoever reads it, so it is set back only where it leaves open whether the budget was kept.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Compiled = Callable[..., Any]
_NODE = "CompiledFunctionBackward"  # AOTAutograd's name for the backward of a graph
_FIRST = 2  # in the first step kernels are compiled and tried, which takes memory of its own
_LAST = 8  # forwards without a backward say nothing


class Meter(Protocol):
    """What is read of a device; :class:`vbcompile.runtime_device.AcceleratorDevice` has it."""

    def allocated_bytes(self) -> int: ...

    def peak_bytes(self) -> int: ...

    def reset_peak(self) -> None: ...


class BudgetWatch:
    """Looks at one compiled graph's second step, and measures the third where the second leaves it open.

    Memory of others does not count: what was there when the forward began, less the graph's own inputs, and what came
    between forward and backward.

    Args:
        budget: Bytes that the step may take.
        meter: Makes the device's counters from the device of the inputs.
        tell: Takes the bytes that were taken, if they are too many.
    """

    def __init__(self, budget: int, meter: Callable[[torch.device], Meter], tell: Callable[[int], None]) -> None:
        self._budget, self._make_meter, self._tell = budget, meter, tell
        self._meter: Meter | None = None
        self._steps = 0
        self._is_over = False

    def wrap(self, compiled: Compiled) -> Compiled:
        """The same graph, watched until it is known whether it keeps to the budget."""

        def run(*args: Any) -> Any:
            if self._is_over or not torch.is_grad_enabled():
                return compiled(*args)
            self._steps += 1
            meter = self._meter_of(args) if _FIRST <= self._steps <= _LAST else None
            return compiled(*args) if meter is None else self._watched(compiled, args, meter)

        return run

    def _meter_of(self, args: tuple[Any, ...]) -> Meter | None:
        devices = (a.device for a in args if isinstance(a, Tensor) and a.device.type not in ("cpu", "meta"))
        if self._meter is None and (device := next(devices, None)) is not None:
            self._meter = self._make_meter(device)
        return self._meter

    def _watched(self, compiled: Compiled, args: tuple[Any, ...], meter: Meter) -> Any:
        measures = self._steps > _FIRST
        others = max(meter.allocated_bytes() - _own_bytes(args), 0)
        if measures:
            meter.reset_peak()
        results = compiled(*args)
        forward = meter.peak_bytes() - others
        node, left = _backward_of(results), meter.allocated_bytes()
        if node is None:
            self._judge(forward, measures)
            return results

        def before(_: Any) -> None:
            nonlocal others
            others += max(meter.allocated_bytes() - left, 0)
            if measures:
                meter.reset_peak()

        def after(*_: Any) -> None:
            self._judge(max(forward, meter.peak_bytes() - others), measures)

        node.register_prehook(before)
        node.register_hook(after)
        return results

    def _judge(self, taken: int, measured: bool) -> None:
        if self._is_over:
            return
        self._is_over = measured or taken <= self._budget
        if taken > self._budget and measured:
            self._tell(taken)


def _own_bytes(args: tuple[Any, ...]) -> int:
    """Bytes of the tensors among a graph's inputs that are on a device."""
    own = {a.data_ptr(): a.nbytes for a in args if isinstance(a, Tensor) and a.device.type not in ("cpu", "meta")}
    return sum(own.values())


def _backward_of(results: Any) -> Any:
    """The autograd node of the compiled backward; None where nothing was recorded, or all results are views."""
    found = results if isinstance(results, (tuple, list)) else (results,)
    nodes = (t.grad_fn for t in found if isinstance(t, Tensor) and t.grad_fn is not None)
    return next((node for node in nodes if node.name() == _NODE), None)
