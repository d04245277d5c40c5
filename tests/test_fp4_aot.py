"""FP4 kernels compiled for architectures that are not here: spills, the hot loop, what the inline PTX computes."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from matrix import forms
from ptx_words import run_ptx
from triton_aot import SHARED_BYTES, Launch, Report, compile_launch

from vbcompile.device import Target
from vbcompile.kernels import fp4_linear_triton, fp4_tiles
from vbcompile.kernels.fp4 import PackedWeight
from vbcompile.kernels.fp4_epilogue import epilogue_options
from vbcompile.kernels.fp4_formats import E2M1_VALUES, NVFP4
from vbcompile.kernels.fp4_layout import _interleave, _untile_scales, to_layout
from vbcompile.kernels.fp4_linear_fp8_words import pair_assembly
from vbcompile.kernels.fp4_linear_kernels import fp4_dequantize_kernel, fp4_product_kernel
from vbcompile.kernels.triton_target import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
ROWS = (1, 64, 256)
N, K = 4096, 14336


def target(arch: str) -> Target:
    vendor = "nvidia" if arch.startswith("sm") else "amd"
    return Target(vendor, "cuda", arch, multiprocessors=132, features=frozenset({"triton", "bf16"}))


def product_launch(arch: str, m: int, dtype: torch.dtype, format_name: str = "nvfp4", epilogue: str = "none") -> Launch:
    """What a launch of the shipped configuration passes for the weight ``[N, K]``."""
    device = target(arch)
    config = fp4_linear_triton.room_for(fp4_linear_triton.tile_config(device, m, N, K), epilogue)
    layout = fp4_linear_triton.preferred_layout(device)
    x, scales, row_scale = torch.empty(16, dtype=dtype), torch.empty(16, dtype=torch.uint8), torch.empty(16)
    codes = counters = torch.empty(16, dtype=torch.int32)
    arguments = (x, codes, scales, row_scale, x, x, row_scale, counters, m + 1, N, K, K, K // 64, 7, config.splits)
    options = {
        "BLOCK_M": config.block_m, "ROWS": config.rows, "COLUMNS": config.columns, "SPLIT": config.splits > 1,
        "BIAS": True, "STAGES": config.stages, "num_warps": config.warps,
        **fp4_linear_triton.early(device), **fp4_linear_triton.decoding(device, format_name, layout, dtype),
        **epilogue_options(epilogue),
    }  # fmt: skip
    return Launch(fp4_product_kernel, arguments, options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", ROWS)
def test_products_compile_without_spills(arch, m):
    report = compile_launch(product_launch(arch, m, torch.bfloat16), arch)
    assert report.spills == 0
    assert report.shared <= SHARED_BYTES[arch]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942", "gfx1100"])
@pytest.mark.parametrize(("dtype", "format_name"), [(torch.float16, "nvfp4"), (torch.bfloat16, "mxfp4")])
def test_other_types_and_formats_compile_without_spills(arch, dtype, format_name):
    assert compile_launch(product_launch(arch, 16, dtype, format_name), arch).spills == 0


@pytest.mark.parametrize(
    ("arch", "m", "epilogue"),
    forms(itertools.product(ARCHITECTURES, (16, 256), ("gated_silu", "gelu")), lambda arch, m, epilogue: m == 256),
)
def test_epilogues_compile_without_spills(arch, m, epilogue):
    assert compile_launch(product_launch(arch, m, torch.bfloat16, epilogue=epilogue), arch).spills == 0


def dequantize_launch(arch: str, format_name: str = "nvfp4") -> Launch:
    """What decoding the weight ``[N, K]`` passes."""
    device, out = target(arch), torch.empty(16, dtype=torch.bfloat16)
    layout = fp4_linear_triton.preferred_layout(device)
    codes, scales = torch.empty(16, dtype=torch.int32), torch.empty(16, dtype=torch.uint8)
    arguments = (codes, scales, torch.empty(16), out, N, K, K // 64)
    options = fp4_linear_triton.decoding(device, format_name, layout, torch.bfloat16)
    return Launch(fp4_dequantize_kernel, arguments, {"COLUMNS": 2, "num_warps": 8, "SCALED": True, **options})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dequantization_compiles_without_spills(arch):
    assert compile_launch(dequantize_launch(arch), arch).spills == 0


# ------------------------------------------------------------------------------------------------------------- hot loop
def disassembly(report: Report) -> str:
    """NVIDIA's instructions of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(report.assembly["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def hot_loop(report: Report, innermost: bool = False) -> list[str]:
    """Instructions of the main loop: the longest backward branch that encloses matrix instructions, or the shortest."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    loops = []
    for line in disassembly(report).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label.group(1)] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(re.sub(r"^@!?U?P\w+\s+", "", instruction.group(1)))
            branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", lines[-1])
            if branch and branch.group(1) in labels:
                loops.append(lines[labels[branch.group(1)] :])
    return (min if innermost else max)((loop for loop in loops if any("MMA" in i for i in loop)), key=len)


@pytest.mark.parametrize("m", ROWS)
def test_hopper_loop_feeds_tensor_cores_from_registers(m):
    launch = product_launch("sm_90", m, torch.bfloat16)
    report = compile_launch(launch, "sm_90")
    loop = hot_loop(report)
    products = [i for i in loop if i.startswith("HGMMA")]
    assert products and all(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", i) for i in products), products[:2]
    loads = [i for i in loop if i.startswith("LDS")]
    assert any(i.startswith("LDS.128") for i in loads) and not any(re.match(r"LDS\.[US]?8", i) for i in loads)
    assert any(i.startswith("LDGSTS.E.BYPASS.128") for i in loop)
    options = launch.options
    weights = 64 * options["ROWS"] * 64 * options["COLUMNS"] / (32 * options["num_warps"])
    assert len(loop) / weights <= {1: 4.0, 64: 5.0, 256: 8.0}[m], len(loop) / weights


# ------------------------------------------------------------------------------------------------------------------ PTX
KINDS = {"ASM_BF16_SM90": torch.bfloat16, "ASM_BF16_SM80": torch.bfloat16, "ASM_FP16": torch.float16}


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("name", KINDS)
def test_inline_assembly_is_exact_for_every_code_and_scale(name, place):
    dtype = KINDS[name]
    pairs = torch.tensor(list(itertools.product(range(16), range(1, 127))))
    codes = torch.randint(0, 16, (len(pairs), 8), dtype=torch.uint8)  # random neighbours
    codes[:, place] = pairs[:, 0].to(torch.uint8)
    words = _interleave(codes.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)).numpy().view(np.uint32)[:, 0]
    scales = torch.tensor(NVFP4.scale_values, dtype=torch.float64)[pairs[:, 1]]
    bits = (scales * 2.0 ** (118 if dtype == torch.bfloat16 else 6)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    other = np.zeros_like(bits)
    halves = {"$9": bits, "$10": other} if place < 4 else {"$9": other, "$10": bits}
    out = run_ptx(getattr(fp4_tiles, name).value, {"$8": words, **halves})[f"${place}"]
    got = torch.from_numpy(out.astype(np.uint16).view(np.int16)).view(dtype).double()
    assert torch.equal(got, torch.tensor(E2M1_VALUES, dtype=torch.float64)[pairs[:, 0]] * scales * 2.0**-8)


@pytest.mark.parametrize("scale_words", [2, 1])
def test_table_look_up_rounds_every_code_and_scale_to_nearest_even(scale_words):
    """E4M3 of an eighth of code times scale, for scales whose smallest product is no subnormal."""
    codes, n = torch.randint(0, 16, (4096, 2, 8), dtype=torch.uint8), 4096
    codes[:, :, :] = torch.where(torch.rand(codes.shape) < 0.1, 0, codes)
    words = _interleave(codes.view(-1, 8)).numpy().view(np.uint32)[:, 0].reshape(n, 2)
    scale_bytes = torch.randint(56, 149, (n, 4))
    text, _, _, _ = pair_assembly(scale_words)
    packed = scale_bytes.to(torch.uint8).numpy().view(np.uint32)[:, 0].copy()
    out = run_ptx(
        text, {"$4": words[:, 0], "$5": words[:, 1], "$6": packed, "$7": packed, "%nctaid.y": np.ones_like(packed)}
    )
    scales = (1 + scale_bytes % 8 / 8).double() * torch.exp2((scale_bytes // 8 - 9).double())
    for word, row in itertools.product(range(2), range(2)):
        scale = scales[:, (2 * word if scale_words == 2 else 0) + row, None]
        mine = codes[:, word].view(n, 2, 2, 2)[..., row].transpose(1, 2).reshape(n, 4)  # 8 h + b -> 2 b + h
        want = torch.tensor(E2M1_VALUES, dtype=torch.float64)[mine.long()] * scale / 8
        known = (want.abs() <= 448).all(1)
        got = torch.from_numpy(out[f"${2 * row + word}"].copy()).view(torch.float8_e4m3fn).view(n, 4)
        assert torch.equal(got.double()[known], want.float().to(torch.float8_e4m3fn).double()[known])


def test_scale_bytes_become_the_bits_of_their_value():
    """Every E4M3 scale, through the byte of the tile layouts, as the kernels shift and add it."""
    codes = torch.full((1, 127 * 8), 0x22, dtype=torch.uint8)
    blocks = torch.arange(127, dtype=torch.uint8)[None]
    weight = to_layout(PackedWeight(codes, blocks, torch.ones(1), "nvfp4", (1, 127 * 16)), "fragments2")
    scale_bytes = _untile_scales(weight.block_scales, 4)[0, 1:127].to(torch.int16)
    values = torch.tensor(NVFP4.scale_values[1:127], dtype=torch.float64)
    assert torch.equal(((scale_bytes << 4) + 0x7600).view(torch.bfloat16).double(), values * 2.0**118)
    assert torch.equal(((scale_bytes << 7) + 0x3000).view(torch.float16).double(), values * 2.0**6)
