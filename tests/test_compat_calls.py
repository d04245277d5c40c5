"""Private parts of PyTorch that calls are cheaper with: each still behaves as we rely on, on the installed release."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vbcompile import compat_calls
from vbcompile.kernels.quick_operator import quick_operator

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
KEY = DEVICE.type.upper()
runs: list[bool] = []


@quick_operator("vblackwell_test::twice", KEY)
def twice(x: Tensor) -> Tensor:
    runs.append(torch.is_grad_enabled())
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, upstream: upstream * 2, setup_context=lambda ctx, inputs, output: None)


def test_empty_on_device():
    t = compat_calls.empty_on_device(DEVICE)((2, 3), (1, 2), torch.float16)
    assert t.shape == (2, 3) and t.stride() == (1, 2) and t.dtype == torch.float16 and t.device == DEVICE


def test_seen_as():
    x = torch.arange(12.0)[2:]
    assert compat_calls.seen_as(x, (2, 3), (1, 2), 1).tolist() == x.as_strided((2, 3), (1, 2), 3).tolist()


def test_current_stream():
    assert compat_calls.current_stream(DEVICE) == (torch.cuda.current_stream().cuda_stream if KEY == "CUDA" else 0)


def test_storage_identity():
    x = torch.zeros(4)
    assert compat_calls.storage_identity(x[1:]) == compat_calls.storage_identity(x.view(2, 2))
    assert compat_calls.storage_identity(x) != compat_calls.storage_identity(x.clone())


def test_is_watched_by_dynamo():
    inside = []

    def backend(gm, example_inputs):
        def compiled(*inputs):
            inside.append(compat_calls.is_watched_by_dynamo())
            return gm(*inputs)

        return compiled

    def broken(x, seen):
        x = x + 1
        seen.append(compat_calls.is_watched_by_dynamo())
        return x * 2

    eager, between = [], []
    broken(torch.ones(1), eager)
    torch.compile(broken, backend=backend)(torch.ones(1), between)
    assert eager == [False] and between == [True] and inside and not any(inside)


@pytest.mark.parametrize("grad", [False, True])
def test_the_short_way_and_the_usual_one_agree(grad, monkeypatch):
    x = torch.randn(3, device=DEVICE, requires_grad=grad)
    usual = []
    kernel = compat_calls.below_autograd
    monkeypatch.setattr("vbcompile.kernels.quick_operator.below_autograd", lambda: usual.append(1) or kernel())
    y = twice(x)
    torch.testing.assert_close(y, x * 2)
    assert bool(usual) is not grad  # the short way enters it itself
    if grad:
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, torch.full_like(x, 2))
    with torch.no_grad():
        assert not twice(x).requires_grad


def test_tracing_and_transformations_go_the_usual_way():
    x = torch.randn(3, device=DEVICE)
    runs.clear()
    with FakeTensorMode() as mode:
        assert twice(mode.from_tensor(x)).shape == (3,)
    graph = torch.fx.experimental.proxy_tensor.make_fx(twice, tracing_mode="fake")(x).graph
    assert any(n.target is torch.ops.vblackwell_test.twice.default for n in graph.nodes)
    assert runs == []
    functional = torch.func.functionalize(twice)(x)
    torch.testing.assert_close(functional, x * 2)
    compiled = torch.compile(lambda t: twice(t) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x * 2 + 1)
    torch.library.opcheck(twice, (x,))
    torch.library.opcheck(twice, (x.clone().requires_grad_(),))


def test_hooks_of_a_tensor():
    tensor = torch.ones(2, requires_grad=True)
    assert not compat_calls.has_gradient_hooks(tensor)
    hook = tensor.register_hook(lambda gradient: gradient)
    assert compat_calls.has_gradient_hooks(tensor)
    hook.remove()
    assert not compat_calls.has_gradient_hooks(tensor)
