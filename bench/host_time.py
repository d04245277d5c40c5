"""What a call costs the host without CUDA graphs: attention and FP4 layers, beside PyTorch's and Inductor's own.

    python bench/host_time.py [--quick]

Calls are issued faster than a device could run them, 50 at a time, and timed until the last has been issued, not until
it has run; sizes are small, so that the device is never what is waited for. Ways of one row take turns; medians, in
microseconds. ``operator``: the operator alone, or that and its backward, called from Python. ``compiled``: a module of
that operator alone under ``torch.compile``, guards and wrappers included.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record

import vbcompile  # noqa: F401 - registers the backend
from vbcompile.kernels.attention import attention, attention_backward
from vbcompile.kernels.score_function import Builder, ScoreFunction

CALLS, ROUNDS, CAP = 50, 15, 30.0
SHAPES = {"decode": (1, 8, 1, 512, 64), "prefill": (1, 8, 256, 256, 128)}


def function(causal: bool, cap: bool) -> str:
    """The score function of the operator's rows."""
    b = Builder()
    logits = b.emit("score")
    if cap:
        limit = b.emit("const", CAP)
        logits = b.emit("mul", b.emit("tanh", b.emit("div", logits, limit)), limit)
    mask = b.emit("ge", b.emit("q_index"), b.emit("k_index")) if causal else None
    return ScoreFunction(b.program, logits, mask).dumps()


class Written(nn.Module):
    """Attention as models write it."""

    def __init__(self, causal: bool, cap: bool) -> None:
        super().__init__()
        self.causal, self.cap = causal, cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.cap:
            scores = CAP * torch.tanh(scores / CAP)
        if self.causal:
            rows = torch.arange(q.shape[-2], device=q.device)[:, None]
            scores = scores.masked_fill(rows < torch.arange(k.shape[-2], device=q.device), -torch.inf)
        return torch.softmax(scores, -1) @ v


class Fused(nn.Module):
    """The same by PyTorch's own operator, where that has it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


def timed(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median microseconds of a call of each way on the host."""
    for call in ways.values():
        for _ in range(10):
            call()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            found[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    torch.cuda.synchronize()
    return {name: round(statistics.median(times), 1) for name, times in found.items()}


def compiled(module: nn.Module, backend: str, **options: Any) -> Callable[..., Any]:
    """The module under a backend of its own, fresh."""
    return torch.compile(module, backend=backend, options=options or None)


def attention_ways(shape: str, causal: bool, cap: bool) -> dict[str, Callable[[], Any]]:
    batch, heads, rows, keys, dim = SHAPES[shape]
    q, k, v = (torch.randn(batch, heads, n, dim, device="cuda", dtype=torch.bfloat16) for n in (rows, keys, keys))
    text, scale = function(causal, cap), dim**-0.5
    ours, theirs = compiled(Written(causal, cap), "vblackwell"), Written(causal, cap) if cap else Fused(causal)
    eager, inductor = Fused(causal), compiled(theirs, "inductor")
    return {
        "operator": lambda: attention(q, k, v, [], scale, 0.0, None, text),
        "pytorch": lambda: eager(q, k, v),
        "compiled": lambda: ours(q, k, v),
        "inductor": lambda: inductor(q, k, v),
    }


def training_ways(causal: bool, cap: bool) -> dict[str, Callable[[], Any]]:
    batch, heads, rows, keys, dim = SHAPES["prefill"]
    leaves = [
        torch.randn(batch, heads, n, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (rows, keys, keys)
    ]
    upstream = torch.randn_like(leaves[0])

    def step(module: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(module(*leaves), leaves, upstream)

    text, scale, needs = function(causal, cap), dim**-0.5, [True] * 3

    @torch.no_grad()
    def operators() -> Any:
        out, lse = attention(*leaves, [], scale, 0.0, None, text)
        return attention_backward(upstream, None, *leaves, [], out, lse, scale, 0.0, None, text, needs)

    inductor = compiled(Written(causal, cap) if cap else Fused(causal), "inductor")
    return {
        "operator": operators,
        "compiled": step(compiled(Written(causal, cap), "vblackwell")),
        "pytorch": step(Fused(causal)),
        "inductor": step(inductor),
    }


def linear_ways(rows: int) -> dict[str, Callable[[], Any]]:
    layer = nn.Linear(2048, 2048, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    inductor, ours = compiled(layer, "inductor"), compiled(layer, "vblackwell", mode="speed")
    return {"pytorch": lambda: layer(x), "inductor": lambda: inductor(x), "compiled": lambda: ours(x)}


def rows() -> list[tuple[str, bool, Callable[[], dict[str, Callable[[], Any]]]]]:
    """``(name, whether gradients are taken, its ways)``."""
    return [
        ("attention, decode", False, lambda: attention_ways("decode", False, False)),
        ("attention, prefill", False, lambda: attention_ways("prefill", False, False)),
        ("attention, prefill, causal, softcap", False, lambda: attention_ways("prefill", True, True)),
        ("attention, forward and backward", True, lambda: training_ways(False, False)),
        ("attention, forward and backward, causal, softcap", True, lambda: training_ways(True, True)),
        ("FP4 linear, 1 row", False, lambda: linear_ways(1)),
        ("FP4 linear, 256 rows", False, lambda: linear_ways(256)),
        ("attention, prefill, causal", False, lambda: attention_ways("prefill", True, False)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds; compiles what a full run needs")
    arguments = parser.parse_args()
    found = []
    for name, training, make in rows():
        torch._dynamo.reset()
        torch.manual_seed(0)
        with torch.set_grad_enabled(training):
            row = {"case": name, **timed(make(), 2 if arguments.quick else ROUNDS)}
        print(row, flush=True)
        found.append(row)
        if not arguments.quick:
            record.write("host_time", found)  # after each row, for runs that are cut


if __name__ == "__main__":
    main()
