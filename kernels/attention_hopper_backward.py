"""Device code of the Hopper backward attention, in Triton's Gluon dialect (sm_90a).

One block of threads owns BLOCK_K keys of one key head and walks over the query tiles that see them, of every query head
of the group. Scores are computed transposed, keys in rows, so that P^T and dS^T leave the tensor cores in the layout in
which the next products take them from registers (FlashAttention-3, arXiv 2407.08608, appendix B):

    S^T  = K Q^T            P^T  = exp2(scale log2(e) S^T - log2(e) lse)
    dP^T = V dO^T           dS^T = P^T * (dP^T - delta),  delta = rowsum(dO * O) - d lse
    dV  += P^T dO           dK  += scale dS^T Q           dQ += scale dS K   (added in device memory, float32)

One producer warp loads tiles by the tensor memory accelerator, a warpgroup per 64 keys computes. Order within one tile,
tensor cores in brackets: [S], [dP] exponentials, [dV] dS, [dQ], [dK, S of the next tile] dQ to memory.
"""

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@builtin
def add_to_global(descriptor, coordinates, source, _semantic=None):
    """Asynchronously add a tile in shared memory to device memory (Gluon 3.6 has the operation, but no name for it)."""
    where = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, where, source.handle)


@gluon.jit
def visible_tiles(key_tile, sizes, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """(first, end, number over all query heads) of the query tiles that see a key of this key tile.

    Never none: keys that no query sees get one tile, all masked. A loop that may be empty would define the
    accumulators outside the tensor cores, and the assembler would then wait after every single instruction of them.
    """
    queries, per_key_head, offset = sizes[0], sizes[3], sizes[4]
    end = gl.cdiv(queries, BLOCK_Q)
    first = gl.minimum(gl.maximum(key_tile * BLOCK_K - offset, 0) // BLOCK_Q, end - 1)
    return first, end, gl.maximum((end - first) * per_key_head, 1)


@gluon.jit
def place_block(sizes, BLOCK_K: gl.constexpr, GROUP: gl.constexpr):
    """(key tile, batch, key head) of this block; within GROUP heads the first, longest key tiles go first."""
    keys, k_heads, heads = sizes[1], sizes[2], sizes[5]
    tiles = gl.cdiv(keys, BLOCK_K)
    index = gl.program_id(0)
    group = index // (GROUP * tiles)
    inside = index - group * GROUP * tiles
    width = gl.minimum(heads - group * GROUP, GROUP)
    tile = inside // width
    head = group * GROUP + inside - tile * width
    batch = head // k_heads
    return tile, batch, head - batch * k_heads


@gluon.jit
def produce(descriptors, buffers, barriers, sizes, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr):
    """The producer warp. ``sizes`` = (queries, keys, key heads, query heads per key head, causal offset,
    batch * key heads)."""
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc = descriptors
    q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem = buffers
    q_full, q_empty, do_full, do_empty, kv_full = barriers
    _, _, k_heads, per_key_head, _, _ = sizes
    STAGES: gl.constexpr = q_smem.shape[0]
    key_tile, batch, k_head = place_block(sizes, BLOCK_K, GROUP)
    first, end, total = visible_tiles(key_tile, sizes, BLOCK_Q, BLOCK_K)
    mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, k_head, key_tile * BLOCK_K, 0], kv_full.index(0), k_smem)
    mbarrier.expect(kv_full.index(1), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [batch, k_head, key_tile * BLOCK_K, 0], kv_full.index(1), v_smem)
    q_head = k_head * per_key_head
    tile = first
    for i in range(total):
        slot = i % STAGES
        phase = (i // STAGES & 1) ^ 1
        row = tile * BLOCK_Q
        flat_head = (batch * k_heads) * per_key_head + q_head
        mbarrier.wait(q_empty.index(slot), phase)
        mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [batch, q_head, row, 0], q_full.index(slot), q_smem.index(slot))
        tma.async_copy_global_to_shared(lse_desc, [flat_head, row], q_full.index(slot), lse_smem.index(slot))
        mbarrier.wait(do_empty.index(slot), phase)
        mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(do_desc, [batch, q_head, row, 0], do_full.index(slot), do_smem.index(slot))
        tma.async_copy_global_to_shared(delta_desc, [flat_head, row], do_full.index(slot), delta_smem.index(slot))
        tile += 1
        if tile == end:
            tile = first
            q_head += 1


