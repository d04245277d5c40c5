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

WAIT = gl.constexpr("griddepcontrol.wait; mov.b32 $0, $1;")


@gluon.jit
def _first_step(program, total):
    return (program.to(gl.int64) * total // gl.num_programs(0)).to(gl.int32)


@gluon.jit
def _program_of(step, total):
    return (((step.to(gl.int64) + 1) * gl.num_programs(0) - 1) // total).to(gl.int32)


@gluon.jit
def _load(
    codes_ptr, scales_ptr, strip, strips, chunk, there, column_tiles, lane, LOAD: gl.constexpr, COUNT: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """Codes and scales of a thread in 128 columns; zeros where there are no such rows."""
    at = ((strip // 4).to(gl.int64) * column_tiles + 2 * chunk) * 4 + strip % 4
    code_at = codes_ptr.to(gl.int64) + at * 512 + lane * 16
    scale_at = scales_ptr.to(gl.int64) + (at * 8 + lane // 4) * (4 * WORDS)
    return call_assembly(LOAD, (code_at, scale_at, gl.where((strip < strips) & there, 2, 0)), COUNT, True, False)


@gluon.jit
def _copy_x(x_smem, buffer, x_at, chunk):
    """Begin to copy 128 columns of x."""
    for tile in gl.static_range(2):
        async_copy.async_copy_global_to_shared(x_smem.index(2 * buffer + tile), x_at + (chunk * 64 + tile * 32))
    async_copy.commit_group()


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
def _weights(codes, PART: gl.constexpr, STRIPS: gl.constexpr, WORDS: gl.constexpr):
    """Codes and scales of one strip in one tile, out of a step's."""
    SCALES: gl.constexpr = 8 * STRIPS + WORDS * PART
    return codes[4 * PART : 4 * PART + 4] + codes[SCALES : SCALES + WORDS]


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


@gluon.jit(do_not_specialize=["m", "chunks", "column_tiles", "total"])
def fp4_stream_kernel(
    x_ptr, codes_ptr, scales_ptr, row_scale_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, m, n, x_stride, chunks,
    column_tiles, total, STRIPS: gl.constexpr, WARPS: gl.constexpr, BLOCKS: gl.constexpr, WORDS: gl.constexpr,
    LOAD: gl.constexpr, MULTIPLY: gl.constexpr, BIAS: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """``out = epilogue(x @ weight.T * row_scale + bias)`` for up to 8 * BLOCKS rows of x.

    x pairs of 16-bit floats as int32 ``[m, 64 * chunks]``, rows ``x_stride`` words apart; codes ``[n tiles,
    column_tiles, 2048]`` bytes and scales ``[n tiles, column_tiles, 128 * WORDS]`` bytes in the layout ``fragments2t``;
    row_scale, bias ``[n]``; out ``[m, n]``, or (GATED) ``[m, n / 2]``, after FUNCTION; partial float32 ``[2 * programs,
    4 * STRIPS * BLOCKS, 32 * WARPS]``; arrived: a zero for each block of ``16 * STRIPS * WARPS`` rows of the weight,
    zero again afterwards; total: steps of 128 columns of all blocks.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COUNT: gl.constexpr = 4 * STRIPS * BLOCKS
    LOADED: gl.constexpr = (4 + WORDS) * STRIPS * 2
    x_smem = gl.allocate_shared_memory(gl.int32, [4, 256 * BLOCKS], SHARED)
    thread = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    warp, lane = thread // 32, thread % 32
    results = (out_ptr, (row_scale_ptr, bias_ptr, n), m, n)
    strips = gl.cdiv(n, 16)
    program = gl.program_id(0)
    first = _first_step(program, total)
    end = _first_step(program + 1, total)
    block = first // chunks
    chunk = first % chunks
    whole = chunk == 0
    slot = 2 * program
    sums = ()
    for _ in gl.static_range(COUNT):
        sums += (gl.zeros([32 * WARPS], gl.float32, LAYOUT),)
    strip = (block * WARPS + warp) * STRIPS
    codes = _load(codes_ptr, scales_ptr, strip, strips, chunk, True, column_tiles, lane, LOAD, LOADED, WORDS)
    # (block of eight rows of x, half of 64 columns, row, thread of a quad, word)
    word = gl.arange(0, 256 * BLOCKS, layout=LAYOUT)
    # weights may be read before the kernel ahead has ended, x may not
    word = gl.inline_asm_elementwise(WAIT, "=r,r", [word], gl.int32, is_pure=False, pack=1)
    x_row = gl.minimum(word // 256 * 8 + word // 16 % 8, m - 1)
    x_at = x_ptr + x_row.to(gl.int64) * x_stride + (word // 128 % 2 * 16 + word % 4 * 4 + word // 4 % 4)
    _copy_x(x_smem, 0, x_at, chunk)
    buffer = gl.to_tensor(0)
    for step in range(first, end):
        ends = chunk + 1 == chunks
        next_block = gl.where(ends, block + 1, block)
        next_chunk = gl.where(ends, 0, chunk + 1)
        next_strip = (next_block * WARPS + warp) * STRIPS
        more = _load(
            codes_ptr, scales_ptr, next_strip, strips, next_chunk, step + 1 < end, column_tiles, lane, LOAD, LOADED,
            WORDS,
        )  # fmt: skip
        async_copy.wait_group(0)
        _copy_x(x_smem, 1 - buffer, x_at, next_chunk)
        for tile in gl.static_range(2):
            x = _x_words(x_smem.index(2 * buffer + tile), BLOCKS, WARPS, LAYOUT)
            after = ()
            for i in gl.static_range(STRIPS):
                operands = _weights(codes, tile * STRIPS + i, STRIPS, WORDS) + x + (lane,)
                operands += sums[4 * BLOCKS * i : 4 * BLOCKS * (i + 1)]
                after += call_assembly(MULTIPLY, operands, 4 * BLOCKS, False, True)
            sums = after
        if ends | (step + 1 == end):
            if whole & ends:
                _finish(sums, results, strip, lane, STRIPS, BLOCKS, BIAS, FUNCTION, GATED)
            else:
                own = partial_ptr + (slot.to(gl.int64) * COUNT) * (32 * WARPS) + thread
                for i in gl.static_range(COUNT):
                    gl.store(own + i * (32 * WARPS), sums[i])
                gl.thread_barrier()
                begin = block * chunks
                owner = _program_of(begin, total)
                last = _program_of(begin + chunks - 1, total)
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
        block, chunk, strip, codes, buffer = next_block, next_chunk, next_strip, more, 1 - buffer
    async_copy.wait_group(0)
