"""The FP4 pass end to end on the CPU: what it rewrites and leaves, updates of weights, training, dropped masters."""

import copy
import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import FEED, Feed, compiled, decoded_twin, interpreted, reasons, rounded
from torch import nn

from vbcompile.config import resolve_config
from vbcompile.config_error import ConfigError
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import registry
from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.passes import fp4, fp4_feed, fp4_refusals, fp4_weights, pipeline

pytestmark = pytest.mark.usefixtures("fresh_weights")


# ------------------------------------------------------------------------------------------------------------ inference
@pytest.mark.parametrize("downstream", ["inductor", "eager"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_equals_the_decoded_model(downstream, context, reports):
    model, twin = Feed(), None
    twin = decoded_twin(model, *FEED)
    with context():
        for x in (torch.randn(1, 128), torch.randn(2, 3, 128)):
            torch.testing.assert_close(compiled(model, downstream=downstream)(x), twin(x), rtol=1e-5, atol=1e-5)
    assert reports[0].count("rewritten", "fp4") == 3 and not reports[0].failures and not reports[0].unavailable
    decision = reports[0].decisions[0]
    assert decision.site.startswith("gate (") and "relative error 0.0" in decision.reason
    assert decision.details["shape"] == [256, 128] and decision.details["packed_bytes"] < decision.details["bytes"] / 6
    assert "of the unpacked product's time" in decision.implementation
    assert not model.gate.weight.isnan().any()  # masters are kept


def test_llama_in_speed_mode(reports):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    twin = decoded_twin(model, *names)
    tokens = torch.randint(0, 500, (2, 7))
    with torch.no_grad():
        got, want = compiled(model)(tokens, use_cache=False).logits, twin(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert sum(r.count("rewritten", "fp4") for r in reports) == 14
    assert [r for report in reports for r in reasons(report)] == [
        "projection onto the vocabulary; fp4_lm_head=True includes it"
    ]


def test_mxfp4_and_dynamic_shapes(reports):
    model = Feed()
    twin = decoded_twin(model, *FEED, format_name="mxfp4")
    run = torch.compile(
        model, backend="vblackwell", dynamic=True,
        options={"fp4": True, "fp4_format": "mxfp4", "strict": True, "downstream": "aot_eager"},
    )  # fmt: skip
    with torch.no_grad():
        for rows in (5, 9, 70):
            x = torch.randn(rows, 128)
            torch.testing.assert_close(run(x), twin(x), rtol=1e-5, atol=1e-5)
    assert len(reports) == 1 and "chosen at each call" in reports[0].decisions[0].implementation


class Spellings(nn.Module):
    """The same product, in the ways in which models write it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(192, 192) * 0.1) for _ in range(4))
        self.register_buffer("e", torch.randn(192, 192) * 0.1)
        self.bias = nn.Parameter(torch.randn(192))

    def forward(self, x):
        x = torch.addmm(self.bias, x, self.a)
        x = x @ self.b.t()
        x = torch.matmul(x, self.c)
        x = torch.mm(x, self.d.transpose(0, 1))
        return F.linear(x, self.e.T)


def test_every_spelling_is_found(reports):
    model, x = Spellings(), torch.randn(3, 192)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in "abcde":
            weight = getattr(twin, name)
            weight.copy_(rounded(weight.t().contiguous()).t() if name in "ace" else rounded(weight))
        torch.testing.assert_close(compiled(model)(x), twin(x), rtol=1e-4, atol=1e-4)
    assert reports[0].count("rewritten", "fp4") == 5


def test_autocast_decides_the_dtype(reports):
    model, x = Feed(), torch.randn(3, 128)
    twin = decoded_twin(model, *FEED)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(model)(x), twin(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        torch._dynamo.reset()
        got = compiled(model, mixed_precision=True)(x)
    assert got.dtype == torch.float32 and reports[-1].count("rewritten", "fp4") == 3
    torch.testing.assert_close(got, twin(x), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(got, twin(x), rtol=1e-5, atol=1e-5)  # so bfloat16 was used


# -------------------------------------------------------------------------------------------------------------- updates
def load(model, assign):
    state = {name: torch.randn_like(value) * 0.05 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


UPDATES = {
    "in_place": lambda model: model.gate.weight.mul_(1.5),
    "load_state_dict": lambda model: load(model, assign=False),
    "assign": lambda model: load(model, assign=True),
    "data": lambda model: setattr(model.up.weight, "data", torch.randn(256, 128) * 0.1),
    "replaced": lambda model: setattr(model, "down", nn.Linear(256, 128)),
}


@pytest.mark.parametrize("update", UPDATES)
def test_updated_weights_are_packed_again(update):
    model, x = Feed(), torch.randn(2, 128)
    run = compiled(model)
    with torch.no_grad():
        before = run(x)
        UPDATES[update](model)
        got = run(x)
        torch.testing.assert_close(got, decoded_twin(model, *FEED)(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, got)


@pytest.mark.parametrize("update", UPDATES)
def test_updates_are_noticed_where_values_are_not_looked_at(update, monkeypatch):
    """As on accelerators, where a call compares versions and addresses alone."""
    monkeypatch.setattr(fp4_weights, "looks_inside", lambda weight, watch: False)
    monkeypatch.setattr(fp4_feed, "looks_inside", lambda weight, watch: False)
    model, x = Feed(), torch.randn(2, 128)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        for _ in range(2):
            UPDATES[update](model)
            got = run(x)
            torch.testing.assert_close(got, decoded_twin(model, *FEED)(x), rtol=1e-5, atol=1e-5)
            assert torch.equal(got, run(x))


def test_weights_are_packed_for_the_products_that_they_get(monkeypatch):
    monkeypatch.setattr(fp4_weights, "multiplies_fp8", lambda target: True)
    layer, x = nn.Linear(256, 256), torch.randn(2, 256)
    with torch.no_grad():
        for activations, method in (("same", "mse"), ("fp8", "fp8")):
            torch._dynamo.reset()
            values = dequantize(quantize(layer.weight, method=method))
            got = interpreted(layer, fp4_activations=activations)(x)
            torch.testing.assert_close(got, F.linear(x, values, layer.bias), rtol=1e-5, atol=1e-5)


def test_an_update_keeps_the_packed_tensors_in_place():
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    key = fp4_weights.PackKey("nvfp4", "plain", False)
    first = fp4_weights.pack([weight], key, ["weight"])
    address, before = first.linear.codes.data_ptr(), first.linear.codes.clone()
    assert fp4_weights.pack([weight], key, ["weight"]) is first
    weight.normal_()
    assert fp4_weights.pack([weight], key, ["weight"]).linear.codes.data_ptr() == address
    assert not first.linear.codes.equal(before)


def test_one_graph_serves_many_layers(reports):
    layers = nn.ModuleList(Feed() for _ in range(3))
    twins = [decoded_twin(layer, *FEED) for layer in layers]
    run = compiled(lambda layer, x: layer(x))
    x = torch.randn(2, 128)
    with torch.no_grad():
        for _ in range(2):
            for layer, twin in zip(layers, twins, strict=True):
                torch.testing.assert_close(run(layer, x), twin(x), rtol=1e-5, atol=1e-5)
    assert len(reports) == 1


def test_packed_copies_go_with_their_weights():
    model = Feed()
    with torch.no_grad():
        compiled(model)(torch.randn(2, 128))
    assert len(fp4_weights._packed) == 3
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not fp4_weights._packed


def test_new_weights_above_the_error_limit_run_unpacked(caplog, reports):
    model, x = Feed(), torch.randn(2, 128)
    with torch.no_grad():
        for name in FEED:  # values that FP4 holds exactly
            weight = model.get_parameter(name)
            weight.copy_(dequantize(quantize(weight, method="nearest")))
    run = compiled(model, fp4_max_error=0.05)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    assert reports[0].count("rewritten", "fp4") == 3
    with torch.no_grad():
        model.gate.weight.copy_(torch.randn(256, 128))
        with caplog.at_level(logging.WARNING, "vbcompile"):
            for _ in range(2):
                torch.testing.assert_close(run(x), model(x))
    assert sum("does not suit" in r.getMessage() for r in caplog.records) == 1
    with torch.no_grad():
        model.gate.weight.fill_(torch.nan)
        assert run(x).isnan().all()  # what the model gives, not what it gave


# ----------------------------------------------------------------------------------------------------------------- left
class Vocabulary(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(300, 128), nn.Linear(128, 300, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.lm_head(self.embedding(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_projection_by_option(tied, reports):
    model, tokens = Vocabulary(tied), torch.arange(5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(tokens), model(tokens))
        assert reasons(reports[-1]) == ["projection onto the vocabulary; fp4_lm_head=True includes it"]
        torch._dynamo.reset()
        want = F.linear(model.embedding(tokens), rounded(model.lm_head.weight))
        torch.testing.assert_close(compiled(model, fp4_lm_head=True)(tokens), want)


class Left(nn.Module):
    def __init__(self):
        super().__init__()
        self.small = nn.Linear(192, 32)
        self.register_buffer("written", torch.randn(192, 192))
        self.rough = nn.Parameter(torch.randn(192, 192))
        self.infinite = nn.Parameter(torch.randn(192, 192))
        self.infinite.data[3, 4] = torch.inf

    def forward(self, x, y):
        self.written.mul_(2)
        return self.small(x), x @ self.written, x @ self.rough, x @ self.infinite, x @ y


def test_what_is_left_says_why(reports):
    model, x, y = Left(), torch.randn(3, 192), torch.randn(192, 192)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for got, want in zip(compiled(model, fp4_max_error=0.05)(x, y), twin(x, y), strict=True):
            torch.testing.assert_close(got, want)
    small, written, rough, infinite = reasons(reports[0])  # the product with an input is nobody's weight
    assert "too small" in small and "writes to the weight" in written
    assert "above fp4_max_error" in rough and "NaN or infinity" in infinite
    assert not reports[0].count("rewritten", "fp4")


def test_other_weights_that_are_left(reports):
    x = torch.randn(3, 192)
    double = nn.Linear(192, 192).double()
    with torch.inference_mode():
        inference = nn.Linear(192, 192)
    with torch.no_grad():
        compiled(double)(x.double())
        compiled(inference)(x)
    assert "torch.float64" in reasons(reports[0])[0] and "inference_mode" in reasons(reports[1])[0]


def test_slow_cases_are_left(reports):
    """On a CPU, PyTorch's bfloat16 product of a few dozen rows is faster than decoding."""
    model = nn.Linear(192, 192).bfloat16()
    with torch.no_grad():
        compiled(model)(torch.randn(32, 192, dtype=torch.bfloat16))
    assert "with 32 rows FP4 would take an estimated" in reasons(reports[0])[0]


@pytest.mark.parametrize("master", ["keep", "drop"])
def test_what_was_measured_to_be_slower_is_left_beside_its_master(reports, monkeypatch, master):
    monkeypatch.setattr(fp4, "relative_cost", lambda target, name, format_name, n, k, m: 1.2 if m > 100 else 0.8)
    model = nn.Linear(192, 192, bias=False).bfloat16()
    monkeypatch.setattr(fp4_refusals, "SLOWEST", 100.0)
    with torch.no_grad():
        for m in (1, 200):
            torch._dynamo.reset()  # else the second graph takes any number of rows
            compiled(model, fp4_master=master)(torch.randn(m, 192, dtype=torch.bfloat16))
    assert [r.count("rewritten", "fp4") for r in reports] == [1, 0 if master == "keep" else 1]
    if master == "keep":
        assert "with 200 rows FP4 takes 1.20 times as long" in reasons(reports[1])[0]


def test_without_a_kernel_nothing_is_done(reports, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model, x = Feed(), torch.randn(2, 128)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    (name, reason), *_ = reports[0].unavailable
    assert name == "fp4" and "no-such-compiler" in reason


def test_a_failing_pass_leaves_no_inputs_behind(reports, monkeypatch):
    def fail(self, *_):
        raise RuntimeError("deliberate")

    monkeypatch.setattr("vbcompile.passes.fp4._Fp4Pass._feed", fail)
    model, x = Feed(), torch.randn(2, 128)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, strict=False)(x), model(x))
    assert reports[0].failures == [("fp4", "RuntimeError: deliberate")]


# ------------------------------------------------------------------------------------------------------------- training
class Adapter(nn.Module):
    """A frozen layer with a trainable low-rank one beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("downstream", ["inductor", "aot_eager"])
def test_adapters_train_over_a_frozen_base(downstream, reports):
    model = nn.Sequential(Adapter(nn.Linear(128, 256)), nn.GELU(), Adapter(nn.Linear(256, 128)))
    twin = decoded_twin(model, "0.base.weight", "2.base.weight")
    x = torch.randn(5, 128, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    compiled(model, downstream=downstream, mixed_precision=False)(x).square().sum().backward()
    twin(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert reports[0].training and reports[0].count("rewritten", "fp4") == 2
    assert all("requires gradients" in reason for reason in reasons(reports[0]))


def test_trainable_weights_stay(reports):
    model, x = Feed(), torch.randn(2, 128)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert (
        reasons(reports[0])
        == ["the weight requires gradients: it stays in high precision; fp4_qat=True trains it for FP4"] * 3
    )


# -------------------------------------------------------------------------------------------------------------- masters
def test_dropped_masters_take_no_memory(reports):
    model, x = Feed(), torch.randn(2, 128)
    twin = decoded_twin(model, *FEED)
    run = compiled(model, fp4_master="drop")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(x), twin(x), rtol=1e-5, atol=1e-5)
    for name in FEED:
        weight = model.get_parameter(name)
        assert weight.isnan().all() and weight.untyped_storage().nbytes() == 4
    assert not model.gate.bias.isnan().any()
    assert len(reports) == 2  # the strides changed: compiled once more
    assert all(d.details["master"] == "dropped" for d in reports[1].decisions)
    with torch.no_grad():
        model.gate.weight.data = torch.randn(256, 128) * 0.1  # a new weight replaces the dropped one
        twin.gate.weight.copy_(rounded(model.gate.weight))
        torch.testing.assert_close(run(x), twin(x), rtol=1e-5, atol=1e-5)


def test_a_tied_master_is_not_dropped():
    model, tokens = Vocabulary(tied=True), torch.arange(5)
    with torch.no_grad():
        run = compiled(model, fp4_master="drop", fp4_lm_head=True)
        run(tokens)
        run(tokens)
    assert not model.embedding.weight.isnan().any()


def test_the_pass_is_available():
    assert "fp4" in [p.name for p in pipeline.PASSES]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fp4_format": "nf4"}, "unknown fp4_format 'nf4'; valid: nvfp4, mxfp4"),
        ({"fp4_master": "move"}, "unknown fp4_master 'move'; valid: keep, host, drop"),
        ({"fp4_max_error": 2}, "'fp4_max_error' must be a number from 0 to 1, not 2"),
        ({"fp4_max_error": True}, "'fp4_max_error' must be a number"),
        ({"fp4_lm_head": "yes"}, "'fp4_lm_head' must be True or False"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config("speed", option, environ={})


@pytest.mark.parametrize(
    ("arch", "ignored"),
    [("cpu", ["fp8", "fp4"]), ("sm_80", ["fp8", "fp4"]), ("sm_90", ["fp4"]), ("sm_100", []), ("gfx950", ["fp8"])],
)
def test_activations_that_nothing_rounds_are_said(arch, ignored):
    registry.operator("fp4_linear").load()
    target = catalog_target(arch)
    found = [kind for kind in ("same", "fp8", "fp4") if fp4_refusals.ignored_activations(target, kind)]
    assert found == ignored


def test_the_report_says_that_activations_stay(reports):
    with torch.no_grad():
        compiled(Feed(), fp4_activations="fp4")(torch.randn(1, 128))
    assert "fp4_activations='fp4' changes nothing on cpu" in reports[0].decisions[0].reason
