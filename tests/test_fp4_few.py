"""The assembly of the FP4 kernel for few rows, run on the CPU: every load and product of one warp against float64."""

import numpy as np
import pytest
import torch
from ptx_words import run_warp

from vbcompile.device import Target
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import early_launch, registry, replay
from vbcompile.kernels.early_launch import may_overlap
from vbcompile.kernels.fp4_layout import dequantize_weight, to_layout
from vbcompile.kernels.fp4_linear_decode import (
    load_assembly,
    load_tile_assembly,
    load_x_assembly,
    strip_assembly,
)
from vbcompile.kernels.fp4_linear_few import refuses_diagonal, refuses_few, refuses_stream
from vbcompile.kernels.fp4_quantize import quantize

KINDS = {"half": torch.float16, "bf16_sm80": torch.bfloat16, "bf16_sm90": torch.bfloat16}
STRIPS, COLUMNS = 4, 128


def words(state, names):
    return [state[f"${i}"] for i in names]


@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["fragments2t", "fragments8t"])
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (11, 2)])
def test_a_warp_multiplies_its_rows(kind, format_name, layout, rows, blocks):
    """64 rows by 128 columns of a weight, the last step half beyond its end, by rows of x of which some are missing."""
    torch.manual_seed(0)
    wide = layout == "fragments8t"
    scale_words = 2 if format_name == "nvfp4" else 1
    weight = to_layout(quantize(torch.randn(64, COLUMNS) * 0.02, format_name), layout)
    x = torch.randn(rows, COLUMNS).to(KINDS[kind])
    lane = np.arange(32)
    row, column = lane // 4, lane % 4

    codes, scales = weight.codes.numpy().ravel(), weight.block_scales.numpy().ravel()
    tensors = [codes, scales, x.view(torch.int16).numpy().view(np.uint8).ravel()]
    memory = np.concatenate(tensors)
    scale_base, x_base = codes.size, codes.size + scales.size
    unroll = 3  # the last of the three tiles is not there
    left = np.full(32, COLUMNS // 64)
    text, _ = load_assembly(STRIPS, unroll, scale_words)
    parts = STRIPS * unroll
    first = (4 + scale_words) * parts
    loaded = run_warp(
        text,
        {f"${first}": lane * 16, f"${first + 1}": scale_base + row * 4 * scale_words, f"${first + 2}": left},
        memory,
    )
    x_words = []
    for block in range(blocks):
        text, _ = load_x_assembly(unroll, wide)
        at = x_base + ((row + 8 * block) * COLUMNS + column * (8 if wide else 2)) * 2
        there = np.where(row + 8 * block < rows, left, 0)
        inputs = {f"${8 * unroll}": at, f"${8 * unroll + 1}": there}
        x_words.append(words(run_warp(text, inputs, memory), range(8 * unroll)))

    text, _ = strip_assembly(kind, blocks, scale_words, wide)
    got = np.zeros((16 * STRIPS, 8 * blocks), np.float32)
    for strip in range(STRIPS):
        sums = [np.zeros(32, np.uint32)] * (4 * blocks)
        for tile in range(unroll):
            part = tile * STRIPS + strip
            scale_at = 4 * parts + scale_words * part
            operands = words(loaded, [*range(4 * part, 4 * part + 4), *range(scale_at, scale_at + scale_words)])
            operands += [word for own in x_words for word in own[8 * tile : 8 * tile + 8]]
            inputs = {
                f"${4 * blocks + i}": value for i, value in enumerate([*operands, 0x4040 + column // 2 * 0x0202, *sums])
            }
            sums = words(run_warp(text, inputs, memory), range(4 * blocks))
        for block in range(blocks):
            for corner in range(4):
                place = 16 * strip + 8 * (corner // 2) + row, 8 * block + 2 * column + corner % 2
                got[place] = sums[4 * block + corner].view(np.float32)
    exact = dequantize_weight(*weight.tensors, COLUMNS, format_name, weight.layout, torch.float64) @ x.double().T
    ours = torch.from_numpy(got[:, :rows]).double() * 256 * weight.row_scale.double()[:, None]
    assert float((ours - exact).norm() / exact.norm()) < 1e-6
    assert not got[:, rows:].any()


@pytest.mark.parametrize("scale_words", [1, 2])
def test_tiles_one_by_one_are_those_of_a_step(scale_words):
    memory = np.random.default_rng(0).integers(0, 256, 3 * 2048 + 3 * 128 * scale_words, np.uint8)
    lane, parts = np.arange(32), 2 * 3
    code_at, scale_at = lane * 16, 3 * 2048 + lane // 4 * 4 * scale_words
    first = (4 + scale_words) * parts
    text, _ = load_assembly(2, 3, scale_words)
    at = {f"${first}": code_at, f"${first + 1}": scale_at, f"${first + 2}": np.full(32, 3)}
    step = words(run_warp(text, at, memory), range(first))
    for tile in range(3):
        count = (4 + scale_words) * 2
        text, constraints = load_tile_assembly(tile, 2, scale_words)
        at = {f"${count}": code_at, f"${count + 1}": scale_at, "%nctaid.y": np.ones(32)}
        got = words(run_warp(text, at, memory), range(count))
        own = [*range(8 * tile, 8 * tile + 8)]
        own += [4 * parts + scale_words * 2 * tile + i for i in range(2 * scale_words)]
        assert constraints.count("=&r") == count
        assert all(np.array_equal(word, step[i]) for word, i in zip(got, own, strict=True))


def test_refusals_name_the_reason():
    def refusal(arch="sm_90", vendor="nvidia", dtype=torch.bfloat16, m=4, k=4096, layout="fragments2t"):
        target = Target(vendor, "cuda", arch, features=frozenset({"triton"}))
        return refuses_few(target, dtype, m, k, layout)

    assert refusal() is None and refusal("sm_120") is None
    assert "sm_80 or later" in refusal("sm_75")
    assert "NVIDIA" in refusal("gfx942", "amd")
    assert "float32" in refusal(dtype=torch.float32)
    assert "1 to 32 rows" in refusal(m=33)
    assert "multiples of 64" in refusal(k=100)
    assert "layout" in refusal(layout="plain")


def test_kernels_for_fragments2t_name_the_reason():
    def refusal(refuses, arch="sm_90", dtype=torch.bfloat16, m=4, k=4096, layout="fragments2t"):
        target = Target("nvidia", "cuda", arch, features=frozenset({"triton"}))
        return refuses(target, dtype, m, k, layout)

    assert refusal(refuses_diagonal) is None and refusal(refuses_stream, m=32) is None
    assert "1 to 4 rows" in refusal(refuses_diagonal, m=5)
    assert "5 to 32 rows" in refusal(refuses_stream, m=4) and "1 to 32 rows" in refusal(refuses_stream, m=33)
    for refuses, m in ((refuses_diagonal, 1), (refuses_stream, 8)):
        assert "multiples of 128" in refusal(refuses, m=m, k=4160)
        assert "sm_90" in refusal(refuses, "sm_80", m=m) and "fragments2t" in refusal(
            refuses, m=m, layout="fragments8t"
        )
        assert "float32" in refusal(refuses, m=m, dtype=torch.float32)
    described = {
        arch: {row[1]: row[2] for row in registry.describe(catalog_target(arch))} for arch in ("sm_80", "sm_90")
    }
    for name in ("triton_diagonal", "triton_stream"):
        assert "sm_90" in described["sm_80"][name] and not described["sm_90"][name]


def test_products_overlap_only_with_kernels_that_do_not_write_their_weight():
    codes, scales = torch.zeros(8, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    for written in (None, codes, scales[:2]):
        if written is not None:
            written.zero_()
        assert not may_overlap(codes, scales)
        assert may_overlap(codes, scales) and may_overlap(codes.detach(), scales)
    other = torch.zeros(4, dtype=torch.uint8)
    assert not may_overlap(codes, other) and may_overlap(codes, other)  # its codes alone were multiplied with
    with torch.inference_mode():
        unversioned = torch.zeros(8, dtype=torch.uint8)
    assert not any(may_overlap(unversioned, scales) for _ in range(3))
    del codes, written
    assert not may_overlap(torch.zeros(8, dtype=torch.uint8), scales)  # in the same place, perhaps


def test_repeated_calls_look_at_their_weight_each_time(monkeypatch):
    monkeypatch.setattr(replay, "takes", lambda device: True)
    found, look = [], early_launch.may_overlap
    monkeypatch.setattr(early_launch, "may_overlap", lambda *weight: found.append(look(*weight)) or found[-1])
    codes, scales = torch.zeros(8, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)

    def call(x):
        def run():
            replay.each_time(early_launch.kernel_in_between, codes, scales)
            return x + 1

        return replay.remembered("a product", (), (x, codes, scales), run)

    for number, (write, overlaps) in enumerate(((0, 0), (0, 1), (0, 1), (1, 0), (0, 1), (1, 0))):
        if write:
            scales.zero_()
        x = torch.full((2,), float(number))
        assert torch.equal(call(x), x + 1)
        assert found[-1] == overlaps and len(found) == number + 1
