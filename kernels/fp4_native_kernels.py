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
