"""Launches of the FP4 product for many rows of x on Hopper (:mod:`vbcompile.kernels.fp4_linear_wide`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels.early_launch import kernel_in_between
from vbcompile.kernels.fp4_epilogue import epilogue_options, out_features
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import TILE, rows_of
from vbcompile.kernels.fp4_linear_fp8 import quantize_rows
from vbcompile.kernels.fp4_linear_fp8_words import pair_assembly
from vbcompile.kernels.fp4_linear_triton import counters
from vbcompile.kernels.fp4_tuning import from_tables, tuned_config
from vbcompile.kernels.launches import launch
from vbcompile.kernels.replay import each_time
from vbcompile.kernels.triton_target import multiprocessor_count, refuses_triton

_KINDS = {  # type of x: its name in Triton, and of the assembly that decodes to it
    torch.float16: ("float16", "half"),
    torch.bfloat16: ("bfloat16", "bf16_sm90"),
    torch.float8_e4m3fn: ("float8e4nv", ""),
}
_ALIGNMENT = 8  # elements: the copy engine wants rows at multiples of 16 bytes
_TILE_BYTES = TILE * TILE // 2 + TILE * TILE // 16  # codes and scales, of the format that has more of them
_SHARED_BYTES = 227 * 1024 - 1024  # of an SM, less what barriers take
_MOST_STAGES = 10
# of a thread of one of so many warpgroups, and of all threads before they are shared out; no others fit on the SM
_REGISTERS = {2: (232, 168), 3: (160, 128)}
# a step of 64 columns of one block, as measured on an H200; (block_m, tiles, warpgroups)
_STEP_MICROSECONDS = {
    False: {
        (16, 1, 2): 0.16, (32, 1, 2): 0.17, (64, 1, 2): 0.2, (64, 1, 3): 0.27, (128, 1, 2): 0.28, (128, 1, 3): 0.45,
        (128, 2, 2): 0.6, (256, 1, 2): 0.62,
    },
    True: {
        (64, 1, 2): 0.27, (128, 1, 2): 0.31, (128, 1, 3): 0.45, (128, 2, 2): 0.5, (256, 1, 2): 0.5,
    },
}  # fmt: skip
_SHARING_MICROSECONDS = 2.0  # for each block that shares a tile


@dataclass(frozen=True)
class WideConfig:
    """How one product is cut up.

    Attributes:
        block_m: rows of x a block of threads takes.
        tiles: tiles of 64 rows of the weight a warpgroup takes, 1 or 2.
        stages: shared buffers of 64 columns.
        splits: blocks that share the columns of one tile; 0: the tiles that would not fill the device are shared evenly
            by all blocks.
        blocks: 1; with two on an SM, blocks of different launches did not always end.
        in_turns: whether the warpgroups' products take turns at the tensor cores.
        warpgroups: of a block, 2 or 3.
        lag: pairs of steps of 64 columns that the last of ``splits`` blocks has more than the others, so that their
            sums are there when it is done.
    """

    block_m: int
    tiles: int
    stages: int
    splits: int
    blocks: int = 1
    in_turns: bool = True
    warpgroups: int = 2
    lag: int = 0

    @property
    def parts(self) -> int:
        """Tiles of 64 rows of the weight a block takes."""
        return self.warpgroups * self.tiles

    @property
    def steps(self) -> int:
        """Shared buffers that a barrier stands for: two where there are enough."""
        return 2 if self.tiles == 1 and self.stages >= 6 else 1


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


def wide_shape(block_m: int, tiles: int, splits: int, fp8: bool, warpgroups: int = 2, lag: int = 0) -> WideConfig:
    """A configuration with as many shared buffers as fit."""
    parts = warpgroups * tiles
    stage = TILE * block_m * (1 if fp8 else 2) + parts * _TILE_BYTES
    results = warpgroups * TILE * block_m * 2
    stages = min(_MOST_STAGES, (_SHARED_BYTES - results) // stage)
    return WideConfig(block_m, tiles, stages, splits, 1, False, warpgroups, lag)


def wide_candidates(m: int, fp8: bool) -> Iterator[WideConfig]:
    """Configurations worth trying for m rows of x."""
    for block_m, tiles, warpgroups in _STEP_MICROSECONDS[fp8]:
        if block_m <= max(64, m) and m <= {16: 16, 32: 128, 64: 512}.get(block_m, 16 * block_m):
            for splits, lag in ((1, 0), (0, 0), (2, 0), (2, 2), (2, 4), (3, 0), (4, 0), (4, 2), (5, 2), (6, 0), (8, 0)):
                yield wide_shape(block_m, tiles, splits, fp8, warpgroups, lag)


@from_tables
def wide_config(target: Target, m: int, n: int, k: int, fp8: bool = False) -> WideConfig:
    """The shape of blocks for ``x [m, k]`` and a weight ``[n, k]``: measured, or by formula."""
    if (tuned := tuned_config(target, "hopper_fp8" if fp8 else "hopper", n, k, m)) is not None and tuned[4] == 1:
        return WideConfig(*tuned)
    multiprocessors = multiprocessor_count(target)

    def microseconds(config: WideConfig) -> float:
        shares = plan(m, n, k, config, multiprocessors)
        pairs = -(-shares.whole // shares.programs) * shares.pairs + -(-shares.left // shares.programs)
        sharing = _SHARING_MICROSECONDS * shares.programs * shares.pairs / shares.left if shares.left else 0
        return 2 * pairs * _STEP_MICROSECONDS[fp8][config.block_m, config.tiles, config.warpgroups] + sharing

    return min(wide_candidates(m, fp8), key=microseconds)


@dataclass(frozen=True)
class Plan:
    """How blocks share the work: ``whole`` tiles one after another, then shares of ``left`` pairs of steps, of which a
    tile has ``pairs``: equal ones, or ``splits`` of each tile, the last ``lag`` pairs longer."""

    programs: int
    pairs: int
    whole: int
    left: int
    splits: int = 0
    lag: int = 0

    def begin(self, program: int) -> int:
        """The first pair of a program's share; as the kernel has it."""
        if not self.splits:
            return self.left * program // self.programs
        tile, split = divmod(program, self.splits)
        return tile * self.pairs + split * (self.pairs - self.lag) // self.splits


