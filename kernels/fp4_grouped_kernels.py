"""Triton kernel of the FP4 product with a stack of experts, each multiplying its own rows of x."""

import triton
import triton.language as tl

from vbcompile.kernels.fp4_tiles import decode_tiles


@triton.jit(do_not_specialize=["experts", "row_tiles", "column_tiles"])
def fp4_grouped_kernel(
    x_ptr, codes_ptr, scales_ptr, row_scale_ptr, ends_ptr, out_ptr, experts, n, k, x_stride, row_tiles, column_tiles,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out[r] = weight[e] @ x[r]`` for the rows r of expert e, which are ``ends[e - 1] <= r < ends[e]``.

    x ``[t, k]``, rows ``x_stride`` apart, sorted by expert; codes int32 ``[experts, row_tiles, column_tiles, 512]`` and
    scales ``[experts, row_tiles, column_tiles, 4096 / BLOCK]`` in a tile layout; row_scale ``[experts, n]``; ends int32
    ``[experts]``; out ``[t, n]``. Program ``(64 * ROWS rows of the weight, block of BLOCK_M rows of one expert)``;
    EXPERTS is ``experts`` rounded up to a power of two.
    """
    tile, slot = tl.program_id(0), tl.program_id(1)
    # which expert's block this is: blocks are numbered from expert to expert
    number = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + number, mask=number < experts, other=0)
    starts = tl.load(ends_ptr + number - 1, mask=(number > 0) & (number < experts), other=0)
    blocks = tl.where(number < experts, tl.cdiv(ends - starts, BLOCK_M), 0)
    up_to = tl.cumsum(blocks, 0)
    expert = tl.sum((up_to <= slot).to(tl.int32), 0)
    if expert < experts:
        mine = number == expert
        first_m = tl.sum(tl.where(mine, starts + (slot - (up_to - blocks)) * BLOCK_M, 0), 0)
        end_m = tl.sum(tl.where(mine, ends, 0), 0)
        width: tl.constexpr = 64 * COLUMNS
        per_tile: tl.constexpr = 4096 // BLOCK
        rows_m = first_m + tl.arange(0, BLOCK_M)
        rows_n = tile * 64 * ROWS + tl.arange(0, 64 * ROWS)
        tiles = (expert.to(tl.int64) * row_tiles + tile * ROWS + tl.arange(0, ROWS))[:, None] * column_tiles
        code_at = codes_ptr + tiles * 512 + tl.arange(0, COLUMNS * 512)[None, :]
        scale_at = scales_ptr + tiles * per_tile + tl.arange(0, COLUMNS * per_tile)[None, :]
        columns = tl.arange(0, width)
        x_at = x_ptr + rows_m.to(tl.int64)[:, None] * x_stride + columns[None, :]
        live = (rows_m < end_m)[:, None]
        total = tl.zeros((64 * ROWS, BLOCK_M), tl.float32)
        for step in tl.range(0, column_tiles // COLUMNS, num_stages=STAGES):
            words = tl.load(code_at + step * (COLUMNS * 512), eviction_policy="evict_first")
            scales = tl.load(scale_at + step * (COLUMNS * per_tile), eviction_policy="evict_first")
            x = tl.load(x_at + step * width, mask=live & (columns < k - step * width)[None, :], other=0.0)
            weight = decode_tiles(words, scales, ROWS, COLUMNS, BLOCK, WIDE, HALF, ASM)
            total = tl.dot(weight.to(x.dtype), tl.trans(x), total, input_precision="ieee")
        scale = tl.load(row_scale_ptr + expert.to(tl.int64) * n + rows_n, mask=rows_n < n, other=0.0)
        total = total * (scale * 256.0)[:, None]
        out_at = out_ptr + rows_m.to(tl.int64)[None, :] * n + rows_n[:, None]
        keep = (rows_n < n)[:, None] & (rows_m < end_m)[None, :]
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=keep)
