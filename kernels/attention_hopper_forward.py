"""Device code of the Hopper forward attention, in Triton's Gluon dialect (sm_90a).

One block of threads works on query tiles of ``64 * consumers`` rows. One producer warp copies Q, K and V tiles to
shared memory with the tensor memory accelerator; each consumer is one warpgroup that owns 64 query rows. The matrix
product S of the next key tile is issued before the product P V of the current one, so that the softmax of the next
tile runs under the tensor cores' work (FlashAttention-3, arXiv 2407.08608, algorithm 2); with ``PING_PONG`` two
consumers take turns at the tensor cores (section 3.1 there).

    shared memory   Q [Q_STAGES * consumers, 64, D] | O [consumers, 64, D] | K, V [STAGES, BLOCK_K, D] | next work item
    barriers        full / empty per buffer; named hardware barriers 8 and 9 give the turns

Work items (a query tile of a head) are handed out in rounds or, DYNAMIC, from a counter in device memory: with a causal
mask tiles differ in length, and whoever is free takes the longest that is left.

Key tiles are walked from the last to the first: tiles that need a mask come first and every row's own keys come last.
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

from vbcompile.kernels.attention_hopper_tiles import (
    TURN,
    carry_weights,
    exp2_mixed,
    finish_first,
    locate,
    mask_scores,
    pass_turn,
    sum_within_lane,
    use_weights,
    wait_turn,
)

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def count_key_tiles(query_tile, sizes, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CAUSAL: gl.constexpr):
    """(key tiles that a query tile sees, how many of them need no mask)."""
    first = query_tile * BLOCK_Q + sizes[3]
    last = gl.minimum(sizes[0], first + BLOCK_Q)
    clear = gl.minimum(sizes[0], first + 1)
    return gl.cdiv(last, BLOCK_K), clear // BLOCK_K


@gluon.jit
def hand_out(work, number, item):
    """Producer: publish the next work item to the consumers; ``number`` counts the items before it."""
    slot, full, empty = work
    mbarrier.wait(empty.index(0), (number & 1) ^ 1)
    slot.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + item)
    mbarrier.arrive(full.index(0))


@gluon.jit
def take_over(work, number):
    """Consumer: the next work item."""
    slot, full, empty = work
    mbarrier.wait(full.index(0), number & 1)
    item = gl.max(slot.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(empty.index(0))
    return item


@gluon.jit
def produce(
    descriptors,
    buffers,
    barriers,
    work,
    sizes,
    CONSUMERS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    """The producer warp: keeps every shared buffer full. ``sizes`` = (keys, query heads, query heads per key head,
    causal offset, query tiles, batch * query heads, counter of work items)."""
    q_desc, k_desc, v_desc = descriptors
    q_smem, _, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    _, q_heads, heads_per_key_head, _, query_tiles, heads, counter = sizes
    STAGES: gl.constexpr = k_smem.shape[0]
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS
    loaded = gl.to_tensor(0)
    done = gl.to_tensor(0)
    item = gl.program_id(0)
    while item < query_tiles * heads:
        upcoming = item + gl.num_programs(0)
        if DYNAMIC:  # asked for early: the answer takes about a microsecond
            upcoming = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        query_tile, head = locate(item, query_tiles, heads, GROUP)
        batch = head // q_heads
        q_head = head - batch * q_heads
        k_head = q_head // heads_per_key_head
        tiles, _ = count_key_tiles(query_tile, sizes, BLOCK_Q, BLOCK_K, CAUSAL)
        for w in gl.static_range(CONSUMERS):
            slot = w + done % Q_STAGES * CONSUMERS
            mbarrier.wait(q_empty.index(slot), (done // Q_STAGES & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
            row = query_tile * BLOCK_Q + w * 64
            tma.async_copy_global_to_shared(q_desc, [batch, q_head, row, 0], q_full.index(slot), q_smem.index(slot))
        for j in range(tiles):
            slot = loaded % STAGES
            phase = (loaded // STAGES & 1) ^ 1
            row = (tiles - 1 - j) * BLOCK_K
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [batch, k_head, row, 0], k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [batch, k_head, row, 0], v_full.index(slot), v_smem.index(slot))
            loaded += 1
        if DYNAMIC:
            hand_out(work, done, upcoming)
        done += 1
        item = upcoming


@gluon.jit
def advance(
    state,
    taken,
    q_tile,
    k_smem,
    v_smem,
    barriers,
    scale_log2,
    place,
    sizes,
    w: gl.constexpr,
    PACK: gl.constexpr,
    CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    POLY: gl.constexpr,
):
    """One key tile: S of the next tile, P V of the current one, softmax of the next one under P V.

    ``place`` = (first query row, first key of the next tile, whether that tile needs the mask).
    """
    m, total, o, p = state
    _, _, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_K: gl.constexpr = k_smem.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    D: gl.constexpr = o.shape[1]
    o_layout: gl.constexpr = o.type.layout
    slot = taken % STAGES
    next_slot = (taken + 1) % STAGES
    mbarrier.wait(k_full.index(next_slot), (taken + 1) // STAGES & 1)
    if PING_PONG:
        wait_turn(TURN + w)
    k_tile = k_smem.index(next_slot).reshape([BLOCK_K, D]).permute((1, 0))
    zero = gl.full([64, BLOCK_K], 0.0, gl.float32, s_layout)
    s = warpgroup_mma(q_tile, k_tile, zero, use_acc=False, is_async=True)
    old = p
    weights = use_weights(old, q_tile.dtype, o_layout)
    mbarrier.wait(v_full.index(slot), taken // STAGES & 1)
    o = warpgroup_mma(weights, v_smem.index(slot).reshape([BLOCK_K, D]), o, is_async=True)
    if PING_PONG:
        pass_turn(TURN + 1 - w)
    s = warpgroup_mma_wait(1, [s])
    mbarrier.arrive(k_empty.index(next_slot))
    if CAUSAL:  # noqa: SIM102 - known at compile time, the place is not
        if place[2]:
            s = mask_scores(s, place[0], place[1], sizes)
    new_m = gl.maximum(m, gl.max(s, 1))
    base = gl.where(new_m == float("-inf"), 0.0, new_m)  # rows that have seen no key yet
    alpha = gl.exp2((m - base) * scale_log2)
    p = exp2_mixed(s * scale_log2 - (base * scale_log2)[:, None], POLY)
    part = sum_within_lane(p)
    if OVERLAP:
        part = finish_first(part)
    total = total * gl.convert_layout(alpha, gl.SliceLayout(1, part.type.layout))[:, None] + part
    if PACK:
        # The old weights are kept until P V has read them: the new ones must not be rounded into their registers.
        carried = carry_weights(p, q_tile.dtype, PACK)
        o, weights, carried = warpgroup_mma_wait(0, [o, old, carried])
    else:
        o, carried = warpgroup_mma_wait(0, [o, p])
    mbarrier.arrive(v_empty.index(slot))
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o.type.layout))[:, None]
    return new_m, total, o, carried


@gluon.jit
def consume(
    shared,
    w: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    PACK: gl.constexpr,
    POLY: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    """Consumer warpgroup ``w``: rows ``64 w .. 64 w + 63`` of every query tile of this block."""
    buffers, barriers, work, results, sizes, scale_log2, queries = shared
    q_smem, o_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    o_desc, lse_pointer = results
    _, q_heads, _, _, query_tiles, heads, _ = sizes
    STAGES: gl.constexpr = k_smem.shape[0]
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    o_tile = o_smem.index(w)
    taken = gl.to_tensor(0)
    done = gl.to_tensor(0)
    if PING_PONG and w == 1:
        pass_turn(TURN)
    item = gl.program_id(0)
    while item < query_tiles * heads:
        query_tile, head = locate(item, query_tiles, heads, GROUP)
        tiles, clear = count_key_tiles(query_tile, sizes, BLOCK_Q, BLOCK_K, CAUSAL)
        first_row = query_tile * BLOCK_Q + w * 64

        q_slot = w + done % Q_STAGES * CONSUMERS
        q_tile = q_smem.index(q_slot).reshape([64, D])
        mbarrier.wait(q_full.index(q_slot), done // Q_STAGES & 1)
        slot = taken % STAGES
        mbarrier.wait(k_full.index(slot), taken // STAGES & 1)
        if PING_PONG:
            wait_turn(TURN + w)
        k_tile = k_smem.index(slot).reshape([BLOCK_K, D]).permute((1, 0))
        zero = gl.full([64, BLOCK_K], 0.0, gl.float32, s_layout)
        s = warpgroup_mma(q_tile, k_tile, zero, use_acc=False, is_async=True)
        if PING_PONG:
            pass_turn(TURN + 1 - w)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(slot))
        if clear < tiles:
            s = mask_scores(s, first_row, (tiles - 1) * BLOCK_K, sizes)
        m = gl.max(s, 1)
        base = gl.where(m == float("-inf"), 0.0, m)
        p = exp2_mixed(s * scale_log2 - (base * scale_log2)[:, None], POLY)
        state = (
            m,
            sum_within_lane(p),
            gl.full([64, D], 0.0, gl.float32, o_layout),
            carry_weights(p, q_tile.dtype, PACK),
        )
        for j in range(1, tiles):
            place = (first_row, (tiles - 1 - j) * BLOCK_K, j < tiles - clear)
            state = advance(
                state,
                taken,
                q_tile,
                k_smem,
                v_smem,
                barriers,
                scale_log2,
                place,
                sizes,
                w,
                PACK,
                CAUSAL,
                PING_PONG,
                OVERLAP,
                POLY,
            )
            taken += 1
        m, total, o, p = state
        mbarrier.arrive(q_empty.index(q_slot))
        slot = taken % STAGES
        mbarrier.wait(v_full.index(slot), taken // STAGES & 1)
        weights = use_weights(p, q_tile.dtype, o_layout)
        o = warpgroup_mma(weights, v_smem.index(slot).reshape([BLOCK_K, D]), o, is_async=True)
        row_total = gl.convert_layout(gl.sum(total, 1), s_rows)
        rows = first_row + gl.arange(0, 64, s_rows)
        lse = m * (scale_log2 * LN2) + gl.log(row_total)
        gl.store(lse_pointer + head.to(gl.int64) * queries + rows, lse, mask=rows < queries)
        share = gl.convert_layout(1.0 / row_total, o_rows)
        o = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_empty.index(slot))
        taken += 1
        tma.store_wait(0)
        gl.thread_barrier()  # only the thread that issued the last store waited for it
        o_tile.reshape([64, D]).store((o * share[:, None]).to(q_tile.dtype))
        fence_async_shared()
        gl.thread_barrier()
        batch = head // q_heads
        tma.async_copy_shared_to_global(o_desc, [batch, head - batch * q_heads, first_row, 0], o_tile)
        if DYNAMIC:
            item = take_over(work, done)
        else:
            item += gl.num_programs(0)
        done += 1
    if PING_PONG and w == 0:
        wait_turn(TURN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "q_heads", "heads_per_key_head", "offset", "heads"])
def attention_forward(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    lse_pointer,
    counter,
    scale_log2,
    queries,
    keys,
    q_heads,
    heads_per_key_head,
    offset,
    heads,
    CONSUMERS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    PACK: gl.constexpr,
    POLY: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    """q, o ``[B, H, Q, D]`` in blocks ``[1, 1, 64, D]``; k, v ``[B, Hk, K, D]`` in blocks ``[1, 1, BLOCK_K, D]``;
    lse ``[B, H, Q]`` float32, contiguous. ``counter`` int32, zero at launch (DYNAMIC only);
    ``heads`` is B * H; not causal means an offset beyond all keys."""
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES * CONSUMERS, 1, 1, 64, D], q_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    item = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    item_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    item_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(item_full.index(0), count=1)
    mbarrier.init(item_empty.index(0), count=CONSUMERS)
    for w in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_empty.index(w), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    buffers = (q_smem, o_smem, k_smem, v_smem)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    results = (o_desc, lse_pointer)
    sizes = (keys, q_heads, heads_per_key_head, offset, gl.cdiv(queries, 64 * CONSUMERS), heads, counter)
    work = (item, item_full, item_empty)
    descriptors = (q_desc, k_desc, v_desc)
    shared = (buffers, barriers, work, results, sizes, scale_log2, queries)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (shared, 0, 2, BLOCK_K, D, GROUP, CAUSAL, PING_PONG, OVERLAP, PACK, POLY, DYNAMIC)),
                (consume, (shared, 1, 2, BLOCK_K, D, GROUP, CAUSAL, PING_PONG, OVERLAP, PACK, POLY, DYNAMIC)),
                (produce, (descriptors, buffers, barriers, work, sizes, CONSUMERS, BLOCK_K, GROUP, CAUSAL, DYNAMIC)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (shared, 0, 3, BLOCK_K, D, GROUP, CAUSAL, False, OVERLAP, PACK, POLY, DYNAMIC)),
                (consume, (shared, 1, 3, BLOCK_K, D, GROUP, CAUSAL, False, OVERLAP, PACK, POLY, DYNAMIC)),
                (consume, (shared, 2, 3, BLOCK_K, D, GROUP, CAUSAL, False, OVERLAP, PACK, POLY, DYNAMIC)),
                (produce, (descriptors, buffers, barriers, work, sizes, CONSUMERS, BLOCK_K, GROUP, CAUSAL, DYNAMIC)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
