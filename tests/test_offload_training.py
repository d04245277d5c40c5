"""Training with offloaded weights: gradients and updates are those of the ordinary model."""

import copy

import pytest
import torch
from offload_models import blocks
from torch import nn

import vbcompile
from vbcompile.handles import OffloadedTensor


def offload(model: nn.Module, budget: str) -> nn.Module:
    return vbcompile.offload(model, "cpu", {0: budget, "cpu": "64MiB"}, smallest=1024, progress=False)


def compiled(model, downstream: str = "aot_eager"):
    torch._dynamo.reset()
    return torch.compile(
        model, backend="vblackwell", options={"mode": "memory", "strict": True, "downstream": downstream}
    )


def gradients(model, run, x) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(x).square().mean().backward()
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("downstream", "budget"), [("aot_eager", "130KiB"), ("aot_eager", "400KiB"), ("inductor", "130KiB")]
)
def test_gradients(downstream, budget):
    model, x = blocks(), torch.randn(3, 32)
    expected = gradients(model, model, x)
    offload(model, budget)
    run = compiled(model, downstream)
    for _ in range(3):
        found = gradients(model, run, x)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
    assert isinstance(model[0].up.weight.grad, OffloadedTensor)
    (stats,) = vbcompile.stats(model)
    assert stats.steps == 3 and stats.runtime["misses"] == 0 and stats.runtime["fetched_bytes"] == 0
    assert (stats.planned_bytes > 0) == (budget == "130KiB")
    assert stats.runtime["detour_bytes"] == stats.runtime["wasted_bytes"] == 0


def test_gradients_add_up():
    model, twin = blocks(), blocks()
    offload(model, "130KiB")
    run = compiled(model)
    for _ in range(3):
        x = torch.randn(3, 32)
        run(x).sum().backward()
        twin(x).sum().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, msg=name)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_on_the_host(kind):
    model, twin = blocks(), blocks()
    offload(model, "130KiB")
    run = compiled(model)
    groups = [{"params": list(model.parameters())[:3], "lr": 2e-3}, {"params": list(model.parameters())[3:]}]
    ours = vbcompile.optimizer(kind, groups, lr=1e-3)
    others = [{"params": list(twin.parameters())[:3], "lr": 2e-3}, {"params": list(twin.parameters())[3:]}]
    theirs = kind(others, lr=1e-3)
    assert isinstance(ours, kind)
    for _ in range(6):
        x = torch.randn(3, 32)
        for each, optimizer in ((run, ours), (twin, theirs)):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    assert all(p.device.type == "cpu" for group in ours.param_groups for p in group["params"])
    fresh = vbcompile.optimizer(kind, model.parameters(), lr=1e-3)
    assert len(fresh.param_groups) == 1
    with pytest.raises(TypeError, match="AdamW"):
        vbcompile.optimizer("AdamW", model.parameters())


