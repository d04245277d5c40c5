"""The attention pass alone on a function that Dynamo captured: what it decided, and whether results stay the same."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.debugging import aot_eager

from vbcompile.config import Config
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.passes.attention import fuse_attention
from vbcompile.passes.pass_context import PassContext
from vbcompile.report import Decision

CPU = PassContext(Config(downstream="eager"), catalog_target("cpu"), training=False)
OP = torch.ops.vblackwell.attention.default
CAUSAL = (("score",), ("k_index",), ("q_index",), ("le", 1, 2))


@dataclass
class Run:
    """What the pass did while a function was compiled."""

    decisions: list[Decision] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)

    @property
    def sites(self) -> int:
        return sum(d.action == "rewritten" for d in self.decisions)

    @property
    def reasons(self) -> list[str]:
        return [d.reason for d in self.decisions if d.action == "left"]

    def calls(self) -> list[fx.Node]:
        modules = [m for gm in self.graphs for m in gm.modules() if isinstance(m, fx.GraphModule)]
        return [n for m in modules for n in m.graph.nodes if n.target is OP]

    def function(self, place: int = 0) -> ScoreFunction:
        return ScoreFunction.loads(self.calls()[place].args[7])

    def captured(self, place: int = 0) -> list[list[int]]:
        return [list(n.meta["example_value"].shape) for n in self.calls()[place].args[3]]


def compiled(function: Any, *, capture_autograd: bool = False, **options: Any) -> tuple[Any, Run]:
    """The function under Dynamo and this pass alone; the rewritten graph runs eagerly."""
    torch._dynamo.reset()
    run = Run()

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        run.decisions += fuse_attention(gm, CPU)
        run.graphs.append(gm)
        again = fuse_attention(gm, CPU)
        assert not any(d.action == "rewritten" for d in again), "not idempotent"
        return aot_eager(gm, inputs) if capture_autograd else gm.forward

    return torch.compile(function, backend=backend, **options), run


def check(function: Any, *inputs: Any, sites: int = 1, **options: Any) -> Run:
    """Outputs and gradients equal eager's, and the number of sites is as wanted."""
    ours, run = compiled(function, **options)
    copies = [i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, torch.Tensor) else i for i in inputs]
    expected, got = function(*inputs), ours(*copies)
    expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-5, equal_nan=True)
        assert a.stride() == b.stride()
    differentiable = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
    if differentiable and expected[0].requires_grad:
        grad = torch.randn_like(expected[0])
        theirs = torch.autograd.grad(expected[0], differentiable, grad, allow_unused=True)
        mine = [c for c in copies if isinstance(c, torch.Tensor) and c.requires_grad]
        for a, b in zip(theirs, torch.autograd.grad(got[0], mine, grad, allow_unused=True), strict=True):
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert run.sites == sites, run.decisions
    return run


def qkv(batch: int = 2, heads: int = 4, q: int = 6, k: int = 7, d: int = 8, grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, n, d, requires_grad=grad) for n in (q, k, k)]


def attend(q, k, v, edit=lambda s: s):
    return torch.softmax(edit(q @ k.transpose(-1, -2) * 0.3), dim=-1) @ v