@gluon.jit
def mask_transposed(s, first_key, first_row, sizes):
    """-inf where a key (row) lies past the end or after the query's (column's) own position.

    A lane holds columns ``8 a + 2 lane + c``; compared as constants, see the forward's ``mask_scores``.
    """
    parts = s.reshape(s.shape[0], s.shape[1] // 8, 4, 2)
    split: gl.constexpr = parts.type.layout
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, split))
    steps: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, split))
    keys = first_key + gl.arange(0, s.shape[0], gl.SliceLayout(1, lanes))
    bound = gl.where(keys < sizes[1], keys - sizes[4] - first_row, 1 << 30)
    bound = bound[:, None] - 2 * gl.arange(0, 4, gl.SliceLayout(0, lanes))[None, :]
    columns = 8 * gl.arange(0, s.shape[1] // 8, gl.SliceLayout(1, steps))[:, None]
    columns = columns + gl.arange(0, 2, gl.SliceLayout(0, steps))[None, :]
    bound = gl.expand_dims(gl.expand_dims(bound, 1), 3)
    columns = gl.expand_dims(gl.expand_dims(columns, 0), 2)
    masked = gl.where(columns >= bound, parts, float("-inf")).reshape(s.shape[0], s.shape[1])
    return gl.convert_layout(masked, s.type.layout, assert_trivial=True)


@gluon.jit
def compute(
    buffers,
    barriers,
    results,
    sizes,
    scale,
    scale_log2,
    padded_queries,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    LATE: gl.constexpr,
):
    """The computing warpgroups, 64 keys each."""
    q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem = buffers
    q_full, q_empty, do_full, do_empty, kv_full = barriers
    dq_desc, dk_desc, dv_desc = results
    _, keys, k_heads, per_key_head, offset, _ = sizes
    STAGES: gl.constexpr = q_smem.shape[0]
    dtype: gl.constexpr = q_smem.dtype
    WARPS: gl.constexpr = BLOCK_K // 16
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_Q, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    q_warps: gl.constexpr = [BLOCK_Q // 16, WARPS * 16 // BLOCK_Q]
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], q_warps, [16, D // q_warps[1], 16])
    left: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    key_tile, batch, k_head = place_block(sizes, BLOCK_K, GROUP)
    first, end, total = visible_tiles(key_tile, sizes, BLOCK_Q, BLOCK_K)
    first_key = key_tile * BLOCK_K
    tile = first
    dq_row = ((batch * k_heads + k_head) * per_key_head) * padded_queries
    k_tile = k_smem.reshape([BLOCK_K, D])
    v_tile = v_smem.reshape([BLOCK_K, D])
    zero_s = gl.full([BLOCK_K, BLOCK_Q], 0.0, gl.float32, s_layout)
    zero_q = gl.full([BLOCK_Q, D], 0.0, gl.float32, q_layout)
    dk = warpgroup_mma_init(gl.full([BLOCK_K, D], 0.0, gl.float32, kv_layout))
    dv = gl.full([BLOCK_K, D], 0.0, gl.float32, kv_layout)
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(kv_full.index(1), 0)
    for i in range(total):
        slot = i % STAGES
        phase = i // STAGES & 1
        q_tile = q_smem.index(slot).reshape([BLOCK_Q, D])
        do_tile = do_smem.index(slot).reshape([BLOCK_Q, D])
        first_row = tile * BLOCK_Q
        mbarrier.wait(q_full.index(slot), phase)
        s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(slot), phase)
        dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        if not LATE:
            lse = lse_smem.index(slot).load(s_layout)
        dk = warpgroup_mma_wait(2, [dk])  # of the last tile
        mbarrier.arrive(q_empty.index((i + STAGES - 1) % STAGES), pred=i > 0)
        scores = warpgroup_mma_wait(1, [s])
        if (first_row + offset < first_key + BLOCK_K - 1) | (first_key + BLOCK_K > keys):
            scores = mask_transposed(scores, first_key, first_row, sizes)
        if LATE:
            lse = lse_smem.index(slot).load(s_layout)
        p = gl.exp2(scores * scale_log2 - lse)
        weights = gl.convert_layout(p.to(dtype), left, assert_trivial=True)
        dv = warpgroup_mma(weights, do_tile, dv, is_async=True)
        if not LATE:
            delta = delta_smem.index(slot).load(s_layout)
        dp = warpgroup_mma_wait(1, [dp])
        if LATE:
            delta = delta_smem.index(slot).load(s_layout)
        ds = (p * (dp - delta)).to(dtype)
        ds_smem.store(ds)
        fence_async_shared()
        gl.thread_barrier()
        dq = warpgroup_mma(ds_smem.permute((1, 0)), k_tile, zero_q, use_acc=False, is_async=True)
        ds = gl.convert_layout(ds, left, assert_trivial=True)
        dk = warpgroup_mma(ds, q_tile, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, [dq, dv])
        mbarrier.arrive(do_empty.index(slot))
        tma.store_wait(0)
        gl.thread_barrier()  # only the thread that issued the last addition waited for it
        dq_smem.store(dq)
        fence_async_shared()
        gl.thread_barrier()
        add_to_global(dq_desc, [dq_row + first_row, 0], dq_smem)
        tile += 1
        if tile == end:
            tile = first
            dq_row += padded_queries
    dk = warpgroup_mma_wait(0, [dk])
    v_tile.store(dv.to(dtype))
    k_tile.store((dk * scale).to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(dv_desc, [batch, k_head, first_key, 0], v_smem)
    tma.async_copy_shared_to_global(dk_desc, [batch, k_head, first_key, 0], k_smem)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "k_heads", "per_key_head", "offset", "heads", "padded_queries"])
