"""Attention over numbers that are infinite, NaN or large: what plain PyTorch gives, in the operator and compiled."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import Outcome, differences
from attention_trial import clear
from torch._dynamo.utils import counters

from vbcompile.kernels.attention import attention
from vbcompile.kernels.score_function import Builder, ScoreFunction

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.usefixtures("one_thread")


def _causal() -> ScoreFunction:
    b = Builder()
    score, mask = b.emit("score"), b.emit("ge", b.emit("q_index"), b.emit("k_index"))
    return ScoreFunction(b.program, score, mask)


def _shown() -> ScoreFunction:
    b = Builder()
    score, mask = b.emit("score"), b.emit("captured", 0)
    return ScoreFunction(b.program, score, mask)


def _inputs(rows: int, dtype: torch.dtype, factor: float = 1.0):
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(2, 3, rows, 16, generator=generator).mul(factor).to(dtype) for _ in range(3)]


def _plain(q, k, v, keep=None):
    s = q @ k.mT * 0.25
    s = s if keep is None else s.masked_fill(~keep, -INF)
    return torch.softmax(s.float(), -1).to(v.dtype) @ v


def _operator(q, k, v, function: ScoreFunction, captured=()):
    return attention(q, k, v, list(captured), 0.25, 0.0, None, function.dumps())[0]


PLACES = {
    "a row of queries": lambda q, k, v: q[0, 1, 1].fill_(NAN),
    "one number of a query": lambda q, k, v: q[0, 1, 1, 3].fill_(NAN),
    "an infinite query": lambda q, k, v: q[0, 1, 1, 3].fill_(INF),
    "one number of a key": lambda q, k, v: k[0, 1, 2, 3].fill_(NAN),
    "all keys": lambda q, k, v: k[0, 1].fill_(NAN),
    "an infinite feature of all keys": lambda q, k, v: k[0, 1, :, 3].fill_(INF),
    "a feature of minus infinity": lambda q, k, v: k[0, 1, :, 3].fill_(-INF),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [3, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_nan_stays_nan(place, rows, dtype, mask):
    """PyTorch's operator on CPUs gives zeros for some such rows."""
    q, k, v = _inputs(rows, dtype)
    PLACES[place](q, k, v)
    keep = torch.ones(rows, rows, dtype=torch.bool).tril()
    want = _plain(q.float(), k.float(), v.float(), keep if mask == "causal" else None)
    out = _operator(q, k, v, _causal() if mask == "causal" else ScoreFunction())
    torch.testing.assert_close(out, want.to(dtype), equal_nan=True)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_of_a_hidden_key_is_not_seen(bad):
    q, k, v = _inputs(12, torch.float32)
    k[0, 1, 5, 3] = bad
    keep = torch.arange(12).reshape(1, 1, 1, 12) != 5
    torch.testing.assert_close(_operator(q, k, v, _shown(), [keep]), _plain(q, k, v, keep))


@pytest.mark.parametrize("place", ["a row of queries", "all keys", "an infinite feature of all keys"])
def test_nan_stays_nan_in_the_graph_itself(place):
    """Where the compiled graph holds PyTorch's operator."""
    clear()
    q, k, v = _inputs(6, torch.float32)
    compiled = torch.compile(_plain, backend="vblackwell")
    torch.testing.assert_close(compiled(q, k, v), _plain(q, k, v))
    PLACES[place](q, k, v)
    torch.testing.assert_close(compiled(q, k, v), _plain(q, k, v), equal_nan=True)


def _behind_a_zero_token(q, k, v):
    """Rows that see one key, whose score and values are zero: causal, under a mask of many rows and of few."""
    keep = torch.arange(20) >= 19 - torch.arange(20).reshape(20, 1)
    few = [x[..., :2, :] for x in (q, k, v)]
    return (
        _plain(q, k, v, torch.ones(20, 20, dtype=torch.bool).tril()),
        _plain(q, k, v, keep),
        _plain(*few, few[1][:, :1, :, 0].unsqueeze(-2) <= 0),
    )


