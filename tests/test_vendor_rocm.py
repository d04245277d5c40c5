"""A simulated AMD machine: the backend from end to end, by gfx942's choices, our kernels in Triton's interpreter.

Tensors lie on the processor; nothing here speaks of AMD's compiler or a card: see ``test_attention_aot.py`` and
``test_fp4_aot.py``.
"""

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import decoded_twin
from torch import nn

from vbcompile import device_target
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels.registry import force
from vbcompile.kernels.triton_target import interpreted

simulated = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter, in a process of its own")


class Block(nn.Module):
    """Causal attention with four heads and a feed-forward part, both with residuals."""

    def __init__(self):
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(128, 384, bias=False), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x):
        length = x.shape[1]
        q, k, v = (t.unflatten(2, (4, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.transpose(-1, -2) / 32**0.5).masked_fill(later, float("-inf")).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x)))


@pytest.fixture
def gfx942(monkeypatch):
    monkeypatch.setattr(device_target, "_read_target", lambda kind, index: catalog_target("gfx942"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    with force(fp4_quantize="reference"):  # interpreted, the search for scales takes a minute
        yield


def compiled(model, mode):
    options = {"mode": mode, "mixed_precision": False, "downstream": "aot_eager", "strict": True}
    return torch.compile(model, backend="vblackwell", options=options)


def ran(reports):
    return [(d.pass_name, d.action) for r in reports for d in r.decisions if d.pass_name in ("attention", "fp4")]


@simulated
def test_inference_with_fp4_weights(gfx942, reports):
    model, x = Block().half().requires_grad_(False), torch.randn(1, 16, 128).half()
    twin = decoded_twin(model, "qkv.weight", "up.weight", "down.weight")
    exact = twin.double()(x.double())
    with torch.no_grad():
        got = compiled(model, "speed")(x)
    assert ran(reports) == [("attention", "rewritten")] + 3 * [("fp4", "rewritten")]
    theirs = (twin.half()(x).double() - exact).norm()
    assert (got.double() - exact).norm() <= 2 * theirs


@simulated
def test_training(gfx942, reports):
    model, x = Block().half(), torch.randn(1, 16, 128).half()
    grad = torch.randn(1, 16, 128).half()
    found = {}
    for name, run in (("ours", compiled(model, "balanced")), ("theirs", model), ("exact", Block().double())):
        if name == "exact":
            run.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
        dtype = next(run.parameters()).dtype
        run.zero_grad()
        run(x.to(dtype)).backward(grad.to(dtype))
        found[name] = [p.grad.double() for p in run.parameters()]
    assert ran(reports)[0] == ("attention", "rewritten")
    for ours, theirs, exact in zip(found["ours"], found["theirs"], found["exact"], strict=True):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.skipif(interpreted(), reason="starts the interpreter")
def test_on_a_simulated_machine(interpreting_python):
    done = interpreting_python.run(["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__])
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-4000:]
