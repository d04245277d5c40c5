"""One training step on two processes under DDP, FSDP2 and tensor parallelism: vblackwell beside Inductor.

    python bench/distributed.py [--small] [--layers N] [--ways ddp fsdp2 tp] [--seconds 75]

Llama shape (hidden 2048, intermediate 8192, 32 query and 8 key heads, attention written out), bfloat16, 4 x 2048 tokens
for each replica (for both cards together under tensor parallelism). Both backends start from the same weights and must
reach the same loss and gradient norm. Each way under each backend is a launch of ``torchrun`` of its own: all compile
at the same time, and are measured one after the other. ``--small`` runs on CPU with gloo.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import write
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from turns import await_turn, hand_in, take_turns

BACKENDS = ("inductor", "vblackwell")
_LOSS_TOLERANCE, _NORM_TOLERANCE = 2e-3, 2e-2
_PLAN = {
    **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def build(small: bool, layers: int, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 256 if small else 2048
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000 if small else 32000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16)


def distribute(way: str, model: Any, mesh: DeviceMesh, backend: str) -> Callable[..., Any]:
    """The model as each way wants it compiled: DDP from outside, FSDP2 and tensor parallel layer by layer."""
    if way == "ddp":
        return torch.compile(DistributedDataParallel(model), backend=backend)
    for layer in model.model.layers:
        if way == "tp":
            parallelize_module(layer, mesh, _PLAN)
        else:
            fully_shard(layer, mesh=mesh)
        layer.compile(backend=backend)
    if way == "fsdp2":
        fully_shard(model, mesh=mesh)
    return model


def measure(way: str, backend: str, options: argparse.Namespace, device: torch.device, mesh: DeviceMesh) -> dict:
    model = build(options.small, options.layers, device)
    run = distribute(way, model, mesh, backend)
    generator = torch.Generator().manual_seed(0 if way == "tp" else dist.get_rank())
    shape = (4, 128 if options.small else 2048)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    loss = step().clone()
    if way != "tp":
        dist.all_reduce(loss, dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.SUM)
        loss = loss if device.type == "cuda" else loss / dist.get_world_size()
    norm = gradient_norm(model)
    step()
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the others need room, too
    await_turn(options.folder, f"{way} {backend}")
    step()
    times = []
    for _ in range(options.repeats):
        dist.barrier()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    tokens_each = tokens.numel() * (1 if way == "tp" else dist.get_world_size())
    milliseconds = statistics.median(times)
    return {
        "way": way, "backend": backend, "processes": dist.get_world_size(), "ms": round(milliseconds, 2),
        "tokens_per_s": round(1e3 * tokens_each / milliseconds), "loss": float(loss), "gradient_norm": norm,
    }  # fmt: skip


def gradient_norm(model: Any) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
    return round(float(torch.nn.utils.get_total_norm([g.float() for g in whole])), 4)


def differing(rows: list[dict]) -> list[str]:
    """Ways whose two backends do not agree."""
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        pair = [row for row in rows if row["way"] == way]
        near = lambda key, tolerance, pair=pair: all(
            abs(r[key] - pair[0][key]) <= tolerance * abs(pair[0][key]) for r in pair
        )
        if not (near("loss", _LOSS_TOLERANCE) and near("gradient_norm", _NORM_TOLERANCE)):
            found.append(way)
    return found


def work(options: argparse.Namespace) -> None:
    """One process of one launch."""
    kind = "cpu" if options.small else "cuda"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.small else "nccl")
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    way, backend = options.worker.split()
    row = measure(way, backend, options, device, mesh)
    if dist.get_rank() == 0:
        hand_in(options.folder, options.worker, row)
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny, on CPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--ways", nargs="+", default=["ddp", "fsdp2", "tp"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=900, help="time for everything")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return 0
    names = [f"{way} {backend}" for way in options.ways for backend in BACKENDS]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(options.processes), __file__, *(["--small"] if options.small else [])]
    command += ["--layers", str(options.layers), "--repeats", str(options.repeats)]
    file = "distributed_small" if options.small else "distributed"
    with tempfile.TemporaryDirectory() as folder:
        command += ["--folder", folder, "--worker"]
        rows = take_turns(command, names, options.seconds, Path(folder), lambda rows: write(file, rows))
    wrong = differing(rows)
    print(f"{len(rows)} of {len(names)} done; differing: {wrong or 'none'}")
    return int(bool(wrong) or len(rows) < len(names))


if __name__ == "__main__":
    sys.exit(main())
