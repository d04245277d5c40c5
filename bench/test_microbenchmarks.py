"""Kernel microbenchmarks: ``pytest bench/test_microbenchmarks.py`` (add ``--benchmark-json FILE``).

The cases, their checks and their peers are those of ``vbcompile bench``; here each run is one benchmark, so that
pytest-benchmark's own statistics, comparison and history apply.
"""

import pytest
import torch

from vbcompile.bench import round_of
from vbcompile.bench_cases import Case, makers
from vbcompile.device import get_device

DEVICE = get_device()


@pytest.fixture(scope="module", params=makers(DEVICE, quick=True))
def case(request) -> Case:
    with torch.no_grad():
        return request.param()


def test_result_is_right(case):
    assert case.error <= case.allowed, case.name


@pytest.mark.parametrize("number", range(3))
def test_speed(case, number, benchmark):
    names = list(case.runs)
    if number >= len(names):
        pytest.skip("fewer peers")
    benchmark.group = case.name
    benchmark.name = names[number]
    with torch.no_grad():
        benchmark(round_of(case.runs[names[number]], DEVICE))
