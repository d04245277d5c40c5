"""Triton device code that turns tiles of packed FP4 weights into 16-bit floats.

A code moved into the bits of a bfloat16 is its value times ``2**-126`` (times ``2**-14`` in float16; 0.5 becomes a
subnormal, which these multiplications keep). The scale byte of the layout moved likewise carries ``2**118`` (``2**6``),
so one multiplication gives ``code * scale * 2**-8``, exact for every pair of code and scale in both types. The kernel's
epilogue multiplies its float32 sums by ``2**8`` times the row's scale.
"""

import triton
import triton.language as tl

# $0 to $7: values 0 to 3 of the low half and of the high one; $8: word of codes; $9, $10: the halves' scales
UNPACK = """
{ .reg .b32 t, u, s, p0, p1, p2, p3;
shl.b32 t, $8, 6; and.b32 p0, t, 0x81C081C0;
and.b32 p2, $8, 0x81C081C0;
shf.l.wrap.b32 t, $8, $8, 28; and.b32 p3, t, 0x81C081C0;
shf.l.wrap.b32 t, $8, $8, 26; shl.b32 u, $8, 2; and.b32 t, t, 0x81808180; lop3.b32 p1, u, 0x00400040, t, 0xEA;
"""
TO_HALF = "".join(
    f"shl.b32 t, p{i}, 3; and.b32 t, t, 0x0E000E00; lop3.b32 p{i}, p{i}, 0x80008000, t, 0xEA;\n" for i in range(4)
)


def _scaled(multiply: str) -> str:
    """Multiply the first two pairs by the low half's scale, the others by the high half's, and give them out."""
    lines = []
    for half, pairs in ((9, (0, 1)), (10, (2, 3))):
        lines.append(f"mov.b32 s, {{${half}, ${half}}};")
        lines += [multiply.format(f"p{i}") for i in pairs]
    lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, p{i};" for i in range(4)]
    return "\n".join(lines) + "\n}"


ASM_BF16_SM90 = tl.constexpr(UNPACK + _scaled("mul.rn.bf16x2 {0}, {0}, s;"))
ASM_BF16_SM80 = tl.constexpr(UNPACK + "mov.b32 t, 0x80008000;\n" + _scaled("fma.rn.bf16x2 {0}, {0}, s, t;"))
ASM_FP16 = tl.constexpr(UNPACK + TO_HALF + _scaled("mul.rn.f16x2 {0}, {0}, s;"))
_CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,h,h")
_EIGHT = tl.constexpr((tl.uint16,) * 8)


@triton.jit
def _scale_bits(scales, HALF: tl.constexpr):
    """Scale bytes of the tile layouts as the bits of 16-bit floats times ``2**118`` (``2**6`` in float16)."""
    if HALF:
        return (scales.to(tl.uint16) << 7) + 0x3000
    return (scales.to(tl.uint16) << 4) + 0x7600


@triton.jit
def _value(words, scale, SHIFT: tl.constexpr, HALF: tl.constexpr):
    """The value of the code at bit SHIFT of each word, times ``2**-8``; scale: bits of 16-bit floats."""
    kind: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    place: tl.constexpr = 9 if HALF else 6
    code = words >> SHIFT
    bits = (((code & 8) << 12) | ((code & 7) << place)).to(tl.uint16)
    return bits.to(kind, bitcast=True) * scale.to(kind, bitcast=True)


@triton.jit
def _join_four(a, b, c, d):
    """Four tensors as one with two more axes, of which the second to last goes from a to b."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _eight_values(words, low, high, HALF: tl.constexpr, ASM: tl.constexpr):
    """Values of the eight codes of each word, times ``2**-8``, with three more axes: (byte & 1, byte >> 1, half).

    words: int32; low, high: bits of the scales of the low and high codes of all four bytes. ASM: 0 for plain Triton and
    plain words, else the compute capability whose instructions decode interleaved ones.
    """
    kind: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    if ASM == 0:
        first = _join_four(
            _value(words, low, 0, HALF), _value(words, low, 8, HALF),
            _value(words, low, 16, HALF), _value(words, low, 24, HALF),
        )  # fmt: skip
        second = _join_four(
            _value(words, high, 4, HALF), _value(words, high, 12, HALF),
            _value(words, high, 20, HALF), _value(words, high, 28, HALF),
        )  # fmt: skip
        return tl.join(first, second)
    asm: tl.constexpr = ASM_FP16 if HALF else (ASM_BF16_SM90 if ASM >= 90 else ASM_BF16_SM80)
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        asm, _CONSTRAINTS, [words, low, high], _EIGHT, is_pure=True, pack=1
    )
    return tl.join(_join_four(a, b, c, d), _join_four(e, f, g, h)).to(kind, bitcast=True)


@triton.jit
def decode_tiles(
    words, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile of weights ``[64 * ROWS, 64 * COLUMNS]`` times ``2**-8``, bfloat16 or (HALF) float16.

    words: int32 ``[ROWS, COLUMNS * 512]``; scales: uint8 ``[ROWS, COLUMNS * 4096 / BLOCK]``; BLOCK: 16 or 32 elements a
    scale; WIDE: layout ``fragments8``, else ``fragments2``.
    """
    groups: tl.constexpr = 64 // BLOCK
    scale = tl.reshape(_scale_bits(scales, HALF), (ROWS, COLUMNS, 4, 8, groups, 2))
    if WIDE:
        # words [n, k, w, r, c, kh, rr]; a thread's eight columns of one kh lie in group (kh, c // (8 / groups))
        s = tl.permute(tl.reshape(scale, (ROWS, COLUMNS, 4, 8, 2, groups // 2, 2)), (0, 1, 2, 3, 5, 4, 6))
        s = tl.reshape(s, (ROWS, COLUMNS, 4, 8, groups // 2, 1, 2, 2))
        s = tl.broadcast_to(s, (ROWS, COLUMNS, 4, 8, groups // 2, 8 // groups, 2, 2))
        s = tl.reshape(s, (ROWS, COLUMNS, 4, 8, 4, 2, 2))
        values = _eight_values(tl.reshape(words, (ROWS, COLUMNS, 4, 8, 4, 2, 2)), s, s, HALF, ASM)
        # [n, k, w, r, c, kh, rr, byte & 1, byte >> 1, half] -> [n, w, rr, r, k, kh, c, half, byte >> 1, byte & 1]
        values = tl.permute(values, (0, 2, 6, 3, 1, 5, 4, 9, 8, 7))
    else:
        # words [n, k, w, r, c, group, ks in group]
        shape: tl.constexpr = (ROWS, COLUMNS, 4, 8, 4, groups, 4 // groups)
        low, high = tl.split(scale)
        low = tl.broadcast_to(tl.reshape(low, (ROWS, COLUMNS, 4, 8, 1, groups, 1)), shape)
        high = tl.broadcast_to(tl.reshape(high, (ROWS, COLUMNS, 4, 8, 1, groups, 1)), shape)
        values = _eight_values(tl.reshape(words, shape), low, high, HALF, ASM)
        # [n, k, w, r, c, ks, b, kh, rr] -> [n, w, rr, r, k, ks, kh, c, b]
        values = tl.reshape(values, (ROWS, COLUMNS, 4, 8, 4, 4, 2, 2, 2))
        values = tl.permute(values, (0, 2, 8, 3, 1, 5, 7, 4, 6))
    return tl.reshape(values, (64 * ROWS, 64 * COLUMNS))
