"""A linear stack larger than its device budget, streamed: share of the link, peers, pinned bytes, disk, neighbour.

    python bench/offload_stream.py host [--gigabytes 4.2] [--budget 0.5]     from pinned host memory, beside peers
    python bench/offload_stream.py disk [--folder /tmp]                      from a file
    python bench/offload_stream.py neighbour                                 from a second card, and against host memory

The floor of a step is its streamed bytes at the link's bandwidth, measured in the same run with large copies. Peers
stream the same layers: a blocking copy from pageable memory per layer, Accelerate's ``cpu_offload``, Diffusers' group
offloading where it is installed, and three buffers handled by hand. Every result is compared bit for bit with that of
weights copied whole.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from offload_stack import Stack, best_rate, seconds_per_step
from torch import Tensor, nn

import record  # isort: skip
from vbcompile.runtime import Streamer
from vbcompile.runtime_device import AcceleratorDevice
from vbcompile.runtime_disk import BLOCK, OpenFiles, disk_bytes, read_bytes
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_sources import DiskBytes, HostBytes, PeerBytes, Source
from vbcompile.vgpu_plan import Plan, Tier
from vbcompile.vgpu_size import MIB

GB = 10**9
DEVICE = "cuda:0"
_LATENCY_NS = 10_000
_ROUNDS = 3
_LARGE = 1024 * MIB
_MODEL_BUDGET = "0.8GB"  # the ring, some layers, and what the compiler sets aside for libraries


# ----------------------------------------------------------------------------------------------------------------- ours
def streamed(
    stack: Stack,
    sources_of: Callable[[Plan], Sequence[Source]],
    budget: int,
    tiers: Sequence[Tier],
    steps: int,
    expected: Tensor,
    between: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """One row: a few steps of the stack, checked; with ``between``, the best of some rounds, and that in between."""
    device = AcceleratorDevice(DEVICE)
    plan = stack.plan(budget, tiers, operator_ns(stack))
    program, sources = list(plan.program()), sources_of(plan)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Streamer(plan, sources, device) as streamer:
        got = stack.step(streamer, program)
        assert torch.equal(got, expected), "the streamed result differs"
        seconds = seconds_per_step(lambda: stack.step(streamer, program), steps)
        for _ in range(_ROUNDS if between is not None else 0):
            between()  # type: ignore[misc]
            seconds = min(seconds, seconds_per_step(lambda: stack.step(streamer, program), steps, warm=1))
        alone = min(seconds_per_step(lambda: stack.step(streamer, program), 1, warm=0) for _ in range(3))
        got = stack.step(streamer, program)
        assert torch.equal(got, expected), "the streamed result differs after some steps"
        peak = torch.cuda.max_memory_allocated() - before
        found = streamer.statistics()
    return {
        "ms": seconds * 1e3,
        "ms_alone": alone * 1e3,
        "predicted_ms": plan.prediction.step_ns / 1e6,
        "streamed_bytes": plan.streamed_bytes,
        "link_bytes": dict(plan.prediction.link_bytes),
        "gbps": plan.streamed_bytes / seconds / 1e9,
        "peak_bytes": peak,
        "budget": budget,
        "ring_bytes": plan.ring_bytes,
        "resident_bytes": plan.resident_bytes,
        "misses": found["misses"],
        "late": found["late"],
        "wasted_bytes": found["wasted_bytes"],
    }


def operator_ns(stack: Stack) -> int:
    """Time of one layer with its weight on the device and not in cache."""
    weights = [torch.empty(stack.layer_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(3)]
    seconds = seconds_per_step(lambda: [stack.apply(weight, stack.x) for weight in weights], 5)
    return int(seconds / len(weights) * 1e9)


# ---------------------------------------------------------------------------------------------------------------- peers
def pageable(stack: Stack, hosts: Sequence[Tensor]) -> Callable[[], Tensor]:
    pages = [torch.empty_like(host, pin_memory=False).copy_(host) for host in hosts]
    return lambda: stack.reference(pages)


def _modules(stack: Stack, hosts: Sequence[Tensor]) -> nn.Sequential:
    layers = []
    for host in hosts:
        layer = nn.Linear(stack.width, stack.width, bias=False, device="meta")
        layer.weight = nn.Parameter(host.view(torch.bfloat16).view(stack.width, stack.width), requires_grad=False)
        layers.append(layer)
    return nn.Sequential(*layers)


def accelerate_offload(stack: Stack, hosts: Sequence[Tensor]) -> Callable[[], Tensor]:
    from accelerate import cpu_offload

    pages = [torch.empty_like(host, pin_memory=False).copy_(host) for host in hosts]
    model = _modules(stack, pages)
    cpu_offload(model, execution_device=torch.device(DEVICE))
    return lambda: model(stack.x)


def diffusers_offload(stack: Stack, hosts: Sequence[Tensor]) -> Callable[[], Tensor]:
    from diffusers.hooks import apply_group_offloading

    model = nn.ModuleDict({"layers": nn.ModuleList(_modules(stack, hosts))})
    apply_group_offloading(
        model,
        onload_device=torch.device(DEVICE),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        non_blocking=True,
    )

    def run() -> Tensor:
        x = stack.x
        for layer in model["layers"]:  # type: ignore[union-attr]
            x = layer(x)
        return x

    return run


def three_buffers(stack: Stack, hosts: Sequence[Tensor]) -> Callable[[], Tensor]:
    buffers = [torch.empty(stack.layer_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(3)]
    link = torch.cuda.Stream()
    free: list[torch.cuda.Event | None] = [None] * 3

    def run() -> Tensor:
        x, ready = stack.x, []
        for index in range(len(hosts) + 2):
            if index < len(hosts):
                with torch.cuda.stream(link):
                    if free[index % 3] is not None:
                        link.wait_event(free[index % 3])
                    buffers[index % 3].copy_(hosts[index], non_blocking=True)
                    ready.append(link.record_event())
            if index >= 2:
                torch.cuda.current_stream().wait_event(ready[index - 2])
                x = stack.apply(buffers[(index - 2) % 3], x)
                free[(index - 2) % 3] = torch.cuda.current_stream().record_event()
        return x

    return run


_PEERS = {
    "blocking copy of pageable memory per layer": (pageable, 1),
    "accelerate.cpu_offload": (accelerate_offload, 1),
    "diffusers block-level group offload": (diffusers_offload, 4),
    "three buffers by hand": (three_buffers, 8),
}


def peers(stack: Stack, hosts: Sequence[Tensor], link: float, expected: Tensor) -> list[dict[str, Any]]:
    rows = []
    floor = stack.depth * stack.layer_bytes / link
    for name, (make, steps) in _PEERS.items():
        try:
            run = make(stack, hosts)
        except ImportError as error:
            print(f"{name}: not installed ({error})", flush=True)
            continue
        with torch.no_grad():
            assert torch.equal(run(), expected), f"{name}: the result differs"
            seconds = seconds_per_step(run, steps, warm=1)
        rows.append({"what": name, "ms": seconds * 1e3, "share": floor / seconds})
        del run
    return rows


# ------------------------------------------------------------------------------------------------------------- commands
def host(gigabytes: float, budget: float, width: int, with_peers: bool) -> list[dict[str, Any]]:
    stack = Stack(max(int(gigabytes * GB / (2 * width * width)), 1), width, DEVICE)
    memory = HostMemory(torch.device(DEVICE))
    start = time.perf_counter()
    hosts = memory.allocate([stack.layer_bytes] * stack.depth)
    pinning = time.perf_counter() - start
    stack.fill(hosts)
    link = host_link(memory)
    expected = stack.reference(hosts)
    tier = Tier(1, "cpu", 10**12, int(link), latency_ns=_LATENCY_NS)
    sources = [HostBytes(part) for part in hosts]
    row = streamed(stack, lambda _: sources, int(budget * GB), [tier], 8, expected)
    floor = row["streamed_bytes"] / link
    row |= {
        "what": f"vbcompile, {stack.depth} layers of {width}",
        "share": floor / (row["ms"] / 1e3),
        "share_alone": floor / (row["ms_alone"] / 1e3),
        "link_gbps": link / 1e9,
        "pinned_per_streamed_byte": memory.use.pinned / memory.use.payload,
        "pageable_bytes": memory.use.pageable,
        "pinning_seconds": pinning,
    }
    return [row, *(peers(stack, hosts, link, expected) if with_peers else [])]


def host_link(memory: HostMemory) -> float:
    """Bytes per second of large copies from pinned host memory."""
    return link_rate(*memory.allocate([_LARGE]))


def link_rate(source: Tensor) -> float:
    """Bytes per second of large copies to the device."""
    target = torch.empty(_LARGE, dtype=torch.uint8, device=DEVICE)
    return best_rate(lambda: target.copy_(source[:_LARGE], non_blocking=True), _LARGE)


def disk(folder: str, gigabytes: float, width: int) -> list[dict[str, Any]]:
    stack = Stack(max(int(gigabytes * GB / (2 * width * width)), 3), width, DEVICE)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = Path(place) / "weights"
        hosts = [torch.empty(stack.layer_bytes, dtype=torch.uint8) for _ in range(stack.depth)]
        stack.fill(hosts)
        with file.open("wb") as stream:
            for part in hosts:
                stream.write(part.numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        expected = stack.reference(hosts)
        del hosts
        sources = [disk_bytes(file, index * stack.layer_bytes, stack.layer_bytes) for index in range(stack.depth)]
        plain: dict[int, float] = {}

        def read_plainly() -> None:
            for threads in (1, 4, 8):
                plain[threads] = max(plain.get(threads, 0.0), plain_read(file, threads))

        read_plainly()
        tiers = [
            Tier(1, "cpu", 4 * (stack.layer_bytes + 2 * BLOCK), 50 * GB, latency_ns=_LATENCY_NS),
            Tier(2, "ssd", 10**12, int(max(plain.values())), latency_ns=100_000, via=1),
        ]
        row = streamed(
            stack, lambda plan: _by_level(plan, sources), 4 * stack.layer_bytes, tiers, 2, expected, read_plainly
        )
    row["disk_gbps"] = row["link_bytes"][2] / row["ms"] / 1e6
    row |= {"what": "disk", "plain_gbps": {threads: rate / 1e9 for threads, rate in plain.items()}}
    return [row | {"share": row["disk_gbps"] * 1e9 / max(plain.values())}]


def _by_level(plan: Plan, sources: Sequence[DiskBytes]) -> list[Source]:
    """What the plan keeps in host memory is read there; the rest stays in the file."""
    kept = {index for index, level in enumerate(plan.levels) if level and plan.tier(level).via is None}
    return [HostBytes(read_bytes(source)) if index in kept else source for index, source in enumerate(sources)]


def plain_read(file: Path, threads: int) -> float:
    """Bytes per second of reading a file from front to back past the page cache, a piece per thread at a time."""
    nbytes, piece = file.stat().st_size, 8 * MIB
    files = OpenFiles()
    source = disk_bytes(file, 0, nbytes)
    buffers = [aligned(piece) for _ in range(threads)]

    def read(part: int) -> None:
        for begin in range(part * piece, nbytes, threads * piece):
            files.read(source, begin, buffers[part], min(piece, nbytes - begin))

    workers = [threading.Thread(target=read, args=(part,)) for part in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - begin
    assert files.is_direct(file), "the file system refuses unbuffered reads"
    files.close()
    return nbytes / seconds


def aligned(nbytes: int) -> Tensor:
    (memory,) = HostMemory(torch.device("cpu")).allocate([nbytes], alignment=BLOCK)
    return memory


def neighbour(gigabytes: float, budget: float, width: int) -> list[dict[str, Any]]:
    stack = Stack(max(int(gigabytes * GB / (2 * width * width)), 1), width, DEVICE)
    memory = HostMemory(torch.device(DEVICE))
    hosts = memory.allocate([stack.layer_bytes] * stack.depth)
    stack.fill(hosts)
    expected = stack.reference(hosts)
    far = torch.empty(stack.depth * stack.layer_bytes, dtype=torch.uint8, device="cuda:1")
    peers = list(far.split(stack.layer_bytes))
    for part, source in zip(peers, hosts, strict=True):
        part.copy_(source)
    peer_link, link = link_rate(far), host_link(memory)
    rows = []
    for name, rate, sources in (
        ("host", link, [HostBytes(part) for part in hosts]),
        ("neighbour", peer_link, [PeerBytes(part) for part in peers]),
    ):
        tier = Tier(1, "cpu" if name == "host" else "cuda:1", 10**12, int(rate), latency_ns=_LATENCY_NS)
        row = streamed(stack, lambda _, sources=sources: sources, int(budget * GB), [tier], 10, expected)
        floor = row["streamed_bytes"] / rate
        rows.append(
            {"what": name, "layers": stack.depth, "width": width, "link_gbps": rate / 1e9}
            | row
            | {"share": floor / (row["ms"] / 1e3)}
        )
    rows[1]["speed_over_host"] = rows[0]["ms"] / rows[1]["ms"]
    del far, peers
    torch.accelerator.empty_cache()
    return [*rows, *compiled_models(stack, hosts, expected)]


def compiled_models(stack: Stack, hosts: Sequence[Tensor], expected: Tensor) -> list[dict[str, Any]]:
    """The same stack as a model under ``torch.compile``: what its weights do where a second card may take them."""
    import vbcompile

    rows: list[dict[str, Any]] = []
    for name, more in (("model, host", {}), ("model, neighbour", {1: "16GB"})):
        memory = {0: _MODEL_BUDGET, "cpu": "64GB"} | more
        model = vbcompile.offload(_modules(stack, hosts), device=DEVICE, max_memory=memory)
        run = torch.compile(model, backend="vblackwell", options={"mode": "memory"})
        got = run(stack.x)
        assert torch.allclose(got, expected, rtol=0.05, atol=0.05), f"{name}: the result differs"
        seconds = seconds_per_step(lambda run=run: run(stack.x), 8)  # type: ignore[misc]
        found = vbcompile.stats(model)[0]
        assert found.planned_bytes and not found.declined, f"{name}: nothing is streamed"
        rows.append(
            {"what": name, "ms": seconds * 1e3, "predicted_ms": found.predicted_ns / 1e6}
            | {"streamed_bytes": found.planned_bytes, "links": found.runtime["links"]}
        )
        vbcompile.materialize(model)
        torch._dynamo.reset()
    rows[1]["speed_over_host"] = rows[0]["ms"] / rows[1]["ms"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["host", "disk", "neighbour"])
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--budget", type=float, default=0.5, help="GB on the device")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    with torch.no_grad():
        match options.what:
            case "host":
                rows = host(options.gigabytes, options.budget, options.width, not options.no_peers)
            case "disk":
                rows = disk(options.folder, options.gigabytes, options.width)
            case _:
                rows = neighbour(options.gigabytes, options.budget, options.width)
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    record.write(f"offload_{options.what}", rows)


if __name__ == "__main__":
    main()
