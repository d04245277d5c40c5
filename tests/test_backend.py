"""The backend end to end on CPU: training and inference, shapes, states, caches, failures."""

import copy
import gc
import json
import logging
import pickle
import threading
import weakref

import pytest
import torch
from causal_block import Block
from torch import nn
from torch._dynamo.utils import counters

from vbcompile import compat, compat_symbols, said_once
from vbcompile.backend import vblackwell
from vbcompile.passes import pipeline
from vbcompile.report import Decision

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model, **options):
    """With AOTAutograd alone downstream, which is quick; tests of Inductor ask for it."""
    return torch.compile(model, backend="vblackwell", options={"strict": True, "downstream": "aot_eager", **options})


def check(model, *inputs, **options):
    """Outputs and all gradients equal eager's."""
    twin = copy.deepcopy(model)
    run = compiled(twin, **options)
    want, got = model(*inputs), run(*inputs)
    torch.testing.assert_close(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
    return run


@pytest.mark.parametrize("downstream", ["inductor", "aot_eager", "eager"])
def test_training_equals_eager(downstream, cpp_kernels, reports):
    check(Block(), torch.randn(2, 9, 32), downstream=downstream)
    assert counters["vblackwell"]["fuse_attention"] == 1
    assert reports[0].training and not reports[0].failures


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_equals_eager(context, reports):
    model, x = Block().eval(), torch.randn(2, 9, 32)
    with context():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert not reports[0].training


def test_dynamic_shapes_fuse_once_and_stay_right(cpp_kernels):
    model = Block()
    run = torch.compile(model, backend="vblackwell", dynamic=True, options={"strict": True})
    for size in (5, 9, 17):
        x = torch.randn(2, size, 32)
        torch.testing.assert_close(run(x), model(x))
    assert counters["vblackwell"]["fuse_attention"] == 1
    assert counters["stats"]["unique_graphs"] == 1


def test_a_graph_captured_anew_is_counted_once(reports, caplog):
    """A float argument becomes a symbolic number; AOTAutograd then asks Dynamo to capture the graph a second time."""

    def attend(q, k, v, p):
        return nn.functional.dropout(torch.softmax(q @ k.mT * 0.25, -1), p) @ v

    heads = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    run = torch.compile(attend, backend="vblackwell", dynamic=True, options={"downstream": "aot_eager"})
    torch.testing.assert_close(run(*heads, 0.0), attend(*heads, 0.0))
    assert counters["vblackwell"]["fuse_attention"] == 1
    assert len(reports) == 1
    assert not [r for r in caplog.records if r.name.startswith("vbcompile") and r.levelname == "WARNING"]


def test_sizes_that_change():
    model = Block()
    run = compiled(model)
    for shape in ((2, 5, 32), (3, 5, 32), (3, 8, 32), (0, 8, 32), (1, 1, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x), model(x))


def test_non_contiguous_and_float64_inputs():
    model = Block().double()
    check(model, torch.randn(2, 32, 9, dtype=torch.float64).transpose(1, 2))


def test_fullgraph_and_stack_of_blocks():
    model = nn.Sequential(*(Block() for _ in range(3)))
    run = torch.compile(model, backend="vblackwell", fullgraph=True, options={"downstream": "aot_eager"})
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(run(x), model(x))
    assert counters["vblackwell"]["fuse_attention"] == 3


def test_graph_breaks_are_reported(reports):
    block = Block()

    def broken(x):
        y = block(x)
        torch._dynamo.graph_break()
        return block(y)

    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(compiled(broken)(x), block(block(x)))
    assert sum(bool(r.graph_break) for r in reports) == 1


def test_autocast():
    model, x = Block(), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        got = compiled(model)(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_tied_weights_and_buffers_that_change():
    model = Block()
    tied = nn.Sequential(model, model)
    check(tied, torch.randn(2, 9, 32))
    run = compiled(tied)
    with torch.no_grad():
        tied[0].gain.fill_(0.5)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(run(x), tied(x), rtol=1e-4, atol=1e-4)


def test_dropout_is_applied_in_training_only():
    model = Block(dropout=0.5)
    x = torch.randn(2, 9, 32)
    run = compiled(model)
    first, second = run(x), run(x)
    assert not torch.equal(first, second)
    first.sum().backward()
    model.eval()
    torch.testing.assert_close(run(x), model(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_integer_and_complex_graphs_are_untouched(dtype):
    x = torch.randn(2, 4, 4).to(dtype) if dtype.is_complex else torch.randint(5, (2, 4, 4))
    f = lambda t: (t @ t) * 2
    torch.testing.assert_close(compiled(f)(x), f(x))


def test_unknown_mode_lists_the_valid_ones():
    with pytest.raises(Exception, match="valid: balanced, memory, speed, full"):
        torch.compile(nn.Linear(2, 2), backend="vblackwell", mode="fast")(torch.randn(1, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fp4_format": "mxfp4", "fp4_qat": True}, ["fp4_format, fp4_qat: no effect, FP4 is off in mode balanced"]),
        ({"slowdown": 0.2}, ["slowdown: no effect, recompute and offload are off in mode balanced"]),
        ({"fp4_format": "mxfp4", "mode": "speed"}, []),
        ({"fp4_format": "mxfp4", "fp4": False}, []),
        ({"slowdown": 0.2, "mode": "memory"}, []),
    ],
)
def test_options_without_effect_are_said_once(options, said, caplog, monkeypatch):
    monkeypatch.setattr(said_once, "_said", set())
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(lambda x: x.sin(), backend="vblackwell", options={"downstream": "eager", **options})(
            torch.ones(2)
        )
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("vbcompile")]
    assert len(messages) == len(said) and all(m.startswith(s) for m, s in zip(messages, said, strict=True))


def test_mode_without_its_passes_says_so_once(caplog, monkeypatch):
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    monkeypatch.setattr(said_once, "_said", set())
    absent = pipeline.Pass("dream", lambda gm, context: [], lambda c: c.mode == "full", lambda target: "no dreams here")
    monkeypatch.setattr(pipeline, "PASSES", (absent,))
    with caplog.at_level(logging.WARNING, "vbcompile"):
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(model, backend="vblackwell", options={"mode": "full", "downstream": "eager"})(x)
    messages = [r.getMessage() for r in caplog.records if "does not have" in r.getMessage()]
    assert len(messages) == 1 and "no dreams here" in messages[0]


@pytest.fixture
def failing_pass(monkeypatch):
    def scribble_and_fail(gm, context):
        gm.graph.erase_node(gm.graph.output_node())
        raise RuntimeError("deliberate")

    monkeypatch.setattr(pipeline, "PASSES", (pipeline.Pass("scribble", scribble_and_fail, lambda c: True),))


def test_a_failing_pass_is_undone_with_one_warning(failing_pass, reports, caplog):
    model, x = Block(), torch.randn(2, 9, 32)
    with caplog.at_level(logging.WARNING, "vbcompile"):
        torch.testing.assert_close(torch.compile(model, backend="vblackwell")(x), model(x))
    assert [r.getMessage() for r in caplog.records] == [
        "pass scribble failed, the graph runs without it: RuntimeError: deliberate"
    ]
    assert reports[0].failures == [("scribble", "RuntimeError: deliberate")]


def test_every_failing_pass_is_undone_to_the_original_graph(monkeypatch, reports):
    def scribble(gm, context):
        for node in gm.graph.nodes:
            if node.op == "call_function":
                node.target = torch.sub
        raise RuntimeError("deliberate")

    def rewrite_badly(gm, context):
        break_output(gm)
        return [Decision("bad", "output", "rewritten", "nonsense")]

    passes = [
        pipeline.Pass(n, run, lambda c: True) for n, run in (("a", scribble), ("b", scribble), ("c", rewrite_badly))
    ]
    monkeypatch.setattr(pipeline, "PASSES", tuple(passes))
    x = torch.randn(3)
    run = torch.compile(lambda t: t + 2 * t, backend="vblackwell", options={"downstream": "aot_eager"})
    torch.testing.assert_close(run(x), 3 * x)
    assert [name for name, _ in reports[0].failures] == ["a", "b", "compile"]


def test_strict_raises_instead(failing_pass, monkeypatch):
    monkeypatch.setenv("VB_STRICT", "1")
    with pytest.raises(Exception, match="deliberate"):
        torch.compile(Block(), backend="vblackwell")(torch.randn(2, 9, 32))


def break_output(gm):
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        bad = gm.graph.call_function(torch.matmul, (output.args[0][0], 3))
    output.args = ((bad,),)
    gm.recompile()


def test_a_rewrite_that_does_not_compile_is_undone(monkeypatch, reports):
    def break_graph(gm, context):
        break_output(gm)
        return [Decision("bad", "output", "rewritten", "nonsense")]

    monkeypatch.setattr(pipeline, "PASSES", (pipeline.Pass("bad", break_graph, lambda c: True),))
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(model, backend="vblackwell")(x), model(x))
    assert "does not compile" in reports[0].failures[0][1] and not reports[0].decisions


def test_inductor_does_not_miscompile_what_we_refuse():
    def wrong_axis(q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1), dim=-2) @ v

    q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
    want = wrong_axis(q, k, v)
    torch.testing.assert_close(torch.compile(wrong_axis, backend="vblackwell")(q, k, v), want)
    assert counters["inductor"]["fuse_attention"] == 0


def test_inductor_keeps_its_own_pass_for_others():
    def plain(q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1) / 4.0, dim=-1) @ v

    q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
    torch.compile(lambda x: x.softmax(0) + 1, backend="vblackwell")(torch.randn(5))
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(plain, backend="inductor")(q, k, v)
    assert counters["inductor"]["fuse_attention"] == 1


