"""Compile time and per-call overhead of the backend against plain Inductor, each in processes of its own.

    python bench/compile_time.py [--repeats 3] [--device cpu] [--figures cold warm call]

Cold: empty cache folder. Warm: a second process with the folder that the first one filled. Both count from before
``torch.compile`` to the end of the first call, on a model of SmolLM2-135M's shape (30 layers, random weights, ``eager``
attention); the package's own import is in it. Per call: a small model in which nothing can be rewritten, compiled by
both in one process, blocks of calls in turn, each of the two compiled first in half of the processes.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types

from record import write

BACKENDS = ("inductor", "vblackwell")
_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "use_cache": False,
    "attn_implementation": "eager",
}


def first_call(backend: str, device: str) -> dict:
    """Seconds from ``torch.compile`` to the end of the first call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SMOLLM2)).to(device).eval()
    tokens = torch.arange(64, device=device).view(1, 64)
    with torch.no_grad():
        model(tokens)
        start = time.perf_counter()
        torch.compile(model, backend=backend)(tokens)
        seconds = time.perf_counter() - start
    return {backend: seconds, "fused": torch._dynamo.utils.counters["vblackwell"]["fuse_attention"]}


def _forward(model, x):
    return model(x)


def per_call(first: str, device: str) -> dict:
    """Median seconds per call by backend; ``first`` is compiled first."""
    import torch

    x = torch.randn(8, 64, device=device)
    runs, times = {}, {backend: [] for backend in BACKENDS}
    for backend in sorted(BACKENDS, key=lambda b: b != first):
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))).to(device)
        own_code = types.FunctionType(_forward.__code__.replace(), globals())  # else one has to pass the other's guards
        runs[backend] = functools.partial(torch.compile(own_code, backend=backend), model)
    with torch.no_grad():
        for turn in range(200):
            for backend in BACKENDS[:: 1 if turn % 2 else -1]:
                run, start = runs[backend], time.perf_counter()
                for _ in range(200):
                    run(x)
                if device == "cuda":
                    torch.cuda.synchronize()
                times[backend].append((time.perf_counter() - start) / 200)
    return {backend: statistics.median(t[20:]) for backend, t in times.items()}  # the first blocks warm up


def run_child(arguments: list[str], cache: str) -> dict:
    """Measure in a process of its own, with byte code cached as in normal use."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def collect(figures: list[str], device: str, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Samples by figure and backend; repeats are interleaved, so that a change of the machine's speed hits both."""
    samples: dict[str, dict[str, list[float]]] = {f: {b: [] for b in BACKENDS} for f in figures}

    def add(figure: str, result: dict) -> None:
        for backend in BACKENDS:
            if backend in result and figure in samples:
                samples[figure][backend].append(result[backend])

    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            order = BACKENDS[:: 1 if repeat % 2 else -1]
            if {"cold", "warm"} & set(figures):
                for backend in order:
                    add("cold", run_child(["compile", backend, device], f"{folder}/{backend}"))
            if "warm" in figures:
                for backend in (*order, *order, *order):
                    add("warm", run_child(["compile", backend, device], f"{folder}/{backend}"))
            if "call" in figures:
                for first in order:
                    add("call", run_child(["call", first, device], f"{folder}/call"))
    return samples


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        what, backend, device = sys.argv[2:]
        print(json.dumps(first_call(backend, device) if what == "compile" else per_call(backend, device)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--figures", nargs="+", choices=["cold", "warm", "call"], default=["cold", "warm", "call"])
    arguments = parser.parse_args()
    rows = []
    for figure, samples in collect(arguments.figures, arguments.device, arguments.repeats).items():
        theirs, ours = (statistics.median(samples[backend]) for backend in BACKENDS)
        rows.append(
            {"figure": figure, "inductor_s": theirs, "vblackwell_s": ours, "ratio": round(ours / theirs, 4)}
            | {f"{backend}_samples": [round(t, 8) for t in samples[backend]] for backend in BACKENDS}
        )
        print(rows[-1], flush=True)
    print(write(f"compile_time_{arguments.device}", rows))


if __name__ == "__main__":
    main()
