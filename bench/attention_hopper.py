"""Hopper attention: checks each configuration against float64, then times it beside cuDNN's. Needs an H100 or H200.

    python bench/attention_hopper.py [--set NAME] [--seconds N]

Every configuration is checked in a process of its own with a time limit, so that a kernel that hangs costs one
process; only those that pass are timed. Results go to attention_hopper.json; a table comes last.
"""

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import record

SHAPES = [  # B, H, S, D, causal, wanted forward TFLOP/s, wanted backward
    (4, 16, 4096, 128, False, 640, 480),
    (4, 16, 4096, 128, True, 560, 420),
    (1, 16, 16384, 128, False, 640, 500),
    (1, 16, 16384, 128, True, 600, 480),
    (8, 16, 2048, 64, False, 470, 380),
    (8, 16, 2048, 64, True, 390, 300),
]
CASES = [  # B, H, Hk, Q, K, causal offset, rows first, dtype
    (2, 4, 2, 300, 520, None, False, "bfloat16"),
    (1, 2, 1, 333, 333, 0, True, "bfloat16"),
    (1, 3, 3, 128, 1000, 872, True, "float16"),
    (2, 4, 4, 1024, 1024, 0, False, "bfloat16"),
    (1, 1, 1, 1, 77, None, True, "bfloat16"),
    (1, 8, 2, 700, 65, 3, False, "bfloat16"),
    (3, 6, 2, 515, 2049, 100, True, "bfloat16"),
]


def variants(name: str) -> list[tuple[str, int, list]]:
    """(direction, head dimension, configurations to try)."""
    from vbcompile.kernels import attention_hopper as hopper
    from vbcompile.kernels import attention_hopper_gradients as gradients

    tables = {"forward": hopper.FORWARD_CONFIGS, "backward": gradients.BACKWARD_CONFIGS}
    if name == "shipped":
        pick = lambda table, d: sorted({table[d, c] for c in (False, True)}, key=repr)
        return [(way, d, pick(table, d)) for way, table in tables.items() for d in (128, 64)]
    narrow = [hopper.FORWARD_CONFIGS[64, False], hopper.FORWARD_CONFIGS[64, True]]
    causal = narrow[1]
    narrow += [replace(causal, group=64), replace(causal, ping_pong=0), replace(causal, group=64, q_stages=3)]
    wide = list(dict.fromkeys(hopper.FORWARD_CONFIGS[128, c] for c in (False, True)))
    back = gradients.BackwardConfig()
    half = replace(back, block_k=64)
    if name == "narrow":
        return [("forward", 64, narrow)]
    return [
        ("forward", 64, narrow),
        ("backward", 64, [replace(half, group=g, stages=n) for g in (1, 16) for n in (2, 3)]),
        ("forward", 128, wide),
        ("backward", 128, [replace(back, late=True), replace(back, late=True, group=8)]),
    ]


