"""Graphs with offloaded weights: cut, planned and streamed, on a device that proves every access."""

import copy
import re

import offload_models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbcompile
from vbcompile.compat import own_tracing_context
from vbcompile.config import Config
from vbcompile.device_catalog import catalog_target
from vbcompile.passes import fp4_weights
from vbcompile.passes.pass_context import PassContext
from vbcompile.runtime_disk import StorageError
from vbcompile.vgpu_plan import PlanError

SMALLEST = 1024


def blocks(width: int = 32, depth: int = 4) -> nn.Sequential:
    return offload_models.blocks(width, depth).eval().requires_grad_(False)


def offload(model: nn.Module, budget: str = "72KiB", **places) -> nn.Module:
    return vbcompile.offload(model, "cpu", {0: budget, "cpu": "64MiB"} | places, smallest=SMALLEST, progress=False)


def compiled(model, downstream: str = "eager", mode: str = "memory", fullgraph: bool = False):
    torch._dynamo.reset()
    options = {"mode": mode, "strict": True, "downstream": downstream}
    return torch.compile(model, backend="vblackwell", options=options, fullgraph=fullgraph)


def streamed(model) -> int:
    (found,) = vbcompile.stats(model)
    return found.streamed_bytes


@pytest.mark.parametrize("downstream", ["eager", "aot_eager", "inductor"])
def test_results_are_those_of_the_model(downstream, reports):
    model, x = blocks(), torch.randn(3, 32)
    expected = model(x)
    offload(model)
    run = compiled(model, downstream)
    for _ in range(3):
        torch.testing.assert_close(run(x), expected)
    (found,) = vbcompile.stats(model)
    assert found.steps == 3 and found.planned_bytes > 0 and found.streamed_bytes >= 3 * found.planned_bytes
    assert found.runtime["misses"] == found.runtime["wasted_bytes"] == found.runtime["detour_bytes"] == 0
    (record,) = [d for d in reports[0].decisions if d.pass_name == "offload"]
    assert record.action == "rewritten" and record.details["tiers"]["cpu"]["weights"]
    assert record.details["peak"] <= record.details["budget"] == 72 << 10
    assert 0 < record.details["roofline_share"] <= 1


def test_bit_equal_to_whole_copies():
    model, x = blocks(), torch.randn(3, 32)
    offload(model)
    run = compiled(model, "inductor")
    once = run(x)
    store = model[0].up.weight.payload.residence
    with store.everything_fetched():
        assert torch.equal(run(x), once)
    assert torch.equal(run(x), once)


def test_identical_segments_are_compiled_once(monkeypatch):
    from vbcompile.passes import offload as module

    contexts = []
    monkeypatch.setattr(module, "own_tracing_context", lambda mode: contexts.append(mode) or own_tracing_context(mode))
    model = blocks(depth=8)
    offload(model, "96KiB")
    compiled(model, "aot_eager")(torch.randn(3, 32))
    (found,) = vbcompile.stats(model)
    assert found.planned_bytes > 0 and len(contexts) <= 4  # the first, the last, and the two kinds between


def test_cuda_graphs_only_where_all_weights_stay(monkeypatch):
    from vbcompile import backend

    asked = []

    def compile_it(gm, example_inputs, options, key, rewrite):
        static = [node.meta.get("tensor_dict", {}) for node in gm.graph.find_nodes(op="placeholder")]
        asked.append((options["triton.cudagraphs"], [bool(d.get("_dynamo_static_input_type")) for d in static]))
        return gm.forward

    monkeypatch.setattr(backend.compat, "compile_with_inductor", compile_it)
    named = nn.Sequential(nn.Embedding(8192, 32), *blocks()).eval().requires_grad_(False)
    cases = (
        (blocks(), torch.randn(3, 32), "170KiB", True),
        (blocks(), torch.randn(3, 32), "72KiB", False),
        (named, torch.arange(3), "180KiB", True),  # rows of the embedding are read on the host
    )
    for model, x, budget, graphs in cases:
        asked.clear()
        expected = model(x)
        offload(model, budget)
        torch._dynamo.reset()
        options = {"mode": "memory", "strict": True, "inductor_mode": "reduce-overhead"}
        run = torch.compile(model, backend="vblackwell", options=options)
        torch.testing.assert_close(run(x), expected)
        assert {wanted for wanted, _ in asked} == {graphs}
        if graphs:  # all but the input
            assert len(asked) == (2 if model is named else 1) and asked[-1][1].count(False) == 1
            assert vbcompile.stats(model)[0].planned_bytes == 0


