"""Compile time and per-call overhead of the backend against plain Inductor, each in processes of its own.

    python bench/compile_time.py [--repeats 3] [--device cpu]

Cold: empty cache folder. Warm: a second process with the folder that the first one filled. Both count from before
``torch.compile`` to the end of the first call, on a model of SmolLM2-135M's shape (30 layers, random weights, ``eager``
attention). Overhead: median time per call of a small model in which nothing can be rewritten.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from record import write

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


def child(backend: str, device: str, what: str) -> None:
    """Measure in this process and print one JSON line."""
    import torch

    torch.manual_seed(0)
    if what == "compile":
        result = _first_call(torch, backend, device)
    else:
        result = _per_call(torch, backend, device)
    print(json.dumps(result))


def _first_call(torch, backend: str, device: str) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**_SMOLLM2)).to(device).eval()
    tokens = torch.arange(64, device=device).view(1, 64)
    with torch.no_grad():
        model(tokens)
        start = time.perf_counter()
        torch.compile(model, backend=backend)(tokens)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "fused": torch._dynamo.utils.counters["vblackwell"]["fuse_attention"]}


def _per_call(torch, backend: str, device: str) -> dict:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))).to(device)
    run, x = torch.compile(model, backend=backend), torch.randn(8, 64, device=device)
    with torch.no_grad():
        for _ in range(200):
            run(x)
        times = []
        for _ in range(60):
            start = time.perf_counter()
            for _ in range(200):
                run(x)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / 200)
    return {"seconds": statistics.median(times)}


def run_child(backend: str, device: str, what: str, cache: str) -> dict:
    command = [sys.executable, __file__, "--child", backend, what, "--device", device]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("BACKEND", "WHAT"), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.device, arguments.child[1])
        return
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.repeats):  # interleaved, so that a change of the machine's speed hits both alike
        for backend in ("inductor", "vblackwell"):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    result = run_child(backend, arguments.device, "compile", cache)
                    samples.setdefault((state, backend), []).append(result["seconds"])
                samples.setdefault(("per call", backend), []).append(
                    run_child(backend, arguments.device, "call", cache)["seconds"]
                )
    rows = []
    for figure in ("cold", "warm", "per call"):
        ours, theirs = (statistics.median(samples[figure, b]) for b in ("vblackwell", "inductor"))
        rows.append({"figure": figure, "vblackwell_s": ours, "inductor_s": theirs, "ratio": round(ours / theirs, 4)})
        print(rows[-1], flush=True)
    print(write(f"compile_time_{arguments.device}", rows))


if __name__ == "__main__":
    main()
