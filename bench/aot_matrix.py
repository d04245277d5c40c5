"""Every shipped Triton kernel, compiled ahead of time for every target: registers, spills, shared memory, instructions.

    python bench/aot_matrix.py [--jobs N] [--arch ARCH ...] [--family FAMILY ...]

Needs no GPU. Writes bench/results/aot_matrix.json; docs/targets.md is made from it by bench/readme_tables.py. With
``--family`` the rows of other families stay as an earlier run left them.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import record

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100")
ATTENTION = [(128, "bfloat16"), (64, "bfloat16"), (256, "bfloat16"), (64, "float32"), (128, "float32")]
FP4_ROWS = (1, 16, 64, 256)
COLUMNS = 14336
FP4_NATIVE = {"sm_100": ("nvfp4", "mxfp4"), "sm_120": ("nvfp4", "mxfp4"), "gfx950": ("mxfp4", "mxfp4, bf16 x")}
MARKS = (
    "wgmma", "cp.async.bulk.tensor", "tcgen05", "kind::mxf4nvf4", "kind::mxf4.", "mma.sync", "v_mfma_scale",
    "v_cvt_scalef32_pk", "v_mfma", "v_wmma",
)  # fmt: skip
FP4_QUANTIZE = [(name, method) for name in ("nvfp4", "mxfp4") for method in ("mse", "fp8", "nearest", "rows")]
FAMILIES = ("attention", "fp4_linear", "fp4_dequantize", "fp4_quantize", "fp4_native")


def compile_one(job: tuple[str, str, int, Any]) -> list[dict[str, Any]]:
    """Rows of one job, ``(family, arch, size, dtype or format)``; a kernel that does not compile has ``error``."""
    from triton_aot import compile_launch

    family, arch, size, kind = job
    make = {
        "attention": _attention, "fp4_linear": _fp4, "fp4_dequantize": _fp4_dequantize, "fp4_quantize": _fp4_quantize,
        "fp4_native": _fp4_native,
    }[family]  # fmt: skip
    launches, refused = make(arch, size, kind)
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


def _fp4_dequantize(arch: str, columns: int, format_name: str) -> tuple[list[Any], dict[str, str]]:
    from test_fp4_aot import dequantize_launch

    return [dequantize_launch(arch, format_name)], {}


def _fp4_quantize(arch: str, columns: int, kind: str) -> tuple[list[Any], dict[str, str]]:
    from test_fp4_quantize import launch

    return [launch(*kind.split(", "), columns)], {}


def _fp4_native(arch: str, rows: int, kind: str) -> tuple[list[Any], dict[str, str]]:
    from test_fp4_native import native_launch

    format_name, _, x = kind.partition(", ")
    return [native_launch(arch, rows, format_name, "bf16" if x else "e2m1")], {}


def jobs_of(architectures: Sequence[str]) -> list[tuple[str, str, int, Any]]:
    """Every kernel with its sizes and types."""
    jobs: list[tuple[str, str, int, Any]] = []
    jobs += [("attention", arch, size, kind) for arch in architectures for size, kind in ATTENTION]
    jobs += [("fp4_linear", arch, m, kind) for arch in architectures for m in FP4_ROWS for kind in ("nvfp4", "mxfp4")]
    jobs += [("fp4_dequantize", arch, COLUMNS, kind) for arch in architectures for kind in ("nvfp4", "mxfp4")]
    jobs += [("fp4_quantize", arch, COLUMNS, ", ".join(kind)) for arch in architectures for kind in FP4_QUANTIZE]
    native = [arch for arch in architectures if arch in FP4_NATIVE]
    return jobs + [("fp4_native", arch, m, kind) for arch in native for m in FP4_ROWS for kind in FP4_NATIVE[arch]]


def earlier_rows(families: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an earlier run that are not of these families."""
    path = record.folder() / "aot_matrix.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["family"] not in families]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES)
    options = parser.parse_args()
    jobs = [job for job in jobs_of(options.arch) if job[0] in options.family]
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
    print(record.write("aot_matrix", sorted(earlier_rows(options.family) + rows, key=lambda row: row["family"])))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
