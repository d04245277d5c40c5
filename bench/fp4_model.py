"""A decode step and a prefill of a Llama with random weights: bfloat16 by Inductor, FP4 by vblackwell, side by side.

    python bench/fp4_model.py [--layers 32] [--what decode prefill] [--tokens 2048] [--seconds 100] [--small]

The shape is that of Llama-3-8B. A decode step is one token of one sequence with a static cache, a prefill is a whole
prompt without a cache; both are timed as replays of a CUDA graph, and launched one by one. Times are medians, in
milliseconds. Each way compiles in a process of its own, all at once, and they are measured one after the other; what is
launched one by one in three turns, with the host's speed beside each, since that changes.

Logits are compared with those of the same model run eagerly, on the decoded weights. Layers of random weights amplify
every rounding, so the limit is what they make of Inductor's: twice that, 16 times with FP8 activations, which round 16
times as coarsely as bfloat16 (exit status 1 beyond). ``--small`` runs on a processor, to try the script.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record
from fp4_models import pack_model
from turns import await_turn, give_turn_back, hand_in, host_speed, take_turns

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1000,
}  # fmt: skip
CACHE = 512
TURNS = 3
WAYS: dict[str, dict[str, Any] | None] = {
    "Inductor bfloat16": None,
    "vblackwell NVFP4": {"fp4_activations": "same"},
    "vblackwell NVFP4, FP8 activations": {"fp4_activations": "fp8"},
}
_INDUCTORS = 0.1  # most that logits of Inductor may differ, relatively; 0.06 for 32 layers
_TIMES = {"same": 2, "fp8": 16}  # of Inductor's: E4M3 has four bits less than bfloat16


def build(layers: int, device: str, **shape: Any) -> torch.nn.Module:
    """A Llama in bfloat16 with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, **(SHAPE | shape))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def decode_step(
    model: torch.nn.Module,
) -> tuple[Callable[[Callable[..., Any]], torch.Tensor], Callable[[], None]]:
    """A function that appends one token to a static cache by a model, and one that takes tokens back."""
    from transformers import StaticCache

    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    ids = torch.randint(0, model.config.vocab_size, (1, 1), device=device)
    prompt = torch.randint(0, model.config.vocab_size, (1, CACHE // 2), device=device)
    with torch.no_grad():
        model(prompt, past_key_values=cache, cache_position=torch.arange(CACHE // 2, device=device))
    place = torch.tensor([CACHE // 2], device=device)

    def step(run: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            return run(ids, past_key_values=cache, cache_position=place, position_ids=place[None]).logits

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(CACHE // 2)

    return step, rewind


def prefill(
    model: torch.nn.Module, tokens: int
) -> tuple[Callable[[Callable[..., Any]], torch.Tensor], Callable[[], None]]:
    """A function that runs a prompt and gives the last token's logits, and one that has nothing to take back."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=next(model.parameters()).device)

    def step(run: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            return run(ids, use_cache=False, logits_to_keep=1).logits

    return step, lambda: None


def milliseconds(step: Callable[[], Any], graph: bool) -> float:
    """Median time of a call, or of the replay of a CUDA graph that recorded one."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    run = step
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            step()
        run = recorded.replay
        run()
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def work(variant: str, arguments: argparse.Namespace) -> None:
    """Compile, check, wait for the turn, measure, hand in."""
    what, _, name = variant.partition(": ")
    torch.manual_seed(0)
    started = time.perf_counter()
    model = build(arguments.layers, "cpu" if arguments.small else "cuda", **(SMALL if arguments.small else {}))
    way = WAYS[name]
    if (
        way is not None
    ):  # the weights become their FP4 values, so that the plain model is what the result is compared with
        pack_model(model, "nvfp4", "fp8" if way["fp4_activations"] == "fp8" else "mse")
    options = None if way is None else {"mode": "speed", "strict": True, **way}
    compiled = torch.compile(model, backend="inductor" if way is None else "vblackwell", dynamic=False, options=options)
    step, rewind = decode_step(model) if what == "decode" else prefill(model, arguments.tokens)
    got = step(compiled).double()
    rewind()
    row: dict[str, Any] = {"what": what, "name": name, "layers": arguments.layers, "tokens": arguments.tokens}
    expected = step(model).double()
    row["difference"] = float((got - expected).norm() / expected.norm())
    row["compile_s"] = time.perf_counter() - started
    await_turn(arguments.folder, variant)
    row["ms"] = milliseconds(lambda: step(compiled), graph=True)
    turns = []
    for turn in range(TURNS):
        if turn:
            give_turn_back(arguments.folder, variant)
            await_turn(arguments.folder, variant)
        turns.append((milliseconds(lambda: step(compiled), graph=False), host_speed()))
    row["each_without_graph"], row["host_speed_us"] = map(list, zip(*turns, strict=True))
    row["ms_without_graph"] = statistics.median(row["each_without_graph"])
    hand_in(arguments.folder, variant, row)


def with_limits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with the difference that it is allowed: by Inductor's where that was measured."""
    inductors = {row["what"]: row["difference"] for row in rows if WAYS[row["name"]] is None}
    for row in rows:
        way = WAYS[row["name"]]
        times = None if way is None else _TIMES[way["fp4_activations"]]
        row["allowed"] = times * inductors.get(row["what"], _INDUCTORS) if times else _INDUCTORS
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--what", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--seconds", type=float, default=900, help="time for everything")
    parser.add_argument("--small", action="store_true", help="a tiny model on a processor")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments)
        return 0
    # FP8 activations make many rows faster: a decode step has one
    wanted = [
        f"{what}: {way}" for what in arguments.what for way in arguments.ways if what == "prefill" or "FP8" not in way
    ]
    file = "fp4_model_small" if arguments.small else "fp4_model"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--layers", str(arguments.layers)]
        command += ["--tokens", str(arguments.tokens), *(["--small"] if arguments.small else []), "--worker"]
        found = lambda rows: record.write(file, with_limits(rows))
        rows = with_limits(take_turns(command, wanted, arguments.seconds, Path(folder), found))
    wrong = [f"{row['what']}: {row['name']}" for row in rows if not row["difference"] <= row["allowed"]]
    print(f"{len(rows)} of {len(wanted)} done; wrong: {wrong or 'none'}")
    return int(bool(wrong) or len(rows) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
