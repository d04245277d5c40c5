"""Backward of attention with score functions on a Hopper GPU: our Hopper kernel, the general ones, FlexAttention.

    python bench/attention_scores_backward.py check [--jobs N]   every form, errors of all gradients against eager's
    python bench/attention_scores_backward.py time [--jobs N]    times, to attention_scores_backward.json
    python bench/attention_scores_backward.py warm [--jobs N]    compiles what ``time`` runs into the disk caches
    --explore: other configurations of our kernel, too

TFLOP/s count 10 * D operations for every element of the tiles (128 x 128) that the mask needs; medians of CUDA-graph
replays, one measurement at a time. ``both`` is forward and backward.
"""

import argparse
import fcntl
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import record
from attention_scores import (
    LONG,
    NARROW,
    SMALL,
    WIDE,
    check_jobs,
    flex_run,
    form_of,
    inputs,
    problem,
    refusal,
    rounds,
    row_of,
    verdict,
)

CASES = [(LONG, "documents_8"), (LONG, "window_1024")]
CASES += [(shape, case) for case in ("softcap", "bias", "alibi_causal", "causal", "plain") for shape in (WIDE, NARROW)]
CASES += [(LONG, "causal"), (LONG, "plain")]
CASES += [(SMALL, case) for case in ("softcap", "bias", "alibi_causal")]
KINDS = ("hopper_backward", "hopper_both", "general_backward", "flex_both")
BIAS_GRADIENT = "bias_gradient"  # the gradient of the bias is wanted, too
CASES += [(shape, BIAS_GRADIENT) for shape in (WIDE, NARROW)]


def own_run(shape: tuple, case: str, kind: str, changes: dict[str, Any] | None) -> Callable[[], Any]:
    """Our backward, Hopper's or the general, or forward and backward; ``changes`` to the shipped configuration."""
    from vbcompile.kernels import attention_gpu
    from vbcompile.kernels import attention_hopper_gradients as gradients

    q, k, v, grad = inputs(shape)
    function, captured, *_ = problem(shape, case.removesuffix("_gradient"))
    arguments = (shape[3] ** -0.5, 0.0, None, function.dumps())
    needs = [True] * 3 + [case == BIAS_GRADIENT] * len(captured)
    out, lse = attention_gpu.hopper_forward(q, k, v, captured, *arguments)
    backward = attention_gpu.triton_backward if kind == "general_backward" else attention_gpu.hopper_backward
    shipped, plain = gradients.scored_config, gradients.BACKWARD_CONFIGS
    scored = lambda *of: replace(shipped(*of), **(changes or {}))
    changed = {key: replace(config, **(changes or {})) for key, config in plain.items()}

    def run() -> Any:
        given = (out, lse)
        if kind == "hopper_both":
            given = attention_gpu.hopper_forward(q, k, v, captured, *arguments)
        with patch.object(gradients, "scored_config", scored), patch.object(gradients, "BACKWARD_CONFIGS", changed):
            return backward(grad, None, q, k, v, captured, *given, *arguments, needs)

    return run


def jobs_of(kinds: Sequence[str], explore: bool) -> list[tuple]:
    """(shape, case, kind, changes to the shipped configuration or None)."""
    jobs: list[tuple] = [(*case, kind, None) for kind in kinds for case in CASES]
    no_peer = (BIAS_GRADIENT, "plain", "causal")
    jobs = [job for job in jobs if job[2] != "flex_both" or (job[1] not in no_peer and job[0] != SMALL)]
    if explore:
        narrow = [(NARROW, case) for case in ("softcap", "bias", "alibi_causal", "causal", "plain")]
        jobs += [(*case, "hopper_backward", {"dynamic": False}) for case in narrow]
        long = [(LONG, case) for case in ("documents_8", "window_1024")]
        tries = ({"k_stages": 1}, {"group": 16}, {"k_stages": 1, "dynamic": False})
        jobs += [(*case, "hopper_backward", changes) for case in long for changes in tries]
        jobs += [(LONG, "causal", "hopper_backward", {"dynamic": False})]
    return jobs


def measured(job: tuple[tuple, str, str, dict[str, Any] | None, bool]) -> dict[str, Any]:
    """A row of results, or with ``failure``; ``warm``: without a measurement."""
    import torch

    shape, case, kind, changes, warm = job
    try:
        with open(Path(tempfile.gettempdir()) / "attention_scores.lock", "w") as lock:
            if not warm:
                fcntl.flock(lock, fcntl.LOCK_EX)
            run = flex_run(shape, case, True) if kind == "flex_both" else own_run(shape, case, kind, changes)
            run()
            torch.cuda.synchronize()
            if warm:
                return {"shape": shape, "case": case, "kind": kind}
            row = row_of(kind, shape, case.removesuffix("_gradient"), None, statistics.median(rounds([run])[0]))
            return row | {"case": case, "config": changes}
    except Exception as failure:  # noqa: BLE001 - reported, the other cases go on
        return {"shape": shape, "case": case, "kind": kind, "failure": f"{type(failure).__name__}: {failure}"[-400:]}


def checked(job: tuple[int, str]) -> dict[str, Any]:
    """Errors of the gradients of one form, captured tensors' included where the kernels give them."""
    from attention_compare import compare

    from vbcompile.kernels.attention_gpu import hopper_backward, hopper_forward

    form, dtype, row = form_of(job)
    for gradients in (True, False):
        if not (reason := refusal(form, dtype, gradients)):
            run = (hopper_forward, hopper_backward)
            return row | verdict(lambda: compare(form, dtype, range(2), run, gradients))  # noqa: B023 - called at once
    return row | {"ok": True, "refused": reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "time", "warm"))
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--explore", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    options = parser.parse_args()
    work: Callable[[Any], dict[str, Any]] = measured
    jobs: list[Any] = [(*job, options.what == "warm") for job in jobs_of(options.kinds, options.explore)]
    name = "attention_scores_backward"
    if options.what == "check":
        work, jobs, name = checked, check_jobs(), "attention_scores_backward_check"
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            row = future.result()
            print(row, flush=True)
            if "failure" not in row:
                rows.append(row)
            if options.what != "warm":
                record.write(name, rows)


if __name__ == "__main__":
    main()
