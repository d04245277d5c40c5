"""Whole models larger than their device budget: decode steps of Llama shapes with random weights.

    python bench/offload_model.py [--shape 8b] [--layers 32] [--budget 6GiB] [--modes memory full] [--accelerate]

A row gives the step time of a model whose weights are streamed by the plan, its share of the roofline (the bytes that
the plan streams, at the link's bandwidth measured in the same run, or computation), what the plan predicted, and the
device memory at the peak. ``everything`` streams every weight in every step, as group offloading does.
"""

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record

import vbcompile
from vbcompile import handles_model
from vbcompile.handles_model import offloaded_tensors
from vbcompile.handles_store import WeightStore
from vbcompile.vgpu_size import parse_size

GIB = 1 << 30
SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "vocab_size": 128256},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "vocab_size": 128256},
    "tiny": {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 1000},
}

FILES = {"1b": "offload_model_1b", "8b": "offload_model", "70b": "offload_model_70b"}


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


def synchronize() -> None:
    """Wait for the device; nothing on a processor."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], repeat: int) -> float:
    """Best of some steps, in a row without waiting between them, per step."""
    function()
    synchronize()
    found = []
    for _ in range(2):
        begin = time.perf_counter()
        for _ in range(repeat):
            function()
        synchronize()
        found.append((time.perf_counter() - begin) / repeat)
    return min(found)


def link_rate(device: str = "cuda", nbytes: int = GIB) -> float:
    """Bytes per second from pinned host memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / seconds(lambda: target.copy_(source, non_blocking=True), 2)


def store_of(model: nn.Module) -> WeightStore:
    found = next(iter(offloaded_tensors(model).values())).payload.residence
    assert isinstance(found, WeightStore)
    return found


def prepare(
    shape: str, layers: int, budget: str, device: str = "cuda", smallest: str = "1MiB"
) -> tuple[nn.Module, float]:
    """An offloaded model with random weights, and the seconds that this took."""
    begin = time.perf_counter()
    model = llama(shape, layers)
    nothing = {"fill": lambda memory, value: None, "_fits": lambda *_: ""}  # nobody has written these weights yet
    with mock.patch.multiple(handles_model, **nothing):
        vbcompile.offload(model, device, {0: budget, "cpu": "230GiB"}, smallest=smallest, progress=False)
    randomize(model, device)
    synchronize()
    return model, time.perf_counter() - begin


def measure(call: Callable[[], Any], store: WeightStore, steps: int, link: float) -> dict[str, Any]:
    """Step time, beside what the plan expected of it."""
    on_card = torch.cuda.is_available()
    torch.cuda.empty_cache()
    with torch.no_grad():
        call()
        synchronize()
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        took = seconds(call, steps)
    peak = torch.cuda.max_memory_allocated() if on_card else 0
    plan = store.plan
    assert plan is not None
    read = sum(w.nbytes for w, uses in zip(plan.sweep.weights, plan.sweep.uses, strict=True) if uses)
    beyond = max(read - (plan.budget - plan.sweep.reserve), 0)
    floor = max(beyond / link, plan.sweep.compute_ns / 1e9)
    return {
        "ms": took * 1e3,
        "predicted_ms": plan.prediction.step_ns / 1e6,
        "prediction_error": plan.prediction.step_ns / 1e9 / took - 1,
        "roofline_ms": floor * 1e3,
        "roofline_share": floor / took,
        "link_share": plan.streamed_bytes / link / took,
        "host_ms": host * 1e3,
        "streamed_bytes": plan.streamed_bytes,
        "resident_bytes": plan.resident_bytes,
        "ring_bytes": plan.ring_bytes,
        "reserve_bytes": plan.sweep.reserve,
        "budget_bytes": store.budget,
        "peak_allocated_bytes": peak,
        "within_budget": peak <= store.budget,
        "operators": len(plan.sweep.operators),
        "compute_ms": plan.sweep.compute_ns / 1e6,
        "bottleneck": plan.prediction.bottleneck,
        "misses": store.counters()["misses"],
    }


