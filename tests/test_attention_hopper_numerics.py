"""Hopper attention on a GPU: against float64, NaN, scores of any size, repeated runs."""

import math

import pytest
import torch
from attention_compare import compare, compare_forward
from attention_forms import causal, make_forms, make_function, softcap

from vbcompile.device import get_target
from vbcompile.kernels import attention_gpu
from vbcompile.kernels import attention_hopper as hopper
from vbcompile.kernels import attention_hopper_gradients as gradients
from vbcompile.kernels.attention_case import make_case
from vbcompile.kernels.score_function import ScoreFunction

pytest.importorskip("triton")


CASES = [  # batch, heads, key heads, queries, keys, causal offset, rows first, dtype
    (2, 4, 2, 300, 520, None, False, torch.bfloat16),
    (1, 2, 1, 333, 333, 0, True, torch.bfloat16),
    (1, 3, 3, 128, 1000, 872, True, torch.float16),
    (2, 4, 4, 1024, 1024, 0, False, torch.bfloat16),
    (1, 1, 1, 1, 77, None, True, torch.bfloat16),
    (1, 8, 2, 700, 65, 3, False, torch.bfloat16),
    (3, 6, 2, 515, 2049, 100, True, torch.float16),
]


def plain_attention(q, k, v, scale, offset):
    """(out, lse) of plain PyTorch in the dtype of q; lse in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    if offset is not None:
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        s = s.masked_fill(torch.arange(k.shape[2], device=q.device)[None] > rows + offset, -math.inf)
    return s.softmax(-1) @ v, s.double().logsumexp(-1)


def error(x, exact) -> float:
    return (x.double() - exact).abs().max().item()


@pytest.mark.gpu
@pytest.mark.parametrize("dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(hopper_gpu, case, dim):
    batch, heads, key_heads, queries, keys, offset, rows_first, dtype = case
    sizes = ((heads, queries), (key_heads, keys), (key_heads, keys), (heads, queries))
    q, k, v, g = (torch.randn(batch, s, h, dim, device="cuda", dtype=dtype).transpose(1, 2) for h, s in sizes)
    g_lse = torch.randn(batch, heads, queries, device="cuda") if rows_first else None
    scale = dim**-0.5

    def results(kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        out, lse = plain_attention(*leaves, scale, offset)
        loss = (out * g.to(kind)).sum().double() + (0.0 if g_lse is None else (lse * g_lse.double()).sum())
        return [out.detach(), *torch.autograd.grad(loss, leaves)], lse.detach()

    exact, exact_lse = results(torch.float64)
    plain, _ = results(dtype)
    out, lse = hopper.forward(q, k, v, scale, offset, rows_first)
    ours = [out, *gradients.backward(g, g_lse, q, k, v, out, lse, scale, offset)]
    assert error(lse, exact_lse) < 1e-3
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert error(a, c) <= 2 * error(b, c) + 1e-6, name


FORMS = make_forms(300, 432, 64, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FORMS if name != "additive_min"])
def test_score_functions_match_float64(hopper_gpu, name):
    form = FORMS[name]
    (q, k, v), captured = form.inputs(torch.bfloat16)
    case = make_case(*(t.cuda() for t in (q, k, v)), captured, form.scale, form.dropout_p, form.function.dumps())
    if attention_gpu.refuses_hopper(get_target(torch.device("cuda")), case):
        pytest.skip("left to the general kernels")
    rows = compare_forward(form, torch.bfloat16, attention_gpu.hopper_forward, seeds=range(2))
    assert not [row for row in rows if not row[1] <= row[2]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FORMS if name != "additive_min"])
def test_gradients_of_score_functions_match_float64(hopper_gpu, name):
    form = FORMS[name]
    (q, k, v), captured = form.inputs(torch.bfloat16)
    q, k, v = (t.cuda() for t in (q, k, v))
    for with_captured in (True, False):
        needs = [True] * 3 + [with_captured and c.is_floating_point() for c in captured]
        case = make_case(q, k, v, captured, form.scale, form.dropout_p, form.function.dumps(), needs)
        if attention_gpu.refuses_hopper(get_target(q.device), case) is None:
            break
    else:
        pytest.skip("left to the general kernels")
    run = (attention_gpu.hopper_forward, attention_gpu.hopper_backward)
    rows = compare(form, torch.bfloat16, range(2), run, with_captured)
    assert not [row for row in rows if not row[1] <= row[2]]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("size", [1.0, 8.0, 100.0, -100.0])
@pytest.mark.parametrize("causal_mask", [False, True])
def test_capped_scores_of_any_size(hopper_gpu, dim, size, causal_mask):
    """Scores within the polynomial's limit, partly beyond it, far beyond it, and all of them near the lower bound."""
    q, k, v = (torch.randn(1, 4, 700, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q = -k.abs() if size < 0 else q * size
    k = k.abs() * 4 if size < 0 else k
    function = make_function(softcap(50.0), mask=causal() if causal_mask else None)
    out, lse = attention_gpu.hopper_forward(q, k, v, [], dim**-0.5, 0.0, None, function.dumps())

    def reference(dtype):
        logits = 50 * torch.tanh((q.to(dtype) @ k.to(dtype).mT * dim**-0.5) / 50)
        if causal_mask:
            logits = logits.masked_fill(torch.ones(700, 700, device="cuda").triu(1).bool(), -math.inf)
        return logits.softmax(-1) @ v.to(dtype), logits.double().logsumexp(-1)

    (exact, exact_lse), (plain, plain_lse) = reference(torch.float64), reference(torch.bfloat16)
    assert error(out, exact) <= 2 * error(plain, exact)
    assert error(lse, exact_lse) <= 2 * error(plain_lse, exact_lse)


@pytest.mark.gpu
def test_nan_key_reaches_its_rows_only_under_a_cap(hopper_gpu):
    q, k, v = (torch.randn(1, 1, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[0, 0, 200] = math.nan
    function = make_function(softcap(30.0), mask=causal()).dumps()
    out, _ = attention_gpu.hopper_forward(q, k, v, [], 0.125, 0.0, None, function)
    assert out[0, 0, 200:].isnan().all() and out[0, 0, :200].isfinite().all()


@pytest.mark.gpu
def test_rows_of_least_finite_scores_are_uniform(hopper_gpu):
    """Padding as Hugging Face writes it: rows of nothing but ``finfo.min`` average the values."""
    q, k, v = (torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(1, 1, 256, 256, device="cuda", dtype=torch.bfloat16)
    bias[:, :, :7] = torch.finfo(torch.bfloat16).min
    function = ScoreFunction((("score",), ("captured", 0), ("add", 0, 1)), score=2).dumps()
    out, _ = attention_gpu.hopper_forward(q, k, v, [bias], 0.125, 0.0, None, function)
    expected = v.float().mean(2, keepdim=True).expand(-1, -1, 7, -1)
    torch.testing.assert_close(out[:, :, :7].float(), expected, atol=2e-2, rtol=0)


@pytest.mark.gpu
def test_repeated_runs_agree(hopper_gpu):
    q, k, v, g = (torch.randn(2, 8, 1500, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    runs = []
    for _ in range(3):
        out, lse = hopper.forward(q, k, v, 0.09, 0, False)
        runs.append((out, lse, *gradients.backward(g, None, q, k, v, out, lse, 0.09, 0)[1:]))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("position", [0, 7, 130])
def test_nan_key_reaches_its_rows_only(hopper_gpu, dim, position):
    q, k, v = (torch.randn(1, 1, 256, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[0, 0, position] = math.nan
    out, _ = hopper.forward(q, k, v, 0.1, 0, False)
    assert out[0, 0, position:].isnan().all() and out[0, 0, :position].isfinite().all()
