"""Training step of a Llama-shaped model whose attention is written out (``eager``): time and peak memory against peers.

    python bench/training_step.py [--layers 16] [--small]

16 layers, hidden 2048, intermediate 8192, 32 query and 8 key heads, vocabulary 32000, batch 4 x 2048, bfloat16:
forward, loss and backward. Floor: 6 FLOP per weight and token plus attention, at the card's matrix rate.
"""

import argparse
import statistics
import time

import torch
from record import write

BACKENDS = ("eager", "inductor", "inductor sdpa", "vblackwell")


def build(small: bool, attention: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary = (256, 2, 1000) if small else (2048, 16, 32000)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=2048,
        use_cache=False,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cpu" if small else "cuda", torch.bfloat16)


def measure(name: str, small: bool) -> dict:
    """Median step time in ms, peak allocated memory in GB, loss, compile time in s."""
    torch._dynamo.reset()
    model = build(small, "sdpa" if "sdpa" in name else "eager")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (4, 256 if small else 2048), generator=generator).to(device)
    run = model if name == "eager" else torch.compile(model, backend=name.split()[0])

    def step() -> torch.Tensor:
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    loss = float(step())
    compile_s = time.perf_counter() - start
    step()
    synchronize()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3 if small else 7):
        start = time.perf_counter()
        step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return {
        "backend": name,
        "ms": round(statistics.median(times), 2),
        "peak_gb": round(peak, 2),
        "loss": loss,
        "first_call_s": round(compile_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model on CPU, to try the script")
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.backends:
        rows.append(measure(name, arguments.small))
        print(rows[-1], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(write("training_step_small" if arguments.small else "training_step", rows))


if __name__ == "__main__":
    main()
