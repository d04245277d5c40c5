"""The tests of the Triton attention kernels in Triton's interpreter, which must be on before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
@pytest.mark.parametrize(("name", "least", "skipped"), [("test_attention_triton", 50, 0), ("test_replay", 50, 9)])
def test_triton_kernels_in_the_interpreter(name, least, skipped):
    tests = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", done.stdout.splitlines()[-1])}
    assert counts["passed"] >= least and counts.get("skipped", 0) == skipped
