"""The launches of causal attention, forward, backward and decode, recorded for an architecture that is not here."""

from unittest.mock import patch

import torch
from attention_forms import causal, make_function
from triton_aot import Launch

from vbcompile.kernels import attention_problem, attention_triton

FUNCTION = make_function(mask=causal())


def record_launches(
    arch: str,
    head_size: int,
    dtype: torch.dtype,
    backward: bool = True,
    value_size: int | None = None,
    length: int = 512,
) -> list[Launch]:
    """What one forward, its backward if wanted, and decoding steps of 1 and 16 queries launch on ``arch``."""
    launches: list[Launch] = []
    q, k, v = (torch.empty(1, 2, length, size, dtype=dtype) for size in (head_size, head_size, value_size or head_size))
    arguments = (0.1, 0.0, None, FUNCTION)
    with patch.multiple(
        attention_problem,
        launch=lambda kernel, grid, *a, **options: launches.append(Launch(kernel, a, options)),
        arch_of=lambda t: arch,
    ):
        out, lse = attention_triton.forward(q, k, v, [], *arguments)
        if backward:
            attention_triton.backward(out, None, q, k, v, [], out, lse, *arguments, [True] * 3)
        for queries in (1, 16):
            attention_triton.forward(q[:, :, :queries], k, v, [], *arguments)
    return launches
