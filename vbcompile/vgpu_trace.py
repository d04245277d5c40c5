"""One step of a model without its data: which operators run, which weights each reads, what is alive at the peak.

Runs the model on fake tensors: nothing is computed and no weight is read or allocated, so that a model of any size,
also one on the meta device, is traced in a second or two.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vbcompile.compat_calls import storage_identity


@dataclass
class TracedOperator:
    """One or more tensor operators between two uses of new weights.

    Attributes:
        name: The operator that reads the weights.
        weights: Names of the weights that it reads.
        flops: Floating-point operations.
        nbytes: Bytes that have to cross the device's memory bus if everything else is fused.
        launches: Operators that a compiler will not fuse with others.
        live_bytes: Most bytes alive at once besides the weights.
    """

    name: str
    weights: tuple[str, ...] = ()
    flops: int = 0
    nbytes: int = 0
    launches: int = 0
    live_bytes: int = 0


@dataclass
class Trace:
    """What one step does: its operators in order of execution."""

    operators: list[TracedOperator] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once besides the weights (gradients of weights not counted)."""
        return max((operator.live_bytes for operator in self.operators), default=0)


def trace(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, training: bool = False
) -> Trace:
    """Run one step on fake tensors.

    Args:
        model: On any device, the meta device included; it is left as it is.
        args: Its inputs; only their shapes and dtypes count.
        training: Run the backward of the sum of all floating-point outputs, too.

    Raises:
        ValueError: the step depends on the values of its inputs, which fake tensors do not have.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder()
    with mode:
        state = {name: _fake(tensor, training) for name, tensor in _state(model).items()}
        inputs, named = _fake_inputs((tuple(args), dict(kwargs or {})))
        recorder.watch(state)
    try:
        with mode, recorder, torch.set_grad_enabled(training):
            output = torch.func.functional_call(model, state, inputs, named)
            if training:
                _backward(output, state)
            del output
    except RuntimeError as error:  # also what fake tensors raise where a value is asked for
        raise ValueError(
            f"the model cannot be traced without its data: {str(error).strip().partition(chr(10))[0].rstrip('.')}. "
            "Describe it by its shapes instead, or leave out the inputs"
        ) from error
    return recorder.trace


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _fake(tensor: torch.Tensor, training: bool) -> torch.Tensor:
    """A stand-in on the CPU, whatever the device of the original, so that all of them are on one device."""
    wants_grad = training and tensor.requires_grad
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return fake.requires_grad_(wants_grad)


def _fake_inputs(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: _fake(tensor, False), inputs)


def _backward(output: Any, state: Mapping[str, torch.Tensor]) -> None:
    for tensor in state.values():
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(_drop_gradient)
    leaves = torch.utils._pytree.tree_leaves(output)
    losses = [
        leaf.sum()
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]
    if not losses:
        raise ValueError("no output of the model depends on a weight that is trained")
    torch.autograd.backward(losses)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Recorder(TorchDispatchMode):
    """Sees every operator: follows weights through views, adds up work, and counts live storage."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._weights: dict[int, str] = {}  # storage -> weight that lives in it
        self._alive: dict[int, weakref.finalize] = {}
        self._live = 0

    def watch(self, state: Mapping[str, torch.Tensor]) -> None:
        self._weights = {storage_identity(tensor): name for name, tensor in state.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        for tensor in outputs:
            self._account(tensor)
        if (
            not all(any(storage_identity(out) == storage_identity(tensor) for tensor in inputs) for out in outputs)
            or not inputs
        ):
            self._record(func, args, kwargs, result, inputs, outputs)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any, inputs: Any, outputs: Any) -> None:
        names = tuple(
            dict.fromkeys(self._weights[key] for key in map(storage_identity, inputs) if key in self._weights)
        )
        known = self.trace.operators
        if not known or (names and set(names) - set(known[-1].weights)):
            known.append(TracedOperator(func._overloadpacket._qualified_op_name, names))
        count = flop_registry.get(func._overloadpacket)
        current = known[-1]
        written = sum(tensor.nbytes for tensor in outputs)
        if count is not None:
            current.flops += int(count(*args, **kwargs, out_val=result))
            current.launches += 1
            written += sum(tensor.nbytes for tensor in inputs)
        current.nbytes += written
        current.live_bytes = max(current.live_bytes, self._live)

    def _account(self, tensor: torch.Tensor) -> None:
        key = storage_identity(tensor)
        if key in self._weights or key in self._alive:
            return
        storage = tensor.untyped_storage()
        self._live += storage.nbytes()
        self._alive[key] = weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        del self._alive[key]
        self._live -= nbytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
