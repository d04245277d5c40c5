"""Operations on one tile of scores in the registers of a Hopper warpgroup, and turns between two warpgroups.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_forward``. Score tiles are ``[64, N]`` in the
layout in which the tensor cores leave them: a lane holds elements ``8 a + 2 lane + c`` of a row, a = 0 .. N / 8 - 1,
lane = 0 .. 3 (its number within a group of four), c = 0, 1.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TURN = gl.constexpr(8)  # first named barrier of the turns; the compiler itself uses 0 to 5


@gluon.jit
def wait_turn(index: gl.constexpr):
    """Block until the other consumer has passed the turn ``index`` on."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 256; mov.u32 $0, 0;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def pass_turn(index: gl.constexpr):
    """Let the other consumer through its ``wait_turn(index)``; does not block."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 256; mov.u32 $0, 0;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1
    )


_CUBIC = """{
        .reg .f32 t, r, f, p;
        .reg .b32 i, j;
        max.ftz.f32 t, $IN, 0fC2FA0000;
        add.rn.ftz.f32 r, t, 0f4B400000;
        sub.rn.ftz.f32 f, r, 0f4B400000;
        sub.rn.ftz.f32 f, t, f;
        fma.rn.ftz.f32 p, f, 0f3D61FBAC, 0f3E786F0D;
        fma.rn.ftz.f32 p, p, f, 0f3F31798D;
        fma.rn.ftz.f32 p, p, f, 0f3F7FFB49;
        mov.b32 i, r;
        shl.b32 i, i, 23;
        mov.b32 j, p;
        add.s32 i, i, j;
        mov.b32 $OUT, i;
    }
    """


def _mixed(cubics: int) -> gl.constexpr:
    """Instructions for eight neighbours: the last ``cubics`` of them by the cubic, the others by the special function
    units."""
    special = "".join(f"ex2.approx.ftz.f32 ${n}, ${n + 8};" for n in range(8 - cubics))
    cubic = "".join(_CUBIC.replace("$OUT", f"${n}").replace("$IN", f"${n + 8}") for n in range(8 - cubics, 8))
    return gl.constexpr(special + cubic)


_MIXED_1, _MIXED_2, _MIXED_3, _MIXED_4 = (_mixed(n) for n in (1, 2, 3, 4))


@gluon.jit
def exp2_mixed(x, POLY: gl.constexpr):
    """2**x for x <= 0. Of every eight neighbours POLY are computed by a cubic on the FMA units (relative error 7.5e-5),
    the others on the special function units, whose rate bounds small head dimensions. The cubic makes a number of NaN:
    rows with a NaN must have it in their maximum, so that every exponential is one."""
    if POLY == 0:
        return gl.exp2(x)
    else:
        asm: gl.constexpr = _MIXED_1 if POLY == 1 else _MIXED_2 if POLY == 2 else _MIXED_3 if POLY == 3 else _MIXED_4
        registers: gl.constexpr = "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f"
        return gl.inline_asm_elementwise(asm, registers, [x], dtype=gl.float32, is_pure=True, pack=8)


@gluon.jit
def larger(a, b):
    """Maximum; NaN wins."""
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def rounded_product(a, b):
    """a * b, rounded: it is never made part of another instruction."""
    return gl.inline_asm_elementwise(
        "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def row_maximum(s):
    """Largest element of each row ``[64]``; NaN wins. Neighbours are compared first, then four parts of what a lane
    holds side by side: one chain of dependent instructions would be longer than the tile's work."""
    pairs = gl.reduce(s.reshape(64, 2, s.shape[1] // 16, 4, 2), 4, larger)
    lanes = gl.reduce(gl.reduce(pairs, 2, larger), 1, larger)
    return gl.convert_layout(gl.reduce(lanes, 1, larger), gl.SliceLayout(1, s.type.layout))


@gluon.jit
def locate(index, query_tiles, heads, GROUP: gl.constexpr):
    """Work item -> (query tile, flat head): within GROUP heads the last, longest query tiles go first."""
    if GROUP == 1:
        head = index // query_tiles
        return query_tiles - 1 - (index - head * query_tiles), head
    per_group = GROUP * query_tiles
    group = index // per_group
    inside = index - group * per_group
    width = gl.minimum(heads - group * GROUP, GROUP)
    rank = inside // width
    return query_tiles - 1 - rank, group * GROUP + inside - rank * width


@gluon.jit
def sum_within_lane(p):
    """[64, N] -> [64, 4]: adds what one lane holds of a row; the four lanes of a row are added once, at the end."""
    return gl.sum(gl.sum(p.reshape(64, p.shape[1] // 8, 4, 2), 3), 1)


@gluon.jit
def halves(s):
    """Left and right half of a tile's columns."""
    return s.reshape(64, 2, s.shape[1] // 2).permute((0, 2, 1)).split()


@gluon.jit
def pack_weights(p, dtype: gl.constexpr):
    """Float32 [64, N] -> int32 [64, N / 2], two neighbours rounded to ``dtype`` each: the form in which weights go over
    the loop's edge. (Plain 16-bit values would be taken apart and put together again in every iteration.)"""
    bf16: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    fp16: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    low, high = p.reshape(64, p.shape[1] // 2, 2).split()
    return gl.inline_asm_elementwise(
        bf16 if dtype == gl.bfloat16 else fp16, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def carry_weights(p, dtype: gl.constexpr, ROUNDING: gl.constexpr):
    """The form in which weights go over the loop's edge; see ``advance``."""
    if ROUNDING == "halfway":
        left, right = halves(p)
        return (pack_weights(left, dtype), pack_weights(right, dtype))
    elif ROUNDING == "early":
        return pack_weights(p, dtype)
    else:
        return p


@gluon.jit
def unpack_weights(packed, dtype: gl.constexpr):
    """Inverse of ``pack_weights``."""
    low = packed.to(gl.int16).to(dtype, bitcast=True)
    high = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(low, high).reshape(64, packed.shape[1] * 2)


@gluon.jit
def use_weights(carried, dtype: gl.constexpr, layout: gl.constexpr, ROUNDING: gl.constexpr):
    """What ``carry_weights`` gave, as the left operand of a product whose result has ``layout``."""
    if ROUNDING == "halfway":
        both = gl.join(carried[0], carried[1]).permute((0, 2, 1))
        weights = unpack_weights(both.reshape(64, carried[0].shape[1] * 2), dtype)
    elif ROUNDING == "early":
        weights = unpack_weights(carried, dtype)
    else:
        weights = carried.to(dtype)
    return gl.convert_layout(weights, gl.DotOperandLayout(0, layout, 2), assert_trivial=True)


@gluon.jit
def finish_first(x):
    """x unchanged, but computed before whatever follows in the program.

    The assembler otherwise moves the wait for P V ahead of the exponentials, which are to run under it: it knows of no
    dependence. A warp barrier whose mask depends on x (always full: no sum of exponentials has that bit pattern) stays
    in place, and waits stay behind it.
    """
    asm: gl.constexpr = """{
        .reg .pred q;
        .reg .f32 t;
        .reg .b32 m;
        add.f32 t, $2, $3;
        setp.eq.b32 q, t, 0x7F000001;
        selp.b32 m, 0x7FFFFFFF, 0xFFFFFFFF, q;
        bar.warp.sync m;
        mov.b32 $0, $2;
        mov.b32 $1, $3;
    }"""
    return gl.inline_asm_elementwise(asm, "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def next_reference(s, m, offset, factor, UNBOUNDED: gl.constexpr):
    """What a tile ``s`` of logits less ``offset`` makes of the rows' maximum ``m``, and how its weights are computed.

    The maximum is carried times ``factor``, rounded once, so that tiles agree. UNBOUNDED: that product may overflow;
    the maximum is carried alone, and rows that hold nothing but numbers near the least finite one (which masks add) get
    a factor that cannot overflow: their exponentials are ones, as those of equal logits are.

    Returns:
        new maximum; factor of the sums so far; what logits are multiplied by, and what is then taken away.
    """
    if UNBOUNDED:
        new_m = larger(m, row_maximum(s) + offset)
        base = gl.where(new_m == float("-inf"), 0.0, new_m)  # rows that have seen no key yet
        own = gl.where(gl.abs(base) < 1e38, factor, 7.9e-31)
        before = gl.where((gl.abs(m) < 1e38) | (m == float("-inf")), factor, 7.9e-31)
        scaled = rounded_product(base, own)
        alpha = gl.exp2(rounded_product(m, before) - scaled)
        return new_m, alpha, own, scaled - rounded_product(offset, own)
    else:
        offset = offset * factor
        new_m = larger(m, row_maximum(s) * factor + offset)
        base = gl.where(new_m == float("-inf"), 0.0, new_m)
        return new_m, gl.exp2(m - base), factor, base - offset


@gluon.jit
def exponentials(s, own, base, POLY: gl.constexpr):
    """Weights of part of a tile, ``own`` and ``base`` from ``next_reference``."""
    rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    base = gl.convert_layout(base, rows)[:, None]
    if own.type.is_block():
        own = gl.convert_layout(own, rows)[:, None]
    return exp2_mixed(s * own - base, POLY)
