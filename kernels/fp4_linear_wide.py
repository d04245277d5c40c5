"""Device code of the FP4 product for many rows of x on Hopper, in Triton's Gluon dialect (sm_90a).

A block of threads takes ``64 * CONSUMERS * TILES`` rows of the weight and BLOCK_M rows of x. One producer warp copies
tiles of x, codes and scales to shared memory with the tensor memory accelerator; each consumer, a warpgroup, decodes
its tiles of 64 rows by 64 columns to registers, as the left operand of ``wgmma``, while the tensor cores multiply the
tile before. Only x is read from shared memory by the tensor cores.

The kernel is launched while the one ahead ends: weights are copied at once, x and all that is written wait for its end.
It fills a multiprocessor, so that no block of another kernel, or of the next launch, is there at the same time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vbcompile.kernels.fp4_linear_decode import STAY, STAY_SCOPE
from vbcompile.kernels.fp4_linear_wide_end import finish, row_scale

AFTER = gl.constexpr("griddepcontrol.wait; mov.b32 $0, $1;")
LET_NEXT_BEGIN = gl.constexpr("griddepcontrol.launch_dependents; mov.b32 $0, $1;")
# named barriers say that buffers are empty: the compiler puts barriers of a whole warpgroup around what it does with a
# shared one. The first five are the compiler's own; eleven are left for the stages.
FIRST_BARRIER = gl.constexpr(5)
PRODUCER_REGISTERS = gl.constexpr(32)
ARRIVE = gl.constexpr(tuple(f"bar.arrive $1, {128 * consumers + 32}; mov.b32 $0, $1;" for consumers in range(4)))
SYNC = gl.constexpr(tuple(f"bar.sync $1, {128 * consumers + 32}; mov.b32 $0, $1;" for consumers in range(4)))
STAY_BEFORE = gl.constexpr(f"{STAY_SCOPE} {STAY} mov.b32 $0, $1; }}")


@gluon.jit
def _after_the_kernel_ahead(value):
    """An int32, once the kernel ahead has ended and all that it wrote can be read."""
    return gl.inline_asm_elementwise(AFTER, "=r,r", [value], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _empty(slot, ASM: gl.constexpr, CONSUMERS: gl.constexpr):
    """Consumers are done with what a barrier stands for (ARRIVE), or the producer waits until they are (SYNC)."""
    CODE: gl.constexpr = ASM[CONSUMERS]
    gl.inline_asm_elementwise(CODE, "=r,r", [slot + FIRST_BARRIER], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _decode(codes, scales, WORD: gl.constexpr):
    """A tile ``[64, 64]`` of the weight: int32 ``[128, 4, 2, 2]``, pairs of 16-bit floats, times ``2**-8``; or, if WORD
    has two results, ``[128, 4, 2]``, four E4M3 each, times ``2**-3``.

    codes: shared int32 ``[1, 2, 256]``; scales: shared int32 ``[1, 1, 32 * words of scales]``; WORD: assembly, its
    constraints, results, words of codes at a time.
    """
    words = codes.load(gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 2, 2], [2, 1, 0])).reshape([128, 4])
    COUNT: gl.constexpr = scales.shape[2] // 32
    SHARED: gl.constexpr = gl.BlockedLayout([1, 1, COUNT, 1], [1, 1, 8, 4], [1, 1, 4, 1], [3, 2, 1, 0])
    scale = gl.expand_dims(scales.load(gl.SliceLayout(3, SHARED)), 3)
    scale, _ = gl.broadcast(scale, gl.full([1, 1, 32 * COUNT, 4], 0, gl.int32, SHARED))
    scale = scale.reshape([32, COUNT, 4]).permute((0, 2, 1)).reshape([128, COUNT])
    CODE: gl.constexpr = WORD[0]
    CONSTRAINTS: gl.constexpr = WORD[1]
    RESULTS: gl.constexpr = WORD[2]
    PACK: gl.constexpr = WORD[3]
    if COUNT == 2 and PACK == 2:
        scale = gl.join(scale, scale)  # both words of a pair find their scales in one
    else:
        scale = gl.join(scale, scale >> 16)
    if COUNT == 1:
        scale = gl.join(scale, scale)
    scale = gl.convert_layout(scale.reshape([128, 4]), words.type.layout, assert_trivial=True)
    TYPES: gl.constexpr = (gl.int32,) * RESULTS
    out = gl.inline_asm_elementwise(CODE, CONSTRAINTS, [words, scale], TYPES, is_pure=True, pack=PACK)
    if RESULTS == 2:
        return gl.join(out[0], out[1])  # [thread, step of 16 columns, 8 rows further on]
    else:
        return gl.join(
            gl.join(out[0], out[1]), gl.join(out[2], out[3])
        )  # [.., .., half the columns, 8 rows further on]


@gluon.jit
def _operand(pairs, TYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """What ``_decode`` gave, as the left operand of a product of layout LAYOUT.

    Not done before the loop's edge: 16-bit values would be taken apart there and put together again.
    """
    if TYPE.primitive_bitwidth == 8:
        even = gl.join(pairs.to(gl.int8), (pairs >> 16).to(gl.int8))
        odd = gl.join((pairs >> 8).to(gl.int8), (pairs >> 24).to(gl.int8))
        values = gl.join(even, odd).to(TYPE, bitcast=True).reshape([4, 8, 4, 2, 2, 2, 4])
        values = values.permute((0, 5, 1, 3, 4, 2, 6)).reshape([64, 64])
        return gl.convert_layout(values, gl.DotOperandLayout(0, LAYOUT, 4), assert_trivial=True)
    else:
        low = pairs.to(gl.int16).to(TYPE, bitcast=True)
        high = (pairs >> 16).to(gl.int16).to(TYPE, bitcast=True)
        values = gl.join(low, high).reshape([4, 8, 4, 4, 2, 2, 2]).permute((0, 5, 1, 3, 4, 2, 6)).reshape([64, 64])
        return gl.convert_layout(values, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def _share(program, shape):
    """A program's share of the tiles that are left over: the first pair of steps, and the one after the last."""
    return _begin(program, shape), _begin(program + 1, shape)


