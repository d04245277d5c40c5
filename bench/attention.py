"""Triton attention on a GPU: checks against float64, tuning sweeps, and tables beside PyTorch's own kernels.

    python bench/attention.py check [--jobs N]      every form of score function, error against eager PyTorch's
    python bench/attention.py sweep [--jobs N]      tile shapes of each kernel
    python bench/attention.py table [--flex]        forward and backward beside cuDNN, flash SDPA and FlexAttention

Times are medians of CUDA-graph replays. TFLOP/s count 4 * B * H * Q * K * D operations forward and 2.5 times that
backward, half of it where causal.
"""

import argparse
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import record
from attention_scores import NOT_IN_HALF, verdict

SHAPES = [  # B, H, S, D, causal
    (4, 16, 4096, 128, False),
    (4, 16, 4096, 128, True),
    (1, 16, 16384, 128, False),
    (1, 16, 16384, 128, True),
    (8, 16, 2048, 64, False),
    (8, 16, 2048, 64, True),
]
CHECKS = [  # Q, K, D, Dv, dtype, only these forms
    (512, 640, 128, 128, "bfloat16", None),
    (150, 170, 80, 48, "float32", None),
    (300, 420, 64, 64, "float16", ("causal", "window", "bias", "alibi", "sink", "grouped", "rows_first", "dropout")),
    (200, 264, 256, 256, "bfloat16", ("plain", "causal", "bias", "softcap", "grouped")),
    (256, 256, 192, 128, "float16", ("plain", "causal", "document_causal", "bias")),
]

TILES = {  # block_q, block_k, warps, stages, descriptors
    ("forward", 128): [(128, 128, 8, 3, 1), (128, 64, 4, 2, 1), (64, 64, 4, 3, 1), (64, 64, 4, 2, 1)],
    ("forward", 64): [(128, 128, 4, 3, 1), (128, 64, 4, 3, 1), (128, 64, 4, 2, 1), (64, 128, 4, 2, 1)],
    ("grad_q", 128): [(128, 64, 8, 3, 1), (64, 64, 4, 2, 1), (128, 32, 4, 3, 1)],
    ("grad_q", 64): [(128, 64, 4, 3, 1), (64, 64, 4, 3, 1), (64, 64, 4, 4, 1)],
    ("grad_kv", 128): [(64, 128, 8, 2, 1), (64, 128, 8, 3, 1), (64, 64, 4, 2, 1)],
    ("grad_kv", 64): [(64, 128, 8, 3, 1), (64, 64, 4, 2, 1), (64, 64, 4, 3, 1), (32, 128, 4, 3, 1)],
}  # fmt: skip
HEAVY_TILES = {  # the same where a bias or a function enters the scores
    ("forward", 128): [(128, 64, 8, 3, 1), (128, 128, 8, 2, 1), (128, 64, 4, 2, 1), (64, 64, 4, 3, 1),
                       (128, 64, 8, 2, 1)],
    ("forward", 64): [(128, 64, 4, 3, 1), (128, 128, 8, 2, 1), (128, 64, 8, 3, 1), (64, 64, 4, 3, 1),
                      (128, 128, 4, 2, 1)],
    ("grad_q", 128): [(128, 64, 8, 2, 1), (64, 64, 4, 2, 1)],
    ("grad_q", 64): [(128, 64, 4, 3, 1), (64, 64, 4, 3, 1), (128, 64, 8, 2, 1)],
    ("grad_kv", 128): [(64, 64, 4, 2, 1), (64, 128, 8, 2, 1), (32, 128, 8, 2, 1)],
    ("grad_kv", 64): [(64, 64, 4, 3, 1), (64, 128, 8, 2, 1), (32, 128, 8, 3, 1)],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- check
def check_one(job: tuple[int, str]) -> dict[str, Any]:
    from attention_compare import compare
    from attention_forms import make_forms

    number, name = job
    *sizes, dtype, _ = CHECKS[number]
    row: dict[str, Any] = {"sizes": sizes, "dtype": dtype, "form": name}
    return row | verdict(lambda: compare(make_forms(*sizes)[name], getattr(torch, dtype), seeds=range(4)))


def check(jobs: int) -> list[dict[str, Any]]:
    from attention_forms import make_forms

    todo = []
    for number, (*sizes, dtype, only) in enumerate(CHECKS):
        names = only or make_forms(*sizes)
        todo += [(number, name) for name in names if dtype == "float32" or name not in NOT_IN_HALF]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(check_one, todo))
    for row in rows:
        if not row["ok"]:
            print("WRONG", row)
    print(f"check: {sum(r['ok'] for r in rows)} of {len(rows)} right")
    return rows


# ----------------------------------------------------------------------------------------------------- time
def milliseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=30, return_mode="median")


def operations(b: int, h: int, s: int, d: int, causal: bool) -> float:
    return 4 * b * h * s * s * d * (0.5 if causal else 1.0)


