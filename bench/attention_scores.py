"""Attention with score functions on a Hopper GPU: our Hopper kernel beside the general one and FlexAttention.

    python bench/attention_scores.py check [--jobs N]              every form, error against eager PyTorch's
    python bench/attention_scores.py time [--explore] [--jobs N]   TFLOP/s, written to attention_scores.json

Times are medians over rounds of CUDA-graph replays in random order. TFLOP/s count 4 * D operations for every element
of the tiles (128 x 128) that the mask needs, and 2.5 times that backward; ``elements`` counts the elements themselves.
"""

import argparse
import fcntl
import functools
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import record

WIDE, NARROW, LONG = (4, 16, 4096, 128), (8, 16, 2048, 64), (1, 16, 16384, 128)  # B, H, S, D
CASES = [(shape, case) for shape in (WIDE, NARROW) for case in ("plain", "causal", "bias", "softcap", "alibi_causal")]
CASES += [(LONG, case) for case in ("plain", "causal", "window_1024", "documents_8")]
SMALL = (16, 12, 512, 64)  # for the choice between our own two kernels
CASES += [(SMALL, case) for case in ("plain", "bias", "softcap", "alibi_causal")]
FEW = (
    "causal_empty_rows",
    "window",
    "prefix",
    "document",
    "bool_mask",
    "bias",
    "softcap",
    "alibi",
    "sink",
    "grouped_bias",
)
CHECKS = [  # Q, K, D, dtype, only these forms
    (512, 640, 128, "bfloat16", None),
    (300, 424, 64, "bfloat16", None),
    (333, 264, 64, "float16", FEW),
    (1100, 1032, 128, "float16", FEW),
]
NOT_IN_HALF = ("additive_min",)  # eager PyTorch rounds float32's minimum to -inf there
ROUNDS, ROUND_MS, TILE = 3, 12.0, 128
CHECK_SECONDS, WARM_SECONDS, CASE_SECONDS = 50.0, 60.0, 15.0  # the last includes a process's start


def in_parallel(work: Callable[[tuple], Any], todo: list[tuple], jobs: int, limit: float) -> list[Any]:
    """Results in processes of their own; None for those that did not end within ``limit`` seconds, which are killed."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    futures = [pool.submit(work, job) for job in todo]
    wait(futures, timeout=limit)
    results = [f.result() if f.done() and f.exception() is None else None for f in futures]
    stuck = not all(f.done() for f in futures)
    pool.shutdown(wait=not stuck, cancel_futures=True)
    if stuck:
        for child in multiprocessing.active_children():
            child.kill()
    return results


# ---------------------------------------------------------------------------------------------------- check
def check_jobs() -> list[tuple[int, str]]:
    """Every form to check, ``(number in CHECKS, name)``."""
    from attention_forms import make_forms

    todo = [(n, name) for n, (q, k, d, _, only) in enumerate(CHECKS) for name in only or make_forms(q, k, d, d)]
    return [job for job in todo if job[1] not in NOT_IN_HALF]


def form_of(job: tuple[int, str]) -> tuple[Any, torch.dtype, dict[str, Any]]:
    """The form of a job, its dtype, and the beginning of its row."""
    from attention_forms import make_forms

    number, name = job
    queries, keys, dim, dtype, _ = CHECKS[number]
    row = {"sizes": (queries, keys, dim), "dtype": dtype, "form": name}
    return make_forms(queries, keys, dim, dim)[name], getattr(torch, dtype), row


def refusal(form: Any, dtype: torch.dtype, gradients: bool | None = None) -> str | None:
    """Why the Hopper kernels do not take a form: forward, or backward with the gradients of captured tensors or not."""
    from vbcompile.device import get_target
    from vbcompile.kernels.attention_case import make_case
    from vbcompile.kernels.attention_gpu import refuses_hopper

    (q, k, v), captured = form.inputs(dtype)
    q, k, v, *captured = (t.cuda() for t in (q, k, v, *captured))
    needs = () if gradients is None else [True] * 3 + [gradients and c.is_floating_point() for c in captured]
    case = make_case(q, k, v, captured, form.scale, form.dropout_p, form.function.dumps(), needs)
    return refuses_hopper(get_target(q.device), case)


def verdict(compared: Callable[[], list[Any]]) -> dict[str, Any]:
    """Whether every ``(name, error, allowed)`` is in bounds, and the largest error in units of eager's."""
    try:
        found = compared()
    except Exception as failure:  # noqa: BLE001 - reported in the table, the others go on
        return {"ok": False, "wrong": f"{type(failure).__name__}: {str(failure)[-400:]}"}
    wrong = [r for r in found if not r[1] <= r[2]]
    return {
        "ok": not wrong,
        "wrong": wrong,
        "ratio": max(2 * r[1] / r[2] for r in found if r[2]),
        "compared": len(found),
    }


