"""Triton's interpreter replaces the functions of its language whenever one kernel function calls another.

That is a quarter of the time that our kernels take there. Here it does so once a launch.
"""

import functools
import inspect
from collections.abc import Callable

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _languages(function: Callable) -> frozenset[str]:
    """Which of the language's modules a kernel function sees."""
    found = [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
    return frozenset(module.__name__ for module in found)


def replace_once_a_launch() -> None:
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
