"""Device code of the FP4 product for one to four rows of x, in Triton's Gluon dialect (NVIDIA, sm_80 and later).

A matrix product of 16 columns of the weight has room for eight columns of results, and R rows of x fill R. Here
``8 / R`` products in a row fill R each: block ``j`` of 16 columns meets a right operand that is zero but in its R
columns, so that their sums stay apart until the blocks' scales multiply them, in float32, once for ``8 / R`` products
instead of once a weight. Weights go from memory to registers as in :mod:`vbcompile.kernels.fp4_linear_decode`, one step
ahead of the products.

A code moved into the bits of a bfloat16 is its value times ``2**-126``; x times ``2**118`` makes up for it where all of
it is below 256, else the weights are multiplied: the tensor cores keep subnormal operands.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vbcompile.kernels.fp4_linear_decode import UNPACK_BODY, activate, call_assembly, stack
from vbcompile.kernels.fp4_tiles import TO_HALF

CHUNK = 128  # columns of eight products
WAIT = gl.constexpr("griddepcontrol.wait; mov.b64 $0, $1;")
_SMALL = "0x3C803C80"  # added to two magnitudes, carries into bit 15 of those of 256 and above
_SHIFT = "0x7A807A80"  # 2**118, twice


def load_assembly(rows: int, strips: int, unroll: int, scale_words: int) -> tuple[str, str]:
    """PTX, and its constraints, that loads codes and scales of ``16 * strips`` rows by ``128 * unroll`` columns.

    Operands: 8 words of codes a chunk and strip, then ``rows`` words each with the thread's scales; addresses of both.
    """
    parts = strips * unroll
    inputs = (8 + rows) * parts
    kind = ".b32" if scale_words == 2 and rows == 1 else ".u16"
    text = ["{"]
    for chunk in range(unroll):
        for strip in range(strips):
            part = chunk * strips + strip
            for half in range(2):
                words = ", ".join(f"${8 * part + 4 * half + i}" for i in range(4))
                at = 2048 * (2 * chunk + half) + 512 * strip
                text.append(f"ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {{{words}}}, [${inputs} + {at}];")
            for i in range(rows):
                tile, within = (i, 0) if rows <= 2 else (i // 2, i % 2 * 2 * scale_words)
                at = scale_words * (128 * (2 * chunk + tile) + 32 * strip) + within
                text.append(f"ld.global.nc{kind} ${8 * parts + rows * part + i}, [${inputs + 1} + {at}];")
    return "\n".join(text) + "\n}", ",".join(["=&r"] * inputs + ["l", "l"])


def load_x_assembly(rows: int, unroll: int) -> tuple[str, str]:
    """PTX, and its constraints, that loads ``2 * rows`` words of x a chunk. Operands: the words; the address."""
    count = 2 * rows * unroll
    loads = [f"ld.global.nc.b32 ${i}, [${count} + {256 // rows * (i // 2) + 16 * (i % 2)}];" for i in range(count)]
    return "{\n" + "\n".join(loads) + "\n}", ",".join(["=&r"] * count + ["l"])


def chunks_assembly(kind: str, rows: int, strips: int, unroll: int, scale_words: int) -> tuple[str, str]:
    """PTX, and its constraints, of ``16 * strips`` rows by ``128 * unroll`` columns of the weight times rows of x.

    Operands: results (float32, for the thread's two rows of a strip: one each if ``rows`` is 1, else two); what
    ``load_assembly`` and ``load_x_assembly`` gave; ``8 / rows`` masks, all ones where the thread's right operand is
    that product's; sums so far.
    """
    parts, results, words = strips * unroll, strips * (2 if rows == 1 else 4), 2 * rows * unroll
    text = [f"{{ .reg .pred q; .reg .b32 t, u, n, p<4>, b<2>, y<{words}>; .reg .f32 d<{4 * strips}>;"]
    x = results + (8 + rows) * parts
    copies = [f"mov.b32 y{i}, ${x + i};" for i in range(words)]
    plain, shifted = (_body(kind, flag, results, rows, strips, unroll, scale_words) for flag in (False, True))
    if kind == "half":
        text += [*copies, plain]
    else:
        text.append(f"and.b32 u, ${x}, 0x7FFF7FFF;")
        text += [f"max.NaN.xorsign.abs.bf16x2 u, u, ${x + i};" for i in range(1, words)]
        text.append(f"and.b32 u, u, 0x7FFF7FFF; add.u32 u, u, {_SMALL}; and.b32 u, u, 0x80008000;")
        text.append("setp.ne.u32 q, u, 0; vote.sync.any.pred q, q, 0xFFFFFFFF; @q bra LARGE;")
        text.append(f"mov.b32 n, {_SHIFT};")
        text += [f"mul.rn.bf16x2 y{i}, ${x + i}, n;" for i in range(words)]
        text += [plain, "bra DONE;\nLARGE:", *copies, shifted, "DONE:"]
    constraints = ["=&f"] * results + ["r"] * ((8 + rows) * parts + words + 8 // rows) + ["f"] * results
    return "\n".join(text) + "\n}", ",".join(constraints)


def _body(kind: str, shifted: bool, results: int, rows: int, strips: int, unroll: int, scale_words: int) -> str:
    """Products of all chunks; ``shifted``: of weights times ``2**118``."""
    parts, blocks = strips * unroll, 8 // rows
    scales, masks = results + 8 * parts, results + (8 + rows) * parts + 2 * rows * unroll
    name = "f16" if kind == "half" else "bf16"
    text = [f"mov.b32 n, {_SHIFT};"] if shifted else []
    for group in range(rows * unroll):  # products whose results stand side by side
        chunk, turn = divmod(group, rows)
        text += [f"mov.b32 d{i}, 0f00000000;" for i in range(4 * strips)]
        for j in range(blocks):
            text += [f"and.b32 b{i}, y{2 * group + i}, ${masks + j};" for i in range(2)]
            for strip in range(strips):
                word = f"${results + 8 * (chunk * strips + strip) + turn * blocks + j}"
                text.append(UNPACK_BODY.replace("$8", word) + (TO_HALF if kind == "half" else ""))
                text += [f"mul.rn.bf16x2 p{i}, p{i}, n;" for i in range(4) if shifted]
                own = ", ".join(f"d{4 * strip + i}" for i in range(4))
                text.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{{own}}}, {{p0, p2, p1, p3}}, "
                    f"{{b0, b1}}, {{{own}}};"
                )
        for strip in range(strips):
            word = f"${scales + rows * (chunk * strips + strip) + turn}"
            count = results // strips
            for i in range(4):  # row i // 2, column i % 2 of the thread's results
                own_scales = scale_words == 2 and rows == 1  # else both columns are of one block of the weight
                if own_scales or i % 2 == 0:
                    text.append(_scale(word, i // 2 + (i % 2 * 2 if own_scales else 0)))
                place = strip * count + (i // 2 if rows == 1 else i)
                first = group == 0 and (rows > 1 or i % 2 == 0)
                before = f"${masks + blocks + place}" if first else f"${place}"
                text.append(f"fma.rn.f32 ${place}, t, d{4 * strip + i}, {before};")
    return "\n".join(text)


def _scale(word: str, byte: int) -> str:
    """PTX that makes t, a float32, of a scale byte, times ``2**10``."""
    move = f"shl.b32 t, {word}, {20 - 8 * byte};" if byte < 3 else f"shr.u32 t, {word}, 4;"
    return move + " lop3.b32 t, t, 0x0FF00000, 0x40000000, 0xEA;"


@gluon.jit(do_not_specialize=["m", "steps", "column_tiles"])
def fp4_diagonal_kernel(
    x_ptr, codes_ptr, scales_ptr, row_scale_ptr, bias_ptr, out_ptr, m, n, steps, x_stride, column_tiles,
    ROWS: gl.constexpr, STRIPS: gl.constexpr, WARPS: gl.constexpr, UNROLL: gl.constexpr, WORDS: gl.constexpr,
    FACTOR: gl.constexpr, LOAD: gl.constexpr, LOAD_X: gl.constexpr, MULTIPLY: gl.constexpr, BIAS: gl.constexpr,
    FUNCTION: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """``out = epilogue(x @ weight.T * row_scale + bias)`` of up to ROWS rows of x and 16 * STRIPS of the weight.

    x ``[m, 128 * UNROLL * WARPS * steps]``, rows ``x_stride`` elements apart; codes ``[n tiles, column_tiles, 2048]``
    bytes and scales ``[n tiles, column_tiles, 128 * WORDS]`` bytes in the layout ``fragments2t``; row_scale, bias
    ``[n]``; out ``[m, n]``, or (GATED) ``[m, n / 2]``, after FUNCTION. FACTOR: what sums are multiplied with. LOAD,
    LOAD_X, MULTIPLY: assembly, constraints.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    warp, lane = thread // 32, thread % 32
    row, column = lane // 4, lane % 4
    strip = gl.program_id(0) * STRIPS
    tile = warp * (2 * UNROLL)
    at = ((strip // 4).to(gl.int64) * column_tiles + tile) * 4 + strip % 4
    code_at = codes_ptr.to(gl.int64) + at * 512 + lane * 16
    # the block or blocks of the weight that a thread's columns of results belong to, in the first group of products
    block = column * 2 // ROWS * WORDS // 2
    scale_at = scales_ptr.to(gl.int64) + (at * 8 + row) * (4 * WORDS)
    scale_at += block // (2 * WORDS) * (128 * WORDS) + block % (2 * WORDS) * 2
    x_row = gl.minimum(row % ROWS, m - 1).to(gl.int64)
    x_at = x_ptr.to(gl.int64) + (x_row * x_stride + tile * 64 + row // ROWS * 16 + column * 2) * 2
    masks = ()
    for j in gl.static_range(8 // ROWS):
        masks += (gl.where(row // ROWS == j, -1, 0),)
    COUNT: gl.constexpr = (2 if ROWS == 1 else 4) * STRIPS
    sums = ()
    for _ in gl.static_range(COUNT):
        sums += (gl.zeros([32 * WARPS], gl.float32, LAYOUT),)
    codes = call_assembly(LOAD, (code_at, scale_at), (8 + ROWS) * STRIPS * UNROLL, True, False)
    # weights may be read before the kernel ahead has ended, x may not
    x_at = gl.inline_asm_elementwise(WAIT, "=l,l", [x_at], gl.int64, is_pure=False, pack=1)
    x = call_assembly(LOAD_X, (x_at,), 2 * ROWS * UNROLL, True, False)
    for _ in range(steps - 1):
        code_at += WARPS * UNROLL * 4096
        scale_at += WARPS * UNROLL * 256 * WORDS
        x_at += WARPS * UNROLL * 256
        more = call_assembly(LOAD, (code_at, scale_at), (8 + ROWS) * STRIPS * UNROLL, True, False)
        more_x = call_assembly(LOAD_X, (x_at,), 2 * ROWS * UNROLL, True, False)
        sums = call_assembly(MULTIPLY, codes + x + masks + sums, COUNT, False, False)
        codes, x = more, more_x
    sums = call_assembly(MULTIPLY, codes + x + masks + sums, COUNT, False, False)
    # results of one row of x in several threads of a quad are sums over different blocks
    KEPT: gl.constexpr = 2 if ROWS == 4 else 1
    total = gl.sum(gl.reshape(stack(sums, COUNT), [WARPS, 8, 4 // KEPT, KEPT, COUNT]), 2)
    total = gl.reshape(gl.sum(total, 0), [8 * KEPT, COUNT])
    scaling = (row_scale_ptr, bias_ptr, n)
    END: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [WARPS, 1], [1, 0])
    SIDES: gl.constexpr = COUNT // (2 * STRIPS)  # rows of x of a thread
    lane = gl.arange(0, 8 * KEPT, layout=gl.SliceLayout(1, END))[:, None]
    if GATED:  # rows come in turns of eight: a thread's sums are of one row of the gate and of up
        entry = gl.arange(0, COUNT // 2, layout=gl.SliceLayout(0, END))[None, :]
        gate, up = gl.split(total.reshape([8 * KEPT, STRIPS, 2, SIDES]).permute((0, 1, 3, 2)))
        gate = gl.convert_layout(gate.reshape([8 * KEPT, COUNT // 2]), END)
        up = gl.convert_layout(up.reshape([8 * KEPT, COUNT // 2]), END)
        rows_n = (strip + entry // SIDES) * 16 + lane // KEPT
        known = rows_n < n
        gate = _scaled(gate, rows_n, scaling, FACTOR, BIAS)
        total = activate(gate, FUNCTION) * _scaled(up, rows_n + 8, scaling, FACTOR, BIAS)
        columns, width = (strip + entry // SIDES) * 8 + lane // KEPT, n // 2
    else:
        entry = gl.arange(0, COUNT, layout=gl.SliceLayout(0, END))[None, :]
        columns, width = strip * 16 + entry // SIDES * 8 + lane // KEPT, n
        known = columns < n
        total = activate(_scaled(gl.convert_layout(total, END), columns, scaling, FACTOR, BIAS), FUNCTION)
    rows_m = lane % KEPT * 2 + entry % SIDES
    out_at = out_ptr + rows_m.to(gl.int64) * width + columns
    gl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=known & (rows_m < m))


@gluon.jit
def _scaled(total, rows, scaling, FACTOR: gl.constexpr, BIAS: gl.constexpr):
    """Sums times the rows' scales, and the bias, in float32."""
    row_scale_ptr, bias_ptr, n = scaling
    total = total * (gl.load(row_scale_ptr + rows, mask=rows < n, other=0.0) * FACTOR)
    if BIAS:
        total += gl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(gl.float32)
    return total
