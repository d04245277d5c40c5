"""Calls in Inductor's code that skip PyTorch's dispatcher, on a card: other data each time, streams, CUDA graphs."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import FEED, Feed, decoded_twin
from torch import nn
from torch._inductor.utils import run_and_get_code

from vbcompile import compat_lowering
from vbcompile.kernels import attention, fp4_linear, replay  # noqa: F401 - operators
from vbcompile.kernels.compiled_calls import OPERATORS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_weights")]


@pytest.fixture(autouse=True)
def dispatched(monkeypatch):
    """Names of the operators that plain calls went to, as they do until a recording is there."""
    if torch.version.hip is not None:
        pytest.skip("NVIDIA's")
    found = []
    for name, known in list(OPERATORS.items()):

        def run(*args, name=name, known=known, **kwargs):
            found.append(name)
            return known.run(*args, **kwargs)

        monkeypatch.setitem(OPERATORS, name, replace(known, run=run))
    replay.forget()
    return found


def code(run, *inputs):
    """The lines of what is generated at the first call."""
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        _, sources = run_and_get_code(run, *inputs)
    return [line for source in sources for line in source.splitlines() if not line.strip().startswith("#")]


def by_dispatcher(lines):
    return [line for line in lines if " = torch.ops.vblackwell" in line]


def take_all(found):
    """What was found so far, which is forgotten."""
    taken = list(found)
    found.clear()
    return taken


def check(got, eager, exact):
    assert (got.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-5 * exact.norm()


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_linear_layers(dispatched, rows):
    model = Feed(1024, 2048).to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    twin = decoded_twin(model, *FEED)
    exact = copy.deepcopy(twin).double()
    options = {"mode": "speed", "strict": True}
    run = torch.compile(model, backend="vblackwell", options=options, dynamic=False)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert not by_dispatcher(code(run, x))
        run(x)
        assert take_all(dispatched)
        for _ in range(4):
            x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
            check(run(x), twin(x), exact(x.double()))
    assert not dispatched


def test_numbers_of_rows_that_vary(dispatched):
    model = Feed(1024, 2048).to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    twin = decoded_twin(model, *FEED)
    exact = copy.deepcopy(twin).double()
    run = torch.compile(model, backend="vblackwell", options={"mode": "speed", "strict": True})
    with torch.no_grad():
        x = torch.randn(5, 1024, device="cuda", dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        assert not by_dispatcher(code(run, x))
        for n, rows in enumerate((3, 40, 5, 3, 40, 3, 40, 5, 3, 5, 40)):
            x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
            check(run(x), twin(x), exact(x.double()))
            if n == 4:  # each number of rows was there twice
                assert take_all(dispatched)
    assert not dispatched


def test_the_dispatcher_gives_the_same_bits(dispatched, monkeypatch):
    layers = [nn.Linear(4096, 4096, bias=n == 1) for n in range(3)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    model = model.to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)

    def results(data):
        torch._dynamo.reset()
        run = torch.compile(model, backend="vblackwell", options={"mode": "speed", "strict": True}, dynamic=False)
        with torch.no_grad():
            lines = code(run, data[0])
            return lines, [run(x) for x in data]

    for rows in (1, 16, 128):
        data = [torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        lines, got = results(data)
        assert not by_dispatcher(lines) and take_all(dispatched)
        with monkeypatch.context() as patch:
            patch.setattr(compat_lowering, "_is_ours", lambda: False)
            lines, want = results(data)
        assert len(by_dispatcher(lines)) == 3 and not dispatched
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_streams_and_graphs(dispatched):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512))
    model = model.to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    twin = decoded_twin(model, "0.weight", "2.weight")
    exact = copy.deepcopy(twin).double()
    run = torch.compile(model, backend="vblackwell", options={"mode": "speed", "strict": True}, dynamic=False)
    x = torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(2):
            run(x)
        assert take_all(dispatched)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            doubled = x * 2
            got = run(doubled)
        stream.synchronize()
        check(got, twin(doubled), exact(doubled.double()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            check(got, twin(x), exact(x.double()))
    assert not dispatched


def attend(q, k, v, bias):
    scores = 30 * torch.tanh((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias) / 30)
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return torch.softmax(scores.masked_fill(~keep, -torch.inf), -1) @ v


def test_attention_in_training(dispatched):
    run = torch.compile(attend, backend="vblackwell", options={"strict": True}, dynamic=False)

    def results(function, tensors, upstream):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    for step in range(5):
        shapes = [(2, 4, 300, 64)] * 3 + [(4, 300, 300)]
        tensors = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        upstream = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
        wide = results(attend, [t.double() for t in tensors], upstream.double())
        for row in zip(results(run, tensors, upstream), results(attend, tensors, upstream), wide, strict=True):
            check(*row)
        if step == 1:
            assert set(take_all(dispatched)) == {"attention", "attention_backward"}
    assert not dispatched


def test_attention_of_one_token(dispatched):
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 32, 9000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    keep = torch.arange(9000, device="cuda")[None] < 8000
    masked = lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, keep)
    options = {"strict": True, "implementations": {"attention": "triton"}}
    run = torch.compile(masked, backend="vblackwell", options=options, dynamic=False)
    with torch.no_grad():
        assert not by_dispatcher(code(run, q, k, v, keep))
        run(q, k, v, keep)
        assert take_all(dispatched) == ["attention"] * 2
        for _ in range(3):
            q = torch.randn_like(q)
            check(run(q, k, v, keep), masked(q, k, v, keep), masked(q.double(), k.double(), v.double(), keep))
    assert not dispatched
