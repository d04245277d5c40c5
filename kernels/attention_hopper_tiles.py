"""Operations on one tile of scores in the registers of a Hopper warpgroup, and turns between two warpgroups.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_forward``. Score tiles are ``[64, N]`` in the
layout in which the tensor cores leave them: a lane holds elements ``8 a + 2 lane + c`` of a row, a = 0 .. N / 8 - 1,
lane = 0 .. 3 (its number within a group of four), c = 0, 1.
"""

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


@gluon.jit
def exp2_mixed(x, POLY: gl.constexpr):
    """2**x for x <= 0. POLY: of every eight neighbours one is computed by a cubic on the FMA units (relative error
    7.5e-5), the others on the special function units, whose rate bounds small head dimensions; else all on these."""
    cubic: gl.constexpr = """{
        .reg .f32 t, r, f, p;
        .reg .b32 i;
        max.NaN.ftz.f32 t, $IN, 0fC2FA0000;
        add.rn.ftz.f32 r, t, 0f4B400000;
        sub.rn.ftz.f32 f, r, 0f4B400000;
        sub.rn.ftz.f32 f, t, f;
        fma.rn.ftz.f32 p, f, 0f3D61FBAC, 0f3E786F0D;
        fma.rn.ftz.f32 p, p, f, 0f3F31798D;
        fma.rn.ftz.f32 p, p, f, 0f3F7FFB49;
        mov.b32 i, r;
        shl.b32 i, i, 23;
        add.s32 i, i, 0x3F800000;
        mov.b32 r, i;
        mul.rn.ftz.f32 $OUT, p, r;
    }
    """
    special: gl.constexpr = (
        "ex2.approx.ftz.f32 $0, $8; ex2.approx.ftz.f32 $1, $9; ex2.approx.ftz.f32 $2, $10;"
        "ex2.approx.ftz.f32 $3, $11; ex2.approx.ftz.f32 $4, $12; ex2.approx.ftz.f32 $5, $13;"
        "ex2.approx.ftz.f32 $6, $14;"
    )
    if POLY:
        asm: gl.constexpr = special + cubic.replace("$OUT", "$7").replace("$IN", "$15")
        registers: gl.constexpr = "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f"
        return gl.inline_asm_elementwise(asm, registers, [x], dtype=gl.float32, is_pure=True, pack=8)
    else:
        return gl.exp2(x)


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
def mask_scores(s, first_row, first_key, sizes):
    """-inf where a key lies past the end or, causal, past the row's own position.

    A lane holds keys ``8 a + 2 lane + c`` of a row. Compared as ``8 a + c <= bound - 2 lane`` the left side is a
    constant of the instruction; whole key numbers would be hoisted out of the loops and held in registers.
    """
    parts = s.reshape(64, s.shape[1] // 8, 4, 2)
    split: gl.constexpr = parts.type.layout
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, split))
    steps: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, split))
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, lanes))
    bound = gl.minimum(rows + sizes[3], sizes[0] - 1) - first_key
    bound = bound[:, None] - 2 * gl.arange(0, 4, gl.SliceLayout(0, lanes))[None, :]
    keys = 8 * gl.arange(0, s.shape[1] // 8, gl.SliceLayout(1, steps))[:, None]
    keys = keys + gl.arange(0, 2, gl.SliceLayout(0, steps))[None, :]
    bound = gl.expand_dims(gl.expand_dims(bound, 1), 3)
    keys = gl.expand_dims(gl.expand_dims(keys, 0), 2)
    masked = gl.where(keys <= bound, parts, float("-inf")).reshape(64, s.shape[1])
    return gl.convert_layout(masked, s.type.layout, assert_trivial=True)


@gluon.jit
def sum_within_lane(p):
    """[64, N] -> [64, 4]: adds what one lane holds of a row; the four lanes of a row are added once, at the end."""
    return gl.sum(gl.sum(p.reshape(64, p.shape[1] // 8, 4, 2), 3), 1)


@gluon.jit
def carry_weights(p, dtype: gl.constexpr, PACK: gl.constexpr):
    """The form in which exponentials ``p`` float32 [64, N] go over the loop's edge: as they are, or PACKed to int32
    [64, N / 2], two neighbours rounded to ``dtype`` each, which takes half the registers. (Plain 16-bit values would be
    taken apart and put together again in every iteration.)"""
    if PACK:
        bf16: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        fp16: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        low, high = p.reshape(64, p.shape[1] // 2, 2).split()
        return gl.inline_asm_elementwise(
            bf16 if dtype == gl.bfloat16 else fp16, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return p


@gluon.jit
def use_weights(carried, dtype: gl.constexpr, layout: gl.constexpr):
    """What ``carry_weights`` gave, as the left operand of a product whose result has ``layout``."""
    if carried.dtype == gl.int32:
        low = carried.to(gl.int16).to(dtype, bitcast=True)
        high = (carried >> 16).to(gl.int16).to(dtype, bitcast=True)
        weights = gl.join(low, high).reshape(64, carried.shape[1] * 2)
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
