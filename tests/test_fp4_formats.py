"""FP4 formats: every code, every scale byte, rounding, scale search."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vbcompile.kernels.fp4 import PackedWeight, check_scales, concat_rows, dequantize, row_scales
from vbcompile.kernels.fp4_formats import (
    E2M1_VALUES,
    FORMATS,
    MXFP4,
    NVFP4,
    decode_e2m1,
    decode_pairs,
    decode_scales,
    encode_e2m1,
    encode_e4m3,
    pack_nibbles,
    unpack_nibbles,
)
from vbcompile.kernels.fp4_quantize import quantize, relative_error
from vbcompile.kernels.fp4_rounding import quantize_reference

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
METHODS = [
    (f, m) for f, names in (("nvfp4", "mse nearest four_over_six fp8"), ("mxfp4", "mse nearest")) for m in names.split()
]


def nearest_code(x: float) -> int:
    """Brute force: the closest magnitude, of two equally close the one with an even code."""
    magnitude = min(abs(x), 6.0)
    code = min(range(8), key=lambda c: (abs(magnitude - MAGNITUDES[c]), c & 1))
    return code | (8 if math.copysign(1.0, x) < 0 else 0)


def scale_value(byte: int, format_name: str) -> float:
    """From the definition of the formats, independent of the tables under test."""
    if format_name == "mxfp4":
        return math.ldexp(1.0, byte - 127)
    exponent, mantissa = byte >> 3, byte & 7
    return math.ldexp(mantissa / 8, -6) if exponent == 0 else math.ldexp(1 + mantissa / 8, exponent - 7)


def brute_force(packed: PackedWeight) -> torch.Tensor:
    """Element by element, in float64."""
    n, k = packed.shape
    out = torch.empty(n, k, dtype=torch.float64)
    scales = packed.tensor_scale.double().expand(n).tolist()
    for row, column in itertools.product(range(n), range(k)):
        byte = int(packed.codes[row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
        value = MAGNITUDES[code & 7] * (-1 if code & 8 else 1)
        value *= scale_value(int(packed.block_scales[row, column // packed.format.block_size]), packed.format_name)
        out[row, column] = value / scales[row] if packed.scale_divides else value * scales[row]
    return out


def random_packed(format_name: str, shape: tuple[int, ...], *, per_row=False, divides=False) -> PackedWeight:
    fmt = FORMATS[format_name]
    lead, blocks = shape[:-1], -(-shape[-1] // fmt.block_size)
    return PackedWeight(
        torch.randint(0, 256, (*lead, blocks * fmt.block_size // 2), dtype=torch.uint8),
        torch.randint(0, 127 if fmt is NVFP4 else 250, (*lead, blocks), dtype=torch.uint8),
        torch.rand(lead if per_row else (*lead[:-1], 1)) + 0.1,
        format_name,
        shape,
        divides,
    )


# --- elements and bytes -----------------------------------------------------------------------------------------------


def test_every_code_decodes_exactly_in_every_dtype():
    codes = torch.arange(16, dtype=torch.uint8)
    expected = torch.tensor([MAGNITUDES[c & 7] * (-1 if c & 8 else 1) for c in range(16)], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        values = decode_e2m1(codes, dtype)
        assert values.dtype == dtype and torch.equal(values.double(), expected)
        assert torch.equal(torch.signbit(values), codes >= 8)
    assert tuple(expected.tolist()) == E2M1_VALUES


def test_every_code_survives_a_round_trip():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)


def test_rounding_is_to_nearest_even_and_saturates():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    assert decode_e2m1(encode_e2m1(torch.tensor(ties))).tolist() == [0, 1, 1, 2, 2, 4, 4]
    around = [x for t in (*ties, *MAGNITUDES) for x in (t, math.nextafter(t, -9), math.nextafter(t, 9))]
    x = torch.tensor([*around, 6.01, 7.0, 1e30, math.inf, *(torch.rand(500) * 7).tolist()], dtype=torch.float64)
    x = torch.cat((x, -x))
    assert encode_e2m1(x).tolist() == [nearest_code(v) for v in x.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_in_every_dtype(dtype):
    x = (torch.randn(4000) * 3).to(dtype)
    assert encode_e2m1(x).tolist() == [nearest_code(v) for v in x.double().tolist()]


def test_all_256_bytes_unpack_low_nibble_first():
    packed = torch.arange(256, dtype=torch.uint8)
    codes = unpack_nibbles(packed)
    assert codes.tolist() == [n for byte in range(256) for n in (byte & 15, byte >> 4)]
    assert torch.equal(pack_nibbles(codes), packed)
    assert torch.equal(decode_pairs(packed, torch.float32), decode_e2m1(codes))


def test_all_scale_bytes():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    e4m3, e8m0 = decode_scales(bytes_, NVFP4), decode_scales(bytes_, MXFP4)
    assert e4m3[:127].tolist() == [scale_value(b, "nvfp4") for b in range(127)]
    assert e8m0[:255].double().tolist() == [scale_value(b, "mxfp4") for b in range(255)]
    torch.testing.assert_close(e4m3, bytes_.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)
    assert math.isnan(e4m3[127]) and math.isnan(e8m0[255])


def test_e4m3_rounds_to_nearest_even():
    values = decode_scales(torch.arange(127, dtype=torch.uint8), NVFP4)
    middles = (values[1:] + values[:-1]) / 2
    below, above = (torch.nextafter(middles, torch.tensor(end)) for end in (0.0, 1e9))
    even = torch.tensor([c if c % 2 == 0 else c + 1 for c in range(126)])
    assert torch.equal(encode_e4m3(values).long(), torch.arange(127))
    assert torch.equal(encode_e4m3(middles).long(), even)
    assert torch.equal(encode_e4m3(below).long(), torch.arange(126))
    assert torch.equal(encode_e4m3(above).long(), torch.arange(1, 127))
    assert encode_e4m3(torch.tensor([449.0, 1e30, math.inf])).tolist() == [126] * 3


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize(("format_name", "shape"), [("nvfp4", (5, 48)), ("nvfp4", (3, 37)), ("mxfp4", (7, 65))])
def test_decoding_equals_brute_force(format_name, shape, divides, per_row):
    packed = random_packed(format_name, shape, per_row=per_row, divides=divides)
    expected = brute_force(packed)
    assert torch.equal(dequantize(packed, torch.float64), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(packed, dtype), expected.float().to(dtype))
    assert packed.padding == packed.codes.shape[1] * 2 - shape[1]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_pair_of_code_and_scale_is_exact(fmt):
    scales = torch.arange(fmt.largest_scale + 1, dtype=torch.uint8).unsqueeze(1)
    codes = torch.arange(256, dtype=torch.uint8).view(-1, fmt.block_size // 2)  # every byte, a few blocks
    packed = PackedWeight(
        codes.reshape(1, -1).repeat(len(scales), 1),
        scales.repeat(1, len(codes)),
        torch.ones(1),
        fmt.name,
        (len(scales), 512),
    )
    bytes_ = torch.arange(256).unsqueeze(-1)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)[torch.cat((bytes_ & 15, bytes_ >> 4), 1)].flatten()
    exact = values * torch.tensor([scale_value(int(s), fmt.name) for s in scales], dtype=torch.float64).unsqueeze(1)
    assert torch.equal(dequantize(packed, torch.float64), exact)
    assert torch.equal(dequantize(packed, torch.float32), exact.float())  # float32 holds each, up to overflow
    finite = exact.abs() < 2.0**128
    assert torch.equal(dequantize(packed).double()[finite], exact[finite])


def test_experts_decode_as_their_matrices():
    for per_row in (False, True):
        packed = random_packed("nvfp4", (3, 5, 40), per_row=per_row)
        for expert in range(3):
            parts = (t[expert] for t in (packed.codes, packed.block_scales, packed.tensor_scale))
            assert torch.equal(dequantize(packed)[expert], dequantize(PackedWeight(*parts, "nvfp4", (5, 40))))


def test_decoding_many_chunks():
    packed = random_packed("nvfp4", (3000, 100))
    step = 700
    pieces = [
        PackedWeight(
            packed.codes[i : i + step], packed.block_scales[i : i + step], packed.tensor_scale, "nvfp4", (n, 100)
        )
        for i in range(0, 3000, step)
        for n in [min(step, 3000 - i)]
    ]
    assert torch.equal(dequantize(packed), torch.cat([dequantize(p) for p in pieces]))
    assert torch.equal(dequantize(concat_rows(pieces)), dequantize(packed))


def test_concatenated_rows_keep_their_values():
    parts = [random_packed("nvfp4", (n, 40)) for n in (2, 5, 3)]
    whole = concat_rows(parts)
    assert whole.shape == (10, 40) and whole.tensor_scale.shape == (10,)
    assert torch.equal(dequantize(whole), torch.cat([dequantize(p) for p in parts]))
    assert torch.equal(row_scales(whole), torch.cat([row_scales(p) for p in parts]))
    divided = [random_packed("nvfp4", (n, 40), divides=True) for n in (2, 3)]
    assert torch.equal(dequantize(concat_rows(divided)), torch.cat([dequantize(p) for p in divided]))
    mixed = [parts[0], divided[0]]
    torch.testing.assert_close(
        dequantize(concat_rows(mixed)), torch.cat([dequantize(p) for p in mixed]), rtol=2**-22, atol=0
    )
    experts = [random_packed("mxfp4", (2, n, 64)) for n in (4, 1)]
    assert torch.equal(dequantize(concat_rows(experts)), torch.cat([dequantize(p) for p in experts], dim=1))
    with pytest.raises(ValueError, match="differ in format"):
        concat_rows([parts[0], random_packed("mxfp4", (2, 40))])
    with pytest.raises(ValueError, match="no packed weights"):
        concat_rows([])


# --- quantizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_name", "method"), [m for m in METHODS if m != ("nvfp4", "fp8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_are_the_nearest_for_their_scale(format_name, method, dtype):
    weight = (torch.randn(37, 75) * 0.02).to(dtype)
    packed = quantize(weight, format_name, method=method)
    check_scales(packed, "weight")
    error = (dequantize(packed, torch.float64) - weight.double()).abs()
    block = packed.block_scales.repeat_interleave(packed.format.block_size, 1)[:, :75]
    step = decode_scales(block, packed.format, torch.float64) * packed.tensor_scale.double()
    candidates = torch.tensor(E2M1_VALUES, dtype=torch.float64) * step.unsqueeze(-1)
    best = (candidates - weight.double().unsqueeze(-1)).abs().amin(-1)
    assert (error <= best + step * 1e-6).all()


@pytest.mark.parametrize(
    ("format_name", "method", "limit"),
    [
        ("nvfp4", "mse", 0.0815),
        ("nvfp4", "four_over_six", 0.0875),
        ("nvfp4", "nearest", 0.096),
        ("nvfp4", "fp8", 0.083),
        ("mxfp4", "mse", 0.112),
        ("mxfp4", "fp8", 0.112),
        ("mxfp4", "nearest", 0.1155),
    ],
)
@pytest.mark.parametrize("sigma", [1.0, 0.02])
def test_error_on_gaussian_weights(format_name, method, limit, sigma):
    weight = torch.randn(512, 1024) * sigma
    packed = quantize(weight, format_name, method=method)
    error = float((weight.double() - dequantize(packed, torch.float64)).norm() / weight.double().norm())
    assert 0.9 * limit < error <= limit
    assert relative_error(weight, packed) == pytest.approx(error, rel=1e-4)


def test_packing_for_fp8_makes_up_for_its_rounding():
    """Error of what FP8 tensor cores multiply with: code times scale, rounded to E4M3."""
    weight, errors = torch.randn(256, 1024) * 0.02, {}
    for method in ("mse", "fp8"):
        packed = quantize(weight, method=method)
        rounded = (dequantize(packed) / packed.tensor_scale / 8).to(torch.float8_e4m3fn).float() * packed.tensor_scale
        errors[method] = float((8 * rounded - weight).norm() / weight.norm())
    assert errors["fp8"] <= 0.0821 < 0.0828 <= errors["mse"]
    assert torch.equal(quantize(weight, "mxfp4", method="fp8").codes, quantize(weight, "mxfp4").codes)


def test_mxfp4_error_does_not_depend_on_the_place_in_an_octave():
    weight = torch.randn(128, 1024)
    errors = [relative_error(weight * 2 ** (i / 4), quantize(weight * 2 ** (i / 4), "mxfp4")) for i in range(5)]
    assert max(errors) <= 0.112 and max(errors) - min(errors) < 2e-4
    experts = torch.stack((weight, 3 * weight))
    assert (
        quantize(experts, "mxfp4").tensor_scale.shape == (2, 1)
        and relative_error(experts, quantize(experts, "mxfp4")) < 0.113
    )  # one tensor scale for the whole stack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_weights_need_no_copy(dtype):
    weight = torch.randn(1024, 512).to(dtype).t()
    assert torch.equal(quantize(weight).codes, quantize(weight.contiguous()).codes)
    assert relative_error(weight, quantize(weight)) == relative_error(weight.contiguous(), quantize(weight))


def test_mse_finds_the_best_scale_of_its_window():
    weight = torch.randn(16, 64)
    packed = quantize(weight, "nvfp4")
    base = encode_e4m3(weight.view(16, 4, 16).abs().amax(-1) / packed.tensor_scale / 6)
    best = torch.full((16, 4), math.inf, dtype=torch.float64)
    for step in range(-2, 7):
        scale = decode_scales(base + step, NVFP4, torch.float64) * packed.tensor_scale.double()
        x = weight.view(16, 4, 16).double() / scale.unsqueeze(-1)
        error = ((decode_e2m1(encode_e2m1(x), torch.float64) - x) * scale.unsqueeze(-1)).square().sum(-1)
        best = torch.minimum(best, error)
    found = (dequantize(packed, torch.float64) - weight.double()).view(16, 4, 16).square().sum(-1)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("format_name", FORMATS)
def test_mse_is_never_worse_than_nearest_scales_in_mxfp4_and_on_average(format_name):
    for make in (torch.randn, lambda *s: torch.rand(*s) - 0.5, lambda *s: torch.randn(*s) ** 3):
        weight = make(64, 256)
        errors = [relative_error(weight, quantize(weight, format_name, method=m)) for m in ("mse", "nearest")]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize(("format_name", "method"), METHODS)
def test_what_is_representable_comes_back(format_name, method):
    first = quantize(torch.randn(80, 64), format_name, method="nearest")
    for dtype in (torch.float32, torch.bfloat16):
        again = quantize(dequantize(first, dtype), format_name, method=method)
        assert relative_error(dequantize(first), again) < (1e-6 if dtype == torch.float32 else 0.004)
        assert relative_error(dequantize(again), quantize(dequantize(again), format_name, method=method)) < 1e-6


@pytest.mark.parametrize(("format_name", "method"), METHODS)
def test_zeros_and_their_signs(format_name, method):
    weight = torch.zeros(3, 64)
    weight[1] = -0.0
    decoded = dequantize(quantize(weight, format_name, method=method))
    assert torch.equal(decoded, weight) and torch.equal(torch.signbit(decoded), torch.signbit(weight))
    weight[2, 40] = 1.0
    assert torch.equal(dequantize(quantize(weight, format_name, method=method)), weight)
    assert relative_error(weight[:2], quantize(weight[:2], format_name)) == 0


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-5, 1e5, 1e30, 5e37])
def test_magnitudes_at_the_ends_of_float32(scale):
    weight = torch.randn(32, 256).double() * scale
    if scale < 1e-40:
        assert dequantize(quantize(weight)).abs().max() <= 2.0**-126  # below the smallest normal number: near zero
        return
    for format_name, limit in (("nvfp4", 0.085), ("mxfp4", 0.118)):
        assert relative_error(weight, quantize(weight, format_name)) < limit


def test_rows_of_very_different_magnitude():
    weight = torch.randn(20, 128) * 10.0 ** torch.arange(-10, 10).unsqueeze(1)
    packed = quantize(weight, per_row=True)
    assert packed.tensor_scale.shape == (20,)
    for row, decoded in zip(weight, dequantize(packed), strict=True):
        assert (row - decoded).norm() / row.norm() < 0.11


@pytest.mark.parametrize("k", [16, 17, 31, 32, 33, 100, 1025])
@pytest.mark.parametrize("n", [1, 17])
def test_odd_shapes_are_padded_with_zeros(n, k):
    for format_name, fmt in FORMATS.items():
        if k < fmt.block_size:
            continue
        weight = torch.randn(n, k)
        packed = quantize(weight, format_name)
        assert packed.shape == (n, k) and 0 <= packed.padding < fmt.block_size
        assert dequantize(packed).shape == (n, k)
        assert not unpack_nibbles(packed.codes)[:, k:].any()
        whole = torch.nn.functional.pad(weight, (0, packed.padding))
        assert torch.equal(quantize(whole, format_name).codes, packed.codes)


def test_experts_and_strides():
    weight = torch.randn(3, 40, 20).transpose(1, 2)
    packed = quantize(weight, "nvfp4")
    assert packed.shape == (3, 20, 40) and packed.tensor_scale.shape == (3, 1)
    for expert in range(3):
        alone = quantize(weight[expert].contiguous(), "nvfp4")
        assert torch.equal(alone.codes, packed.codes[expert])
        assert torch.equal(alone.tensor_scale, packed.tensor_scale[expert])
    assert relative_error(weight, packed) < 0.09


def test_chunks_do_not_change_the_result():
    weight = torch.randn(300, 1024)
    whole = quantize(weight, "nvfp4")
    rows = [quantize(torch.cat((weight[i : i + 1], weight)), "nvfp4").codes[0] for i in (0, 63, 64, 299)]
    assert all(torch.equal(row, whole.codes[i]) for i, row in zip((0, 63, 64, 299), rows, strict=True))


def test_parameters_need_no_care():
    parameter = torch.nn.Parameter(torch.randn(4, 32))
    packed = quantize(parameter)
    assert not packed.tensor_scale.requires_grad and parameter.grad is None


def test_scratch_memory_is_bounded():
    """Only the results grow with the rows: 14 MB of weight take no scratch tensor above 1 MiB."""
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view() and out.numel() > 2**18:
                large.append((out.dtype, out.numel()))
            return out

    weight = torch.randn(14336, 512).bfloat16()
    with Watch():
        packed = PackedWeight(*quantize_reference(weight, "nvfp4", "mse", False), "nvfp4", (14336, 512))
        dequantize(packed, torch.bfloat16)
    assert set(large) == {
        (torch.uint8, packed.codes.numel()),
        (torch.uint8, packed.block_scales.numel()),
        (torch.bfloat16, weight.numel()),
    }
    assert packed.nbytes * 8 / weight.numel() == pytest.approx(4.5, abs=0.01)


def test_moving_to_another_device():
    packed = quantize(torch.randn(4, 32)).to("cpu")
    assert packed.device.type == "cpu" and packed.to("meta").device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize(("format_name", "method"), METHODS)
def test_devices_agree(format_name, method):
    weight = torch.randn(200, 333)
    here, there = quantize(weight, format_name, method=method), quantize(weight.cuda(), format_name, method=method)
    assert torch.equal(dequantize(here.to("cuda")), dequantize(here).cuda())
    differing = (here.codes != there.codes.cpu()).float().mean()
    assert differing < 1e-3  # sums of squares in another order may prefer another of two equal scales
