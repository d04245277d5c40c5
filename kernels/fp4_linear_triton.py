"""Launches of the Triton FP4 linear kernels: what they refuse, tile shapes, workspace.

Tile shapes come from the tables of :mod:`vbcompile.kernels.fp4_tuning`, or from a formula of (architecture, rows of x,
shape of the weight): nothing is tuned at run time.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vbcompile.compat_calls import current_stream
from vbcompile.device import Target, get_target
from vbcompile.kernels.fp4_epilogue import epilogue_options, out_features
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import TILE, rows_of
from vbcompile.kernels.fp4_tuning import from_tables, tuned_config
from vbcompile.kernels.launches import launch
from vbcompile.kernels.replay import each_time
from vbcompile.kernels.triton_target import multiprocessor_count, refuses_triton

MOST_ROWS: int = 512  # of x; beyond, decoding once and a vendor product is always faster
_DTYPES = (torch.float16, torch.bfloat16)
_POOL_COUNTERS = 1 << 20


@dataclass(frozen=True)
class TileConfig:
    """How one product is cut up.

    Attributes:
        block_m: rows of x a program takes.
        rows: tiles of 64 rows of the weight a program takes.
        columns: tiles of 64 columns a step.
        splits: programs that share the columns of one tile.
    """

    block_m: int
    rows: int
    columns: int
    splits: int
    warps: int
    stages: int


# ------------------------------------------------------------------------------------------------------------- refusals
def preferred_layout(target: Target) -> str:
    """The layout that weights on a target are stored in; ``plain`` where no kernel of ours reads another."""
    if refuses_triton(target):
        return "plain"
    if target.vendor != "nvidia":
        return "fragments2"
    return "fragments2t" if _is_hopper_or_datacenter(target) else "fragments8t"


def _is_hopper_or_datacenter(target: Target) -> bool:
    """Architectures whose matrix instructions work on whole warp groups: sm_90, sm_100, sm_103."""
    capability = target.compute_capability
    return capability is not None and capability[0] in (9, 10)


def refuses_product(target: Target, dtype: torch.dtype, m: int, layout: str) -> str | None:
    """Why the product kernel cannot run a case."""
    if layout == "plain":
        return "the weight is in the plain layout"
    if layout.endswith("t") and target.vendor != "nvidia":
        return f"layout {layout} is NVIDIA's"
    if dtype not in _DTYPES and not (dtype == torch.float32 and target.vendor == "cpu"):
        return f"takes float16 and bfloat16, not {dtype}"
    if dtype == torch.bfloat16 and target.vendor == "cpu":
        return "Triton's interpreter computes bfloat16 wrongly"
    if m == 0:
        return "there are no rows"
    if m > MOST_ROWS:
        return f"more than {MOST_ROWS} rows: decoding the weight once is faster"
    return None


# -------------------------------------------------------------------------------------------------------------- tiles
@from_tables
def tile_config(target: Target, m: int, n: int, k: int) -> TileConfig:
    """The tile shape for ``x [m, k]`` and a weight ``[n, k]``: measured, or by formula from the bucket of m."""
    if (tuned := tuned_config(target, "triton", n, k, m)) is not None:
        return TileConfig(*tuned)
    column_tiles = -(-k // (2 * TILE)) * 2
    hopper = _is_hopper_or_datacenter(target)
    wide_steps = column_tiles % 4 == 0 and hopper
    if target.vendor == "amd" and not target.arch.startswith("gfx9"):  # RDNA: waves of 32 lanes, 256 registers each
        config = TileConfig(16, 1, 2, 1, 4, 1) if m <= 16 else TileConfig(64 if m <= 64 else 128, 1, 1, 1, 8, 1)
    elif m <= 16:
        config = TileConfig(16, 2, 4 if wide_steps else 2, 1, 4, 4 if hopper else 3)
    elif m <= 32:
        config = TileConfig(32, 2, 2, 1, 4, 4 if hopper else 3)
    elif m <= 64:
        config = TileConfig(64, 2, 2, 1, 4, 4 if hopper else 2)
    elif m <= 128 or target.arch != "sm_90":  # elsewhere the larger tile spills
        config = TileConfig(128, 2, 2 if hopper else 1, 1, 8, 3 if hopper else 2)
    else:
        config = TileConfig(256, 2, 2, 1, 8, 3)
    return with_splits(config, target, m, n, column_tiles)


def with_splits(config: TileConfig, target: Target, m: int, n: int, column_tiles: int) -> TileConfig:
    """The tile shape with as many splits as fill the device."""
    tiles = -(-n // (config.rows * TILE)) * -(-m // config.block_m)
    multiprocessors = multiprocessor_count(target)
    return replace(config, splits=_splits(tiles, column_tiles // config.columns, multiprocessors, config))


def _splits(tiles: int, steps: int, multiprocessors: int, config: TileConfig) -> int:
    """How many programs share a tile's columns: enough to fill the device, each with a few steps."""
    resident = 2 if config.block_m <= 64 else 1
    wanted = resident * multiprocessors
    best, best_time = 1, float("inf")
    for splits in range(1, min(steps, 16) + 1):
        steps_each = -(-steps // splits)
        waves = -(-tiles * splits // wanted)
        # a program pays about three steps to start and, where split, one more a split to add up
        time = waves * (steps_each + 3) + (splits if splits > 1 else 0)
        if time < best_time:
            best, best_time = splits, time
    return best


def room_for(config: TileConfig, epilogue: str) -> TileConfig:
    """A tile whose sums leave registers for the epilogue."""
    return replace(config, block_m=128) if epilogue != "none" and config.block_m > 128 else config


# ------------------------------------------------------------------------------------------------------------ launches
def split_columns(
    config: TileConfig, steps: int, m: int, n: int, out: Tensor
) -> tuple[tuple[int, int, int], int, Tensor, Tensor]:
    """The grid of a product whose columns several blocks share, each so many steps, and what they add up in; without
    sharing ``out`` stands there, unused."""
    steps_each = -(-steps // config.splits)
    grid = (-(-n // (config.rows * TILE)), -(-steps // steps_each), -(-m // config.block_m))
    if grid[1] == 1:
        return grid, steps_each, out, out
    partial = torch.empty(grid[1], m, n, dtype=torch.float32, device=out.device)
    return grid, steps_each, partial, counters(out.device, grid[0] * grid[2])


def product(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: TileConfig | None = None, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """``epilogue(x [..., k] @ weight.T + bias)``, ``[..., n]`` in the dtype of x; weight in a tile layout."""
    from vbcompile.kernels.fp4_linear_kernels import fp4_product_kernel

    target = get_target(x.device)
    rows = rows_of(x, k, 8)
    m, n = rows.shape[0], row_scale.shape[0]
    config = config or tile_config(target, min(1 << (m - 1).bit_length(), 2 * MOST_ROWS), n, k)
    config = room_for(config, epilogue)
    out = torch.empty(m, out_features(n, epilogue), dtype=x.dtype, device=x.device)
    column_tiles = codes.shape[1]
    grid, steps_each, partial, arrived = split_columns(config, column_tiles // config.columns, m, n, out)
    launch(
        fp4_product_kernel, grid,
        rows, codes.view(torch.int32), block_scales, row_scale, row_scale if bias is None else bias, out, partial,
        arrived, m, n, k, rows.stride(0), column_tiles, steps_each, grid[1],
        BLOCK_M=config.block_m, ROWS=config.rows, COLUMNS=config.columns, SPLIT=grid[1] > 1, BIAS=bias is not None,
        STAGES=config.stages, num_warps=config.warps, **early(target), **decoding(target, format_name, layout, x.dtype),
        **epilogue_options(epilogue),
    )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])


def dequantize(
    codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str, dtype: torch.dtype
) -> Tensor:
    """The weight ``[n, k]`` in ``dtype``, from a tile layout; rounded once from float32.

    In float8_e4m3fn, an eighth of it before the rows' scales, rounded to nearest.
    """
    from vbcompile.kernels.fp4_linear_kernels import fp4_dequantize_kernel

    n, column_tiles = row_scale.shape[0], codes.shape[1]
    out = torch.empty(n, k, dtype=dtype, device=codes.device)
    launch(
        fp4_dequantize_kernel, (-(-n // TILE), column_tiles // 2),
        codes.view(torch.int32), block_scales, row_scale, out, n, k, column_tiles, COLUMNS=2, num_warps=8,
        SCALED=dtype != torch.float8_e4m3fn, **decoding(get_target(codes.device), format_name, layout, dtype),
    )  # fmt: skip
    return out


def early(target: Target) -> dict[str, Any]:
    """Options of a launch while the kernel ahead ends, where the device can do that."""
    capability = target.compute_capability
    if target.vendor != "nvidia" or capability is None or capability < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def decoding(target: Target, format_name: str, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    capability = target.compute_capability
    asm = 0
    if layout.endswith("t") and capability is not None:
        asm = 90 if capability >= (9, 0) else 80
    # float32 results decode through float16, which holds every code times scale too
    half = dtype != torch.bfloat16
    return {"BLOCK": fp4_format(format_name).block_size, "WIDE": "8" in layout, "HALF": half, "ASM": asm}


# ----------------------------------------------------------------------------------------------------------- workspace
@dataclass
class _Pool:
    """Zeroed counters of one device; kernels leave them zero."""

    counters: Tensor
    used: int = 0


_pools: dict[torch.device, _Pool] = {}
_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_lock = threading.Lock()


def prepare(device: torch.device) -> None:
    """Make the workspace of a device, so that no CUDA graph's own memory pool holds it. Waits for the device once."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        if device not in _pools:
            _pools[device] = _Pool(torch.zeros(_POOL_COUNTERS, dtype=torch.int32, device=device))
            torch.cuda.synchronize(device)  # other streams may use it first


def counters(device: torch.device, count: int) -> Tensor:
    """``count`` zeroed int32 counters that no other kernel in flight uses.

    Kernels of one stream follow one another and share theirs. A launch recorded into a CUDA graph gets its own, because
    a graph may be replayed on any stream; where none are left, or :func:`prepare` was not called before the recording
    began, the graph zeroes fresh ones at each replay.
    """
    found = each_time(partial(_counters, device, count))
    assert found is not None
    return found


@contextmanager
def counters_of_passing_graphs() -> Iterator[None]:
    """Counters that CUDA graphs recorded within take are free again afterwards: those graphs must be gone by then."""
    used = {device: pool.used for device, pool in _pools.items()}
    try:
        yield
    finally:
        with _lock:
            for device, count in used.items():
                _pools[device].used = count


def _counters(device: torch.device, count: int) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing, key = torch.cuda.is_current_stream_capturing(), (device, current_stream(device))
    have = None if capturing else _by_stream.get(key)
    if have is not None and have.numel() >= count:
        return have
    prepare(device)
    with _lock:
        pool = _pools.get(device)
        wanted = -(-(count if capturing else max(count, 1024)) // 4) * 4
        if pool is None or pool.used + wanted > pool.counters.numel():
            return torch.zeros(count, dtype=torch.int32, device=device)
        taken = pool.counters[pool.used : pool.used + wanted]
        pool.used += wanted
        if not capturing:
            _by_stream[key] = taken
        return taken
