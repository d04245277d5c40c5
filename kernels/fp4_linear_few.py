"""Launches of the FP4 product for few rows of x (:mod:`vbcompile.kernels.fp4_linear_decode`)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels.fp4_epilogue import epilogue_options, out_features
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import TILE
from vbcompile.kernels.fp4_tuning import tuned_config
from vbcompile.kernels.triton_target import refuses_triton

MOST_ROWS = 32
_REGISTERS = 128  # left to itself the assembler takes fewer, and loads one after the other
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FewConfig:
    """How one product is cut up.

    Attributes:
        strips: 1, 2 or 4 groups of 16 rows of the weight a block of threads takes.
        warps: warps that share them, each with its own columns.
        unroll: tiles of 64 columns a step.
        registers: most registers a thread, None for the compiler's choice.
    """

    strips: int
    warps: int
    unroll: int
    registers: int | None = None


def refuses_few(target: Target, dtype: torch.dtype, m: int, k: int, layout: str) -> str | None:
    """Why the kernel for few rows cannot run a case."""
    if reason := refuses_triton(target):
        return reason
    if target.vendor != "nvidia" or target.compute_capability is None:
        return "written for NVIDIA's mma instruction"
    if layout not in ("fragments2t", "fragments8t"):
        return f"reads layouts fragments2t and fragments8t, not {layout}"
    if dtype not in _DTYPES:
        return f"takes float16 and bfloat16, not {dtype}"
    if not 1 <= m <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} rows"
    return f"takes columns in multiples of {TILE}" if k % TILE else None


@functools.lru_cache(maxsize=256)
def few_config(target: Target, m: int, n: int, k: int) -> FewConfig:
    """The shape of blocks for ``x [m, k]`` and a weight ``[n, k]``: measured, or by formula."""
    if (tuned := tuned_config(target, "triton_few", n, k, m)) is not None:
        return FewConfig(*tuned)
    multiprocessors, strips = target.multiprocessors or 128, -(-n // 16)
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

    rows = x.reshape(-1, k)
    if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
        rows = rows.contiguous()
    m, n = rows.shape[0], row_scale.shape[0]
    target = get_target(x.device)
    config = config or few_config(target, 1 << (m - 1).bit_length(), n, k)
    out = torch.empty(m, out_features(n, epilogue), dtype=x.dtype, device=x.device)
    fp4_decode_kernel[(-(-n // (16 * config.strips)),)](
        rows, codes, block_scales, row_scale, row_scale if bias is None else bias, out, m, n, k // TILE, rows.stride(0),
        codes.shape[1], BIAS=bias is not None,
        **launch_options(target, x.dtype, m, format_name, layout, config, epilogue),
    )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])
