"""Calls of our operators in the code that Inductor generates, without PyTorch's dispatcher in between.

Such a place calls with tensors that differ in nothing but their addresses from one time to the next. So what
:mod:`vbcompile.kernels.replay` remembers of it needs no look at shapes: only whether everything else that calls depend
on is as it was. All other calls, the first ones among them, go to the operator itself.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vbcompile.kernels import replay

TENSOR = Ellipsis  # stands for a tensor among the arguments of a place


@dataclass(frozen=True)
class RepeatedOperator:
    """An operator whose calls are remembered.

    Attributes:
        run: the operator.
        described: ``(static, tensors)`` of its arguments as it gives them to :func:`replay.remembered`.
        settings: the part of ``static`` that may change between calls, from the first tensor.
    """

    run: Callable[..., Any]
    described: Callable[..., tuple[Hashable, Sequence[Tensor | None]]]
    settings: Callable[[Tensor], Hashable]


OPERATORS: dict[str, RepeatedOperator] = {}


def place_of_call(name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Callable[..., Any]:
    """What a place in generated code calls with its tensors, in their order.

    Args:
        name: of the operator, without its namespace.
        arguments, named: those of the operator, :data:`TENSOR` for each tensor.
    """
    called = OPERATORS[name]
    settings, generation = called.settings, replay.generation
    # recording, its generation, settings, the number of each tensor of the recording among the place's
    known: tuple[replay.Recording, int, Hashable, tuple[int | None, ...]] | None = None

    def call(*tensors: Tensor) -> Any:
        if known is not None:
            recording, age, wanted, numbers = known
            if age == generation[0] and settings(tensors[0]) == wanted:
                found = [t.data_ptr() for t in tensors]
                together = 0
                for address in found:
                    together |= address
                if not together & 15:
                    given = [None if n is None else tensors[n] for n in numbers]
                    return recording.run_here(given, [0 if n is None else found[n] for n in numbers])
        return first(tensors)

    def first(tensors: tuple[Tensor, ...]) -> Any:
        nonlocal known
        remaining = iter(tensors)
        full, options = _filled(arguments, remaining), {key: _filled(v, remaining) for key, v in named.items()}
        result = called.run(*full, **options)
        static, given = called.described(*full, **options)
        recording = replay.recording_of(name, static, given)
        if recording is not None and not any(t.data_ptr() & 15 for t in tensors):
            numbers = {id(t): n for n, t in enumerate(tensors)}
            known = recording, generation[0], settings(tensors[0]), tuple(numbers.get(id(t)) for t in given)
        return result

    return call


def _filled(argument: Any, tensors: Any) -> Any:
    if argument is TENSOR:
        return next(tensors)
    if isinstance(argument, (list, tuple)):
        return type(argument)(_filled(a, tensors) for a in argument)
    return argument
