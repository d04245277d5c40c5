"""Errors of the Triton attention kernels, and those that eager PyTorch makes, against float64."""

from collections.abc import Callable, Sequence

import torch
from attention_forms import Form, eager
from torch import Tensor

from vbcompile.kernels.attention import attention_backward_reference, attention_reference
from vbcompile.kernels.attention_gpu import triton_backward, triton_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([0x1234_5678_9ABC], dtype=torch.int64)


def compare(
    form: Form,
    dtype: torch.dtype,
    seeds: Sequence[int] = (0,),
    run: tuple[Callable, Callable] = (triton_forward, triton_backward),
    captured_gradients: bool = True,
) -> list[tuple[str, float, float]]:
    """``(name, error, allowed error)`` of outputs and gradients: twice that of eager PyTorch in the same dtype.

    ``run``: implementations of ``vblackwell::attention`` and of its backward. Errors are root mean squares over the
    seeds: the error of one number, such as a temperature's gradient, is chance.
    """
    found = [_compare(form, dtype, seed, run, captured_gradients) for seed in seeds]
    return [
        (rows[0][0], *(sum(row[n] ** 2 for row in rows) ** 0.5 / len(rows) ** 0.5 for n in (1, 2)))
        for rows in zip(*found, strict=True)
    ]


def compare_forward(
    form: Form, dtype: torch.dtype, run: Callable, seeds: Sequence[int]
) -> list[tuple[str, float, float]]:
    """As :func:`compare`, the outputs alone, of an implementation of ``vblackwell::attention``."""
    totals = {"out": [0.0, 0.0], "lse": [0.0, 0.0]}
    for seed in seeds:
        (q, k, v), captured = form.inputs(dtype, seed)
        q, k, v, *captured = (t.to(DEVICE) for t in (q, k, v, *captured))
        arguments = (form.scale, form.dropout_p, SEED.to(DEVICE), form.function.dumps())
        wide = [t.double() if t.is_floating_point() else t for t in (q, k, v, *captured)]
        exact = attention_reference(*wide[:3], wide[3:], *arguments)
        plain = eager(form, q, k, v, captured, SEED.to(DEVICE))
        ours = run(q, k, v, captured, *arguments)
        for (name, total), value, other, truth in zip(totals.items(), ours, plain, exact, strict=True):
            assert value.shape == truth.shape and torch.equal(value.isnan(), truth.isnan()), name
            rounding = torch.finfo(torch.float32).eps * truth.nan_to_num(posinf=0, neginf=0).norm().item()
            total[0] += _error(value, truth) ** 2
            total[1] += (2 * _error(other, truth) + rounding) ** 2
    return [(name, ours**0.5, allowed**0.5) for name, (ours, allowed) in totals.items()]


def _compare(
    form: Form, dtype: torch.dtype, seed: int, run: tuple[Callable, Callable], captured_gradients: bool
) -> list[tuple[str, float, float]]:
    forward, backward = run
    (q, k, v), captured = form.inputs(dtype, seed)
    q, k, v, *captured = (t.to(DEVICE) for t in (q, k, v, *captured))
    arguments = (form.scale, form.dropout_p, SEED.to(DEVICE), form.function.dumps())
    inputs = [q, k, v, *captured]
    needs = [t.is_floating_point() and (n < 3 or captured_gradients) for n, t in enumerate(inputs)]
    out, lse = forward(q, k, v, captured, *arguments)
    generator = torch.Generator().manual_seed(1000 + seed)
    grad_out = torch.randn(out.shape, generator=generator).to(DEVICE, dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(DEVICE)
    ours = [out, lse, *backward(grad_out, grad_lse, q, k, v, captured, out, lse, *arguments, needs)]
    exact = _exact(form, inputs, grad_out, grad_lse, needs)
    plain = _plain(form, inputs, grad_out, grad_lse, needs)
    names = ["out", "lse", "grad_q", "grad_k", "grad_v", *(f"grad_captured_{n}" for n in range(len(captured)))]
    rows = []
    for name, value, other, truth in zip(names, ours, plain, exact, strict=True):
        if truth is None:
            assert value is None
            continue
        assert value.shape == truth.shape
        assert torch.equal(value.isnan(), truth.isnan()), name
        terms = out.numel() // value.numel() if name.startswith("grad_captured") else 1  # summed, roughly
        rounding = (
            max(1, terms) ** 0.5 * torch.finfo(torch.float32).eps * truth.nan_to_num(posinf=0, neginf=0).norm().item()
        )
        rows.append((name, _error(value, truth), 2 * _error(other, truth) + rounding))
    return rows


def _exact(form: Form, inputs: list[Tensor], grad_out: Tensor, grad_lse: Tensor, needs: list[bool]):
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    arguments = (form.scale, form.dropout_p, SEED.to(DEVICE), form.function.dumps())
    result = attention_reference(*wide[:3], wide[3:], *arguments)
    grads = attention_backward_reference(
        grad_out.double(), grad_lse.double(), *wide[:3], wide[3:], *result, *arguments, needs
    )
    return [*result, *grads]


def _plain(form: Form, inputs: list[Tensor], grad_out: Tensor, grad_lse: Tensor, needs: list[bool]):
    leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    result = eager(form, *leaves[:3], leaves[3:], SEED.to(DEVICE))
    torch.autograd.backward(result, [grad_out, grad_lse])
    return [*(t.detach() for t in result), *(t.grad for t in leaves)]


def _error(value: Tensor, exact: Tensor) -> float:
    difference = (value.double() - exact.double()).masked_fill(value.double() == exact.double(), 0.0)
    return difference.nan_to_num().norm().item()
