"""The shipped table of FP4 products: what ``vbcompile tune`` measures for the layers of common language models.

    python bench/fp4_tune.py [--shape NxK ...] [--rows M ...] [--into kernels/tuned/fp4_linear.json]

Kernels are compiled in processes beforehand, so that the measurement itself takes seconds.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record

from vbcompile import tune
from vbcompile.kernels import fp4_linear_triton
from vbcompile.kernels.registry import operator

LLAMA_8B = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (14336, 4096), (1024, 4096)]
_SHARES = 3  # processes for the candidates of one weight


def _compile(job: tuple[tuple[int, int], int, int]) -> None:
    """Launch one share of the candidates for a weight and a count of rows of x."""
    (n, k), m, share = job
    target = tune.check_device()
    (weight,) = tune.copies(n, k, "nvfp4", 1)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    for name, run, config in list(tune.candidates(target, m, n, k))[share::_SHARES]:
        try:
            run(x, *weight.tensors, None, k, "nvfp4", weight.layout, **({} if config is None else {"config": config}))
        except Exception as error:  # noqa: BLE001 - printed, the others go on
            print("does not run:", name, config, str(error)[:150], flush=True)
    torch.cuda.synchronize()


def compile_ahead(shapes: list[tuple[int, int]], rows: list[int]) -> None:
    # 5 to 8 rows run the same kernels, and so do all from 512 on
    distinct = sorted({m if m <= 4 else min(max(m, 8), 512) for m in rows}, reverse=True)
    jobs = [(shape, m, share) for m in distinct for share in range(_SHARES) for shape in shapes[:2]]
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=[f"{n}x{k}" for n, k in LLAMA_8B])
    parser.add_argument("--rows", type=int, nargs="+", default=list(tune.ROWS))
    parser.add_argument("--into", type=Path, help="table to write (default: the folder of results)")
    arguments = parser.parse_args()
    started = time.time()
    target = tune.check_device()
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in arguments.shape)]
    compile_ahead(shapes, arguments.rows)
    print(f"compiled: {time.time() - started:.0f} s", flush=True)
    fp4_linear_triton.prepare(torch.device("cuda", torch.cuda.current_device()))
    operator("fp4_linear").load()
    rows: list[list[Any]] = []
    path = arguments.into or record.folder() / "fp4_linear_tuned.json"
    for n, k in shapes:
        for row in tune.measure(target, "nvfp4", n, k, arguments.rows):
            rows.append(row)
            print(*row[:5], {name: tuple(found) for name, found in row[5].items()}, flush=True)
        content = {target.arch: {"device": target.name, **record.environment(), "rows": rows}}
        path.write_text(json.dumps(content) + "\n")
    print(f"{time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
