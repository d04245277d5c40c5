"""FP4 layers on simulated vendors: arguments by their true schemas, results by the 2x rule, refusals with reasons."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vendors.packages import HPU_RELEASES, NPU_RELEASES
from vendors.trial import vendor

from vbcompile.config import resolve_config
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.kernels.fp4_formats import E2M1_VALUES, pack_nibbles
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_linear import choose, make_case
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.registry import operator
from vbcompile.kernels.vendor_hpu_fp4 import fold_into_fp8
from vbcompile.vendor_config import for_target

ARCH = {"npu": "Ascend950PR_9589", "hpu": "gaudi3"}


def packed_weight(n: int, k: int, seed: int = 0) -> PackedWeight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return quantize(weight * torch.logspace(-2, 2, n).unsqueeze(1), "mxfp4")


def linear(x, packed, bias=None, activations="same"):
    weight = to_layout(packed, "plain")
    return torch.ops.vblackwell.fp4_linear(
        x, *weight.tensors, bias, weight.k, weight.format_name, weight.layout, activations
    )


def within_rule(out, x, packed, bias, factor=2.0):
    exact = F.linear(x.double(), dequantize(packed, torch.float64), None if bias is None else bias.double())
    plain = F.linear(x, dequantize(packed, x.dtype), None if bias is None else bias.to(x.dtype))
    error, allowed = (t.double() - exact for t in (out, plain))
    floor = 4 * torch.finfo(x.dtype).eps * exact.abs().mean(0)  # a row of the weight has its own size
    return bool((error.norm(dim=0) <= factor * allowed.norm(dim=0) + floor).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 96), (5, 33, 100), (70, 16, 32)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["npu", "hpu"])
def test_products(kind, biased, m, n, k, dtype):
    packed = packed_weight(n, k)
    x = torch.randn(2, m, k).to(dtype)
    bias = torch.randn(n) if biased else None
    with vendor(kind, arch=ARCH[kind]) as package:
        out = linear(x, packed, bias)
    assert package.calls == [{"npu": "npu_weight_quant_batchmatmul", "hpu": "cast_from_fp8"}[kind]]
    assert out.shape == (2, m, n) and out.dtype == dtype
    assert within_rule(out.flatten(0, 1), x.flatten(0, 1), packed, bias)


@pytest.mark.parametrize("version", NPU_RELEASES)
def test_releases_of_torch_npu(version):
    packed, x = packed_weight(32, 64), torch.randn(3, 64).bfloat16()
    with vendor("npu", version, ARCH["npu"]) as package:
        out = linear(x, packed)
        choice = choose(catalog_target(ARCH["npu"]), make_case(torch.bfloat16, 3, 32, 64, "mxfp4", "plain"))
    assert within_rule(out, x, packed, None)
    if version.startswith("2.5"):
        assert package.calls == [] and choice.implementation.name == "reference"
        missing = "npu::npu_weight_quant_batchmatmul with 'weight_dtype' needs 2.7.1 or later of torch-npu"
        assert f"{missing} (found 2.5.1.post1); plain PyTorch runs instead" in choice.explain()
    else:
        assert package.calls == ["npu_weight_quant_batchmatmul"]


@pytest.mark.parametrize("version", HPU_RELEASES)
def test_releases_of_gaudi(version):
    packed, x = packed_weight(32, 64), torch.randn(3, 64).bfloat16()
    with vendor("hpu", version, ARCH["hpu"]) as package:
        assert within_rule(linear(x, packed), x, packed, None)
    assert package.calls == ["cast_from_fp8"]


def test_fp8_activations_on_ascend():
    packed, x = packed_weight(48, 128), torch.randn(300, 128).bfloat16()
    bias = torch.randn(48)
    with vendor("npu", arch=ARCH["npu"]) as package:
        out = linear(x, packed, bias, "fp8")
    assert package.calls == ["npu_dynamic_mx_quant", "npu_quant_matmul"]
    exact = F.linear(x.double(), dequantize(packed, torch.float64), bias.double())
    assert float((out - exact).norm() / exact.norm()) < 0.04  # E4M3 has three digits after the first


def by_four_bits(x, packed, bias=None):
    weight = to_layout(packed, "plain")
    (found,) = [i for i in operator("fp4_linear").implementations if i.name == "npu_mxfp4_fp4"]
    return found.run(x, *weight.tensors, bias, weight.k, weight.format_name, weight.layout)


@pytest.mark.parametrize("version", [v for v in NPU_RELEASES if not v.startswith("2.5")])
def test_fp4_activations_on_ascend(version):
    """Activations that MXFP4 holds give the exact product; others lose what four bits lose."""
    packed, bias = packed_weight(48, 128), torch.randn(48)
    held = torch.tensor(E2M1_VALUES)[torch.randint(0, 8, (300, 128))] * torch.exp2(torch.arange(128) // 32 - 2.0)
    held = (held * torch.randint(-1, 2, held.shape)).bfloat16()
    with vendor("npu", version, ARCH["npu"]) as package:
        out = by_four_bits(held, packed, bias)
        assert package.calls == ["npu_dynamic_mx_quant", "npu_quant_matmul"]
        x = torch.randn(300, 128).bfloat16()
        rounded = by_four_bits(x, packed)
    assert within_rule(out, held, packed, bias)
    exact = F.linear(x.double(), dequantize(packed, torch.float64))
    assert 0.05 < float((rounded - exact).norm() / exact.norm()) < 0.16  # a Gaussian in MXFP4: 0.11 to 0.13


def test_fp4_activations_by_the_operator():
    packed, x = packed_weight(48, 128), torch.randn(300, 128).bfloat16()
    with vendor("npu", arch=ARCH["npu"]) as package:
        torch.testing.assert_close(linear(x, packed, None, "fp4"), by_four_bits(x, packed))
    assert package.calls == ["npu_dynamic_mx_quant", "npu_quant_matmul"] * 2


@pytest.mark.parametrize(
    ("activations", "m", "k", "name"),
    [
        ("same", 4096, 4096, "npu_mxfp4"),
        ("fp8", 4096, 4096, "npu_mxfp4_fp8"),
        ("fp4", 4096, 4096, "npu_mxfp4_fp4"),
        ("fp4", 1, 4096, "npu_mxfp4"),  # the weight's bytes decide
        ("fp4", 4096, 4000, "npu_mxfp4"),  # scales come in pairs
    ],
)
def test_activations_that_were_asked_for(activations, m, k, name):
    case = make_case(torch.bfloat16, m, 4096, k, "mxfp4", "plain", activations)
    choice = choose(catalog_target(ARCH["npu"]), case)
    assert choice.implementation.name == name
    if activations != "fp4":
        assert "npu_mxfp4_fp4: rounds activations to FP4, which was not asked for" in choice.explain()


def test_fp4_activations_without_the_operator():
    with vendor("npu", NPU_RELEASES[0], ARCH["npu"]):
        choice = choose(catalog_target(ARCH["npu"]), make_case(torch.bfloat16, 64, 64, 64, "mxfp4", "plain", "fp4"))
    reason = "npu::npu_dynamic_mx_quant needs 2.7.1 or later of torch-npu (found 2.5.1.post1); plain PyTorch runs"
    assert reason in choice.explain()


@pytest.mark.parametrize("kind", ["npu", "hpu"])
def test_row_scales_and_rewritten_weights(kind):
    """A scale of rows is applied, and a packed weight that was written to is read anew."""
    weight, x = to_layout(packed_weight(32, 64), "plain"), torch.randn(4, 64).bfloat16()
    row_scale, ones = torch.full((32,), 2.0), torch.ones(32)

    def call(scale):
        return torch.ops.vblackwell.fp4_linear(x, weight.codes, weight.block_scales, scale, None, 64, "mxfp4", "plain")

    with vendor(kind, arch=ARCH[kind]):
        before = call(row_scale)
        torch.testing.assert_close(before, call(ones) * 2)
        row_scale.mul_(2)
        torch.testing.assert_close(call(row_scale), before * 2)
        weight.codes.copy_(to_layout(packed_weight(32, 64, seed=1), "plain").codes)
        assert not torch.allclose(call(row_scale), before * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradient_on_gaudi(dtype):
    packed = packed_weight(40, 96)
    x = torch.randn(7, 96).to(dtype).requires_grad_()
    with vendor("hpu", arch=ARCH["hpu"]) as package:
        out = linear(x, packed)
        upstream = torch.randn(7, 40).to(dtype)
        (grad,) = torch.autograd.grad(out, x, upstream)
    assert package.calls == ["cast_from_fp8"] * 2
    exact = upstream.double() @ dequantize(packed, torch.float64)
    plain = upstream @ dequantize(packed, dtype)
    floor = 2 * torch.finfo(dtype).eps * exact.norm()
    assert (grad.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + floor


# ------------------------------------------------------------------------------------------------- FP8, exactly
def test_fp8_holds_the_weight_exactly():
    packed = packed_weight(64, 128)
    weight = to_layout(packed, "plain")
    folded = fold_into_fp8(weight.codes, weight.block_scales, weight.row_scale, 128)
    assert folded is not None and folded.weight.dtype == torch.float8_e4m3fn
    assert float(folded.weight.float().abs().max()) <= 240  # Gaudi 2's largest
    assert torch.equal(
        folded.weight.double() * folded.row_scale.double().unsqueeze(1), dequantize(packed, torch.float64)
    )


def test_every_code_at_every_step():
    """All codes with scales from the row's largest down to the last that E4M3 holds."""
    steps = torch.arange(14)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2 * 14)
    scales = (127 - steps).to(torch.uint8).unsqueeze(0)
    packed = PackedWeight(pack_nibbles(codes.unsqueeze(0)), scales, torch.ones(1), "mxfp4", (1, 14 * 32))
    folded = fold_into_fp8(packed.codes, packed.block_scales, torch.ones(1), 14 * 32)
    assert folded is not None
    assert torch.equal(folded.weight.double() * folded.row_scale.double(), dequantize(packed, torch.float64))


