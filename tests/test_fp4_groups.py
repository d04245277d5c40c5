"""Layers that share their input run as one product, with the results that they have alone."""

import operator

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import compiled, reasons, rounded
from torch import nn

pytestmark = pytest.mark.usefixtures("fresh_weights")


class Three(nn.Module):
    """Three layers of one input, whose results go through ``then``."""

    def __init__(self, then=lambda q, k, v: (q, k, v), bias=False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(128, 256, bias), nn.Linear(128, 320, bias), nn.Linear(128, 512, bias)
        self.then = then

    def forward(self, x):
        return self.then(self.q(x), self.k(x), self.v(x))


def groups(report):
    """Names of the layers that each rewritten layer runs with."""
    rewritten = [d for d in report.decisions if d.pass_name == "fp4" and d.action == "rewritten"]
    return [sorted((d.site.split(" ")[0], *d.details["fused_with"])) for d in rewritten]


THEN = {
    "returned": lambda q, k, v: (q, k, v),
    "flattened": lambda q, k, v: (q.view(-1), k.reshape(-1), v.flatten()),
    "heads": lambda q, k, v: (q.view(2, 3, 4, 64).transpose(1, 2), k.view(2, 3, 5, -1).sum(1), v.unflatten(2, (8, 64))),
    "strided": lambda q, k, v: (q.as_strided((2, 3), (1, 2)), k.t_() if k.ndim == 2 else k, v * v.stride(0)),
    "in place": lambda q, k, v: (q.mul_(2), k.add_(q.sum()), v),
    "chunks": lambda q, k, v: (*q.chunk(2, -1), *k.split(64, -1), v.view(2, -1)),
    "sums": lambda q, k, v: F.silu(q)[..., :64] * k[..., -64:] + v[..., 64:128],
}  # fmt: skip


@pytest.mark.parametrize("then", THEN)
def test_results_are_those_of_the_layers_alone(then, reports):
    model, x = Three(THEN[then]).requires_grad_(False), torch.randn(2, 3, 128)
    with torch.no_grad():
        together = compiled(model)(x)
        torch._dynamo.reset()
        alone = compiled(model, fp4_fuse=False)(x)
    assert groups(reports[0]) == [["k", "q", "v"]] * 3 and groups(reports[1]) == [["q"], ["k"], ["v"]]
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs)


def test_biases_run_along(reports):
    model, x = Three(bias=True).requires_grad_(False), torch.randn(5, 128)
    got = compiled(model)(x)
    for ours, layer in zip(got, (model.q, model.k, model.v), strict=True):
        torch.testing.assert_close(ours, F.linear(x, rounded(layer.weight), layer.bias), rtol=1e-5, atol=1e-5)
    assert groups(reports[0]) == [["k", "q", "v"]] * 3


def test_gradients_reach_the_input_and_the_biases(reports):
    model, x = Three(bias=True), torch.randn(5, 128, requires_grad=True)
    for layer in (model.q, model.k, model.v):
        layer.weight.requires_grad_(False)
    sum(y.square().sum() for y in compiled(model, mixed_precision=False)(x)).backward()
    y = x.detach().clone().requires_grad_()
    wanted = [F.linear(y, rounded(m.weight), m.bias.detach()) for m in (model.q, model.k, model.v)]
    sum(w.square().sum() for w in wanted).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.k.bias.grad, 2 * wanted[1].detach().sum(0), rtol=1e-4, atol=1e-4)
    assert groups(reports[0]) == [["k", "q", "v"]] * 3


def test_a_layer_that_cannot_be_packed_stays_alone(reports):
    model, x = Three().requires_grad_(False), torch.randn(2, 128)
    model.k.weight[3, 4] = torch.inf
    got = compiled(model, fp4_max_error=0.1)(x)
    torch.testing.assert_close(got[0], F.linear(x, rounded(model.q.weight)), rtol=1e-5, atol=1e-5)
    assert groups(reports[0]) == [["q", "v"]] * 2
    (infinite,) = reasons(reports[0])
    assert infinite.startswith("k: holds NaN or infinity")
    torch._dynamo.reset()
    with torch.no_grad():
        model.v.weight.copy_(rounded(torch.randn(512, 128)))  # all but free of error
    compiled(model, fp4_max_error=0.05)(x)
    assert groups(reports[1]) == [["v"]] and "above fp4_max_error" in reasons(reports[1])[0]


class Written(nn.Module):
    """The input changes between the layers."""

    def __init__(self, change):
        super().__init__()
        self.a, self.b, self.change = nn.Linear(192, 192), nn.Linear(192, 192), change

    def forward(self, x):
        x = x * 1
        first = self.a(x)
        self.change(x, first)
        return first, self.b(x)


CHANGES = {
    "method": lambda x, y: x.add_(1),
    "through a view": lambda x, y: x.view(-1)[3:9].zero_(),
    "item": lambda x, y: operator.setitem(x, 0, y[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_is_not_shared(change, reports):
    model, x = Written(CHANGES[change]).requires_grad_(False), torch.randn(3, 192)
    got, twin = compiled(model)(x), Written(CHANGES[change])
    twin.load_state_dict({n: rounded(p) if p.ndim == 2 else p for n, p in model.state_dict().items()})
    for ours, theirs in zip(got, twin(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert [group for report in reports for group in groups(report)] == [["a"], ["b"]]


def test_an_update_of_one_weight_packs_the_group_again():
    model, x = Three().requires_grad_(False), torch.randn(2, 128)
    run = compiled(model)
    run(x)
    model.k.weight.mul_(-1)
    for ours, layer in zip(run(x), (model.q, model.k, model.v), strict=True):
        torch.testing.assert_close(ours, F.linear(x, rounded(layer.weight)), rtol=1e-5, atol=1e-5)


def test_dropped_groups_keep_running():
    model, x = Three().requires_grad_(False), torch.randn(2, 128)
    wanted = [F.linear(x, rounded(layer.weight)) for layer in (model.q, model.k, model.v)]
    run = compiled(model, fp4_master="drop")
    for _ in range(3):
        for ours, theirs in zip(run(x), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(layer.weight.untyped_storage().nbytes() == 4 for layer in (model.q, model.k, model.v))
