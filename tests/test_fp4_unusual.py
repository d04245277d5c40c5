"""Products with constant weights that models rarely write: packed right, or left with a reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import interpreted, reasons, rounded
from torch import nn

from vbcompile.passes import fp4_weights

pytestmark = [pytest.mark.usefixtures("fresh_weights"), pytest.mark.filterwarnings("ignore:.*batching rule")]


class Model(nn.Module):
    """``run(self, x)`` on two square layers, a bias of one number, and a stack of experts."""

    def __init__(self, run):
        super().__init__()
        self.one, self.two = nn.Linear(192, 192), nn.Linear(192, 192)
        self.register_buffer("big", torch.randn(384, 192))
        self.register_buffer("part", self.big[:192])
        self.register_buffer("number", torch.randn(1))
        self.stack = nn.Parameter(torch.randn(2, 192, 192))
        self.cache = torch.randn(192, 192)
        torch._dynamo.mark_static_address(self.cache)
        self.run = run
        self.requires_grad_(False)

    def forward(self, x):
        return self.run(self, x)


def outcome(run, reports, x=None, **options):
    """What the compiled model gives, what the model with FP4 values gives, and the reasons."""
    model, x = Model(run), torch.randn(3, 192) if x is None else x
    twin = copy.deepcopy(model)
    twin.part = twin.big[:192]
    with torch.no_grad():
        for parameter in (twin.one.weight, twin.two.weight, twin.stack):
            parameter.copy_(rounded(parameter))
        got, want = interpreted(model, **options)(x), twin(x)
    assert not reports[0].failures
    return got, want, reasons(reports[0])


LEFT = {
    "a bias of one number": (lambda m, x: F.linear(x, m.big, m.number), "not one number for each output"),
    "addmm of a matrix": (lambda m, x: torch.addmm(x, x, m.part), "not one number for each output"),
    "addmm with factors": (lambda m, x: torch.addmm(m.one.bias, x, m.part, alpha=2), "beta or alpha"),
    "memory that is written": (lambda m, x: (m.big.mul_(2), F.linear(x, m.part))[1], "writes to the weight"),
    "forward mode": (
        lambda m, x: torch.func.jvp(lambda y: F.linear(y, m.part).sin(), (x,), (x,))[1], "function transform",
    ),
    "vmap": (lambda m, x: torch.vmap(lambda y: F.linear(y, m.part))(x), "function transform"),
}  # fmt: skip


@pytest.mark.parametrize("form", LEFT)
def test_what_an_fp4_product_does_not_do_is_left(form, reports):
    run, reason = LEFT[form]
    got, want, (found,) = outcome(run, reports)
    torch.testing.assert_close(got, want)
    assert reason in found


def test_caches_are_no_weights(reports):
    got, want, found = outcome(lambda m, x: x @ m.cache.t(), reports)
    torch.testing.assert_close(got, want)
    assert not found and not reports[0].count("rewritten", "fp4")


PACKED_TWICE = {
    "a gate that is read again": lambda m, x: (F.silu(m.one(x)) * m.two(x), m.one(x)),
    "in both precisions": lambda m, x: (m.one(x), m.one(x.bfloat16().float()), m.two(x)),
    "a group and a part of it": lambda m, x: (m.one(x), m.two(x), m.one(x + 1)),
}


@pytest.mark.parametrize("form", PACKED_TWICE)
def test_one_weight_in_several_products(form, reports):
    got, want, found = outcome(PACKED_TWICE[form], reports)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert not found


def test_one_weight_in_both_orientations(reports):
    model, x = Model(lambda m, x: x @ m.one.weight @ m.one.weight.t()), torch.randn(3, 192)
    with torch.no_grad():
        got = interpreted(model)(x)
        weight = model.one.weight
        want = x @ rounded(weight.t().contiguous()).t() @ rounded(weight).t()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert reports[0].count("rewritten", "fp4") == 2


def test_the_bias_of_an_expert_under_autocast(reports):
    def run(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, m.stack[1], m.one.bias)

    got, want, _ = outcome(run, reports)
    assert got.dtype == want.dtype == torch.bfloat16 and reports[0].count("rewritten", "fp4") == 1
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0.3)


def test_another_thread_may_come_between(monkeypatch):
    """Two layers share one compiled graph; the second is called while the packed tensors of the first are looked up."""
    layers, x = [nn.Linear(192, 192).requires_grad_(False) for _ in range(2)], torch.randn(3, 192)
    run = interpreted(lambda layer, x: layer(x))
    want = [F.linear(x, rounded(layer.weight), layer.bias) for layer in layers]
    for layer in layers[::-1]:
        run(layer, x)  # the graph now holds the weights of the first
    looked, between = fp4_weights.Packed.is_current, []

    def interrupted(self, weights, watch):
        current = looked(self, weights, watch)
        if not between:
            between.append(None)
            between.append(run(layers[1], x))
        return current

    monkeypatch.setattr(fp4_weights.Packed, "is_current", interrupted)
    torch.testing.assert_close(run(layers[0], x), want[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(between[1], want[1], rtol=1e-4, atol=1e-4)
