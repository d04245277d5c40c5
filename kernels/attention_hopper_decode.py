"""Device code of Hopper's attention of few queries over many keys, in Triton's Gluon dialect (sm_90a).

As in :mod:`vbcompile.kernels.attention_decode` a program has the rows of all queries that read one head of k and v,
and every so-manieth tile of its keys. Tiles come by the tensor memory accelerator, as many ahead of the products as
there are buffers. Scores are computed transposed, keys in rows, so that the tensor cores' 64 rows are filled: scores
``K q^T``, output ``V^T P``. ``attention_merge_kernel`` merges the parts.
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

from vbcompile.kernels.attention_hopper_scores import split_lead
from vbcompile.kernels.attention_hopper_tiles import larger

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _let_next_start():
    """Let a kernel that was launched to start early do so."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _row_offset(row, outer, group_sizes, sizes, strides):
    """Elements from the start of a tensor to rows of a head of k and v; (offset, number of the row among all)."""
    q_length, lead_sizes = sizes
    member = split_lead(row // q_length, group_sizes)
    i = row % q_length
    offset = i.to(gl.int64) * strides[4]
    number = gl.zeros_like(row)
    for axis in gl.static_range(4):
        index = outer[axis] + member[axis]
        offset += index.to(gl.int64) * strides[axis]
        number = number * lead_sizes[axis] + index
    return offset, number.to(gl.int64) * q_length + i


@gluon.jit
def _request(tile, slot, there, descriptors, buffers, full, place, BLOCK_K: gl.constexpr):
    """Begin to copy a tile of keys and values; nothing where it is not ``there``."""
    k_desc, v_desc = descriptors
    k_smem, v_smem = buffers
    batch, head = place
    mbarrier.expect(full.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes, pred=there)
    at = [batch, head, tile * BLOCK_K, 0]
    tma.async_copy_global_to_shared(k_desc, at, full.index(slot), k_smem.index(slot), pred=there)
    tma.async_copy_global_to_shared(v_desc, at, full.index(slot), v_smem.index(slot), pred=there)


@gluon.jit
def _kept(j, context, MASK: gl.constexpr):
    """Which of the keys ``j`` take part, for a mask that is the same for all rows."""
    lead, q_length, k_length, captured, captured_strides = context
    row = gl.to_tensor(0)
    exists = j < k_length
    keep = MASK(0.0, row, j, row == 0, exists, exists, lead, q_length, k_length, captured, captured_strides)
    return keep & exists


@gluon.jit
def _needed_tiles(first, end, step, context, MASK: gl.constexpr, BLOCK_K: gl.constexpr, TILES: gl.constexpr):
    """``(first, after last)`` of the tiles ``first, first + step ..`` that a mask needs, TILES looked at together."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [512 // BLOCK_K, BLOCK_K // 16], [4, 1], [1, 0])
    least = end
    most = first
    for start in range(first, end, step * TILES):
        tile = (start + gl.arange(0, TILES, gl.SliceLayout(1, LAYOUT)) * step)[:, None]
        j = tile * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))[None, :]
        keep = _kept(j, context, MASK)
        least = gl.minimum(least, gl.min(gl.min(gl.where(keep, tile, end), 1), 0))
        most = gl.maximum(most, gl.max(gl.max(gl.where(keep, tile + 1, first), 1), 0))
    return least, most


@gluon.jit(do_not_specialize=["q_length", "k_length", "group", "splits", "total_rows"])
def attention_hopper_decode_kernel(
    q, k_desc, v_desc, out, lse, part_out, part_rows, captured, lead_sizes, outer_sizes, group_sizes,
    q_strides, out_strides, captured_strides, scale, q_length, k_length, group, splits, total_rows,
    MASK: gl.constexpr, KEY_RANGE: gl.constexpr, LOOK: gl.constexpr, EMPTY_IS_ZERO: gl.constexpr, D: gl.constexpr,
    WIDTH: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, SPLIT: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """One program: the ``group * q_length`` rows, at most WIDTH, of one head of k and v, one of ``splits`` parts.

    The grid is ``[splits, heads, batch]``. k_desc, v_desc: ``[batch, heads, k_length, D]`` in blocks ``[1, 1,
    BLOCK_K, D]``; MASK and what it says are the same for all rows; the other arguments as for
    ``attention_decode_kernel``.
    """
    dtype: gl.constexpr = k_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    Q_SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [WIDTH, D], Q_SHARED)
    p_smem = gl.allocate_shared_memory(dtype, [WIDTH, BLOCK_K], Q_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if EARLY:
        _let_next_start()
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    split = gl.program_id(0)
    place = (gl.program_id(2), gl.program_id(1))
    outer = split_lead(gl.program_id(2) * gl.num_programs(1) + gl.program_id(1), outer_sizes)
    descriptors = (k_desc, v_desc)
    buffers = (k_smem, v_smem)
    context = (outer, q_length, k_length, captured, captured_strides)
    first = split
    tiles = gl.cdiv(k_length, BLOCK_K)
    if KEY_RANGE is not None:
        row = gl.to_tensor(0)
        begin, _, _, end = KEY_RANGE(
            0, 0, k_length, row, row == 0, outer, q_length, k_length, captured, captured_strides
        )  # fmt: skip
        tiles = gl.cdiv(gl.maximum(gl.minimum(end, k_length), 0), BLOCK_K)
        first = gl.minimum(gl.maximum(begin, 0) // BLOCK_K, tiles) + split
    if LOOK is not None:
        first, tiles = _needed_tiles(first, tiles, splits, context, LOOK, BLOCK_K, TILES)
    for i in gl.static_range(STAGES):
        tile = first + i * splits
        _request(tile, i, tile < tiles, descriptors, buffers, full, place, BLOCK_K)
    sizes = (q_length, lead_sizes)
    rows = group * q_length
    row = gl.arange(0, WIDTH, gl.SliceLayout(1, Q_LAYOUT))
    exists = row < rows
    offset, _ = _row_offset(gl.where(exists, row, 0), outer, group_sizes, sizes, q_strides)
    widths = gl.arange(0, D, gl.SliceLayout(0, Q_LAYOUT))
    at = q + offset[:, None] + widths[None, :] * q_strides[5]
    q_smem.store(gl.load(at, mask=exists[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    factor = scale * LOG2E
    top = gl.full([WIDTH], float("-inf"), gl.float32, COLUMNS)
    total = gl.zeros([BLOCK_K, WIDTH], gl.float32, S_LAYOUT)
    sums = gl.zeros([D, WIDTH], gl.float32, S_LAYOUT)
    keys = gl.arange(0, BLOCK_K, gl.SliceLayout(1, S_LAYOUT))[:, None]
    if MASK is not None:
        keep = _kept(first * BLOCK_K + keys, context, MASK)
    n = gl.to_tensor(0)
    for tile in range(first, tiles, splits):
        if MASK is not None:  # on its way while this tile is computed
            upcoming = _kept((tile + splits) * BLOCK_K + keys, context, MASK)
        slot = n % STAGES
        mbarrier.wait(full.index(slot), n // STAGES & 1)
        k_tile = k_smem.index(slot).reshape([BLOCK_K, D])
        zero = gl.zeros([BLOCK_K, WIDTH], gl.float32, S_LAYOUT)
        s = warpgroup_mma(k_tile, q_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        if MASK is not None:
            s = gl.where(keep, s, float("-inf"))
            keep = upcoming
        elif (tile + 1) * BLOCK_K > k_length:
            s = gl.where(tile * BLOCK_K + keys < k_length, s, float("-inf"))
        highest = larger(top, gl.max(s, 0))
        base = gl.where(highest == float("-inf"), 0.0, highest) * factor
        p = gl.exp2(s * factor - base[None, :])
        decay = gl.exp2(top * factor - base)
        top = highest
        total = total * decay[None, :] + p
        p_smem.permute((1, 0)).store(p.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        sums = sums * decay[None, :]
        v_tile = v_smem.index(slot).reshape([BLOCK_K, D]).permute((1, 0))
        sums = warpgroup_mma(v_tile, p_smem.permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(0, [sums])
        gl.thread_barrier()
        later = tile + STAGES * splits
        _request(later, slot, later < tiles, descriptors, buffers, full, place, BLOCK_K)
        n += 1
    weights = gl.sum(total, 0)
    top = top * scale
    r = gl.arange(0, WIDTH, COLUMNS)
    exists = r < rows
    offset, number = _row_offset(gl.where(exists, r, 0), outer, group_sizes, sizes, out_strides)
    values = gl.arange(0, D, gl.SliceLayout(1, S_LAYOUT))
    if SPLIT:
        part = split * total_rows.to(gl.int64) + number
        gl.store(part_rows + part, top, mask=exists)
        gl.store(part_rows + splits * total_rows.to(gl.int64) + part, weights, mask=exists)
        gl.store(part_out + (part * D)[None, :] + values[:, None], sums, mask=exists[None, :])
    else:
        gl.store(lse + number, top + gl.log(weights), mask=exists)
        if EMPTY_IS_ZERO:
            weights = gl.where(weights == 0.0, 1.0, weights)
        results = (sums / weights[None, :]).to(out.dtype.element_ty)
        gl.store(out + offset[None, :] + values[:, None] * out_strides[5], results, mask=exists[None, :])
