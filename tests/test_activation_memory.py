"""The plan against the code that Inductor makes of it: what that code allocates stays within what was planned.

Kernels are left out, so that nothing is compiled; memory is allocated and freed as always.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vbcompile.passes import activation_partition
from vbcompile.passes.activation_plan import Rates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
WIDTH, ROWS, WORDS = 64, 2048, 512


class Allocations:
    """Bytes of the buffers of generated code that are alive, and the most at once."""

    def __init__(self):
        self.live = self.peak = 0

    def empty(self, size, stride, dtype):
        made = torch.empty_strided(size, stride, dtype=dtype)
        nbytes = made.untyped_storage().nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(made.untyped_storage(), self.free, nbytes)
        return made

    def free(self, nbytes):
        self.live -= nbytes


@pytest.fixture
def allocations(monkeypatch, cpp_kernels):
    from torch._C._dynamo import guards
    from torch._inductor.async_compile import AsyncCompile

    found = Allocations()
    monkeypatch.setattr(guards, "_empty_strided_cpu", found.empty)
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *arguments: None)
    rates = Rates(10**12, 10**11, 10**10, 10**10, 2**40)
    monkeypatch.setattr(activation_partition, "measured_rates", lambda device: rates)
    return found


class Gated(nn.Module):
    """Gated feed-forward layers and a loss."""

    def __init__(self, layers=2):
        super().__init__()
        linear = lambda a, b: nn.ModuleList(nn.Linear(a, b, bias=False) for _ in range(layers))
        self.gate, self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x, labels):
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            y = F.rms_norm(x, (WIDTH,))
            x = x + down(F.silu(gate(y)) * up(y))
        return F.cross_entropy(self.head(x), labels)


def test_generated_code_allocates_no_more_than_was_planned(allocations, reports):
    model = Gated()
    x, labels = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randint(WORDS, (ROWS,))
    options = {"mode": "memory", "offload": True, "mixed_precision": False, "strict": True, "budget": "16MB"}
    with torch._inductor.config.patch(force_disable_caches=True):
        run = torch.compile(model, backend="vblackwell", options=options)
        before = allocations.live
        run(x, labels).backward()
    (plan,) = [d.details["peak_bytes"] for d in reports[-1].decisions if "peak_bytes" in d.details]
    taken = allocations.peak - before + sum(t.nbytes for t in (*model.parameters(), x, labels))
    print(taken, plan)
    assert 0.8 * plan <= taken <= plan <= 16e6