def test_a_model_that_fits_is_not_cut(reports):
    model, x = blocks(), torch.randn(3, 32)
    expected = model(x)
    offload(model, "170KiB")
    run = compiled(model)
    assert torch.equal(run(x), expected) and torch.equal(run(x), expected)
    (found,) = vbcompile.stats(model)
    assert found.planned_bytes == 0 and "fits" in found.declined and len(found.resident) == 8
    assert found.streamed_bytes == 0 and found.resident_bytes == found.masters["cpu"]
    assert "fits" in next(d for d in reports[0].decisions if d.pass_name == "offload").reason


def test_an_infeasible_budget_names_the_smallest():
    model = blocks()
    offload(model, "20KiB")
    with pytest.raises(Exception, match="smallest budget that works") as caught:
        compiled(model)(torch.randn(3, 32))
    error = caught.value
    while error is not None and not isinstance(error, PlanError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    assert error is not None and error.minimum_budget > 20 << 10
    vbcompile.materialize(model)
    offload(model, str(error.minimum_budget))
    compiled(model)(torch.randn(3, 32))
    assert streamed(model) > 0


def test_dynamic_shapes_share_one_plan():
    model = blocks()
    twin = copy.deepcopy(model)
    offload(model)
    run = compiled(model, "aot_eager")
    for rows in (3, 5, 9, 2):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(run(x), twin(x))
    store = model[0].up.weight.payload.residence
    assert len(set(store._starts)) == 1 and vbcompile.stats(model)[0].runtime["misses"] == 0


@pytest.mark.parametrize("downstream", ["aot_eager", "inductor"])
def test_every_size_dynamic(downstream, reports):
    """``dynamic=True`` makes inputs of the numbers in a model, such as the ``eps`` of its norms, too."""
    model = blocks()
    twin = copy.deepcopy(model)
    offload(model)
    torch._dynamo.reset()
    options = {"mode": "memory", "strict": True, "downstream": downstream}
    run = torch.compile(model, backend="vblackwell", options=options, dynamic=True, fullgraph=True)
    for rows, eps in ((3, 1e-5), (9, 1e-5), (5, 0.5)):
        x = torch.randn(rows, 32)
        for each in (model, twin):
            each[0].norm.eps = eps
        torch.testing.assert_close(run(x), twin(x))
    assert len(reports) == 2 and streamed(model) > 0


def test_operators_in_a_frame_that_dynamo_leaves_fetch_their_weights():
    """There our own Python code, which PyTorch calls for each operator, is no business of Dynamo's."""
    model, x = blocks(), torch.randn(3, 32)

    def function(x):
        for layer in model[:2]:
            torch._dynamo.graph_break()  # in a loop: the whole frame runs uncompiled
            x = F.linear(x, layer.down.weight.t()) @ layer.down.weight.t()
        return x

    expected = function(x)
    offload(model)
    torch.testing.assert_close(compiled(function)(x), expected)


def test_larger_inputs_are_planned_for():
    model = blocks()
    twin = copy.deepcopy(model)
    offload(model, "120KiB")
    run = compiled(model)
    run(torch.randn(3, 32)), run(torch.randn(4, 32))
    before = vbcompile.stats(model)[0].resident_bytes
    x = torch.randn(40, 32)
    assert torch.equal(run(x), twin(x))
    assert vbcompile.stats(model)[0].resident_bytes < before


def test_inference_mode():
    model, x = blocks(), torch.randn(3, 32)
    expected = model(x)
    offload(model)
    run = compiled(model, "aot_eager")
    with torch.inference_mode():
        assert torch.equal(run(x), expected)
    with torch.no_grad():
        assert torch.equal(run(x), expected)


def test_graph_breaks_share_one_ring():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = blocks(depth=3), blocks(depth=3)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x = Broken().eval(), torch.randn(3, 32)
    expected = model(x)
    offload(model, "96KiB")
    run = compiled(model)
    for _ in range(2):
        assert torch.equal(run(x), expected)
    (before,) = vbcompile.stats(model)
    for _ in range(3):
        assert torch.equal(run(x), expected)
    (found,) = vbcompile.stats(model)
    assert found.runtime["detour_bytes"] == 0 and found.runtime["misses"] == before.runtime["misses"]
    assert found.steps == before.steps + 3 and found.planned_bytes > 0


def test_views_of_weights():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused = nn.Parameter(torch.randn(96, 32))
            self.table = nn.Parameter(torch.randn(32, 32))
            self.last = nn.Parameter(torch.randn(32, 32))

        def forward(self, x):
            q, k, v = self.fused.split(32)
            y = x @ q.t() + F.linear(x, k)
            y = y @ self.table.view(32, 4, 8).flatten(1)
            return F.linear(y, v) @ self.last.transpose(0, 1) + self.table[:3].sum()

    model, x = Views().requires_grad_(False), torch.randn(3, 32)
    expected = model(x)
    offload(model, "18KiB")
    run = compiled(model)
    for _ in range(3):
        torch.testing.assert_close(run(x), expected)
    assert vbcompile.stats(model)[0].planned_bytes > 0


def test_weights_that_are_written_or_returned_stay():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = blocks(depth=6)
            self.register_buffer("state", torch.zeros(32, 32))

        def forward(self, x):
            y = self.body(x)
            self.state.add_(y.sum())
            return y + self.state.sum(), self.body[0].up.weight.t()

    model, x = Stateful(), torch.randn(3, 32)
    twin = copy.deepcopy(model)
    offload(model, "112KiB")
    run = compiled(model, fullgraph=True)
    for _ in range(3):
        for got, expected in zip(run(x), twin(x), strict=True):
            torch.testing.assert_close(got, expected)
    (found,) = vbcompile.stats(model)
    assert "state" in found.resident and found.planned_bytes > 0
    torch.testing.assert_close(model.state_dict()["state"], twin.state)


def test_writes_between_steps_are_seen():
    model, x = blocks(), torch.randn(3, 32)
    twin = copy.deepcopy(model)
    offload(model)
    run = compiled(model)
    run(x)
    other = {name: torch.randn_like(value) * 0.1 for name, value in twin.state_dict().items()}
    for each in (model, twin):
        each.load_state_dict(other)
    torch.testing.assert_close(run(x), twin(x))


def test_autocast_and_other_contexts_survive_cuts():
    model, x = blocks(), torch.randn(3, 32)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    expected = call(x)
    offload(model)
    torch.testing.assert_close(compiled(call)(x), expected)
    assert streamed(model) > 0


def test_an_exception_in_a_step_is_forgotten():
    model, x = blocks(), torch.randn(3, 32)
    expected = model(x)
    offload(model)
    run = compiled(model)
    run(x)
    store = model[0].up.weight.payload.residence
    wait, calls = store.wait, []

    def failing(copy):
        calls.append(copy)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return wait(copy)

    store.wait = failing
    with pytest.raises(KeyboardInterrupt):
        run(x)
    store.wait = wait
    assert torch.equal(run(x), expected)


def test_packed_weights_are_what_is_streamed(reports):
    model, x = blocks(128), torch.randn(2, 128)
    twin = copy.deepcopy(model)
    packed = compiled(twin, mode="speed")(x)
    offload(model, "200KiB")
    run = compiled(model, mode="full")
    assert torch.equal(run(x), packed) and torch.equal(run(x), packed)
    (found,) = vbcompile.stats(model)
    assert 0 < found.planned_bytes < sum(p.nbytes for p in twin.parameters()) / 4
    assert reports[-1].count("rewritten", "fp4") == 8
    with torch.no_grad():
        for each in (model, twin):
            each[1].up.weight.mul_(2)
    assert torch.equal(run(x), compiled(twin, mode="speed")(x))


def test_streamed_weights_are_packed_for_the_activations_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(fp4_weights, "multiplies_fp8", lambda target: True)
    model, x = blocks(128), torch.randn(2, 128)
    twin = copy.deepcopy(model)
    offload(model, "200KiB")
    found = []
    for activations in ("same", "fp8"):
        torch._dynamo.reset()
        options = {"mode": "full", "strict": True, "downstream": "eager", "fp4_activations": activations}
        streamed, held = (torch.compile(m, backend="vblackwell", options=options) for m in (model, twin))
        found.append(streamed(x))
        assert torch.equal(found[-1], held(x))
    assert not torch.equal(*found)
    for arch, layout in (("sm_100", "plain"), ("sm_90", "fragments2t")):
        context = PassContext(Config(fp4_activations="fp4"), catalog_target(arch), False)
        assert fp4_weights.pack_key(context, "nvfp4", False, torch.bfloat16, None).layout == layout


def test_packed_weights_that_share_their_input_are_one_product(reports):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(128, 512), nn.Linear(128, 512)
            self.down = nn.Linear(512, 128, bias=False)

        def forward(self, x):
            return x + self.down(F.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Gated() for _ in range(3))).eval().requires_grad_(False), torch.randn(2, 128)
    twin = copy.deepcopy(model)
    packed = compiled(twin, mode="speed")(x)
    offload(model, "250KiB")
    run = compiled(model, mode="full")
    assert torch.equal(run(x), packed) and torch.equal(run(x), packed)
    found = [d for d in reports[-1].decisions if d.pass_name == "fp4"]
    assert [len(d.details["fused_with"]) for d in found] == [1, 1, 0] * 3
    assert vbcompile.stats(model)[0].planned_bytes > 0
    with torch.no_grad():
        for each in (model, twin):
            each[1].up.weight.mul_(2)
    assert torch.equal(run(x), compiled(twin, mode="speed")(x))
    torch._dynamo.reset()
    options = {"mode": "full", "strict": True, "downstream": "eager", "fp4_fuse": False}
    alone = torch.compile(model, backend="vblackwell", options=options)
    torch.testing.assert_close(alone(x), run(x))


