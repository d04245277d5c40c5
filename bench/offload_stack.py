"""A stack of bfloat16 linear layers whose weights do not fit: the plain workload of the offload benchmarks."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from vbcompile.runtime import Streamer
from vbcompile.vgpu_check import check_plan
from vbcompile.vgpu_plan import Operator, Plan, Sweep, Tier, Weight
from vbcompile.vgpu_planner import plan_weights

ROWS = 16
_IN_A_ROW = 4


class Stack:
    """``depth`` square layers of ``width``, and the input of each step."""

    def __init__(self, depth: int, width: int, device: str) -> None:
        self.depth, self.width, self.device = depth, width, device
        self.layer_bytes = 2 * width * width
        generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(ROWS, width, generator=generator, device=device, dtype=torch.bfloat16)

    def fill(self, targets: Sequence[Tensor]) -> None:
        """Random weights of a scale that keeps activations near one, made on the device and copied out."""
        for number, target in enumerate(targets):
            generator = torch.Generator(self.device).manual_seed(number + 1)
            weight = torch.randn(
                self.width, self.width, generator=generator, device=self.device, dtype=torch.bfloat16
            ).div_(math.sqrt(self.width))
            target.copy_(weight.view(-1).view(torch.uint8))

    def apply(self, memory: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, memory.view(torch.bfloat16).view(self.width, self.width))

    def reference(self, sources: Sequence[Tensor]) -> Tensor:
        """Each layer's weight copied to the device in full, one after the other."""
        x = self.x
        for source in sources:
            x = self.apply(source.to(self.device), x)
        return x

    def sweep(self, operator_ns: int) -> Sweep:
        return Sweep(
            tuple(Weight(f"layer {index}", self.layer_bytes) for index in range(self.depth)),
            tuple(Operator(f"linear {index}", operator_ns, (index,)) for index in range(self.depth)),
            reserve=8 * ROWS * self.width,
        )

    def plan(self, budget: int, tiers: Sequence[Tier], operator_ns: int) -> Plan:
        plan = plan_weights(self.sweep(operator_ns), budget, tiers)
        check_plan(plan)
        return plan

    def step(self, streamer: Streamer, program: Sequence[tuple[str, int]]) -> Tensor:
        """One step as the plan's program says."""
        x = self.x
        streamer.step_begin()
        for action, target in program:
            if action == "wait":
                streamer.wait(target)
            elif action == "run":
                streamer.operator_begin(target)
                x = self.apply(streamer.view(target), x)
                streamer.operator_end(target)
            elif action == "release":
                streamer.release(target)
            else:
                streamer.prefetch(target)
        streamer.step_end()
        return x


def seconds_per_step(work: Callable[[], object], steps: int, warm: int = 2) -> float:
    """Mean over steps that follow one another without a pause."""
    for _ in range(warm):
        work()
    torch.accelerator.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        work()
    torch.accelerator.synchronize()
    return (time.perf_counter() - begin) / steps


def best_rate(copy: Callable[[], object], nbytes: int) -> float:
    """Bytes per second of large copies that follow one another, the best of a few tries."""
    times = []
    for _ in range(4):
        torch.accelerator.synchronize()
        begin = time.perf_counter()
        for _ in range(_IN_A_ROW):
            copy()
        torch.accelerator.synchronize()
        times.append(time.perf_counter() - begin)
    return _IN_A_ROW * nbytes / min(times)
