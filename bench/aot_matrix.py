"""Every shipped Triton kernel, compiled ahead of time for every target: registers, spills, shared memory, instructions.

    python bench/aot_matrix.py [--jobs N] [--arch ARCH ...]

Needs no GPU. Writes bench/results/aot_matrix.json; docs/targets.md is made from it by bench/readme_tables.py.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import record  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100")
ATTENTION = [(128, "bfloat16"), (64, "bfloat16"), (256, "bfloat16"), (64, "float32"), (128, "float32")]
FP4_ROWS = (1, 16, 64, 256)
MARKS = ("wgmma", "cp.async.bulk.tensor", "tcgen05", "mma.sync", "v_mfma_scale", "v_mfma", "v_wmma")


def compile_one(job: tuple[str, str, int, Any]) -> list[dict[str, Any]]:
    """Rows of one job, ``(family, arch, size, dtype or format)``; a kernel that does not compile has ``error``."""
    from triton_aot import compile_launch

    family, arch, size, kind = job
    launches, refused = _attention(arch, size, kind) if family == "attention" else _fp4(arch, size, kind)
    same = {"family": family, "arch": arch, "size": size, "kind": kind}
    rows = [{**same, "kernel": name, "refused": reason} for name, reason in refused.items()]
    for launch in launches:
        row: dict[str, Any] = {**same, "kernel": launch.kernel.__name__}
        try:
            report = compile_launch(launch, arch)
            text = report.assembly.get("ptx") or report.assembly["amdgcn"]
            row |= {"registers": report.registers, "spills": report.spills, "shared": report.shared}
            row["instructions"] = [mark for mark in MARKS if mark in text]
        except Exception as error:  # noqa: BLE001 - a row of the table
            row["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
        rows.append(row)
    return rows


def _attention(arch: str, head_size: int, kind: str) -> tuple[list[Any], dict[str, str]]:
    """Launches, and for the kernels of a direction that the registry refuses, why."""
    import torch
    from attention_aot import record_launches

    from vbcompile.kernels.attention_triton import BACKWARD_KERNELS, FORWARD_KERNELS
    from vbcompile.kernels.attention_tuning import refuses_tiles

    dtype = getattr(torch, kind)
    reasons = [refuses_tiles(arch, names, dtype.itemsize, head_size) for names in (FORWARD_KERNELS, BACKWARD_KERNELS)]
    refused = {
        f"attention_{name}_kernel": reason
        for names, reason in zip((FORWARD_KERNELS, BACKWARD_KERNELS), reasons, strict=True)
        for name in names
        if reason
    }
    return [] if reasons[0] else record_launches(arch, head_size, dtype, backward=not reasons[1]), refused


def _fp4(arch: str, rows: int, format_name: str) -> tuple[list[Any], dict[str, str]]:
    import torch
    from test_fp4_aot import product_launch

    return [product_launch(arch, rows, torch.bfloat16, format_name)], {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    options = parser.parse_args()
    jobs = [("attention", arch, size, kind) for arch in options.arch for size, kind in ATTENTION]
    jobs += [("fp4_linear", arch, m, kind) for arch in options.arch for m in FP4_ROWS for kind in ("nvfp4", "mxfp4")]
    start, rows = time.perf_counter(), []
    with ProcessPoolExecutor(options.jobs) as pool:
        for found in pool.map(compile_one, jobs):
            rows += found
            for row in found:
                problem = row.get("error") or row.get("refused") or (f"spills {row['spills']}" if row["spills"] else "")
                if problem:
                    print(row["arch"], row["kernel"], row["size"], row["kind"], problem, flush=True)
    failed, refused = (sum(what in row for row in rows) for what in ("error", "refused"))
    seconds = time.perf_counter() - start
    print(f"{len(rows) - failed - refused} compiled, {refused} refused, {failed} failed in {seconds:.0f} s")
    print(record.write("aot_matrix", rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
