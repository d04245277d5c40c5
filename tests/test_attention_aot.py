"""Shipped attention kernels compile ahead of time for every target, without spills, within its shared memory.

Compilation happens in a process of its own, since Triton must not have been told to interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_MEMORY = {  # bytes that one program can have
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}
KERNELS = {"forward", "rows", "grad_q", "grad_kv", "decode", "merge"}


def compile_all(head_size: int, dtype: str, architectures: list[str]) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "attention_aot.py"), str(head_size), dtype, *architectures]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(head_size: int, dtype: str, architectures: list[str]) -> None:
    rows = compile_all(head_size, dtype, architectures)
    for arch in architectures:
        assert {r["kernel"] for r in rows if r["arch"] == arch} == KERNELS
    assert not [r for r in rows if r["spills"]]
    assert not [r for r in rows if r["shared"] > SHARED_MEMORY[r["arch"]]]


def test_head_size_128():
    check(128, "bfloat16", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_size", "dtype"), [(64, "bfloat16"), (256, "bfloat16"), (64, "float32"), (128, "float32")]
)
def test_other_sizes(head_size, dtype):
    check(head_size, dtype, list(SHARED_MEMORY))


def test_hopper_kernel_uses_the_matrix_and_copy_engines():
    rows = compile_all(64, "bfloat16", ["sm_90"])
    wanted = {r["kernel"]: r["instructions"] for r in rows}
    for kernel in ("forward", "grad_q", "grad_kv"):
        assert {"wgmma", "cp.async.bulk.tensor"} <= set(wanted[kernel]), kernel
