"""Private parts of PyTorch for function transforms (``vmap``, ``jvp``); tested as those of ``compat`` are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad


@contextmanager
def no_transform_left() -> Iterator[None]:
    """End the transforms that begin inside and are not ended there, as after an exception between the two."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def is_forward_differentiated() -> bool:
    """Whether tangents are carried along with values here; Dynamo compiles anew where that changes."""
    return forward_ad._current_level >= 0


def has_tangent(value: Any) -> bool:
    """Whether a tensor, or one in a list, carries a tangent."""
    if isinstance(value, (list, tuple)):
        return any(map(has_tangent, value))
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None
