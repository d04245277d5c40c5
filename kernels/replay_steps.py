"""What a recorded call does again, step by step (:mod:`vbcompile.kernels.replay`)."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vbcompile.compat_calls import empty_on_device, seen_as
from vbcompile.kernels.launches import Repeated

_ALIGNED = 512  # bytes, as PyTorch's allocator aligns


class Number:
    """Stands for the tensor of a number in recorded arguments."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def filled(argument: Any, tensors: Sequence[Any]) -> Any:
    """A recorded argument with its tensors."""
    if argument.__class__ is Number:
        return tensors[argument.number]
    if isinstance(argument, (tuple, list)):
        return [filled(a, tensors) for a in argument]
    return argument


def leaves(argument: Any) -> list[Any]:
    if isinstance(argument, (tuple, list)):
        return [leaf for a in argument for leaf in leaves(a)]
    return [argument]


def numbers(argument: Any) -> list[int]:
    return [leaf.number for leaf in leaves(argument) if leaf.__class__ is Number]


class Step:
    """One thing to do again: ``reads`` and ``makes`` are numbers of tensors, ``addresses`` of those read by address."""

    reads: Sequence[int] = ()
    makes: Sequence[int] = ()
    addresses: Sequence[int] = ()
    writes = False  # into a tensor that it did not make

    def run(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        raise NotImplementedError

    def written(self, constant: Callable[[Any], str]) -> list[str]:
        """The same as lines of Python.

        A tensor is ``t`` and its number there, its address ``a`` and that; all else is a name that ``constant`` gives.
        """
        raise NotImplementedError


def _written(argument: Any, constant: Callable[[Any], str]) -> str:
    """A recorded argument."""
    if argument.__class__ is Number:
        return f"t{argument.number}"
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(_written(a, constant) for a in argument)}]"
    return constant(argument)


class Allocate(Step):
    def __init__(self, number: int, like: Tensor, zero: bool) -> None:
        self.number, self.makes, self.zero = number, [number], zero
        self.size, self.strides = tuple(like.shape), like.stride()
        self.dtype, self.device = like.dtype, like.device
        self.bytes = like.untyped_storage().nbytes()
        self.empty = empty_on_device(like.device)

    def run(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        t = self.empty(self.size, self.strides, self.dtype)
        if self.zero:
            t.zero_()
        tensors[self.number], addresses[self.number] = t, t.data_ptr()

    def written(self, constant: Callable[[Any], str]) -> list[str]:
        t = f"t{self.number}"
        given = ", ".join(map(constant, (self.size, self.strides, self.dtype)))
        made = f"{t} = {constant(self.empty)}({given})"
        return [made, *([f"{t}.zero_()"] if self.zero else []), f"a{self.number} = {t}.data_ptr()"]


class AllocateTogether(Step):
    """One piece of memory for buffers that nothing but launches by address know."""

    def __init__(self, parts: Sequence[Allocate]) -> None:
        self.makes = [part.number for part in parts]
        *starts, total = accumulate((-(-part.bytes // _ALIGNED) * _ALIGNED for part in parts), initial=0)
        self.parts = [*zip(self.makes, starts, strict=True)]
        self.first, self.size, self.empty = self.makes[0], (total,), parts[0].empty

    def run(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        t = self.empty(self.size, (1,), torch.uint8)
        begin = t.data_ptr()
        tensors[self.first] = t
        for number, start in self.parts:
            addresses[number] = begin + start

    def written(self, constant: Callable[[Any], str]) -> list[str]:
        made = f"t{self.first} = {constant(self.empty)}({constant(self.size)}, (1,), {constant(torch.uint8)})"
        begin = f"begin = t{self.first}.data_ptr()"
        return [made, begin, *(f"a{number} = begin + {constant(start)}" for number, start in self.parts)]


class View(Step):
    """Memory of another tensor seen in another form."""

    def __init__(self, number: int, root: int, offset: int, like: Tensor) -> None:
        self.number, self.makes, self.root, self.reads = number, [number], root, [root]
        self.size, self.strides, self.offset = tuple(like.shape), like.stride(), offset // like.element_size()

    def run(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        tensors[self.number] = seen_as(tensors[self.root], self.size, self.strides, self.offset)

    def written(self, constant: Callable[[Any], str]) -> list[str]:
        form = ", ".join(map(constant, (self.size, self.strides, self.offset)))
        return [f"t{self.number} = {constant(seen_as)}(t{self.root}, {form})"]


class Call(Step):
    def __init__(self, function: Any, args: Any, kwargs: Any, results: Sequence[int | None], single: bool) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.results, self.single = results, single
        self.reads = numbers([*args, *kwargs.values()])
        self.makes = [r for r in results if r is not None]
        self.writes = function._schema.is_mutable

    def run(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        kwargs = {name: filled(value, tensors) for name, value in self.kwargs.items()}
        found = self.function(*[filled(a, tensors) for a in self.args], **kwargs)
        for number, t in zip(self.results, (found,) if self.single else found, strict=True):
            if number is not None:
                tensors[number], addresses[number] = t, t.data_ptr()

    def written(self, constant: Callable[[Any], str]) -> list[str]:
        given = [_written(a, constant) for a in self.args]
        given += [f"{name}={_written(value, constant)}" for name, value in self.kwargs.items()]
        results = ["_" if n is None else f"t{n}" for n in self.results]
        left = results[0] if self.single else f"[{', '.join(results)}]"
        addresses = [f"a{n} = t{n}.data_ptr()" for n in self.makes]
        return [f"{left} = {constant(self.function)}({', '.join(given)})", *addresses]


class Again(Step):
    """A function of :func:`each_time`."""

    writes = True

    def __init__(self, function: Callable[..., Tensor | None], numbers: Sequence[int], result: int | None) -> None:
        self.function, self.reads, self.number = function, numbers, result
        self.makes = [] if result is None else [result]

    def run(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        found = self.function(*[tensors[n] for n in self.reads])
        if found is not None and self.number is not None:
            tensors[self.number], addresses[self.number] = found, found.data_ptr()

    def written(self, constant: Callable[[Any], str]) -> list[str]:
        call = f"{constant(self.function)}({', '.join(f't{n}' for n in self.reads)})"
        return (
            [call]
            if self.number is None
            else [f"t{self.number} = {call}", f"a{self.number} = t{self.number}.data_ptr()"]
        )


class Launched(Step):
    writes = True

    def __init__(self, repeated: Repeated) -> None:
        self.repeated = repeated
        self.addresses = [place.root for place in repeated.places]

    def written(self, constant: Callable[[Any], str]) -> list[str]:
        return [self.repeated.written(constant)]


def together(steps: list[Step], results: Sequence[int | None]) -> list[Step]:
    """The steps with one allocation in the place of all that nothing but launches by address know."""
    if not all(step.repeated.direct for step in steps if isinstance(step, Launched)):
        return steps
    known = {*results, *(n for step in steps for n in step.reads)}
    parts = [s for s in steps if isinstance(s, Allocate) and not s.zero and s.number not in known]
    if len(parts) < 2:
        return steps
    return [AllocateTogether(parts), *(s for s in steps if s not in parts)]
