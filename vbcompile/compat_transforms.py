"""Private parts of PyTorch for function transforms (``vmap``); tested as those of ``compat`` are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_transform_left() -> Iterator[None]:
    """End the transforms that begin inside and are not ended there, as after an exception between the two."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
