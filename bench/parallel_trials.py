"""Trials in several processes at once, each with caches of its own, until they are done or time is up."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

import torch


def run_in_parallel(run: Callable[..., Any], trials: Sequence[tuple[Any, ...]], jobs: int, seconds: float) -> list[Any]:
    """``run(*trial)`` for every trial, taken in their order by ``jobs`` processes.

    Args:
        run: a function of a module that can be imported; its results and arguments are pickled.
        seconds: no result is waited for beyond this; 0: as long as it takes.

    Returns:
        The results that came in time, in no order.

    Raises:
        RuntimeError: a process ended with trials left (``run`` raised, or crashed it).
    """
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for item in [*trials, *(None for _ in range(jobs))]:
        todo.put(item)
    workers = [context.Process(target=_work, args=(run, todo, done), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        return _collect(done, workers, len(trials), time.monotonic() + seconds if seconds else float("inf"))
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _collect(done: Any, workers: Sequence[Any], count: int, deadline: float) -> list[Any]:
    results: list[Any] = []
    while len(results) < count and time.monotonic() < deadline:
        try:
            results.append(done.get(timeout=0.5))
        except Empty:
            broken = [w.exitcode for w in workers if w.exitcode]
            if broken:
                raise RuntimeError(f"{len(broken)} processes ended early, exit codes {broken}") from None
    return results


def _work(run: Callable[..., Any], todo: Any, done: Any) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)  # the processes share the cores
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        while (trial := todo.get()) is not None:
            done.put(run(*trial))