def test_packed_weights_that_host_memory_has_no_room_for_are_files_with_checksums(tmp_path):
    model, x = blocks(128), torch.randn(2, 128)
    twin = copy.deepcopy(model)
    offload(model, "200KiB", cpu="700KiB", disk=str(tmp_path))
    before = len(list(tmp_path.iterdir()))
    run = compiled(model, mode="full")
    packed = compiled(twin, mode="speed")(x)
    assert torch.equal(run(x), packed) and torch.equal(run(x), packed)
    store = model[0].up.weight.payload.residence
    on_disk = [p for p in store.payloads.values() if p.name.endswith("packed") and p.place == "ssd"]
    assert on_disk and len(list(tmp_path.iterdir())) == before + len(on_disk)
    assert store.masters()["cpu"] <= 700 << 10
    assert vbcompile.stats(model)[0].runtime["links"]["disk"]["bytes"] > 0
    held = next(p for p in model.parameters() if getattr(p, "payload", None) and p.payload.place == "cpu")
    with torch.no_grad():  # packed again, into a file where it was one
        held.mul_(2)
        dict(twin.named_parameters())[held.payload.name].mul_(2)
    assert torch.equal(run(x), compiled(twin, mode="speed")(x))
    file = on_disk[0].source.file
    data = bytearray(file.read_bytes())
    data[on_disk[0].source.offset + 10] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError):
        on_disk[0].load()


