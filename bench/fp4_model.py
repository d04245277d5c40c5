"""A decode step and a prefill of a Llama with random weights: bfloat16 by Inductor, FP4 by vblackwell, side by side.

    python bench/fp4_model.py [--layers 32] [--what decode prefill] [--tokens 2048] [--activations same fp8]

The shape is that of Llama-3-8B. A decode step is one token of one sequence with a static cache, replayed as a CUDA
graph; a prefill is a whole prompt without a cache. Times are medians, in milliseconds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
CACHE = 512


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


def decode_step(model: torch.nn.Module, compiled: Callable[..., Any]) -> Callable[[], torch.Tensor]:
    """A function that appends one token to a static cache; it can be called CACHE / 2 times."""
    from transformers import StaticCache

    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    ids = torch.randint(0, model.config.vocab_size, (1, 1), device=device)
    prompt = torch.randint(0, model.config.vocab_size, (1, CACHE // 2), device=device)
    with torch.no_grad():
        model(prompt, past_key_values=cache, cache_position=torch.arange(CACHE // 2, device=device))
    place = torch.tensor([CACHE // 2], device=device)

    def step() -> torch.Tensor:
        with torch.no_grad():
            return compiled(ids, past_key_values=cache, cache_position=place, position_ids=place[None]).logits

    return step


def prefill(model: torch.nn.Module, compiled: Callable[..., Any], tokens: int) -> Callable[[], torch.Tensor]:
    """A function that runs a prompt and gives the last token's logits."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=next(model.parameters()).device)

    def step() -> torch.Tensor:
        with torch.no_grad():
            return compiled(ids, use_cache=False, logits_to_keep=1).logits

    return step


def milliseconds(step: Callable[[], Any], graph: bool) -> float:
    """Median time of a call, or of the replay of a CUDA graph that recorded one."""
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


def measure(
    model: torch.nn.Module, what: str, name: str, options: dict[str, Any] | None, tokens: int
) -> dict[str, Any]:
    torch._dynamo.reset()
    started = time.perf_counter()
    backend = "inductor" if options is None else "vblackwell"
    compiled = torch.compile(model, backend=backend, dynamic=False, options=options)
    step = decode_step(model, compiled) if what == "decode" else prefill(model, compiled, tokens)
    step()
    torch.cuda.synchronize()
    row = {"what": what, "name": name, "layers": model.config.num_hidden_layers, "tokens": tokens}
    row |= {"compile_s": time.perf_counter() - started, "ms": milliseconds(step, graph=what == "decode")}
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--what", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="time Inductor too")
    parser.add_argument("--activations", nargs="+", default=["same", "fp8"], choices=["same", "fp8"])
    arguments = parser.parse_args()
    model = build(arguments.layers, "cuda")
    rows = []
    for what in arguments.what:
        for activations in arguments.activations if what == "prefill" else ["same"]:
            options = {"mode": "speed", "strict": True, "fp4_activations": activations}
            rows.append(measure(model, what, f"vblackwell nvfp4, activations {activations}", options, arguments.tokens))
            record.write(f"fp4_model_{'_'.join(arguments.what)}", rows)
        if arguments.peers:
            rows.append(measure(model, what, "inductor bfloat16", None, arguments.tokens))
            record.write(f"fp4_model_{'_'.join(arguments.what)}", rows)


if __name__ == "__main__":
    main()
