"""Device code of the Hopper backward attention, in Triton's Gluon dialect (sm_90a).

One block of threads owns BLOCK_K keys of one key head and walks over the query tiles that see them, of every query head
of the group. Scores are computed transposed, keys in rows, so that P^T and dS^T leave the tensor cores in the layout in
which the next products take them from registers (FlashAttention-3, arXiv 2407.08608, appendix B):

    S^T  = K Q^T            P^T  = exp2(scale log2(e) S^T - log2(e) lse)
    dP^T = V dO^T           dS^T = P^T * (dP^T - delta),  delta = rowsum(dO * O) - d lse
    dV  += P^T dO           dK  += scale dS^T Q           dQ += scale dS K   (added in device memory, float32)

One producer warp loads tiles by the tensor memory accelerator, a warpgroup per 64 keys computes. Order within one tile,
tensor cores in brackets: [S], [dP] exponentials, [dV] dS, [dQ], [dK, S of the next tile] dQ to memory.

With a score function P comes from the logits that it makes of S (``attention_hopper_weights``), and dS is multiplied by
their slope. Its mask skips query tiles along a plan.
"""

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

from vbcompile.kernels.attention_hopper_backward_producer import hear, produce
from vbcompile.kernels.attention_hopper_scores import offset_of, split_lead
from vbcompile.kernels.attention_hopper_weights import add_captured, weigh_tile


@builtin
def add_to_global(descriptor, coordinates, source, _semantic=None):
    """Asynchronously add a tile in shared memory to device memory (Gluon 3.6 has the operation, but no name for it)."""
    where = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, where, source.handle)


