"""Launches of the FP4 product for many rows of x on Hopper (:mod:`vbcompile.kernels.fp4_linear_wide`)."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import TILE
from vbcompile.kernels.fp4_linear_fp8 import quantize_rows
from vbcompile.kernels.fp4_tuning import tuned_config
from vbcompile.kernels.triton_target import refuses_triton

_CONSUMERS = 2
_KINDS = {  # type of x: its name in Triton, and of the assembly that decodes to it
    torch.float16: ("float16", "half"),
    torch.bfloat16: ("bfloat16", "bf16_sm90"),
    torch.float8_e4m3fn: ("float8e4nv", ""),
}
_ALIGNMENT = 8  # elements: the copy engine wants rows at multiples of 16 bytes


@dataclass(frozen=True)
class WideConfig:
    """How one product is cut up.

    Attributes:
        block_m: rows of x a block of threads takes.
        tiles: tiles of 64 rows of the weight a warpgroup takes, 1 or 2; a block has two warpgroups.
        stages: shared buffers.
        splits: blocks that share the columns of one tile; 0: the tiles that would not fill the device are shared evenly
            by all blocks.
        blocks: blocks that an SM holds at a time.
    """

    block_m: int
    tiles: int
    stages: int
    splits: int
    blocks: int = 1


def refuses_wide(target: Target, dtype: torch.dtype, n: int, k: int, layout: str) -> str | None:
    """Why the kernel for many rows cannot run a case."""
    if reason := refuses_triton(target):
        return reason
    if target.arch != "sm_90":
        return f"written for sm_90, this is {target.arch}"
    if layout != "fragments2t":
        return f"reads layout fragments2t, not {layout}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    return f"takes rows and columns in multiples of {_ALIGNMENT}" if n % _ALIGNMENT or k % _ALIGNMENT else None


@functools.lru_cache(maxsize=256)
def wide_config(target: Target, m: int, n: int, k: int, fp8: bool = False) -> WideConfig:
    """The shape of blocks for ``x [m, k]`` and a weight ``[n, k]``: measured, or by formula."""
    if (tuned := tuned_config(target, "hopper_fp8" if fp8 else "hopper", n, k, m)) is not None:
        return WideConfig(*tuned)
    if m <= 64:
        config = WideConfig(64, 1, 7, 1, 2)
    else:
        config = WideConfig(128, 2, 7, 1, 1) if m <= 128 else WideConfig(256, 1, 4, 1, 1)
    items = -(-n // (_CONSUMERS * config.tiles * TILE)) * -(-m // config.block_m)
    return replace(config, splits=_splits(items, -(-k // TILE), (target.multiprocessors or 132) * config.blocks))


def _splits(items: int, steps: int, resident: int) -> int:
    """How many blocks share a tile's columns: a tile costs about ten steps beside its own, adding up two a split."""
    return min(
        (s for s in (1, 2, 4, 8) if s == 1 or steps // s >= 4),
        key=lambda s: -(-items * s // resident) * (steps / s + 10) + (2 * s if s > 1 else 0),
    )


@dataclass(frozen=True)
class _Plan:
    """How blocks share the work: ``whole`` tiles one after another, then equal shares of ``left`` pairs of steps, of
    which a tile has ``pairs``."""

    programs: int
    pairs: int
    whole: int
    left: int


def _plan(m: int, n: int, k: int, config: WideConfig, multiprocessors: int) -> _Plan:
    tiles = -(-n // (_CONSUMERS * config.tiles * TILE)) * -(-m // config.block_m)
    pairs = -(-k // (2 * TILE))
    resident = multiprocessors * config.blocks
    if config.splits == 1:
        return _Plan(min(tiles, resident), pairs, tiles, 0)
    programs = min(resident, tiles * config.splits or resident, tiles * max(1, pairs // 2))
    whole = tiles // programs * programs
    return _Plan(programs, pairs, whole, (tiles - whole) * pairs)


def launch_options(kind: torch.dtype, config: WideConfig, split: bool, scale_words: int) -> dict[str, Any]:
    """Constants and compiler options of a launch; ``scale_words``: words of scale bytes a thread has of a tile."""
    from triton.experimental.gluon import language as gl

    from vbcompile.kernels.fp4_linear_decode import word_assembly
    from vbcompile.kernels.fp4_linear_fp8_words import pair_assembly

    word = pair_assembly(scale_words) if kind == torch.float8_e4m3fn else word_assembly(_KINDS[kind][1])
    registers = 232 if config.blocks == 1 else 104
    return {
        "TILES": config.tiles, "STAGES": config.stages, "TYPE": getattr(gl, _KINDS[kind][0]),
        "WORD": word, "SPLIT": split, "REGISTERS": registers, "num_warps": 4,
        "maxnreg": 168 if config.blocks == 1 else 80,
    }  # fmt: skip


def descriptors(
    rows: Tensor, codes: Tensor, block_scales: Tensor, out: Tensor, format_name: str, config: WideConfig
) -> tuple[Any, ...]:
    """What the copy engine reads and writes: x, codes, scales, results."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def swizzled(tensor: Tensor) -> Any:
        return gl.NVMMASharedLayout.get_default_for([block_m, TILE], getattr(gl, _KINDS[tensor.dtype][0]))

    block_m, parts, tiles = config.block_m, _CONSUMERS * config.tiles, codes.shape[0]
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    words = 1024 // fp4_format(format_name).block_size
    return (
        TensorDescriptor.from_tensor(rows, [block_m, TILE], swizzled(rows)),
        TensorDescriptor.from_tensor(codes.view(torch.int32).view(tiles, -1, 256), [parts, 2, 256], flat),
        TensorDescriptor.from_tensor(block_scales.view(torch.int32).view(tiles, -1, words), [parts, 1, words], flat),
        TensorDescriptor.from_tensor(out, [block_m, TILE], swizzled(out)),
    )


def product_wide(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: WideConfig | None = None,
) -> Tensor:  # fmt: skip
    """``x [..., k] @ weight.T + bias``, ``[..., n]`` in the dtype of x; weight in the layout ``fragments2t``."""
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1 or rows.stride(0) % _ALIGNMENT or rows.data_ptr() % 16:
        rows = rows.contiguous()
    out = torch.empty(rows.shape[0], row_scale.shape[0], dtype=x.dtype, device=x.device)
    config = config or wide_config(get_target(x.device), 1 << (rows.shape[0] - 1).bit_length(), out.shape[1], k)
    _launch(rows, None, codes, block_scales, row_scale, bias, out, format_name, config)
    return out.view(*x.shape[:-1], out.shape[1])


def product_wide_fp8(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: WideConfig | None = None,
) -> Tensor:  # fmt: skip
    """The same with x and the decoded weight rounded to E4M3."""
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    rounded, scale = quantize_rows(rows, paired=True)
    out = torch.empty(rows.shape[0], row_scale.shape[0], dtype=x.dtype, device=x.device)
    config = config or wide_config(get_target(x.device), 1 << (rows.shape[0] - 1).bit_length(), out.shape[1], k, True)
    _launch(rounded, scale, codes, block_scales, row_scale, bias, out, format_name, config)
    return out.view(*x.shape[:-1], out.shape[1])


def _launch(
    rows: Tensor, x_scale: Tensor | None, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None,
    out: Tensor, format_name: str, config: WideConfig,
) -> None:  # fmt: skip
    from vbcompile.kernels.fp4_linear_triton import counters
    from vbcompile.kernels.fp4_linear_wide import fp4_wide_kernel

    (m, k), n = rows.shape, out.shape[1]
    plan = _plan(m, n, k, config, get_target(out.device).multiprocessors or 1)
    partial = arrived = row_scale
    if plan.left:
        parts = _CONSUMERS * config.tiles
        size = (2 * plan.programs * parts, TILE * config.block_m)
        partial = torch.empty(size, dtype=torch.float32, device=out.device)
        arrived = counters(out.device, (plan.left // plan.pairs) * parts)
    fp4_wide_kernel[(plan.programs,)](
        *descriptors(rows, codes, block_scales, out, format_name, config), row_scale,
        row_scale if bias is None else bias, row_scale if x_scale is None else x_scale, partial, arrived, m, n,
        -(-m // config.block_m), plan.pairs, plan.whole, plan.left, BIAS=bias is not None,
        **launch_options(rows.dtype, config, plan.left > 0, 32 // fp4_format(format_name).block_size),
    )  # fmt: skip