def test_two_threads_compile():
    models = [Block(width) for width in (16, 32)]
    results, errors = {}, []

    def work(index):
        try:
            x = torch.randn(2, 9, models[index].norm.normalized_shape[0])
            results[index] = (compiled(models[index], downstream="inductor")(x), models[index](x))
        except Exception as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for got, want in results.values():
        torch.testing.assert_close(got, want)


def test_the_uncompiled_model_copies_and_pickles():
    model, x = Block(), torch.randn(2, 9, 32)
    compiled(model)(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))


def test_data_loader_workers_after_a_compile():
    model, x = Block(), torch.randn(4, 9, 32)
    run = compiled(model)
    run(x)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2, num_workers=1)
    got = torch.cat([run(batch) for (batch,) in loader])
    torch.testing.assert_close(got, model(x))


_CHILD = """
import json, torch
from torch._dynamo.utils import counters
torch.manual_seed(0)
layer = torch.nn.Linear(16, 48)
def model(x):
    q, k, v = layer(x).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    return torch.softmax(q @ k.transpose(-2, -1) * 0.3, -1) @ v
torch.compile(model, backend="vblackwell")(torch.randn(2, 9, 16)).sum().backward()
cache = counters["aot_autograd"]
print(json.dumps({"fused": counters["vblackwell"]["fuse_attention"]}
                 | {key: cache["autograd_cache_" + key] for key in ("hit", "miss", "bypass")}))
"""


