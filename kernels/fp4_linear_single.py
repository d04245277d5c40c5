"""Device code of the FP4 product for one row of x, in Triton's Gluon dialect (NVIDIA, sm_80 and later).

A matrix product of 16 columns of the weight has room for eight columns of results, and one row of x fills one. Here
eight products in a row fill one each: block ``j`` of 16 columns meets a right operand that is zero but in column ``j``,
so that their sums stay apart until the blocks' scales multiply them, in float32, once for eight products instead of
once a weight. Weights go from memory to registers as in :mod:`vbcompile.kernels.fp4_linear_decode`, one step ahead of
the products.

A code moved into the bits of a bfloat16 is its value times ``2**-126``; x times ``2**118`` makes up for it where it is
below 256, else the weights are multiplied: the tensor cores keep subnormal operands.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vbcompile.kernels.fp4_linear_decode import UNPACK_BODY, call_assembly
from vbcompile.kernels.fp4_tiles import TO_HALF

CHUNK = 128  # columns of eight products
_SMALL = "0x3C803C80"  # added to two magnitudes, carries into bit 15 of those of 256 and above
_SHIFT = "0x7A807A80"  # 2**118, twice


def load_assembly(strips: int, unroll: int, scale_words: int) -> tuple[str, str]:
    """PTX, and its constraints, that loads codes and scales of ``16 * strips`` rows by ``128 * unroll`` columns.

    Operands: 8 words of codes a chunk and strip, then a word each with the thread's scales; addresses of both.
    """
    parts = strips * unroll
    inputs = 9 * parts
    kind = ".b32" if scale_words == 2 else ".u16"
    text = ["{"]
    for chunk in range(unroll):
        for strip in range(strips):
            part = chunk * strips + strip
            for half in range(2):
                words = ", ".join(f"${8 * part + 4 * half + i}" for i in range(4))
                at = 2048 * (2 * chunk + half) + 512 * strip
                text.append(f"ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {{{words}}}, [${inputs} + {at}];")
            at = scale_words * (256 * chunk + 32 * strip)
            text.append(f"ld.global.nc{kind} ${8 * parts + part}, [${inputs + 1} + {at}];")
    return "\n".join(text) + "\n}", ",".join(["=&r"] * inputs + ["l", "l"])


def load_x_assembly(unroll: int) -> tuple[str, str]:
    """PTX, and its constraints, that loads two words of x a chunk. Operands: the words; the address."""
    loads = [f"ld.global.nc.b32 ${i}, [${2 * unroll} + {256 * (i // 2) + 16 * (i % 2)}];" for i in range(2 * unroll)]
    return "{\n" + "\n".join(loads) + "\n}", ",".join(["=&r"] * 2 * unroll + ["l"])


def chunks_assembly(kind: str, strips: int, unroll: int, scale_words: int, mode: str = "branch") -> tuple[str, str]:
    """PTX, and its constraints, of ``16 * strips`` rows by ``128 * unroll`` columns of the weight times a row of x.

    Operands: results (2 float32 a strip, for the thread's rows); what ``load_assembly`` and ``load_x_assembly`` gave; 8
    masks, all ones where the thread's right operand is that product's; sums so far.
    """
    parts, results = strips * unroll, 2 * strips
    text = ["{ .reg .pred q; .reg .b32 t, u, n, f, p<4>, b<2>, y<16>; .reg .f32 d<16>;"]
    x = results + 9 * parts
    numbers = dict(results=results, strips=strips, unroll=unroll, scale_words=scale_words)
    if kind == "half":
        text += [f"mov.b32 y{i}, ${x + i};" for i in range(2 * unroll)]
        text.append(_body(kind, False, **numbers))
    elif mode == "weights":
        text += [f"mov.b32 y{i}, ${x + i};" for i in range(2 * unroll)]
        text.append(_body(kind, True, **numbers))
    else:
        text.append("mov.b32 u, 0;")
        for i in range(2 * unroll):
            text.append(f"and.b32 t, ${x + i}, 0x7FFF7FFF; add.u32 t, t, {_SMALL}; or.b32 u, u, t;")
        text.append("and.b32 u, u, 0x80008000; setp.ne.u32 q, u, 0; vote.sync.any.pred q, q, 0xFFFFFFFF;")
        text.append("@q bra LARGE;")
        text.append(f"mov.b32 n, {_SHIFT};")
        text += [f"mul.rn.bf16x2 y{i}, ${x + i}, n;" for i in range(2 * unroll)]
        text.append(_body(kind, False, **numbers))
        text.append("bra DONE;\nLARGE:")
        text += [f"mov.b32 y{i}, ${x + i};" for i in range(2 * unroll)]
        text.append(_body(kind, True, **numbers))
        text.append("DONE:")
    constraints = ["=&f"] * results + ["r"] * (9 * parts + 2 * unroll + 8) + ["f"] * results
    return "\n".join(text) + "\n}", ",".join(constraints)


def _body(kind: str, shifted: bool, results: int, strips: int, unroll: int, scale_words: int) -> str:
    parts = strips * unroll
    codes, scales, masks = results, results + 8 * parts, results + 9 * parts + 2 * unroll
    name = "f16" if kind == "half" else "bf16"
    text = [f"mov.b32 n, {_SHIFT};"] if shifted else []
    for chunk in range(unroll):
        for i in range(4 * strips):
            text.append(f"mov.b32 d{i}, 0f00000000;")
        for j in range(8):
            text += [f"and.b32 b{i}, y{2 * chunk + i}, ${masks + j};" for i in range(2)]
            for strip in range(strips):
                word = f"${codes + 8 * (chunk * strips + strip) + j}"
                text.append(UNPACK_BODY.replace("$8", word) + (TO_HALF if kind == "half" else ""))
                if shifted:
                    text += [f"mul.rn.bf16x2 p{i}, p{i}, n;" for i in range(4)]
                own = ", ".join(f"d{4 * strip + i}" for i in range(4))
                text.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{{own}}}, {{p0, p2, p1, p3}}, "
                    f"{{b0, b1}}, {{{own}}};"
                )
        for strip in range(strips):
            scale = f"${scales + chunk * strips + strip}"
            for i in range(4):
                place = (i // 2 + i % 2 * 2) if scale_words == 2 else i // 2
                move = ("shl.b32", 20 - 8 * place) if place < 3 else ("shr.u32", 4)
                text.append(f"{move[0]} t, {scale}, {move[1]}; lop3.b32 t, t, 0x0FF00000, 0x40000000, 0xEA;")
                out = f"${2 * strip + i // 2}"
                before = f"${masks + 8 + 2 * strip + i // 2}" if chunk == 0 and i % 2 == 0 else out
                text.append(f"fma.rn.f32 {out}, t, d{4 * strip + i}, {before};")
    return "\n".join(text)


@gluon.jit(do_not_specialize=["steps", "column_tiles"])
def fp4_single_kernel(
    x_ptr, codes_ptr, scales_ptr, row_scale_ptr, bias_ptr, out_ptr, n, steps, column_tiles,
    STRIPS: gl.constexpr, WARPS: gl.constexpr, UNROLL: gl.constexpr, WORDS: gl.constexpr, FACTOR: gl.constexpr,
    LOAD: gl.constexpr, LOAD_X: gl.constexpr, MULTIPLY: gl.constexpr, BIAS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """``out = x @ weight.T * row_scale + bias`` for one row of x; a block has ``16 * STRIPS`` rows of the weight.

    x ``[128 * UNROLL * WARPS * steps]``; codes ``[n tiles, column_tiles, 2048]`` bytes and scales ``[n tiles,
    column_tiles, 128 * WORDS]`` bytes in the layout ``fragments2t``; row_scale, bias, out ``[n]``.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    warp, lane = thread // 32, thread % 32
    row, column = lane // 4, lane % 4
    strip = gl.program_id(0) * STRIPS
    tile = warp * (2 * UNROLL)
    at = ((strip // 4).to(gl.int64) * column_tiles + tile) * 4 + strip % 4
    code_at = codes_ptr.to(gl.int64) + at * 512 + lane * 16
    # the two blocks of a thread's columns of results (one for scales of 32 columns), for both of its rows
    scale_at = scales_ptr.to(gl.int64) + (at * 8 + row) * (4 * WORDS) + column // 2 * (128 * WORDS)
    scale_at += column % 2 * (2 * WORDS)
    x_at = x_ptr.to(gl.int64) + (tile * 64 + row * 16 + column * 2) * 2
    masks = ()
    for j in gl.static_range(8):
        masks += (gl.where(row == j, -1, 0),)
    sums = ()
    for _ in gl.static_range(2 * STRIPS):
        sums += (gl.zeros([32 * WARPS], gl.float32, LAYOUT),)
    codes = call_assembly(LOAD, (code_at, scale_at), 9 * STRIPS * UNROLL, True, False)
    if EARLY:
        x_at = gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b64 $0, $1;", "=l,l", [x_at], gl.int64, is_pure=False, pack=1
        )
    x = call_assembly(LOAD_X, (x_at,), 2 * UNROLL, True, False)
    for _ in range(steps - 1):
        code_at += WARPS * UNROLL * 4096
        scale_at += WARPS * UNROLL * 256 * WORDS
        x_at += WARPS * UNROLL * 256
        more = call_assembly(LOAD, (code_at, scale_at), 9 * STRIPS * UNROLL, True, False)
        more_x = call_assembly(LOAD_X, (x_at,), 2 * UNROLL, True, False)
        sums = call_assembly(MULTIPLY, codes + x + masks + sums, 2 * STRIPS, False, False)
        codes, x = more, more_x
    sums = call_assembly(MULTIPLY, codes + x + masks + sums, 2 * STRIPS, False, False)
    if STRIPS == 1:
        both = gl.join(sums[0], sums[1])  # [thread, rows of 8]
    elif STRIPS == 2:
        both = gl.join(gl.join(sums[0], sums[2]), gl.join(sums[1], sums[3]))  # [thread, strip, half of it]
    else:
        first = gl.join(gl.join(sums[0], sums[4]), gl.join(sums[2], sums[6]))  # [thread, strip // 2, strip % 2]
        second = gl.join(gl.join(sums[1], sums[5]), gl.join(sums[3], sums[7]))
        both = gl.join(first, second)
    total = gl.sum(gl.sum(gl.reshape(both, [WARPS, 8, 4, 2 * STRIPS]), 2), 0)
    END: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [1, 0])
    total = gl.convert_layout(total, END)
    within = gl.arange(0, 8, layout=gl.SliceLayout(1, END))[:, None]
    rows = strip * 16 + within + 8 * gl.arange(0, 2 * STRIPS, layout=gl.SliceLayout(0, END))[None, :]
    known = rows < n
    total = total * (gl.load(row_scale_ptr + rows, mask=known, other=0.0) * FACTOR)
    if BIAS:
        total += gl.load(bias_ptr + rows, mask=known, other=0.0).to(gl.float32)
    gl.store(out_ptr + rows, total.to(out_ptr.dtype.element_ty), mask=known)