@gluon.jit
def _begin(program, shape):
    """Where a share begins. Of ``splits`` shares of one tile the last is ``lag`` pairs longer than the others, so that
    their sums are there when it is done."""
    _, pairs_each, _, left, programs, splits, lag = shape
    parts = gl.maximum(splits, 1)
    within = program // parts * pairs_each + program % parts * (pairs_each - lag) // parts
    return gl.where(splits > 0, within, left * program // programs)


@gluon.jit
def _locate(item, pair, end, shape):
    """What to do next -> (tile of the weight's rows, tile of x, number of the tile, its first pair of steps, pairs).

    Tiles are ``[tile of the weight's rows, tile of x]``, so that neighbours share the weight. First every program takes
    whole tiles, ``item``; of the tiles that are left, all programs take equal shares.
    """
    tiles_m, pairs_each, items, _, _, _, _ = shape
    whole = item < items
    tile = gl.where(whole, item, items + pair // pairs_each)
    first = gl.where(whole, 0, pair % pairs_each)
    pairs = gl.where(whole, pairs_each, gl.minimum(pairs_each - first, end - pair))
    return tile // tiles_m, tile % tiles_m, tile, first, pairs


@gluon.jit
def _advance(slot, phase, STAGES: gl.constexpr):
    """The buffer after ``slot``, and the parity of its barrier: a remainder would cost more."""
    wraps = slot == STAGES - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _copy_x(descriptors, buffers, at, slot, tile_m, column, STEPS: gl.constexpr):
    """Begin to copy the columns of x that a barrier stands for."""
    BLOCK_M: gl.constexpr = buffers[0].shape[1]
    for step in gl.static_range(STEPS):
        place = [tile_m * BLOCK_M, (column + step) * 64]
        tma.async_copy_global_to_shared(descriptors[0], place, at, buffers[0].index(slot * STEPS + step))


@gluon.jit
def _copy_weights(descriptors, buffers, at, slot, tile, column, STEPS: gl.constexpr, COPIES: gl.constexpr):
    """Begin to copy the codes and scales that a barrier stands for; ``tile``: the first of 64 rows."""
    _, code_desc, scale_desc = descriptors
    _, code_smem, scale_smem = buffers
    TOGETHER: gl.constexpr = code_desc.block_type.shape[0]
    for step in gl.static_range(STEPS):
        for copy in gl.static_range(COPIES):
            to = (slot * STEPS + step) * COPIES + copy
            first = tile + copy * TOGETHER
            tma.async_copy_global_to_shared(code_desc, [first, (column + step) * 2, 0], at, code_smem.index(to))
            tma.async_copy_global_to_shared(scale_desc, [first, column + step, 0], at, scale_smem.index(to))


@gluon.jit
def _produce(
    descriptors, buffers, barriers, shape, CONSUMERS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """The producer warp: keeps every shared buffer full."""
    full = barriers[0]
    x_desc, code_desc, scale_desc = descriptors
    COPIES: gl.constexpr = PARTS // code_desc.block_type.shape[0]
    WEIGHT_BYTES: gl.constexpr = COPIES * (code_desc.block_type.nbytes + scale_desc.block_type.nbytes)
    BYTES: gl.constexpr = STEPS * (x_desc.block_type.nbytes + WEIGHT_BYTES)
    item = gl.program_id(0)
    pair, end = _share(gl.program_id(0), shape)
    tile_n, tile_m, _, first, pairs = _locate(item, pair, end, shape)
    begun = gl.minimum(pairs * 2 // STEPS, STAGES)
    for j in range(begun):
        mbarrier.expect(full.index(j), BYTES)
        column = first * 2 + j * STEPS
        _copy_weights(descriptors, buffers, full.index(j), j, tile_n * PARTS, column, STEPS, COPIES)
    tile_m = _after_the_kernel_ahead(tile_m)
    tile_m = gl.inline_asm_elementwise(LET_NEXT_BEGIN, "=r,r", [tile_m], gl.int32, is_pure=False, pack=1)
    for j in range(begun):
        _copy_x(descriptors, buffers, full.index(j), j, tile_m, first * 2 + j * STEPS, STEPS)
    slot = gl.where(begun == STAGES, 0, begun)
    filled = begun
    while (item < shape[2]) | (pair < end):
        tile_n, tile_m, _, first, pairs = _locate(item, pair, end, shape)
        for j in range(begun, pairs * 2 // STEPS):
            at = full.index(slot)
            column = first * 2 + j * STEPS
            if filled == STAGES:
                _empty(slot, SYNC, CONSUMERS)
            filled = gl.minimum(filled + 1, STAGES)
            mbarrier.expect(at, BYTES)
            _copy_x(descriptors, buffers, at, slot, tile_m, column, STEPS)
            _copy_weights(descriptors, buffers, at, slot, tile_n * PARTS, column, STEPS, COPIES)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        begun = begun * 0
        pair += gl.where(item < shape[2], 0, pairs)
        item += shape[4]
    slot = gl.where(filled == STAGES, slot, 0)
    for _ in range(filled):  # no barrier is left half way
        _empty(slot, SYNC, CONSUMERS)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)


@gluon.jit
def _decode_part(buffers, buffer, PART: gl.constexpr, COPIES: gl.constexpr, WORD: gl.constexpr):
    """Tile PART of a step's."""
    _, code_smem, scale_smem = buffers
    TOGETHER: gl.constexpr = code_smem.shape[1]
    at = buffer * COPIES + PART // TOGETHER
    codes = code_smem.index(at).slice(PART % TOGETHER, 1)
    return _decode(codes, scale_smem.index(at).slice(PART % TOGETHER, 1), WORD)


@gluon.jit
def _multiply(
    buffers, barriers, slot, phase, steps, w: gl.constexpr, CONSUMERS: gl.constexpr, TILES: gl.constexpr,
    STAGES: gl.constexpr, STEPS: gl.constexpr, TYPE: gl.constexpr, WORD: gl.constexpr, IN_TURNS: gl.constexpr,
):  # fmt: skip
    """Sums ``[64, BLOCK_M]`` of consumer ``w``'s tiles over ``steps`` steps; the second is the first for TILES = 1.

    Two products in turn, each from registers of its own: while one runs, the operand of the other is decoded. With
    IN_TURNS the consumers' products go to the tensor cores in turns too: left alone, they come to decode at the same
    time. ``slot`` and ``phase``: the first step's barrier and its parity; those of the step after the last come back.
    """
    x_smem = buffers[0]
    full, turns = barriers
    BLOCK_M: gl.constexpr = x_smem.shape[1]
    COPIES: gl.constexpr = CONSUMERS * TILES // buffers[1].shape[1]
    OWN: gl.constexpr = w * TILES
    OTHER: gl.constexpr = OWN + TILES - 1
    NEXT: gl.constexpr = (w + 1) % CONSUMERS
    TURN: gl.constexpr = 1 if w == 0 else 0
    DEPTH: gl.constexpr = 32 if TYPE.primitive_bitwidth == 8 else 16
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, DEPTH])
    mbarrier.wait(full.index(slot), phase)
    pairs = _decode_part(buffers, slot * STEPS, OWN, COPIES, WORD)
    sum_a = gl.full([64, BLOCK_M], 0.0, gl.float32, LAYOUT)
    sum_b = sum_a
    for j in range(0, steps, 3 - TILES):
        a = _operand(pairs, TYPE, LAYOUT)
        if IN_TURNS:
            mbarrier.wait(turns.index(w), TURN)
        sum_a = warpgroup_mma(a, x_smem.index(slot * STEPS).permute((1, 0)), sum_a, is_async=True)
        if IN_TURNS:
            mbarrier.arrive(turns.index(NEXT))
        other_slot, other_phase = slot, phase
        if STEPS == 1:
            if TILES == 1:
                other_slot, other_phase = _advance(slot, phase, STAGES)
            mbarrier.wait(full.index(other_slot), other_phase)
        other = other_slot * STEPS + (STEPS - 1)
        other_pairs = _decode_part(buffers, other, OTHER, COPIES, WORD)
        b = _operand(other_pairs, TYPE, LAYOUT)
        x = x_smem.index(other).permute((1, 0))
        if IN_TURNS:
            mbarrier.wait(turns.index(w), 1 - TURN)
        if TILES == 1:
            sum_a = warpgroup_mma(b, x, sum_a, is_async=True)
            if IN_TURNS:
                mbarrier.arrive(turns.index(NEXT))
            sum_a, pairs = warpgroup_mma_wait(1, [sum_a, pairs])
            if STEPS == 1:
                _empty(slot, ARRIVE, CONSUMERS)
        else:
            sum_b = warpgroup_mma(b, x, sum_b, is_async=True)
            if IN_TURNS:
                mbarrier.arrive(turns.index(NEXT))
            sum_a, sum_b, pairs = warpgroup_mma_wait(1, [sum_a, sum_b, pairs])
        slot, phase = _advance(other_slot, other_phase, STAGES)
        more = j + 3 - TILES < steps  # after the last step, that step again
        next_slot, next_phase = gl.where(more, slot, other_slot), gl.where(more, phase, other_phase)
        mbarrier.wait(full.index(next_slot), next_phase)
        pairs = _decode_part(buffers, next_slot * STEPS, OWN, COPIES, WORD)
        # or the assembler would decode after the product
        gl.inline_asm_elementwise(STAY_BEFORE, "=r,r", [next_slot], gl.int32, is_pure=False, pack=1)
        # the assembler wants all products of a round done before its end
        if TILES == 1:
            sum_a, other_pairs, pairs = warpgroup_mma_wait(0, [sum_a, other_pairs, pairs])
        else:
            sum_a, sum_b, other_pairs, pairs = warpgroup_mma_wait(0, [sum_a, sum_b, other_pairs, pairs])
        _empty(other_slot, ARRIVE, CONSUMERS)
    return sum_a, sum_b, slot, phase


@gluon.jit
def _consume(
    buffers, barriers, out_smem, results, shape, w: gl.constexpr, CONSUMERS: gl.constexpr, TILES: gl.constexpr,
    STAGES: gl.constexpr, STEPS: gl.constexpr, TYPE: gl.constexpr, WORD: gl.constexpr, BIAS: gl.constexpr,
    SPLIT: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr, IN_TURNS: gl.constexpr,
):  # fmt: skip
    """Consumer ``w``: tiles ``TILES * w`` to ``TILES * (w + 1) - 1`` of the rows of every work item."""
    FP8: gl.constexpr = TYPE.primitive_bitwidth == 8
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    item = gl.program_id(0)
    pair, end = _share(_after_the_kernel_ahead(gl.program_id(0)), shape)
    while (item < shape[2]) | (pair < end):
        tile_n, tile_m, number, _, pairs = _locate(item, pair, end, shape)
        tile = (tile_n * CONSUMERS + w) * TILES
        scale = row_scale(results, tile, out_smem.shape[1], FP8)
        sum_a, sum_b, slot, phase = _multiply(
            buffers, barriers, slot, phase, pairs * 2, w, CONSUMERS, TILES, STAGES, STEPS, TYPE, WORD, IN_TURNS
        )
        split = (number - shape[2], pairs)
        finish(
            sum_a, scale, tile, w * TILES, tile_m, split, results, out_smem.index(w), shape, CONSUMERS * TILES, FP8,
            BIAS, SPLIT, FUNCTION, GATED,
        )  # fmt: skip
        if TILES == 2:
            scale = row_scale(results, tile + 1, out_smem.shape[1], FP8)
            finish(
                sum_b, scale, tile + 1, w * TILES + 1, tile_m, split, results, out_smem.index(w), shape,
                CONSUMERS * TILES, FP8, BIAS, SPLIT, FUNCTION, GATED,
            )  # fmt: skip
        pair += gl.where(item < shape[2], 0, pairs)
        item += shape[4]
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["m", "tiles_m", "pairs_each", "whole", "left", "splits", "lag"])
def fp4_wide_kernel(
    x_desc, code_desc, scale_desc, out_desc, row_scale_ptr, bias_ptr, x_scale_ptr, partial_ptr, arrived_ptr, m, n,
    tiles_m, pairs_each, whole, left, splits, lag, CONSUMERS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    STEPS: gl.constexpr, TYPE: gl.constexpr, WORD: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr,
    REGISTERS: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr, IN_TURNS: gl.constexpr,
):  # fmt: skip
    """``out = epilogue(x @ weight.T * row_scale + bias)``.

    x ``[m, k]`` in blocks ``[BLOCK_M, 64]``; codes int32 ``[tiles, 2 * column tiles, 256]`` and scales int32 ``[tiles,
    column tiles, words]`` in the layout ``fragments2t``, in blocks ``[T, 2, 256]`` and ``[T, 1, words]``, where T
    divides ``CONSUMERS * TILES``; row_scale, bias ``[n]``; out ``[m, n]`` in blocks ``[BLOCK_M, 64]``, or (GATED) half
    as wide, after FUNCTION. A work item is ``pairs_each`` pairs of steps of 64 columns of ``64 * CONSUMERS * TILES``
    rows of the weight and BLOCK_M rows of x. Programs take the first ``whole`` in turns, then shares of the ``left``
    pairs of the others (with SPLIT; ``whole`` is a multiple of the number of programs then): equal ones, or (splits
    not 0) splits of each item. STAGES barriers stand for STEPS steps each. TYPE E4M3: x has a scale a row, x_scale
    ``[m]``, and the columns of every 16 in the order of
    :func:`vbcompile.kernels.fp4_linear_fp8.quantize_rows`.
    """
    PARTS: gl.constexpr = CONSUMERS * TILES
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    WORDS: gl.constexpr = scale_desc.block_type.shape[2]
    WIDTH: gl.constexpr = out_desc.block_type.shape[1]
    TOGETHER: gl.constexpr = code_desc.block_type.shape[0]
    COUNT: gl.constexpr = STAGES * STEPS * (PARTS // TOGETHER)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * STEPS, BLOCK_M, 64], x_desc.layout)
    code_smem = gl.allocate_shared_memory(gl.int32, [COUNT, TOGETHER, 2, 256], code_desc.layout)
    scale_smem = gl.allocate_shared_memory(gl.int32, [COUNT, TOGETHER, 1, WORDS], scale_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, BLOCK_M, WIDTH], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    shape = (tiles_m, pairs_each, whole, left, gl.num_programs(0), splits, lag)
    results = (out_desc, row_scale_ptr, bias_ptr, x_scale_ptr, partial_ptr, arrived_ptr, m, n)
    buffers = (x_smem, code_smem, scale_smem)
    barriers = (full, turns)
    descriptors = (x_desc, code_desc, scale_desc)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        buffers, barriers, out_smem, results, shape, 0, CONSUMERS, TILES, STAGES, STEPS, TYPE, WORD,
                        BIAS, SPLIT, FUNCTION, GATED, IN_TURNS,
                    ),
                ),
                (
                    _consume,
                    (
                        buffers, barriers, out_smem, results, shape, 1, CONSUMERS, TILES, STAGES, STEPS, TYPE, WORD,
                        BIAS, SPLIT, FUNCTION, GATED, IN_TURNS,
                    ),
                ),
                (_produce, (descriptors, buffers, barriers, shape, CONSUMERS, PARTS, STAGES, STEPS)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        buffers, barriers, out_smem, results, shape, 0, CONSUMERS, TILES, STAGES, STEPS, TYPE, WORD,
                        BIAS, SPLIT, FUNCTION, GATED, IN_TURNS,
                    ),
                ),
                (
                    _consume,
                    (
                        buffers, barriers, out_smem, results, shape, 1, CONSUMERS, TILES, STAGES, STEPS, TYPE, WORD,
                        BIAS, SPLIT, FUNCTION, GATED, IN_TURNS,
                    ),
                ),
                (
                    _consume,
                    (
                        buffers, barriers, out_smem, results, shape, 2, CONSUMERS, TILES, STAGES, STEPS, TYPE, WORD,
                        BIAS, SPLIT, FUNCTION, GATED, IN_TURNS,
                    ),
                ),
                (_produce, (descriptors, buffers, barriers, shape, CONSUMERS, PARTS, STAGES, STEPS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
