"""Repeated launches pass on what Triton's own pass on, byte for byte; a stub stands for NVIDIA's driver."""

import contextlib
import shutil

import pytest
import torch

from tests.stub_driver import compare_repeats, stub_driver
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import attention as logical
from vbcompile.kernels import (
    attention_hopper,
    attention_hopper_few,
    attention_hopper_gradients,
    attention_problem,
    attention_triton,
    registry,
    replay,
)
from vbcompile.kernels.compiled_calls import TENSOR, place_of_call
from vbcompile.kernels.score_function import Builder, ScoreFunction

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or torch.cuda.is_available(), reason="the stub is written in C and replaces the driver"
)

_BUILDER = Builder()
_SCORE = _BUILDER.emit("score")
_CAUSAL = _BUILDER.emit("ge", _BUILDER.emit("q_index"), _BUILDER.emit("k_index"))
_BIASED = _BUILDER.emit("add", _SCORE, _BUILDER.emit("captured", 0))
PLAIN = ScoreFunction()
CAUSAL = ScoreFunction(_BUILDER.program, _SCORE, _CAUSAL, rows_first=True)
BIASED = ScoreFunction(_BUILDER.program, _BIASED, _CAUSAL)


@pytest.fixture
def stub(monkeypatch):
    """CPU tensors are taken for those of an H200 whose driver is the stub."""
    target = catalog_target("sm_90")
    monkeypatch.setattr(logical, "get_target", lambda device: target)
    monkeypatch.setattr(attention_problem, "arch_of", lambda t: "sm_90")
    for module in (attention_hopper_few, attention_triton):
        monkeypatch.setattr(module, "get_target", lambda device: target)
    for module in (attention_hopper, attention_hopper_gradients):
        monkeypatch.setattr(module, "refuses", lambda *call: None)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("attention", "attention_backward"):
        registry.operator(name).load()
    with stub_driver(monkeypatch) as stub:
        yield stub


@pytest.fixture
def compared(stub, monkeypatch):
    return compare_repeats(stub, monkeypatch)


def inputs(q_length, k_length, dim, rows_first):
    def tensor(length):
        return torch.randn(1, length, 4, dim).transpose(1, 2) if rows_first else torch.randn(1, 4, length, dim)

    return [tensor(n).to(torch.bfloat16) for n in (q_length, k_length, k_length)]


@pytest.mark.parametrize(
    ("kernel", "function", "q_length", "k_length", "expected"),
    [
        ("triton", PLAIN, 1, 512, 2),
        ("triton", BIASED, 1, 512, 2),
        ("triton", BIASED, 100, 100, 4),
        ("hopper", CAUSAL, 200, 200, 4),
    ],
)
def test_parameters_are_those_of_tritons_own_launch(compared, kernel, function, q_length, k_length, expected):
    for _ in range(4):
        q, k, v = inputs(q_length, k_length, 64, function.rows_first)
        captured = [torch.randn(1, 1, q_length, k_length)] if function is BIASED else []
        grads = [t.requires_grad_() for t in (q, k, v)] if q_length > 1 else []
        with registry.force(attention=kernel, attention_backward=kernel):
            out, _ = logical.attention(q, k, v, captured, 0.125, 0.0, None, function.dumps())
            if grads:
                torch.autograd.grad(out, grads, torch.randn_like(out))
    assert compared[0] == 2 * expected
    tensors = [TENSOR] * len(captured)
    text, before = function.dumps(), compared[0]
    forward = place_of_call("attention", (*[TENSOR] * 3, tensors, 0.125, 0.0, None, text), {})
    needs = [True] * 3 + [False] * len(captured)
    backward = (TENSOR, None, *[TENSOR] * 3, tensors, *[TENSOR] * 2, 0.125, 0.0, None, text, needs)
    backward = place_of_call("attention_backward", backward, {})
    with registry.force(attention=kernel, attention_backward=kernel), torch.no_grad():
        for _ in range(4):
            given = [*(torch.empty_like(t).copy_(t) for t in (q, k, v)), *captured]
            out, lse = forward(*given)
            if grads:
                assert len(backward(torch.randn_like(out), *given, out, lse)) == len(given)
    assert compared[0] - before >= 3 * expected  # those that were not recorded before are twice


def test_buffers_lie_together(stub):
    q, k, v = inputs(1, 512, 64, False)
    with registry.force(attention="triton"):
        for _ in range(3):
            logical.attention(q, k, v, [], 0.125, 0.0, None, PLAIN.dumps())
    (recording,) = [r for r in replay._known.values() if isinstance(r, replay.Recording)]
    together, *_ = recording._steps
    assert len(together.parts) == 2 and all(start % 512 == 0 for _, start in together.parts)
    launched = stub.launches
    logical.attention(q, k, v, [], 0.125, 0.0, None, PLAIN.dumps())
    assert stub.launches == launched + 2
    out, lse = recording.as_function([0, 1, 2], pytest.fail)(q, k, v)
    assert stub.launches == launched + 4 and out.shape == q.shape and lse.shape == q.shape[:-1]


def test_profilers_hear_of_repeated_launches(stub):
    from triton import knobs

    heard = []

    def hook(metadata):
        heard.append(metadata.get()["name"])

    q, k, v = inputs(1, 512, 64, False)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        with registry.force(attention="triton"):
            for _ in range(3):
                logical.attention(q, k, v, [], 0.125, 0.0, None, PLAIN.dumps())
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert heard == 3 * ["attention_hopper_decode_kernel", "attention_merge_kernel"]
