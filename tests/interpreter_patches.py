"""What Triton's interpreter does beside computing; most of the time that our kernels take there."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.core import constexpr, validate_block_shape
from triton.runtime import interpreter


@functools.cache
def quicken() -> None:
    """Let kernels be interpreted several times faster, with the same numbers."""
    _replace_once_a_launch()
    _make_types_once()
    # Every sum and product of integers is computed again in 64 bits; compiled kernels check nothing either.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@functools.cache
def _languages(function: Callable) -> frozenset[str]:
    """Which of the language's modules a kernel function sees."""
    found = [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
    return frozenset(module.__name__ for module in found)


def _replace_once_a_launch() -> None:
    """The interpreter replaces the functions of its language whenever one kernel function calls another."""
    replace, replaced = interpreter._patch_lang, set()

    def replace_new(function: Callable) -> interpreter._LangPatchScope | None:
        """For a launch, the scope that it ends itself; within one, whatever its kernel did not see yet."""
        if replaced and _languages(function) <= replaced:
            return None
        scope = replace(function)
        replaced.update(_languages(function))
        restore = scope.restore

        def end() -> None:
            replaced.clear()
            restore()

        scope.restore = end
        return scope

    interpreter._patch_lang = replace_new


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[tl.tuple, tl.tuple, int]:
    """A shape of numbers, the same of compile-time constants, and the number of elements."""
    constants = tl.tuple([constexpr(size) for size in sizes])
    return tl.tuple(sizes), constants, validate_block_shape(sizes) if sizes else 1


def _make_types_once() -> None:
    """Each value makes its type, and that several tuples of constants with types of their own."""

    def block_type(self: Any, element_ty: tl.dtype, shape: Sequence[Any]) -> None:
        sizes = tuple(size.value if isinstance(size, constexpr) else size for size in shape)
        if not sizes:
            raise TypeError("0d block_type is forbidden")
        self.element_ty = element_ty
        self.shape, _, self.numel = _shape(sizes)
        self.name = f"<{sizes}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, count = _shape(tuple(type.shape) if type.is_block() else ())
        self.numel = constexpr(count)

    numpy_type, known = interpreter._get_np_dtype, {}

    def numpy_type_of(triton_type: tl.dtype) -> np.dtype:
        scalar = triton_type.scalar
        if scalar.is_ptr():
            return np.dtype(np.uint64)
        if scalar.name not in known:
            known[scalar.name] = numpy_type(scalar)
        return known[scalar.name]

    tl.core.block_type.__init__, tl.core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = numpy_type_of