def figures(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Rows of one model, added to ``rows``."""
    model, setup = prepare(options.shape, options.layers, options.budget)
    store, link = store_of(model), link_rate()
    tokens = torch.randint(0, 1000, (1, 1), device="cuda")
    for mode in options.modes:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        own, _, inductor = mode.partition(":")
        how = {"mode": own, "inductor_mode": inductor or "default", "strict": True}
        compiled = torch.compile(model, backend="vblackwell", options=how, dynamic=False)
        begin = time.perf_counter()
        with torch.no_grad():
            logits = compiled(tokens).logits.clone()
            torch.cuda.synchronize()
        what = f"{options.shape}, {options.layers} layers, {options.budget}, {own}"
        row = {"what": f"{what}, CUDA graphs" if inductor else what, "setup_seconds": setup}
        row["compile_seconds"] = time.perf_counter() - begin
        row |= measure(partial(compiled, tokens), store, options.steps, link) | {"link_gbps": link / 1e9}
        if sum(store.masters().values()) < torch.cuda.mem_get_info()[0] - 8 * GIB:
            with torch.no_grad(), store.everything_fetched():
                row["bit_equal"] = torch.equal(compiled(tokens).logits, logits)
        row["finite"] = bool(logits.isfinite().all())
        torch.cuda.empty_cache()
        add(rows, row, FILES[options.shape])
        if options.also and own == "full":
            budget = store.budget
            store.replan(parse_size("--also", options.also))
            row = {"what": f"{options.shape}, {options.layers} layers, {options.also}, {own}"}
            add(rows, row | measure(partial(compiled, tokens), store, options.steps, link), FILES[options.shape])
            store.replan(budget)
        if options.profile:
            profile(partial(compiled, tokens))
        if options.accelerate and own == "memory":
            add(rows, accelerate(options, model, tokens, logits, row["roofline_ms"]), FILES[options.shape])
        if options.everything and mode == "memory":
            add(rows, everything(partial(compiled, tokens), store, row, link), FILES[options.shape])


def accelerate(
    options: argparse.Namespace, model: nn.Module, tokens: torch.Tensor, expected: torch.Tensor, roofline_ms: float
) -> dict[str, Any]:
    """Accelerate's own map of the same weights under the same budget, from pageable memory as it loads them."""
    from accelerate import dispatch_model, infer_auto_device_map

    twin, state = llama(options.shape, options.layers), dict(model.named_parameters())
    with torch.no_grad():
        for name, value in twin.named_parameters():
            held = state[name]
            value.copy_(held.payload.on_host() if isinstance(held, vbcompile.OffloadedTensor) else held)
        limits = {0: options.budget, "cpu": "230GiB"}
        twin = dispatch_model(
            twin, infer_auto_device_map(twin, limits, no_split_module_classes=list(twin._no_split_modules))
        )
        found = twin(tokens).logits.double()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = seconds(partial(twin, tokens), 1) * 1e3
    difference = float((found - expected.double()).norm() / found.norm())
    return {
        "what": f"{options.shape}, {options.layers} layers, {options.budget}, Accelerate dispatch_model",
        "ms": ms,
        "roofline_ms": roofline_ms,
        "roofline_share": roofline_ms / ms,
        "peak_beside_bytes": torch.cuda.max_memory_allocated() - before,
        "difference": difference,
    }


def profile(call: Callable[[], Any]) -> None:
    """What the host does in a few steps."""
    found = cProfile.Profile()
    with torch.no_grad():
        found.enable()
        for _ in range(3):
            call()
        found.disable()
    torch.cuda.synchronize()
    pstats.Stats(found).sort_stats("tottime").print_stats(30)


def everything(call: Callable[[], Any], store: WeightStore, row: dict[str, Any], link: float) -> dict[str, Any]:
    """The same with the smallest budget that works: every weight is streamed in every step."""
    budget = store.budget
    try:
        store.replan(1 << 20)
    except vbcompile.PlanError as error:
        store.replan(error.minimum_budget or budget)
    found = measure(call, store, 2, link)
    store.replan(budget)
    return {"what": f"{row['what']}, everything streamed"} | found | {"speed_over_this": found["ms"] / row["ms"]}


def fits(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """A budget in which the model fits, so that nothing is rewritten: beside Inductor, steps taking turns."""
    model = llama(options.shape, options.layers)
    vbcompile.offload(model, "cuda", {0: "100GiB"}, progress=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    reason = vbcompile.stats(model)[0].declined
    for shape, mode in (((4, 512), "default"), ((1, 1), "default"), ((1, 1), "reduce-overhead")):
        tokens = torch.randint(0, 1000, shape, device="cuda")
        torch._dynamo.reset()
        calls = {
            name: partial(torch.compile(model, dynamic=False, **how(mode)), tokens) for name, how in FITTING.items()
        }
        with torch.no_grad():
            for call in calls.values():
                call()
        wall, host = taking_turns(calls, options.steps)
        graphs = "" if mode == "default" else ", CUDA graphs"
        row: dict[str, Any] = {
            "what": f"{options.shape} {options.layers} layers, {shape[0]} x {shape[1]} tokens{graphs}"
        }
        for name in FITTING:
            row |= {f"{name}_ms": wall[name] * 1e3, f"{name}_host_ms": host[name] * 1e3}
            row[f"{name}_slowdown"] = wall[name] / wall["inductor"] - 1
        add(rows, row | {"reason": reason}, "offload_fits")


def in_memory_mode(mode: str, **options: Any) -> dict[str, Any]:
    """Our backend as Inductor's ``mode`` has it."""
    return {"backend": "vblackwell", "options": {"mode": "memory", "inductor_mode": mode, **options}}


FITTING: dict[str, Callable[[str], dict[str, Any]]] = {
    "inductor": lambda mode: {"backend": "inductor", "mode": mode},
    "memory": partial(in_memory_mode, attention=False),
    "memory_attention": in_memory_mode,
}


def taking_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per step, and until the host is done with it; each round runs every call, ten steps in a row."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(rounds):
            for name in (*calls,) if turn % 2 else (*reversed(calls),):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(10):
                    calls[name]()
                host[name].append((time.perf_counter() - begin) / 10)
                torch.cuda.synchronize()
                wall[name].append((time.perf_counter() - begin) / 10)
    return (
        {name: statistics.median(found) for name, found in wall.items()},
        {name: statistics.median(found) for name, found in host.items()},
    )


def add(rows: list[dict[str, Any]], row: dict[str, Any], file: str) -> None:
    """Print a row and write all so far."""
    rows.append(row)
    for key, value in row.items():
        print(f"{key:24} {value}", flush=True)
    print(flush=True)
    record.write(file, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budget", default="6GiB")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--modes", nargs="+", default=["memory", "full:reduce-overhead"])
    parser.add_argument("--everything", action="store_true", help="also with the smallest budget that works")
    parser.add_argument("--accelerate", action="store_true", help="also by Accelerate under the same budget")
    parser.add_argument("--also", metavar="BUDGET", help="mode full with this budget too, in which it streams")
    parser.add_argument("--fits", action="store_true", help="only a budget in which the model fits, against Inductor")
    parser.add_argument("--profile", action="store_true", help="print what the host does in a step")
    parser.add_argument("--append", action="store_true", help="add to the rows of the file that is there")
    options = parser.parse_args()
    torch.manual_seed(0)
    name = "offload_fits" if options.fits else FILES[options.shape]
    file = record.folder() / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if options.append and file.exists() else []
    if options.fits:
        fits(options, rows)
    else:
        figures(options, rows)


if __name__ == "__main__":
    main()
