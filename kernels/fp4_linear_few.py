"""Launches of the FP4 product for few rows of x: :mod:`vbcompile.kernels.fp4_linear_decode`, and where the layout is
``fragments2t`` :mod:`vbcompile.kernels.fp4_linear_diagonal` and :mod:`vbcompile.kernels.fp4_linear_stream`."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels.early_launch import kernel_in_between
from vbcompile.kernels.fp4_epilogue import epilogue_options, out_features
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import TILE, rows_of
from vbcompile.kernels.fp4_linear_triton import counters
from vbcompile.kernels.fp4_tuning import from_tables, tuned_config
from vbcompile.kernels.launches import launch
from vbcompile.kernels.replay import each_time
from vbcompile.kernels.triton_target import multiprocessor_count, refuses_triton

MOST_ROWS = 32
MOST_DIAGONAL_ROWS = 4
CHUNK = 128  # columns that the kernel for up to four rows takes at a time
_REGISTERS = 128  # left to itself the assembler takes fewer, and loads one after the other
_DTYPES = (torch.float16, torch.bfloat16)
_OTHER_LAYOUT = "written for sm_90 and later, whose layout is fragments2t"


@dataclass(frozen=True)
class FewConfig:
    """How one product is cut up.

    Attributes:
        strips: 1, 2 or 4 groups of 16 rows of the weight a block of threads takes.
        warps: warps that share them, each with its own columns.
        unroll: tiles of 64 columns a step; for up to four rows pairs of tiles.
        registers: most registers a thread, None for the compiler's choice.
    """

    strips: int
    warps: int
    unroll: int
    registers: int | None = None


@dataclass(frozen=True)
class StreamConfig:
    """How one product is cut up.

    Attributes:
        strips: 1 or 2 groups of 16 rows of the weight a warp takes.
        warps: of a block of threads, which takes as many times as many rows.
        blocks: blocks that a multiprocessor holds at a time.
        registers: most registers a thread.
        tiles: tiles of 64 columns a step, where they divide the columns.
    """

    strips: int
    warps: int
    blocks: int
    registers: int
    tiles: int = 2


def refuses_target(target: Target) -> str | None:
    """Why the kernel for few rows does not run on a target."""
    if reason := refuses_triton(target):
        return reason
    known = target.vendor == "nvidia" and target.compute_capability is not None
    return None if known else "written for NVIDIA's mma instruction"


def refuses_few(target: Target, dtype: torch.dtype, m: int, k: int, layout: str) -> str | None:
    """Why the kernel for few rows cannot run a case."""
    if reason := refuses_target(target):
        return reason
    if layout not in ("fragments2t", "fragments8t"):
        return f"reads layouts fragments2t and fragments8t, not {layout}"
    if dtype not in _DTYPES:
        return f"takes float16 and bfloat16, not {dtype}"
    if not 1 <= m <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} rows"
    return f"takes columns in multiples of {TILE}" if k % TILE else None


@from_tables
def few_config(target: Target, m: int, n: int, k: int) -> FewConfig:
    """The shape of blocks for ``x [m, k]`` and a weight ``[n, k]``: measured, or by formula."""
    if (tuned := tuned_config(target, "triton_few", n, k, m)) is not None:
        return FewConfig(*tuned)
    multiprocessors, strips = multiprocessor_count(target), -(-n // 16)
    if m > 16:
        return FewConfig(2, 4, 2, _REGISTERS)
    # about 16 warps a multiprocessor, each with several loads in flight
    together = 2 if strips > 8 * multiprocessors else 1
    wanted = 16 * multiprocessors * together / strips
    warps = 4 if wanted <= 4 else 8 if wanted <= 8 else 16
    unroll = 4 // together
    while unroll > 1 and k // TILE < unroll * warps:
        unroll //= 2
    return FewConfig(together, warps, unroll, _REGISTERS)


def refuses_diagonal_target(target: Target) -> str | None:
    """Why the kernels for up to four rows, and for more with x shared among warps, do not run on a target."""
    older = (target.compute_capability or (9, 0)) < (9, 0)
    return refuses_target(target) or (_OTHER_LAYOUT if older else None)


def refuses_diagonal(target: Target, dtype: torch.dtype, m: int, k: int, layout: str) -> str | None:
    """Why the kernel for up to four rows cannot run a case."""
    if m > MOST_DIAGONAL_ROWS:
        return f"takes 1 to {MOST_DIAGONAL_ROWS} rows"
    if layout == "fragments8t":
        return _OTHER_LAYOUT
    if reason := refuses_diagonal_target(target):
        return reason
    return f"takes columns in multiples of {CHUNK}" if k % CHUNK else refuses_few(target, dtype, m, k, layout)


@from_tables
def diagonal_config(target: Target, m: int, n: int, k: int) -> FewConfig:
    """Like :func:`few_config`: all blocks run at once, with about 14 warps a multiprocessor."""
    if (tuned := tuned_config(target, "triton_diagonal", n, k, m)) is not None:
        return FewConfig(*tuned)
    strips, chunks = -(-n // 16), k // CHUNK
    together = 2 if strips >= 8 * multiprocessor_count(target) else 1
    wanted = 10 * multiprocessor_count(target) * together / strips
    warps = 1
    while warps < min(wanted, 16) and chunks % (2 * warps) == 0:
        warps *= 2
    unroll = 2 if chunks % (2 * warps) == 0 and (m == 1 or together == 1) else 1
    return FewConfig(together, warps, unroll, _REGISTERS)


def refuses_stream(target: Target, dtype: torch.dtype, m: int, k: int, layout: str) -> str | None:
    """Why the kernel that shares x among warps cannot run a case."""
    if m <= MOST_DIAGONAL_ROWS:
        return f"takes {MOST_DIAGONAL_ROWS + 1} to {MOST_ROWS} rows"
    return refuses_diagonal(target, dtype, 1, k, layout) or refuses_few(target, dtype, m, k, layout)


@from_tables
def stream_config(target: Target, m: int, n: int, k: int) -> StreamConfig:
    """Like :func:`few_config`."""
    if (tuned := tuned_config(target, "triton_stream", n, k, m)) is not None:
        return StreamConfig(*tuned)
    return StreamConfig(2, 4, 4, _REGISTERS) if m <= 16 else StreamConfig(1, 8, 2, _REGISTERS)


@functools.lru_cache(maxsize=64)
def _assembly(
    kind: str, blocks: int, scale_words: int, wide: bool, strips: int, unroll: int
) -> dict[str, tuple[str, str]]:
    from vbcompile.kernels import fp4_linear_decode as device

    return {
        "LOAD": device.load_assembly(strips, unroll, scale_words),
        "LOAD_X": device.load_x_assembly(unroll, wide),
        "MULTIPLY": device.strip_assembly(kind, blocks, scale_words, wide),
    }


def launch_options(
    target: Target, dtype: torch.dtype, m: int, format_name: str, layout: str, config: FewConfig,
    epilogue: str = "none",
) -> dict[str, Any]:  # fmt: skip
    """Constants and compiler options of a launch."""
    blocks = max(1, (1 << (m - 1).bit_length()) // 8)
    scale_words = 32 // fp4_format(format_name).block_size
    multiplies = (target.compute_capability or (8, 0)) >= (9, 0)
    kind = "half" if dtype == torch.float16 else "bf16_sm90" if multiplies else "bf16_sm80"
    wide = layout == "fragments8t"
    registers = {"maxnreg": config.registers} if config.registers else {}
    return {
        "STRIPS": config.strips, "WARPS": config.warps, "UNROLL": config.unroll, "BLOCKS": blocks, "WORDS": scale_words,
        "WIDE": wide, "num_warps": config.warps, **epilogue_options(epilogue),
    } | registers | _assembly(kind, blocks, scale_words, wide, config.strips, config.unroll)  # fmt: skip


def product_few(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: FewConfig | None = None, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """``epilogue(x [..., k] @ weight.T + bias)`` in the dtype of x; weight in a fragment layout of NVIDIA's."""
    from vbcompile.kernels.fp4_linear_decode import fp4_decode_kernel

    rows = rows_of(x, k, 8)
    m, n = rows.shape[0], row_scale.shape[0]
    target = get_target(x.device)
    config = config or few_config(target, 1 << (m - 1).bit_length(), n, k)
    out = torch.empty(m, out_features(n, epilogue), dtype=x.dtype, device=x.device)
    launch(
        fp4_decode_kernel, (-(-n // (16 * config.strips)),),
        rows, codes, block_scales, row_scale, row_scale if bias is None else bias, out, m, n, k // TILE, rows.stride(0),
        codes.shape[1], BIAS=bias is not None,
        **launch_options(target, x.dtype, m, format_name, layout, config, epilogue),
    )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])