@gluon.jit
def stay_branch():
    """Nothing; a branch with it at the end of a loop remains, and LLVM orders the loop's other blocks as the program
    does. In another order the assembler waits for every single product of the tensor cores."""
    gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


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
    work,
    sizes,
    tiles,
    program,
    scale,
    scale_log2,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    LATE: gl.constexpr,
    SCORED: gl.constexpr,
    RAGGED: gl.constexpr,
    TILED: gl.constexpr,
    LOGITS: gl.constexpr,
    GRADIENT: gl.constexpr,
    BOUNDS: gl.constexpr,
    MASK: gl.constexpr,
    ROWS: gl.constexpr,
    CAPTURED_GRADIENTS: gl.constexpr,
):
    """The computing warpgroups, 64 keys each. SCORED: ``weigh_tile`` makes the weights; else causal or plain."""
    q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, place_smem, ds_smem, dq_smem = buffers
    t_smem, t_full, t_empty = tiles
    UNBOUNDED: gl.constexpr = lse_smem.shape[1] == 2
    q_full, q_empty, do_full, do_empty, k_full, k_empty = barriers
    item_smem, item_full, item_empty = work
    dq_desc, dk_desc, dv_desc, g_desc, gradient_steps = results
    STAGES: gl.constexpr = q_smem.shape[0]
    K_STAGES: gl.constexpr = k_smem.shape[0]
    dtype: gl.constexpr = q_smem.dtype
    WARPS: gl.constexpr = BLOCK_K // 16
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_Q, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    q_warps: gl.constexpr = [BLOCK_Q // 16, WARPS * 16 // BLOCK_Q]
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], q_warps, [16, D // q_warps[1], 16])
    left: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    v_tile = v_smem.reshape([BLOCK_K, D])
    out_smem = dq_smem._reinterpret(dtype, [1, 1, BLOCK_K, D], v_smem.type.layout)
    zero_s = gl.full([BLOCK_K, BLOCK_Q], 0.0, gl.float32, s_layout)
    zero_q = gl.full([BLOCK_Q, D], 0.0, gl.float32, q_layout)
    taken = gl.to_tensor(0)
    done = gl.to_tensor(0)
    mbarrier.wait(item_full.index(0), 0)
    total = hear(item_smem.index(0), WARPS)
    while total > 0:
        item = done % 2 * 4  # what belongs to it is read again where it is used: registers are what is short
        dk = warpgroup_mma_init(gl.full([BLOCK_K, D], 0.0, gl.float32, kv_layout))
        dv = gl.full([BLOCK_K, D], 0.0, gl.float32, kv_layout)
        k_tile = k_smem.index(done % K_STAGES).reshape([BLOCK_K, D])
        mbarrier.wait(k_full.index(done % K_STAGES), done // K_STAGES & 1)
        for i in range(total):
            slot = taken % STAGES
            phase = taken // STAGES & 1
            q_tile = q_smem.index(slot).reshape([BLOCK_Q, D])
            do_tile = do_smem.index(slot).reshape([BLOCK_Q, D])
            mbarrier.wait(q_full.index(slot), phase)
            first_key = hear(item_smem.index(item + 1), WARPS)
            first_row = hear(place_smem.index(4 * slot), WARPS)
            flags = hear(place_smem.index(4 * slot + 1), WARPS)
            head = hear(place_smem.index(4 * slot + 2), WARPS)
            s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zero_s, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(slot), phase)
            dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zero_s, use_acc=False, is_async=True)
            if not LATE:
                lse = lse_smem.index(slot).slice(0, 1).load(s_layout)
            dk = warpgroup_mma_wait(2, [dk])  # of the last tile
            mbarrier.arrive(q_empty.index((taken + STAGES - 1) % STAGES), pred=i > 0)
            scores = warpgroup_mma_wait(1, [s])
            if LATE and SCORED:
                lse = lse_smem.index(slot).slice(0, 1).load(s_layout)
            if SCORED:
                low_row = lse_smem.index(slot).slice(1, 1) if UNBOUNDED else 0
                t_tile = 0
                if TILED > 0:
                    t_slot = taken % t_smem.shape[0]
                    mbarrier.wait(t_full.index(t_slot), taken // t_smem.shape[0] & 1)
                    t_tile = t_smem.index(t_slot).permute((1, 0))
                p, sloped = weigh_tile(
                    scores, lse, low_row, t_tile, (first_row, first_key, flags), head, program, sizes,
                    TILED, LOGITS, GRADIENT, BOUNDS, MASK, ROWS, UNBOUNDED, RAGGED,
                )  # fmt: skip
                if TILED > 0:
                    mbarrier.arrive(t_empty.index(t_slot))
            else:
                if (flags & 1) != 0:
                    scores = mask_transposed(scores, first_key, first_row, sizes)
                if LATE:
                    lse = lse_smem.index(slot).load(s_layout)
                p = gl.exp2(scores * scale_log2 - lse)
                sloped = p
            weights = gl.convert_layout(p.to(dtype), left, assert_trivial=True)
            dv = warpgroup_mma(weights, do_tile, dv, is_async=True)
            if not LATE:
                delta = delta_smem.index(slot).load(s_layout)
            dp = warpgroup_mma_wait(1, [dp])
            if LATE:
                delta = delta_smem.index(slot).load(s_layout)
            ds = sloped * (dp - delta)
            if SCORED:  # noqa: SIM102 - known at compile time, the place is not
                if (hear(place_smem.index(4 * slot + 1), WARPS) & 3) != 0:  # masked, whatever delta and the slope are
                    ds = gl.where(sloped == 0.0, 0.0, ds)
            if g_desc is not None:
                tma.store_wait(0)
                gl.thread_barrier()
                add_tile(
                    g_desc, gradient_steps, ds * program[1], dq_smem,
                    hear(place_smem.index(4 * slot), WARPS), hear(item_smem.index(item + 1), WARPS),
                    split_lead(hear(place_smem.index(4 * slot + 2), WARPS), program[4]),
                )  # fmt: skip
            if CAPTURED_GRADIENTS is not None:
                first_row = hear(place_smem.index(4 * slot), WARPS)
                head = hear(place_smem.index(4 * slot + 2), WARPS)
                first_key = hear(item_smem.index(item + 1), WARPS)
                add_captured(ds, first_row, first_key, head, program, sizes, CAPTURED_GRADIENTS, ROWS)
            ds = ds.to(dtype)
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
            add_to_global(dq_desc, [hear(place_smem.index(4 * slot + 3), WARPS), 0], dq_smem)
            taken += 1
            if SCORED:  # noqa: SIM102
                if (hear(place_smem.index(4 * slot + 1), WARPS) & 3) != 0:
                    stay_branch()
        dk = warpgroup_mma_wait(0, [dk])
        mbarrier.arrive(q_empty.index((taken + STAGES - 1) % STAGES))
        mbarrier.arrive(k_empty.index(done % K_STAGES))
        first_key = hear(item_smem.index(item + 1), WARPS)
        batch = hear(item_smem.index(item + 2), WARPS)
        k_head = hear(item_smem.index(item + 3), WARPS)
        mbarrier.arrive(item_empty.index(done % 2))
        empty = program[7]
        if empty is not None:
            first_head = (batch * sizes[2] + k_head) * sizes[3]
            for member in range(sizes[3]):
                dv = gl.where(gl.load(empty + first_head + member) != 0, float("nan"), dv)
        place = [batch, k_head, first_key, 0]
        if SCORED:
            scale = program[0] * program[1]
        tma.store_wait(0)
        gl.thread_barrier()
        store_tile(dv_desc, place, out_smem, dv.to(dtype))
        tma.store_wait(0)
        gl.thread_barrier()
        store_tile(dk_desc, place, out_smem, (dk * scale).to(dtype))
        done += 1
        mbarrier.wait(item_full.index(done % 2), done // 2 & 1)
        total = hear(item_smem.index(done % 2 * 4), WARPS)
    tma.store_wait(0)


@gluon.jit
def add_tile(descriptor, steps, tile, smem, first_row, first_key, lead):
    """Asynchronously add a tile ``[keys, queries]`` to a captured tensor's gradient, by way of shared memory;
    ``steps``: rows of it by which leading indices move."""
    smem = smem._reinterpret(gl.float32, [tile.shape[1], tile.shape[0]], smem.type.layout)
    smem.permute((1, 0)).store(tile)
    fence_async_shared()
    gl.thread_barrier()
    add_to_global(descriptor, [offset_of(lead, steps).to(gl.int32) + first_row, first_key], smem)


@gluon.jit
def store_tile(descriptor, place, smem, tile):
    """Asynchronously store a tile, by way of shared memory."""
    smem.reshape([smem.shape[2], smem.shape[3]]).store(tile)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(descriptor, place, smem)


@gluon.jit(do_not_specialize=["queries", "keys", "k_heads", "per_key_head", "offset", "heads", "padded_queries"])
def attention_backward(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    low_tiles,
    delta_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    t_desc,
    g_desc,
    counter,
    captured,
    plan,
    empty,
    gradients,
    scale,
    scale_log2,
    inner,
    outer,
    queries,
    keys,
    k_heads,
    per_key_head,
    offset,
    heads,
    padded_queries,
    lead_sizes,
    captured_strides,
    plan_strides,
    gradient_strides,
    gradient_steps,
    tile_steps,
    STAGES: gl.constexpr,
    K_STAGES: gl.constexpr,
    T_STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    DYNAMIC: gl.constexpr,
    LATE: gl.constexpr,
    SCORED: gl.constexpr,
    TILED: gl.constexpr,
    LOGITS: gl.constexpr,
    GRADIENT: gl.constexpr,
    BOUNDS: gl.constexpr,
    MASK: gl.constexpr,
    ROWS: gl.constexpr,
    CAPTURED_GRADIENTS: gl.constexpr,
    OUTER: gl.constexpr,
):
    """q, dO ``[B, H, Q, D]`` in blocks ``[1, 1, BLOCK_Q, D]``; k, v, dK, dV ``[B, Hk, K, D]`` in blocks
    ``[1, 1, BLOCK_K, D]``; log2(e) lse and delta ``[B * H, padded Q]`` float32 in blocks ``[1, BLOCK_Q]``; dQ
    ``[B * H * padded Q, D]`` float32 in blocks ``[BLOCK_Q, D]``, unscaled. ``heads`` is B * Hk; ``padded Q`` a
    multiple of 128; ``counter`` int32, zero at launch (DYNAMIC); not causal means an offset beyond all keys. ``scale``:
    the slope of the logits in the products, but for GRADIENT; ``scale_log2``: that in base two, without LOGITS.

    SCORED: logits are ``outer * LOGITS(inner * q k, ...)`` or ``outer * q k`` where that is None (OUTER: ``outer``,
    where known at compile time); lse in blocks of one or two lines, ``low_tiles`` and delta from ``prepare_scores``;
    ``plan``: see ``query_tiles``, or None; ``empty``: int32 ``[B * H]``, 1 for heads whose dV is NaN, or None;
    ``gradients``: of captured tensors, float32, to be added to; ``g_desc``: that of the tensor under ``t_desc``, in
    blocks ``[BLOCK_Q, BLOCK_K]``, or None; ``t_desc``, captured, sizes, strides and steps: as for the forward.
    """
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[2]
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    LINES: gl.constexpr = lse_desc.block_type.shape[0]
    PLANNED: gl.constexpr = plan is not None
    RAGGED: gl.constexpr = TILED > 0 or ROWS is not None  # else rows past the end have ordinary logits
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, D], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [K_STAGES, 1, 1, BLOCK_K, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_K, D], v_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, LINES, BLOCK_Q], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], delta_desc.layout)
    ds_smem = gl.allocate_shared_memory(dtype, [BLOCK_K, BLOCK_Q], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [BLOCK_Q, D], dq_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    single: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    item_smem = gl.allocate_shared_memory(gl.int32, [8, 1], single)
    place_smem = gl.allocate_shared_memory(gl.int32, [4 * STAGES, 1], single)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=1)
    tiles = (q_smem, q_full, q_empty)  # stands for nothing
    if t_desc is not None:
        t_smem = gl.allocate_shared_memory(t_desc.dtype, [T_STAGES, BLOCK_Q, BLOCK_K], t_desc.layout)
        t_full = gl.allocate_shared_memory(gl.int64, [T_STAGES, 1], mbarrier.MBarrierLayout())
        t_empty = gl.allocate_shared_memory(gl.int64, [T_STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(T_STAGES):
            mbarrier.init(t_full.index(i), count=1)
            mbarrier.init(t_empty.index(i), count=1)
        tiles = (t_smem, t_full, t_empty)
    fence_async_shared()
    program = (
        inner,
        outer if OUTER is None else OUTER,
        captured,
        captured_strides,
        lead_sizes,
        plan,
        plan_strides,
        empty,
        gradients,
        gradient_strides,
        low_tiles,
    )
    sizes = (queries, keys, k_heads, per_key_head, offset, heads)
    loaded = (q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, place_smem)
    work = (item_smem, item_full, item_empty)
    buffers = (q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, place_smem, ds_smem, dq_smem)
    barriers = (q_full, q_empty, do_full, do_empty, k_full, k_empty)
    descriptors = (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, t_desc)
    results = (dq_desc, dk_desc, dv_desc, g_desc, gradient_steps)
    gl.warp_specialize(
        [
            (compute, (buffers, barriers, results, work, sizes, tiles, program, scale, scale_log2,
                       BLOCK_Q, BLOCK_K, D, LATE, SCORED, RAGGED, TILED, LOGITS, GRADIENT, BOUNDS, MASK, ROWS,
                       CAPTURED_GRADIENTS)),
            (produce, (descriptors, loaded, barriers, work, tiles, tile_steps, sizes, program, counter, padded_queries,
                       BLOCK_Q, BLOCK_K, GROUP, DYNAMIC, RAGGED, PLANNED)),
        ],
        [1],
        [24],
    )  # fmt: skip
