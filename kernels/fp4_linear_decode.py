"""Device code of the FP4 product for few rows of x, in Triton's Gluon dialect (NVIDIA, sm_80 and later).

Every thread loads the codes that it multiplies, 16 bytes at a time, straight into registers: in the layouts
``fragments2t`` and ``fragments8t`` they are what the thread holds of the left operand of ``mma.sync.m16n8k16`` (PTX
ISA, "Matrix Fragments for mma.m16n8k16"). No shared memory and no barrier before the last sum, so many loads are in
flight. Tensors are one element a thread, ``[32 * WARPS]``; thread ``32 w + 4 r + c``.

The warps of a block share 16 * STRIPS rows of the weight and take turns at its columns; their sums are added at the end
in a fixed order.
"""

import re
from collections.abc import Iterator

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vbcompile.kernels import fp4_epilogue_kernels
from vbcompile.kernels.fp4_tiles import TO_HALF, UNPACK

activate = gluon.jit(fp4_epilogue_kernels.activate.fn)
UNPACK_BODY = UNPACK.split("\n", 2)[2]  # without the opening of its own scope
# a branch around code that never runs (no grid has a second dimension here): the assembler moves nothing across
STAY = "mov.u32 t, %nctaid.y; setp.eq.u32 p, t, 1; @p bra ON;\nAGAIN:\nnanosleep.u32 1000; @!p bra AGAIN;\nON:\n"
STAY_SCOPE = "{ .reg .pred p; .reg .b32 t;"
_MULTIPLY = {
    "half": "mul.rn.f16x2 {0}, {0}, {1};",
    "bf16_sm80": "fma.rn.bf16x2 {0}, {0}, {1}, n;",
    "bf16_sm90": "mul.rn.bf16x2 {0}, {0}, {1};",
}


def load_assembly(strips: int, unroll: int, scale_words: int) -> tuple[str, str]:
    """PTX, and its constraints, that loads codes and scales of ``16 * strips`` rows by ``64 * unroll`` columns.

    Operands: 4 words of codes a tile and strip, then ``scale_words`` words of scale bytes each; addresses of codes and
    of scales; columns left, counted in tiles. What lies beyond reads as zero.
    """
    parts = strips * unroll
    codes, scales = 0, 4 * parts
    inputs = scales + scale_words * parts
    text = ["{ .reg .pred p;"] + [f"mov.b32 ${i}, 0;" for i in range(inputs)]
    for tile in range(unroll):
        text.append(f"setp.gt.s32 p, ${inputs + 2}, {tile};")
        for strip in range(strips):
            part = tile * strips + strip
            operands = codes + 4 * part, scales + scale_words * part, inputs
            text += _loads("@p ld.global.nc", tile, strip, operands, scale_words)
    return "\n".join(text) + "\n}", ",".join(["=&r"] * inputs + ["l", "l", "r"])


def _loads(load: str, tile: int, strip: int, operands: tuple[int, int, int], scale_words: int) -> Iterator[str]:
    """PTX that loads a thread's codes and scales of one strip in one tile; ``operands``: the first word of codes, the
    first of scales, the address of codes, which that of scales follows."""
    codes, scales, address = operands
    kind = ".v2" if scale_words == 2 else ""
    words = ", ".join(f"${codes + i}" for i in range(4))
    yield f"{load}.L1::no_allocate.L2::256B.v4.b32 {{{words}}}, [${address} + {2048 * tile + 512 * strip}];"
    words = ", ".join(f"${scales + i}" for i in range(scale_words))
    yield f"{load}{kind}.b32 {{{words}}}, [${address + 1} + {scale_words * (128 * tile + 32 * strip)}];"