@functools.lru_cache(maxsize=64)
def _diagonal_assembly(kind: str, rows: int, strips: int, unroll: int, scale_words: int) -> dict[str, tuple[str, str]]:
    from vbcompile.kernels import fp4_linear_diagonal as device

    return {
        "LOAD": device.load_assembly(rows, strips, unroll, scale_words),
        "LOAD_X": device.load_x_assembly(rows, unroll),
        "MULTIPLY": device.chunks_assembly(kind, rows, strips, unroll, scale_words),
    }


def diagonal_options(
    dtype: torch.dtype, m: int, format_name: str, config: FewConfig, epilogue: str = "none"
) -> dict[str, Any]:
    """Constants and compiler options of a launch for up to four rows."""
    rows, half = 1 << (m - 1).bit_length(), dtype == torch.float16
    scale_words, kind = 32 // fp4_format(format_name).block_size, "half" if half else "bf16"
    # float16 takes more registers to decode than what is tuned for bfloat16
    most = min(224, 2048 // config.warps) if half else config.registers
    registers = {"maxnreg": most} if most else {}
    return {
        "ROWS": rows, "STRIPS": config.strips, "WARPS": config.warps, "UNROLL": config.unroll, "WORDS": scale_words,
        "FACTOR": 16.0 if half else 0.25, "num_warps": config.warps, "launch_pdl": True,
        **epilogue_options(epilogue),
    } | registers | _diagonal_assembly(kind, rows, config.strips, config.unroll, scale_words)  # fmt: skip


def product_diagonal(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: FewConfig | None = None, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """``epilogue(x [..., k] @ weight.T + bias)`` of up to four rows in the dtype of x; layout ``fragments2t``."""
    from vbcompile.kernels.fp4_linear_diagonal import fp4_diagonal_kernel

    rows = rows_of(x, k, 2)
    m, n = rows.shape[0], row_scale.shape[0]
    config = config or diagonal_config(get_target(x.device), 1 << (m - 1).bit_length(), n, k)
    out = torch.empty(m, out_features(n, epilogue), dtype=x.dtype, device=x.device)
    each_time(kernel_in_between, codes, block_scales)
    steps = k // (CHUNK * config.warps * config.unroll)
    launch(
        fp4_diagonal_kernel, (-(-n // (16 * config.strips)),),
        rows, codes, block_scales, row_scale, row_scale if bias is None else bias, out, m, n, steps, rows.stride(0),
        codes.shape[1], BIAS=bias is not None, **diagonal_options(x.dtype, m, format_name, config, epilogue),
    )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])


@functools.lru_cache(maxsize=64)
def _stream_assembly(kind: str, blocks: int, scale_words: int, strips: int, tiles: int) -> dict[str, tuple[str, ...]]:
    from vbcompile.kernels import fp4_linear_decode as device

    loads = [device.load_tile_assembly(tile, strips, scale_words) for tile in range(tiles)]
    return {
        "LOADS": (loads[0][1], *(code for code, _ in loads)),
        "MULTIPLY": device.strip_assembly(kind, blocks, scale_words, False),
    }


def stream_options(
    dtype: torch.dtype, m: int, format_name: str, config: StreamConfig, epilogue: str = "none"
) -> dict[str, Any]:
    """Constants and compiler options of a launch of the kernel that shares x among warps."""
    blocks, scale_words = max(1, (1 << (m - 1).bit_length()) // 8), 32 // fp4_format(format_name).block_size
    kind = "half" if dtype == torch.float16 else "bf16_sm90"
    return {
        "STRIPS": config.strips, "WARPS": config.warps, "BLOCKS": blocks, "WORDS": scale_words, "TILES": config.tiles,
        "num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": True, **epilogue_options(epilogue),
    } | _stream_assembly(kind, blocks, scale_words, config.strips, config.tiles)  # fmt: skip


def product_stream(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: StreamConfig | None = None, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """``epilogue(x [..., k] @ weight.T + bias)`` of 5 to 32 rows in the dtype of x; layout ``fragments2t``."""
    from vbcompile.kernels.fp4_linear_stream import fp4_stream_kernel

    rows = rows_of(x, k, 8)
    m, n = rows.shape[0], row_scale.shape[0]
    target = get_target(x.device)
    config = config or stream_config(target, 1 << (m - 1).bit_length(), n, k)
    if k % (TILE * config.tiles):
        config = replace(config, tiles=CHUNK // TILE)
    options = stream_options(x.dtype, m, format_name, config, epilogue)
    out = torch.empty(m, out_features(n, epilogue), dtype=x.dtype, device=x.device)
    each_time(kernel_in_between, codes, block_scales)
    blocks, steps = -(-n // (16 * config.strips * config.warps)), k // (TILE * config.tiles)
    programs = min(blocks * steps, multiprocessor_count(target) * config.blocks)
    size = 4 * config.strips * options["BLOCKS"] * 32 * config.warps
    partial = torch.empty(2 * programs * size, dtype=torch.float32, device=x.device)
    launch(
        fp4_stream_kernel, (programs,),
        rows.view(torch.int32), codes, block_scales, row_scale, row_scale if bias is None else bias, out, partial,
        counters(x.device, blocks), m, n, rows.stride(0) // 2, steps, codes.shape[1], blocks * steps,
        BIAS=bias is not None, **options,
    )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])
