"""Private parts of PyTorch for symbolic sizes; tested as those of ``compat`` are."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def size_hint(size: Any) -> int:
    """A plain number for a size, without adding a guard for symbolic ones."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 4096


def count_hint(tensor: torch.Tensor) -> int:
    """Elements of a tensor, symbolic sizes by their hints."""
    return math.prod(map(size_hint, tensor.shape))


def bytes_hint(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, symbolic sizes by their hints."""
    return count_hint(tensor) * tensor.element_size()


def free_symbols_of(value: Any) -> set[Any]:
    """The symbols in the sizes, strides and offset of a fake tensor, or in a symbolic number."""
    from torch.fx.experimental.symbolic_shapes import free_symbols

    return set(free_symbols(value)) if isinstance(value, (torch.Tensor, torch.SymInt)) else set()


def symbol_of(value: Any) -> Any:
    """The symbol that a symbolic number is; None where it is an expression or no symbolic number."""
    expression = value.node.expr if isinstance(value, torch.SymInt) else None
    return expression if expression is not None and expression.is_symbol else None


def symbolic_operators(operands: Iterable[Any]) -> AbstractContextManager[Any]:
    """Within it, operators made of others run their Python forms where an operand's sizes or an operand is symbolic.

    Some C++ ones of PyTorch 2.11 take no symbolic size: ``F.linear`` of float16 on processors is one.
    """
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher() if any(map(_is_symbolic, operands)) else nullcontext()


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value._has_symbolic_sizes_strides
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
