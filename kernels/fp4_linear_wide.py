"""Device code of the FP4 product for many rows of x on Hopper, in Triton's Gluon dialect (sm_90a).

A block of threads takes ``128 * TILES`` rows of the weight and BLOCK_M rows of x. One producer warp copies tiles of x,
codes and scales to shared memory with the tensor memory accelerator; each of two consumers, a warpgroup, decodes its
tiles of 64 rows by 64 columns to registers, as the left operand of ``wgmma``, while the tensor cores multiply the tile
before. Only x is read from shared memory by the tensor cores.
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

from vbcompile.kernels.fp4_linear_decode import activate

CONSUMERS = gl.constexpr(2)


@gluon.jit
def _decode(codes, scales, WORD: gl.constexpr):
    """A tile ``[64, 64]`` of the weight: int32 ``[128, 4, 2, 2]``, pairs of 16-bit floats, times ``2**-8``; or, if WORD
    has two results, ``[128, 4, 2]``, four E4M3 each, times ``2**-3``.

    codes: shared int32 ``[2, 256]``; scales: shared int32 ``[1, 32 * words of scales]``; WORD: assembly, constraints.
    """
    words = codes.load(gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])).reshape([128, 4])
    COUNT: gl.constexpr = scales.shape[1] // 32
    SHARED: gl.constexpr = gl.BlockedLayout([1, COUNT, 1], [1, 8, 4], [1, 4, 1], [2, 1, 0])
    scale = gl.expand_dims(scales.load(gl.SliceLayout(2, SHARED)), 2)
    scale, _ = gl.broadcast(scale, gl.full([1, 32 * COUNT, 4], 0, gl.int32, SHARED))
    scale = scale.reshape([32, COUNT, 4]).permute((0, 2, 1)).reshape([128, COUNT])
    scale = gl.join(scale, scale >> 16)
    if COUNT == 1:
        scale = gl.join(scale, scale)
    scale = gl.convert_layout(scale.reshape([128, 4]), words.type.layout, assert_trivial=True)
    CODE: gl.constexpr = WORD[0]
    CONSTRAINTS: gl.constexpr = WORD[1]
    RESULTS: gl.constexpr = WORD[2]
    TYPES: gl.constexpr = (gl.int32,) * RESULTS
    out = gl.inline_asm_elementwise(CODE, CONSTRAINTS, [words, scale], TYPES, is_pure=True, pack=1)
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
def _locate(item, shape):
    """Work item -> (tile of the weight's rows, tile of x, split, first step, steps); neighbours share the weight."""
    tiles_m, splits, steps_each, k_tiles = shape
    rest = item // tiles_m
    split = rest % splits
    first = split * steps_each
    return rest // splits, item % tiles_m, split, first, gl.minimum(steps_each, k_tiles - first)


@gluon.jit
def _advance(slot, phase, STAGES: gl.constexpr):
    """The buffer after ``slot``, and the parity of its barrier: a remainder would cost more."""
    wraps = slot == STAGES - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _produce(descriptors, buffers, barriers, shape, items, column_tiles, TILES: gl.constexpr):
    """The producer warp: keeps every shared buffer full."""
    x_desc, code_desc, scale_desc = descriptors
    x_smem, code_smem, scale_smem = buffers
    full, empty = barriers
    STAGES: gl.constexpr = x_smem.shape[0]
    PARTS: gl.constexpr = CONSUMERS * TILES
    BLOCK_M: gl.constexpr = x_smem.shape[1]
    BYTES: gl.constexpr = x_desc.block_type.nbytes + PARTS * (
        code_desc.block_type.nbytes + scale_desc.block_type.nbytes
    )
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    item = gl.program_id(0)
    while item < items:
        tile_n, tile_m, _, first, steps = _locate(item, shape)
        for j in range(steps):
            at = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(at, BYTES)
            tma.async_copy_global_to_shared(x_desc, [tile_m * BLOCK_M, (first + j) * 64], at, x_smem.index(slot))
            for t in gl.static_range(PARTS):
                row = (tile_n * PARTS + t) * column_tiles + first + j
                tma.async_copy_global_to_shared(code_desc, [row * 2, 0], at, code_smem.index(slot * PARTS + t))
                tma.async_copy_global_to_shared(scale_desc, [row, 0], at, scale_smem.index(slot * PARTS + t))
            slot, phase = _advance(slot, phase, STAGES)
        item += gl.num_programs(0)


@gluon.jit
def _multiply(
    buffers, barriers, slot, phase, steps, w: gl.constexpr, TILES: gl.constexpr, TYPE: gl.constexpr, WORD: gl.constexpr
):
    """Sums ``[64, BLOCK_M]`` of consumer ``w``'s tiles over ``steps`` steps; the second is the first for TILES = 1.

    Two products in turn, each from registers of its own: while one runs, the operand of the other is decoded. ``slot``
    and ``phase``: the first step's buffer and the parity of its barrier; those of the step after the last come back.
    """
    x_smem, code_smem, scale_smem = buffers
    full, empty = barriers
    STAGES: gl.constexpr = x_smem.shape[0]
    BLOCK_M: gl.constexpr = x_smem.shape[1]
    PARTS: gl.constexpr = CONSUMERS * TILES
    OWN: gl.constexpr = w * TILES
    DEPTH: gl.constexpr = 32 if TYPE.primitive_bitwidth == 8 else 16
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, DEPTH])
    mbarrier.wait(full.index(slot), phase)
    part = slot * PARTS + OWN
    pairs = _decode(code_smem.index(part), scale_smem.index(part), WORD)
    sum_a = gl.full([64, BLOCK_M], 0.0, gl.float32, LAYOUT)
    sum_b = sum_a
    for j in range(0, steps, 3 - TILES):
        a = _operand(pairs, TYPE, LAYOUT)
        sum_a = warpgroup_mma(a, x_smem.index(slot).permute((1, 0)), sum_a, is_async=True)
        other_slot, other_phase, part = slot, phase, slot * PARTS + OWN + 1
        if TILES == 1:
            other_slot, other_phase = _advance(slot, phase, STAGES)
            part = other_slot * PARTS + OWN
            mbarrier.wait(full.index(other_slot), other_phase)
        other_pairs = _decode(code_smem.index(part), scale_smem.index(part), WORD)
        b = _operand(other_pairs, TYPE, LAYOUT)
        x = x_smem.index(other_slot).permute((1, 0))
        if TILES == 1:
            sum_a = warpgroup_mma(b, x, sum_a, is_async=True)
            sum_a, pairs = warpgroup_mma_wait(1, [sum_a, pairs])
            mbarrier.arrive(empty.index(slot))
        else:
            sum_b = warpgroup_mma(b, x, sum_b, is_async=True)
            sum_a, sum_b, pairs = warpgroup_mma_wait(1, [sum_a, sum_b, pairs])
        slot, phase = _advance(other_slot, other_phase, STAGES)
        more = j + 3 - TILES < steps  # after the last step, that step again
        mbarrier.wait(full.index(gl.where(more, slot, other_slot)), gl.where(more, phase, other_phase))
        part = gl.where(more, slot, other_slot) * PARTS + OWN
        pairs = _decode(code_smem.index(part), scale_smem.index(part), WORD)
        # the assembler wants all products of a round done before its end
        if TILES == 1:
            sum_a, other_pairs, pairs = warpgroup_mma_wait(0, [sum_a, other_pairs, pairs])
        else:
            sum_a, sum_b, other_pairs, pairs = warpgroup_mma_wait(0, [sum_a, sum_b, other_pairs, pairs])
        mbarrier.arrive(empty.index(other_slot))
    return sum_a, sum_b, slot, phase


