"""Hopper attention: checks each configuration against float64, then times it beside cuDNN's. Needs an H100 or H200.

    python bench/attention_hopper.py [--out DIR] [--set NAME] [--seconds N]

Every configuration is checked in a process of its own with a time limit, so that a kernel that hangs costs one
process; only those that pass are timed. Results go to DIR/attention_hopper.json; a table comes last.
"""

import argparse
import functools
import json
import math
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHAPES = [  # B, H, S, D, causal, wanted forward TFLOP/s, wanted backward
    (4, 16, 4096, 128, False, 640, 480),
    (4, 16, 4096, 128, True, 560, 420),
    (1, 16, 16384, 128, False, 640, 500),
    (1, 16, 16384, 128, True, 600, 480),
    (8, 16, 2048, 64, False, 470, 380),
    (8, 16, 2048, 64, True, 390, 300),
]
ROUNDS = 3
CASES = [  # B, H, Hk, Q, K, causal offset, rows first, dtype
    (2, 4, 2, 300, 520, None, False, "bfloat16"),
    (1, 2, 1, 333, 333, 0, True, "bfloat16"),
    (1, 3, 3, 128, 1000, 872, True, "float16"),
    (2, 4, 4, 1024, 1024, 0, False, "bfloat16"),
    (1, 1, 1, 1, 77, None, True, "bfloat16"),
    (1, 8, 2, 700, 65, 3, False, "bfloat16"),
    (3, 6, 2, 515, 2049, 100, True, "bfloat16"),
]


def variants(name: str) -> dict[int, list]:
    """Configurations to try, by head dimension."""
    from vbcompile.kernels.attention_hopper import FORWARD_CONFIGS, ForwardConfig

    if name == "shipped":
        return {d: sorted({FORWARD_CONFIGS[d, c] for c in (False, True)}, key=repr) for d in (64, 128)}
    base = ForwardConfig(group=1)
    dynamic = replace(base, dynamic=True, group=8)
    wide = [
        base,
        dynamic,
        replace(base, overlap=False),
        replace(dynamic, overlap=False),
        replace(dynamic, group=1),
        replace(dynamic, group=16),
        replace(dynamic, ping_pong=False),
    ]
    three = ForwardConfig(consumers=3, overlap=False, group=1)
    narrow = [
        base,
        dynamic,
        replace(base, poly=8),
        replace(base, poly=4),
        replace(dynamic, poly=8),
        replace(dynamic, poly=8, group=32),
        replace(dynamic, poly=8, ping_pong=False),
        replace(dynamic, overlap=False),
        three,
        replace(three, poly=8),
        replace(three, dynamic=True, group=8),
        replace(three, dynamic=True, group=32),
    ]
    return {64: narrow, 128: wide}


def reference(q, k, v, scale, offset):
    """(out, lse) in float64, and plain PyTorch's out in q's dtype."""
    import torch

    group = q.shape[1] // k.shape[1]

    def run(dtype):
        kk, vv = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
        s = q.to(dtype) @ kk.mT * scale
        if offset is not None:
            rows = torch.arange(q.shape[2], device=q.device)[:, None]
            s = s.masked_fill(torch.arange(k.shape[2], device=q.device)[None] > rows + offset, -math.inf)
        return s.softmax(-1) @ vv, s.double().logsumexp(-1)

    out, lse = run(torch.float64)
    return out, lse, run(q.dtype)[0]


def check(dim: int, config) -> dict:
    """Worst ratio of our error to plain PyTorch's over the cases; raises if one is wrong."""
    import torch

    from vbcompile.kernels.attention_hopper import forward

    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    worst = 0.0
    for batch, heads, key_heads, queries, keys, offset, rows_first, dtype in CASES:
        sizes = ((heads, queries), (key_heads, keys), (key_heads, keys))
        like = {"device": "cuda", "dtype": getattr(torch, dtype)}
        q, k, v = (torch.randn(batch, s, h, dim, **like).transpose(1, 2) for h, s in sizes)
        scale = 1.0 / math.sqrt(dim)
        out, lse = forward(q, k, v, scale, offset, rows_first, config)
        exact, exact_lse, plain = reference(q, k, v, scale, offset)
        error = (out.double() - exact).abs().max().item()
        bound = (plain.double() - exact).abs().max().item()
        lse_error = (lse.double() - exact_lse).abs().max().item()
        ratio = error / bound
        worst = max(worst, ratio)
        if not (ratio <= 2.0 and lse_error < 1e-3) or not out.isfinite().all():
            raise AssertionError(f"{(batch, heads, key_heads, queries, keys, offset)}: {ratio=} {error=} {lse_error=}")
    return {"worst_ratio": worst}


