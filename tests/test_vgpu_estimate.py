"""The estimator: right about what fits, from shapes alone, without touching a weight."""

import copy
import json

import pytest
import torch
from torch import nn

from vbcompile.config_error import ConfigError
from vbcompile.estimator import PlanError, estimate
from vbcompile.vgpu import create_vgpu_stack
from vbcompile.vgpu_calibration import Calibration
from vbcompile.vgpu_check import check_plan
from vbcompile.vgpu_rates import LAUNCH_NS
from vbcompile.vgpu_size import MIB
from vbcompile.vgpu_trace import trace


@pytest.fixture(autouse=True)
def no_budget(monkeypatch):
    monkeypatch.delenv("VB_HBM_BUDGET", raising=False)


def stack(device_mb: float = 64, host_mb: float = 1000, disk_mb: float = 100_000, gbps: float = 50):
    levels = [
        {"device": "cuda:0", "capacity_mb": device_mb, "speed_gbps": 2000},
        {"device": "cpu", "capacity_mb": host_mb, "speed_gbps": gbps},
        {"device": "ssd", "capacity_mb": disk_mb, "speed_gbps": 5},
    ]
    return create_vgpu_stack({"levels": levels})


def mlp(layers: int = 16, width: int = 1024, device: str = "meta") -> nn.Sequential:
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width, device=device), nn.GELU())]
    return nn.Sequential(*parts)


WEIGHTS = 16 * (1024 * 1024 + 1024) * 4


def test_a_meta_model_is_streamed_through_a_small_budget():
    found = estimate(mlp(), stack=stack(33, gbps=5), tokens=8)
    check_plan(found.plan)
    assert not found.fits and found.weight_bytes == WEIGHTS
    assert found.peak_bytes <= found.budget == 33 * MIB
    device, host, disk = found.placements
    assert device.weights + host.weights == WEIGHTS and disk.weights == 0
    assert host.streamed == host.weights > WEIGHTS // 2
    assert found.bottleneck == "cpu"
    assert found.step_ns == pytest.approx(host.streamed / 5, rel=0.05)
    assert found.smallest_budget == 1024 * 1024 * 4 + 1024 * 4 + found.reserve_bytes
    text = str(found)
    for fact in ("streamed", "bottleneck: cpu", "smallest budget", "0 cuda:0", "2 ssd", "33.00 MiB", "assumed:"):
        assert fact in text
    assert len(text.splitlines()) <= 25
    assert json.loads(found.to_json())["placements"][1]["streamed"] == host.streamed


def test_a_model_that_fits_is_computed_at_the_speed_of_its_memory():
    found = estimate(mlp(), stack=stack(200), tokens=1)
    assert found.fits and found.plan.declined and found.bottleneck == "compute"
    assert found.step_ns == found.compute_ns == pytest.approx(WEIGHTS / 2000 + 16 * LAUNCH_NS, rel=0.01)
    assert str(found).startswith("fits")


def test_matrix_rates_count_where_there_is_much_to_compute():
    slow = estimate(mlp(), stack=stack(200), tokens=4096, tflops=10)
    assert slow.compute_ns == pytest.approx(2 * 16 * 1024**2 * 4096 / 1e13 * 1e9 + 16 * LAUNCH_NS, rel=0.01)
    assert not any("matrix products" in note for note in slow.assumptions)
    measured = stack(200)
    measured.calibration = Calibration("cuda:0", matmul=10**13)
    assert estimate(mlp(), stack=measured, tokens=4096).compute_ns == slow.compute_ns


def test_low_bits_shrink_matrices_only():
    found = estimate(mlp(), stack=stack(200), weight_bits=4.5)
    assert found.weight_bytes == 16 * (1024 * 1024 * 9 // 16 + 1024 * 4)


def test_shapes_stand_for_a_model():
    shapes = {f"layer{i}": ((1024, 1024), torch.bfloat16) for i in range(20)}
    shapes |= {"bias": (1024,), "table": torch.empty(10, 10, device="meta", dtype=torch.int8)}
    found = estimate(shapes, stack=stack(16))
    check_plan(found.plan)
    assert found.weight_bytes == 20 * 2 * 1024**2 + 4096 + 100
    assert {weight.name for weight in found.plan.sweep.weights} == set(shapes)


@pytest.mark.parametrize("inputs", [None, [torch.empty(2, 7, dtype=torch.long, device="meta")]])
def test_tied_weights_count_once_and_are_used_twice(inputs):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(2000, 64, device="meta")
            self.layers = mlp(6, 64)
            self.head = nn.Linear(64, 2000, bias=False, device="meta")
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.layers(self.embedding(tokens)))

    found = estimate(Tied(), inputs=inputs, stack=stack(0.62))
    check_plan(found.plan)
    sweep = found.plan.sweep
    table = next(i for i, weight in enumerate(sweep.weights) if weight.name == "embedding.weight")
    assert sum(weight.nbytes for weight in sweep.weights) == (2000 * 64 + 6 * (64 * 64 + 64)) * 4
    assert len(sweep.uses[table]) == 2 and found.plan.levels[table] == 0


# Traced


