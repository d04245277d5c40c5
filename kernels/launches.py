"""Launches of Triton and Gluon kernels, and their repetition without Triton's work per call.

A kernel's own ``kernel[grid](...)`` looks at every argument of every call: type, divisibility by 16, equality to 1,
nested tuples. A launch whose arguments differ from an earlier one in nothing but addresses, each of the same alignment
to 16 bytes, runs the same compiled kernel; :class:`Repeated` keeps that kernel and fills in the addresses.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

VERIFIED_TRITON = ("3.6",)  # releases whose launchers are called directly

_this_thread = threading.local()  # .launcher: who launches in the place of this thread's launches


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Every launch passes here, so that recordings and tests see it."""
    launcher = getattr(_this_thread, "launcher", None)
    if launcher is None:
        kernel[grid](*arguments, **options)
    else:
        launcher(kernel, grid, arguments, options)


def launch_by(launcher: Callable[..., None] | None) -> None:
    """From now on ``launcher(kernel, grid, arguments, options)`` does this thread's launches; None ends it."""
    _this_thread.launcher = launcher


@dataclass(frozen=True)
class Place:
    """A tensor by where it lies: ``offset`` bytes behind the start of the tensor of number ``root``."""

    root: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self, tensors: Sequence[Any]) -> Tensor:
        """The tensor itself, given the one it lies in."""
        base = tensors[self.root]
        start = (base.storage_offset() * base.element_size() + self.offset) // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), start, self.shape, self.strides)


@dataclass(frozen=True)
class PlacedDescriptor:
    """A tensor descriptor whose tensor is known by its place."""

    place: Place
    original: Any  # without its tensor

    def descriptor(self, tensors: Sequence[Any]) -> Any:
        return replace(self.original, base=self.place.tensor(tensors))


def placed(argument: Any, place: Callable[[Tensor], Place]) -> Any:
    """An argument of a kernel with every tensor in it replaced by its place."""
    if isinstance(argument, Tensor):
        return place(argument)
    if isinstance(argument, (tuple, list)) and any(isinstance(a, (Tensor, tuple, list)) for a in argument):
        return type(argument)(placed(a, place) for a in argument)
    if hasattr(argument, "block_shape") and isinstance(getattr(argument, "base", None), Tensor):
        return PlacedDescriptor(place(argument.base), replace(argument, base=_Address(0, argument.base.dtype)))
    return argument


def _tensors_in(argument: Any, tensors: Sequence[Any]) -> Any:
    """Inverse of :func:`placed`."""
    if isinstance(argument, Place):
        return argument.tensor(tensors)
    if isinstance(argument, PlacedDescriptor):
        return argument.descriptor(tensors)
    if isinstance(argument, (tuple, list)):
        return type(argument)(_tensors_in(a, tensors) for a in argument)
    return argument


class Repeated:
    """One launch, to be repeated on tensors that lie elsewhere and are alike in all else.

    Attributes:
        places: of all tensors that it takes.
        direct: whether it needs nothing but their addresses.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any], compiled: Any
    ) -> None:
        """``arguments`` and ``options`` as :func:`placed` gives them; ``compiled``: what the launch returned."""
        self._kernel, self._grid = kernel, grid
        self._arguments, self._options = arguments, options
        self._compiled = _compiled(kernel, grid, arguments, options, compiled)
        self.places = [*_places((*arguments, *options.values()))]
        self.direct = self._compiled is not None

    def run(self, tensors: Any, addresses: Any, stream: int) -> None:
        """Launch on the current device.

        Args:
            tensors: by number; addresses: of each, a list where it is direct; stream: the current one, as the driver
                knows it.
        """
        if self._compiled is not None:
            self._compiled.run(addresses, stream)
            return
        options = {name: _tensors_in(value, tensors) for name, value in self._options.items()}
        self._kernel[self._grid](*_tensors_in(tuple(self._arguments), tensors), **options)

    def written(self, constant: Callable[[Any], str]) -> str:
        """The launch as a line of Python, without regard to profilers; ``constant`` gives values a name.

        The tensor of number 3 is ``t3`` there, its address ``a3``; the stream is ``stream``.
        """
        if self._compiled is not None:
            return self._compiled.written(constant)
        roots = {place.root for place in self.places}
        tensors, addresses = (f"{{{', '.join(f'{n}: {kind}{n}' for n in roots)}}}" for kind in "ta")
        return f"{constant(self.run)}({tensors}, {addresses}, stream)"


def _places(arguments: Sequence[Any]) -> list[Place]:
    found: list[Place] = []
    for a in arguments:
        if isinstance(a, Place):
            found.append(a)
        elif isinstance(a, (_TensorMap, PlacedDescriptor)):
            found.append(a.place)
        elif isinstance(a, (tuple, list)):
            found += _places(a)
    return found


# ----------------------------------------------------------------------------------- the launcher below Triton's
class _Address:
    """Stands where Triton's launcher wants a tensor and asks for nothing but its address."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class _Descriptor:
    """Stands where the launcher wants a tensor descriptor."""

    __slots__ = ("base", "padding", "shape", "strides")

    def __init__(self, base: _Address, shape: list[int], strides: list[int], padding: str) -> None:
        self.base, self.shape, self.strides, self.padding = base, shape, strides, padding


def _maker(argument: Any) -> Callable[[Sequence[int]], Any] | None:
    """What makes an argument from addresses; None for one that has none in it."""
    if isinstance(argument, _TensorMap):
        return argument
    if isinstance(argument, Place):
        root, offset = argument.root, argument.offset
        return lambda addresses: addresses[root] + offset
    if isinstance(argument, PlacedDescriptor):
        root, offset, dtype = argument.place.root, argument.place.offset, argument.place.dtype
        shape, strides, padding = argument.original.shape, argument.original.strides, argument.original.padding
        return lambda addresses: _Descriptor(_Address(addresses[root] + offset, dtype), shape, strides, padding)
    if isinstance(argument, (tuple, list)):
        makers = [_maker(a) for a in argument]
        if any(makers):
            parts = list(zip(argument, makers, strict=True))
            return lambda addresses: tuple([a if make is None else make(addresses) for a, make in parts])
    return None


