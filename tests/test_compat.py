"""Private parts of PyTorch that we touch: each still behaves as we rely on, on the release that is installed."""

import contextlib
import pickle

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from vbcompile import compat, compat_symbols
from vbcompile.compat_transforms import has_tangent, is_forward_differentiated, no_transform_left
from vbcompile.config import INDUCTOR_MODES

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / 4.0, dim=-1) @ v


def heads():
    return tuple(torch.randn(2, 4, 8, 16) for _ in range(3))


def captured(function, *inputs, dynamic=None):
    """The graph module that Dynamo hands to a backend."""
    found = []

    def backend(gm, example_inputs):
        found.append(gm)
        return gm.forward

    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return found[0]


# ------------------------------------------------------------------------------------------- compile_with_inductor
def by_inductor(key, **options):
    return lambda gm, example_inputs: compat.compile_with_inductor(gm, example_inputs, options, key)


@contextlib.contextmanager
def inductor_of_its_own():
    """Inductor without caches, so that its passes run."""
    with inductor_config.patch(force_disable_caches=True):
        yield


@pytest.mark.parametrize("training", [False, True])
def test_the_attention_patterns_are_hidden_and_come_back(training):
    q, k, v = (t.requires_grad_(training) for t in heads())
    with inductor_of_its_own():
        ours = torch.compile(attend, backend=by_inductor("key"))(q, k, v)
        assert counters["inductor"]["fuse_attention"] == 0
        torch._dynamo.reset()
        torch.compile(attend, backend="inductor")(q, k, v)
    assert counters["inductor"]["fuse_attention"] >= 1
    torch.testing.assert_close(ours, attend(q, k, v))
    if training:
        ours.sum().backward()
        assert q.grad.isfinite().all()


def test_the_patterns_come_back_after_an_error():
    class Fails(CustomGraphPass):
        def __call__(self, graph):
            raise RuntimeError("deliberate")

        def uuid(self):
            return "fails"

    q, k, v = heads()
    with inductor_of_its_own():
        with pytest.raises(Exception, match="deliberate"):
            torch.compile(attend, backend=by_inductor("key", joint_custom_pre_pass=Fails()))(q, k, v)
        torch._dynamo.reset()
        torch.compile(attend, backend="inductor")(q, k, v)
    assert counters["inductor"]["fuse_attention"] == 1


def test_a_users_own_pass_still_runs_and_enters_the_key():
    class Counts(CustomGraphPass):
        calls = 0

        def __call__(self, graph):
            type(self).calls += 1

        def uuid(self):
            return "counts"

    q, k, v = heads()
    with inductor_of_its_own():
        torch.compile(attend, backend=by_inductor("key", joint_custom_pre_pass=Counts()))(q, k, v)
    assert Counts.calls == 1
    assert "counts" in compat.InductorAttentionOff("key", Counts()).uuid()


def test_the_key_enters_the_cache_key():
    q, k, v = heads()
    hits = []
    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=False):
        for key in ("one", "other", "one"):
            torch._dynamo.reset()
            before = counters["inductor"]["fxgraph_cache_hit"]
            torch.compile(attend, backend=by_inductor(key))(q, k, v)
            hits.append(counters["inductor"]["fxgraph_cache_hit"] - before)
    assert hits == [0, 0, 1]


def test_the_hook_pickles_for_the_compile_workers():
    hook = pickle.loads(pickle.dumps(compat.InductorAttentionOff("key", None)))
    assert hook.uuid() == compat.InductorAttentionOff("key", None).uuid()


@pytest.mark.parametrize("mode", INDUCTOR_MODES)
def test_inductor_mode_options(mode):
    options = compat.inductor_mode_options(mode)
    assert set(options) <= set(inductor_config.get_config_copy())
    assert bool(options.get("triton.cudagraphs")) == (mode in ("reduce-overhead", "max-autotune"))


@pytest.mark.parametrize(
    ("mode", "options", "captured"),
    [
        ("default", {}, False),
        ("reduce-overhead", {}, True),
        ("max-autotune-no-cudagraphs", {}, False),
        ("default", {"triton.cudagraphs": True}, True),
        ("reduce-overhead", {"triton.cudagraphs": False}, False),
    ],
)
def test_uses_cudagraphs(mode, options, captured):
    assert compat.uses_cudagraphs(mode, options) == captured