@gluon.jit
def _consume(
    buffers, barriers, out_smem, results, shape, items, w: gl.constexpr, TILES: gl.constexpr, TYPE: gl.constexpr,
    WORD: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Consumer ``w``: tiles ``TILES * w`` to ``TILES * (w + 1) - 1`` of the rows of every work item."""
    FP8: gl.constexpr = TYPE.primitive_bitwidth == 8
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    item = gl.program_id(0)
    while item < items:
        tile_n, tile_m, split, _, steps = _locate(item, shape)
        sum_a, sum_b, slot, phase = _multiply(buffers, barriers, slot, phase, steps, w, TILES, TYPE, WORD)
        tile = (tile_n * CONSUMERS + w) * TILES
        _finish(sum_a, tile, tile_m, split, results, out_smem.index(w), shape, FP8, BIAS, SPLIT, FUNCTION, GATED)
        if TILES == 2:
            _finish(
                sum_b, tile + 1, tile_m, split, results, out_smem.index(w), shape, FP8, BIAS, SPLIT, FUNCTION, GATED
            )
        item += gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit
def _finish(
    total, tile, tile_m, split, results, out_tile, shape, FP8: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr,
    FUNCTION: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Store a tile, after the epilogue; SPLIT: store its sums, and who comes last adds those of all splits in order."""
    out_desc, row_scale_ptr, bias_ptr, x_scale_ptr, partial_ptr, arrived_ptr, m, n = results
    LAYOUT: gl.constexpr = total.type.layout
    BLOCK_M: gl.constexpr = total.shape[1]
    last = tile * 64 < n
    if SPLIT:
        # whole tiles, one after another: [split, tile of x, tile of the weight, 64, BLOCK_M]
        tiles_m, splits, _, _ = shape
        tiles = gl.cdiv(n, 64)
        place = tile_m * tiles + tile
        SIZE: gl.constexpr = 64 * BLOCK_M
        own = partial_ptr + place.to(gl.int64) * SIZE
        step = (tiles_m * tiles).to(gl.int64) * SIZE
        within = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None] * BLOCK_M
        within = within + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))[None, :]
        if last:
            gl.store(own + split * step + within, total)
            gl.thread_barrier()
            last = gl.atomic_add(arrived_ptr + place, 1, sem="acq_rel") == splits - 1
        if last:
            total = gl.zeros_like(total)
            for part in range(splits):
                total += gl.load(own + part * step + within, cache_modifier=".cg")
            gl.store(arrived_ptr + place, 0)
    if last:
        rows = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        scale = gl.load(row_scale_ptr + rows, mask=rows < n, other=0.0)
        if FP8:
            columns = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))
            x_scale = gl.load(x_scale_ptr + columns, mask=columns < m, other=0.0)
            total = total * x_scale[None, :] * (scale * 8.0)[:, None]
        else:
            total = total * (scale * 256.0)[:, None]
        if BIAS:
            total += gl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
        result = _after(total, FUNCTION, GATED)
        tma.store_wait(0)
        gl.thread_barrier()  # only the thread that issued the last store waited for it
        out_tile.permute((1, 0)).store(result.to(out_tile.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out_desc, [tile_m * BLOCK_M, tile * result.shape[0]], out_tile)


@gluon.jit
def _after(total, FUNCTION: gl.constexpr, GATED: gl.constexpr):
    """The epilogue; a thread holds a row of the gate and, eight rows further on, of up."""
    if GATED:
        BLOCK_M: gl.constexpr = total.shape[1]
        gate, up = gl.split(total.reshape([4, 2, 8, BLOCK_M]).permute((0, 2, 3, 1)))
        return (activate(gate, FUNCTION) * up).reshape([32, BLOCK_M])
    else:
        return activate(total, FUNCTION)


@gluon.jit(do_not_specialize=["m", "k_tiles", "column_tiles", "tiles_m", "splits", "steps_each", "items"])
def fp4_wide_kernel(
    x_desc, code_desc, scale_desc, out_desc, row_scale_ptr, bias_ptr, x_scale_ptr, partial_ptr, arrived_ptr, m, n,
    k_tiles, column_tiles, tiles_m, splits, steps_each, items, TILES: gl.constexpr, STAGES: gl.constexpr,
    TYPE: gl.constexpr, WORD: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr, REGISTERS: gl.constexpr,
    FUNCTION: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """``out = epilogue(x @ weight.T * row_scale + bias)``.

    x ``[m, k]`` in blocks ``[BLOCK_M, 64]``; codes int32 ``[tiles * 2, 256]`` in blocks ``[2, 256]`` and scales int32
    ``[tiles, words]`` in blocks ``[1, words]``, in the layout ``fragments2t``; row_scale, bias ``[n]``; out ``[m, n]``
    in blocks ``[BLOCK_M, 64]``, or (GATED) half as wide, after FUNCTION. A work item is ``steps_each`` (even) steps of
    64 columns of ``128 * TILES`` rows of the weight and BLOCK_M rows of x; programs take items in rounds. TYPE E4M3: x
    has a scale a row, x_scale ``[m]``, and the columns of every 16 in the order of
    :func:`vbcompile.kernels.fp4_linear_fp8.quantize_rows`.
    """
    PARTS: gl.constexpr = CONSUMERS * TILES
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    WORDS: gl.constexpr = scale_desc.block_type.shape[1]
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, 64], x_desc.layout)
    code_smem = gl.allocate_shared_memory(gl.int32, [STAGES * PARTS, 2, 256], code_desc.layout)
    scale_smem = gl.allocate_shared_memory(gl.int32, [STAGES * PARTS, 1, WORDS], scale_desc.layout)
    WIDTH: gl.constexpr = out_desc.block_type.shape[1]
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, BLOCK_M, WIDTH], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    shape = (tiles_m, splits, steps_each, k_tiles)
    results = (out_desc, row_scale_ptr, bias_ptr, x_scale_ptr, partial_ptr, arrived_ptr, m, n)
    buffers = (x_smem, code_smem, scale_smem)
    barriers = (full, empty)
    descriptors = (x_desc, code_desc, scale_desc)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    buffers,
                    barriers,
                    out_smem,
                    results,
                    shape,
                    items,
                    0,
                    TILES,
                    TYPE,
                    WORD,
                    BIAS,
                    SPLIT,
                    FUNCTION,
                    GATED,
                ),
            ),
            (
                _consume,
                (
                    buffers,
                    barriers,
                    out_smem,
                    results,
                    shape,
                    items,
                    1,
                    TILES,
                    TYPE,
                    WORD,
                    BIAS,
                    SPLIT,
                    FUNCTION,
                    GATED,
                ),
            ),
            (_produce, (descriptors, buffers, barriers, shape, items, column_tiles, TILES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