def check_one(job: tuple[int, str]) -> dict[str, Any]:
    from attention_compare import compare_forward

    from vbcompile.kernels.attention_gpu import hopper_forward

    form, dtype, row = form_of(job)
    if reason := refusal(form, dtype):
        return row | {"ok": True, "refused": reason}
    return row | verdict(lambda: compare_forward(form, dtype, hopper_forward, seeds=range(3)))


def check(jobs: int) -> bool:
    todo = check_jobs()
    rows = [
        row or {"job": job, "ok": False, "wrong": "did not end"}
        for job, row in zip(todo, in_parallel(check_one, todo, jobs, CHECK_SECONDS), strict=True)
    ]
    for row in rows:
        if not row["ok"]:
            print("WRONG", row)
    refused = sorted({f"{r['form']}: {r['refused']}" for r in rows if "refused" in r})
    print(f"check: {sum(r['ok'] for r in rows)} of {len(rows)} right, refused: {refused}", flush=True)
    print("ratios", {r["form"]: round(r["ratio"], 2) for r in rows if r.get("ratio", 0) > 1.2})
    record.write("attention_scores_check", rows)
    return all(r["ok"] for r in rows)


# ----------------------------------------------------------------------------------------------------- time
def problem(shape: tuple, case: str):
    """(function, captured tensors, share of elements, share of tiles)."""
    import attention_forms as forms

    _, h, s, _ = shape
    tiles = s // TILE
    both = lambda builder: builder.emit("and", forms.causal()(builder), forms.same_document(builder))
    if case == "bias":
        return forms.make_function(forms.plus(0)), [torch.randn(1, h, s, s, device="cuda").bfloat16()], 1.0, 1.0
    if case == "softcap":
        return forms.make_function(forms.softcap(30.0)), [], 1.0, 1.0
    if case == "alibi_causal":
        function = forms.make_function(forms.alibi, mask=forms.causal())
        return function, [torch.rand(1, h, 1, 1, device="cuda")], 0.5, 0.5 * (tiles + 1) / tiles
    if case == "window_1024":
        width = 1024 // TILE
        computed = (width + 1) * tiles - width * (width + 1) / 2
        return forms.make_function(mask=forms.window(1024)), [], 1024 / s, computed / tiles**2
    if case == "documents_8":
        documents = torch.arange(s, device="cuda").div(s // 8, rounding_mode="floor").to(torch.int32)
        captured = [documents.view(1, 1, s, 1), documents.view(1, 1, 1, s)]
        return forms.make_function(mask=both), captured, 0.5 / 8, 0.5 / 8 * (tiles / 8 + 1) / (tiles / 8)
    if case == "causal":
        return forms.make_function(mask=forms.causal()), [], 0.5, 0.5 * (tiles + 1) / tiles
    return forms.make_function(), [], 1.0, 1.0


def inputs(shape: tuple) -> list[torch.Tensor]:
    torch.manual_seed(shape[2])
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def configs(shape: tuple, case: str, explore: bool) -> list[Any]:
    """Configurations of the Hopper kernel to try; None is the shipped one."""
    from vbcompile.kernels.attention_hopper import SCORED_CONFIGS

    if not explore or case in ("plain", "causal"):
        return [None]
    narrow = shape[3] == 64
    base = SCORED_CONFIGS[shape[3], case == "bias"]
    tries = [replace(base, rounding=r) for r in ("next", "early", "halfway") if r != base.rounding]
    if case == "softcap":
        tries.append(replace(base, poly=2))
    elif case == "alibi_causal":
        tries.append(replace(base, ping_pong=0))
    elif case == "bias":
        tries += [replace(base, t_stages=2)] * narrow
    else:
        tries += [replace(base, group=n) for n in (1, 8)]
    return [None, *tries]


def hopper_run(shape: tuple, case: str, config: Any) -> Callable[[], Any]:
    from vbcompile.kernels import attention_hopper
    from vbcompile.kernels.attention_hopper_call import describe_call

    q, k, v, _ = inputs(shape)
    function, captured, *_ = problem(shape, case)
    scale = shape[3] ** -0.5
    if case in ("plain", "causal"):
        return lambda: attention_hopper.forward(q, k, v, scale, 0 if case == "causal" else None, False)

    def run() -> Any:
        call = describe_call(q, k, captured, shape[:2], scale, function)
        return attention_hopper.forward(q, k, v, scale, None, False, config, call)

    return run


def general_run(shape: tuple, case: str, backward: bool) -> Callable[[], Any]:
    from vbcompile.kernels import attention_triton

    q, k, v, grad = inputs(shape)
    function, captured, *_ = problem(shape, case)
    arguments = (captured, shape[3] ** -0.5, 0.0, None, function)
    if not backward:
        return lambda: attention_triton.forward(q, k, v, *arguments)
    out, lse = attention_triton.forward(q, k, v, *arguments)
    captured, *rest = arguments
    needs = [True] * 3 + [False] * len(captured)
    return lambda: attention_triton.backward(grad, None, q, k, v, captured, out, lse, *rest, needs)


def flex_function(shape: tuple, case: str) -> tuple[Any, Any]:
    """(score function, block mask) of FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    _, captured, *_ = problem(shape, case)
    s = shape[2]
    block = functools.partial(create_block_mask, B=None, H=None, Q_LEN=s, KV_LEN=s)
    if case == "bias":
        bias = captured[0]
        return lambda score, b, h, i, j: score + bias[0, h, i, j], None
    if case == "softcap":
        return lambda score, b, h, i, j: torch.tanh(score / 30.0) * 30.0, None
    if case == "alibi_causal":
        slopes = captured[0].view(-1)
        return lambda score, b, h, i, j: score + (j - i) * slopes[h], block(lambda b, h, i, j: i >= j)
    if case == "causal":
        return None, block(lambda b, h, i, j: i >= j)
    if case == "window_1024":
        return None, block(lambda b, h, i, j: (i >= j) & (i - j < 1024))
    if case == "documents_8":
        documents = captured[0].view(-1)
        return None, block(lambda b, h, i, j: (i >= j) & (documents[i] == documents[j]))
    return None, None


def flex_run(shape: tuple, case: str, backward: bool) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    q, k, v, grad = inputs(shape)
    score, mask = flex_function(shape, case)
    compiled = torch.compile(flex_attention, dynamic=False)
    if not backward:
        return lambda: compiled(q, k, v, score_mod=score, block_mask=mask)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(compiled(*leaves, score_mod=score, block_mask=mask), leaves, grad)


PEERS: dict[str, Callable[..., Callable[[], Any]]] = {
    "flex_both": functools.partial(flex_run, backward=True),  # those that compile longest go first
    "flex": functools.partial(flex_run, backward=False),
    "general": functools.partial(general_run, backward=False),
    "general_backward": functools.partial(general_run, backward=True),
}


def call(job: tuple[Callable[..., Any], Any]) -> Any:
    function, argument = job
    return function(argument)


def peer_ms(job: tuple[str, tuple, str]) -> float | str:
    """Median milliseconds of one of ``PEERS``, measured while no other is; the reason where it fails."""
    kind, shape, case = job
    try:
        run = PEERS[kind](shape, case)
        run()
        torch.cuda.synchronize()
        with open(Path(tempfile.gettempdir()) / "attention_scores.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return statistics.median(rounds([run])[0])
    except Exception as failure:  # noqa: BLE001 - a peer that does not run is a result
        return f"{type(failure).__name__}: {str(failure)[-300:]}"


def warm(job: tuple) -> str:
    """Compile one configuration into the disk cache; the reason if it fails."""
    try:
        hopper_run(*job)()
        torch.cuda.synchronize()
    except Exception as failure:  # noqa: BLE001 - a candidate that does not run is a result
        return f"{type(failure).__name__}: {str(failure)[-300:]}"
    return ""


def captured_graph(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def rounds(runs: list[Callable[[], Any]]) -> list[list[float]]:
    """Milliseconds of each, in rounds of random order: neighbours in time share the card's temperature."""
    graphs = [captured_graph(run) for run in runs]
    counts = [max(1, round(ROUND_MS / replay_ms(g, 2))) for g in graphs]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for n in random.sample(range(len(graphs)), len(graphs)):
            times[n].append(replay_ms(graphs[n], counts[n]))
    return times


def our_times(jobs: list[tuple]) -> list[list[float]]:
    """Milliseconds of each configuration in each round."""
    runs = [hopper_run(*job) for job in jobs]
    torch.cuda.empty_cache()
    return rounds(runs)


class Worker:
    """One process at a time that does what is asked, and is killed where that takes too long."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Callable[[Any], Any], argument: Any, limit: float) -> Any:
        """The result, or None where the work failed or did not end within ``limit`` seconds."""
        self._pool = self._pool or ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            return self._pool.submit(work, argument).result(timeout=limit)
        except Exception as failure:  # noqa: BLE001 - reported, the other cases go on
            print(f"{type(failure).__name__}: {failure}", flush=True)
            for child in multiprocessing.active_children():
                child.kill()
            self._pool = None
            return None


def measure(explore: bool, jobs: int) -> None:
    begin = time.time()
    peers = [(kind, *case) for kind in PEERS for case in CASES if case[0] != SMALL or kind == "general"]
    tries = [(shape, case, c) for shape, case in CASES for c in configs(shape, case, explore)]
    found = in_parallel(call, [*((peer_ms, p) for p in peers), *((warm, t) for t in tries)], jobs, WARM_SECONDS)
    peer_times = dict(zip(peers, found, strict=False))
    good = []
    for job, failure in zip(tries, found[len(peers) :], strict=True):
        if failure == "":
            good.append(job)
        else:
            print("FAILED", job, failure)
    print(f"compiled, peers measured: {time.time() - begin:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    worker = Worker()
    for shape, case in CASES:
        mine = [job for job in good if job[:2] == (shape, case)]
        times = worker.run(our_times, mine, CASE_SECONDS)
        if times is None:  # one by one: those that do not end cost nothing but themselves
            alone = [(job, worker.run(our_times, [job], CASE_SECONDS)) for job in mine]
            print("DID NOT END", [job for job, found in alone if found is None], flush=True)
            mine = [job for job, found in alone if found is not None]
            times = [found[0] for _, found in alone if found is not None]
        ours = [row_of("hopper", *job, statistics.median(t)) for job, t in zip(mine, times, strict=True)]
        theirs = {p[0]: ms for p, ms in peer_times.items() if p[1:] == (shape, case)}
        for kind, ms in theirs.items():
            if isinstance(ms, float):
                ours.append(row_of(kind, shape, case, None, ms))
            else:
                print("FAILED", kind, shape, case, ms)
        for row in ours:
            show(row)
        rows += ours
        record.write("attention_scores", rows)
    print(f"all: {time.time() - begin:.0f} s")


def row_of(kind: str, shape: tuple, case: str, config: Any, ms: float) -> dict[str, Any]:
    b, h, s, d = shape
    _, _, elements, tiles = problem(shape, case)
    count = 4 * b * h * s * s * d * (2.5 if "backward" in kind else 3.5 if "both" in kind else 1.0) / ms / 1e9
    return {"shape": shape, "case": case, "kind": kind, "config": asdict(config) if config else None, "ms": ms,
            "tflops": count * tiles, "elements": count * elements}  # fmt: skip


def show(row: dict[str, Any]) -> None:
    config = row["config"] or {}
    name = " ".join(f"{k[:4]}{v if isinstance(v, str) else int(v)}" for k, v in config.items()) or "shipped"
    print(row["shape"], row["case"], row["kind"], name if row["kind"] == "hopper" else "",
          f"{row['ms']:.3f} ms {row['tflops']:.0f} (elements {row['elements']:.0f})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("check", "time"))
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--explore", action="store_true")
    options = parser.parse_args()
    if "check" in options.what:
        check(options.jobs)
    if "time" in options.what:
        measure(options.explore, options.jobs)


if __name__ == "__main__":
    main()
