"""Benchmark scripts that can be tried on a processor do run there, and check what they measure."""

import json
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "offload_largest_simulated": "offload_largest.py --shape tiny --layers 2 --budget 4MB --device cpu --steps 1",
    "fp4_model_small": "fp4_model.py --small --layers 1 --tokens 64 --what prefill --ways 'vblackwell NVFP4'",
}


@pytest.mark.parametrize("file", SCRIPTS)
def test_a_script_measures_and_checks(file, tmp_path, warm_python):
    script, *options = shlex.split(SCRIPTS[file])
    variables = {"BENCH_RESULTS": str(tmp_path), "COMPILE_THREADS": "1"}
    done = warm_python.run([str(ROOT / "bench" / script), *options], variables=variables)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / f"{file}.json").read_text())["rows"]
    assert rows and all(row["ms"] > 0 for row in rows)
    assert all(row.get("error", row.get("difference")) <= row["allowed"] for row in rows)
