"""Training with streamed weights: the backward fetches them again, in its own order, and gradients leave the device.

What autograd saves of a streamed weight is its place in the plan. The plan's step is the forward and then the same
operators backwards; the transfers of the backward part run when autograd reaches a segment and when it leaves it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vbcompile.compat_calls import has_gradient_hooks
from vbcompile.handles import OffloadedTensor
from vbcompile.handles_gradients import gradients_of
from vbcompile.handles_payload import Payload
from vbcompile.handles_store import store_of
from vbcompile.vgpu_plan import Plan


@dataclass
class Backward:
    """The backward of one segment in one step.

    Attributes:
        plan: That of the forward. Where a graph that was compiled since has brought another one, each weight is fetched
            when it is read.
        operator: Its index in the plan.
        last: Whether the step ends with it.
        prefetches: Copies that are handed to their links behind it.
        held: Copies that were fetched.
        again: Whether autograd has come once more (``retain_graph``), which no plan knows of.
    """

    key: str
    plan: Plan | None
    operator: int
    last: bool
    prefetches: Sequence[int]
    held: set[int] = field(default_factory=set)
    begun: bool = False
    over: bool = False
    again: bool = False

    def begin(self) -> None:
        """Autograd has reached the segment."""
        store = store_of(self.key)
        if self.over:
            self.over, self.again = False, True
        if not self.begun and store.plan is self.plan:
            for copy in store.waits(self.operator):
                store.wait(copy)
            store.operator_begin(self.operator)
        self.begun = True

    def bytes_of(self, payload: Payload) -> Tensor:
        """A weight's bytes on the device, until the end of the segment's backward."""
        memory, copy = store_of(self.key).weight_bytes(payload)
        if copy is not None:
            self.held.add(copy)
        return memory

    def end(self) -> None:
        """Autograd has left the segment."""
        if self.over:
            return
        self.over = True
        store = store_of(self.key)
        held, self.held = self.held, set()
        if store.plan is not self.plan or self.again:
            for copy in held:
                store.release(copy)
            return
        store.operator_end(self.operator)
        for copy in {*store.releases(self.operator), *held}:
            store.release(copy)
        for copy in self.prefetches:
            store.prefetch(copy)
        if self.last:
            store.end(self.operator)


@dataclass(frozen=True)
class SavedWeight:
    """What autograd keeps of an offloaded weight: which one, as of which write, and which elements of it."""

    backward: Backward
    payload: Payload
    version: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def fetch(self) -> Tensor:
        """The tensor on the device, valid until the segment's backward is over."""
        if self.payload.version != self.version:
            raise RuntimeError(f"{self.payload.name} was written to between the forward and the backward that needs it")
        self.backward.begin()
        memory = self.backward.bytes_of(self.payload)
        return memory[self.offset :].view(self.dtype).as_strided(self.size, self.stride)


class _Use(torch.autograd.Function):
    """A weight on the device stands for its handle: its gradient goes to the handle's."""

    @staticmethod
    def forward(ctx: Any, handle: OffloadedTensor, weight: Tensor, key: str) -> Tensor:  # type: ignore[override]
        ctx.handle, ctx.key = handle, key
        ctx.set_materialize_grads(False)
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:  # type: ignore[override]
        if gradient is not None:
            gradients_of(store_of(ctx.key)).take(ctx.handle, gradient)
        return None, None, None


class _After(torch.autograd.Function):
    """Runs when the backward of a segment has given the gradient of one of its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: Backward) -> Tensor:  # type: ignore[override]
        ctx.backward_of_segment = backward
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        ctx.backward_of_segment.end()
        return gradient, None


@dataclass(frozen=True)
class Streamed:
    """Where a segment's weights come from.

    Attributes:
        weights: For each of the first inputs, the weight's index in the plan.
        operator: Index of the segment's backward in the plan.
        last: Whether the step ends with it.
        prefetches: Copies that are handed to their links behind it.
        written: Those of the weights that the graph writes to: autograd itself notices where that is too late.
    """

    key: str
    weights: tuple[int, ...]
    operator: int
    last: bool
    prefetches: tuple[int, ...] = field(default=())
    written: frozenset[int] = frozenset()


class TrainedSegment(nn.Module):
    """A compiled stretch of a graph that is trained. Called with its inputs, weights first, and then their handles."""

    def __init__(self, compiled: Callable[..., Any], streamed: Streamed) -> None:
        super().__init__()
        self.compiled, self.streamed = compiled, streamed

    def forward(self, *args: Any) -> Any:
        streamed, count = self.streamed, len(self.streamed.weights)
        inputs, handles = list(args[: len(args) - count]), args[len(args) - count :]
        if not torch.is_grad_enabled():
            return self.compiled(*inputs)
        store = store_of(streamed.key)
        backward = Backward(streamed.key, store.plan, streamed.operator, streamed.last, streamed.prefetches)
        payloads = [
            store.payload_at(weight) for weight in dict.fromkeys(streamed.weights) if weight not in streamed.written
        ]
        places = [(payload, store.weight_bytes(payload)[0]) for payload in payloads]
        for position, handle in enumerate(handles):
            if isinstance(handle, OffloadedTensor) and handle.requires_grad:
                _refuse_hooks(handle)
                inputs[position] = _Use.apply(handle, inputs[position], streamed.key)
        _mark_first(inputs, count, backward)
        with torch.autograd.graph.saved_tensors_hooks(_packer(places, backward), _unpack):
            return self.compiled(*inputs)


def _refuse_hooks(handle: OffloadedTensor) -> None:
    """Gradients go to host memory as they are made: autograd has none to call a hook with."""
    if has_gradient_hooks(handle):
        raise RuntimeError(
            f"{handle.payload.name} has a hook for its gradient (register_hook), and gradients of offloaded weights "
            "leave the device without autograd: remove it, and change parameter.grad ahead of the optimizer's step"
        )


def _mark_first(inputs: list[Any], count: int, backward: Backward) -> None:
    """The end of the segment's backward is noticed at the first input that has a gradient, weights last."""
    order = [*range(count, len(inputs)), *range(count)]
    for position in order:
        value = inputs[position]
        if isinstance(value, Tensor) and value.requires_grad:
            inputs[position] = _After.apply(value, backward)
            return


def _packer(places: Sequence[tuple[Payload, Tensor]], backward: Backward) -> Callable[[Tensor], Any]:
    spans = [(payload, t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for payload, t in places]

    def pack(tensor: Tensor) -> Any:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.numel():
            return tensor
        begin = tensor.data_ptr()
        for payload, first, end in spans:
            if first <= begin < end:
                place = begin - first, tensor.size(), tensor.stride(), tensor.dtype
                return SavedWeight(backward, payload, payload.version, *place)
        return tensor

    return pack


def _unpack(saved: Any) -> Tensor:
    found: Tensor = saved.fetch() if isinstance(saved, SavedWeight) else saved
    return found
