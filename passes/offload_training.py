"""Training with streamed weights: the backward fetches them again, in its own order, and gradients leave the device.

What autograd saves of a streamed weight is its place in the plan. The plan's step is the forward and then the same
operators backwards; the transfers of the backward part run when autograd reaches a segment and when it leaves it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vbcompile.handles import OffloadedTensor
from vbcompile.handles_gradients import gradients_of
from vbcompile.handles_store import store_of


@dataclass
class Backward:
    """The backward of one segment in one step.

    Attributes:
        operator: Its index in the plan.
        last: Whether the step ends with it.
        prefetches: Copies that are handed to their links behind it.
    """

    key: str
    operator: int
    last: bool
    prefetches: Sequence[int]
    begun: bool = False
    over: bool = False

    def begin(self) -> None:
        """Autograd has reached the segment."""
        if not self.begun:
            self.begun = True
            store = store_of(self.key)
            for copy in store.waits(self.operator):
                store.wait(copy)

    def end(self) -> None:
        """Autograd has left the segment."""
        if self.over:
            return
        self.over = True
        store = store_of(self.key)
        for copy in store.releases(self.operator):
            store.release(copy)
        for copy in self.prefetches:
            store.prefetch(copy)
        if self.last:
            store.end(self.operator)


@dataclass(frozen=True)
class SavedWeight:
    """What autograd keeps of a streamed weight: which one, and which elements of it."""

    backward: Backward
    weight: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def fetch(self) -> Tensor:
        """The tensor on the device, valid until the segment's backward is over."""
        self.backward.begin()
        memory = store_of(self.backward.key).weight_bytes(self.weight)
        return memory[self.offset :].view(self.dtype).as_strided(self.size, self.stride)


class _Use(torch.autograd.Function):
    """A weight on the device stands for its handle: its gradient goes to the handle's."""

    @staticmethod
    def forward(ctx: Any, handle: OffloadedTensor, weight: Tensor, key: str) -> Tensor:  # type: ignore[override]
        ctx.handle, ctx.key = handle, key
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        gradients_of(store_of(ctx.key)).take(ctx.handle, gradient)
        return None, None, None


class _After(torch.autograd.Function):
    """Runs when the backward of a segment has given the gradient of one of its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: Backward) -> Tensor:  # type: ignore[override]
        ctx.backward_of_segment = backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
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
    """

    key: str
    weights: tuple[int, ...]
    operator: int
    last: bool
    prefetches: tuple[int, ...] = field(default=())


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
        backward = Backward(streamed.key, streamed.operator, streamed.last, streamed.prefetches)
        store = store_of(streamed.key)
        places = [(w, store.weight_bytes(w)) for w in dict.fromkeys(streamed.weights) if not store.is_resident(w)]
        for position, handle in enumerate(handles):
            if isinstance(handle, OffloadedTensor) and handle.requires_grad:
                inputs[position] = _Use.apply(handle, inputs[position], streamed.key)
        _mark_first(inputs, count, backward)
        with torch.autograd.graph.saved_tensors_hooks(_packer(places, backward), _unpack):
            return self.compiled(*inputs)


def _mark_first(inputs: list[Any], count: int, backward: Backward) -> None:
    """The end of the segment's backward is noticed at the first input that has a gradient, weights last."""
    order = [*range(count, len(inputs)), *range(count)]
    for position in order:
        value = inputs[position]
        if isinstance(value, Tensor) and value.requires_grad:
            inputs[position] = _After.apply(value, backward)
            return


def _packer(places: Sequence[tuple[int, Tensor]], backward: Backward) -> Callable[[Tensor], Any]:
    spans = [(weight, t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for weight, t in places]

    def pack(tensor: Tensor) -> Any:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.numel():
            return tensor
        begin = tensor.data_ptr()
        for weight, first, end in spans:
            if first <= begin < end:
                return SavedWeight(backward, weight, begin - first, tensor.size(), tensor.stride(), tensor.dtype)
        return tensor

    return pack


def _unpack(saved: Any) -> Tensor:
    found: Tensor = saved.fetch() if isinstance(saved, SavedWeight) else saved
    return found
