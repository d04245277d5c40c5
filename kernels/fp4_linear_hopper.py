"""Launches of the FP4 product for many rows of x on Hopper (:mod:`vbcompile.kernels.fp4_linear_wide`)."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels.fp4_epilogue import epilogue_options, out_features
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import TILE
from vbcompile.kernels.fp4_linear_fp8 import quantize_rows
from vbcompile.kernels.fp4_tuning import tuned_config
from vbcompile.kernels.triton_target import refuses_triton

_CONSUMERS = 2
_KINDS = {  # type of x: its name in Triton, and of the assembly that decodes to it
    torch.float16: ("float16", "half"),
    torch.bfloat16: ("bfloat16", "bf16_sm90"),
    torch.float8_e4m3fn: ("float8e4nv", "fp8"),
}
_ALIGNMENT = 8  # elements: the copy engine wants rows at multiples of 16 bytes


@dataclass(frozen=True)
class WideConfig:
    """How one product is cut up.

    Attributes:
        block_m: rows of x a block of threads takes.
        tiles: tiles of 64 rows of the weight a warpgroup takes, 1 or 2; a block has two warpgroups.
        stages: shared buffers.
        splits: blocks that share the columns of one tile.
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


def launch_options(kind: torch.dtype, config: WideConfig, split: bool, epilogue: str = "none") -> dict[str, Any]:
    """Constants and compiler options of a launch."""
    from triton.experimental.gluon import language as gl

    from vbcompile.kernels.fp4_linear_decode import word_assembly

    registers = 232 if config.blocks == 1 else 104
    return {
        "TILES": config.tiles, "STAGES": config.stages, "TYPE": getattr(gl, _KINDS[kind][0]),
        "WORD": word_assembly(_KINDS[kind][1]), "SPLIT": split, "REGISTERS": registers, "num_warps": 4,
        "maxnreg": 168 if config.blocks == 1 else 80,
    } | epilogue_options(epilogue)  # fmt: skip


def descriptors(
    rows: Tensor, codes: Tensor, block_scales: Tensor, out: Tensor, format_name: str, block_m: int,
    epilogue: str = "none",
) -> tuple[Any, ...]:  # fmt: skip
    """What the copy engine reads and writes: x, codes, scales, results."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def swizzled(tensor: Tensor, width: int = TILE) -> Any:
        return gl.NVMMASharedLayout.get_default_for([block_m, width], getattr(gl, _KINDS[tensor.dtype][0]))

    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    words = 1024 // fp4_format(format_name).block_size
    width = out_features(TILE, epilogue)
    return (
        TensorDescriptor.from_tensor(rows, [block_m, TILE], swizzled(rows)),
        TensorDescriptor.from_tensor(codes.view(torch.int32).view(-1, 256), [2, 256], flat),
        TensorDescriptor.from_tensor(block_scales.view(torch.int32).view(-1, words), [1, words], flat),
        TensorDescriptor.from_tensor(out, [block_m, width], swizzled(out, width)),
    )


def product_wide(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: WideConfig | None = None, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """``epilogue(x [..., k] @ weight.T + bias)`` in the dtype of x; weight ``[n, k]`` in the layout ``fragments2t``."""
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1 or rows.stride(0) % _ALIGNMENT or rows.data_ptr() % 16:
        rows = rows.contiguous()
    n = row_scale.shape[0]
    out = torch.empty(rows.shape[0], out_features(n, epilogue), dtype=x.dtype, device=x.device)
    config = config or wide_config(get_target(x.device), 1 << (rows.shape[0] - 1).bit_length(), n, k)
    _launch(rows, None, codes, block_scales, row_scale, bias, out, format_name, config, epilogue)
    return out.view(*x.shape[:-1], out.shape[1])


def product_wide_fp8(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: WideConfig | None = None, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """The same with x and the decoded weight rounded to E4M3."""
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    rounded, scale = quantize_rows(rows, paired=True)
    n = row_scale.shape[0]
    out = torch.empty(rows.shape[0], out_features(n, epilogue), dtype=x.dtype, device=x.device)
    config = config or wide_config(get_target(x.device), 1 << (rows.shape[0] - 1).bit_length(), n, k, True)
    _launch(rounded, scale, codes, block_scales, row_scale, bias, out, format_name, config, epilogue)
    return out.view(*x.shape[:-1], out.shape[1])


def _launch(
    rows: Tensor, x_scale: Tensor | None, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None,
    out: Tensor, format_name: str, config: WideConfig, epilogue: str,
) -> None:  # fmt: skip
    from vbcompile.kernels.fp4_linear_triton import counters
    from vbcompile.kernels.fp4_linear_wide import fp4_wide_kernel

    (m, k), n = rows.shape, row_scale.shape[0]
    k_tiles = -(-k // (2 * TILE)) * 2
    steps_each = -(-k_tiles // (2 * config.splits)) * 2
    splits, tiles_m = -(-k_tiles // steps_each), -(-m // config.block_m)
    items = -(-n // (_CONSUMERS * config.tiles * TILE)) * splits * tiles_m
    partial = arrived = row_scale
    if splits > 1:
        tiles = -(-n // TILE) * tiles_m
        partial = torch.empty(splits, tiles, TILE * config.block_m, dtype=torch.float32, device=out.device)
        arrived = counters(out.device, tiles)
    programs = min(items, (get_target(out.device).multiprocessors or 1) * config.blocks)
    fp4_wide_kernel[(programs,)](
        *descriptors(rows, codes, block_scales, out, format_name, config.block_m, epilogue), row_scale,
        row_scale if bias is None else bias, row_scale if x_scale is None else x_scale, partial, arrived, m, n, k_tiles,
        codes.shape[1], tiles_m, splits, steps_each, items, BIAS=bias is not None,
        **launch_options(rows.dtype, config, splits > 1, epilogue),
    )  # fmt: skip
