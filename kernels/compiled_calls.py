"""Calls of our operators in the code that Inductor generates, without PyTorch's dispatcher in between.

Such a place calls with tensors that differ in nothing but their addresses from one time to the next, or in sizes that
are known to vary. So what :mod:`vbcompile.kernels.replay` remembers of it needs no look at other shapes, only whether
everything else that calls depend on is as it was. Other calls, the first ones among them, go to the operator itself.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vbcompile.compat_lowering import lower_to_calls
from vbcompile.kernels import registry, replay

R = TypeVar("R")

TENSOR = Ellipsis  # stands for a tensor among the arguments of a place
_MOST = 64  # shapes that a place knows; the oldest go first


@dataclass(frozen=True)
class RepeatedOperator:
    """An operator whose calls are remembered.

    Attributes:
        name: without its namespace.
        run: the operator.
        settings: what its calls depend on that is no argument, from the first tensor.
    """

    name: str
    run: Callable[..., Any]
    settings: Callable[[Tensor], Hashable]

    @cached_property
    def _parameters(self) -> list[Any]:
        schema = getattr(torch.ops.vblackwell, self.name).default._schema
        return list(schema.arguments)

    @cached_property
    def _places(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Where among the arguments tensors are, lists of tensors, other lists, and what is neither."""
        types = [str(p.type) for p in self._parameters]
        single = [n for n, t in enumerate(types) if t in ("Tensor", "Optional[Tensor]")]
        several = [n for n, t in enumerate(types) if t == "List[Tensor]"]
        lists = [n for n, t in enumerate(types) if t.startswith("List[") and n not in several]
        return single, several, lists, [n for n in range(len(types)) if n not in (*single, *several, *lists)]

    def remembered(self, run: Callable[[], R], *arguments: Any) -> R:
        """``run()``, or what it did before; all arguments of the operator, in its order (:func:`replay.remembered`)."""
        return replay.remembered(self.name, *self._described(arguments), run)

    def recording_of(self, *arguments: Any, **named: Any) -> tuple[replay.Recording | None, list[Tensor | None]]:
        """What a call of the operator would do again, and the tensors that it numbers."""
        others = self._parameters[len(arguments) :]
        static, tensors = self._described([*arguments, *(named.get(p.name, p.default_value) for p in others)])
        return replay.recording_of(self.name, static, tensors), tensors

    def _described(self, arguments: Sequence[Any]) -> tuple[Hashable, list[Tensor | None]]:
        """What a call depends on besides its tensors, and these."""
        single, several, lists, others = self._places
        tensors: list[Tensor | None] = [arguments[n] for n in single]
        for n in several:
            tensors += arguments[n]
        static = [arguments[n] for n in others] + [tuple(arguments[n]) for n in lists]
        return (self.settings(arguments[0]), *static), tensors


OPERATORS: dict[str, RepeatedOperator] = {}
_writing = threading.Lock()


def use_in_compiled_code() -> None:
    """From now on the code that Inductor makes for our backend calls the operators that are known so."""
    for name in OPERATORS:
        lower_to_calls(getattr(torch.ops.vblackwell, name).default, place_of_call, TENSOR, _takes)


def _takes(device: torch.device) -> bool:
    return replay.takes(device)


def place_of_call(
    name: str, arguments: Sequence[Any], named: Mapping[str, Any], varying: Sequence[int] = ()
) -> Callable[..., Any]:
    """What a place in generated code calls with its tensors, in their order.

    Args:
        name: of the operator, without its namespace.
        arguments, named: those of the operator, :data:`TENSOR` for each tensor.
        varying: which of the tensors have sizes or strides that are not the same every time.
    """
    if name not in OPERATORS:  # code out of a cache
        registry.operator(name).load()
    called = OPERATORS[name]
    settings = called.settings
    # by shapes that vary: a recording's function with the settings that it holds for, and what it was made of
    known: dict[Hashable, tuple[Callable[..., Any], Hashable, replay.Recording]] = {}

    def call(*tensors: Tensor) -> Any:
        found = known.get(None)
        if found is not None and settings(tensors[0]) == found[1]:
            return found[0](*tensors)
        return first(*tensors)

    def call_varying(*tensors: Tensor) -> Any:
        found = known.get(shapes(tensors))
        if found is not None and settings(tensors[0]) == found[1]:
            return found[0](*tensors)
        return first(*tensors)

    def shapes(tensors: tuple[Tensor, ...]) -> Hashable:
        return tuple([(tensors[n].shape, tensors[n].stride()) for n in varying]) or None

    def first(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        full, options = _filled((arguments, named), remaining)
        result = called.run(*full, **options)
        recording, given = called.recording_of(*full, **options)
        if recording is None or any(t.data_ptr() & 15 for t in tensors):
            return result
        key, now = shapes(tensors), settings(tensors[0])
        last = known.get(key)
        if last is None or last[1:] != (now, recording):
            numbers = {id(t): n for n, t in enumerate(given)}
            function = recording.as_function([numbers[id(t)] for t in tensors], first)
            with _writing:
                if len(known) >= _MOST and last is None:
                    del known[next(iter(known))]
                known[key] = function, now, recording
        return result

    return call_varying if varying else call


def _filled(arguments: Any, tensors: Iterator[Tensor]) -> Any:
    return pytree.tree_map(lambda a: next(tensors) if a is TENSOR else a, arguments)
