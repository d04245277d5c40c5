"""The Triton attention kernels against plain PyTorch in float64: interpreted on the CPU, or run on a GPU.

On a CPU the module needs ``TRITON_INTERPRET=1`` in the environment before Triton is imported.
"""

import itertools
import math

import pytest
import torch
from attention_compare import DEVICE, compare
from attention_forms import Form, captured_mask, make_forms, make_function

from vbcompile.kernels import attention_layout, attention_problem, attention_triton
from vbcompile.kernels.attention import attention_reference
from vbcompile.kernels.attention_tiles import analyse_mask
from vbcompile.kernels.attention_triton import backward, forward
from vbcompile.kernels.attention_tuning import TileConfig
from vbcompile.kernels.score_function import Builder, ScoreFunction, evaluate
from vbcompile.kernels.score_triton import CapturedPattern, has_unbounded_terms
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


@pytest.mark.parametrize(
    "name", ["document_causal", "bool_mask", "key_padding", "static_cache", "every_third", "chunks"]
)
def test_summary_of_opaque_masks(name, monkeypatch):
    monkeypatch.setattr(attention_problem, "SUMMARY_TILES", 1)
    check(FORMS[name], torch.float32)


@pytest.mark.parametrize(
    "name",
    ["causal_bottom_right", "causal_empty_rows", "static_cache", "lengths", "bias", "sink", "grouped", "four_axes"],
)
def test_few_queries_split_the_keys(name):
    check(FEW_QUERIES[name], torch.float32)


@pytest.mark.parametrize("slots", [1, 8, 24])
@pytest.mark.parametrize(
    "name", ["plain", "causal_empty_rows", "lengths", "sink", "grouped", "grouped_document", "key_padding", "one_query"]
)
def test_parts_of_several_tiles(name, slots, monkeypatch):
    """One to eight tiles a program, merged or not; masks looked at ahead of the keys."""
    monkeypatch.setattr(attention_triton, "_DECODE_PROGRAMS", 1)
    monkeypatch.setattr(attention_triton, "multiprocessor_count", lambda target: slots)
    monkeypatch.setattr(attention_triton, "_LOOKED_AT", 1)
    monkeypatch.setattr(attention_triton, "_LOOK_ELEMENTS", 64)
    form = make_forms(1, 71, 16, 24)["grouped_document"] if name == "one_query" else FEW_QUERIES[name]
    check(form, torch.float32)


def test_tiles_that_a_mask_leaves_out_are_not_read(monkeypatch):
    """Keys and values before the first and after the last tile that is needed may hold anything."""
    monkeypatch.setattr(attention_triton, "_DECODE_PROGRAMS", 1)
    monkeypatch.setattr(attention_triton, "multiprocessor_count", lambda target: 4)
    monkeypatch.setattr(attention_triton, "_LOOKED_AT", 1)
    q, k, v = (torch.randn(1, 2, n, m, 16, device=DEVICE) for n, m in ((3, 1), (1, 512), (1, 512)))
    mask = torch.zeros(1, 1, 1, 1, 512, dtype=torch.bool, device=DEVICE)
    mask[..., 130:250] = True
    function = make_function(mask=captured_mask)
    want, want_lse = forward(q, k, v, [mask], 0.25, 0.0, None, function)
    outside = [torch.full_like(t, torch.nan) for t in (k, v)]
    for t, source in zip(outside, (k, v), strict=True):
        t[..., 128:256, :] = source[..., 128:256, :]
    out, lse = forward(q, *outside, [mask], 0.25, 0.0, None, function)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    kept = (q @ k[..., 130:250, :].mT * 0.25).softmax(-1) @ v[..., 130:250, :]
    torch.testing.assert_close(out, kept, atol=1e-5, rtol=1e-5)


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


PLANNED = ["causal_empty_rows", "window", "both_sides", "prefix", "document", "document_causal", "bool_mask",
           "key_padding", "static_cache", "lengths", "every_third", "chunks"]  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("summary_tiles", [1, 1000])
