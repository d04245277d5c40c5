"""Triton device code that turns tiles of packed FP4 weights into 16-bit floats.

A code moved into the bits of a bfloat16 is its value times ``2**-126`` (times ``2**-14`` in float16; 0.5 becomes a
subnormal, which these multiplications keep). The scale byte of the layout moved likewise carries ``2**118`` (``2**6``),
so one multiplication gives ``code * scale * 2**-8``, exact for every pair of code and scale in both types. The kernel's
epilogue multiplies its float32 sums by ``2**8`` times the row's scale.
"""

import triton
import triton.language as tl

# $0 to $3: pairs (0, 1), (2, 3) of the low half and of the high one; $4: word of codes; $5, $7: the halves' scales
_UNPACK = """
{ .reg .b32 t, u;
and.b32 $0, $4, 0x81C081C0;
shl.b32 t, $4, 3; and.b32 $1, t, 0x81C081C0;
shl.b32 t, $4, 6; and.b32 $2, t, 0x81C081C0;
shl.b32 t, $4, 1; and.b32 t, t, 0x80008000;
shr.u32 u, $4, 3; lop3.b32 t, u, 0x01800180, t, 0xEA;
shr.u32 u, $4, 7; lop3.b32 $3, u, 0x00400040, t, 0xEA;
"""
_TO_HALF = "".join(
    f"shl.b32 t, ${i}, 3; and.b32 t, t, 0x0E000E00; lop3.b32 ${i}, ${i}, 0x80008000, t, 0xEA;\n" for i in range(4)
)
_PAIRS = ((0, 5), (1, 5), (2, 7), (3, 7))
_MUL_BF16 = "".join(f"mul.rn.bf16x2 ${i}, ${i}, ${s};\n" for i, s in _PAIRS) + "}"
_FMA_BF16 = "mov.b32 t, 0x80008000;\n" + "".join(f"fma.rn.bf16x2 ${i}, ${i}, ${s}, t;\n" for i, s in _PAIRS) + "}"
_MUL_FP16 = "".join(f"mul.rn.f16x2 ${i}, ${i}, ${s};\n" for i, s in _PAIRS) + "}"

ASM_BF16_SM90 = tl.constexpr(_UNPACK + _MUL_BF16)
ASM_BF16_SM80 = tl.constexpr(_UNPACK + _FMA_BF16)
ASM_FP16 = tl.constexpr(_UNPACK + _TO_HALF + _MUL_FP16)
_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")


@triton.jit
def _code_bits(nibble, HALF: tl.constexpr):
    """E2M1 codes (0 to 15, int32) as the bits of 16-bit floats."""
    place: tl.constexpr = 9 if HALF else 6
    return (((nibble & 8) << 12) | ((nibble & 7) << place)).to(tl.uint16)


@triton.jit
def decode_scale_bytes(scales, HALF: tl.constexpr):
    """Scale bytes of the tile layouts as 16-bit floats times ``2**118`` (``2**6`` in float16)."""
    if HALF:
        return ((scales.to(tl.uint16) << 7) + 0x3000).to(tl.float16, bitcast=True)
    return ((scales.to(tl.uint16) << 4) + 0x7600).to(tl.bfloat16, bitcast=True)


@triton.jit
def _two_halves(words, low_scale, high_scale, HALF: tl.constexpr, ASM: tl.constexpr):
    """Values of the low and high codes of each byte, times ``2**-8``.

    words: uint8; low_scale, high_scale: 16-bit floats, equal within each four bytes. ASM: 0 for plain Triton, else the
    compute capability whose instructions decode interleaved words.
    """
    kind: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    if ASM == 0:
        nibbles = words.to(tl.int32)
        low = _code_bits(nibbles & 15, HALF).to(kind, bitcast=True) * low_scale
        high = _code_bits(nibbles >> 4, HALF).to(kind, bitcast=True) * high_scale
        return low, high
    asm: tl.constexpr = ASM_FP16 if HALF else (ASM_BF16_SM90 if ASM >= 90 else ASM_BF16_SM80)
    return tl.inline_asm_elementwise(
        asm, _CONSTRAINTS, [words, low_scale, high_scale], (kind, kind), is_pure=True, pack=4
    )


@triton.jit
def decode_tiles(
    words, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile of weights ``[64 * ROWS, 64 * COLUMNS]`` times ``2**-8``, bfloat16 or (HALF) float16.

    words: uint8 ``[ROWS, COLUMNS * 2048]``; scales: uint8 ``[ROWS, COLUMNS * 4096 / BLOCK]``; BLOCK: 16 or 32 elements
    a scale; WIDE: layout ``fragments8``, else ``fragments2``.
    """
    groups: tl.constexpr = 64 // BLOCK
    scale = decode_scale_bytes(scales, HALF)
    low_scale, high_scale = tl.split(tl.reshape(scale, (ROWS, COLUMNS, 4, 8, groups, 2)))
    if WIDE:
        # bytes [n, k, w, r, c, kh, rr, j]; a thread's eight columns of one kh lie in one group
        w = tl.reshape(words, (ROWS, COLUMNS, 4, 8, 4, 2, 2, 4))
        s = tl.join(low_scale, high_scale)  # [n, k, w, r, group, rr]
        s = tl.reshape(s, (ROWS, COLUMNS, 4, 8, 2, groups // 2, 2))  # group = (kh, c // (8 / groups))
        s = tl.permute(s, (0, 1, 2, 3, 5, 4, 6))
        s = tl.reshape(s, (ROWS, COLUMNS, 4, 8, groups // 2, 1, 2, 2, 1))
        s = tl.broadcast_to(s, (ROWS, COLUMNS, 4, 8, groups // 2, 8 // groups, 2, 2, 4))
        s = tl.reshape(s, (ROWS, COLUMNS, 4, 8, 4, 2, 2, 4))
        low, high = _two_halves(w, s, s, HALF, ASM)
        both = tl.permute(tl.join(low, high), (0, 2, 6, 3, 1, 5, 4, 8, 7))
    else:
        # bytes [n, k, w, r, c, ks, kh, b]
        w = tl.reshape(words, (ROWS, COLUMNS, 4, 8, 4, groups, 4 // groups, 4))
        shape: tl.constexpr = (ROWS, COLUMNS, 4, 8, 4, groups, 4 // groups, 4)
        low_s = tl.broadcast_to(tl.reshape(low_scale, (ROWS, COLUMNS, 4, 8, 1, groups, 1, 1)), shape)
        high_s = tl.broadcast_to(tl.reshape(high_scale, (ROWS, COLUMNS, 4, 8, 1, groups, 1, 1)), shape)
        low, high = _two_halves(w, low_s, high_s, HALF, ASM)
        both = tl.reshape(tl.join(low, high), (ROWS, COLUMNS, 4, 8, 4, 4, 2, 2, 2))
        both = tl.permute(both, (0, 2, 8, 3, 1, 5, 6, 4, 7))
    return tl.reshape(both, (64 * ROWS, 64 * COLUMNS))
