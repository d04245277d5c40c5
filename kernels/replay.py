"""Calls of operators, remembered: what the host decides for a call is decided once and done again from a list.

The first calls of an operator work out which implementation runs, its tiles, strides and arguments. All of that follows
from shapes, strides, dtypes, alignments and options, which are the key here; the second call of a key is recorded: its
launches (``launches.launch``) and every PyTorch operator that it calls, allocations among them. From the third on, that
list is run on the new tensors. A recording holds no tensor. What reads values on the host is never recorded.

An implementation takes part if all its launches pass through ``launches.launch``, it decides nothing by what is not in
the key, and it says so (``registry.Implementation.replays``).
"""

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vbcompile.compat_calls import current_stream, storage_identity
from vbcompile.kernels import launches
from vbcompile.kernels.launches import Place, Repeated
from vbcompile.kernels.replay_steps import (
    Again,
    Allocate,
    Call,
    Launched,
    Number,
    Step,
    View,
    leaves,
    together,
)
from vbcompile.kernels.triton_target import on_device

log = logging.getLogger(__name__)

R = TypeVar("R")

_MOST = 1024  # keys; the oldest go first
_known: dict[Hashable, "Recording | bool"] = {}  # False: seen once; True: not to be recorded
generation = [0]  # recordings of an earlier one are void
_writing = threading.Lock()
_this_thread = threading.local()  # .recorder: the one at work


def forget() -> None:
    """Drop all recordings: something that calls depend on has changed and is in no key."""
    with _writing:
        generation[0] += 1
        _known.clear()


def refuse() -> None:
    """Called within a call that is perhaps being recorded: it must not be."""
    recorder = getattr(_this_thread, "recorder", None)
    if recorder is not None:
        recorder.refused = True


def each_time(function: Callable[..., Tensor | None], *tensors: Tensor) -> Tensor | None:
    """``function(*tensors)``, which a repeated call does again: for what depends on more than the key.

    The tensors are ones that the call was given or made. What the function does is not recorded; its result is a tensor
    that is alike every time, at an address that is a multiple of 16 bytes.
    """
    recorder = getattr(_this_thread, "recorder", None)
    if recorder is None:
        return function(*tensors)
    found: Tensor | None = recorder.each_time(function, tensors)
    return found


def takes(device: torch.device) -> bool:
    """Whether calls on a device are remembered: where our kernels run and the host is the slower one."""
    return device.type == "cuda" and torch.version.hip is None


def remembered(name: Hashable, static: Hashable, tensors: Sequence[Tensor | None], run: Callable[[], R]) -> R:
    """``run()``, or what it did when it was called with the like.

    Args:
        name: of the operator.
        static: everything but tensors that the call depends on, options included.
        tensors: everything that ``run`` reads or writes, all on one device; their values decide nothing on the host.
        run: gives a tensor, None, or a tuple or list of such.
    """
    first = tensors[0]
    assert first is not None
    if not takes(first.device) or getattr(_this_thread, "recorder", None) is not None:
        return _checked(run(), tensors)
    addresses = _addresses(tensors)
    key = _key(name, static, tensors, addresses)
    known = _known.get(key)
    if known.__class__ is Recording:
        return known.run(tensors, addresses)  # type: ignore[union-attr]
    if known is True:
        return _checked(run(), tensors)
    if known is None:
        result = _checked(run(), tensors)
        _remember(key, False)
        return result
    recorder = _Recorder(tensors)
    result = _checked(recorder.record(run), tensors)
    _remember(key, recorder.recording(result) or True)
    return result


def recording_of(name: Hashable, static: Hashable, tensors: Sequence[Tensor | None]) -> "Recording | None":
    """What a call of :func:`remembered` with these arguments would do again, where it knows that and tensors differ."""
    first = tensors[0]
    assert first is not None
    if not takes(first.device) or _given_twice(addresses := _addresses(tensors)):
        return None
    known = _known.get(_key(name, static, tensors, addresses))
    return known if isinstance(known, Recording) else None


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [-n if t is None else t.data_ptr() for n, t in enumerate(tensors)]


def _given_twice(addresses: Sequence[int]) -> bool:
    return len(set(addresses)) < len(addresses)