class _TensorMap:
    """Makes a descriptor's argument, the driver's map of a tensor; kept by address: layers share the rest."""

    _MOST = 512

    def __init__(self, placed: PlacedDescriptor, metadata: Any) -> None:
        self.place = placed.place
        self._root, self._offset = placed.place.root, placed.place.offset
        self._descriptor, self._metadata = _maker(placed), metadata
        self._known: dict[int, Any] = {}
        shape = [*placed.original.shape]
        shape[-1] *= 2 if metadata["fp4_padded"] else 1
        self.after = (*shape, *placed.original.strides)  # the launcher wants them again

    def __call__(self, addresses: Sequence[int]) -> Any:
        address = addresses[self._root] + self._offset
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= self._MOST:
                self._known.clear()
            found = self._known[address] = self._make(addresses)
        return found

    def _make(self, addresses: Sequence[int]) -> Any:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        assert self._descriptor is not None
        return make_tensordesc_arg(self._descriptor(addresses), self._metadata)[0]


class _Compiled:
    """A compiled kernel, launched by its launcher."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], values: Sequence[Any]) -> None:
        self.compiled, self._given, self._launcher = compiled, values, compiled.run
        self._grid = (*grid, *(1,) * (3 - len(grid)))
        flags, no_scratch = (self._launcher.launch_cooperative_grid, self._launcher.launch_pdl), (None, None)
        self._middle = (compiled.function, *flags, *no_scratch, compiled.packed_metadata, None, None, None)
        self._launch, values = _without_descriptors(compiled, values)
        self._arguments = values = [*self._middle, *values]
        makers = {n: maker for n, v in enumerate(values) if (maker := _maker(v)) is not None}
        self._constants = [None if n in makers else v for n, v in enumerate(values)]
        whole = {n: v.root for n, v in enumerate(values) if isinstance(v, Place) and not v.offset}
        self._others = [(n, maker) for n, maker in makers.items() if n not in whole]
        # all arguments at once, out of the constants with the addresses behind them
        self._picked = itemgetter(*(whole[n] + len(values) if n in whole else n for n in range(len(values))))
        self._hooks = runtime_knobs()

    def run(self, addresses: list[int], stream: int) -> None:
        enter, leave = self._hooks.launch_enter_hook, self._hooks.launch_exit_hook
        if enter.calls or leave.calls:
            self._run_with_hooks(addresses, stream, enter, leave)
            return
        values = self._constants + addresses
        for n, make in self._others:
            values[n] = make(addresses)
        self._launch(*self._grid, stream, *self._picked(values))

    def written(self, constant: Callable[[Any], str]) -> str:
        arguments = [*map(constant, self._grid), "stream"]
        for value in self._arguments:
            make, places = _maker(value), _places([value])
            if isinstance(value, Place):
                arguments.append(f"a{value.root} + {constant(value.offset)}" if value.offset else f"a{value.root}")
            elif make is not None:
                addresses = ", ".join(f"{place.root}: a{place.root}" for place in places)
                arguments.append(f"{constant(make)}({{{addresses}}})")
            else:
                arguments.append(constant(value))
        return f"{constant(self._launch)}({', '.join(arguments)})"

    def _run_with_hooks(self, addresses: Sequence[int], stream: int, enter: Any, leave: Any) -> None:
        """As Triton launches where a profiler listens."""
        compiled = self.compiled
        values = [value if (make := _maker(value)) is None else make(addresses) for value in self._given]
        hooks = compiled.launch_metadata(self._grid, stream, *values), enter, leave
        self._launcher(*self._grid, stream, compiled.function, compiled.packed_metadata, *hooks, *values)


def _without_descriptors(compiled: Any, values: Sequence[Any]) -> tuple[Callable[..., None], list[Any]]:
    """What launches, and its arguments: where it can be, with maps made by us in the place of descriptors."""
    launch, kinds = compiled.run.launch, getattr(compiled.metadata, "tensordesc_meta", None) or []
    names = launch.__code__.co_freevars if inspect.isfunction(launch) else ()
    below = launch.__closure__[names.index("launcher")].cell_contents if "launcher" in names else None
    descriptors = [v for v in values if isinstance(v, PlacedDescriptor)]
    if below is None or len(kinds) != len(descriptors) or None in kinds:
        return launch, list(values)
    found: list[Any] = []
    remaining = iter(kinds)
    for value in values:
        if isinstance(value, PlacedDescriptor):
            made = _TensorMap(value, next(remaining))
            found += [made, *made.after]
        else:
            found.append(value)
    return below, found


def _compiled(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any], compiled: Any
) -> _Compiled | None:
    """The launch by NVIDIA's launcher; None where it takes more than that (other vendors, scratch memory)."""
    if compiled is None or not _verified():
        return None
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
        return None
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    launcher = compiled.run
    if not isinstance(launcher, CudaLauncher) or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    return _Compiled(compiled, grid, [given.get(p.name, p.default) for p in kernel.params])


@cache
def _verified() -> bool:
    if find_spec("triton") is None:
        return False
    import triton

    return triton.__version__.startswith(VERIFIED_TRITON)


@cache
def runtime_knobs() -> Any:
    """Triton's settings of launches; ``launch_enter_hook.calls`` and ``launch_exit_hook.calls`` are who listens."""
    from triton import knobs

    return knobs.runtime