@pytest.mark.parametrize("by_keys", [False, True])
def test_plan_of_tiles(name, summary_tiles, by_keys, monkeypatch):
    """Tiles outside the plan have no element that takes part, those that need no mask have no other."""
    monkeypatch.setattr(attention_problem, "SUMMARY_TILES", summary_tiles)
    form = make_forms(150, 210, 16, 16)[name]
    (q, k, v), captured = ([t.to(DEVICE) for t in ts] for ts in form.inputs(torch.float32))
    problem = attention_problem.describe(q, k, v, captured, 1.0, 0.0, form.function)
    plan, strides = problem.tile_plan(q, TileConfig(64, 32, 4, 1), exact=True, by_keys=by_keys)
    (keep,) = evaluate(
        form.function, [form.function.mask], score=None, captured=captured, lead=(2, 2), q_length=150, k_length=210,
        device=q.device, dtype=torch.float32,
    )  # fmt: skip
    keep = keep.expand(2, 2, 150, 210)
    patterns = tuple(map(CapturedPattern.of, captured))
    others = torch.ones_like(keep)
    for term in analyse_mask(form.function, patterns).opaque:
        (value,) = evaluate(
            form.function, [term], score=None, captured=captured, lead=(2, 2), q_length=150, k_length=210,
            device=q.device, dtype=torch.float32,
        )  # fmt: skip
        others = others & value
    own, other, length = (32, 64, 150) if by_keys else (64, 32, 210)
    keep, others = (t.mT if by_keys else t for t in (keep, others))
    plan = plan.as_strided((2, 2, -(-keep.shape[-2] // own), 8), (*strides[2:], 8, 1)).tolist()
    for b, h, tile in itertools.product(range(2), range(2), range(len(plan[0][0]))):
        first, clear, clear_end, end, sure, sure_end, *_ = plan[b][h][tile]
        rows = slice(tile * own, tile * own + own)
        assert 0 <= first < end <= -(-length // other)
        assert not keep[b, h, rows, : first * other].any() and not keep[b, h, rows, end * other :].any()
        for column in range(max(first, clear), min(end, clear_end)):
            assert (column + 1) * other <= length and keep[b, h, rows, column * other : column * other + other].all()
        for column in range(max(first, sure), min(end, sure_end)):
            assert others[b, h, rows, column * other : column * other + other].all()


@pytest.mark.parametrize("fill", [-1e10, -1e30, 1e30])
def test_tiles_of_fills(fill):
    """A fused multiplication and subtraction leaves the rounding of a product of equal fills."""
    q, k, v = (torch.randn(2, n, 16, device=DEVICE) for n in (20, 150, 150))
    b = Builder()
    late = b.emit("ge", b.emit("k_index"), b.emit("const", 140))
    score = b.emit("where", late, b.emit("score"), b.emit("const", fill))
    function = ScoreFunction(b.program, score)
    assert has_unbounded_terms(function.program, function.score)
    out, _ = forward(q, k, v, [], 0.25, 0.0, None, function)
    exact, _ = attention_reference(q.double(), k.double(), v.double(), [], 0.25, 0.0, None, function.dumps())
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("queries", [5, 40])
def test_rows_too_far_apart(queries, monkeypatch):
    """Where tiles would reach beyond 32 bits, operands and results are copied."""
    monkeypatch.setattr(attention_layout, "_REACH", 40)
    form = make_forms(queries, 39, 8, 12)["rows_first"]
    (q, k, v), _ = form.inputs(torch.float32)
    copied = []
    copy = attention_layout.within_reach
    monkeypatch.setattr(attention_triton, "within_reach", lambda t: copied.append(t) or copy(t))
    out, _ = forward(*(t.to(DEVICE) for t in (q, k, v)), [], form.scale, 0.0, None, form.function)
    assert len(copied) == 3 and not any(map(attention_layout.is_within_reach, copied))
    assert out.transpose(1, 2).is_contiguous()
    check(form, torch.float32)


@pytest.mark.parametrize("grad_lse", [False, True])
def test_rows_of_the_hopper_backward(grad_lse):
    """What its kernels compute before and after the one that only Hopper runs."""
    from vbcompile.kernels.attention_hopper_rows import finish_backward, prepare_backward

    out, grad = (torch.randn(2, 100, 3, 64, device=DEVICE).transpose(1, 2) for _ in range(2))
    lse, grads = (torch.randn(2, 3, 100, device=DEVICE) for _ in range(2))
    found = [torch.full((6, 128), 7.0, device=DEVICE) for _ in range(2)]
    total = torch.full((6 * 128, 64), 7.0, device=DEVICE)
    counter = torch.full((1,), 7, dtype=torch.int32, device=DEVICE)
    prepare_backward[(6 * 2,)](
        out, grad, lse, grads if grad_lse else None, *found, total, counter, 100, 128, 3, *out.stride()[:3],
        *grad.stride()[:3], HAS_GRAD_LSE=grad_lse, D=64, ROWS=64,
    )  # fmt: skip
    delta = (out * grad).sum(-1) - (grads if grad_lse else 0.0)
    pad = torch.nn.functional.pad
    wanted = [pad(lse / math.log(2), (0, 28), value=math.inf), pad(delta, (0, 28))]
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, right.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert not total.any() and not counter.any()
    total = torch.randn(6, 128, 64, device=DEVICE)
    dq = torch.empty_like(out)
    finish_backward[(6 * 2,)](total, dq, 0.5, 100, 128, 3, *dq.stride()[:3], D=64, ROWS=64)
    torch.testing.assert_close(dq.flatten(0, 1), total[:, :100] * 0.5)


def _agrees_with_float64(q, k, v):
    function = make_function()
    out, lse = forward(q, k, v, [], 0.2, 0.0, None, function)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    exact, _ = attention_reference(*wide, [], 0.2, 0.0, None, function.dumps())
    gradients = backward(out, None, q, k, v, [], out, lse, 0.2, 0.0, None, function, [True] * 3)
    exact_gradients = torch.autograd.grad(exact, wide, out.double())
    for found, wanted in zip((out, *gradients), (exact, *exact_gradients), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("queries", [3, 100])
@pytest.mark.parametrize("size", [24, 32, 64])
def test_operands_stored_transposed(size, queries):
    """On sm_90 tiles of such keys are swizzled otherwise than those of the values."""
    lengths = queries, 100, 100
    _agrees_with_float64(*(torch.randn(2, size, n, dtype=torch.float16, device=DEVICE).mT for n in lengths))


@pytest.mark.parametrize("sizes", [(64, 32), (64, 16), (128, 16), (16, 64), (24, 48)])
def test_values_of_another_head_size(sizes):
    """On sm_90 tiles of both sizes must be swizzled alike."""
    lengths_and_sizes = (129, sizes[0]), (63, sizes[0]), (63, sizes[1])
    _agrees_with_float64(*(torch.randn(2, n, d, dtype=torch.float16, device=DEVICE) for n, d in lengths_and_sizes))
