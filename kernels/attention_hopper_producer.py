"""The producer of the Hopper forward attention: the warp that keeps the shared buffers full.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_forward``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from vbcompile.kernels.attention_hopper_scores import key_tiles, offset_of, split_lead
from vbcompile.kernels.attention_hopper_tiles import locate


@gluon.jit
def hand_out(work, number, item):
    """Producer: publish the next work item to the consumers; ``number`` counts the items before it."""
    slot, full, empty = work
    mbarrier.wait(empty.index(0), (number & 1) ^ 1)
    slot.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + item)
    mbarrier.arrive(full.index(0))


@gluon.jit
def take_over(work, number, WARPS: gl.constexpr):
    """Whoever follows the producer: the next work item."""
    slot, full, empty = work
    mbarrier.wait(full.index(0), number & 1)
    item = gl.max(slot.load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(empty.index(0))
    return item


@gluon.jit
def next_item(item, work, number, DYNAMIC: gl.constexpr):
    """Consumer: the work item after ``item``, the ``number``-th."""
    if DYNAMIC:
        return take_over(work, number, 4)
    else:
        return item + gl.num_programs(0)


@gluon.jit
def place_item(item, sizes, program, GROUP: gl.constexpr, SHARED: gl.constexpr):
    """Work item -> (query tile, flat head). SHARED: heads that differ in their batch alone are neighbours, since they
    read the same part of a captured tensor."""
    _, q_heads, _, _, query_tiles, heads, _ = sizes
    query_tile, head = locate(item, query_tiles, heads, GROUP)
    if SHARED:
        batches = heads // q_heads
        head = head % batches * q_heads + head // batches
    return query_tile, head


@gluon.jit
def produce(
    shared,
    descriptors,
    CONSUMERS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    DYNAMIC: gl.constexpr,
    PLANNED: gl.constexpr,
    SHARED: gl.constexpr,
):
    """The producer warp. ``sizes`` = (keys, query heads, query heads per key head, causal offset, query tiles,
    batch * query heads, counter of work items)."""
    buffers, barriers, _, work, _, sizes, program, _ = shared
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
        query_tile, head = place_item(item, sizes, program, GROUP, SHARED)
        batch = head // q_heads
        q_head = head - batch * q_heads
        k_head = q_head // heads_per_key_head
        first, end, _clear, _sure = key_tiles(query_tile, head, sizes, program, BLOCK_Q, BLOCK_K, PLANNED)
        for w in gl.static_range(CONSUMERS):
            slot = w + done % Q_STAGES * CONSUMERS
            mbarrier.wait(q_empty.index(slot), (done // Q_STAGES & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
            row = query_tile * BLOCK_Q + w * 64
            tma.async_copy_global_to_shared(q_desc, [batch, q_head, row, 0], q_full.index(slot), q_smem.index(slot))
        for j in range(end - first):
            slot = loaded % STAGES
            phase = (loaded // STAGES & 1) ^ 1
            row = (end - 1 - j) * BLOCK_K
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
def produce_tiles(
    shared,
    t_desc,
    tile_steps,
    CONSUMERS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    DYNAMIC: gl.constexpr,
    PLANNED: gl.constexpr,
    SHARED: gl.constexpr,
):
    """A second producer warp, for the captured tensor that comes as tiles: its consumers keep different pace.

    ``tile_steps``: rows, then columns, by which leading indices move in that tensor. Nothing to do without it.
    """
    if t_desc is not None:
        _, _, tiles, work, _, sizes, program, _ = shared
        t_smem, t_full, t_empty = tiles
        _, _, _, _, query_tiles, heads, _ = sizes
        STAGES: gl.constexpr = t_smem.shape[0] // CONSUMERS
        BLOCK_Q: gl.constexpr = 64 * CONSUMERS
        loaded = gl.to_tensor(0)
        done = gl.to_tensor(0)
        item = gl.program_id(0)
        while item < query_tiles * heads:
            query_tile, head = place_item(item, sizes, program, GROUP, SHARED)
            first, end, _clear, _sure = key_tiles(query_tile, head, sizes, program, BLOCK_Q, BLOCK_K, PLANNED)
            lead = split_lead(head, program[4])
            row = offset_of(lead, tile_steps).to(gl.int32) + query_tile * BLOCK_Q
            column_steps = (tile_steps[4], tile_steps[5], tile_steps[6], tile_steps[7])
            column = offset_of(lead, column_steps).to(gl.int32)
            for j in range(end - first):
                for w in gl.static_range(CONSUMERS):
                    slot = w + loaded % STAGES * CONSUMERS
                    mbarrier.wait(t_empty.index(slot), (loaded // STAGES & 1) ^ 1)
                    mbarrier.expect(t_full.index(slot), t_desc.block_type.nbytes)
                    place = [row + w * 64, column + (end - 1 - j) * BLOCK_K]
                    tma.async_copy_global_to_shared(t_desc, place, t_full.index(slot), t_smem.index(slot))
                loaded += 1
            if DYNAMIC:
                item = take_over(work, done, 1)
            else:
                item += gl.num_programs(0)
            done += 1
