"""Training with FP4 weights: straight-through rounding of trained weights, adapters on frozen ones."""

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import Feed, compiled, decoded_twin, reasons, rounded
from torch import nn

from vbcompile.kernels.fp4_straight_through import fp4_fake_quantize
from vbcompile.passes import fp4_weights

pytestmark = pytest.mark.usefixtures("fresh_weights")


def trained(model, **options):
    return compiled(model, fp4_qat=True, mixed_precision=False, **options)


class StraightThrough(torch.autograd.Function):
    """The reference: FP4 values forwards, the gradient as it comes."""

    @staticmethod
    def forward(ctx, weight):
        return rounded(weight.float()).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Reference(Feed):
    """The same block in float64 with the reference rounding."""

    def forward(self, x):
        gate, up, down = (
            F.linear(y, StraightThrough.apply(layer.weight), layer.bias) if y is not None else layer
            for y, layer in ((x, self.gate), (x, self.up), (None, self.down))
        )
        return x + F.linear(F.silu(gate) * up, StraightThrough.apply(down.weight), down.bias)


def test_forward_and_gradients_equal_a_float64_reference(reports):
    model, reference = Feed(), Reference()
    reference.load_state_dict(model.state_dict())
    reference.double()
    x = torch.randn(5, 128, requires_grad=True)
    y = x.detach().double().requires_grad_()
    got, want = trained(model)(x), reference(y)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    found = [d.reason for d in reports[0].decisions if d.action == "rewritten"]
    assert len(found) == 3 and all("trained for nvfp4, relative error 0.0" in reason for reason in found)


def test_training_reduces_the_loss_of_the_packed_model():
    """What is trained is what runs: the packed model's loss falls."""
    model, x, target = Feed(), torch.randn(64, 128), torch.randn(64, 128)
    run, optimizer = trained(model), torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.mse_loss(run(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():  # the compiled model without gradients runs packed weights with the same values
        packed = F.mse_loss(compiled(model, mixed_precision=False)(x), target)
        assert float(packed) == pytest.approx(float(F.mse_loss(run(x), target)), rel=1e-4)
        assert float(packed) < losses[-1] * 1.05


def test_the_values_are_those_of_the_packed_weight():
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(70, 100).to(dtype)
        for format_name in ("nvfp4", "mxfp4"):
            want = rounded(weight, format_name) if dtype == torch.float32 else None
            got = fp4_fake_quantize(weight, format_name, False)
            assert got.dtype == dtype and got.is_contiguous()
            torch.testing.assert_close(
                got, want if want is not None else rounded(weight, format_name), rtol=1e-2, atol=0
            )
            assert torch.equal(fp4_fake_quantize(weight.t(), format_name, True), got.t())
    again = fp4_fake_quantize(rounded(torch.randn(64, 64)), "nvfp4", False)
    assert torch.equal(fp4_fake_quantize(again, "nvfp4", False), again)


def test_the_operator_follows_the_rules():
    weight = torch.randn(32, 48, requires_grad=True)
    torch.library.opcheck(fp4_fake_quantize, (weight, "nvfp4", False))
    torch.library.opcheck(fp4_fake_quantize, (torch.randn(2, 48, 32, requires_grad=True), "mxfp4", True))


def test_what_is_not_finite_stays_visible():
    weight = torch.randn(32, 32)
    weight[3, 4] = torch.nan
    broken = fp4_fake_quantize(weight, "nvfp4", False).isnan()
    assert broken[3, :16].all() and int(broken.sum()) == 16  # its block
    with pytest.raises(ValueError, match=r"torch\.int8 weights cannot be quantized"):
        fp4_fake_quantize(torch.ones(32, 32, dtype=torch.int8), "nvfp4", False)


class Spelled(nn.Module):
    """A weight that is used twice, a transposed one, and a stack of experts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(192, 192) * 0.1) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(2, 192, 192) * 0.1)

    def forward(self, x):
        x = x @ self.a + F.linear(x, self.b) + x @ self.b.t()
        return torch.bmm(x.expand(2, -1, -1), self.experts.mT)


def test_every_spelling_is_trained(reports):
    model, x = Spelled(), torch.randn(3, 192)
    twin = Spelled()
    values = {"a": rounded(model.a.t()).t(), "b": rounded(model.b), "experts": rounded(model.experts)}
    twin.load_state_dict(values)
    got, want = trained(model)(x), twin(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    want.sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert reports[0].count("rewritten", "fp4") == 4


def test_weights_above_the_error_limit_are_trained_as_they_are(reports):
    model, x = Feed(), torch.randn(2, 128)
    torch.testing.assert_close(trained(model, fp4_max_error=0.05)(x), model(x))
    assert all("above fp4_max_error=0.05" in reason for reason in reasons(reports[0]))


# ------------------------------------------------------------------------------------------------------------ adapters
class Block(nn.Module):
    """Two projections of one input and an output projection, as in attention."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x):
        return x + self.o_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x))


def lora(model):
    """The model as ``peft`` changes it, with adapters that do something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return adapted


def test_peft_adapters_on_a_frozen_fp4_base(reports):
    base = Block()
    adapted = lora(base)
    names = [n for n, p in adapted.named_parameters() if "base_layer.weight" in n]
    twin = decoded_twin(adapted, *names).double()
    x = torch.randn(5, 128, requires_grad=True)
    y = x.detach().double().requires_grad_()
    run = compiled(adapted, mixed_precision=False)
    run(x).square().sum().backward()
    twin(y).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(adapted.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == ("lora" not in name)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert len(names) == 3 and sum(r.count("rewritten", "fp4") for r in reports) == 3


def test_a_step_of_the_adapters_keeps_the_base_packed():
    adapted = lora(Block())
    run = compiled(adapted, mixed_precision=False)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    x, target, losses = torch.randn(32, 128), torch.randn(32, 128), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.mse_loss(run(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert {packed.states[0][1] for packed in fp4_weights._packed.values()} == {0}  # nothing was packed twice
    with torch.no_grad():
        names = [n for n, _ in adapted.named_parameters() if "base_layer.weight" in n]
        torch.testing.assert_close(run(x), decoded_twin(adapted, *names)(x), rtol=1e-4, atol=1e-4)