def _key(
    name: Hashable, static: Hashable, tensors: Sequence[Tensor | None], addresses: Sequence[int]
) -> tuple[Hashable, ...]:
    described = [
        None if t is None else (t.shape, t.stride(), t.dtype, address & 15, t.get_device())
        for t, address in zip(tensors, addresses, strict=True)
    ]
    key = (name, static, generation[0], *described)
    return (*key, _equal_ones(tensors)) if _given_twice(addresses) else key


def _checked(result: R, tensors: Sequence[Tensor | None]) -> R:
    """The results of an operator, none of which may share memory with another or with an argument."""
    results: Sequence[Any] = result if isinstance(result, (tuple, list)) else [result]
    found = [storage_identity(t) for t in results if t is not None]
    given = {storage_identity(t) for t in tensors if t is not None}
    if len(set(found)) < len(found) or not given.isdisjoint(found):
        raise RuntimeError("every result of an operator must lie in memory of its own")
    return result


def _equal_ones(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """For each tensor the first number under which the same one is given."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(t), n) for n, t in enumerate(tensors))


def _remember(key: Hashable, what: "Recording | bool") -> None:
    with _writing:
        while len(_known) >= _MOST:
            del _known[next(iter(_known))]
        _known[key] = what


# ------------------------------------------------------------------------------------------------- recording
_aten = torch.ops.aten
_ALLOCATE = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_ZEROS = {_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default}
_MOVES_STORAGE = {_aten.as_strided, _aten.as_strided_, _aten.set_, _aten.resize_}  # or names a place in it
_SEED_ON_HOST = {  # give the seed of a dropout that is off
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
}
_READ_ON_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Unknown(Exception):
    """Something was done that cannot be done again from a list, or with a tensor that nobody saw being made."""


class _Recorder(TorchDispatchMode):
    """Listens to one call."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.refused = self._inside = False
        self._count = len(inputs)
        self._inputs = len(inputs)
        self._kept: list[Any] = []  # so that no other object gets the id of one that is known
        self._number: dict[int, int] = {}  # by id
        self._root: dict[int, tuple[int, int]] = {}  # number -> number of the tensor that it is a view of, bytes
        self._first: dict[int, Tensor] = {}  # tensors that are no views, by number
        self._steps: list[Step] = []
        self._device = next(t.device for t in inputs if t is not None)
        for n, t in enumerate(inputs):
            if t is not None and id(t) not in self._number:
                self._number[id(t)], self._root[n], self._first[n] = n, (n, 0), t
        self._kept.extend(inputs)

    def record(self, run: Callable[[], R]) -> R:
        """``run()``, listened to on this thread."""
        _this_thread.recorder = self
        launches.launch_by(self._launch)
        try:
            with self:
                return run()
        finally:
            launches.launch_by(None)
            _this_thread.recorder = None

    def _launch(self, kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
        outermost = not self._inside  # an operator's own launches are done again by the operator
        self._inside = True
        try:
            compiled = kernel[grid](*arguments, **options)
        finally:
            self._inside = not outermost
        if outermost:
            self._note(self._launched, kernel, grid, arguments, options, compiled)

    def _note(self, note: Callable[..., Any], *happened: Any) -> Any:
        """What has run is right whether it can be noted or not."""
        if self.refused:
            return None
        try:
            return note(*happened)
        except _Unknown:
            self.refused = True
        except Exception as error:  # noqa: BLE001 - reported
            self.refused = True
            log.warning("a call is not remembered: %s: %s", type(error).__name__, error)
        return None

    def _launched(self, kernel: Any, grid: Any, arguments: Any, options: dict[str, Any], compiled: Any) -> None:
        given = [launches.placed(a, self._place) for a in arguments]
        named = {name: launches.placed(a, self._place) for name, a in options.items()}
        self._steps.append(Launched(Repeated(kernel, grid, given, named, compiled)))

    def each_time(self, function: Callable[..., Tensor | None], given: Sequence[Tensor]) -> Tensor | None:
        """The result; the call becomes a step."""
        outermost, self._inside = not self._inside, True
        try:
            found = function(*given)
        finally:
            self._inside = not outermost
        if self.refused or self._inside:
            return found
        if any(id(t) not in self._number for t in given):
            self.refused = True
            return found
        numbers = [self._number[id(t)] for t in given]
        self._steps.append(Again(function, numbers, None if found is None else self._new(found)))
        return found

    def _place(self, t: Tensor) -> Place:
        if id(t) not in self._number:
            raise _Unknown
        root, offset = self._root[self._number[id(t)]]
        return Place(root, offset, t.dtype, tuple(t.shape), t.stride())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        self._inside = True
        try:
            found = func(*args, **kwargs)
        finally:
            self._inside = False
        self._note(self._called, func, args, kwargs, found)
        return found

    def _called(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        given = [t for t in leaves([*args, *kwargs.values()]) if isinstance(t, Tensor)]
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        made = [t for t in results if isinstance(t, Tensor)]
        if (
            _READ_ON_HOST.intersection(func.tags)
            or func.overloadpacket in _MOVES_STORAGE
            or any(id(t) not in self._number for t in given)
            or any(isinstance(r, (tuple, list)) for r in results)
            or any(t.device != self._device for t in given)
            or (any(t.device != self._device for t in made) and func not in _SEED_ON_HOST)
        ):
            raise _Unknown
        if func in _ALLOCATE or func in _ZEROS:
            self._steps.append(Allocate(self._new(found), found, func in _ZEROS))
            return
        if not func._schema.is_mutable and all(id(t) in self._number for t in made):
            return  # it gave back what it got
        if func._schema._is_view_op() and len(made) == 1 and self._view(made[0], given[0]):
            return
        known = [isinstance(r, Tensor) and r.device == self._device for r in results]
        numbers = [self._result(r, given) if k else None for r, k in zip(results, known, strict=True)]
        arguments = [self._numbered(a) for a in args]
        named = {name: self._numbered(a) for name, a in kwargs.items()}
        single = not isinstance(found, (tuple, list))
        self._steps.append(Call(func, arguments, named, numbers, single))

    def _numbered(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return Number(self._number[id(argument)])
        if isinstance(argument, (tuple, list)):
            return [self._numbered(a) for a in argument]
        return argument

    def _new(self, t: Tensor, root: tuple[int, int] | None = None) -> int:
        number, self._count = self._count, self._count + 1
        self._number[id(t)], self._root[number] = number, root or (number, 0)
        if root is None:
            self._first[number] = t
        self._kept.append(t)
        return number

    def _view(self, t: Tensor, base: Tensor) -> bool:
        """Note that an operator gave a view; False where it gave anything else, or one of another dtype."""
        if storage_identity(t) != storage_identity(base) or t.dtype != self._first[self._at_root(base)].dtype:
            return False
        form, base_form = (t.shape, t.stride(), t.storage_offset()), (base.shape, base.stride(), base.storage_offset())
        if form == base_form and base.dtype == t.dtype:
            self._number[id(t)] = self._number[id(base)]
            self._kept.append(t)
            return True
        number = self._result(t, [base])
        self._steps.append(View(number, *self._root[number], t))
        return True

    def _result(self, t: Tensor, given: Sequence[Tensor]) -> int:
        """The number of a result: a new one, unless it is an argument."""
        if id(t) in self._number:
            return self._number[id(t)]
        for a in given:
            if storage_identity(a) == storage_identity(t):
                root, offset = self._root[self._number[id(a)]]
                moved = int(t.storage_offset()) * t.element_size() - int(a.storage_offset()) * a.element_size()
                return self._new(t, (root, offset + moved))
        return self._new(t)

    def recording(self, result: Any) -> "Recording | None":
        """What was recorded; None where it cannot be repeated."""
        return self._note(self._recording, result)

    def _recording(self, result: Any) -> "Recording":
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if any(r is not None and id(r) not in self._number for r in results):
            raise _Unknown
        numbers = [None if r is None else self._number[id(r)] for r in results]
        for place, t in enumerate(results):
            self._make_as_result(numbers, place, t)
        form = type(result) if isinstance(result, (tuple, list)) else None
        steps = together(self._needed(numbers), numbers)
        return Recording(steps, self._count - self._inputs, numbers, form, self._device)

    def _make_as_result(self, numbers: list[int | None], place: int, t: Tensor | None) -> None:
        """Where a result is all of an allocation seen in another form, allocate it in that form at once."""
        number = numbers[place]
        if number is None or t is None or self._root[number][0] == number:
            return
        root, offset = self._root[number]
        made = next((s for s in self._steps if isinstance(s, Allocate) and s.number == root), None)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        if made is None or offset or extent * t.element_size() != made.bytes or t.dtype != made.dtype:
            return
        others = [*numbers[:place], root, *numbers[place + 1 :]]
        read = {n for step in self._needed(others) for n in step.reads}
        roots = [None if n is None else self._root[n][0] for n in others]
        if any(self._root[n][0] == root for n in read) or roots.count(root) > 1:
            return
        numbers[place] = root
        made.size, made.strides = tuple(t.shape), t.stride()

    def _at_root(self, t: Tensor) -> int:
        return self._root[self._number[id(t)]][0]

    def _needed(self, results: Sequence[int | None]) -> list[Step]:
        """The steps without which a result or a launch would not be the same."""
        by_value: set[int | None] = set(results)
        by_address: set[int] = set()
        kept: list[Step] = []
        for step in reversed(self._steps):
            if step.writes or by_value.intersection(step.makes) or by_address.intersection(step.makes):
                kept.append(step)
                by_value.update(step.reads)
                by_address.update(step.addresses)
        return kept[::-1]


class Recording:
    """A call, to be done again on tensors that are alike."""

    def __init__(
        self, steps: Sequence[Step], makes: int, results: Sequence[int | None], form: Any, device: torch.device
    ) -> None:
        self._steps, self._results, self._form, self._device = tuple(steps), tuple(results), form, device
        self._runs = [step.repeated.run if isinstance(step, Launched) else step.run for step in steps]
        self._nothing, self._zeros = [None] * makes, [0] * makes
        self._generation = generation[0]

    def run(self, inputs: Sequence[Tensor | None], addresses: Sequence[int]) -> Any:
        """The call's results; ``addresses`` those of the inputs."""
        tensors, found = [*inputs, *self._nothing], [*addresses, *self._zeros]
        with on_device(self._device):
            stream = current_stream(self._device)
            for run in self._runs:
                run(tensors, found, stream)
        results = [None if n is None else tensors[n] for n in self._results]
        return results[0] if self._form is None else self._form(results)

    def as_function(self, inputs: Sequence[int], otherwise: Callable[..., Any]) -> Callable[..., Any]:
        """The same as a Python function of tensors, on the current device.

        Most of what a list of steps costs the host is the list.

        Args:
            inputs: the numbers of the tensors, which are all that were given.
            otherwise: called in the function's place where recordings are void, a profiler listens to launches, or an
                address is not a multiple of 16.
        """
        names: dict[str, Any] = {"otherwise": otherwise, "generation": generation, "age": self._generation}
        changed = "generation[0] != age"
        if any(isinstance(step, Launched) and step.repeated.direct for step in self._steps):
            names["knobs"] = launches.runtime_knobs()
            changed += " or knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls"

        def constant(value: Any) -> str:
            name = f"c{len(names)}"
            names[name] = value
            return name

        tensors = ", ".join(f"t{n}" for n in inputs)
        results = ", ".join("None" if n is None else f"t{n}" for n in self._results)
        lines = [
            f"if {changed}:",
            f"    return otherwise({tensors})",
            *(f"a{n} = t{n}.data_ptr()" for n in inputs),
            f"if ({' | '.join(f'a{n}' for n in inputs)}) & 15:",
            f"    return otherwise({tensors})",
            f"stream = {constant(current_stream)}({constant(self._device)})",
            *(line for step in self._steps for line in step.written(constant)),
            f"return {results}" if self._form is None else f"return {constant(self._form)}([{results}])",
        ]
        exec(_code("\n    ".join([f"def call({tensors}):", *lines])), names)
        found: Callable[..., Any] = names["call"]
        return found


@lru_cache(maxsize=256)
def _code(text: str) -> Any:
    """Recordings of other sizes have the same text."""
    return compile(text, "<recording>", "exec")
