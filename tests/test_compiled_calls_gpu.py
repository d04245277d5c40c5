"""Calls in Inductor's code that skip PyTorch's dispatcher, on a card: other data each time, streams, CUDA graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import FEED, Feed, decoded_twin
from torch import nn
from torch._inductor.utils import run_and_get_code

from vbcompile import compat_lowering
from vbcompile.kernels import replay

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_weights")]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """The recordings that plain calls ran, one for each call."""
    if torch.version.hip is not None:
        pytest.skip("NVIDIA's")
    found, as_function = [], replay.Recording.as_function

    def counted(self, *given):
        function = as_function(self, *given)
        return lambda *tensors: found.append(self) or function(*tensors)

    monkeypatch.setattr(replay.Recording, "as_function", counted)
    replay.forget()
    return found


def code(run, *inputs):
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        _, sources = run_and_get_code(run, *inputs)
    return "\n".join(line for source in sources for line in source.splitlines() if not line.strip().startswith("#"))


def check(got, eager, exact):
    assert (got.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-5 * exact.norm()


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_linear_layers(plain, rows):
    model = Feed(1024, 2048).to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    twin = decoded_twin(model, *FEED)
    exact = copy.deepcopy(twin).double()
    options = {"mode": "speed", "strict": True}
    run = torch.compile(model, backend="vblackwell", options=options, dynamic=False)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        source = code(run, x)
        products = source.count(" = fp4_linear_")
        assert "= torch.ops.vblackwell" not in source and products in (2, 3)  # gate and up in one or in two
        run(x)
        kept = []
        for _ in range(4):
            x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
            kept.append((run(x), twin(x), exact(x.double())))
        for row in kept:
            check(*row)
    assert len(plain) == 4 * products


def test_numbers_of_rows_that_vary(plain):
    model = Feed(1024, 2048).to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    twin = decoded_twin(model, *FEED)
    exact = copy.deepcopy(twin).double()
    run = torch.compile(model, backend="vblackwell", options={"mode": "speed", "strict": True})
    with torch.no_grad():
        for rows in (5, 3, 40, 5, 3, 40, 3, 40, 5, 3, 5, 40):
            x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
            torch._dynamo.mark_dynamic(x, 0)
            check(run(x), twin(x), exact(x.double()))
    assert len(plain) in (3 * 2 * 2, 3 * 2 * 3)


def test_the_dispatcher_gives_the_same_bits(plain, monkeypatch):
    layers = [nn.Linear(4096, 4096, bias=n == 1) for n in range(3)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    model = model.to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    data = [torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for rows in (1, 16, 128) for _ in range(5)]

    def results():
        torch._dynamo.reset()
        run = torch.compile(model, backend="vblackwell", options={"mode": "speed", "strict": True}, dynamic=False)
        with torch.no_grad():
            return [run(x) for x in data]

    got = results()
    assert len(plain) >= 3 * 3 * 3
    plain.clear()
    monkeypatch.setattr(compat_lowering, "_is_ours", lambda: False)
    fresh = (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    )
    with fresh[0], fresh[1]:
        assert all(torch.equal(a, b) for a, b in zip(got, results(), strict=True))
    assert not plain


def test_streams_and_graphs(plain):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512))
    model = model.to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    twin = decoded_twin(model, "0.weight", "2.weight")
    exact = copy.deepcopy(twin).double()
    run = torch.compile(model, backend="vblackwell", options={"mode": "speed", "strict": True}, dynamic=False)
    x = torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            run(x)
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
    assert len(plain) == 2 * 3


def attend(q, k, v, bias):
    scores = 30 * torch.tanh((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias) / 30)
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return torch.softmax(scores.masked_fill(~keep, -torch.inf), -1) @ v


def test_attention_in_training(plain):
    run = torch.compile(attend, backend="vblackwell", options={"strict": True}, dynamic=False)

    def results(function, tensors, upstream):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    for _ in range(5):
        shapes = [(2, 4, 300, 64)] * 3 + [(4, 300, 300)]
        tensors = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        upstream = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
        wide = results(attend, [t.double() for t in tensors], upstream.double())
        for row in zip(results(run, tensors, upstream), results(attend, tensors, upstream), wide, strict=True):
            check(*row)
    assert len(plain) >= 3


def test_attention_of_one_token(plain):
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 32, 9000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    keep = torch.arange(9000, device="cuda")[None] < 8000
    masked = lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, keep)
    options = {"strict": True, "implementations": {"attention": "triton"}}
    run = torch.compile(masked, backend="vblackwell", options=options, dynamic=False)
    with torch.no_grad():
        assert " = attention_" in code(run, q, k, v, keep)
        for _ in range(4):
            q = torch.randn_like(q)
            check(run(q, k, v, keep), masked(q, k, v, keep), masked(q.double(), k.double(), v.double(), keep))
    assert len(plain) == 3
