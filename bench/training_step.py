"""Training step of a Llama-shaped model whose attention is written out (``eager``): time and peak memory against peers.

    python bench/training_step.py [--backends eager inductor "inductor sdpa" vblackwell] [--profile] [--small]

16 layers, hidden 2048, intermediate 8192, 32 query and 8 key heads, vocabulary 32000, batch 4 x 2048, bfloat16:
forward, loss and backward. All backends see the same weights and tokens and must reach the same loss and gradient norm
(exit status 1 otherwise). "inductor sdpa" is the model's author's own call of PyTorch's fused attention: the peer.
Floor: 6 FLOP per weight (input embedding aside) and token, plus attention, at the card's measured matrix rate.
"""

import argparse
import collections
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import folder, write

BACKENDS = ("eager", "inductor", "inductor sdpa", "vblackwell")
_LOSS_TOLERANCE = 2e-3  # relative; bfloat16 keeps eight bits and the loss is a mean over 8188 tokens
_NORM_TOLERANCE = 2e-2


def build(small: bool, attention: str) -> torch.nn.Module:
    """The model with random weights, the same for every backend."""
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
    with torch.device("cpu" if small else "cuda"):  # drawing a billion random numbers takes a processor long
        return LlamaForCausalLM(config).to(torch.bfloat16)


class Step:
    """Forward, loss and backward under one backend."""

    def __init__(self, name: str, small: bool) -> None:
        self.model = build(small, "sdpa" if "sdpa" in name else "eager")
        self.device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(1)
        shape = (4, 256 if small else 2048)
        self.tokens = torch.randint(self.model.config.vocab_size, shape, generator=generator).to(self.device)
        self.run: Callable = self.model if name == "eager" else torch.compile(self.model, backend=name.split()[0])

    def __call__(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = self.run(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        return loss.detach()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad.float() for p in self.model.parameters()]))

    def milliseconds(self) -> float:
        self.synchronize()
        start = time.perf_counter()
        self()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)


def measure(name: str, small: bool, repeats: int, profile: bool) -> dict:
    """Median step time in ms, peak allocated memory in GB, loss, gradient norm, time of the first call in s."""
    torch._dynamo.reset()
    gc.collect()
    allocated = _allocated_gb()
    step = Step(name, small)
    start = time.perf_counter()
    with _Sites() as sites:
        loss = float(step())
    first_call = time.perf_counter() - start
    norm = step.gradient_norm()
    step()
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [step.milliseconds() for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 1e9 - allocated if step.device.type == "cuda" else float("nan")
    if profile:
        _write_profile(name, step)
    return {
        "backend": name,
        "ms": round(statistics.median(times), 2),
        "fastest_ms": round(min(times), 2),
        "peak_gb": round(peak, 2),
        "loss": loss,
        "gradient_norm": round(norm, 4),
        "first_call_s": round(first_call, 1),
        **({"sites": sites.counts()} if name == "vblackwell" else {}),
    }


class _Sites:
    """Collects what the backend says about each site while the model compiles."""

    def __enter__(self) -> "_Sites":
        from vbcompile.backend import add_listener

        self.reports: list = []
        self.listener = self.reports.append
        add_listener(self.listener)
        return self

    def __exit__(self, *_: object) -> None:
        from vbcompile.backend import remove_listener

        remove_listener(self.listener)

    def counts(self) -> dict[str, int]:
        """How often each outcome occurred."""
        lines = [
            f"{d.pass_name} {d.action}: {d.reason} [{d.implementation}]" for r in self.reports for d in r.decisions
        ]
        lines += [f"failed {name}: {reason}" for r in self.reports for name, reason in r.failures]
        lines += [f"graph break: {r.graph_break}" for r in self.reports if r.graph_break]
        return dict(collections.Counter(lines))


def _allocated_gb() -> float:
    return torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def _write_profile(name: str, step: Step) -> Path:
    """Device time by kernel of one step, as text beside the results."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step.milliseconds()
    by = "self_device_time_total" if step.device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=100)
    path = folder() / f"training_step_profile_{name.replace(' ', '_')}.txt"
    path.write_text(table)
    return path


def disagreements(rows: list[dict]) -> list[str]:
    """What differs from the first row beyond rounding."""
    found = []
    for row in rows[1:]:
        for key, tolerance in (("loss", _LOSS_TOLERANCE), ("gradient_norm", _NORM_TOLERANCE)):
            if not abs(row[key] - rows[0][key]) <= tolerance * abs(rows[0][key]):
                found.append(f"{key} of {row['backend']}: {row[key]}, {rows[0]['backend']}: {rows[0][key]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model on CPU, to try the script")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, metavar="BACKEND", help=", ".join(BACKENDS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="also write device time by kernel, beside the results")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.backends:
        rows.append(measure(name, arguments.small, arguments.repeats, arguments.profile))
        print(rows[-1], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(write("training_step_small" if arguments.small else "training_step", rows))
    if wrong := disagreements(rows):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