def test_scales_too_far_apart_are_decoded_once():
    packed = packed_weight(16, 64)
    packed.block_scales[3] = torch.tensor([140, 126], dtype=torch.uint8)
    x = torch.randn(2, 64).bfloat16()
    with vendor("hpu", arch=ARCH["hpu"]) as package:
        assert torch.equal(linear(x, packed), F.linear(x, dequantize(packed, torch.bfloat16)))
    assert package.calls == []
    assert fold_into_fp8(packed.codes, packed.block_scales, torch.ones(16), 64) is None


# ------------------------------------------------------------------------------------------------------ choices
@pytest.mark.parametrize(
    ("arch", "format_name", "reason"),
    [
        ("Ascend950PR_9589", "nvfp4", "reads MXFP4, not nvfp4: set fp4_format='mxfp4'"),
        ("Ascend910B1", "mxfp4", "needs the FP4 units of an Ascend 950, this is Ascend910B1"),
        ("gaudi2", "nvfp4", "folds MXFP4 into FP8 exactly, nvfp4 it cannot: set fp4_format='mxfp4'"),
    ],
)
def test_refusals_say_why(arch, format_name, reason):
    choice = choose(catalog_target(arch), make_case(torch.bfloat16, 1, 4096, 4096, format_name, "plain"))
    assert choice.implementation.name == "reference" and reason in choice.explain()


