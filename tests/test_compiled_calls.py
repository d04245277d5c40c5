"""Inductor's code calls our operators without the dispatcher, and repeats their launches; a stub is the driver."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.codecache import PyCodeCache
from torch._inductor.utils import fresh_cache, run_and_get_code

from tests.stub_driver import compare_repeats, stub_driver
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import compiled_calls, fp4_linear_few, registry, replay
from vbcompile.kernels import fp4_linear as logical
from vbcompile.kernels.attention import attention
from vbcompile.kernels.compiled_calls import OPERATORS, TENSOR, place_of_call
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.triton_target import interpreted

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(
        shutil.which("gcc") is None or torch.cuda.is_available(),
        reason="the stub is written in C and replaces the driver",
    ),
]
BY_DISPATCHER, PLAIN = " = torch.ops.vblackwell.fp4_linear.default(", " = fp4_linear_"


@pytest.fixture
def stub(monkeypatch):
    """CPU tensors are taken for those of an H200 whose driver is the stub."""
    for module in (logical, fp4_linear_few):
        monkeypatch.setattr(module, "get_target", lambda device: catalog_target("sm_90"))
    if interpreted():
        pytest.skip("these launch compiled kernels")
    registry.operator("fp4_linear").load()
    with stub_driver(monkeypatch) as stub, registry.force(fp4_linear="triton_diagonal"):
        yield stub


@pytest.fixture
def dispatched(monkeypatch):
    """Numbers the calls that went to the operator."""
    count, known = [0], OPERATORS["fp4_linear"]

    def run(*args, **kwargs):
        count[0] += 1
        return known.run(*args, **kwargs)

    monkeypatch.setitem(OPERATORS, "fp4_linear", replace(known, run=run))
    return count


def weight(n=256, k=512):
    return to_layout(quantize(torch.randn(n, k)), "fragments2t")


def product(x, codes, block_scales, row_scale, bias=None):
    return logical.fp4_linear(x, codes, block_scales, row_scale, bias, 512, "nvfp4", "fragments2t")


def row(m=1):
    return torch.randn(1, m, 512, dtype=torch.bfloat16)


def code(function, *inputs, backend="vblackwell", dynamic=False, **options):
    inductor = torch._inductor.config.patch(fx_graph_cache=False, fallback_by_default=False)
    with inductor, torch._functorch.config.patch(enable_autograd_cache=False):
        run = torch.compile(function, backend=backend, dynamic=dynamic, options=options or None)
        with torch.no_grad():
            _, sources = run_and_get_code(run, *inputs)
    lines = [line for source in sources for line in source.splitlines() if not line.strip().startswith("#")]
    return run, "\n".join(lines)


def test_repeated_calls_pass_on_what_tritons_own_launches_pass_on(stub, dispatched, monkeypatch):
    compared = compare_repeats(stub, monkeypatch)
    given, bias = [weight().tensors for _ in range(2)], torch.randn(256)

    def layers(x, first, second, bias):
        return product(x, *first), product(x, *second), product(x, *second, bias)

    run, source = code(layers, row(), *given, bias)
    assert BY_DISPATCHER not in source and source.count(PLAIN) == 3
    with torch.no_grad():
        for _ in range(4):
            results = run(row(), *given, bias)
            assert all(r.shape == (1, 1, 256) and r.dtype == torch.bfloat16 for r in results)
            assert len({r.data_ptr() for r in results}) == 3
    # the first way is recorded by the second layer's call, the other one by the second call of all
    assert dispatched[0] == 2 + 2 and compared[0] == 3 * 5 - 4


def test_what_calls_depend_on_is_followed(stub, dispatched):
    w, x = weight(), row()
    run, _ = code(product, x, *w.tensors)
    with torch.no_grad():
        for _ in range(3):
            run(x, *w.tensors)
        assert dispatched[0] == 2
        before = stub.launches
        with registry.force(fp4_linear="reference"):
            got = run(x, *w.tensors)
        assert dispatched[0] == 3 and stub.launches == before
        assert torch.equal(got, logical.fp4_linear_reference(x, *w.tensors, None, 512, "nvfp4", "fragments2t"))
        run(x, *w.tensors)
        assert dispatched[0] == 3 and stub.launches == before + 1
        replay.forget()
        run(x, *w.tensors)
        run(x, *w.tensors)
        assert dispatched[0] == 5
        run(x, *w.tensors)
        assert dispatched[0] == 5


def test_addresses_of_other_alignment_go_to_the_operator(stub, dispatched):
    w = weight()
    place = place_of_call("fp4_linear", (TENSOR,) * 4 + (None, 512, "nvfp4", "fragments2t"), {})
    elsewhere = torch.randn(513, dtype=torch.bfloat16)[1:].view(1, 1, 512)
    with torch.no_grad():
        for _ in range(3):
            place(row(), *w.tensors)
        assert dispatched[0] == 2
        place(elsewhere, *w.tensors)
        place(elsewhere, *w.tensors)
        assert dispatched[0] == 4
        place(row(), *w.tensors)
        assert dispatched[0] == 4


def test_a_recording_of_one_tensor_given_twice_is_not_taken(stub, dispatched):
    w = weight()
    place = place_of_call("fp4_linear", (TENSOR,) * 5 + (512, "nvfp4", "fragments2t"), {})
    with torch.no_grad():
        for _ in range(4):
            place(row(), *w.tensors, w.row_scale)
    assert dispatched[0] == 4


def test_sizes_that_vary(stub, dispatched, monkeypatch):
    compared = compare_repeats(stub, monkeypatch)
    w, x = weight(), row(3)
    torch._dynamo.mark_dynamic(x, 1)
    run, source = code(product, x, *w.tensors, dynamic=None)
    assert BY_DISPATCHER not in source and source.count(PLAIN) == 1
    with torch.no_grad():
        for m in (3, 2, 2, 4, 2, 3, 4, 4, 3):
            assert run(row(m), *w.tensors).shape == (1, m, 256)
    assert dispatched[0] == 6 and compared[0] == 4  # two of each number of rows


def test_a_place_forgets_the_oldest_shapes(stub, dispatched, monkeypatch):
    monkeypatch.setattr(compiled_calls, "_MOST", 2)
    w = weight()
    place = place_of_call("fp4_linear", (TENSOR,) * 4 + (None, 512, "nvfp4", "fragments2t"), {}, [0])
    with torch.no_grad():
        for m in (1, 2, 3, 1, 3, 2):
            for _ in range(3):
                assert place(row(m), *w.tensors).shape == (1, m, 256)
    # the first three numbers of rows twice each; of the last three, those that had been forgotten once
    assert dispatched[0] == 3 * 2 + 2


def test_other_backends_keep_the_dispatcher(stub):
    _, source = code(product, row(), *weight().tensors, backend="inductor")
    assert BY_DISPATCHER in source and PLAIN not in source


def test_what_is_not_remembered_keeps_the_dispatcher(stub, monkeypatch):
    monkeypatch.setattr(replay, "takes", lambda device: device.type == "cuda")
    _, source = code(product, row(), *weight().tensors)
    assert BY_DISPATCHER in source and PLAIN not in source


def test_regions_that_are_compiled_once(stub, dispatched):
    @torch.compiler.nested_compile_region
    def layer(x, codes, block_scales, row_scale):
        return product(x, codes, block_scales, row_scale)

    def layers(x, first, second):
        return layer(x, *first), layer(x, *second)

    given = [weight().tensors for _ in range(2)]
    run, source = code(layers, row(), *given)
    assert PLAIN in source and BY_DISPATCHER not in source
    with torch.no_grad():
        for _ in range(2):
            run(row(), *given)
    assert dispatched[0] == 2


def test_code_out_of_the_cache(stub, dispatched, monkeypatch):
    """As another process finds it, whose kernels nobody has imported."""
    w = weight()
    with fresh_cache(), torch._inductor.config.patch(fallback_by_default=False), torch.no_grad():
        torch.compile(product, backend="vblackwell", dynamic=False)(row(), *w.tensors)
        torch._dynamo.reset()
        PyCodeCache.cache_clear()
        before = counters["inductor"]["fxgraph_cache_hit"]
        known = OPERATORS.pop("fp4_linear")
        monkeypatch.setattr(registry.Operator, "load", lambda self: OPERATORS.update(fp4_linear=known))
        run = torch.compile(product, backend="vblackwell", dynamic=False)
        for _ in range(4):
            run(row(), *w.tensors)
        assert counters["inductor"]["fxgraph_cache_hit"] == before + 1
    assert dispatched[0] == 1 + 1


def test_profilers_hear_of_launches(stub, dispatched):
    from triton import knobs

    w, heard = weight(), []
    place = place_of_call("fp4_linear", (TENSOR,) * 4 + (None, 512, "nvfp4", "fragments2t"), {})
    with torch.no_grad():
        for _ in range(3):
            place(row(), *w.tensors)
        knobs.runtime.launch_enter_hook.add(heard.append)
        try:
            place(row(), *w.tensors)
        finally:
            knobs.runtime.launch_enter_hook.remove(heard.append)
        assert len(heard) == 1 and dispatched[0] == 3
        place(row(), *w.tensors)
    assert len(heard) == 1 and dispatched[0] == 3


def test_the_backward(stub):
    """Calls that are not recorded, of the reference, in code that runs after the compile."""
    w, x = weight(), row().requires_grad_()

    def step(x):
        return torch.autograd.grad(run(x, *w.tensors).sum(), x)[0]

    inductor = torch._inductor.config.patch(fx_graph_cache=False, fallback_by_default=False)
    named = {"fp4_linear": "reference", "fp4_linear_backward": "reference"}
    with registry.force(**named), inductor, torch._functorch.config.patch(enable_autograd_cache=False):
        run = torch.compile(scaled, backend="vblackwell")
        got, sources = run_and_get_code(step, x)
        assert "= fp4_linear_" in sources[0] and "= fp4_linear_backward_" in sources[1]
        want = torch.autograd.grad(scaled(x, *w.tensors).sum(), x)[0]
        assert torch.equal(got, want) and torch.equal(step(x), want)


def scaled(x, *w):
    return product(x, *w)


@pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET=1")
def test_attention_in_training(monkeypatch):
    """Other data each time; results and gradients are those of the operator alone."""
    monkeypatch.setattr(replay, "takes", lambda device: True)
    text = ScoreFunction().dumps()
    dispatched, by_steps = [], replay.Recording.run
    monkeypatch.setattr(replay.Recording, "run", lambda self, *given: dispatched.append(self) or by_steps(self, *given))

    def attend(q, k, v):
        return attention(q, k, v, [], 0.3, 0.0, None, text)[0]

    def results(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    replay.forget()
    inductor = torch._inductor.config.patch(fx_graph_cache=False, fallback_by_default=False)
    with registry.force(attention="triton", attention_backward="triton"), inductor:
        run = torch.compile(attend, backend="vblackwell")
        for _ in range(4):
            tensors = [torch.randn(1, 2, n, 16) for n in (8, 40, 40)]
            got = results(run, *tensors)
            monkeypatch.setattr(replay, "takes", lambda device: False)
            for ours, alone in zip(got, results(attend, *tensors), strict=True):
                torch.testing.assert_close(ours, alone)
            monkeypatch.setattr(replay, "takes", lambda device: True)
    assert not dispatched