def test_a_second_process_hits_the_cache_without_importing_us(tmp_path, warm_python):
    found = []
    for _ in range(2):
        done = warm_python.run(["-c", _CHILD], variables={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found == [
        {"fused": 1, "hit": 0, "miss": 1, "bypass": 0},
        {"fused": 1, "hit": 1, "miss": 0, "bypass": 0},
    ]


def test_mixed_precision_on_request_keeps_the_results_dtype(reports):
    model, x = Block(), torch.randn(2, 9, 32)
    run = compiled(model, mixed_precision=True)
    got = run(x)
    assert got.dtype == torch.float32 and not torch.equal(got, model(x))
    torch.testing.assert_close(got, model(x), atol=3e-2, rtol=3e-2)
    got.sum().backward()
    assert model.qkv.weight.grad.dtype == torch.float32
    assert reports[0].count("rewritten", "mixed_precision") == 1


@pytest.mark.parametrize("mode", [None, "balanced"])
def test_mixed_precision_never_surprises_on_cpu(mode, reports):
    model, x = Block(), torch.randn(2, 9, 32)
    torch.testing.assert_close(compiled(model, **({"mode": mode} if mode else {}))(x), model(x))
    assert reports[0].count("rewritten", "mixed_precision") == 0


def test_mixed_precision_leaves_low_precision_models_alone(reports):
    model, x = Block().bfloat16(), torch.randn(2, 9, 32, dtype=torch.bfloat16)
    compiled(model, mixed_precision=True)(x)
    assert "already computes in torch.bfloat16" in next(
        d.reason for d in reports[0].decisions if d.pass_name == "mixed_precision"
    )


def test_size_hint_and_source_hash():
    assert compat_symbols.size_hint(7) == 7
    assert compat.source_hash(compat) == compat.source_hash(compat) != compat.source_hash(pipeline)


def test_reset_frees_what_was_compiled():
    model = nn.Linear(2, 2)
    alive = weakref.ref(model.weight)
    torch.compile(model, backend=vblackwell)(torch.randn(1, 2))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