@pytest.mark.parametrize(
    ("arch", "name"), [("Ascend950PR_9589", "npu_mxfp4"), ("gaudi2", "hpu_fp8"), ("gaudi3", "hpu_fp8")]
)
@pytest.mark.parametrize("m", [1, 4096])
def test_chosen_ahead_of_time(arch, name, m):
    choice = choose(catalog_target(arch), make_case(torch.bfloat16, m, 4096, 4096, "mxfp4", "plain"))
    assert choice.implementation.name == name


def test_a_model_in_speed_mode():
    """On Ascend see test_vendor_npu_device.py: the name ``npu`` has to exist for this."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).bfloat16().eval()
    x = torch.randn(4, 256).bfloat16()
    options = {"downstream": "aot_eager", "fp4": True, "strict": True}  # MXFP4 is the default there
    torch._dynamo.reset()
    with vendor("hpu", arch=ARCH["hpu"]) as package, torch.no_grad():
        compiled = torch.compile(model, backend="vblackwell", options=options)
        out, again = compiled(x), compiled(x)
        expected = model(x)
    assert package.calls == ["cast_from_fp8"] * 4
    torch.testing.assert_close(out, again)
    assert float((out - expected).norm() / expected.norm()) < 0.25  # two layers of MXFP4


@pytest.mark.parametrize(
    ("arch", "options", "expected"),
    [
        ("gaudi2", {}, "mxfp4"),
        ("Ascend950PR_9589", {}, "mxfp4"),
        ("gaudi2", {"fp4_format": "nvfp4"}, "nvfp4"),
        ("sm_90", {}, "nvfp4"),
        ("cpu", {}, "nvfp4"),
    ],
)
def test_default_format(arch, options, expected):
    config = for_target(resolve_config(options=options), catalog_target(arch))
    assert config.fp4_format == expected
    if expected == "mxfp4":
        assert config.to_dict()["fp4_format"]["source"] == f"default on {arch}"