def test_frozen_weights_with_trained_adapters():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = blocks().requires_grad_(False)
            self.inside = nn.Linear(32, 4, bias=False)
            self.outside = nn.Linear(4, 32, bias=False)

        def forward(self, x):
            x = x + self.outside(self.inside(x))
            return self.body(x)

    model, x = Adapted(), torch.randn(3, 32)
    twin = copy.deepcopy(model)
    expected = gradients(twin, twin, x)
    offload(model, "130KiB")
    found = gradients(model, compiled(model), x)
    assert found.keys() == expected.keys() == {"inside.weight", "outside.weight"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    (stats,) = vbcompile.stats(model)
    assert stats.planned_bytes > 0 and stats.runtime["fetched_bytes"] == 0


def test_a_step_without_a_backward_is_forgotten():
    model, x = blocks(), torch.randn(3, 32)
    expected = gradients(model, model, x)
    offload(model, "130KiB")
    run = compiled(model)
    for _ in range(2):
        run(x)
    found = gradients(model, run, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    with torch.no_grad():
        torch.testing.assert_close(run(x), run(x))


class Parallel(nn.Module):
    """A block whose feed-forward layer reads what attention reads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.up, self.out, self.down = (nn.Linear(32, 32) for _ in range(6))

    def forward(self, x):
        q, k, v = (layer(x).view(2, 5, 2, 16).transpose(1, 2) for layer in (self.q, self.k, self.v))
        up = self.up(x)
        x = x + self.out(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 32))
        return x + self.down(nn.functional.gelu(up))


@pytest.mark.parametrize(
    ("mode", "kind", "frozen", "budget"),
    [
        ("memory", "encoder", False, "128KiB"),
        ("memory", "parallel", True, "110KiB"),
        ("full", "parallel", True, "96KiB"),
    ],
)
def test_gradients_cross_rewritten_operators(mode, kind, frozen, budget):
    """A cut next to what a pass has written: attention, or one product of several packed layers."""
    torch.manual_seed(0)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    else:
        body = nn.Sequential(*(Parallel() for _ in range(4)))
    model = nn.ModuleDict({"before": nn.Linear(32, 32), "body": body.requires_grad_(not frozen)})
    goal, x = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    options = {"mode": mode, "strict": True, "downstream": "aot_eager", "mixed_precision": False}

    def found(compiles):
        torch._dynamo.reset()
        model.zero_grad()
        step = lambda x: model["body"](model["before"](x)) * goal
        run = torch.compile(step, backend="vblackwell", options=options) if compiles else step
        run(x).sum().backward()
        return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = found(mode == "full")
    offload(model, budget)
    ours = found(True)
    assert vbcompile.stats(model)[0].planned_bytes > 0 and ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_weights_packed_anew_between_forward_and_backward_are_an_error():
    model, x = blocks(96).eval().requires_grad_(False), torch.randn(3, 96, requires_grad=True)
    offload(model, "160KiB")
    torch._dynamo.reset()
    options = {"mode": "full", "strict": True, "downstream": "eager", "mixed_precision": False}
    run = torch.compile(model, backend="vblackwell", options=options)
    loss = run(x).sum()
    with torch.no_grad():
        model[1].up.weight.mul_(2)
    loss.backward(retain_graph=True)  # the packed weight is that of the forward
    run(x)
    with pytest.raises(RuntimeError, match="packed was written to between the forward and the backward"):
        loss.backward()


def test_backwards_through_a_retained_graph_give_their_memory_back():
    model, twin, x = blocks(), blocks(), torch.randn(3, 32)
    offload(model, "96KiB")
    for run in (compiled(model), twin):
        loss, other = run(x).square().mean(), run(2 * x).square().mean()
        for _ in range(3):
            loss.backward(retain_graph=True)
        other.backward(retain_graph=True)
        loss.backward()
        other.backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, msg=name)


def test_what_would_need_gradients_from_autograd_is_refused():
    model = blocks()
    offload(model, "130KiB")
    hook = model[0].up.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(RuntimeError, match="has a hook for its gradient"):
        compiled(model)(torch.randn(3, 32))
    hook.remove()
    compiled(model)(torch.randn(3, 32)).sum().backward()
    with pytest.raises(TypeError, match="LBFGS evaluates the model within a step"):
        vbcompile.optimizer(torch.optim.LBFGS, model.parameters())


def test_gradients_that_somebody_holds_stay():
    model, twin, x = blocks(), blocks(), torch.randn(3, 32)
    offload(model, "130KiB")
    for each, run in ((model, compiled(model)), (twin, twin)):
        run(x).square().mean().backward()
        held = [p.grad for p in each.parameters()]
        each.zero_grad()
        run(2 * x).square().mean().backward()
        for parameter, gradient in zip(each.parameters(), held, strict=True):
            parameter.grad = gradient
        run(3 * x).square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, msg=name)


def test_gradients_that_add_up_take_memory_once():
    model, x = blocks(), torch.randn(3, 32)
    offload(model, "130KiB")
    run, host, taken = compiled(model), model[0].up.weight.payload.residence.host, []
    for _ in range(6):
        run(x).square().mean().backward()
        taken.append(host.use.payload)
    assert taken[1] == taken[-1]


def test_tied_and_clipped():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.body = blocks(depth=3)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.body(self.embed(ids)))

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(5)
    twin = copy.deepcopy(model)
    offload(model, "170KiB")
    run = compiled(model)
    for each, call in ((model, run), (twin, twin)):
        call(ids).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(each.parameters(), 0.01)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, msg=name)


class _Gated(nn.Module):
    """``gate`` is used where autograd does not record."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        with torch.no_grad():
            gate = self.gate(x).sigmoid()
            with torch.no_grad():
                gate = self.gate(gate)
        return x + self.down(self.up(x).relu()) * gate


@pytest.mark.parametrize("budget", ["48KiB", "100KiB"])
def test_weights_used_without_gradient_get_none(budget):
    """Not zero, which an optimizer with weight decay would act on."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(_Gated() for _ in range(3))), torch.randn(3, 32)
    expected = gradients(model, model, x)
    offload(model, budget)
    found = gradients(model, compiled(model), x)
    assert found.keys() == expected.keys() and not any("gate" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