def measure(shape, configs: list) -> dict:
    """Median milliseconds of one forward per configuration (None is cuDNN), in rounds of random order: neighbours in
    time share the card's temperature and clock."""
    import torch
    import triton
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from vbcompile.kernels.attention_hopper import forward

    batch, heads, length, dim, causal, *_ = shape
    torch.manual_seed(length + dim)
    q, k, v = (torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def run(config):
        if config is not None:
            return forward(q, k, v, dim**-0.5, 0 if causal else None, False, config)[0]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    expected = run(None).float()
    for config in configs:
        first, second = run(config), run(config)
        if not torch.equal(first, second) or (first.float() - expected).abs().max() > 0.05:
            raise AssertionError(f"{config}: two runs differ or cuDNN differs")
    times: dict[int, list[float]] = {i: [] for i in range(len(configs))}
    for _ in range(ROUNDS):
        for i in random.sample(range(len(configs)), len(configs)):
            once = functools.partial(run, configs[i])
            times[i].append(triton.testing.do_bench(once, warmup=15, rep=50, return_mode="median"))
    return {"times": [times[i] for i in range(len(configs))]}


def worker(arguments) -> None:
    """Child process: reads jobs (JSON lines), writes results (JSON lines)."""
    from vbcompile.kernels.attention_hopper import ForwardConfig

    for line in sys.stdin:
        job = json.loads(line)
        configs = [ForwardConfig(**c) if c else None for c in job["configs"]]
        try:
            if job["kind"] == "check":
                result = check(job["dim"], configs[0])
            else:
                result = measure(job["shape"], configs)
        except (AssertionError, ValueError, RuntimeError) as error:
            result = {"error": f"{type(error).__name__}: {str(error)[-600:]}"}
        print(json.dumps({**job, **result}), flush=True)


def run_child(jobs: list[dict], limit: float) -> list[dict]:
    """Results of the jobs from one child process; what it had not finished at its limit is marked so."""
    command = [sys.executable, __file__, "--worker"]
    text = "".join(json.dumps(job) + "\n" for job in jobs)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as p:
        try:
            stdout, stderr = p.communicate(text, timeout=limit)
        except subprocess.TimeoutExpired:
            p.kill()
            stdout, stderr = p.communicate()
            stderr = "time limit; " + stderr
    done = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    return done + [{**job, "error": stderr[-800:]} for job in jobs[len(done) :]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--set", default="explore")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--worker", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments)
    deadline = time.monotonic() + arguments.seconds
    tried = variants(arguments.set)
    checks = [{"kind": "check", "dim": dim, "configs": [asdict(c)]} for dim, configs in tried.items() for c in configs]
    with ThreadPoolExecutor(12) as pool:
        checked = [r for rs in pool.map(lambda job: run_child([job], 60), checks) for r in rs]
    for job in checked:
        if "error" in job:
            print("FAILED", job["dim"], job["configs"], job["error"])
    print(f"checked, {deadline - time.monotonic():.0f} s left", flush=True)
    results = list(checked)
    for shape in SHAPES:
        good = [job["configs"][0] for job in checked if "error" not in job and job["dim"] == shape[3]]
        left = deadline - time.monotonic()
        results += run_child([{"kind": "time", "shape": shape, "configs": [None, *good]}], min(max(left, 5), 40))
        show(results[-1])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "attention_hopper.json").write_text(json.dumps(results, indent=1))


def show(result: dict) -> None:
    """One row per configuration of one shape, the fastest first: median and range over the rounds."""
    batch, heads, length, dim, causal, wanted, _ = result["shape"]
    print(f"B,H,S,D {batch},{heads},{length},{dim} causal {causal} wanted {wanted} {result.get('error', '')}")
    flops = 4 * batch * heads * length**2 * dim * (0.5 if causal else 1)
    rows = [(statistics.median(t), t, c) for t, c in zip(result.get("times", []), result["configs"], strict=False)]
    for ms, times, c in sorted(rows, key=lambda row: row[0]):
        rates = [flops / t / 1e9 for t in (ms, max(times), min(times))]
        name = "cuDNN" if c is None else " ".join(f"{key[:4]}{int(value)}" for key, value in c.items())
        print(f"  {name:62s} {rates[0]:6.1f} ({rates[1]:5.1f} .. {rates[2]:5.1f}) TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
