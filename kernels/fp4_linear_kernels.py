"""Triton kernels of the weight-only FP4 linear layer: product and dequantization."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vbcompile.kernels.fp4_epilogue_kernels import activation, gate_rows
from vbcompile.kernels.fp4_tiles import decode_tiles


@triton.jit(do_not_specialize=["m", "column_tiles", "steps_each", "splits"])
def fp4_product_kernel(
    x_ptr, codes_ptr, scales_ptr, row_scale_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr,
    m, n, k, x_stride, column_tiles, steps_each, splits,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``out = epilogue(x @ weight.T * row_scale + bias)`` for BLOCK_M rows of x and 64 * ROWS rows of the weight.

    x ``[m, k]``, rows ``x_stride`` apart; codes int32 ``[n tiles, column_tiles, 512]`` and scales ``[n tiles,
    column_tiles, 4096 / BLOCK]`` in a tile layout; row_scale, bias ``[n]``; out ``[m, n]`` or (GATED, rows
    of the weight in turns of eight) ``[m, n / 2]``, after FUNCTION. Program ``(tile of n, split
    of k, tile of m)`` takes ``steps_each`` steps of 64 * COLUMNS columns. With SPLIT, sums go to partial (float32
    ``[splits, m, n]``) and the last program of a tile to arrive adds them up in order; arrived (int32, zero) is zero
    again afterwards. EARLY: launched while the kernel ahead ends.
    """
    tile, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width: tl.constexpr = 64 * COLUMNS
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tiles = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None] * column_tiles
    code_at = codes_ptr + tiles * 512 + tl.arange(0, COLUMNS * 512)[None, :]
    per_tile: tl.constexpr = 4096 // BLOCK
    scale_at = scales_ptr + tiles * per_tile + tl.arange(0, COLUMNS * per_tile)[None, :]
    columns = tl.arange(0, width)
    x_at = x_ptr + rows_m.to(tl.int64)[:, None] * x_stride + columns[None, :]
    live = (rows_m < m)[:, None]
    total = tl.zeros((64 * ROWS, BLOCK_M), tl.float32)
    first = split * steps_each
    end = tl.minimum(first + steps_each, column_tiles // COLUMNS)
    if EARLY:
        gdc_wait()
    for step in tl.range(first, end, num_stages=STAGES):
        words = tl.load(code_at + step * (COLUMNS * 512), eviction_policy="evict_first")
        scales = tl.load(scale_at + step * (COLUMNS * per_tile), eviction_policy="evict_first")
        x = tl.load(x_at + step * width, mask=live & (columns < k - step * width)[None, :], other=0.0)
        weight = decode_tiles(words, scales, ROWS, COLUMNS, BLOCK, WIDE, HALF, ASM)
        total = tl.dot(weight.to(x.dtype), tl.trans(x), total, input_precision="ieee")
    finish(
        total, out_ptr, partial_ptr, arrived_ptr, row_scale_ptr, bias_ptr, tile, split, tile_m, splits, m, n,
        SPLIT, BIAS, FUNCTION, GATED, 256.0,
    )  # fmt: skip


@triton.jit
def finish(
    total, out_ptr, partial_ptr, arrived_ptr, row_scale_ptr, bias_ptr, tile, split, tile_m, splits, m, n,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Store the sums of one program, FACTOR of them a product, or (SPLIT) add up those of all splits first."""
    rows_n = tile * total.shape[0] + tl.arange(0, total.shape[0])
    rows_m = tile_m * total.shape[1] + tl.arange(0, total.shape[1])
    if SPLIT:
        keep = (rows_n < n)[:, None] & (rows_m < m)[None, :]
        sums_at = partial_ptr + rows_m.to(tl.int64)[None, :] * n + rows_n[:, None]
        size = tl.cast(m, tl.int64) * n
        tl.store(sums_at + split * size, total, mask=keep)
        tl.debug_barrier()
        counter = arrived_ptr + tile_m * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            total = tl.zeros_like(total)
            together: tl.constexpr = 4 if total.shape[1] <= 16 else 1  # loads of so many parts at a time
            for part in range(0, splits, together):
                for i in tl.static_range(together):
                    there = keep & (part + i < splits)
                    total += tl.load(sums_at + (part + i) * size, mask=there, other=0.0, cache_modifier=".cg")
            _store(total, out_ptr, row_scale_ptr, bias_ptr, tile, rows_m, m, n, BIAS, FUNCTION, GATED, FACTOR)
            tl.store(counter, 0)
    else:
        _store(total, out_ptr, row_scale_ptr, bias_ptr, tile, rows_m, m, n, BIAS, FUNCTION, GATED, FACTOR)


@triton.jit
def _store(
    total, out_ptr, row_scale_ptr, bias_ptr, tile, rows_m, m, n, BIAS: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Scale the sums, add the bias in float32, apply the epilogue, round once and store."""
    rows_n = tile * total.shape[0] + tl.arange(0, total.shape[0])
    scale = tl.load(row_scale_ptr + rows_n, mask=rows_n < n, other=0.0)
    total = total * (scale * FACTOR)[:, None]
    if BIAS:
        total += tl.load(bias_ptr + rows_n, mask=rows_n < n, other=0.0).to(tl.float32)[:, None]
    width = n
    if GATED:
        width = n // 2
        total = gate_rows(total, FUNCTION)
        rows_n = tile * total.shape[0] + tl.arange(0, total.shape[0])
    else:
        total = activation(total, FUNCTION, "quick")
    keep = (rows_n < width)[:, None] & (rows_m < m)[None, :]
    out_at = rows_m.to(tl.int64)[None, :] * width + rows_n[:, None]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["column_tiles"])
def fp4_dequantize_kernel(
    codes_ptr, scales_ptr, row_scale_ptr, out_ptr, n, k, column_tiles,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """out ``[n, k]`` = the weight, from a tile layout; program ``(row tile, COLUMNS column tiles)``.

    Not SCALED: without the rows' scales, an eighth of code times block scale, which is at most 384.
    """
    tile, step = tl.program_id(0), tl.program_id(1)
    rows = tile * 64 + tl.arange(0, 64)
    columns = step * 64 * COLUMNS + tl.arange(0, 64 * COLUMNS)
    first = tile.to(tl.int64) * column_tiles + step * COLUMNS
    per_tile: tl.constexpr = 4096 // BLOCK
    words = tl.load(codes_ptr + first * 512 + tl.arange(0, COLUMNS * 512)[None, :], eviction_policy="evict_first")
    scales = tl.load(scales_ptr + first * per_tile + tl.arange(0, COLUMNS * per_tile)[None, :])
    weight = decode_tiles(words, scales, 1, COLUMNS, BLOCK, WIDE, HALF, ASM)
    if SCALED:
        row_scale = tl.load(row_scale_ptr + rows, mask=rows < n, other=0.0) * 256.0
        value = weight.to(tl.float32) * row_scale[:, None]
    else:
        value = weight.to(tl.float32) * 32.0
    keep = (rows < n)[:, None] & (columns < k)[None, :]
    out_at = out_ptr + rows.to(tl.int64)[:, None] * k + columns[None, :]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def fp8_rows_kernel(
    x_ptr, out_ptr, scale_ptr, k, x_stride, factor, BLOCK: tl.constexpr, PAIRED: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """out ``[m, k]`` (E4M3, contiguous) times scale ``[m]`` is factor times x ``[m, k]``, rows ``x_stride`` apart.

    PAIRED: of every 16 columns, ``2 i + h`` of out is ``8 h + i`` of x; k is a multiple of 16. EARLY: launched while
    the kernel ahead ends.
    """
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    first = tl.load(x_ptr + row * x_stride + columns, mask=columns < k, other=0.0)
    largest = tl.abs(first.to(tl.float32)).to(tl.int32, bitcast=True)  # as whole numbers NaN is the largest
    for start in range(BLOCK, k, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=columns < k - start, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
    top = tl.max(largest, 0).to(tl.float32, bitcast=True)
    scale = tl.where(top == 0, 1.0, top / 448.0)
    scale = tl.where(scale < 1.2e-38, 1.2e-38, scale)  # the inverse of a smaller one is infinite
    tl.store(scale_ptr + row, scale * factor)
    inverse = 1.0 / scale
    _store_fp8_row(first, inverse, out_ptr + row * k, k, BLOCK, PAIRED)
    for start in range(BLOCK, k, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=columns < k - start, other=0.0)
        _store_fp8_row(x, inverse, out_ptr + row * k + start, k - start, BLOCK, PAIRED)


@triton.jit
def _store_fp8_row(x, inverse, out_ptr, columns, BLOCK: tl.constexpr, PAIRED: tl.constexpr):
    """``x [BLOCK]`` times ``inverse`` as E4M3, the first ``columns`` of it, for ``fp8_rows_kernel``."""
    rounded = tl.clamp(x.to(tl.float32) * inverse, -448.0, 448.0).to(out_ptr.dtype.element_ty)
    if PAIRED:
        rounded = tl.reshape(tl.trans(tl.reshape(rounded, (BLOCK // 16, 2, 8)), (0, 2, 1)), (BLOCK,))
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, rounded, mask=at < columns)
