"""Whole models larger than their device budget: decode steps of Llama shapes with random weights.

    python bench/offload_model.py [--layers 32] [--figures streamed full fits fp4] ...

A row gives the step time of a model whose weights are streamed by the plan, its share of the roofline (the bytes that
the plan streams, at the link's bandwidth measured in the same run, or computation), what the plan predicted, and the
device memory at the peak. ``everything`` streams every weight in every step, as group offloading does.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402

import vbcompile  # noqa: E402
from vbcompile.handles_model import offloaded_tensors  # noqa: E402
from vbcompile.handles_store import WeightStore  # noqa: E402

GIB = 1 << 30
SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "vocab_size": 128256},
}


def llama(shape: str, layers: int) -> nn.Module:
    """A Llama with memory that nothing has written to yet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape], num_hidden_layers=layers, num_key_value_heads=8, dtype=torch.bfloat16, use_cache=False
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(torch.empty_like(tensor, device="cpu"), False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def randomize(model: nn.Module, device: str) -> None:
    """Weights that keep activations near one, made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    for handle in offloaded_tensors(model).values():
        scale = handle.shape[-1] ** -0.5
        value = torch.randn(handle.shape, device=device, dtype=handle.dtype, generator=generator).mul_(scale)
        handle.payload.shaped(handle.payload.source.memory).copy_(value)
    for parameter in model.parameters():
        if not isinstance(parameter, vbcompile.OffloadedTensor):
            nn.init.ones_(parameter)


def seconds(function: Callable[[], Any], repeat: int) -> float:
    """Best of some steps, in a row without waiting between them, per step."""
    function()
    torch.cuda.synchronize()
    found = []
    for _ in range(2):
        begin = time.perf_counter()
        for _ in range(repeat):
            function()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / repeat)
    return min(found)


def link_rate(nbytes: int = GIB) -> float:
    """Bytes per second from pinned host memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    return nbytes / seconds(lambda: target.copy_(source, non_blocking=True), 2)


def store_of(model: nn.Module) -> WeightStore:
    found = next(iter(offloaded_tensors(model).values())).payload.residence
    assert isinstance(found, WeightStore)
    return found


def run(model: nn.Module, tokens: Tensor, mode: str, steps: int) -> tuple[dict[str, Any], Tensor]:
    """Compile, check, and time one step."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    compiled = torch.compile(model, backend="vblackwell", options={"mode": mode, "strict": True}, dynamic=False)
    begin = time.perf_counter()
    with torch.no_grad():
        logits = compiled(tokens).logits.clone()
        torch.cuda.synchronize()
        compile_seconds = time.perf_counter() - begin
        host_begin = time.perf_counter()
        compiled(tokens)
        host = time.perf_counter() - host_begin
        took = seconds(lambda: compiled(tokens), steps)
    store = store_of(model)
    plan = store.plan
    assert plan is not None
    row = {
        "ms": took * 1e3,
        "predicted_ms": plan.prediction.step_ns / 1e6,
        "roofline_share_predicted": plan.prediction.efficiency,
        "bottleneck": plan.prediction.bottleneck,
        "streamed_bytes": plan.streamed_bytes,
        "resident_bytes": plan.resident_bytes,
        "ring_bytes": plan.ring_bytes,
        "reserve_bytes": plan.sweep.reserve,
        "budget_bytes": store.budget,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "compile_seconds": compile_seconds,
        "host_ms": host * 1e3,
        "operators": len(plan.sweep.operators),
        "counters": store.counters(),
    }
    return row, logits


def figures(shape: str, layers: int, budget: str, steps: int, modes: list[str]) -> list[dict[str, Any]]:
    """Rows of one model."""
    begin = time.perf_counter()
    model = llama(shape, layers)
    vbcompile.offload(model, "cuda", {0: budget, "cpu": "200GiB"}, progress=False)
    randomize(model, "cuda")
    setup = time.perf_counter() - begin
    link = link_rate()
    rows = []
    for mode in modes:
        tokens = torch.randint(0, 1000, (1, 1), device="cuda")
        row, logits = run(model, tokens, mode, steps)
        again = whole_copies(model, tokens, mode)
        row |= {
            "what": f"{shape} {layers} layers {budget} {mode}",
            "setup_seconds": setup,
            "link_gbps": link / 1e9,
            "share_of_link": row["streamed_bytes"] / link / row["ms"] * 1e3,
            "prediction_error": row["predicted_ms"] / row["ms"] - 1,
            "bit_equal": torch.equal(logits, again),
            "finite": bool(logits.isfinite().all()),
        }
        rows.append(row)
        for key, value in row.items():
            print(f"{key:28} {value}", flush=True)
        record.write("offload_model", rows)
    return rows


def whole_copies(model: nn.Module, tokens: Tensor, mode: str) -> Tensor:
    """Logits of the same segments with every weight copied whole: what the streamed run has to equal bit for bit."""
    compiled = torch.compile(model, backend="vblackwell", options={"mode": mode, "strict": True}, dynamic=False)
    with torch.no_grad(), store_of(model).everything_fetched():
        return compiled(tokens).logits.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budget", default="6GiB")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--modes", nargs="+", default=["memory", "full"])
    options = parser.parse_args()
    torch.manual_seed(0)
    figures(options.shape, options.layers, options.budget, options.steps, options.modes)


if __name__ == "__main__":
    main()
