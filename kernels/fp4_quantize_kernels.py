"""Triton device code of ``vblackwell::fp4_quantize``: scales and codes of blocks, by the rules of ``fp4_rounding``.

Everything is float32. BLOCK tells the format: 16, NVFP4 with E4M3 scales; 32, MXFP4 with E8M0 scales.
"""

import triton
import triton.language as tl


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for magnitudes up to ``2**22``."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _power_of_two(exponent):
    """``2**exponent`` from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _octave(x):
    """``2**floor(log2(x))`` of normal ``x > 0``."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _scale_value(byte, BLOCK: tl.constexpr):
    """Of scale bytes, int32; not of NaN."""
    if BLOCK == 16:
        exponent, mantissa = byte >> 3, (byte & 7).to(tl.float32)
        return tl.where(exponent == 0, mantissa, mantissa + 8) * _power_of_two(tl.maximum(exponent, 1) - 10)
    return tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def _nearest_scale(largest, BLOCK: tl.constexpr):
    """The byte that maps a block's largest magnitude to 6 (NVFP4), or the power of two of the OCP specification."""
    if BLOCK == 16:
        wanted = tl.minimum(tl.div_rn(largest, tl.full(largest.shape, 6.0, tl.float32)), 448.0)
        exponent = tl.maximum((wanted.to(tl.int32, bitcast=True) >> 23) - 127, -6)
        return (exponent + 6) * 8 + _round(wanted * _power_of_two(3 - exponent)).to(tl.int32)
    return tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 2, 0)


@triton.jit
def _round_e2m1(x):
    """``x >= 0`` to E2M1 magnitudes, saturating."""
    x = tl.minimum(x, 6.0)
    spacing = 6291456.0 * _octave(tl.maximum(x, 1.0))
    return (x + spacing) - spacing


@triton.jit
def _odd_ratio(byte):
    """What 1.5, 3 and 6 times an E4M3 scale are multiplied by when rounded to E4M3."""
    exact = 1.5 + 0.1875 * (byte & 7).to(tl.float32)
    steps = tl.where(exact < 2, 8.0, 4.0)
    return tl.div_rn(_round(exact * steps) / steps, exact)


@triton.jit
def _shifted(x, odd_ratio, EXACT_WEIGHT: tl.constexpr):
    """``x >= 0`` moved so that the nearest code of the result is the best one for a product in FP8."""
    shift = 0.75 * (odd_ratio - 1) / (1 + EXACT_WEIGHT)
    return tl.where(x < 1, x, x - shift[:, None] * _octave(tl.minimum(tl.maximum(x, 1.0), 4.0)))


@triton.jit
def _error(x, byte, FP8: tl.constexpr, EXACT_WEIGHT: tl.constexpr):
    """Squared error of ``x [blocks, BLOCK] >= 0`` rounded, in units of the scale; ``byte`` is it."""
    if FP8:
        ratio = _odd_ratio(byte)
        values = _round_e2m1(_shifted(x, ratio, EXACT_WEIGHT))
        odd = (values.to(tl.int32, bitcast=True) & 0x400000) != 0
        exact, in_fp8 = values - x, tl.where(odd, values * ratio[:, None], values) - x
        return tl.sum(in_fp8 * in_fp8, 1) + EXACT_WEIGHT * tl.sum(exact * exact, 1)
    exact = _round_e2m1(x) - x
    return tl.sum(exact * exact, 1)


@triton.jit
def _searched_scale(
    x, largest, BLOCK: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, FP8: tl.constexpr,
    EXACT_WEIGHT: tl.constexpr,
):  # fmt: skip
    """The byte of least squared error for ``x [blocks, BLOCK] >= 0``, the first of equals: of the nearest rule's, BELOW
    smaller ones and ABOVE larger ones."""
    LEAST: tl.constexpr = 1 if BLOCK == 16 else 0
    MOST: tl.constexpr = 126 if BLOCK == 16 else 254
    nearest = _nearest_scale(largest, BLOCK)
    unit = _scale_value(tl.maximum(tl.minimum(nearest, MOST), 1), BLOCK)  # so that no error overflows
    in_units = tl.div_rn(x, tl.broadcast_to(unit[:, None], x.shape))
    best = nearest
    least = tl.full(largest.shape, float("inf"), tl.float32)
    for number in tl.static_range(1 + BELOW + ABOVE):
        step = 0 if number == 0 else (number - 1 - BELOW if number <= BELOW else number - BELOW)
        byte = tl.minimum(tl.maximum(nearest + step, LEAST), MOST)
        ratio = tl.div_rn(_scale_value(byte, BLOCK), unit)
        scaled = in_units * tl.div_rn(tl.full(ratio.shape, 1.0, tl.float32), ratio)[:, None]
        error = _error(scaled, byte, FP8, EXACT_WEIGHT) * (ratio * ratio)
        best = tl.where(error < least, byte, best)
        least = tl.minimum(error, least)
    return best


