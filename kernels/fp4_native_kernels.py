"""Triton device code for hardware that multiplies FP4, or decodes it: ``tl.dot_scaled`` on weights in the plain layout.

sm_100: ``tcgen05.mma`` of kind ``mxf4nvf4`` and ``mxf4``; sm_120: ``mma`` of kind ``mxf4nvf4``; gfx950:
``v_mfma_scale_f32`` and, with activations in 16 bits, ``v_cvt_scalef32_pk``.
"""

import triton
import triton.language as tl

from vbcompile.kernels.fp4_linear_kernels import finish


@triton.jit(do_not_specialize=["m", "steps_each", "splits"])
def fp4_native_kernel(
    x_ptr, x_scales_ptr, x_row_ptr, codes_ptr, scales_ptr, row_scale_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr,
    m, n, k, x_stride, steps_each, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """``out = epilogue(x @ weight.T * x_row * row_scale + bias)`` for BLOCK_M rows of x and BLOCK_N of the weight.

    codes ``[n, kp / 2]``, scales ``[n, kp / BLOCK]`` in the plain layout, ``kp`` being k in whole blocks; row_scale,
    bias ``[n]``. KIND ``e2m1``: x likewise, ``[m, kp / 2]`` and ``[m, kp / BLOCK]``, with a scale a row, x_row ``[m]``,
    where BLOCK is 16; else x ``[m, k]`` of that kind, rows ``x_stride`` apart. Program, SPLIT, partial, arrived and out
    are those of :func:`vbcompile.kernels.fp4_linear_kernels.fp4_product_kernel`.
    """
    tile, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(k, BLOCK)
    byte, block, column = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // BLOCK), tl.arange(0, BLOCK_K)
    known_n, known_m = (rows_n < n)[:, None], (rows_m < m)[:, None]
    width = blocks * (BLOCK // 2)
    code_at = codes_ptr + rows_n.to(tl.int64)[:, None] * width + byte[None, :]
    scale_at = scales_ptr + rows_n.to(tl.int64)[:, None] * blocks + block[None, :]
    if KIND == "e2m1":
        x_at = x_ptr + rows_m.to(tl.int64)[:, None] * width + byte[None, :]
        x_scale_at = x_scales_ptr + rows_m.to(tl.int64)[:, None] * blocks + block[None, :]
    else:
        x_at = x_ptr + rows_m.to(tl.int64)[:, None] * x_stride + column[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * steps_each
    for step in tl.range(first, tl.minimum(first + steps_each, tl.cdiv(k, BLOCK_K)), num_stages=STAGES):
        in_codes = (byte < width - step * (BLOCK_K // 2))[None, :]
        in_scales = (block < blocks - step * (BLOCK_K // BLOCK))[None, :]
        codes = tl.load(code_at + step * (BLOCK_K // 2), mask=known_n & in_codes, other=0)
        scales = tl.load(scale_at + step * (BLOCK_K // BLOCK), mask=known_n & in_scales, other=0)
        if BLOCK == 16:
            scales = scales.to(tl.float8e4nv, bitcast=True)
        if KIND == "e2m1":
            x = tl.load(x_at + step * (BLOCK_K // 2), mask=known_m & in_codes, other=0)
            x_scales = tl.load(x_scale_at + step * (BLOCK_K // BLOCK), mask=known_m & in_scales, other=0)
            if BLOCK == 16:
                x_scales = x_scales.to(tl.float8e4nv, bitcast=True)
            total = tl.dot_scaled(codes, scales, "e2m1", tl.trans(x), x_scales, "e2m1", total)
        else:
            x = tl.load(x_at + step * BLOCK_K, mask=known_m & (column < k - step * BLOCK_K)[None, :], other=0.0)
            total = tl.dot_scaled(codes, scales, "e2m1", tl.trans(x), None, KIND, total)
    if KIND == "e2m1" and BLOCK == 16:
        total = total * tl.load(x_row_ptr + rows_m, mask=rows_m < m, other=0.0)[None, :]
    finish(
        total, out_ptr, partial_ptr, arrived_ptr, row_scale_ptr, bias_ptr, tile, split, tile_m, splits, m, n,
        SPLIT, BIAS, FUNCTION, GATED, 1.0,
    )  # fmt: skip


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for magnitudes up to ``2**22``."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _encode_blocks(x, unit, BLOCK: tl.constexpr):
    """Codes of float32 ``x [blocks, BLOCK]``, two a byte, and scale bytes ``[blocks]``, NaN for MXFP4 blocks that hold
    NaN or infinity. ``unit``: float32, the scale that goes before the blocks'."""
    largest = tl.max(tl.abs(x), 1)
    if BLOCK == 16:
        wanted = tl.minimum(tl.div_rn(tl.div_rn(largest, unit), 6.0), 448.0)
        exponent = tl.maximum((wanted.to(tl.int32, bitcast=True) >> 23) - 127, -6)
        steps = _round(wanted * _power_of_two(3 - exponent))
        scale_byte = (exponent + 6) * 8 + steps.to(tl.int32)
        scale = steps * _power_of_two(exponent - 3) * unit
    else:
        bits = largest.to(tl.int32, bitcast=True) >> 23
        broken = tl.sum((x - x != 0).to(tl.int32), 1) > 0
        scale_byte = tl.where(broken, 255, tl.where(largest == 0, 0, tl.maximum(bits - 2, 0)))
        scale = _power_of_two(tl.maximum(bits - 129, -126))
    inverse = tl.where(scale == 0, 0.0, tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale)))
    scaled = tl.minimum(tl.abs(x) * inverse[:, None], 6.0)
    small, middle = _round(scaled * 2), _round(scaled) + 2
    code = tl.where(scaled < 2, small, tl.where(scaled < 4, middle, _round(scaled * 0.5) + 4)).to(tl.int32)
    code = code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)
    low, high = tl.split(tl.reshape(code, (x.shape[0], BLOCK // 2, 2)))
    return (low | (high << 4)).to(tl.uint8), scale_byte.to(tl.uint8)


@triton.jit
def fp4_rows_kernel(x_ptr, codes_ptr, scales_ptr, row_ptr, k, x_stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """x ``[m, k]``, rows ``x_stride`` apart, as FP4: codes ``[m, kp / 2]``, scales ``[m, kp / BLOCK]``, both uint8.

    BLOCK 16: NVFP4, with a scale a row, row float32 ``[m]``, NaN where the row holds NaN or infinity; 32: MXFP4.
    BLOCKS blocks are taken at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(k, BLOCK)
    number = tl.arange(0, BLOCKS)
    column = number[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    unit = tl.full((), 1.0, tl.float32)
    if BLOCK == 16:
        largest = tl.zeros((BLOCKS, BLOCK), tl.float32)
        broken = tl.zeros((BLOCKS, BLOCK), tl.int32)
        for start in range(0, k, BLOCKS * BLOCK):
            x = tl.load(x_ptr + row * x_stride + start + column, mask=column < k - start, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
            broken = broken | (x - x != 0).to(tl.int32)
        top = tl.max(tl.max(largest, 1), 0)
        unit = tl.where(top == 0, 1.0, tl.maximum(tl.div_rn(top, 2688.0), 1.1754943508222875e-38))
        tl.store(row_ptr + row, tl.where(tl.sum(tl.sum(broken, 1), 0) > 0, float("nan"), unit))
    pair = number[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    for start in range(0, k, BLOCKS * BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + column, mask=column < k - start, other=0.0).to(tl.float32)
        codes, scales = _encode_blocks(x, unit, BLOCK)
        first = start // BLOCK
        inside = number < blocks - first
        tl.store(scales_ptr + row * blocks + first + number, scales, mask=inside)
        tl.store(codes_ptr + (row * blocks + first) * (BLOCK // 2) + pair, codes, mask=inside[:, None])
