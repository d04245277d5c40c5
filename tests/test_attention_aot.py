"""Shipped attention kernels compile ahead of time for every target, without spills, within its shared memory."""

import pytest
import torch
from attention_aot import record_launches
from matrix import forms
from triton_aot import SHARED_BYTES, Report, compile_launch
from wgmma_descriptors import places_with_two_halves, unset_registers

from vbcompile.kernels.triton_target import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")
KERNELS = {"forward", "rows", "grad_q", "grad_kv", "decode", "merge"}
ALWAYS = {  # head sizes and types beside 128 in bfloat16, each for one or two targets
    (64, torch.bfloat16): {"sm_90", "gfx942"},
    (256, torch.bfloat16): {"sm_80", "gfx950"},
    (64, torch.float32): {"sm_100"},
    (128, torch.float32): {"sm_120"},
}


def check(arch: str, head_size: int, dtype: torch.dtype) -> list[tuple[str, Report]]:
    launches = record_launches(arch, head_size, dtype)
    names = [launch.kernel.__name__.removeprefix("attention_").removesuffix("_kernel") for launch in launches]
    few = arch == "sm_90" and head_size in (64, 128) and dtype != torch.float32
    assert set(names) == KERNELS | ({"hopper_decode"} if few else set())
    reports = [(name, compile_launch(launch, arch)) for name, launch in zip(names, launches, strict=True)]
    assert not [name for name, report in reports if report.spills]
    assert not [name for name, report in reports if report.shared > SHARED_BYTES[arch]]
    if arch == "sm_90":
        assert not [name for name, report in reports if places_with_two_halves(report.assembly["ptx"])]
    return reports


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_head_size_128(arch):
    check(arch, 128, torch.bfloat16)


@pytest.mark.parametrize(
    ("arch", "head_size", "dtype"),
    forms(((arch, *form) for form in ALWAYS for arch in SHARED_BYTES), lambda arch, *form: arch in ALWAYS[form]),
)
def test_other_sizes(arch, head_size, dtype):
    check(arch, head_size, dtype)


def test_hopper_kernels_use_the_matrix_and_copy_engines():
    for name, report in check("sm_90", 64, torch.bfloat16):
        if name in ("forward", "grad_q", "grad_kv"):
            assert all(mark in report.assembly["ptx"] for mark in ("wgmma", "cp.async.bulk.tensor")), name


@pytest.mark.parametrize("sizes", [(64, 16), (24, 40)])
def test_descriptors_of_other_value_sizes(sizes):
    """ptxas 12.8 goes wrong where tiles that are swizzled differently take turns in one place."""
    forward, *_ = record_launches("sm_90", sizes[0], torch.float16, False, value_size=sizes[1], length=300)
    report = compile_launch(forward, "sm_90")
    assert not places_with_two_halves(report.assembly["ptx"])
    assert not unset_registers(report.assembly["cubin"])
