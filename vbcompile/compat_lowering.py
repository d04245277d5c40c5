"""Private parts of Inductor: our operators in its code are plain calls (:mod:`vbcompile.kernels.compiled_calls`)."""

import functools
import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from vbcompile.kernels.compiled_calls import TENSOR, place_of_call
from vbcompile.kernels.replay import takes


@functools.cache
def lower_to_plain_calls(name: str) -> None:
    """From now on Inductor's code calls the operator of that name without PyTorch's dispatcher, where all is fixed.

    What is there to be changed is Inductor's own way for operators that it does not know, its constraints on strides
    included; compiles that are none of ours, dynamic sizes and C++ wrappers keep that.
    """
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag
    from torch.utils import _pytree as pytree

    overload = getattr(torch.ops.vblackwell, name).default
    plain = _plain_call()
    if overload not in lowering.lowerings:
        tag = get_layout_constraint_tag(overload, with_default=True)
        lowering.make_fallback(overload, lowering.tag_to_layout_constraint(tag), warn=False)
    usual = lowering.lowerings[overload]

    def lowered(*args: Any, **kwargs: Any) -> Any:
        if not _is_ours():
            return usual(*args, **kwargs)
        return pytree.tree_map(_wrapped, plain.create(overload, *args, **kwargs))

    lowered._is_fallback_handler = True  # type: ignore[attr-defined]
    lowering.lowerings[overload] = lowered


def _is_ours() -> bool:
    """Whether Inductor compiles for our backend, and Python code."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

    from vbcompile.compat import InductorAttentionOff

    return isinstance(config.joint_custom_pre_pass, InductorAttentionOff) and not V.graph.cpp_wrapper


def _wrapped(value: Any) -> Any:
    from torch._inductor.ir import IRNode, TensorBox

    return TensorBox.create(value) if isinstance(value, IRNode) else value


@functools.cache
def _plain_call() -> Any:
    """The class of calls in Inductor's graph."""
    from torch._inductor.ir import FallbackKernel, IRNode

    class PlainCall(FallbackKernel):
        _place = ""

        def codegen(self, wrapper: Any) -> None:
            described = self._described()
            if described is not None:
                name = str(self.op_overload).split(".")[1]
                self._place = f"{name}_{hashlib.sha256(described.encode()).hexdigest()[:16]}"
                self.python_kernel_name = self._place
                wrapper.add_import_once(f"from {place_of_call.__module__} import {place_of_call.__name__}")
                call = described.partition("\n")[0]
                wrapper.add_import_once(f"{self._place} = {place_of_call.__name__}({name!r}, {call})")
            super().codegen(wrapper)

        def _described(self) -> str | None:
            """Everything that the call's place knows of it; its first line are the arguments without tensors."""
            tensors = self._tensors()
            arguments, named = self.unflatten_args(tensors, self.constant_args)
            named = {**self.kwargs, **named}
            if not tensors or not _is_literal((arguments, named), IRNode):
                return None
            if not all(takes(t.get_device()) and _is_fixed((*t.get_size(), *t.get_stride())) for t in tensors):
                return None
            layouts = [(t.get_device(), t.get_dtype(), *t.get_size(), -1, *t.get_stride()) for t in tensors]
            return f"{_without(arguments, IRNode)!r}, {_without(named, IRNode)!r}\n{layouts}"

        def _tensors(self) -> list[Any]:
            return list(self.inputs)

        def codegen_args(self) -> list[str]:
            return [t.codegen_reference() for t in self._tensors()] if self._place else super().codegen_args()

        def codegen_kwargs(self, skip_out: bool = False) -> list[str]:
            return [] if self._place else super().codegen_kwargs(skip_out)

    return PlainCall


def _is_fixed(numbers: Iterable[Any]) -> bool:
    return all(getattr(n, "is_Integer", isinstance(n, int)) for n in numbers)


def _is_literal(argument: Any, tensor: type) -> bool:
    """Whether an argument can be written down, its tensors aside."""
    if isinstance(argument, dict):
        return all(_is_literal(a, tensor) for a in argument.values())
    if isinstance(argument, (list, tuple)):
        return all(_is_literal(a, tensor) for a in argument)
    if type(argument) is float:
        return math.isfinite(argument)
    return argument is None or type(argument) in (bool, int, str) or isinstance(argument, tensor)


def _without(argument: Any, tensor: type) -> Any:
    if isinstance(argument, dict):
        return {key: _without(a, tensor) for key, a in argument.items()}
    if isinstance(argument, (list, tuple)):
        return type(argument)(_without(a, tensor) for a in argument)
    return TENSOR if isinstance(argument, tensor) else argument