def test_a_weight_inside_a_function_transform_is_streamed_as_it_is(reports):
    class Derivative(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Linear(256, 256, bias=False) for _ in range(2))

        def forward(self, x):
            return torch.func.jvp(lambda y: F.linear(y, self.second.weight), (self.first(x),), (x,))[1]

    model, x = Derivative().eval().requires_grad_(False), torch.randn(3, 256)
    expected = model(x)
    torch.testing.assert_close(compiled(offload(model, "400KiB"), mode="full")(x), expected)
    assert any(d.action == "left" and "function transform" in d.reason for d in reports[-1].decisions)


def test_packed_weights_beyond_the_limit_are_told(caplog):
    model = blocks(128)
    offload(model, "200KiB", cpu="2100KiB")
    compiled(model, mode="full")(torch.randn(2, 128))
    assert sum("max_memory['cpu']" in record.message for record in caplog.records) == 1


def test_plain_models_are_left_alone(reports):
    model, x = blocks(), torch.randn(3, 32)
    assert torch.equal(compiled(model)(x), model(x))
    assert not [d for d in reports[0].decisions if d.action == "rewritten"]


def test_a_budget_for_weights_that_are_on_the_device_already(reports):
    model, x = blocks(), torch.randn(3, 32)
    for budget, words in (("1KiB", r"call vbcompile\.offload"), ("1GiB", "fits")):
        options = {"downstream": "eager", "budget": budget}
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="vblackwell", options=options)(x), model(x))
        (decision,) = [d for d in reports[-1].decisions if d.pass_name == "offload"]
        assert re.search(words, decision.reason) and decision.action == "left"


