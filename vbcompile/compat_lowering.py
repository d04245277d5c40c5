"""Private parts of Inductor: operators in its code as calls of Python functions, without PyTorch's dispatcher."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from vbcompile.compat import InductorAttentionOff


@functools.cache
def lower_to_calls(
    overload: Any, place: Callable[..., Any], tensor: Any, takes: Callable[[torch.device], bool]
) -> None:
    """From now on, in code that Inductor makes for our backend, an operator is a call of what ``place`` gives.

    ``place(name, arguments, named, varying)`` is called once when the code is loaded, with the operator's name, its
    arguments, ``tensor`` for each tensor, and which tensors have sizes or strides that are not fixed; the code calls
    what comes of it with the tensors, in order. What is changed is Inductor's own way for operators that it does not
    know; its constraints on strides stay. Other compiles, devices that ``takes`` does not take, and C++ wrappers keep
    that way.
    """
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag

    if overload not in lowering.lowerings:
        tag = get_layout_constraint_tag(overload, with_default=True)
        lowering.make_fallback(overload, lowering.tag_to_layout_constraint(tag), warn=False)
    usual, call = lowering.lowerings[overload], _call_class(place, tensor, takes)

    def lowered(*args: Any, **kwargs: Any) -> Any:
        if not _is_ours():
            return usual(*args, **kwargs)
        return pytree.tree_map(_boxed, call.create(overload, *args, **kwargs))

    lowered._is_fallback_handler = True  # type: ignore[attr-defined]
    lowering.lowerings[overload] = lowered


def _is_ours() -> bool:
    """Whether Inductor compiles for our backend, and Python code."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

    return isinstance(config.joint_custom_pre_pass, InductorAttentionOff) and not V.graph.cpp_wrapper


def _boxed(value: Any) -> Any:
    from torch._inductor.ir import IRNode, TensorBox

    return TensorBox.create(value) if isinstance(value, IRNode) else value


@functools.cache
def _call_class(place: Callable[..., Any], tensor: Any, takes: Callable[[torch.device], bool]) -> Any:
    """The class of such calls in Inductor's graph."""
    from torch._inductor.ir import FallbackKernel, IRNode

    class Call(FallbackKernel):
        _place = ""  # the name of what is called

        def codegen(self, wrapper: Any) -> None:
            described = self._described()
            if described is not None:
                name = str(self.op_overload).split(".")[1]
                # places whose arguments are alike in all but addresses are one
                self._place = f"{name}_{hashlib.sha256(described.encode()).hexdigest()[:16]}"
                self.python_kernel_name = self._place
                wrapper.add_import_once(f"from {place.__module__} import {place.__name__}")
                arguments = described.partition("\n")[0]
                wrapper.add_import_once(f"{self._place} = {place.__name__}({name!r}, {arguments})")
            super().codegen(wrapper)

        def _described(self) -> str | None:
            """Everything that is fixed at the place; its first line are the arguments without tensors."""
            tensors = self._tensors()
            arguments, named = self.unflatten_args(tensors, self.constant_args)
            named = {**self.kwargs, **named}
            leaves = pytree.tree_leaves((arguments, named))
            if not tensors or not all(isinstance(a, IRNode) or _is_literal(a) for a in leaves):
                return None
            if not all(takes(t.get_device()) for t in tensors):
                return None
            forms = [(*t.get_size(), -1, *t.get_stride()) for t in tensors]
            varying = [n for n, form in enumerate(forms) if not _is_fixed(form)]
            layouts = [(t.get_device(), t.get_dtype(), *form) for t, form in zip(tensors, forms, strict=True)]
            arguments, named = pytree.tree_map_only(IRNode, lambda _: tensor, (arguments, named))
            return f"{arguments!r}, {named!r}, {varying}\n{layouts}"

        def _tensors(self) -> list[Any]:
            return list(self.inputs)

        def codegen_args(self) -> list[str]:
            return [t.codegen_reference() for t in self._tensors()] if self._place else super().codegen_args()

        def codegen_kwargs(self, skip_out: bool = False) -> list[str]:
            return [] if self._place else super().codegen_kwargs(skip_out)

    return Call


def _is_fixed(numbers: Iterable[Any]) -> bool:
    return all(getattr(n, "is_Integer", isinstance(n, int)) for n in numbers)


def _is_literal(argument: Any) -> bool:
    """Whether an argument can be written down."""
    if type(argument) is float:
        return math.isfinite(argument)
    return argument is None or type(argument) in (bool, int, str)