def test_reset_cudagraphs(monkeypatch):
    from torch._inductor import cudagraph_trees

    calls = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: calls.append(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compat.reset_cudagraphs()
    assert not calls
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compat.reset_cudagraphs()
    assert calls == [1]


def test_compile_with_aot_eager():
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    run = torch.compile(model, backend=compat.compile_with_aot_eager)
    torch.testing.assert_close(run(x), model(x))
    run(x).sum().backward()
    assert model.weight.grad is not None


# --------------------------------------------------------------------------------------------------- what Dynamo does
def test_inside_compiled_code():
    seen = []

    @torch.compiler.disable
    def outside():
        seen.append(("disabled", compat.inside_compiled_code()))

    def function(x):
        y = x + 1
        seen.append(("not traced", compat.inside_compiled_code()))  # Dynamo leaves the query itself to Python
        outside()
        return y * 2

    assert not compat.inside_compiled_code()
    torch.compile(function, backend="eager")(torch.ones(2))
    assert not compat.inside_compiled_code()
    assert seen == [("not traced", True), ("disabled", False)]


def test_is_skipped_by_dynamo():
    class Model(nn.Module):
        def forward(self, x):
            return x

    assert compat.is_skipped_by_dynamo(nn.Sequential.forward)
    assert not compat.is_skipped_by_dynamo(Model.forward)


def test_is_tracing():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append(compat.is_tracing())
            return x + 1

    model = Model()
    model(torch.ones(1))
    torch.jit.trace(model, torch.ones(1), check_trace=False)
    fx.symbolic_trace(model)
    assert seen == [False, True, True]


def test_uncompiled():
    def double(x):
        return x * 2

    assert compat.uncompiled(torch.compile(double, backend="eager")) is double
    assert compat.uncompiled(double) is double


def test_is_compiled_module():
    model = nn.Linear(2, 2)
    assert compat.is_compiled_module(torch.compile(model))
    assert not compat.is_compiled_module(model)


def test_wants_another_capture():
    asked = []

    def backend(gm, example_inputs):
        try:
            return compat.compile_with_aot_eager(gm, example_inputs)
        except Exception as error:
            asked.append(compat.wants_another_capture(error))
            raise

    def drop(x, probability):
        return nn.functional.dropout(x, probability)

    x = torch.randn(3)
    assert torch.equal(torch.compile(drop, backend=backend, dynamic=True)(x, 0.0), x)
    assert asked == [True]
    assert not compat.wants_another_capture(RuntimeError("a failure"))


def test_copy_graph_stands_in_for_the_original():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    kept = []

    def backend(gm, example_inputs):
        copy = compat.copy_graph(gm.graph)
        copy.lint()
        pairs = list(zip(gm.graph.nodes, copy.nodes, strict=True))
        sources = [getattr(node, "_dynamo_source", None) for node, _ in pairs]
        assert any(source is not None for source in sources)
        assert sources == [getattr(twin, "_dynamo_source", None) for _, twin in pairs]
        assert all(node.name == twin.name and node.meta.keys() == twin.meta.keys() for node, twin in pairs)
        kept.append((str(gm.code), gm))
        for node in list(gm.graph.nodes)[::-1]:  # what a failing pass may leave behind
            if node.op == "call_function":
                node.replace_all_uses_with(next(iter(gm.graph.nodes)))
                gm.graph.erase_node(node)
        gm.graph = copy
        return compat.compile_with_aot_eager(gm, example_inputs)

    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert kept[0][1].code == kept[0][0]


def test_types_are_promoted_as_pytorch_does():
    half = torch.ones(2, dtype=torch.float16)
    assert compat.promoted_type(half, 2.0) == torch.float16
    assert compat.promoted_type(half, torch.ones(2)) == torch.float32
    assert compat.promoted_type(FakeTensorMode().from_tensor(half), 1) == torch.float16


def test_size_hint():
    gm = captured(lambda x: x + 1, torch.ones(7, 3), dynamic=True)
    *_, result = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "call_function"]
    assert not isinstance(result.shape[0], int)
    assert [compat_symbols.size_hint(s) for s in result.shape] == [7, 3]
    assert (compat_symbols.count_hint(result), compat_symbols.bytes_hint(result)) == (21, 84)
    unbacked = torch.fx.experimental.symbolic_shapes.ShapeEnv().create_unbacked_symint()
    assert compat_symbols.size_hint(unbacked) == 4096


def test_compile_id():
    seen = []

    def backend(gm, example_inputs):
        seen.append(compat.compile_id())
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert compat.compile_id() == "" and len(seen) == 1
    frame, _, attempt = seen[0].partition("/")
    assert frame.isdigit() and attempt.isdigit()


