"""Sizes at which numbers of 32 bits, and the axes of a grid, run out."""

import contextlib
import math
from unittest.mock import patch

import pytest
import torch
from attention_forms import captured_mask, make_function
from torch import Tensor

from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import attention_hopper_gradients, attention_problem, attention_triton
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.attention_layout import is_within_reach
from vbcompile.kernels.attention_tuning import TileConfig
from vbcompile.kernels.registry import operator

HEADS = 70000  # an axis of a grid but the first has at most 65535
MASK = make_function(mask=captured_mask)


class Grids:
    """Stands for ``launch`` and keeps grids by the names of kernels."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, ...]] = {}

    def __call__(self, kernel, grid, *arguments, **options) -> None:
        self.found[kernel.__name__.removeprefix("attention_").removesuffix("_kernel")] = grid

    def check(self, **programs: int) -> None:
        assert {name: math.prod(grid) for name, grid in self.found.items()} == programs
        assert max(size for grid in self.found.values() for size in grid[1:] or (1,)) <= 65535


def operands(heads: int, queries: int, keys: int) -> list[Tensor]:
    return [torch.empty(heads, 1, n, 1, dtype=torch.float16) for n in (queries, keys, keys)]


@pytest.fixture
def grids(monkeypatch):
    grids = Grids()
    monkeypatch.setattr(attention_problem, "launch", grids)
    monkeypatch.setattr(attention_problem, "arch_of", lambda t: "sm_90")
    return grids


def test_few_queries_of_many_heads(grids):
    attention_triton.forward(*operands(HEADS, 16, 16), [], 1.0, 0.0, None, make_function())
    grids.check(decode=HEADS)


def test_many_masks(grids):
    q, k, v = operands(HEADS, 257, 300)
    mask = torch.empty(HEADS, 1, 1, 300, dtype=torch.bool)
    with patch.object(attention_problem, "SUMMARY_TILES", 1):
        attention_triton.forward(q, k, v, [mask], 1.0, 0.0, None, MASK)
    grids.check(mask_summary=HEADS * 3 * 5, forward=HEADS * 3)


def test_many_plans(grids):
    q, k, v = operands(HEADS, 257, 300)
    mask = torch.empty(HEADS, 1, 1, 300, dtype=torch.bool)
    problem = attention_problem.describe(q, k, v, [mask], 1.0, 0.0, MASK)
    problem.tile_plan(q, TileConfig(128, 128, 4, 1), exact=True)
    grids.check(tile_plan=HEADS * 3)


def test_backward_of_many_heads(monkeypatch):
    grids = Grids()
    monkeypatch.setattr(attention_hopper_gradients, "launch", grids)
    for name in ("describe", "describe_float32", "refuses"):
        monkeypatch.setattr(attention_hopper_gradients, name, lambda *a: None)
    monkeypatch.setattr(attention_hopper_gradients, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    shape = (HEADS, 1, 64, 64)
    tensors = [torch.empty(1, dtype=torch.float16).expand(shape) for _ in range(5)]
    grad_out, q, k, v, out = (t.to("meta") for t in tensors)
    lse = torch.empty(HEADS, 1, 64, device="meta")
    monkeypatch.setattr(attention_hopper_gradients, "_addressable", lambda x: x)
    attention_hopper_gradients.backward(grad_out, None, q, k, v, out, lse, 1.0, None)
    grids.check(prepare_backward=HEADS * 2, backward=264, finish_backward=HEADS * 2)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((100, 64), (2**24, 1), True),
        ((200, 64), (2**24, 1), True),  # a tile has 128 rows
        ((200, 64), (2**24 + 2**18, 1), False),
        ((16, 64), (2**27, 1), True),
        ((300, 200), (1, 2**24), False),
        ((1, 64), (2**40, 1), True),
    ],
)
def test_reach_of_tiles(shape, strides, expected):
    t = torch.empty(1, device="meta").as_strided((1, *shape), (0, *strides))
    assert is_within_reach(t) == expected


@pytest.mark.parametrize(
    ("shape", "needs", "cudnn", "flash"),
    [
        ((65535, 8, 64, 64), True, True, False),
        ((65536, 8, 64, 64), False, False, False),
        ((1, 65536, 64, 64), False, False, False),
        ((400, 4, 10496, 128), False, True, True),
        ((400, 4, 10496, 128), True, True, False),
        ((400, 4, 10400, 128), True, True, False),
        ((400, 4, 10240, 128), True, True, True),
        ((2000, 16, 729, 72), True, True, False),
    ],
)
def test_what_operators_of_pytorch_count(shape, needs, cudnn, flash, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    function = make_function().dumps()
    case = AttentionCase(torch.float16, shape, shape, shape, (), False, function, needs=(True,) * 3 if needs else ())
    backward = operator("attention_backward")
    backward.load()
    reasons = {i.name: i.refuses(catalog_target("sm_90"), case) for i in backward.implementations}
    assert (reasons["cudnn"] is None, reasons["flash_attention_2"] is None) == (cudnn, flash)