def tensors(b: int, h: int, s: int, d: int) -> list[torch.Tensor]:
    return [torch.randn(b, h, s, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def function_of(causal: bool):
    import attention_forms as forms

    return forms.make_function(mask=forms.causal()) if causal else forms.make_function()


def heavy_function(name: str):
    import attention_forms as forms

    step = forms.plus(0) if name == "bias" else forms.softcap(30.0)
    return forms.make_function(step)


def one_kernel(kernel: str, shape: tuple, tiles: tuple, heavy: str = "") -> Callable[[], Any]:
    """A call of one kernel with given tiles; ``heavy`` names a score function instead of a plain or causal one."""
    from vbcompile.kernels import attention_gradients, attention_problem, attention_triton
    from vbcompile.kernels.attention_tuning import TileConfig, forced_tiles

    b, h, s, d, causal = shape
    q, k, v, grad = tensors(b, h, s, d)
    function, scale = heavy_function(heavy) if heavy else function_of(causal), d**-0.5
    captured = [torch.randn(1, h, s, s, device="cuda", dtype=q.dtype)] if heavy == "bias" else []
    config = TileConfig(*tiles[:4], bool(tiles[4]))

    def run() -> Any:
        with forced_tiles(**{kernel: config}):
            if kernel == "forward":
                return attention_triton.forward(q, k, v, captured, scale, 0.0, None, function)
            return getattr(backward, kernel)(True)

    if kernel != "forward":
        out, lse = attention_triton.forward(q, k, v, captured, scale, 0.0, None, function)
        problem = attention_problem.describe(q, k, v, captured, scale, 0.0, function)
        backward = attention_gradients.Backward(problem, q, k, v, captured, (), grad, lse, scale, 0.0, None, function)
        backward.rows(None, out)
    return run


def warm(job: tuple) -> str | None:
    """Compile one candidate into Triton's disk cache; the reason if it fails."""
    try:
        one_kernel(*job)()
        torch.cuda.synchronize()
    except Exception as failure:  # noqa: BLE001 - a candidate that does not fit is a result
        return f"{type(failure).__name__}: {str(failure)[:160]}"
    return None


def sweep(jobs: int) -> list[dict[str, Any]]:
    plain = [SHAPES[0], SHAPES[1], SHAPES[4], SHAPES[5]]
    todo: list[tuple] = [(kernel, shape, tiles, "") for (kernel, d), candidates in TILES.items() for shape in plain
                         if shape[3] == d for tiles in candidates]  # fmt: skip
    todo += [(kernel, shape, tiles, heavy) for (kernel, d), candidates in HEAVY_TILES.items()
             for heavy in ("bias", "softcap") for shape in (SHAPES[0], SHAPES[4])
             if shape[3] == d for tiles in candidates]  # fmt: skip
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = list(pool.map(warm, todo))
    rows = []
    for (kernel, shape, tiles, heavy), failure in zip(todo, failures, strict=True):
        row: dict[str, Any] = {"kernel": kernel, "shape": shape, "tiles": tiles, "function": heavy}
        if failure is None:
            ms = milliseconds(one_kernel(kernel, shape, tiles, heavy))
            share = {"forward": 1.0, "grad_q": 1.5, "grad_kv": 2.0}[kernel]
            row |= {"ms": ms, "tflops": operations(*shape) * share / ms / 1e9}
        else:
            row["failure"] = failure
        rows.append(row)
        print(kernel, shape, tiles, heavy, failure or f"{row['ms']:.3f} ms {row['tflops']:.0f}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------- table
def sdpa(backend: SDPBackend, q, k, v, causal: bool):
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def forward_and_backward(run: Callable[..., torch.Tensor], q, k, v, grad) -> tuple[float, float]:
    """Milliseconds of an autograd function forward and backward (both together less the first: one graph each)."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    forward_ms = milliseconds(lambda: run(q, k, v))
    both = milliseconds(lambda: torch.autograd.grad(run(*leaves), leaves, grad))
    return forward_ms, both - forward_ms


def ours_times(function, captured, q, k, v, grad, scale) -> tuple[float, float]:
    from vbcompile.kernels.attention_triton import backward, forward

    needs = [True] * 3 + [False] * len(captured)
    out, lse = forward(q, k, v, captured, scale, 0.0, None, function)
    return (
        milliseconds(lambda: forward(q, k, v, captured, scale, 0.0, None, function)),
        milliseconds(lambda: backward(grad, None, q, k, v, captured, out, lse, scale, 0.0, None, function, needs)),
    )


def flex(q, k, v, causal: bool):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[-2], k.shape[-2])
    return functools.partial(compiled, block_mask=mask)


def table(with_flex: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        b, h, s, d, causal = shape
        q, k, v, grad = tensors(b, h, s, d)
        peers = {
            "cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION, causal=causal),
            "flash2": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION, causal=causal),
        }
        if with_flex:
            torch._dynamo.reset()
            peers["flex"] = flex(q, k, v, causal)
        times = {"ours": ours_times(function_of(causal), [], q, k, v, grad, d**-0.5)}
        times |= {name: forward_and_backward(run, q, k, v, grad) for name, run in peers.items()}
        count = operations(*shape)
        for name, (forward_ms, backward_ms) in times.items():
            row = {"shape": shape, "kernel": name, "forward": count / forward_ms / 1e9,
                   "backward": 2.5 * count / backward_ms / 1e9, "forward_ms": forward_ms,
                   "backward_ms": backward_ms}  # fmt: skip
            rows.append(row)
            print(shape, name, f"{row['forward']:.0f} / {row['backward']:.0f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("check", "sweep", "table"))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--flex", action="store_true")
    options = parser.parse_args()
    actions = {
        "check": lambda: check(options.jobs),
        "sweep": lambda: sweep(options.jobs),
        "table": lambda: table(options.flex),
    }
    for what in options.what:
        begin = time.time()
        record.write(f"attention_{what}", actions[what]())
        print(f"{what}: {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