def attention_backward(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    scale,
    scale_log2,
    queries,
    keys,
    k_heads,
    per_key_head,
    offset,
    heads,
    padded_queries,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LATE: gl.constexpr,
):
    """q, dO ``[B, H, Q, D]`` in blocks ``[1, 1, BLOCK_Q, D]``; k, v, dK, dV ``[B, Hk, K, D]`` in blocks
    ``[1, 1, BLOCK_K, D]``; log2(e) lse and delta ``[B * H, padded Q]`` float32 in blocks ``[1, BLOCK_Q]``; dQ
    ``[B * H * padded Q, D]`` float32 in blocks ``[BLOCK_Q, D]``, unscaled. ``heads`` is B * Hk; ``padded Q`` a
    multiple of 128; not causal means an offset beyond all keys."""
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[2]
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, D], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_K, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_K, D], v_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], delta_desc.layout)
    ds_smem = gl.allocate_shared_memory(dtype, [BLOCK_K, BLOCK_Q], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [BLOCK_Q, D], dq_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=1)
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(kv_full.index(1), count=1)
    fence_async_shared()
    sizes = (queries, keys, k_heads, per_key_head, offset, heads)
    loaded = (q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem)
    buffers = (q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem)
    barriers = (q_full, q_empty, do_full, do_empty, kv_full)
    descriptors = (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc)
    results = (dq_desc, dk_desc, dv_desc)
    gl.warp_specialize(
        [
            (
                compute,
                (
                    buffers,
                    barriers,
                    results,
                    sizes,
                    scale,
                    scale_log2,
                    padded_queries,
                    BLOCK_Q,
                    BLOCK_K,
                    D,
                    GROUP,
                    LATE,
                ),
            ),
            (produce, (descriptors, loaded, barriers, sizes, BLOCK_Q, BLOCK_K, GROUP)),
        ],
        [1],
        [24],
    )


@triton.jit(do_not_specialize=["queries", "padded_queries", "heads"])
def prepare_backward(
    out,
    grad_out,
    lse,
    grad_lse,
    lse_log2,
    delta,
    dq,
    queries,
    padded_queries,
    heads,
    out_batch,
    out_head,
    out_row,
    grad_batch,
    grad_head,
    grad_row,
    HAS_GRAD_LSE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """log2(e) lse and delta = rowsum(dO * O) - d lse, ``[B * H, padded Q]``; zeros the float32 sum of dQ.

    Rows past the end get lse = inf, so that their exponentials vanish.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads
    inner = head - batch * heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    real = rows < queries
    o = tl.load(
        out + batch * out_batch + inner * out_head + rows[:, None] * out_row + columns[None, :],
        mask=real[:, None],
        other=0.0,
    ).to(tl.float32)
    g = tl.load(
        grad_out + batch * grad_batch + inner * grad_head + rows[:, None] * grad_row + columns[None, :],
        mask=real[:, None],
        other=0.0,
    ).to(tl.float32)
    value = tl.sum(o * g, 1)
    if HAS_GRAD_LSE:
        value -= tl.load(grad_lse + head * queries + rows, mask=real, other=0.0)
    padded = head * padded_queries + rows
    tl.store(delta + padded, value)
    tl.store(
        lse_log2 + padded, tl.load(lse + head * queries + rows, mask=real, other=float("inf")) * 1.4426950408889634
    )
    tl.store(dq + padded[:, None] * D + columns[None, :], tl.zeros([ROWS, D], tl.float32))


@triton.jit(do_not_specialize=["queries", "padded_queries", "heads"])
def finish_backward(
    total, dq, scale, queries, padded_queries, heads, dq_batch, dq_head, dq_row, D: tl.constexpr, ROWS: tl.constexpr
):
    """dQ = scale * float32 sum, rounded once."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads
    inner = head - batch * heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    value = tl.load(total + (head * padded_queries + rows)[:, None] * D + columns[None, :])
    place = dq + batch * dq_batch + inner * dq_head + rows[:, None] * dq_row + columns[None, :]
    tl.store(place, (value * scale).to(dq.dtype.element_ty), mask=rows[:, None] < queries)
