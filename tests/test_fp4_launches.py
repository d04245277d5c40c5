"""Repeated FP4 products pass on what Triton's own launches pass on, byte for byte; a stub stands for the driver."""

import shutil

import pytest
import torch

from tests.stub_driver import compare_repeats, stub_driver
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import fp4_linear as logical
from vbcompile.kernels import fp4_linear_few, fp4_linear_hopper, fp4_linear_triton, registry
from vbcompile.kernels.compiled_calls import TENSOR, place_of_call
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_quantize import quantize

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or torch.cuda.is_available(), reason="the stub is written in C and replaces the driver"
)


@pytest.fixture
def stub(monkeypatch):
    """CPU tensors are taken for those of an H200 whose driver is the stub."""
    target = catalog_target("sm_90")
    for module in (logical, fp4_linear_few, fp4_linear_hopper, fp4_linear_triton):
        monkeypatch.setattr(module, "get_target", lambda device: target)
    registry.operator("fp4_linear").load()
    with stub_driver(monkeypatch) as stub:
        yield stub


@pytest.fixture
def compared(stub, monkeypatch):
    return compare_repeats(stub, monkeypatch)


@pytest.mark.parametrize(
    ("kernel", "m", "activations", "epilogue", "launched"),
    [
        ("triton_diagonal", 1, "same", "none", 1),
        ("triton_stream", 16, "same", "gated_silu", 1),
        ("triton", 20, "same", "none", 1),
        ("hopper", 70, "same", "none", 1),
        ("hopper_fp8", 256, "fp8", "none", 2),
    ],
)
def test_parameters_are_those_of_tritons_own_launch(compared, kernel, m, activations, epilogue, launched):
    w = to_layout(quantize(torch.randn(256, 512)), "fragments2t")
    bias = torch.randn(256, dtype=torch.bfloat16) if m == 70 else None
    with registry.force(fp4_linear=kernel):
        for _ in range(4):
            x = torch.randn(1, m, 512, dtype=torch.bfloat16)
            out = logical.fp4_linear(x, *w.tensors, bias, 512, "nvfp4", "fragments2t", activations, epilogue)
            assert out.shape == (1, m, 128 if epilogue == "gated_silu" else 256) and out.is_contiguous()
        assert compared[0] == 2 * launched
        static = (TENSOR if bias is not None else None, 512, "nvfp4", "fragments2t", activations, epilogue)
        place = place_of_call("fp4_linear", (*[TENSOR] * 4, *static), {})
        for _ in range(3):
            again = place(x, *w.tensors, *([] if bias is None else [bias]))
            assert again.shape == out.shape and again.stride() == out.stride() and again.dtype == out.dtype
    assert compared[0] == 5 * launched