def test_graph_break_reason():
    reasons = []

    def backend(gm, example_inputs):
        reasons.append(compat.graph_break_reason(gm))
        return gm.forward

    def function(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    torch.compile(function, backend=backend)(torch.ones(2))
    assert "graph_break" in reasons[0] and "test_compat.py" in reasons[0]
    assert reasons[1:] == [""]


def test_source_hash():
    assert compat.source_hash(compat) == compat.source_hash(compat)
    assert compat.source_hash(compat) != compat.source_hash(pytest)


def test_has_kernel():
    assert compat.has_kernel("aten::mm", "CPU")
    assert not compat.has_kernel("aten::mm", "Vulkan")


def test_registered_backends():
    assert compat.is_registered_backend("aot_eager") and not compat.is_registered_backend("no_such_backend")
    graph = fx.symbolic_trace(torch.nn.ReLU())
    out = compat.registered_backend("eager")(graph, [torch.ones(2)])(torch.tensor([-1.0, 1.0]))
    assert torch.equal(torch.as_tensor(out), torch.tensor([0.0, 1.0]))


def test_fake_mode_and_contexts_of_parts_of_a_graph():
    seen = []

    def backend(gm, example_inputs):
        mode = compat.fake_mode_of_compile()
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        tensor = next(value for value in fakes if isinstance(value, torch.Tensor))
        outer = torch._guards.TracingContext.get()
        with compat.own_tracing_context(mode):
            inner = torch._guards.TracingContext.get()
        symbols = compat_symbols.free_symbols_of(tensor)
        named = {compat_symbols.symbol_of(value) for value in fakes} & symbols
        seen.append((mode is outer.fake_mode, inner is not outer, inner.fake_mode is mode, symbols == named))
        seen.append(compat.is_fake(tensor))
        return gm.forward

    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.randn(3, 5))
    assert seen == [(True, True, True, True), True]
    assert not compat.is_fake(torch.zeros(1)) and compat_symbols.symbol_of(3) is None
    assert compat.fake_mode_of_compile() is not None
    compat.refuse_while_lowering("nothing is being lowered here")


def test_static_fake():
    """Of the compile in progress, its sizes constant where others vary."""
    weight, seen = torch.ones(3, 5), []

    def backend(gm, example_inputs):
        fake = compat.static_fake(weight)
        seen.append((compat.is_fake(fake), fake.fake_mode is compat.fake_mode_of_compile(), fake.shape))
        return gm.forward

    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.randn(3, 5))
    assert seen == [(True, True, (3, 5))] and all(type(size) is int for size in seen[0][2])
    assert compat.static_fake(weight) is weight


def test_inputs_that_stay_where_they_are_are_known_to_cuda_graphs():
    from torch._inductor.compile_fx import compile_fx

    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output((graph.call_function(torch.mm, (x, weight)),))
    module = torch.fx.GraphModule({}, graph)
    seen = []

    def inner(gm, example_inputs, static_input_idxs=(), **_):
        seen.append(tuple(static_input_idxs))
        return gm.forward

    mode = compat.fake_mode_of_compile()
    with mode:
        inputs = [torch.empty(2, 3), torch.empty(3, 4)]
    for declared in ((), (1,)):
        if declared:
            compat.declare_static_inputs(module, [weight])
        with compat.own_tracing_context(mode), torch.no_grad():
            compile_fx(module, inputs, inner_compile=inner)
        assert seen[-1] == declared


def test_is_module_state():
    model = torch.nn.Linear(4, 4)
    model.register_buffer("state", torch.randn(4))
    model.cache = torch.randn(4)
    found = {}

    def backend(gm, example_inputs):
        found.update({node.name: compat.is_module_state(node) for node in gm.graph.find_nodes(op="placeholder")})
        return gm.forward

    torch.compile(lambda x: model(x) + model.state + model.cache, backend=backend)(torch.randn(2, 4))
    assert {name.split("_")[-2] for name, state in found.items() if state} == {"weight", "bias", "state"}
    assert sum(found.values()) == 3 and len(found) == 5
    assert compat.is_module_state(torch.fx.Graph().placeholder("x"))  # nobody says otherwise


def test_transforms_are_ended():
    functorch = torch._C._functorch
    with pytest.raises(ValueError, match="inside"), no_transform_left():
        functorch._vmap_increment_nesting(2, "error")
        raise ValueError("inside")
    assert functorch.get_dynamic_layer_stack_depth() == 0
    assert torch.vmap(torch.sin)(torch.ones(2)).shape == (2,)


def test_tangents_are_seen():
    x = torch.ones(2)
    assert not is_forward_differentiated()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert is_forward_differentiated()
        assert has_tangent(dual) and has_tangent([1, dual]) and not has_tangent(x) and not has_tangent(None)


def test_operators_run_in_their_python_forms_with_symbolic_sizes():
    is_on = lambda: torch._C._dispatch_tls_is_dispatch_key_included("PythonDispatcher")
    mode = FakeTensorMode(shape_env=ShapeEnv())
    varying, fixed = mode.from_tensor(torch.ones(3)), mode.from_tensor(torch.ones(3), static_shapes=True)
    for operand, wanted in ((varying, True), (varying.shape[0], True), (fixed, False), (3, False)):
        with compat_symbols.symbolic_operators([None, operand]):
            assert is_on() == wanted
    assert not is_on()
