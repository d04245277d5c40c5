"""Hopper attention: what it refuses and why, its polynomials, what becomes of score functions."""

import itertools
import math
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from attention_forms import make_forms, make_function, softcap

from vbcompile.kernels import attention_gpu
from vbcompile.kernels import attention_hopper as hopper
from vbcompile.kernels.attention_case import make_case
from vbcompile.kernels.attention_hopper_call import describe_call, refuses_call
from vbcompile.kernels.attention_hopper_program import compile_hopper, peel
from vbcompile.kernels.attention_hopper_tanh import TANH, capped_numbers
from vbcompile.kernels.attention_problem import with_padded_lead
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.score_triton import CapturedPattern

pytest.importorskip("triton")


def tensors(batch=1, heads=4, key_heads=2, queries=64, keys=128, dim=64, dtype=torch.bfloat16):
    q = torch.empty(batch, heads, queries, dim, dtype=dtype)
    k, v = (torch.empty(batch, key_heads, keys, dim, dtype=dtype) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize(
    ("change", "scale", "offset", "reason"),
    [
        ({}, 0.1, None, None),
        ({}, 0.1, 0, None),
        ({"dim": 128, "dtype": torch.float16}, 0.1, 64, None),
        ({"dtype": torch.float32}, 0.1, None, "dtypes"),
        ({"dim": 96}, 0.1, None, "head dimensions"),
        ({"key_heads": 3}, 0.1, None, "no multiple"),
        ({"queries": 0}, 0.1, None, "empty"),
        ({}, -0.1, None, "scale"),
        ({}, 0.0, None, "scale"),
        ({}, math.nan, None, "scale"),
        ({}, 0.1, -1, "causal offset"),
    ],
)
def test_problem_is_refused_with_a_reason(change, scale, offset, reason):
    answer = hopper.refuses_problem(*tensors(**change), scale, offset)
    assert answer is None if reason is None else reason in answer


def test_mismatched_tensors_are_refused():
    q, k, v = tensors()
    assert "fit together" in hopper.refuses_problem(q, k, v[:, :, :100], 0.1, None)
    assert "fit together" in hopper.refuses_problem(q.expand(2, -1, -1, -1), k, v, 0.1, None)
    assert "dtypes" in hopper.refuses_problem(q, k.half(), v, 0.1, None)
    assert "[B, H, S, D]" in hopper.refuses_problem(q[0], k, v, 0.1, None)


def test_strides_the_accelerator_cannot_address_are_refused():
    x = torch.empty(2, 4, 32, 64, dtype=torch.bfloat16)
    assert hopper.refuses_layout("x", x) is None
    assert hopper.refuses_layout("x", x.transpose(1, 2)) is None
    assert "last dimension" in hopper.refuses_layout("x", x.mT)
    assert "positive multiple" in hopper.refuses_layout("x", x[:, :1].expand(2, 4, 32, 64))
    odd = torch.empty(2 * 4 * 32 * 68, dtype=torch.bfloat16)
    assert "positive multiple" in hopper.refuses_layout(
        "x", odd.as_strided((2, 4, 32, 64), (4 * 32 * 68, 32 * 68, 68, 1))
    )
    assert "aligned" in hopper.refuses_layout("x", odd[1:].as_strided((1, 1, 32, 64), (64, 64, 64, 1)))
    assert hopper.refuses_layout("x", odd.as_strided((1, 1, 32, 64), (7, 0, 64, 1))) is None  # size 1: any stride


def test_other_devices_are_refused():
    assert hopper.refuses_capability((9, 0)) is None
    assert "8.0" in hopper.refuses_capability((8, 0))
    assert "10.0" in hopper.refuses_capability((10, 0))
    assert "NVIDIA" in hopper.refuses(*tensors(), 0.1, None)
    with pytest.raises(ValueError, match="NVIDIA"):
        hopper.forward(*tensors(), 0.1, None, False)


def cubic_exp2(x: np.ndarray) -> np.ndarray:
    """The instructions of ``exp2_mixed`` in float32."""
    single = np.float32
    t = np.maximum(x, single(-125.0))
    r = t + single(12582912.0)
    f = t - (r - single(12582912.0))
    p = single(0.055171654) * f + single(0.24261113)
    p = p * f + single(0.69326097)
    p = p * f + single(0.99992806)
    return ((r.view(np.uint32) << np.uint32(23)) + p.view(np.uint32)).view(np.float32)


def test_cubic_of_exp2_is_close():
    x = -np.random.default_rng(0).uniform(0, 120, 100_000).astype(np.float32)
    assert np.max(np.abs(cubic_exp2(x) / np.exp2(x.astype(np.float64)) - 1)) < 1e-4
    assert cubic_exp2(np.float32([-np.inf]))[0] < 1e-37
    source = (Path(hopper.__file__).parent / "attention_hopper_tiles.py").read_text()
    for constant in (0.055171654, 0.24261113, 0.69326097, 0.99992806, 12582912.0, -125.0):
        assert f"0f{np.float32(constant).view(np.uint32):08X}" in source


@pytest.mark.parametrize("inner", [0.125 / 30, -0.125 / 30, 0.3, 7e-4, 2.0**-8])
@pytest.mark.parametrize(("terms", "error"), [(2, 1e-3), (3, 2.4e-4)])
def test_polynomials_of_capped_scores(inner, terms, error):
    """In float32, as the kernel does it: close within the limit, and scores beyond it are told by their bits."""
    single, factor, limit = np.float32, 30 * math.log2(math.e), TANH[terms][0]
    _, _, _, _, *numbers = map(single, capped_numbers(inner, factor, 0.0))
    shift, end, *coefficients = numbers[:4] if terms == 2 else numbers[4:]
    u = np.linspace(-1, 1, 20_001)[:10_000] * limit
    score = (u / inner).astype(single)
    t = score * score + shift
    value = np.polynomial.polynomial.polyval(t, coefficients, tensor=False).astype(single) * score
    assert np.max(np.abs(value[1:] / (factor * np.tanh(inner * score[1:].astype(np.float64))) - 1)) < error
    assert np.bitwise_or.reduce(t[1:].view(np.uint32)) < end.view(np.uint32)
    beyond = (np.float64([-1.001, 1.001, 2, -50, np.inf, np.nan]) * limit / inner).astype(single)
    for x in beyond:
        assert np.bitwise_or.reduce((np.append(score[1:9], x) ** 2 + shift).view(np.uint32)) >= end.view(np.uint32)


@pytest.mark.parametrize("inner", [0.0, 1e-30, 1e30])
def test_scores_of_unusual_size_are_all_beyond_the_limit(inner):
    numbers = capped_numbers(inner, 43.0, 0.0)
    assert np.isfinite(np.float32(numbers)).all() and numbers[5] == numbers[9] == 0.0


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [("softcap", torch.bfloat16, 0.0), ("softcap", torch.float16, None), ("bias", torch.bfloat16, None)],
)
def test_capped_scores_are_recognised(name, dtype, expected):
    (q, k, _), captured = make_forms(256, 512, 64, 64)[name].inputs(dtype)
    call = describe_call(q, k, captured, (2, 2), 0.1, make_forms(256, 512, 64, 64)[name].function)
    assert call.program.cap == expected