def reference(q, k, v, scale, offset, dtype):
    """(out, lse) of plain PyTorch in ``dtype``."""
    import torch

    group = q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), *(x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.mT * scale
    if offset is not None:
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        s = s.masked_fill(torch.arange(k.shape[2], device=q.device)[None] > rows + offset, -math.inf)
    return s.softmax(-1) @ v, s.double().logsumexp(-1)


def check(way: str, dim: int, config) -> dict:
    """Worst ratio of our error to plain PyTorch's over the cases; raises if one is wrong."""
    import torch

    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    worst = 0.0
    for case in CASES:
        batch, heads, key_heads, queries, keys, *_, dtype = case
        like = {"device": "cuda", "dtype": getattr(torch, dtype)}
        sizes = ((heads, queries), (key_heads, keys), (key_heads, keys), (heads, queries))
        q, k, v, g = (torch.randn(batch, s, h, dim, **like).transpose(1, 2) for h, s in sizes)
        ratios = (check_forward if way == "forward" else check_backward)(q, k, v, g, case, config)
        worst = max(worst, *ratios)
        if not all(ratio <= 2.0 for ratio in ratios):  # NaN fails too
            raise AssertionError(f"{case}: error ratios {ratios}")
    return {"worst_ratio": worst}


def error_ratio(ours, plain, exact) -> float:
    """Our largest error over plain PyTorch's."""
    return ((ours.double() - exact).abs().max() / (plain.double() - exact).abs().max().clamp_min(1e-12)).item()


def check_forward(q, k, v, g, case, config) -> list[float]:
    import torch

    from vbcompile.kernels.attention_hopper import forward

    scale = q.shape[-1] ** -0.5
    out, lse = forward(q, k, v, scale, case[5], case[6], config)
    exact, exact_lse = reference(q, k, v, scale, case[5], torch.float64)
    plain, _ = reference(q, k, v, scale, case[5], q.dtype)
    return [error_ratio(out, plain, exact), (lse.double() - exact_lse).abs().max().item() / 5e-4]


def check_backward(q, k, v, g, case, config) -> list[float]:
    import torch

    from vbcompile.kernels.attention_hopper import forward
    from vbcompile.kernels.attention_hopper_gradients import backward

    scale, offset = q.shape[-1] ** -0.5, case[5]
    grad_lse = torch.randn(q.shape[:3], device="cuda") if case[6] else None

    def gradients(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = reference(*leaves, scale, offset, dtype)
        loss = (out * g.to(dtype)).sum().double()
        if grad_lse is not None:
            loss = loss + (lse * grad_lse.double()).sum()
        return torch.autograd.grad(loss, leaves)

    exact, plain = gradients(torch.float64), gradients(q.dtype)
    out, lse = forward(q, k, v, scale, offset, case[6])
    ours = backward(g, grad_lse, q, k, v, out, lse, scale, offset, config)
    return [error_ratio(a, b, c) for a, b, c in zip(ours, plain, exact, strict=True)]


def measure(way: str, shape, configs: list) -> dict:
    """Median milliseconds of one call per configuration (None is cuDNN): CUDA-graph replays in rounds of random order,
    since neighbours in time share the card's temperature and clock."""
    import torch
    from attention_scores import rounds

    from vbcompile.kernels.attention_hopper import forward
    from vbcompile.kernels.attention_hopper_gradients import backward
    from vbcompile.kernels.attention_sdpa import fused_backward, fused_forward
    from vbcompile.kernels.score_function import ScoreFunction

    batch, heads, length, dim, causal, *_ = shape
    torch.manual_seed(length + dim)
    q, k, v, g = (torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    scale, offset = dim**-0.5, 0 if causal else None
    plain = ScoreFunction()
    masked = ScoreFunction((("score",), ("q_index",), ("k_index",), ("ge", 1, 2)), 0, 3)
    function = (masked if causal else plain).dumps()
    out, lse = forward(q, k, v, scale, offset, False)
    peer_out, peer_lse = fused_forward("cudnn")(q, k, v, [], scale, 0.0, None, function)

    def run(config):
        if way == "backward" and config is None:
            arguments = (g, None, q, k, v, [], peer_out, peer_lse, scale, 0.0, None, function, [True] * 3)
            return fused_backward("cudnn")(*arguments)
        if way == "backward":
            return backward(g, None, q, k, v, out, lse, scale, offset, config)
        if config is not None:
            return (forward(q, k, v, scale, offset, False, config)[0],)
        return (fused_forward("cudnn")(q, k, v, [], scale, 0.0, None, function)[0],)

    expected = [x.float() for x in run(None)]
    for config in configs:
        first, second = run(config), run(config)
        same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
        off = [(a.float() - b).norm() / b.norm() for a, b in zip(first, expected, strict=True)]
        if not same[-1] or max(off) > 0.01:
            raise AssertionError(f"{config}: two runs agree {same}, distance from cuDNN {off}")
    return {"times": rounds([functools.partial(run, config) for config in configs])}


def worker() -> None:
    """Child process: reads jobs (JSON lines), writes results (JSON lines)."""
    from vbcompile.kernels.attention_hopper import ForwardConfig
    from vbcompile.kernels.attention_hopper_gradients import BackwardConfig

    for line in sys.stdin:
        job = json.loads(line)
        kind = ForwardConfig if job["way"] == "forward" else BackwardConfig
        configs = [kind(**c) if c else None for c in job["configs"]]
        try:
            if job["kind"] == "check":
                result = check(job["way"], job["dim"], configs[0])
            else:
                result = measure(job["way"], job["shape"], configs)
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
    parser.add_argument("--set", choices=("shipped", "explore", "narrow"), default="shipped")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--worker", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    deadline = time.monotonic() + arguments.seconds
    checks = [
        {"kind": "check", "way": way, "dim": dim, "configs": [asdict(c)]}
        for way, dim, configs in variants(arguments.set)
        for c in configs
    ]
    with ThreadPoolExecutor(12) as pool:
        checked = [r for rs in pool.map(lambda job: run_child([job], 60), checks) for r in rs]
    for job in checked:
        if "error" in job:
            print("FAILED", job["way"], job["dim"], job["configs"], job["error"])
    print(f"checked, {deadline - time.monotonic():.0f} s left", flush=True)
    results = list(checked)
    for way, dim, _ in variants(arguments.set):
        fit = [j["configs"][0] for j in checked if "error" not in j and (j["way"], j["dim"]) == (way, dim)]
        jobs = [
            {"kind": "time", "way": way, "shape": shape, "configs": [None, *fit]} for shape in SHAPES if shape[3] == dim
        ]
        for result in run_child(jobs, min(max(deadline - time.monotonic(), 5), 60)):
            results.append(result)
            show(result)
    record.write("attention_hopper", summary(results) if arguments.set == "shipped" else results)


def summary(results: list[dict]) -> list[dict]:
    """Shipped configurations beside cuDNN, TFLOP/s of medians over the rounds."""
    from vbcompile.kernels import attention_hopper as hopper
    from vbcompile.kernels import attention_hopper_gradients as gradients

    tables = {"forward": hopper.FORWARD_CONFIGS, "backward": gradients.BACKWARD_CONFIGS}
    rows = []
    for result in results:
        if not result.get("times"):
            continue
        batch, heads, length, dim, causal, *_ = result["shape"]
        shipped = asdict(tables[result["way"]][dim, causal])
        ours, peer = (
            statistics.median(t)
            for wanted in (shipped, None)
            for t, c in zip(result["times"], result["configs"], strict=True)
            if c == wanted
        )
        flops = (4 if result["way"] == "forward" else 10) * batch * heads * length**2 * dim * (0.5 if causal else 1)
        rows.append(
            {
                "shape": f"{batch},{heads},{length},{dim}",
                "causal": causal,
                "direction": result["way"],
                "ours_tflops": round(flops / ours / 1e9, 1),
                "cudnn_tflops": round(flops / peer / 1e9, 1),
                "ratio": round(peer / ours, 3),
            }
        )
    return rows


def show(result: dict) -> None:
    """One row per configuration of one shape, the fastest first: median and range over the rounds."""
    way = result["way"]
    batch, heads, length, dim, causal, *wanted = result["shape"]
    print(f"{way} {batch},{heads},{length},{dim} causal {causal} wanted {wanted} {result.get('error', '')[-500:]}")
    flops = (4 if way == "forward" else 10) * batch * heads * length**2 * dim * (0.5 if causal else 1)
    rows = sorted(
        zip(result.get("times", []), result["configs"], strict=False), key=lambda row: statistics.median(row[0])
    )
    for times, c in rows:
        rates = [flops / t / 1e9 for t in (statistics.median(times), max(times), min(times))]
        name = (
            "cuDNN"
            if c is None
            else " ".join(f"{key[:4]}{value if isinstance(value, str) else int(value)}" for key, value in c.items())
        )
        print(f"  {name:70s} {rates[0]:6.1f} ({rates[1]:5.1f} .. {rates[2]:5.1f}) TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