def plan(m: int, n: int, k: int, config: WideConfig, multiprocessors: int) -> Plan:
    """The shares of blocks in ``x [m, k]`` times a weight ``[n, k]``."""
    tiles = -(-n // (config.parts * TILE)) * -(-m // config.block_m)
    pairs = -(-k // (2 * TILE))
    if config.splits != 1:
        programs = min(multiprocessors, tiles * config.splits or multiprocessors, tiles * max(1, pairs // 2))
        whole = tiles // programs * programs
        if (left := (tiles - whole) * pairs) >= programs:  # a share is never empty
            splits = config.splits if programs == tiles * config.splits else 0
            return Plan(programs, pairs, whole, left, splits, min(config.lag, pairs - splits) if splits else 0)
    return Plan(min(tiles, multiprocessors), pairs, tiles, 0)


def launch_options(
    kind: torch.dtype, config: WideConfig, split: bool, scale_words: int, epilogue: str = "none"
) -> dict[str, Any]:
    """Constants and compiler options of a launch; ``scale_words``: words of scale bytes a thread has of a tile."""
    from triton.experimental.gluon import language as gl

    from vbcompile.kernels.fp4_linear_decode import word_assembly

    word = pair_assembly(scale_words) if kind == torch.float8_e4m3fn else word_assembly(_KINDS[kind][1])
    registers, at_first = _REGISTERS[config.warpgroups]
    return {
        "CONSUMERS": config.warpgroups, "TILES": config.tiles, "STAGES": config.stages // config.steps,
        "STEPS": config.steps, "TYPE": getattr(gl, _KINDS[kind][0]), "WORD": word, "SPLIT": split,
        "IN_TURNS": config.in_turns, "REGISTERS": registers, "num_warps": 4, "maxnreg": at_first, "launch_pdl": True,
    } | epilogue_options(epilogue)  # fmt: skip


def descriptors(
    rows: Tensor, codes: Tensor, block_scales: Tensor, out: Tensor, format_name: str, config: WideConfig,
    epilogue: str = "none",
) -> tuple[Any, ...]:  # fmt: skip
    """What the copy engine reads and writes: x, codes, scales, results."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def swizzled(tensor: Tensor, width: int = TILE) -> Any:
        return gl.NVMMASharedLayout.get_default_for([block_m, width], getattr(gl, _KINDS[tensor.dtype][0]))

    block_m, tiles = config.block_m, codes.shape[0]
    together = 1 if config.parts == 3 else config.parts  # a block has a power of two of them
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    words = 1024 // fp4_format(format_name).block_size
    width = out_features(TILE, epilogue)
    return (
        TensorDescriptor.from_tensor(rows, [block_m, TILE], swizzled(rows)),
        TensorDescriptor.from_tensor(codes.view(torch.int32).view(tiles, -1, 256), [together, 2, 256], flat),
        TensorDescriptor.from_tensor(block_scales.view(torch.int32).view(tiles, -1, words), [together, 1, words], flat),
        TensorDescriptor.from_tensor(out, [block_m, width], swizzled(out, width)),
    )


def product_wide(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str, config: WideConfig | None = None, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """``epilogue(x [..., k] @ weight.T + bias)`` in the dtype of x; weight ``[n, k]`` in the layout ``fragments2t``."""
    rows = rows_of(x, k, _ALIGNMENT)
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
    rows = rows_of(x, k)
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
    from vbcompile.kernels.fp4_linear_wide import fp4_wide_kernel

    (m, k), n = rows.shape, row_scale.shape[0]
    each_time(kernel_in_between, codes, block_scales)
    shares = plan(m, n, k, config, get_target(out.device).multiprocessors or 1)
    partial = arrived = row_scale
    if shares.left:
        size = (2 * shares.programs * config.parts, TILE * config.block_m)
        partial = torch.empty(size, dtype=torch.float32, device=out.device)
        arrived = counters(out.device, (shares.left // shares.pairs) * config.parts)
    launch(
        fp4_wide_kernel, (shares.programs,),
        *descriptors(rows, codes, block_scales, out, format_name, config, epilogue), row_scale,
        row_scale if bias is None else bias, row_scale if x_scale is None else x_scale, partial, arrived, m, n,
        -(-m // config.block_m), shares.pairs, shares.whole, shares.left, shares.splits, shares.lag,
        BIAS=bias is not None,
        **launch_options(
            rows.dtype, config, shares.left > 0, 32 // fp4_format(format_name).block_size, epilogue
        ),
    )  # fmt: skip