def test_weights_of_capped_scores_fit_the_range():
    caps = [compile_hopper(make_function(softcap(c)), (), True, False, False).cap for c in (30.0, 50.0, 51.0)]
    assert caps[0] == 0.0 and 0 < caps[1] < 60 and caps[2] is None


def test_keys_of_a_lane_below_a_bound():
    """The bit pattern of ``bits_below``: a lane holds keys ``8 a + c`` after its first one."""
    numbers = [8 * (n // 2) + n % 2 for n in range(32)]
    for bound in range(-20, 150):
        count = max(2 * (bound >> 3) + min(bound & 7, 2), 0)
        bits = (1 << 32) - 1 if count > 31 else (1 << count) - 1
        assert [bool(bits >> n & 1) for n in range(32)] == [key < bound for key in numbers]


def test_masked_and_clear_tiles_are_walked_once():
    """``split_walk``, run by Python: the middle part holds clear tiles alone, and all of them where they follow."""
    from vbcompile.kernels.attention_hopper_forward import split_walk

    split = FunctionType(split_walk.fn.__code__, {"gl": SimpleNamespace(minimum=min, maximum=max)})
    for first, end, *clear in itertools.product(range(3), range(3, 7), range(8), range(8)):
        masked_end, clear_end = split(end - first, end, clear)
        assert 1 <= masked_end <= clear_end <= end - first
        walked = [end - 1 - j for j in range(masked_end, clear_end)]
        assert walked == [tile for tile in range(end - 2, first - 1, -1) if clear[0] <= tile < clear[1]]


@pytest.mark.parametrize(
    ("name", "dim", "rounding", "turns"),
    [
        ("document_causal", 128, "halfway", 0),
        ("window", 128, "halfway", 0),
        ("bias", 128, "halfway", 2),
        ("bool_mask", 128, "early", 1),
        ("alibi", 128, "halfway", 1),
        ("alibi_by_head", 128, "early", 1),
        ("sink", 128, "early", 1),
        ("document_causal", 64, "halfway", 1),
    ],
)
def test_configuration_by_what_a_function_reads(name, dim, rounding, turns):
    form = make_forms(256, 512, dim, dim)[name]
    (q, k, _), captured = form.inputs(torch.bfloat16)
    call = describe_call(q, k, captured, (2, 2), 0.1, form.function)
    config = hopper.scored_config(dim, call.causal_offset is not None, call)
    assert (config.rounding, config.ping_pong) == (rounding, turns)


def test_constant_factors_leave_the_function():
    program = ScoreFunction(
        (("score",), ("const", 20.0), ("div", 0, 1), ("tanh", 2), ("const", 5.0), ("mul", 4, 3)), score=5
    )
    inside, inner, outer = peel(program)
    assert (inner, outer) == (1 / 20.0, 5.0)
    assert inside.program == (("score",), ("tanh", 0)) and inside.score == 1
    twice = ScoreFunction((("score",), ("const", 2.0), ("mul", 0, 1), ("add", 2, 0)), score=3)
    assert peel(twice)[1:] == (1.0, 1.0)  # the score is read twice: nothing moves
    negative = ScoreFunction((("score",), ("tanh", 0), ("const", -2.0), ("mul", 1, 2)), score=3)
    assert peel(negative)[2] == 1.0  # the largest logit must stay the largest


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("bias", torch.bfloat16, None),
        ("bias", torch.float64, "rows and columns of torch.float64"),
        ("oddities", torch.bfloat16, "registers"),
        ("sink", torch.bfloat16, None),
    ],
)
def test_score_functions_are_refused_with_a_reason(name, dtype, reason):
    form = make_forms(64, 128, 64, 64)[name]
    shapes = [(tuple(c.shape), dtype) for c in form.inputs(torch.float32)[1]]
    answer = refuses_call(shapes, 64, 128, with_padded_lead(form.function, 2))
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize(
    ("name", "needs", "reason"),
    [
        ("bias", (), None),
        ("softcap", (), None),
        ("document_causal", (), None),
        ("dropout", (), "dropout"),
        ("softcap", (True, True, True), None),
        ("causal", (True, True, True), None),
        ("bias", (True, True, True, True), None),
        ("document_causal", (True, True, True, False, False), None),
        ("sink_per_row", (True, True, True, True), None),
        ("temperature", (True, True, True, False), None),
        ("temperature", (True, True, True, True), "the score and an addend"),
    ],
)
def test_routing(name, needs, reason):
    form = make_forms(128, 128, 64, 64)[name]
    (q, k, v), captured = form.inputs(torch.bfloat16)
    arguments = (q, k, v, captured, form.scale, form.dropout_p, form.function.dumps(), needs)
    hopper_card = SimpleNamespace(vendor="nvidia", arch="sm_90")
    answer = attention_gpu.refuses_hopper(hopper_card, make_case(*arguments))
    assert answer is None if reason is None else reason in answer


def test_alibi_adds_one_number_per_column_and_one_per_row():
    form = make_forms(128, 128, 64, 64)["alibi"]
    patterns = tuple(map(CapturedPattern.of, form.inputs(torch.bfloat16)[1]))
    program = compile_hopper(with_padded_lead(form.function, 2), patterns, True, False, False)
    assert program.offset is not None and "tl.fma(step" in program.source and not program.unbounded
    assert program.slope is not None


def test_rows_the_copy_engine_cannot_address_are_refused():
    form = make_forms(64, 124, 64, 64)["bias"]
    assert "16 bytes" in refuses_call([((1, 2, 64, 124), torch.bfloat16)], 64, 124, form.function)