def test_weights_of_two_models_in_one_graph(reports):
    one, two, x = blocks(), blocks(), torch.randn(3, 32)
    expected = one(x) + two(x)
    offload(one), offload(two)
    for downstream in ("eager", "aot_eager"):  # each weight fetched on demand
        torch.testing.assert_close(compiled(lambda x: one(x) + two(x), downstream)(x), expected)
    with pytest.raises(Exception, match="not streamed"):
        compiled(lambda x: one(x) + two[0].up.weight.add_(1).sum(), "aot_eager")(x)
    assert "offload them together" in reports[0].decisions[0].reason


def test_disk_tier(tmp_path):
    model, x = blocks(), torch.randn(3, 32)
    expected = model(x)
    offload(model, "120KiB", cpu="64KiB", disk=str(tmp_path))
    run = compiled(model)
    for _ in range(3):
        assert torch.equal(run(x), expected)
    (found,) = vbcompile.stats(model)
    assert found.masters["ssd"] > 0 and found.runtime["links"]["disk"]["bytes"] > 0


def test_generate_with_tied_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 7))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    offload(model, "64KiB")
    model.forward = compiled(model.forward)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    (found,) = vbcompile.stats(model)
    assert found.planned_bytes > 0 and found.runtime["detour_bytes"] == 0
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_another_budget_needs_no_capture(reports):
    model, x = blocks(), torch.randn(3, 32)
    expected = model(x)
    offload(model, "170KiB")
    run = compiled(model, "aot_eager")
    assert torch.equal(run(x), expected)
    store = model[0].up.weight.payload.residence
    for budget in (60 << 10, 100 << 10, 170 << 10, 72 << 10):
        plan = store.replan(budget)
        assert torch.equal(run(x), expected) and plan.peak_bytes <= budget
        assert plan.declined == (budget == 170 << 10)
    with pytest.raises(PlanError):
        store.replan(10 << 10)
    assert torch.equal(run(x), expected) and len(reports) == 1
