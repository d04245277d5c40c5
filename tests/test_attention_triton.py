"""The Triton attention kernels against plain PyTorch in float64: interpreted on the CPU, or run on a GPU.

On a CPU the module needs ``TRITON_INTERPRET=1`` in the environment before Triton is imported.
"""

import pytest
import torch
from attention_compare import DEVICE, compare
from attention_forms import Form, make_forms

from vbcompile.kernels import attention_problem
from vbcompile.kernels.attention_triton import forward
from vbcompile.kernels.triton_target import interpreted

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="needs an accelerator or TRITON_INTERPRET=1"
)
FORMS = make_forms(21, 39, 16, 16)
FEW_QUERIES = make_forms(6, 71, 16, 24)
ODD_SIZES = make_forms(19, 23, 20, 33)


def check(form: Form, dtype: torch.dtype) -> None:
    wrong = [row for row in compare(form, dtype) if not row[1] <= row[2]]
    assert not wrong, f"(name, error, allowed): {wrong}"


@pytest.mark.parametrize("name", FORMS)
def test_float32(name):
    check(FORMS[name], torch.float32)


@pytest.mark.parametrize("name", ["causal", "bias", "softcap", "sink", "grouped", "dropout"])
def test_float16(name):
    check(ODD_SIZES[name], torch.float16)


@pytest.mark.parametrize("name", ["document_causal", "bool_mask", "key_padding", "static_cache"])
def test_summary_of_opaque_masks(name, monkeypatch):
    monkeypatch.setattr(attention_problem, "SUMMARY_TILES", 1)
    check(FORMS[name], torch.float32)


@pytest.mark.parametrize(
    "name",
    ["causal_bottom_right", "causal_empty_rows", "static_cache", "lengths", "bias", "sink", "grouped", "four_axes"],
)
def test_few_queries_split_the_keys(name):
    check(FEW_QUERIES[name], torch.float32)


def test_output_memory_order():
    form = ODD_SIZES["rows_first"]
    (q, k, v), _ = form.inputs(torch.float32)
    out, _ = forward(*(t.to(DEVICE) for t in (q, k, v)), [], form.scale, 0.0, None, form.function)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["temperature", "bias", "sink"])
def test_deterministic_backward_is_right(name):
    torch.use_deterministic_algorithms(True)
    try:
        check(ODD_SIZES[name], torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