def test_a_trace_knows_work_order_and_live_memory():
    model = mlp(4, 256)
    traced = trace(model, [torch.empty(32, 256, device="meta")])
    read = [set(op.weights) for op in traced.operators if op.weights]
    assert read == [{f"{2 * i}.weight", f"{2 * i}.bias"} for i in range(4)]
    assert sum(op.flops for op in traced.operators) == 4 * 2 * 32 * 256 * 256
    one = 32 * 256 * 4
    assert 2 * one <= traced.peak_bytes <= 3 * one
    training = trace(model, [torch.empty(32, 256, device="meta")], training=True)
    assert sum(op.flops for op in training.operators) == (3 * 4 - 1) * 2 * 32 * 256 * 256  # no gradient of the input
    one_gradient = 256 * 256 * 4
    assert 8 * one <= training.peak_bytes <= 10 * one + one_gradient
    used = [name for op in training.operators for name in op.weights]
    assert used.count("0.weight") == 1 and used.count("6.weight") >= 1
    assert max(i for i, name in enumerate(used) if name == "2.weight") > used.index("6.weight")


def test_live_memory_is_what_the_allocator_sees():
    """The same step for real, measured by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    model, x = mlp(5, 128, device="cpu"), torch.randn(64, 128)
    expected = trace(model, [x], training=True).peak_bytes
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(x).sum().backward()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    assert peak > 64 * 128 * 4 * 5
    assert expected == pytest.approx(peak, rel=0.2)


def test_tracing_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 8)
    found = estimate(model, inputs=[x], stack=stack(10), training=True)
    assert found.fits
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert model(x).requires_grad
    pinned = {weight.name for weight in found.plan.sweep.weights if weight.pinned}
    assert pinned == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_transformer_is_traced_by_keyword():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    inputs = {"input_ids": torch.empty(1, 64, dtype=torch.long, device="meta"), "use_cache": False}
    found = estimate(model, inputs=inputs, stack=stack(4), tflops=500)
    check_plan(found.plan)
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert found.weight_bytes == weights and not found.fits
    read = {name for op in found.plan.sweep.operators for name in op.weights}
    assert len(read) >= len(list(model.parameters()))
    assert not any("beside weights" in note for note in found.assumptions)


def test_a_model_that_looks_at_values_is_named():
    class Peeks(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(ValueError, match="cannot be traced without its data"):
        estimate(Peeks(), inputs=[torch.ones(3)], stack=stack())
    with pytest.raises(ValueError, match="no output"):
        estimate(nn.Identity(), inputs=[torch.ones(3)], stack=stack(), training=True)


# Training


def test_training_keeps_its_state_on_the_device_where_it_can():
    roomy = estimate(mlp(), stack=stack(4 * WEIGHTS / MIB + 20), tokens=16, training=True)
    assert roomy.fits and roomy.state_bytes == 3 * WEIGHTS
    assert roomy.reserve_bytes >= roomy.state_bytes and roomy.placements[1].other == 0
    tight = estimate(mlp(), stack=stack(WEIGHTS / MIB + 20), tokens=16, training=True)
    assert tight.fits and tight.placements[1].other == 3 * WEIGHTS
    assert tight.step_ns >= WEIGHTS / 50 and "gradients to cpu" in tight.bottleneck
    small = estimate(mlp(), stack=stack(30), tokens=16, training=True)
    check_plan(small.plan)
    assert small.placements[1].streamed > 1.5 * small.placements[1].weights


def test_training_state_that_fits_nowhere_is_refused():
    with pytest.raises(PlanError, match="optimizer state") as caught:
        estimate(mlp(), stack=stack(64, host_mb=100), training=True)
    enough = caught.value.minimum_budget / MIB
    assert estimate(mlp(), stack=stack(enough + 1, host_mb=100), training=True).fits


# Bad input


def test_a_budget_that_is_too_small_names_the_one_that_works(monkeypatch):
    with pytest.raises(PlanError, match="smallest budget that works") as caught:
        estimate(mlp(), stack=stack(), budget="1MiB")
    least = caught.value.minimum_budget
    assert estimate(mlp(), stack=stack(), budget=least).smallest_budget == least
    assert estimate(mlp(), stack=stack(), budget="32MiB").budget == 32 * MIB
    monkeypatch.setenv("VB_HBM_BUDGET", "1MiB")
    with pytest.raises(PlanError):
        estimate(mlp())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tokens": 0}, ValueError, "tokens must be positive"),
        ({"tokens": True}, ValueError, "tokens must be positive"),
        ({"weight_bits": -4}, ValueError, "weight_bits must be positive"),
        ({"tflops": float("nan")}, ValueError, "tflops must be positive"),
        ({"budget": "some"}, ConfigError, "budget='some'"),
        ({"reserve": "0"}, ConfigError, "reserve='0'"),
        ({"inputs": [torch.ones(3)]}, ValueError, "inputs need a module"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        estimate({"w": (4, 4)}, stack=stack(), **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module or shapes by name, not function"):
        estimate(lambda x: x, stack=stack())


@pytest.mark.parametrize("shape", [7, (3, -1), (2.5,), "ab", ((2, 2), "float32")])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(ValueError, match="'w'"):
        estimate({"w": shape}, stack=stack())


def test_one_tensor_is_one_input():
    x = torch.ones(3, 4)
    assert estimate(nn.Linear(4, 4), inputs=x, stack=stack()) == estimate(nn.Linear(4, 4), inputs=[x], stack=stack())


def test_an_empty_model_fits():
    assert estimate({}, stack=stack()).fits
    assert estimate(nn.ReLU(), inputs=[torch.ones(3)], stack=stack()).fits