def load_tile_assembly(tile: int, strips: int, scale_words: int) -> tuple[str, str]:
    """PTX, and its constraints, that loads codes and scales of ``16 * strips`` rows by 64 columns, all of them there.

    Operands: 4 words of codes a strip, then ``scale_words`` words of scale bytes each; addresses of both, from which it
    is the how many-th tile of its rows. Of loads that may be moved, the assembler would put all of a step at its end,
    where the products soon wait for them.
    """
    inputs = (4 + scale_words) * strips
    text = [STAY_SCOPE]
    for strip in range(strips):
        operands = 4 * strip, 4 * strips + scale_words * strip, inputs
        text += _loads("ld.relaxed.gpu.global", tile, strip, operands, scale_words)
    return "\n".join(text) + f"\n{STAY}}}", ",".join(["=&r"] * inputs + ["l", "l"])


def load_x_assembly(unroll: int, wide: bool) -> tuple[str, str]:
    """PTX, and its constraints, that loads a thread's part of ``64 * unroll`` columns of one row of x.

    Operands: 8 words a tile; the address; columns left, counted in tiles. ``wide``: for the layout ``fragments8t``, in
    which a thread's columns lie side by side.
    """
    inputs = 8 * unroll
    text = ["{ .reg .pred p;"] + [f"mov.b32 ${i}, 0;" for i in range(inputs)]
    for tile in range(unroll):
        text.append(f"setp.gt.s32 p, ${inputs + 1}, {tile};")
        for i in range(2 if wide else 8):
            words = ", ".join(f"${8 * tile + 4 * i + j}" for j in range(4)) if wide else f"${8 * tile + i}"
            at = 128 * tile + (64 if wide else 16) * i
            kind, words = (".v4", f"{{{words}}}") if wide else ("", words)
            text.append(f"@p ld.global.nc{kind}.b32 {words}, [${inputs} + {at}];")
    return "\n".join(text) + "\n}", ",".join(["=&r"] * inputs + ["l", "r"])


def _decode(kind: str, codes: str, scales: list[tuple[str, str]], name: str = "p") -> str:
    """PTX that makes four pairs of 16-bit floats, ``{name}0`` to ``{name}3``, of a word of codes.

    ``scales``: (word, selector of ``prmt`` for its byte) for all four, or for the first two and the others.
    """
    factor, bias = (
        (128, 0x3000) if kind == "half" else (16, 0x7600)
    )  # a scale byte times it, plus bias: the scale's bits
    text = [UNPACK_BODY.replace("$8", codes) + (TO_HALF if kind == "half" else "")]
    for number, (word, select) in enumerate(scales):
        if select.startswith("0x4") and kind != "bf16_sm80":  # one instruction: the multiplication takes halves
            text.append(
                f"mov.b32 t, {factor << 8 * int(select[3]):#x}; mov.b32 u, {bias:#x}; dp4a.u32.u32 t, {word}, t, u;"
            )
            text.append(f"mov.b32 {{h, g}}, t; mov.b32 s{number}, {{h, h}};")
        else:
            text.append(f"prmt.b32 t, {word}, 0, {select}; mad.lo.u32 s{number}, t, {factor}, k;")
    text += [_MULTIPLY[kind].format(f"p{i}", f"s{i * len(scales) // 4}") for i in range(4)]
    return re.sub(r"\bp([0-3])\b", rf"{name}\1", "\n".join(text))


def _opening(kind: str) -> str:
    bias = 0x30003000 if kind == "half" else 0x76007600
    return f"{{ .reg .b16 h, g; .reg .b32 t, u, n, k, e, s<2>, p<4>, q<4>; mov.b32 n, 0x80008000; mov.b32 k, {bias:#x};"


def word_assembly(kind: str) -> tuple[str, str, int, int]:
    """PTX that decodes one word of codes of the layout ``fragments2t``, its constraints, how many results it has, and
    how many words it takes (one).

    Operands: four pairs of 16-bit floats; the word; the scale bytes of the thread's two rows in its low half.
    """
    text = [_opening(kind), _decode(kind, "$4", [("$5", "0x4040"), ("$5", "0x4141")])]
    text += [f"mov.b32 ${i}, p{i};" for i in range(4)]
    return "\n".join(text) + "\n}", "=r,=r,=r,=r,r,r", 4, 1


