"""The tests of the Triton attention kernels in Triton's interpreter, which must be on before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here: test_attention_triton.py")
def test_triton_kernels_in_the_interpreter():
    tests = Path(__file__).with_name("test_attention_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 50 and "skipped" not in done.stdout.splitlines()[-1]
