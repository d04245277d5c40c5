"""High-precision weights beside packed ones: noticing writes, giving them up, moving them to the host and back."""

import io
import sys

import pytest
import torch
from fp4_compiling import FEED, Feed, decoded_twin, interpreted
from torch import nn

import vbcompile
from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.passes.fp4_progress import progress
from vbcompile.passes.fp4_weights import PackKey, give_up, is_hollow, pack

KEY = PackKey("nvfp4", "plain", False)


pytestmark = pytest.mark.usefixtures("fresh_weights")


def frozen(*shape):
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


def current(weight, watch="samples"):
    """The packed values of a weight as a compiled graph would take them."""
    linear = pack([weight], KEY, ["weight"], watch).linear
    return linear.codes.clone()


def packed_now(weight):
    return quantize(weight.detach()).codes


# -------------------------------------------------------------------------------------------------------------- writes
WRITES = {
    "in place": lambda w: w.mul_(-1),
    "data in place": lambda w: w.data.mul_(-1),
    "data copied": lambda w: w.data.copy_(torch.randn_like(w)),
    "data replaced": lambda w: setattr(w, "data", torch.randn_like(w)),
    "numpy": lambda w: w.detach().numpy().__imul__(-1),
    "set": lambda w: w.set_(torch.randn_like(w)),
    "requantize": lambda w: (w.data[3, 5:6].fill_(9.0), vbcompile.requantize()),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_noticed_on_a_cpu(write):
    weight = frozen(64, 64)
    before = current(weight)
    with torch.no_grad():
        WRITES[write](weight)
    after = current(weight)
    assert after.equal(packed_now(weight)) and not after.equal(before)
    assert current(weight).equal(after)


def test_contents_are_watched_by_option():
    """One element, written where no sample is taken: only a checksum shows it."""
    weight = frozen(64, 64)
    before = current(weight, "contents")
    weight.data[3, 5] += 50.0
    assert current(weight, "samples").equal(before)
    assert current(weight, "contents").equal(packed_now(weight))
    weight.data[[3, 4]] = weight.data[[4, 3]].clone()  # the same values in other places
    assert current(weight, "contents").equal(packed_now(weight))


def test_contents_are_watched_in_a_compiled_model():
    model, x = Feed(), torch.randn(2, 128)
    run = interpreted(model, fp4_watch="contents")
    with torch.no_grad():
        run(x)
        model.up.weight.data[7, 9] += 3.0
        torch.testing.assert_close(run(x), decoded_twin(model, *FEED)(x), rtol=1e-5, atol=1e-5)


class DataOptimizer(torch.optim.Optimizer):
    """Writes as optimizers did before ``torch.no_grad``."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data[3, 5] += 40.0  # where no sample is taken


def test_any_optimizer_step_is_noticed():
    weight = nn.Parameter(torch.randn(64, 64))
    before = current(weight)
    DataOptimizer([weight]).step()
    after = current(weight)
    assert after.equal(packed_now(weight)) and not after.equal(before)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("foreach", [False, True])
def test_torch_optimizers_are_noticed(optimizer, foreach):
    weight = nn.Parameter(torch.randn(64, 64))
    before = current(weight)
    weight.grad = torch.randn_like(weight)
    optimizer([weight], lr=0.5, foreach=foreach).step()
    assert not current(weight).equal(before) and current(weight).equal(packed_now(weight))


def test_evaluation_after_training_uses_the_new_weights():
    model, x = Feed(), torch.randn(2, 128)
    run, optimizer = interpreted(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run(x), decoded_twin(model, *FEED)(x), rtol=1e-5, atol=1e-5)
        model(x).square().mean().backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------------- giving them up
@pytest.mark.parametrize("to_host", [False, True])
def test_giving_up_and_packing_once_more(to_host):
    weight = frozen(64, 128)
    values, before = weight.detach().clone(), current(weight)
    give_up(weight, KEY, "weight", to_host)
    assert weight.isnan().all() and weight.untyped_storage().nbytes() == 4 and is_hollow(weight)
    assert current(weight).equal(before)
    tiles = pack([weight], PackKey("nvfp4", "fragments2", False), ["weight"])  # another layout, same values
    assert tiles.linear.layout == "fragments2"
    other = PackKey("mxfp4", "plain", False)
    if to_host:
        assert pack([weight], other, ["weight"]).linear.codes.equal(quantize(values, "mxfp4").codes)
        return
    with pytest.raises(ValueError, match=r"^weight: its high-precision values were dropped"):
        pack([weight], other, ["weight"])


def test_masters_come_back_from_the_host():
    model = Feed()
    values = {name: model.get_parameter(name).detach().clone() for name in FEED}
    for name in FEED:
        give_up(model.get_parameter(name), KEY, name, to_host=True)
    assert vbcompile.restore_weights(model) == 3
    for name in FEED:
        weight = model.get_parameter(name)
        assert weight.equal(values[name]) and not is_hollow(weight)
        assert current(weight).equal(packed_now(weight))
    assert vbcompile.restore_weights(model) == 0


def test_dropped_masters_cannot_come_back():
    model = Feed()
    give_up(model.gate.weight, KEY, "gate.weight", to_host=False)
    give_up(model.up.weight, KEY, "up.weight", to_host=True)
    with pytest.raises(ValueError, match=r"^gate.weight and 0 more were dropped; load the model's checkpoint again"):
        vbcompile.restore_weights(model)
    assert is_hollow(model.up.weight)  # none is restored
    assert vbcompile.requantize(model) == 0  # what they hold is not a weight
    model.load_state_dict(Feed().state_dict(), assign=True)
    assert not is_hollow(model.gate.weight)


def test_on_a_cpu_the_host_is_where_masters_are():
    model, x = Feed(), torch.randn(2, 128)
    with torch.no_grad():
        interpreted(model, fp4_master="host")(x)
    assert not model.gate.weight.isnan().any()


@pytest.mark.gpu
def test_masters_move_to_the_host_and_back():
    model, x = Feed().cuda(), torch.randn(2, 128, device="cuda")
    twin = decoded_twin(model, *FEED)
    run = interpreted(model, fp4_master="host")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(x), twin(x), rtol=2e-2, atol=2e-2)
        assert model.gate.weight.isnan().all() and model.gate.weight.untyped_storage().nbytes() == 4
        assert vbcompile.restore_weights(model) == 3 and not model.gate.weight.isnan().any()
        torch.testing.assert_close(run(x), twin(x), rtol=2e-2, atol=2e-2)
        assert model.gate.weight.isnan().all()  # the option holds for every call


@pytest.mark.gpu
@pytest.mark.parametrize("master", ["host", "drop"])
def test_graphs_of_inductor_run_on_without_masters_on_a_gpu(master):
    model, x = Feed().cuda(), torch.randn(2, 128, device="cuda")
    twin = decoded_twin(model, *FEED)
    run = torch.compile(model, backend="vblackwell", options={"mode": "speed", "fp4_master": master, "strict": True})
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(run(x), twin(x), rtol=2e-2, atol=2e-2)
        assert model.gate.weight.isnan().all()


def test_a_graph_that_needs_a_dropped_weight_fails():
    """bfloat16 with a few dozen rows runs unpacked on CPUs, unless only the packed weight is left."""
    model = nn.Linear(192, 192).bfloat16().requires_grad_(False)
    run = interpreted(model, fp4_master="drop")
    few, many = torch.randn(1, 192).bfloat16(), torch.randn(32, 192).bfloat16()
    with torch.no_grad():
        want = dequantize(quantize(model.weight), torch.bfloat16)
        run(few)
        torch.testing.assert_close(run(many), nn.functional.linear(many, want, model.bias), rtol=2e-2, atol=2e-2)
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="1 weights were given up by fp4_master but this graph reads them"):
            interpreted(lambda x: x + model.weight.sum(), fp4_master="drop")(many)


def test_loading_into_a_dropped_weight_is_an_error():
    weight = frozen(64, 64)
    give_up(weight, KEY, "weight", to_host=False)
    with pytest.raises(RuntimeError, match="single memory location"):
        weight.copy_(torch.randn(64, 64))


# ------------------------------------------------------------------------------------------------------------ progress
class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_packing_shows_how_far_it_is(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with progress(["a", "b"], "packing FP4 weights", True) as items:
        assert list(items) == ["a", "b"]
    assert "packing FP4 weights" in sys.stderr.getvalue() and "0/2" in sys.stderr.getvalue()
    for wanted, stream in ((False, Terminal()), (True, io.StringIO())):  # little to do, or nobody to see it
        monkeypatch.setattr("sys.stderr", stream)
        with progress(["a"], "packing", wanted) as items:
            assert list(items) == ["a"]
        assert not stream.getvalue()


def test_compiled_optimizers_stay_compiled():
    """What watches optimizer steps does not keep ``torch.compile`` from compiling one."""
    weight = nn.Parameter(torch.randn(64, 64))
    before = current(weight)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    step = torch.compile(optimizer.step, backend="eager")
    weight.grad = torch.randn_like(weight)
    step()
    assert not current(weight).equal(before) and current(weight).equal(packed_now(weight))


def test_forms_of_two_quantisers_are_not_mixed_up():
    weight = nn.Parameter(torch.randn(64, 128), requires_grad=False)
    codes = lambda method, keep: (
        pack([weight], PackKey("nvfp4", "plain", False, method), ["w"], keep=keep).linear.tensors
    )
    in_fp8, exact = codes("fp8", True), codes("mse", True)
    wanted = quantize(weight.detach(), "nvfp4")
    assert torch.equal(exact[1], wanted.block_scales) and not torch.equal(in_fp8[1], exact[1])
    give_up(weight, PackKey("nvfp4", "plain", False, "fp8"), "w", to_host=False)
    again = pack([weight], PackKey("nvfp4", "plain", False, "4over6"), ["w"]).linear.tensors
    assert torch.equal(again[1], in_fp8[1])  # nothing is left to pack another way from
