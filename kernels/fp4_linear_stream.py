"""Device code of the FP4 product for 5 to 32 rows of x, in Triton's Gluon dialect (NVIDIA, sm_90 and later).

Weights go from memory to registers as in :mod:`vbcompile.kernels.fp4_linear_decode`, one step ahead of the products. x
goes through shared memory, in the order in which threads want it for ``mma.sync``, and is shared by the warps of a
block, which have rows of the weight of their own and are all at the same columns.

All steps of all blocks of rows, one after another, are shared out evenly over the programs. What a program has of a
block that others have parts of too goes to scratch memory; who comes last adds the parts up in order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from vbcompile.kernels.fp4_linear_decode import activate, call_assembly

# once the kernel ahead has ended, the next one may begin: it too reads no more than weights before this one has ended
WAIT = gl.constexpr("griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;")


@gluon.jit
def _first_step(program, total):
    return (program.to(gl.int64) * total // gl.num_programs(0)).to(gl.int32)


@gluon.jit
def _program_of(step, total):
    return (((step.to(gl.int64) + 1) * gl.num_programs(0) - 1) // total).to(gl.int32)


@gluon.jit
def _place(
    codes_ptr, scales_ptr, strip, strips, step, column_tiles, lane, TILES: gl.constexpr, STRIPS: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """Addresses of a thread's codes and scales in a step; those of the last rows where there are no such rows."""
    strip = gl.minimum(strip, (strips - 1) // STRIPS * STRIPS)
    at = ((strip // 4).to(gl.int64) * column_tiles + TILES * step) * 4 + strip % 4
    code_at = codes_ptr.to(gl.int64) + at * 512 + lane * 16
    return code_at, scales_ptr.to(gl.int64) + (at * 8 + lane // 4) * (4 * WORDS)


@gluon.jit
def _load(code_at, scale_at, LOADS: gl.constexpr, TILE: gl.constexpr, COUNT: gl.constexpr):
    """Codes and scales of a thread in one tile of a step."""
    CODE: gl.constexpr = LOADS[TILE + 1]
    CONSTRAINTS: gl.constexpr = LOADS[0]
    TYPES: gl.constexpr = (gl.int32,) * COUNT
    return gl.inline_asm_elementwise(CODE, CONSTRAINTS, (code_at, scale_at), TYPES, is_pure=False, pack=1)


@gluon.jit
def _halves(tensors, COUNT: gl.constexpr):
    """COUNT tensors, split along their last axis: the first parts, then the second."""
    first, second = (), ()
    for i in gl.static_range(COUNT):
        a, b = gl.split(tensors[i])
        first += (a,)
        second += (b,)
    return first + second


@gluon.jit
def _x_words(buffer, BLOCKS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """A thread's eight words of each block of eight rows of x."""
    PARENT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    SIZE: gl.constexpr = 256 * BLOCKS
    words = gl.expand_dims(buffer.load(gl.SliceLayout(0, PARENT)), 0)
    words, _ = gl.broadcast(words, gl.full([WARPS, SIZE], 0, gl.int32, PARENT))
    words = words.reshape([WARPS, 2 * BLOCKS, 32, 4]).permute((0, 2, 1, 3))
    if BLOCKS == 1:
        words = _halves(_halves(_halves((words.reshape([32 * WARPS, 2, 2, 2]),), 1), 2), 4)
    elif BLOCKS == 2:
        words = _halves(_halves(_halves(_halves((words.reshape([32 * WARPS, 2, 2, 2, 2]),), 1), 2), 4), 8)
    else:
        words = _halves(_halves(_halves((words.reshape([32 * WARPS, 2, 2, 2, 2, 2]),), 1), 2), 4)
        words = _halves(_halves(words, 8), 16)
    own = ()
    for i in gl.static_range(8 * BLOCKS):
        own += (gl.convert_layout(words[i], LAYOUT, assert_trivial=True),)
    return own


@gluon.jit
def _weights(codes, TILE: gl.constexpr, STRIP: gl.constexpr, STRIPS: gl.constexpr, WORDS: gl.constexpr):
    """Codes and scales of one strip in one tile, out of a step's."""
    BEGIN: gl.constexpr = TILE * (4 + WORDS) * STRIPS
    SCALES: gl.constexpr = BEGIN + 4 * STRIPS + WORDS * STRIP
    return codes[BEGIN + 4 * STRIP : BEGIN + 4 * STRIP + 4] + codes[SCALES : SCALES + WORDS]


@gluon.jit
def _add_four(total, at, STEP: gl.constexpr, more):
    """Add one part of a sum and up to ``more`` others; four loads are under way at a time."""
    for i in gl.static_range(4):
        there = gl.full(at.shape, i, gl.int32, at.type.layout) <= more
        total += gl.load(at + i * STEP, mask=there, other=0.0, cache_modifier=".cg")
    return total


@gluon.jit
def _row_scale(scaling, row, BIAS: gl.constexpr):
    """The factor of a row's sums, and its bias, in float32."""
    row_scale_ptr, bias_ptr, n = scaling
    scale = gl.load(row_scale_ptr + row, mask=row < n, other=0.0) * 256.0
    bias = 0.0
    if BIAS:
        bias = gl.load(bias_ptr + row, mask=row < n, other=0.0).to(gl.float32)
    return scale, bias


@gluon.jit
def _finish(
    sums, results, strip, lane, STRIPS: gl.constexpr, BLOCKS: gl.constexpr, BIAS: gl.constexpr, FUNCTION: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """Scale the sums, add the bias in float32, apply the epilogue, round once and store.

    GATED: rows come in turns of eight, so that a thread has the sums of one row of the gate and of up.
    """
    out_ptr, scaling, m, n = results
    for i in gl.static_range(STRIPS):
        row = (strip + i) * 16 + lane // 4
        scale, bias = _row_scale(scaling, row, BIAS)
        other_scale, other_bias = _row_scale(scaling, row + 8, BIAS)
        for block in gl.static_range(BLOCKS):
            for side in gl.static_range(2):
                x_row = 8 * block + lane % 4 * 2 + side
                first = sums[4 * (BLOCKS * i + block) + side] * scale + bias
                second = sums[4 * (BLOCKS * i + block) + 2 + side] * other_scale + other_bias
                if GATED:
                    at = out_ptr + x_row.to(gl.int64) * (n // 2) + (strip + i) * 8 + lane // 4
                    value = activate(first, FUNCTION) * second
                    gl.store(at, value.to(out_ptr.dtype.element_ty), mask=(row < n) & (x_row < m))
                else:
                    at = out_ptr + x_row.to(gl.int64) * n + row
                    first = activate(first, FUNCTION).to(out_ptr.dtype.element_ty)
                    second = activate(second, FUNCTION).to(out_ptr.dtype.element_ty)
                    gl.store(at, first, mask=(row < n) & (x_row < m))
                    gl.store(at + 8, second, mask=(row + 8 < n) & (x_row < m))


@gluon.jit(do_not_specialize=["m", "steps", "column_tiles", "total"])
def fp4_stream_kernel(
    x_ptr, codes_ptr, scales_ptr, row_scale_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, m, n, x_stride, steps,
    column_tiles, total, STRIPS: gl.constexpr, WARPS: gl.constexpr, BLOCKS: gl.constexpr, WORDS: gl.constexpr,
    TILES: gl.constexpr, LOADS: gl.constexpr, MULTIPLY: gl.constexpr, BIAS: gl.constexpr, FUNCTION: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """``out = epilogue(x @ weight.T * row_scale + bias)`` for up to 8 * BLOCKS rows of x.

    x pairs of 16-bit floats as int32 ``[m, 32 * tiles * steps]``, rows ``x_stride`` words apart; codes ``[n tiles,
    column_tiles, 2048]`` bytes and scales ``[n tiles, column_tiles, 128 * WORDS]`` bytes in the layout ``fragments2t``;
    row_scale, bias ``[n]``; out ``[m, n]``, or (GATED) ``[m, n / 2]``, after FUNCTION; partial float32 ``[2 * programs,
    4 * STRIPS * BLOCKS, 32 * WARPS]``; arrived: a zero for each block of ``16 * STRIPS * WARPS`` rows of the weight,
    zero again afterwards; total: steps of all blocks. LOADS: constraints, and assembly for
    each of a step's TILES tiles of 64 columns.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COUNT: gl.constexpr = 4 * STRIPS * BLOCKS
    LOADED: gl.constexpr = (4 + WORDS) * STRIPS
    x_smem = gl.allocate_shared_memory(gl.int32, [2, TILES * 256 * BLOCKS], SHARED)
    thread = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    warp, lane = thread // 32, thread % 32
    results = (out_ptr, (row_scale_ptr, bias_ptr, n), m, n)
    strips = gl.cdiv(n, 16)
    program = gl.program_id(0)
    first = _first_step(program, total)
    end = _first_step(program + 1, total)
    block = first // steps
    step = first % steps
    whole = step == 0
    slot = 2 * program
    sums = ()
    for _ in gl.static_range(COUNT):
        sums += (gl.zeros([32 * WARPS], gl.float32, LAYOUT),)
    strip = (block * WARPS + warp) * STRIPS
    code_at, scale_at = _place(
        codes_ptr, scales_ptr, strip, strips, step, column_tiles, lane, TILES, STRIPS, WORDS
    )  # fmt: skip
    codes = ()
    for tile in gl.static_range(TILES):
        codes += _load(code_at, scale_at, LOADS, tile, LOADED)
    # (tile, block of eight rows of x, half of 64 columns, row, thread of a quad, word)
    word = gl.arange(0, TILES * 256 * BLOCKS, layout=LAYOUT)
    # weights may be read before the kernel ahead has ended, x may not
    word = gl.inline_asm_elementwise(WAIT, "=r,r", [word], gl.int32, is_pure=False, pack=1)
    x_row = gl.minimum(word // 256 % BLOCKS * 8 + word // 16 % 8, m - 1)
    within = word // (256 * BLOCKS) * 32 + word // 128 % 2 * 16 + word % 4 * 4 + word // 4 % 4
    x_at = x_ptr + x_row.to(gl.int64) * x_stride + within
    async_copy.async_copy_global_to_shared(x_smem.index(0), x_at + step * (32 * TILES))
    async_copy.commit_group()
    buffer = gl.to_tensor(0)
    for done in range(first, end):
        ends = step + 1 == steps
        next_block = gl.where(ends, block + 1, block)
        next_step = gl.where(ends, 0, step + 1)
        next_strip = (next_block * WARPS + warp) * STRIPS
        if ends:
            code_at, scale_at = _place(
                codes_ptr, scales_ptr, next_strip, strips, next_step, column_tiles, lane, TILES, STRIPS, WORDS
            )  # fmt: skip
        else:
            code_at += 2048 * TILES
            scale_at += 128 * WORDS * TILES
        # after the last step any codes, for all threads the same
        next_codes = gl.where(done + 1 < end, code_at, codes_ptr.to(gl.int64))
        next_scales = gl.where(done + 1 < end, scale_at, scales_ptr.to(gl.int64))
        async_copy.wait_group(0)
        async_copy.async_copy_global_to_shared(x_smem.index(1 - buffer), x_at + next_step * (32 * TILES))
        async_copy.commit_group()
        more = ()
        for tile in gl.static_range(TILES):
            x_part = x_smem.index(buffer).slice(tile * 256 * BLOCKS, 256 * BLOCKS)
            x = _x_words(x_part, BLOCKS, WARPS, LAYOUT)
            after = ()
            for i in gl.static_range(STRIPS):
                operands = _weights(codes, tile, i, STRIPS, WORDS) + x + (lane,)
                operands += sums[4 * BLOCKS * i : 4 * BLOCKS * (i + 1)]
                after += call_assembly(MULTIPLY, operands, 4 * BLOCKS, False, False)
            sums = after
            # into the registers that are free now
            more += _load(next_codes, next_scales, LOADS, tile, LOADED)
        if ends | (done + 1 == end):
            if whole & ends:
                _finish(sums, results, strip, lane, STRIPS, BLOCKS, BIAS, FUNCTION, GATED)
            else:
                own = partial_ptr + (slot.to(gl.int64) * COUNT) * (32 * WARPS) + thread
                for i in gl.static_range(COUNT):
                    gl.store(own + i * (32 * WARPS), sums[i])
                gl.thread_barrier()
                begin = block * steps
                owner = _program_of(begin, total)
                last = _program_of(begin + steps - 1, total)
                if gl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == last - owner:
                    added = ()
                    # the first part is the end of its program's steps, unless they begin with it
                    place = 2 * owner + gl.where(_first_step(owner, total) < begin, 1, 0)
                    for i in gl.static_range(COUNT):
                        at = partial_ptr + (place.to(gl.int64) * COUNT + i) * (32 * WARPS) + thread
                        added += (gl.load(at, cache_modifier=".cg"),)
                    parts = partial_ptr + 2 * owner.to(gl.int64) * COUNT * (32 * WARPS) + thread
                    for other in range(owner + 1, last + 1, 4):
                        longer = ()
                        for i in gl.static_range(COUNT):
                            at = parts + (2 * COUNT * (other - owner) + i) * (32 * WARPS)
                            longer += (_add_four(added[i], at, 2 * COUNT * 32 * WARPS, last - other),)
                        added = longer
                    _finish(added, results, strip, lane, STRIPS, BLOCKS, BIAS, FUNCTION, GATED)
                    gl.store(arrived_ptr + block, 0)
            none = ()
            for _ in gl.static_range(COUNT):
                none += (gl.zeros([32 * WARPS], gl.float32, LAYOUT),)
            sums = none
            slot = 2 * program + 1
            whole = True
        block, step, strip, codes, buffer = next_block, next_step, next_strip, more, 1 - buffer
    async_copy.wait_group(0)
