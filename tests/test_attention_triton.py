"""The Triton attention kernels, interpreted on the CPU (or run on a GPU), against plain PyTorch in float64."""

import pytest
import torch
from attention_forms import FORMS, Form
from torch import Tensor

from vbcompile.kernels.attention import attention_backward_reference, attention_reference
from vbcompile.kernels.attention_triton import backward, forward, interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="needs an accelerator or TRITON_INTERPRET=1"
)
SEED = torch.tensor([0x1234_5678_9ABC], dtype=torch.int64)


def run(form: Form, dtype: torch.dtype):
    """Our results and gradients beside the reference's in ``dtype`` and in float64."""
    (q, k, v), captured = form.inputs(dtype)
    q, k, v, *captured = (t.to(DEVICE) for t in (q, k, v, *captured))
    seed = SEED.to(DEVICE)
    needs = [True] * (3 + len(captured))
    arguments = (form.scale, form.dropout_p, seed)
    text = form.function.dumps()
    out, lse = forward(q, k, v, captured, *arguments, form.function)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator).to(DEVICE, dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(DEVICE)
    ours = [out, lse, *backward(grad_out, grad_lse, q, k, v, captured, out, lse, *arguments, form.function, needs)]
    found = [ours]
    for kind in (dtype, torch.float64):
        inputs = [t.to(kind) for t in (q, k, v)]
        wide = [c.to(kind) if c.is_floating_point() else c for c in captured]
        result = attention_reference(*inputs, wide, *arguments, text)
        grads = attention_backward_reference(
            grad_out.to(kind), grad_lse.to(kind), *inputs, wide, *result, *arguments, text, needs
        )
        found.append(
            [*result, *(g if c.is_floating_point() else None for g, c in zip(grads, [*inputs, *wide], strict=True))]
        )
    return found


def error(value: Tensor, exact: Tensor) -> float:
    assert torch.equal(value.isnan(), exact.isnan())
    difference = (value.double() - exact).masked_fill(value.double() == exact, 0.0)
    return difference.nan_to_num().norm().item()


@pytest.mark.parametrize("name", FORMS)
def test_float32_is_as_exact_as_plain_pytorch(name):
    ours, plain, exact = run(FORMS[name], torch.float32)
    for n, (value, other, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        if truth is None:
            assert value is None
            continue
        assert value.shape == truth.shape
        floor = 1e-7 * truth.nan_to_num(posinf=0, neginf=0).norm().item()
        assert error(value, truth) <= 2 * error(other, truth) + floor, (n, error(value, truth), error(other, truth))


def test_output_memory_order():
    form = FORMS["rows_first"]
    (q, k, v), _ = form.inputs(torch.float32)
    out, _ = forward(*(t.to(DEVICE) for t in (q, k, v)), [], form.scale, 0.0, None, form.function)
    assert out.transpose(1, 2).is_contiguous()
