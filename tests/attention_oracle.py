"""The oracle: plain PyTorch in float64 is the truth, and our error may be twice plain PyTorch's in the same dtype."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Two correct roundings of one number differ by so many units in the last place of the largest value: the maximum over a
# small tensor is noisy, and in float64 the truth itself is rounded.
FLOOR_UNITS: Final = {torch.float64: 32.0, torch.float32: 12.0, torch.float16: 4.0, torch.bfloat16: 4.0}
# The largest error of a handful of numbers, each a long sum, is mere chance in eager and in ours alike.
FEW_ELEMENTS: Final = 64
FACTOR_FOR_FEW: Final = 4.0

_WIDENED: Final = {torch.float16, torch.bfloat16, torch.float32}
_CASTS: Final = {Tensor.float, Tensor.half, Tensor.bfloat16}


class _DoublePrecision(TorchFunctionMode):
    """Reads every request for a narrower floating type as one for float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def widen(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value in _WIDENED else value

        func = Tensor.double if func in _CASTS else func
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


@contextmanager
def double_precision():
    """Run code that names float32 (``softmax(dtype=torch.float32)``, ``.float()``) in float64 instead."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _DoublePrecision():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Outcome:
    """Everything that one run gave: outputs, gradients and what became of the inputs, by name."""

    values: dict[str, Tensor | None] = field(default_factory=dict)


def fresh(inputs: Sequence[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Independent copies with the same strides; floating tensors in ``dtype`` if given."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        y = x.detach().clone()
        return (y.to(dtype) if dtype is not None and y.is_floating_point() else y).requires_grad_(x.requires_grad)

    return tuple(copy(x) for x in inputs)


def upstream(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Random gradients for the outputs, equal for equal seeds whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype=x.dtype, device=x.device)
        for x in outputs
    ]


def run(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    training: bool,
    seed: int = 0,
    parameters: nn.Module | None = None,
) -> Outcome:
    """Call ``function`` and, in training, differentiate all its floating outputs.

    Args:
        parameters: the module whose parameters' gradients are wanted; ``function`` itself where that is a module.
    """
    module = parameters if parameters is not None else function if isinstance(function, nn.Module) else None
    with torch.set_grad_enabled(training):
        result = function(*inputs)
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    outcome = Outcome({f"output {i}": x.detach() for i, x in enumerate(outputs)})
    if training:
        leaves = {
            f"gradient of input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad
        }
        if module is not None:
            leaves |= {f"gradient of {name}": p for name, p in module.named_parameters() if p.requires_grad}
        wanted = [x for x in outputs if x.requires_grad]
        gradients = torch.autograd.grad(wanted, list(leaves.values()), upstream(wanted, seed), allow_unused=True)
        outcome.values |= dict(zip(leaves, gradients, strict=True))
    outcome.values |= {f"input {i} afterwards": x.detach() for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    return outcome


def _error(value: Tensor, truth: Tensor) -> float:
    difference = (value.double() - truth.double()).abs()
    both = torch.isnan(truth) | (value.double() == truth.double())  # equal infinities differ by nothing
    difference = difference.masked_fill(both | torch.isnan(value), 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def _one(
    name: str,
    ours: Tensor | None,
    eager: Tensor | None,
    truth: Tensor | None,
    factor: float,
    largest: float,
    units: float | None,
) -> str | None:
    if eager is None or ours is None or truth is None:
        return None if ours is None and eager is None else f"{name}: ours is {_kind(ours)}, eager's is {_kind(eager)}"
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return f"{name}: ours is {_kind(ours)}, eager's is {_kind(eager)}"
    if not eager.is_floating_point():
        return None if torch.equal(ours, eager) else f"{name}: differs"
    ours_nan, eager_nan = torch.isnan(ours), torch.isnan(eager)
    meant = eager_nan & torch.isnan(truth)  # other NaN of eager's are its own overflow
    if bool((ours_nan & ~eager_nan).any() or (meant & ~ours_nan).any()):
        return f"{name}: {int(ours_nan.sum())} NaN, eager has {int(eager_nan.sum())}, of {ours.numel()}"
    truth = torch.where(eager_nan & ours_nan, float("nan"), truth.double())
    scale = _largest(truth)
    if scale < 1e-6 * largest or truth.numel() < FEW_ELEMENTS:
        scale = max(scale, largest)  # sums that cancel: what is left is the rounding of their addends
    units = FLOOR_UNITS[ours.dtype] if units is None else units
    units *= FACTOR_FOR_FEW if truth.numel() < FEW_ELEMENTS else 1.0
    allowed = factor * _error(eager, truth) + units * torch.finfo(ours.dtype).eps * scale
    error = _error(ours, truth)
    return None if error <= allowed else f"{name}: error {error:.2e} > {allowed:.2e} (largest value {scale:.2e})"


def _largest(x: Tensor | None) -> float:
    if x is None or not x.is_floating_point() or not x.numel():
        return 0.0
    return float(x.masked_fill(~torch.isfinite(x), 0.0).abs().max())


def _kind(x: Tensor | None) -> str:
    return "None" if x is None else f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def differences(
    ours: Outcome,
    eager: Outcome,
    truth: Outcome,
    factor: float = 2.0,
    floor_units: float | None = None,
    lost_gradients: bool = True,
) -> list[str]:
    """Why ``ours`` is not as good as ``eager``; empty if it is.

    Every output and gradient: equal shape and dtype, NaN in the same places (a NaN that is eager's overflow alone need
    not be copied), and a largest error against ``truth`` of at most ``factor`` times eager's plus ``floor_units`` units
    in the last place of the largest value (default ``FLOOR_UNITS``; more for a handful of numbers).

    Args:
        lost_gradients: whether NaN must agree in gradients too where an output is NaN. Such a run is lost anyway: the
            values' gradient is NaN throughout, whatever the others hold.
    """
    if ours.values.keys() != eager.values.keys():
        return [f"results {sorted(ours.values)}, eager has {sorted(eager.values)}"]
    largest = max(map(_largest, truth.values.values()), default=0.0)
    if not lost_gradients and any(bool(torch.isnan(x).any()) for x in _outputs(eager)):
        ours, eager = _with_equal_nan_gradients(ours, eager)
    found = (
        _one(name, ours.values[name], eager.values[name], truth.values[name], factor, largest, floor_units)
        for name in eager.values
    )
    return [problem for problem in found if problem is not None]


def _outputs(outcome: Outcome) -> list[Tensor]:
    return [x for name, x in outcome.values.items() if x is not None and name.startswith("output")]


def _with_equal_nan_gradients(*outcomes: Outcome) -> list[Outcome]:
    """The outcomes with NaN in their gradients wherever any of them has it."""
    cleaned = [Outcome(dict(outcome.values)) for outcome in outcomes]
    for name in outcomes[0].values:
        values = [outcome.values.get(name) for outcome in outcomes]
        if not name.startswith("gradient") or any(x is None for x in values) or len({x.shape for x in values}) > 1:
            continue
        lost = torch.stack([torch.isnan(x) for x in values]).any(0)
        for outcome, x in zip(cleaned, values, strict=True):
            outcome.values[name] = x.masked_fill(lost, float("nan"))
    return cleaned
