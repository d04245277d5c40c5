"""Device code of the Hopper forward attention, in Triton's Gluon dialect (sm_90a).

One block of threads works on query tiles of ``64 * consumers`` rows. One producer warp copies Q, K and V tiles to
shared memory with the tensor memory accelerator; each consumer is one warpgroup that owns 64 query rows. The matrix
product S of the next key tile is issued before the product P V of the current one, so that the softmax of the next
tile runs under the tensor cores' work (FlashAttention-3, arXiv 2407.08608, algorithm 2); with ``PING_PONG`` the
consumers take turns at the tensor cores (section 3.1 there).

    shared memory   Q [Q_STAGES * consumers, 64, D] | O [consumers, 64, D] | K, V [STAGES, BLOCK_K, D] | next work item
    barriers        full / empty per buffer; named hardware barriers from 8 on give the turns

Work items (a query tile of a head) are handed out in rounds or, DYNAMIC, from a counter in device memory: with a causal
mask tiles differ in length, and whoever is free takes the longest that is left. The producer works out where an item
lies and which key tiles it needs; the others read that while their last product runs.

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

from vbcompile.kernels.attention_hopper_producer import produce, produce_tiles, take_over
from vbcompile.kernels.attention_hopper_scores import at_tile, describe_rows, per_row, place_tile, take_tile
from vbcompile.kernels.attention_hopper_step import refer, walk, weigh
from vbcompile.kernels.attention_hopper_tiles import (
    TURN,
    carry_weights,
    larger,
    pass_turn,
    sum_within_lane,
    use_weights,
    wait_turn,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def finish_row(m, total, sink, outer, SINK: gl.constexpr, UNBOUNDED: gl.constexpr, EMPTY_IS_ZERO: gl.constexpr):
    """(factor of the row's sum of values, logarithm of its sum of weights), both ``[64]``.

    ``m``: as ``softmax_step`` carries it; ``total``: the sum of weights relative to it; ``sink``: one more logit.
    """
    top = m * outer if UNBOUNDED else m * LN2
    shrink = 1.0
    if SINK is not None:
        highest = larger(top, sink)
        base = gl.where(highest == float("-inf"), 0.0, highest)
        shrink = gl.exp2((top - base) * LOG2E)
        total = total * shrink + gl.exp2((sink - base) * LOG2E)
        top = highest
    share = shrink / total
    if EMPTY_IS_ZERO:
        share = gl.where(total == 0.0, 0.0, share)
    return share, top + gl.log(total)


@gluon.jit
def split_walk(stop, end, clear):
    """Key tiles after the first one in the order of the walk: (end of those ahead that need a mask, end of those after
    them that need none)."""
    masked_end = gl.minimum(gl.maximum(end - clear[1], 1), stop)
    return masked_end, gl.minimum(gl.maximum(end - clear[0], masked_end), stop)


@gluon.jit
def consume(
    shared,
    w: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
    ROUNDING: gl.constexpr,
    POLY: gl.constexpr,
    PLANNED: gl.constexpr,
    TILED: gl.constexpr,
    LOGITS: gl.constexpr,
    MASK: gl.constexpr,
    ROWS: gl.constexpr,
    OFFSET: gl.constexpr,
    SLOPE: gl.constexpr,
    BOUNDS: gl.constexpr,
    CAP: gl.constexpr,
    SINK: gl.constexpr,
    UNBOUNDED: gl.constexpr,
    EMPTY_IS_ZERO: gl.constexpr,
):
    """Consumer warpgroup ``w``: rows ``64 w .. 64 w + 63`` of every query tile of this block."""
    buffers, barriers, tiles, work, results, sizes, program, queries = shared
    q_smem, o_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    o_desc, lse_pointer = results
    keys, q_heads, _, _, _, heads, _ = sizes
    STAGES: gl.constexpr = k_smem.shape[0]
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    # Loops of their own for tiles with a mask, those without and, by a plan, masked ones again; with weights rounded
    # early the assembler would serialise all products.
    SPLIT: gl.constexpr = (CAUSAL or PLANNED) and TILED != 2 and ROUNDING != "early"
    PARTS: gl.constexpr = 1 if not SPLIT else 3 if PLANNED else 2
    o_tile = o_smem.index(w)
    taken = gl.to_tensor(0)
    done = gl.to_tensor(0)
    careful = gl.to_tensor(0) > 0
    if PING_PONG > 0 and w == CONSUMERS - 1:
        pass_turn(TURN)
    query_tile, batch, head, first, end, clear, sure = take_over(work, done, 4)
    while head < heads:
        first_row = query_tile * BLOCK_Q + w * 64
        q_slot = w + done % Q_STAGES * CONSUMERS
        q_tile = q_smem.index(q_slot).reshape([64, D])
        mbarrier.wait(q_full.index(q_slot), done // Q_STAGES & 1)
        slot = taken % STAGES
        mbarrier.wait(k_full.index(slot), taken // STAGES & 1)
        if PING_PONG > 0:
            wait_turn(TURN + w)
        k_tile = k_smem.index(slot).reshape([BLOCK_K, D]).permute((1, 0))
        zero = gl.full([64, BLOCK_K], 0.0, gl.float32, s_layout)
        s = warpgroup_mma(q_tile, k_tile, zero, use_acc=False, is_async=True)
        if PING_PONG == 1:
            pass_turn(TURN + (w + 1) % CONSUMERS)
        # Under the first product: divisions and loads of what belongs to rows.
        context = describe_rows(s_layout, BLOCK_K, first_row, head, queries, keys, program, ROWS, OFFSET)
        slope = per_row(SLOPE, s_layout, BLOCK_K, first_row, context[0], context[1], queries, keys, program)
        tile = 0
        if TILED == 1:
            tile = take_tile(tiles, taken, w, CONSUMERS, s_layout)
        s = warpgroup_mma_wait(0, [s])
        if PING_PONG == 2:
            pass_turn(TURN + (w + 1) % CONSUMERS)
        mbarrier.arrive(k_empty.index(slot))
        place = place_tile(first_row, end - 1, clear, sure, BLOCK_K, PLANNED)
        nothing = gl.full([64], float("-inf"), gl.float32, s_rows)
        s, m, _decay, own, base = refer(
            s, tile, nothing, taken, tiles, place, at_tile(context, slope, place, SLOPE), program, sizes, w, CONSUMERS,
            True, TILED, PLANNED, BOUNDS, LOGITS, MASK, CAP, UNBOUNDED,
        )  # fmt: skip
        p = weigh(s, own, base, 0, place, context, program, sizes, True, POLY, BOUNDS, CAP)
        state = (
            m,
            sum_within_lane(p),
            gl.full([64, D], 0.0, gl.float32, o_layout),
            carry_weights(p, q_tile.dtype, ROUNDING),
        )
        stop = end - first
        item = (first_row, end, clear, sure)
        rest = (item, (context, slope), q_tile, k_smem, v_smem, barriers, tiles, program, sizes)
        if CAP is None:
            begin = 1
            ends = (stop, stop, stop)
            if SPLIT:
                masked_end, clear_end = split_walk(stop, end, clear)
                ends = (masked_end, clear_end, stop)
            for part in gl.static_range(PARTS):
                state, taken = walk(
                    state, taken, begin, ends[part], *rest, w, CONSUMERS, CAUSAL, PING_PONG, ROUNDING, POLY, TILED,
                    PLANNED, SLOPE, BOUNDS, LOGITS, MASK, None, UNBOUNDED, part != 1,
                )  # fmt: skip
                begin = ends[part]
        elif careful:
            state, taken = walk(
                state, taken, 1, stop, *rest, w, CONSUMERS, CAUSAL, PING_PONG, ROUNDING, POLY, TILED, PLANNED, SLOPE,
                BOUNDS, LOGITS, MASK, 3, UNBOUNDED, True,
            )  # fmt: skip
        else:
            state, taken = walk(
                state, taken, 1, stop, *rest, w, CONSUMERS, CAUSAL, PING_PONG, ROUNDING, POLY, TILED, PLANNED, SLOPE,
                BOUNDS, LOGITS, MASK, CAP, UNBOUNDED, True,
            )  # fmt: skip
        m, total, o, p = state
        if CAP is not None:  # work items that follow each other are alike
            careful = gl.max(gl.max(total, 1), 0) > program[8][3]
        mbarrier.arrive(q_empty.index(q_slot))
        slot = taken % STAGES
        mbarrier.wait(v_full.index(slot), taken // STAGES & 1)
        weights = use_weights(p, q_tile.dtype, o_layout, ROUNDING)
        o = warpgroup_mma(weights, v_smem.index(slot).reshape([BLOCK_K, D]), o, is_async=True)
        upcoming = take_over(work, done + 1, 4)
        row_total = gl.convert_layout(gl.sum(total, 1), s_rows)
        rows = first_row + gl.arange(0, 64, s_rows)
        sink = per_row(SINK, s_layout, BLOCK_K, first_row, context[0], context[1], queries, keys, program)
        share, lse = finish_row(m, row_total, sink, program[7], SINK, UNBOUNDED, EMPTY_IS_ZERO)
        share = gl.convert_layout(share, o_rows)
        o = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_empty.index(slot))
        taken += 1
        tma.store_wait(0)
        gl.thread_barrier()  # only the thread that issued the last store waited for it
        o_tile.reshape([64, D]).store((o * share[:, None]).to(q_tile.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(o_desc, [batch, head - batch * q_heads, first_row, 0], o_tile)
        gl.store(lse_pointer + head.to(gl.int64) * queries + rows, lse, mask=rows < queries)
        query_tile, batch, head, first, end, clear, sure = upcoming
        done += 1
    if PING_PONG > 0 and w == 0:
        wait_turn(TURN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "q_heads", "heads_per_key_head", "offset", "heads"])
def attention_forward(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    t_desc,
    lse_pointer,
    counter,
    captured,
    plan,
    inner,
    outer,
    capped,
    queries,
    keys,
    q_heads,
    heads_per_key_head,
    offset,
    heads,
    lead_sizes,
    captured_strides,
    plan_strides,
    tile_steps,
    CONSUMERS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    T_STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
    ROUNDING: gl.constexpr,
    POLY: gl.constexpr,
    DYNAMIC: gl.constexpr,
    SHARED: gl.constexpr,
    TILED: gl.constexpr,
    LOGITS: gl.constexpr,
    MASK: gl.constexpr,
    ROWS: gl.constexpr,
    OFFSET: gl.constexpr,
    SLOPE: gl.constexpr,
    BOUNDS: gl.constexpr,
    CAP: gl.constexpr,
    SINK: gl.constexpr,
    UNBOUNDED: gl.constexpr,
    EMPTY_IS_ZERO: gl.constexpr,
):
    """q, o ``[B, H, Q, D]`` in blocks ``[1, 1, 64, D]``; k, v ``[B, Hk, K, D]`` in blocks ``[1, 1, BLOCK_K, D]``;
    lse ``[B, H, Q]`` float32, contiguous. ``counter`` int32, zero at launch (DYNAMIC only); ``heads`` is B * H; not
    causal means an offset beyond all keys.

    Weights are ``exp(outer * (logits - largest))``, logits ``LOGITS(inner * q k, ...)`` or ``q k`` where that is None.
    ``t_desc``: captured tensor with rows and columns as a matrix, in blocks ``[64, BLOCK_K]``, and ``tile_steps`` the
    rows and columns by which leading indices move in it; ``captured``: pointers, six strides each; ``lead_sizes``: four
    leading sizes, B * H together; ``capped``: see ``attention_hopper_tanh``; ``plan``: see ``key_tiles``, None without
    MASK; functions: see ``attention_hopper_program``.
    """
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
    item = gl.allocate_shared_memory(gl.int32, [9, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    item_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    item_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(item_full.index(0), count=1)
    mbarrier.init(item_empty.index(0), count=CONSUMERS if TILED == 0 else CONSUMERS + 1)
    for w in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_empty.index(w), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    tiles = (q_smem, q_full, q_empty)  # stands for nothing
    if TILED > 0:
        t_smem = gl.allocate_shared_memory(t_desc.dtype, [T_STAGES * CONSUMERS, 64, BLOCK_K], t_desc.layout)
        t_full = gl.allocate_shared_memory(gl.int64, [T_STAGES * CONSUMERS, 1], mbarrier.MBarrierLayout())
        t_empty = gl.allocate_shared_memory(gl.int64, [T_STAGES * CONSUMERS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(T_STAGES * CONSUMERS):
            mbarrier.init(t_full.index(i), count=1)
            mbarrier.init(t_empty.index(i), count=1)
        tiles = (t_smem, t_full, t_empty)
    fence_async_shared()
    PLANNED: gl.constexpr = plan is not None
    buffers = (q_smem, o_smem, k_smem, v_smem)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    results = (o_desc, lse_pointer)
    sizes = (keys, q_heads, heads_per_key_head, offset, gl.cdiv(queries, 64 * CONSUMERS), heads, counter)
    program = (inner, outer * LOG2E, captured, captured_strides, lead_sizes, plan, plan_strides, outer, capped)
    work = (item, item_full, item_empty)
    descriptors = (q_desc, k_desc, v_desc)
    shared = (buffers, barriers, tiles, work, results, sizes, program, queries)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (shared, 0, 2, BLOCK_K, D, CAUSAL, PING_PONG, ROUNDING, POLY, PLANNED, TILED, LOGITS, MASK,
                           ROWS, OFFSET, SLOPE, BOUNDS, CAP, SINK, UNBOUNDED, EMPTY_IS_ZERO)),
                (consume, (shared, 1, 2, BLOCK_K, D, CAUSAL, PING_PONG, ROUNDING, POLY, PLANNED, TILED, LOGITS, MASK,
                           ROWS, OFFSET, SLOPE, BOUNDS, CAP, SINK, UNBOUNDED, EMPTY_IS_ZERO)),
                (produce, (shared, descriptors, CONSUMERS, BLOCK_K, GROUP, DYNAMIC, PLANNED, SHARED)),
                (produce_tiles, (shared, t_desc, tile_steps, CONSUMERS, BLOCK_K)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (shared, 0, 3, BLOCK_K, D, CAUSAL, PING_PONG, ROUNDING, POLY, PLANNED, TILED, LOGITS, MASK,
                           ROWS, OFFSET, SLOPE, BOUNDS, CAP, SINK, UNBOUNDED, EMPTY_IS_ZERO)),
                (consume, (shared, 1, 3, BLOCK_K, D, CAUSAL, PING_PONG, ROUNDING, POLY, PLANNED, TILED, LOGITS, MASK,
                           ROWS, OFFSET, SLOPE, BOUNDS, CAP, SINK, UNBOUNDED, EMPTY_IS_ZERO)),
                (consume, (shared, 2, 3, BLOCK_K, D, CAUSAL, PING_PONG, ROUNDING, POLY, PLANNED, TILED, LOGITS, MASK,
                           ROWS, OFFSET, SLOPE, BOUNDS, CAP, SINK, UNBOUNDED, EMPTY_IS_ZERO)),
                (produce, (shared, descriptors, CONSUMERS, BLOCK_K, GROUP, DYNAMIC, PLANNED, SHARED)),
                (produce_tiles, (shared, t_desc, tile_steps, CONSUMERS, BLOCK_K)),
            ],
            [4, 4, 1, 1],
            [160, 160, 24, 24],
        )  # fmt: skip
