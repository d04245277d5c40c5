"""Our Triton kernels for Intel GPUs: what is chosen there, without assumptions of other vendors.

Compiling and running them by Intel's compiler is an opt-in job: ``tests/vendors/triton_intel``.
"""

import re
from contextlib import nullcontext

import pytest
import torch
from attention_forms import make_forms

from vbcompile.device_catalog import catalog_target
from vbcompile.doctor import list_kernels
from vbcompile.kernels import fp4_linear_triton
from vbcompile.kernels.attention_tuning import KERNELS, tile_config
from vbcompile.kernels.fp4_linear import choose, make_case
from vbcompile.kernels.registry import operator
from vbcompile.kernels.triton_target import on_device

ARCHITECTURES = ["pvc", "bmg"]
FORMS = make_forms(64, 64, 64, 64)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "dtype", "chosen"),
    [
        ("plain", torch.bfloat16, "xpu_flash"),
        ("causal", torch.float16, "xpu_flash"),
        ("plain", torch.float32, "triton"),
        ("bool_mask", torch.bfloat16, "triton"),
        ("bias", torch.bfloat16, "triton"),
        ("softcap", torch.bfloat16, "triton"),
        ("grouped", torch.bfloat16, "triton"),
        ("dropout", torch.bfloat16, "triton"),
    ],
)
def test_attention(arch, name, dtype, chosen):
    choice = operator("attention").choose(catalog_target(arch), FORMS[name].case(dtype))
    assert choice.implementation.name == chosen
    backward = operator("attention_backward").choose(catalog_target(arch), FORMS[name].case(dtype, needs=(True,) * 3))
    assert backward.implementation.name == chosen


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("m", "chosen"), [(1, "triton"), (64, "triton"), (4096, "triton_dequantize")])
def test_fp4_linear(arch, format_name, m, chosen):
    target = catalog_target(arch)
    layout = fp4_linear_triton.preferred_layout(target)
    choice = choose(target, make_case(torch.bfloat16, m, 4096, 4096, format_name, layout))
    assert choice.implementation.name == chosen


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_inline_assembly(arch):
    target = catalog_target(arch)
    layout = fp4_linear_triton.preferred_layout(target)
    for dtype in (torch.float16, torch.bfloat16):
        assert fp4_linear_triton.decoding(target, "nvfp4", layout, dtype)["ASM"] == 0
    assert target.compute_capability is None
    assert all(not tile_config(arch, kernel, 2, 64).tma for kernel in KERNELS)


def test_kernels_are_launched_on_the_tensors_card(monkeypatch):
    """Triton launches on the current device, here the first of two."""
    monkeypatch.setattr(torch.xpu, "current_device", lambda: 0)
    monkeypatch.setattr(torch.xpu, "device", lambda device: f"made current: {device}")
    assert on_device(torch.device("xpu", 1)) == "made current: xpu:1"
    assert isinstance(on_device(torch.device("xpu", 0)), nullcontext)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_matrix_of_kernels(arch):
    rows = {(r.operator, r.implementation): r.reason for r in list_kernels([arch])}
    assert (
        rows["attention", "triton"] == ""
        and rows["attention", "xpu_flash"] == ""
        and rows["fp4_linear", "triton"] == ""
    )
    assert rows["fp4_quantize", "triton"] == ""
    assert rows["attention", "hopper"] == "uses the instructions of Hopper (sm_90)"
    assert rows["fp4_linear", "triton_few"] == "written for NVIDIA's mma instruction"
    assert re.search("NVIDIA's FP8", rows["fp4_linear", "triton_fp8"])