@triton.jit
def _encode(
    x, unit, BLOCK: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, FP8: tl.constexpr,
    EXACT_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Codes of ``x [blocks, BLOCK]``, two a byte, and scale bytes ``[blocks]``: 0 for zeros, NaN's for NaN, infinity.

    ``unit``: the scale that goes before the blocks'.
    """
    broken = tl.sum((x - x != 0).to(tl.int32), 1) > 0
    size = tl.where(broken[:, None], 0.0, tl.abs(x))
    in_units = tl.div_rn(size, tl.full(size.shape, 1.0, tl.float32) * unit)
    largest = tl.max(in_units, 1)
    if ABOVE:
        byte = _searched_scale(in_units, largest, BLOCK, BELOW, ABOVE, FP8, EXACT_WEIGHT)
    else:
        byte = _nearest_scale(largest, BLOCK)
    byte = tl.where(largest == 0, 0, byte)
    scale = _scale_value(byte, BLOCK) * unit
    scale = tl.where((largest == 0) | (scale == 0), float("inf"), scale)
    scaled = tl.div_rn(size, tl.broadcast_to(scale[:, None], size.shape))
    if FP8:
        scaled = _shifted(scaled, _odd_ratio(byte), EXACT_WEIGHT)
    scaled = tl.minimum(scaled, 6.0)
    small, middle = _round(scaled * 2), _round(scaled) + 2
    code = tl.where(scaled < 2, small, tl.where(scaled < 4, middle, _round(scaled * 0.5) + 4)).to(tl.int32)
    code = code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)
    low, high = tl.split(tl.reshape(code, (x.shape[0], BLOCK // 2, 2)))
    byte = tl.where(broken, 127 if BLOCK == 16 else 255, byte)
    return (low | (high << 4)).to(tl.uint8), byte.to(tl.uint8)


@triton.jit
def fp4_rows_kernel(x_ptr, codes_ptr, scales_ptr, row_ptr, k, x_stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Nearest codes of x ``[m, k]``, rows ``x_stride`` apart: codes ``[m, kp / 2]``, scales ``[m, kp / BLOCK]``, uint8.

    NVFP4 has a scale a row, row float32 ``[m]``. BLOCKS blocks are taken at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(k, BLOCK)
    number = tl.arange(0, BLOCKS)
    column = number[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    unit = tl.full((), 1.0, tl.float32)
    if BLOCK == 16:
        largest = tl.zeros((BLOCKS, BLOCK), tl.float32)
        for start in range(0, k, BLOCKS * BLOCK):
            x = tl.load(x_ptr + row * x_stride + start + column, mask=column < k - start, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.where(x - x == 0, tl.abs(x), 0.0))
        top = tl.max(tl.max(largest, 1), 0)
        unit = tl.where(top == 0, 1.0, tl.maximum(tl.div_rn(top, 2688.0), 1.1754943508222875e-38))
        tl.store(row_ptr + row, unit)
    pair = number[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    for start in range(0, k, BLOCKS * BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + column, mask=column < k - start, other=0.0).to(tl.float32)
        codes, scales = _encode(x, unit, BLOCK, 0, 0, False, 0.0)
        first = start // BLOCK
        inside = number < blocks - first
        tl.store(scales_ptr + row * blocks + first + number, scales, mask=inside)
        tl.store(codes_ptr + (row * blocks + first) * (BLOCK // 2) + pair, codes, mask=inside[:, None])


@triton.jit
def fp4_search_kernel(
    x_ptr, unit_ptr, codes_ptr, scales_ptr, n, k, stride_e, stride_n, stride_k,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, FP8: tl.constexpr,
    EXACT_WEIGHT: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of a row of x ``[e, n, k]``, any strides; unit float32 ``[e * n]`` goes before the blocks' scales.

    Program: (row through all matrices, blocks). codes ``[e * n, kp / 2]``, scales ``[e * n, kp / BLOCK]``, uint8.
    """
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(k, BLOCK)
    number = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = number[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = x_ptr + (row // n) * stride_e + (row % n) * stride_n + column.to(tl.int64) * stride_k
    x = tl.load(at, mask=column < k, other=0.0).to(tl.float32)
    codes, scales = _encode(x, tl.load(unit_ptr + row), BLOCK, BELOW, ABOVE, FP8, EXACT_WEIGHT)
    pair = number[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(scales_ptr + row * blocks + number, scales, mask=number < blocks)
    tl.store(codes_ptr + row * blocks * (BLOCK // 2) + pair, codes, mask=(number < blocks)[:, None])