def strip_assembly(kind: str, blocks: int, scale_words: int, wide: bool) -> tuple[str, str]:
    """PTX, and its constraints, of 16 rows by 64 columns of the weight times ``8 * blocks`` rows of x.

    A thread has: results (4 float32 a block of x rows), 4 words of codes, ``scale_words`` words of scale bytes, 8 words
    of x a block, which byte is the scale of its columns (a selector of ``prmt``; for ``wide``), sums so far (as the
    results).

    Args:
        kind: ``half``, ``bf16_sm80`` or ``bf16_sm90``: type of x, and the instructions there are.
        scale_words: 2 for scales of 16 columns, 1 for scales of 32.
        wide: the layout is ``fragments8t``, else ``fragments2t``.
    """
    codes = 4 * blocks
    scales, x = codes + 4, codes + 4 + scale_words
    selector = x + 8 * blocks
    text = [_opening(kind)] + ([f"add.u32 e, ${selector}, 0x0101;"] if wide else [])
    for step in range(4):
        if wide:  # a word is one row's 8 columns; two words make two products
            one = (f"${scales + step // 2}", f"${selector}" if step % 2 == 0 else "e")
            by_row = [one if scale_words == 2 else (f"${scales}", f"0x4{step}4{step}")]
            products = [(f"p{i}, q{i}, p{i + 1}, q{i + 1}", 4 * (step // 2) + i) for i in (0, 2)]
        else:  # a word is two rows' 4 columns
            word, place = (scales + step // 2, 2 * (step % 2)) if scale_words == 2 else (scales, 2 * (step // 2))
            by_row = [(f"${word}", f"0x4{place + half}4{place + half}") for half in range(2)]
            products = [("p0, p2, p1, p3", 2 * step)]
        text.append(_decode(kind, f"${codes + step}", by_row, "q" if wide and step % 2 else "p"))
        if not wide or step % 2:
            text += [
                _product(kind, left, at, block, x, selector + 1) for left, at in products for block in range(blocks)
            ]
    constraints = ["=&f"] * 4 * blocks + ["r"] * (4 + scale_words + 8 * blocks + 1) + ["f"] * 4 * blocks
    return "\n".join(text) + "\n}", ",".join(constraints)


def _product(kind: str, left: str, at: int, block: int, x: int, sums: int) -> str:
    """PTX of one matrix product with words ``at`` and ``at + 1`` of a block of x; the first adds to the sums so far."""
    own = [f"${4 * block + i}" for i in range(4)]
    before = own if at else [f"${sums + 4 * block + i}" for i in range(4)]
    right, name = x + 8 * block + at, "f16" if kind == "half" else "bf16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{{', '.join(own)}}}, {{{left}}}, "
        f"{{${right}, ${right + 1}}}, {{{', '.join(before)}}};"
    )


@gluon.jit
def _halve(tensors, COUNT: gl.constexpr):
    """COUNT tensors as half as many, each joined to the one half of them further on."""
    joined = ()
    for i in gl.static_range(COUNT // 2):
        joined += (gl.join(tensors[i], tensors[i + COUNT // 2]),)
    return joined


@gluon.jit
def stack(tensors, COUNT: gl.constexpr):
    """COUNT tensors, a power of two and at least two, as one with more axes of two, in order."""
    tensors = _halve(tensors, COUNT)
    if COUNT >= 4:
        tensors = _halve(tensors, COUNT // 2)
    if COUNT >= 8:
        tensors = _halve(tensors, COUNT // 4)
    if COUNT >= 16:
        tensors = _halve(tensors, COUNT // 8)
    if COUNT >= 32:
        tensors = _halve(tensors, COUNT // 16)
    if COUNT >= 64:
        tensors = _halve(tensors, COUNT // 32)
    return tensors[0]


@gluon.jit(do_not_specialize=["m", "k_tiles", "column_tiles"])
def fp4_decode_kernel(
    x_ptr, codes_ptr, scales_ptr, row_scale_ptr, bias_ptr, out_ptr, m, n, k_tiles, x_stride, column_tiles,
    STRIPS: gl.constexpr, WARPS: gl.constexpr, UNROLL: gl.constexpr, BLOCKS: gl.constexpr, WORDS: gl.constexpr,
    WIDE: gl.constexpr, LOAD: gl.constexpr, LOAD_X: gl.constexpr, MULTIPLY: gl.constexpr, BIAS: gl.constexpr,
    FUNCTION: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """``out = epilogue(x @ weight.T * row_scale + bias)`` of 8 * BLOCKS rows of x and 16 * STRIPS of the weight.

    x ``[m, 64 * k_tiles]``, 16-bit floats, rows ``x_stride`` elements apart; codes ``[n tiles, column_tiles, 2048]``
    bytes and scales ``[n tiles, column_tiles, 128 * WORDS]`` bytes in the layout ``fragments2t`` or (WIDE)
    ``fragments8t``, WORDS words of scales of a pair of rows for 64 columns; row_scale, bias ``[n]``; out ``[m, n]``,
    or (GATED) ``[m, n / 2]``, after FUNCTION. LOAD, LOAD_X, MULTIPLY: assembly and its constraints.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    warp, lane = thread // 32, thread % 32
    row = lane // 4
    strip = gl.program_id(0) * STRIPS
    tile = warp * UNROLL
    at = ((strip // 4).to(gl.int64) * column_tiles + tile) * 4 + strip % 4
    code_at = codes_ptr.to(gl.int64) + at * 512 + lane * 16
    scale_at = scales_ptr.to(gl.int64) + (at * 8 + row) * (4 * WORDS)
    x_at = x_ptr.to(gl.int64) + (row.to(gl.int64) * x_stride + tile * 64 + lane % 4 * (8 if WIDE else 2)) * 2
    left = k_tiles - tile
    selector = 0x4040 + lane % 4 // 2 * 0x0202  # the byte of a thread's scale, of two for 32 columns
    zero = gl.zeros([32 * WARPS], gl.float32, LAYOUT)
    sums = ()
    for _ in gl.static_range(STRIPS * BLOCKS * 4):
        sums += (zero,)
    for _ in range(gl.cdiv(k_tiles, WARPS * UNROLL)):
        codes = call_assembly(LOAD, (code_at, scale_at, left), (4 + WORDS) * STRIPS * UNROLL, True, True)
        x = ()
        own = _anew(row)
        for b in gl.static_range(BLOCKS):
            there = gl.where(own + 8 * b < m, left, 0)
            x = x + call_assembly(LOAD_X, (x_at + x_stride * (16 * b), there), 8 * UNROLL, True, True)
        for u in gl.static_range(UNROLL):
            after = ()
            for i in gl.static_range(STRIPS):
                operands = _strip_operands(codes, x, u * STRIPS + i, u, STRIPS, UNROLL, BLOCKS, WORDS)
                operands += (selector,)
                operands += sums[4 * BLOCKS * i : 4 * BLOCKS * (i + 1)]
                after = after + call_assembly(MULTIPLY, operands, 4 * BLOCKS, False, True)
            sums = after
        code_at += WARPS * UNROLL * 2048
        scale_at += WARPS * UNROLL * 128 * WORDS
        x_at += WARPS * UNROLL * 128
        left -= WARPS * UNROLL
    total = _summed(sums, 4 * STRIPS * BLOCKS, WARPS)
    if GATED:
        _finish_gated(total, row_scale_ptr, bias_ptr, out_ptr, m, n, strip * 16, WARPS, BLOCKS, BIAS, FUNCTION)
    else:
        _finish(total, row_scale_ptr, bias_ptr, out_ptr, m, n, strip * 16, WARPS, BLOCKS, BIAS, FUNCTION)


@gluon.jit
def _anew(row):
    """A number that may differ from step to step, for all the compiler knows.

    It would make two loops, one for the lanes without a row of x, and the lanes of a warp have to multiply together.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [row], gl.int32, is_pure=False, pack=1)


@gluon.jit
def call_assembly(ASM: gl.constexpr, operands, RESULTS: gl.constexpr, WHOLE: gl.constexpr, PURE: gl.constexpr):
    """The results of inline assembly, element by element."""
    CODE: gl.constexpr = ASM[0]
    CONSTRAINTS: gl.constexpr = ASM[1]
    TYPES: gl.constexpr = (gl.int32,) * RESULTS if WHOLE else (gl.float32,) * RESULTS
    return gl.inline_asm_elementwise(CODE, CONSTRAINTS, operands, TYPES, is_pure=PURE, pack=1)


@gluon.jit
def _strip_operands(
    codes, x, PART: gl.constexpr, TILE: gl.constexpr, STRIPS: gl.constexpr, UNROLL: gl.constexpr, BLOCKS: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """Codes, scales and x of one strip in one tile, out of a step's."""
    SCALES: gl.constexpr = 4 * STRIPS * UNROLL + WORDS * PART
    operands = codes[4 * PART : 4 * PART + 4] + codes[SCALES : SCALES + WORDS]
    for b in gl.static_range(BLOCKS):
        operands = operands + x[8 * (b * UNROLL + TILE) : 8 * (b * UNROLL + TILE + 1)]
    return operands


@gluon.jit
def _summed(sums, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """The warps' sums added up: ``[32, COUNT]``, by lane."""
    return gl.sum(gl.reshape(stack(sums, COUNT), [WARPS, 32, COUNT]), 0)


@gluon.jit
def _finish(
    total, row_scale_ptr, bias_ptr, out_ptr, m, n, first_row,
    WARPS: gl.constexpr, BLOCKS: gl.constexpr, BIAS: gl.constexpr, FUNCTION: gl.constexpr,
):  # fmt: skip
    """Scale the sums, add the bias in float32, apply the epilogue, round once and store."""
    COUNT: gl.constexpr = total.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, WARPS], [1, 0])
    total = gl.convert_layout(total, LAYOUT)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    entry = gl.arange(0, COUNT, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    part, corner = entry // 4, entry % 4
    rows_n = first_row + part // BLOCKS * 16 + corner // 2 * 8 + lane // 4
    rows_m = part % BLOCKS * 8 + lane % 4 * 2 + corner % 2
    known = rows_n < n
    total = total * (gl.load(row_scale_ptr + rows_n, mask=known, other=0.0) * 256.0)
    if BIAS:
        total += gl.load(bias_ptr + rows_n, mask=known, other=0.0).to(gl.float32)
    total = activate(total, FUNCTION)
    out_at = out_ptr + rows_m.to(gl.int64) * n + rows_n
    gl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=known & (rows_m < m))


@gluon.jit
def _finish_gated(
    total, row_scale_ptr, bias_ptr, out_ptr, m, n, first_row,
    WARPS: gl.constexpr, BLOCKS: gl.constexpr, BIAS: gl.constexpr, FUNCTION: gl.constexpr,
):  # fmt: skip
    """The same where rows come in turns of eight: a lane's sums are of row ``r`` of the gate and of up."""
    COUNT: gl.constexpr = total.shape[1] // 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, WARPS], [1, 0])
    gate, up = gl.split(total.reshape([32, COUNT // 2, 2, 2]).permute((0, 1, 3, 2)))
    gate = gl.convert_layout(gate.reshape([32, COUNT]), LAYOUT)
    up = gl.convert_layout(up.reshape([32, COUNT]), LAYOUT)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    entry = gl.arange(0, COUNT, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    part = entry // 2
    rows_n = first_row + part // BLOCKS * 16 + lane // 4
    rows_m = part % BLOCKS * 8 + lane % 4 * 2 + entry % 2
    known = rows_n < n
    gate = gate * (gl.load(row_scale_ptr + rows_n, mask=known, other=0.0) * 256.0)
    up = up * (gl.load(row_scale_ptr + rows_n + 8, mask=known, other=0.0) * 256.0)
    if BIAS:
        gate += gl.load(bias_ptr + rows_n, mask=known, other=0.0).to(gl.float32)
        up += gl.load(bias_ptr + rows_n + 8, mask=known, other=0.0).to(gl.float32)
    total = activate(gate, FUNCTION) * up
    out_at = out_ptr + rows_m.to(gl.int64) * (n // 2) + first_row // 2 + part // BLOCKS * 8 + lane // 4
    gl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=known & (rows_m < m))
