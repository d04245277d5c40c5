"""Small models for the offload runtime: random bytes, a plan, and steps that check every byte that is read."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from vbcompile.runtime import Streamer
from vbcompile.runtime_device import MemoryDevice
from vbcompile.runtime_disk import safetensors_contents
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_sources import HostBytes, PeerBytes, Source
from vbcompile.vgpu_check import check_plan
from vbcompile.vgpu_plan import Operator, Plan, Sweep, Tier, Weight
from vbcompile.vgpu_planner import plan_weights, smallest_budget

HOST = Tier(1, "cpu", 10**12, 10**10)
PEER = Tier(1, "neighbour", 10**12, 10**11)
DISK = Tier(2, "ssd", 10**12, 10**9, via=1)


def sweep_of(sizes: Sequence[int], uses: Sequence[Iterable[int]] | None = None) -> Sweep:
    """One operator per weight, or the given uses; 50 microseconds each."""
    uses = [(index,) for index in range(len(sizes))] if uses is None else uses
    return Sweep(
        tuple(Weight(f"weight {index}", size) for index, size in enumerate(sizes)),
        tuple(Operator(f"operator {index}", 50_000, tuple(read)) for index, read in enumerate(uses)),
    )


def random_bytes(sizes: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


def random_case(seed: int) -> tuple[Sweep, int]:
    """A sweep of odd sizes in which some weights are used again, and a budget that does not hold it."""
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 60_000) for _ in range(rng.randrange(4, 12))]
    order = [*range(len(sizes)), *rng.sample(range(len(sizes)), 2)]
    uses = [(index,) if rng.random() < 0.8 else tuple({index, rng.randrange(len(sizes))}) for index in order]
    sweep = sweep_of(sizes, uses)
    least = smallest_budget(sweep, (HOST,))
    return sweep, least + int((sum(sizes) - least) * rng.uniform(0, 0.9))


def planned(sweep: Sweep, budget: int, tiers: Sequence[Tier] = (HOST,)) -> Plan:
    plan = plan_weights(sweep, budget, tiers)
    check_plan(plan)
    assert not plan.declined, "the case is meant to stream"
    return plan


def sources_of(
    plan: Plan, data: Sequence[Tensor], device: torch.device, folder: Path | None = None, peer: str = "cpu"
) -> list[Source]:
    """Each weight where the plan wants it: pinned host memory, a neighbour, or a safetensors file."""
    hosts = HostMemory(device).allocate([tensor.numel() for tensor in data])
    for host, tensor in zip(hosts, data, strict=True):
        host.copy_(tensor)
    found: list[Source] = [HostBytes(host) for host in hosts]
    on_disk = [index for index, level in enumerate(plan.levels) if level and plan.tier(level).via is not None]
    if on_disk:
        assert folder is not None
        file = folder / "weights.safetensors"
        safetensors.torch.save_file({str(index): data[index] for index in on_disk}, file)
        contents, _ = safetensors_contents(file)
        for index in on_disk:
            found[index] = contents[str(index)].source
    for index, level in enumerate(plan.levels):
        if level and plan.tier(level).name == PEER.name:
            found[index] = PeerBytes(data[index].to(peer))
    return found


def small_host(nbytes: int) -> Tier:
    return Tier(1, "cpu", nbytes, HOST.read_rate)


def streamer_of(
    device: MemoryDevice, sizes: Sequence[int], budget: int, tiers: Sequence[Tier] = (HOST,), folder=None, **options
) -> tuple[Streamer, list[Tensor]]:
    """A streamer of random weights, each used once a step, and their bytes."""
    plan = planned(sweep_of(sizes), budget, tiers)
    assert bool(plan.reads) == (DISK in tiers)
    data = random_bytes(sizes)
    return Streamer(plan, sources_of(plan, data, device.device, folder), device, **options), data


def run_step(streamer: Streamer, data: Sequence[Tensor], *, seen: list[Tensor] | None = None) -> None:
    """One step of the plan's program; each operator's weights are compared, on the device, with what they should be."""
    plan = streamer.plan
    with streamer.step():
        for action, target in plan.program():
            if action == "wait":
                streamer.wait(target)
            elif action == "release":
                streamer.release(target)
            elif action == "prefetch":
                streamer.prefetch(target)
            else:
                _run(streamer, target, data, seen)


def run_steps(streamer: Streamer, data: Sequence[Tensor], steps: int = 3) -> None:
    """Steps in which the host runs ahead; every byte read is compared at the end."""
    seen: list[Tensor] = []
    for _ in range(steps):
        run_step(streamer, data, seen=seen)
    check_seen(streamer, data, seen)


def _run(streamer: Streamer, operator: int, data: Sequence[Tensor], seen: list[Tensor] | None) -> None:
    streamer.operator_begin(operator)
    for weight in streamer.plan.sweep.operators[operator].weights:
        view = streamer.view(weight)
        if seen is None:
            assert torch.equal(view.cpu(), data[weight]), f"operator {operator} reads a wrong weight {weight}"
        else:
            seen.append(view.clone())  # queued, so that the host runs ahead
    streamer.operator_end(operator)


def check_seen(streamer: Streamer, data: Sequence[Tensor], seen: Sequence[Tensor]) -> None:
    order = [weight for operator in streamer.plan.sweep.operators for weight in operator.weights]
    assert len(seen) % len(order) == 0
    for number, tensor in enumerate(seen):
        weight = order[number % len(order)]
        assert torch.equal(tensor.cpu(), data[weight]), f"use {number} reads a wrong weight {weight}"
