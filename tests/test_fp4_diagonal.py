"""The assembly of the FP4 kernel for one row, run on the CPU: every load and product of one warp against float64."""

import numpy as np
import pytest
import torch
from ptx_words import run_warp

from vbcompile.kernels.fp4_layout import dequantize_weight, to_layout
from vbcompile.kernels.fp4_linear_diagonal import chunks_assembly, load_assembly, load_x_assembly
from vbcompile.kernels.fp4_quantize import quantize

STRIPS, UNROLL = 2, 2
COLUMNS = 128 * UNROLL


def words(state, names):
    return [state[f"${i}"] for i in names]


@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [("bf16", torch.bfloat16, 1.0), ("bf16", torch.bfloat16, 300.0), ("half", torch.float16, 1.0)],
    ids=["small", "large", "half"],
)
def test_a_warp_multiplies_its_rows(kind, dtype, size, rows, format_name):
    """32 rows by 256 columns of a weight of 64 rows, the second pair of its strips."""
    torch.manual_seed(0)
    scale_words = 2 if format_name == "nvfp4" else 1
    weight = to_layout(quantize(torch.randn(64, COLUMNS) * 0.02, format_name), "fragments2t")
    x = torch.randn(rows, COLUMNS).to(dtype)
    x[0, 100] = size
    lane = np.arange(32)
    row, column = lane // 4, lane % 4

    codes, scales = weight.codes.numpy().ravel(), weight.block_scales.numpy().ravel()
    memory = np.concatenate([codes, scales, x.view(torch.int16).numpy().view(np.uint8).ravel()])
    scale_base, x_base = codes.size, codes.size + scales.size
    at = 2  # the first strip
    block = column * 2 // rows * scale_words // 2
    scale_at = scale_base + (at * 8 + row) * (4 * scale_words)
    scale_at = scale_at + block // (2 * scale_words) * (128 * scale_words) + block % (2 * scale_words) * 2
    parts = STRIPS * UNROLL
    loads = (8 + rows) * parts
    loaded = run_warp(
        load_assembly(rows, STRIPS, UNROLL, scale_words)[0],
        {f"${loads}": at * 512 + lane * 16, f"${loads + 1}": scale_at},
        memory,
    )
    x_at = x_base + (row % rows * COLUMNS + row // rows * 16 + column * 2) * 2
    loaded_x = run_warp(load_x_assembly(rows, UNROLL)[0], {f"${2 * rows * UNROLL}": x_at}, memory)
    operands = words(loaded, range(loads)) + words(loaded_x, range(2 * rows * UNROLL))
    operands += [np.where(row // rows == j, 0xFFFFFFFF, 0) for j in range(8 // rows)]
    count = 2 if rows == 1 else 4
    operands += [np.zeros(32, np.uint32)] * (count * STRIPS)
    inputs = {f"${count * STRIPS + i}": value for i, value in enumerate(operands)}
    text, _ = chunks_assembly(kind, rows, STRIPS, UNROLL, scale_words)
    sums = words(run_warp(text, inputs, memory), range(count * STRIPS))
    got = torch.zeros(32, rows, dtype=torch.float64)
    for number, sum_ in enumerate(sums):
        strip, corner = divmod(number, count)
        half, parity = (corner, 0) if rows == 1 else divmod(corner, 2)
        place = 16 * strip + 8 * half + torch.from_numpy(row), torch.from_numpy(2 * column + parity) % rows
        got.index_put_(place, torch.from_numpy(sum_.view(np.float32)).double(), accumulate=True)
    ours = got * (16.0 if kind == "half" else 0.25) * weight.row_scale[32:].double()[:, None]
    exact = dequantize_weight(*weight.tensors, COLUMNS, format_name, weight.layout, torch.float64) @ x.double().T
    assert float((ours - exact[32:]).norm() / exact[32:].norm()) < 1e-6
