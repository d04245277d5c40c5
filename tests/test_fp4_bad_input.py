"""FP4 weights and parts that are refused, each by name."""

import math

import pytest
import torch
from test_fp4_formats import random_packed

from vbcompile.kernels.fp4 import PackedWeight, check_scales, dequantize
from vbcompile.kernels.fp4_formats import (
    FORMATS,
    MXFP4,
    NVFP4,
    fp4_format,
)
from vbcompile.kernels.fp4_quantize import quantize, scale_rule


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(4, 32, dtype=torch.int8), "torch.int8 weights cannot be quantized"),
        (torch.ones(4, 32, dtype=torch.complex64), "torch.complex64 weights cannot"),
        (torch.ones(4, 32).to(torch.float8_e4m3fn), "torch.float8_e4m3fn weights cannot"),
        (torch.ones(4, 32, device="meta"), "meta device"),
        (torch.ones(4, 15), "K = 15 is too small: nvfp4 has blocks of 16"),
        (torch.ones(64), "is not a matrix"),
        (torch.ones(2, 2, 2, 64), "is not a matrix"),
        (torch.ones(0, 64), "is not a matrix"),
        (torch.eye(32).to_sparse(), "not dense"),
        (torch.full((4, 32), math.nan), "holds NaN or infinity"),
        (torch.full((4, 32), -math.inf), "holds NaN or infinity"),
        (torch.full((4, 32), 1e300, dtype=torch.float64), "holds NaN or infinity"),
    ],
    ids=str,
)
def test_bad_weights_are_refused_by_name(weight, reason):
    with pytest.raises(ValueError, match=f"^layers.3.up.weight: .*{reason}"):
        quantize(weight, name="layers.3.up.weight")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_element_is_found(value, format_name, dtype):
    weight = torch.randn(1000, 257).to(dtype)
    weight[torch.randint(1000, ()), torch.randint(257, ())] = value
    with pytest.raises(ValueError, match=r"^w: holds NaN or infinity"):
        quantize(weight, format_name, name="w")


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match="up: unknown FP4 format 'fp4'; valid formats: nvfp4, mxfp4"):
        quantize(torch.ones(4, 32), "fp4", name="up")
    with pytest.raises(ValueError, match="unknown method 'four_over_six' for mxfp4; valid methods: mse, nearest, fp8"):
        quantize(torch.ones(4, 32), "mxfp4", method="four_over_six")
    with pytest.raises(ValueError, match="nvfp4 has blocks of 16 elements, not 32"):
        quantize(torch.ones(4, 32), "nvfp4", block_size=32)
    assert fp4_format("mxfp4", 32) is MXFP4 and scale_rule(NVFP4, "mse")
    with pytest.raises(ValueError, match=r"cannot decode FP4 to torch\.int32"):
        dequantize(quantize(torch.ones(4, 32)), torch.int32)


def test_parts_that_do_not_fit_are_refused():
    good = quantize(torch.randn(4, 40), "nvfp4")
    parts = {"codes": good.codes, "block_scales": good.block_scales, "tensor_scale": good.tensor_scale}
    for field, bad in [
        ("codes", good.codes[:, :-1].contiguous()),
        ("codes", good.codes.to(torch.int8)),
        ("codes", good.codes.t().contiguous().t()),
        ("block_scales", good.block_scales[:, :2].contiguous()),
        ("block_scales", good.block_scales.view(torch.float8_e4m3fn)),
        ("tensor_scale", torch.ones(3)),
        ("tensor_scale", torch.ones(1, dtype=torch.float64)),
        ("tensor_scale", torch.ones(1, device="meta")),
    ]:
        with pytest.raises(ValueError, match=f"{field} must be"):
            PackedWeight(**{**parts, field: bad}, format_name="nvfp4", shape=(4, 40))
    with pytest.raises(ValueError, match="is not \\[N, K\\]"):
        PackedWeight(**parts, format_name="nvfp4", shape=(40,))
    with pytest.raises(ValueError, match="unknown FP4 format"):
        PackedWeight(**parts, format_name="int4", shape=(4, 40))


@pytest.mark.parametrize(("format_name", "byte"), [("nvfp4", 0x7F), ("nvfp4", 0xFF), ("nvfp4", 0x81), ("mxfp4", 0xFF)])
def test_bad_block_scales_are_found(format_name, byte):
    packed = random_packed(format_name, (6, 96))
    check_scales(packed, "w")
    packed.block_scales[3, 1] = byte
    with pytest.raises(ValueError, match=f"^w: block scale byte 0x{byte:02x}"):
        check_scales(packed, "w")


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_bad_tensor_scales_are_found(scale):
    packed = random_packed("nvfp4", (6, 96), per_row=True)
    packed.tensor_scale[4] = scale
    with pytest.raises(ValueError, match=r"^w: tensor scale .* not finite and positive"):
        check_scales(packed, "w")
