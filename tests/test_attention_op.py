"""The logical operator: meaning, gradients and implementations against plain PyTorch in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels import attention as op_module
from vbcompile.kernels import attention_sdpa
from vbcompile.kernels.attention import attention_backward_reference, attention_reference
from vbcompile.kernels.attention_case import make_case, rounds_to_tf32
from vbcompile.kernels.registry import describe, operator
from vbcompile.kernels.score_function import Builder, ScoreFunction, additive_bias, causal_offset

INF = math.inf


def causal(extra=lambda b, position: position, **fields) -> ScoreFunction:
    b = Builder()
    score = extra(b, b.emit("score"))
    mask = b.emit("ge", b.emit("q_index"), b.emit("k_index"))
    return ScoreFunction(b.program, score, mask, **fields)


def with_score(make, mask=None, sink=None, **fields) -> ScoreFunction:
    b = Builder()
    score = make(b, b.emit("score"))
    mask, sink = mask and mask(b), sink and sink(b)
    return ScoreFunction(b.program, score, mask, sink, **fields)


def softcap(b, s):
    return b.emit("mul", b.emit("tanh", b.emit("div", s, b.emit("const", 2.0))), b.emit("const", 2.0))


def plus(b, s):
    return b.emit("add", s, b.emit("captured", 0))


# name -> (function, shapes of captured tensors, the same written by hand on scaled scores [.., Q, K])
FORMS = {
    "plain": (ScoreFunction(), [], lambda s, c: s),
    "causal": (causal(), [], lambda s, c: s.masked_fill(_upper(s), -INF)),
    "bias": (with_score(plus), [(1, 3, 7, 7)], lambda s, c: s + c[0]),
    "bias_causal": (causal(plus), [(2, 1, 1, 7)], lambda s, c: (s + c[0]).masked_fill(_upper(s), -INF)),
    "softcap": (with_score(softcap), [], lambda s, c: 2 * torch.tanh(s / 2)),
    "temperature": (
        with_score(lambda b, s: b.emit("mul", s, b.emit("captured", 0))),
        [(1, 3, 1, 1)],
        lambda s, c: s * c[0],
    ),
    "bool_mask": (
        with_score(lambda b, s: s, mask=lambda b: b.emit("gt", b.emit("captured", 0), b.emit("const", -0.5))),
        [(2, 1, 1, 7)],
        lambda s, c: s.masked_fill(c[0] <= -0.5, -INF),
    ),
    "sink": (
        with_score(lambda b, s: s, sink=lambda b: b.emit("captured", 0)),
        [(1, 3, 1, 1)],
        lambda s, c: torch.cat([s, c[0].expand(*s.shape[:-1], 1)], -1),
    ),
}


def _upper(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)


def make_inputs(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lead, kv_lead = (2, 3), (2, 3)
    sizes = [(*lead, 7, 8), (*kv_lead, 7, 8), (*kv_lead, 7, 8), *shapes]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def by_hand(form, q, k, v, captured, scale):
    s = form((q @ k.mT) * scale, captured)
    p = torch.softmax(s, -1)[..., : k.shape[-2]]
    return p @ v


def run_op(inputs, scale, function):
    q, k, v, *captured = inputs
    return torch.ops.vblackwell.attention(q, k, v, captured, scale, 0.0, None, function.dumps())


def gradients(out: Tensor, inputs, seed=1):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((out.double() * weights).sum(), inputs, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_forward_and_gradients(name, dtype):
    function, shapes, form = FORMS[name]
    inputs = make_inputs(shapes, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    scale = 0.3
    want = by_hand(form, *exact[:3], exact[3:], scale)
    plain = by_hand(form, *inputs[:3], inputs[3:], scale)
    out, _ = run_op(inputs, scale, function)
    assert out.dtype == dtype
    floor = 4 * torch.finfo(dtype).eps
    pairs = [(out, plain, want)]
    pairs += list(zip(gradients(out, inputs), gradients(plain, inputs), gradients(want, exact), strict=True))
    for ours, theirs, truth in pairs:
        bound = 2 * (theirs.double() - truth).abs().max() + floor * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= bound


@pytest.mark.parametrize("name", FORMS)
def test_opcheck(name):
    function, shapes, _ = FORMS[name]
    q, k, v, *captured = make_inputs(shapes, torch.float32)
    arguments = (q, k, v, captured, 0.3, 0.0, None, function.dumps())
    torch.library.opcheck(torch.ops.vblackwell.attention.default, arguments)
    inputs = [t.detach() for t in (q, k, v, *captured)]
    out, lse = torch.ops.vblackwell.attention(*inputs[:3], inputs[3:], *arguments[4:])
    needs = [t.is_floating_point() for t in inputs]
    for grad_lse in (None, torch.randn_like(lse)):
        given = (torch.randn_like(out), grad_lse, *inputs[:3], inputs[3:], out, lse, *arguments[4:], needs)
        torch.library.opcheck(torch.ops.vblackwell.attention_backward.default, given)


def test_opcheck_of_the_copy():
    torch.library.opcheck(torch.ops.vblackwell.copy.default, (torch.randn(3, 4, requires_grad=True).t(),))


@pytest.mark.parametrize("rows_first", [False, True])
def test_memory_order_is_the_promised_one(rows_first):
    inputs = make_inputs([], torch.float32)
    out, lse = run_op(inputs, 1.0, ScoreFunction(rows_first=rows_first))
    order = out.transpose(1, 2) if rows_first else out
    assert order.is_contiguous() and lse.is_contiguous()


def test_grouped_queries_share_keys_without_a_copy():
    q = torch.randn(2, 2, 3, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 1, 5, 8, requires_grad=True) for _ in range(2))
    out, _ = run_op([q, k, v], 0.5, causal())
    want = torch.nn.functional.scaled_dot_product_attention(
        q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), is_causal=True, scale=0.5, enable_gqa=True
    ).unflatten(1, (2, 3))
    torch.testing.assert_close(out, want)
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(want, (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("empty_rows", ["nan", "zero"])
def test_rows_without_a_key(empty_rows):
    keep = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    keep[..., 2, :] = False
    function = ScoreFunction((("score",), ("captured", 0)), 0, 1, empty_rows=empty_rows)
    inputs = [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)]
    out, lse = run_op([*inputs, keep], 1.0, function)
    if empty_rows == "zero":
        want = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=keep, scale=1.0)
    else:
        want = by_hand(lambda s, c: s.masked_fill(~keep, -INF), *inputs, [], 1.0)
    torch.testing.assert_close(out, want, equal_nan=True)
    assert (lse[..., 2] == -INF).all()
    for ours, theirs in zip(gradients(out, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_gradient_of_lse():
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    _, lse = run_op([q, k, v], 0.7, causal())
    want = torch.logsumexp((q @ k.mT * 0.7).masked_fill(_upper(torch.empty(4, 4)), -INF), -1)
    torch.testing.assert_close(lse, want)
    for ours, theirs in zip(gradients(lse, (q, k)), gradients(want, (q, k)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 2, 0, 8)])
def test_empty_batch_and_empty_rows(shape):
    q = torch.randn(shape, requires_grad=True)
    k, v = (torch.randn(shape[0], 2, 4, 8, requires_grad=True) for _ in range(2))
    out, lse = run_op([q, k, v], 1.0, ScoreFunction())
    assert out.shape == shape and lse.shape == shape[:-1]
    out.sum().backward()
    assert k.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.long(), k.long(), v.long()), "floating dtype"),
        (lambda q, k, v: (q, k[0], v), "one rank"),
        (lambda q, k, v: (q, k[..., :4], v), "do not fit"),
        (lambda q, k, v: (q, k.double(), v), "one floating dtype"),
    ],
)
def test_bad_input_names_the_problem(change, message):
    q, k, v = change(*(torch.randn(1, 2, 4, 8) for _ in range(3)))
    with pytest.raises(ValueError, match=message):
        run_op([q, k, v], 1.0, ScoreFunction())


def test_dropout_without_seed_is_an_error():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="seed"):
        torch.ops.vblackwell.attention(q, q, q, [], 1.0, 0.5, None, ScoreFunction().dumps())


# ------------------------------------------------------------------------------------------------ score functions
def test_score_function_text_round_trip():
    b = Builder()
    value = b.emit("where", b.emit("to_bool", b.emit("captured", 0)), b.emit("score"), b.emit("const", -INF))
    function = ScoreFunction(b.program, value, rows_first=True)
    assert ScoreFunction.loads(function.dumps()) == function
    assert "Infinity" not in function.dumps()


@pytest.mark.parametrize("program", [(("score",), ("nothing", 0)), (("score",), ("add", 0)), (("score",), ("neg", 1))])
def test_malformed_programs_are_refused(program):
    with pytest.raises(ValueError, match=r"unknown instruction|malformed"):
        ScoreFunction(program)


def test_causal_offset_is_found_in_any_spelling():
    for q, k, expected in [(4, 4, 0), (4, 9, 5)]:
        b = Builder()
        shift = b.emit("sub", b.emit("k_length"), b.emit("q_length"))
        mask = b.emit("le", b.emit("k_index"), b.emit("add", shift, b.emit("q_index")))
        assert causal_offset(ScoreFunction((*b.program, ("score",)), len(b.program), mask), q, k) == expected
    assert causal_offset(causal(softcap), 4, 4) is None


def test_additive_bias_refuses_what_is_not_additive():
    assert additive_bias(with_score(softcap)) is None
    assert additive_bias(with_score(lambda b, s: b.emit("sub", b.emit("captured", 0), s))) is None
    assert additive_bias(with_score(lambda b, s: b.emit("add", s, s))) is None
    assert additive_bias(with_score(plus)) is not None


def test_precision_of_products_may_be_set_either_way():
    """``allow_tf32`` cannot be read once ``fp32_precision`` is set."""
    q, products = SimpleNamespace(dtype=torch.float32, is_cuda=True), torch.backends.cuda.matmul
    try:
        for setting, expected in (("tf32", True), ("ieee", False)):
            products.fp32_precision = setting
            assert op_module._settings("attention", q)[2] is expected
        for setting, expected in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(setting)
            assert rounds_to_tf32(q) is expected
    finally:
        torch.set_float32_matmul_precision("highest")


# ------------------------------------------------------------------------------------------------------- choice
def target(vendor, device_type, arch):
    return Target(vendor=vendor, device_type=device_type, arch=arch, name=arch)


def test_choice_is_explained_for_machines_one_does_not_have():
    q = torch.empty(2, 4, 128, 64, dtype=torch.bfloat16)
    case = make_case(q, q, q, [], 1.0, 0.0, causal().dumps())
    hopper = operator("attention").choose(target("nvidia", "cuda", "sm_90"), case)
    ampere = operator("attention").choose(target("nvidia", "cuda", "sm_80"), case)
    assert ampere.implementation.name != "cudnn"
    assert ("cpu_flash", "runs on CPU only") in hopper.elsewhere
    assert operator("attention").choose(target("cpu", "cpu", "cpu"), case).implementation.name == "cpu_flash"


def test_describe_lists_every_implementation():
    rows = describe(target("cpu", "cpu", "cpu"))
    assert ("attention", "reference", "") in rows
    assert ("attention", "cudnn", "needs an NVIDIA GPU") in rows


def test_reference_is_the_last_resort():
    q = torch.randn(1, 2, 4, 8)
    case = make_case(q, q, q, [], 1.0, 0.0, with_score(softcap).dumps())
    chosen = operator("attention").choose(target("cpu", "cpu", "cpu"), case)
    assert chosen.implementation.run is op_module.attention_reference


# ------------------------------------------------------------------------------------------ PyTorch's kernel on CPU
@pytest.mark.parametrize("widths", [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize("lead", [((4,), (1,)), ((2, 3), (2, 1)), ((2, 2, 3), (2, 2, 1)), ((2, 2, 3), (1, 2, 3))])
def test_cpu_kernel_takes_shared_heads_and_two_widths(lead, widths):
    q = torch.randn(*lead[0], 6, widths[0])
    k, v = (torch.randn(*lead[1], 7, width) for width in widths)
    captured = [torch.randn(*lead[1], 6, 7)]
    function = ScoreFunction((("score",), ("captured", 0), ("add", 0, 1)), 2).dumps()
    arguments, needs = (captured, 0.3, 0.0, None, function), [True, True, True, False]
    out, lse = attention_sdpa._cpu_forward(q, k, v, *arguments)
    expected = attention_reference(q, k, v, *arguments)
    torch.testing.assert_close((out, lse), expected)
    grad = torch.randn_like(out)
    ours = attention_sdpa._cpu_backward(grad, None, q, k, v, captured, out, lse, *arguments[1:], needs)
    theirs = attention_backward_reference(grad, None, q, k, v, captured, *expected, *arguments[1:], needs)
    torch.testing.assert_close(ours[:3], theirs[:3], atol=1e-5, rtol=1e-4)


def test_cpu_kernel_reads_grouped_keys_where_they_are():
    q, k = torch.randn(2, 2, 3, 6, 8), torch.randn(2, 2, 1, 6, 8)
    call = attention_sdpa._CpuCall(q, k, k, [], 1.0, ScoreFunction())
    assert [t.data_ptr() for t in call.tensors] == [q.data_ptr(), k.data_ptr(), k.data_ptr()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_derivatives(dropout):
    """Of the result and of ``lse``, by captured tensors too; and a third, where one tensor is everything."""
    b = Builder()
    logits = b.emit("tanh", b.emit("add", b.emit("score"), b.emit("captured", 0)))
    mask = b.emit("le", b.emit("k_index"), b.emit("add", b.emit("q_index"), b.emit("const", 1)))
    function = ScoreFunction(b.program, logits, mask).dumps()
    shapes = (1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 3), (1, 1, 3, 4)
    inputs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    seed = torch.tensor([7]) if dropout else None

    def ours(q, k, v, bias):
        return op_module.attention(q, k, v, [bias], 0.7, dropout, seed, function)

    assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)

    def second(x):
        y = op_module.attention(x, x, x, [], 0.7, 0.0, None, ScoreFunction().dumps())[0].square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(
        second, torch.randn(1, 1, 3, 2, dtype=torch.float64).requires_grad_(), fast_mode=True
    )