@pytest.mark.parametrize("downstream", ["eager", "inductor"])
def test_zero_tokens_are_no_nan(downstream):
    """PyTorch's operator on CPUs gives the same numbers for them as for rows of NaN."""
    clear()
    q, k, v = _inputs(20, torch.float32)
    k[..., 1, 0] = 1.0
    for x in (q, k, v):
        x[..., 0, :] = x[..., 19, :] = 0.0
    compiled = torch.compile(_behind_a_zero_token, backend="vblackwell", options={"downstream": downstream})
    want = _behind_a_zero_token(q, k, v)
    assert all(bool((x == 0).all(-1).any()) for x in want)
    torch.testing.assert_close(compiled(q, k, v), want)


@pytest.mark.parametrize("name", ["plain", "causal", "rows of -10000"])
@pytest.mark.parametrize("factor", [1.0, 5.0, 12.0])
def test_gradients_of_large_scores(name, factor):
    """The logarithm of a row's sum has few digits left where scores are large."""
    q, k, v = _inputs(40, torch.float32, factor)
    v = v / factor
    keep = torch.ones(40, 40, dtype=torch.bool).tril()
    rows = torch.zeros(40, 1).masked_fill(torch.arange(40).reshape(40, 1) < 4, -10000.0)
    b = Builder()
    biased = b.emit("add", b.emit("score"), b.emit("captured", 0))
    biased = ScoreFunction(b.program, biased)
    upstream = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0))

    def plain(q, k, v):
        s = q @ k.mT * 0.25
        s = s.masked_fill(~keep, -INF) if name == "causal" else s + rows.to(s) if name.startswith("rows") else s
        return torch.softmax(s, -1) @ v

    def ours(q, k, v):
        function = {"plain": ScoreFunction(), "causal": _causal()}.get(name, biased)
        return _operator(q, k, v, function, [rows[None, None]] if function is biased else [])

    def outcome(f, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
        gradients = torch.autograd.grad(f(*leaves), leaves, upstream.to(dtype))
        return Outcome(dict(zip(("gradient of q", "gradient of k", "gradient of v"), gradients, strict=True)))

    found = differences(outcome(ours, torch.float32), outcome(plain, torch.float32), outcome(plain, torch.float64))
    assert found == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_bias_of_more_digits_than_the_operands(dtype):
    """PyTorch's operator on CPUs takes it in float32 too."""
    inputs = _inputs(40, dtype)
    bias = 20.0 * torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    b = Builder()
    total = b.emit("add", b.emit("score"), b.emit("captured", 0))
    biased = ScoreFunction(b.program, total)

    def plain(q, k, v):
        return torch.softmax((q @ k.mT).to(torch.promote_types(q.dtype, bias.dtype)) * 0.25 + bias, -1).to(v.dtype) @ v

    def ours(q, k, v):
        return _operator(q, k, v, biased, [bias])

    def outcome(f, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = f(*leaves)
        return Outcome(dict(zip("oqkv", (out.detach(), *torch.autograd.grad(out.sum(), leaves)), strict=True)))

    found = differences(*(outcome(f, t) for f, t in ((ours, dtype), (plain, dtype), (plain, torch.float64))))
    assert found == []


@pytest.mark.parametrize("factor", [2.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_as_exact_as_plain_ones(factor, masked):
    """With a scale that is no power of two, whose product the kernel's two directions round at different places."""
    keep = torch.ones(64, 64, dtype=torch.bool).tril() if masked else torch.ones(64, 64, dtype=torch.bool)
    function = _shown() if masked else ScoreFunction()

    def plain(q, k, v):
        s = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
        return torch.softmax(s, -1) @ v

    def ours(q, k, v):
        return attention(q, k, v, [keep[None, None]] if masked else [], 0.3, 0.0, None, function.dumps())[0]

    errors = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(2, 3, 64, 24, generator=generator) * f for f in (factor, 1.0, 1.0)]
        upstream = torch.randn(2, 3, 64, 24, generator=generator)

        def gradients(f, dtype, inputs=inputs, upstream=upstream):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            return torch.autograd.grad(f(*leaves), leaves, upstream.to(dtype))

        truth = gradients(plain, torch.float64)
        for place, f in enumerate((ours, plain)):
            found = gradients(f, torch.float32)
            errors[place] += torch.stack([(a - b).abs().amax() for a, b in zip(found, truth, strict=True)])
    assert bool((errors[0] < 2 * errors[1]).all()), errors


# ------------------------------------------------------------------------- rows that hold nothing but finite fills
def _exponentials(scores, dim=-1):
    powers = torch.exp(scores)
    return powers / powers.sum(dim, keepdim=True)


def _shifted_powers(scores):
    return (scores - scores.logsumexp(-1, keepdim=True)).exp()


_SHOWN_ROWS = torch.tensor([[True] * 3 + [False] * 4, [False] * 7, [True] * 7, [False] * 6 + [True]])
FILLED = {  # name: (softmax of filled scores, sites)
    "powers of a fill": (lambda s, m: _exponentials(s.masked_fill(~m, -1e9)), 1),
    "powers of a mask that is added": (lambda s, m: _exponentials(s + (1.0 - m.to(s.dtype)) * -1e4), 1),
    "powers of a mask that is subtracted": (lambda s, m: _exponentials(s * m - 1e9 * (1 - m.to(s.dtype))), 1),
    "powers of a fill times a tensor": (lambda s, m: _exponentials(s.masked_fill(~m, -1e9) * s.new_full((1,), 2.0)), 1),
    "fills less their logarithm": (lambda s, m: _shifted_powers(s.masked_fill(~m, torch.finfo(s.dtype).min)), 0),
    "the least number of float64": (
        lambda s, m: s.double().masked_fill(~m, torch.finfo(torch.float64).min).softmax(-1),
        1,
    ),
    "fills less their mean": (
        lambda s, m: ((f := s.masked_fill(~m, -1e30)) - f.mean(-1, keepdim=True)).softmax(-1),
        0,
    ),
    "two equal fills": (
        lambda s, m: torch.where(m, torch.where(m.flip(-1), s, torch.full_like(s, -1e9)), -1e9).float().softmax(-1),
        1,
    ),
    "a bias beside fills of float32": (
        lambda s, m: (s + torch.arange(7) / 2 + torch.where(m, 0.0, -65504.0)).softmax(-1),
        1,
    ),
    "shown weights that vanish": (
        lambda s, m: (w := s.masked_fill(m, -1e9).abs().softmax(-1) * ~m) / w.sum(-1, keepdim=True),
        0,
    ),
}


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_fills(name, dtype):
    weights, sites = FILLED[name]

    def function(q, k, v, shown):
        return weights(q @ k.mT * 0.25, shown).to(v.dtype) @ v

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, generator=generator).to(dtype) for n in (4, 7, 7))
    clear()
    ours = torch.compile(function, backend="vblackwell", options={"downstream": "eager", "strict": True})
    got, eager = ours(q, k, v, _SHOWN_ROWS), function(q, k, v, _SHOWN_ROWS)
    truth = function(q.double(), k.double(), v.double(), _SHOWN_ROWS)
    assert not differences(*(Outcome({"out": x}) for x in (got, eager, truth)))
    assert counters["vblackwell"]["fuse_attention"] == sites


# ---------------------------------------------------------------- rows that another mask than the weights' has emptied
EMPTIED = {  # name: (weights of scores, a mask of flags and one of numbers; sites)
    "weights filled": (lambda s, m, b: (s + b).masked_fill(~m, -INF).softmax(-1).masked_fill(~m, 0.0), 0),
    "rows chosen": (
        lambda s, m, b: torch.where(m.any(-1, keepdim=True), (s + b).masked_fill(~m, -INF).softmax(-1), 0.0),
        0,
    ),
    "rows chosen that all have keys": (
        lambda s, m, b: torch.where(torch.ones_like(m).any(-1, True), (s + m.float().log()).softmax(-1), 0.0),
        0,
    ),
    "weights multiplied": (lambda s, m, b: (s + b).masked_fill(~m, -INF).softmax(-1) * m, 1),
    "bias from a product": (
        lambda s, m, b: (s + s.mT @ s).masked_fill(~m, -INF).softmax(-1).masked_fill(~m, 0.0),
        1,
    ),
}


def _less(scores, statistic):
    return (scores - statistic(scores)).softmax(-1)


def _beside_a_sink(scores, shift):
    powers = (scores - shift).exp()
    return powers / (powers.sum(-1, keepdim=True) + (0.5 - shift).exp())


EMPTIED |= {
    "less their mean": (lambda s, m, b: _less(s + b, lambda x: x.mean(-1, keepdim=True)), 0),
    "less their median": (lambda s, m, b: _less(s.masked_fill(~m, -INF), lambda x: x.median(-1, True).values), 0),
    "less their minimum": (lambda s, m, b: _less(s + b, lambda x: x.amin(-1, keepdim=True)), 0),
    "less the first": (lambda s, m, b: _less(s + m.float().log(), lambda x: x[..., :1]), 0),
    "less their maximum": (lambda s, m, b: _less(s + b, lambda x: x.amax(-1, keepdim=True)), 1),
    "less a mean before the mask": (lambda s, m, b: _less(s, lambda x: x.mean(-1, keepdim=True) - b), 1),
    "a sink, less their maximum": (lambda s, m, b: _beside_a_sink(s + b, (s + b).amax(-1, keepdim=True)), 0),
    "a sink, less a limit": (lambda s, m, b: _beside_a_sink(s + b, (s + b).amax(-1, keepdim=True).clamp(min=0.0)), 1),
}


@pytest.mark.parametrize("name", EMPTIED)
def test_rows_emptied_by_another_mask(name):
    weights, sites = EMPTIED[name]

    def function(q, k, v, shown, bias):
        return weights(q @ k.mT, shown, bias) @ v

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 8, generator=generator) for _ in range(3))
    shown, bias = torch.ones(4, 4, dtype=torch.bool).tril(-1), torch.zeros(4, 4)
    bias[2] = -INF
    clear()
    ours = torch.compile(function, backend="vblackwell", options={"downstream": "eager", "strict": True})
    torch.testing.assert_close(ours(q, k, v, shown, bias), function(q, k, v, shown, bias), equal_nan=True)
    assert counters["vblackwell"]["fuse_attention"] == sites


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_powers_under_a_mask_of_numbers(dtype):
    """A row of low fills has powers of zero, whose sum divides them: NaN, which the model clears."""

    def function(q, k, v, mask):
        keep = mask.to(q.dtype)
        weights = torch.exp2((q @ k.mT) * keep - 1e9 * (1 - keep))
        return (weights / weights.sum(-1, keepdim=True)).nan_to_num(nan=0.0) @ v

    q, k, v = (torch.randn(2, 3, 4, 8) for _ in range(3))
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])[:, None, None].to(dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(function, backend="vblackwell", options={"downstream": "eager"})(q, k, v, mask)
        torch.testing.assert_close(found, function(q, k, v, mask))


GIVEN = {  # softmax of scores that a mask was added to
    "exp": _exponentials,
    "exp2": lambda s: (w := torch.exp2(s)) / w.sum(-1, keepdim=True),
    "less the logarithm of their sum": _shifted_powers,
    "their own maximum": lambda s: _exponentials(s - s.amax(-1, keepdim=True)),
    "beside one": lambda s: (w := s.exp()) / (1 + w.sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("fill", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("name", GIVEN)
def test_powers_under_a_given_mask_of_fills(name, fill):
    """An input that is added may be a mask, too: rows of it have powers of zero, and a sum beside which 1 is lost."""

    def function(q, k, v, mask):
        return GIVEN[name](q @ k.mT + mask).nan_to_num() @ v

    q, k, v = (torch.randn(2, 3, 4, 8) for _ in range(3))
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])[:, None, None].logical_not() * fill
    clear()
    with torch.no_grad():
        found = torch.compile(function, backend="vblackwell", options={"downstream": "eager"})(q, k, v, mask)
        torch.testing.assert_close(found, function(q, k, v, mask), atol=1e-2 if fill == -1e4 else 1e-5, rtol=1e-5)
    assert counters["vblackwell"]["fuse_attention"] == (name in ("their own maximum", "beside one"))


LOWEST = torch.finfo(torch.float16).min
BEYOND = {  # fills that float16 holds as -inf, so that rows of them are NaN
    "a factor": lambda s, m: s.masked_fill(~m, LOWEST) / 0.5,
    "a negative factor": lambda s, m: (-s).masked_fill(~m, -LOWEST) * -2,
    "a factor that is a tensor": lambda s, m: s.masked_fill(~m, LOWEST) * torch.tensor(2.0, dtype=s.dtype),
    "a factor of the mask": lambda s, m: s + torch.zeros(m.shape, dtype=s.dtype).masked_fill(~m, LOWEST) * 2,
    "a converted number": lambda s, m: torch.where(m, s, torch.full([], -1e5).to(s.dtype)),
    "converted scores": lambda s, m: s.float().masked_fill(~m, -1e9).half(),
}


@pytest.mark.parametrize("name", BEYOND)
def test_fills_beyond_float16(name):
    function = lambda q, k, v, shown: BEYOND[name](q @ k.mT * 0.25, shown).float().softmax(-1).half() @ v
    q, k, v = (torch.randn(2, n, 16, dtype=torch.float16) for n in (4, 7, 7))
    clear()
    found = torch.compile(function, backend="vblackwell", options={"downstream": "eager"})(q, k, v, _SHOWN_ROWS)
    expected = function(q, k, v, _SHOWN_ROWS)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=5e-3, rtol=5e-3)
    assert counters["vblackwell"]["fuse_attention"] == 1 and bool(expected.isnan().any())


@pytest.mark.parametrize("narrowed", [False, True])
def test_a_given_mask_in_float64(narrowed):
    """Scores keep their digits beside its fills, unless they are converted before the softmax."""

    def function(q, k, v, mask):
        scores = q @ k.mT + mask
        return (scores.float() if narrowed else scores).softmax(-1).float() @ v

    q, k, v = (torch.randn(2, n, 16) for n in (4, 7, 7))
    mask = torch.zeros(4, 7, dtype=torch.float64).masked_fill(~_SHOWN_ROWS, -1e9)
    clear()
    found = torch.compile(function, backend="vblackwell", options={"downstream": "eager"})(q, k, v, mask)
    torch.testing.assert_close(found, function(q, k, v, mask))
    assert counters["vblackwell"]["fuse_attention"] == narrowed


INFINITE = {  # scores that a mask of -inf makes NaN, or infinitely high; sites where the weights' NaN are cleared
    "a factor of infinity": (lambda s, m, a: s + (1 - m.to(s.dtype)) * -INF, 0),
    "infinity": (lambda s, m, a: s.masked_fill(~m, INF), 0),
    "a mask that is subtracted": (lambda s, m, a: s - a, 0),
    "a bent mask": (lambda s, m, a: F.gelu(s.masked_fill(~m, -INF)), 0),
    "a square": (lambda s, m, a: (s + a).square(), 0),
    "a quotient": (lambda s, m, a: s / m.to(s.dtype), 0),
    "halfway to a mask": (lambda s, m, a: torch.lerp(s, a, 0.5), 0),
    "a mask that is added": (lambda s, m, a: (s + a) * 0.5, 1),
    "a bounded mask": (lambda s, m, a: torch.tanh(s.masked_fill(~m, -INF)), 1),
    "two masks": (lambda s, m, a: torch.where(m, s * 2 + a, -INF), 1),
    "a factor of scores": (lambda s, m, a: (s * m[:, :1]).masked_fill(~m, -INF), 1),
}


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("name", INFINITE)
def test_infinities_beyond_a_mask(name, cleared):
    scores, sites = INFINITE[name]

    def function(q, k, v, shown, mask):
        weights = scores(q @ k.mT, shown, mask).softmax(-1)
        return (weights.nan_to_num() if cleared else weights) @ v

    q, k, v = (torch.randn(2, n, 16) for n in (4, 7, 7))
    given = q, k, v, _SHOWN_ROWS, torch.zeros(4, 7).masked_fill(~_SHOWN_ROWS, -INF)
    clear()
    found = torch.compile(function, backend="vblackwell", options={"downstream": "eager", "strict": True})(*given)
    torch.testing.assert_close(found, function(*given), equal_nan=True)
    assert counters["vblackwell"]["fuse_attention"] == (sites if cleared else 1)
