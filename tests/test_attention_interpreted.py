"""The tests of the Triton attention kernels in Triton's interpreter, which must be on before Triton is imported."""

import re
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
@pytest.mark.parametrize(("name", "least", "skipped"), [("test_attention_triton", 50, 0), ("test_replay", 50, 9)])
def test_triton_kernels_in_the_interpreter(name, least, skipped, interpreting_python):
    tests = Path(__file__).with_name(f"{name}.py")
    done = interpreting_python.run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)])
    assert done.returncode == 0, done.stdout[-4000:]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", done.stdout.splitlines()[-1])}
    assert counts["passed"] >= least and counts.get("skipped", 0) == skipped
