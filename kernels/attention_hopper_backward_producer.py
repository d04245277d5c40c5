"""The producer of the Hopper backward attention: the warp that keeps the shared buffers full.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_backward``. The producer alone knows which query
tiles a key tile needs; it tells the computing warps with every tile what to do with it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from vbcompile.kernels.attention_hopper_scores import offset_of, split_lead
from vbcompile.kernels.attention_hopper_weights import query_tiles, tile_flags


@gluon.jit
def visible_tiles(key_tile, head, sizes, program, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, PLANNED: gl.constexpr):
    """``query_tiles`` of a query head: those that see a key of this key tile.

    Never none: keys that no query sees get one tile, all masked. A loop that may be empty would define the
    accumulators outside the tensor cores, and the assembler would then wait after every single instruction of them.
    """
    if PLANNED:
        return query_tiles(key_tile, head, program)
    else:
        queries, offset = sizes[0], sizes[4]
        end = gl.cdiv(queries, BLOCK_Q)
        first = gl.minimum(gl.maximum(key_tile * BLOCK_K - offset, 0) // BLOCK_Q, end - 1)
        nothing = gl.to_tensor(0)
        return first, end, (nothing, nothing), (nothing, nothing)


@gluon.jit
def count_tiles(key_tile, head, sizes, program, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, PLANNED: gl.constexpr):
    """Query tiles of all query heads of a group, of which ``head`` is the first."""
    per_key_head = sizes[3]
    first, end, _clear, _sure = visible_tiles(key_tile, head, sizes, program, BLOCK_Q, BLOCK_K, PLANNED)
    if PLANNED:
        total = end - first
        for member in range(1, per_key_head):
            first, end, _clear, _sure = visible_tiles(
                key_tile, head + member, sizes, program, BLOCK_Q, BLOCK_K, PLANNED
            )
            total += end - first
    else:
        total = (end - first) * per_key_head
    return gl.maximum(total, 1)


@gluon.jit
def place_block(item, sizes, BLOCK_K: gl.constexpr, GROUP: gl.constexpr):
    """(key tile, key head over all batches) of a work item; within GROUP heads the first, longest tiles go first."""
    tiles = gl.cdiv(sizes[1], BLOCK_K)
    group = item // (GROUP * tiles)
    inside = item - group * GROUP * tiles
    width = gl.minimum(sizes[5] - group * GROUP, GROUP)
    tile = inside // width
    return tile, group * GROUP + inside - tile * width


@gluon.jit
def tell(slot, value):
    """Producer: write an integer into shared memory."""
    slot.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + value)


@gluon.jit
def hear(slot, WARPS: gl.constexpr):
    """Computing warps: the integer that ``tell`` wrote."""
    return gl.max(slot.load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def announce(work, number, total, first_key, batch, k_head):
    """Producer: publish work item ``number``; ``total`` query tiles, 0 for the end."""
    slots, full, empty = work
    slot = number % 2
    mbarrier.wait(empty.index(slot), (number // 2 & 1) ^ 1)
    tell(slots.index(4 * slot), total)
    tell(slots.index(4 * slot + 1), first_key)
    tell(slots.index(4 * slot + 2), batch)
    tell(slots.index(4 * slot + 3), k_head)
    mbarrier.arrive(full.index(slot))


@gluon.jit
def produce(
    descriptors,
    buffers,
    barriers,
    work,
    tiles,
    tile_steps,
    sizes,
    program,
    counter,
    padded_queries,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    DYNAMIC: gl.constexpr,
    RAGGED: gl.constexpr,
    PLANNED: gl.constexpr,
):
    """The producer warp. ``sizes`` = (queries, keys, key heads, query heads per key head, causal offset,
    batch * key heads)."""
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, t_desc = descriptors
    q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, place_smem = buffers
    q_full, q_empty, do_full, do_empty, k_full, k_empty = barriers
    t_smem, t_full, t_empty = tiles
    _, keys, k_heads, per_key_head, _, heads = sizes
    STAGES: gl.constexpr = q_smem.shape[0]
    LINES: gl.constexpr = lse_smem.shape[1]
    K_STAGES: gl.constexpr = k_smem.shape[0]
    items = gl.cdiv(keys, BLOCK_K) * heads
    loaded = gl.to_tensor(0)
    done = gl.to_tensor(0)
    item = gl.program_id(0)
    while item < items:
        upcoming = item + gl.num_programs(0)
        if DYNAMIC:  # asked for early: the answer takes about a microsecond
            upcoming = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        key_tile, kv_head = place_block(item, sizes, BLOCK_K, GROUP)
        batch = kv_head // k_heads
        k_head = kv_head - batch * k_heads
        flat_head = kv_head * per_key_head
        q_head = k_head * per_key_head
        first_key = key_tile * BLOCK_K
        total = count_tiles(key_tile, flat_head, sizes, program, BLOCK_Q, BLOCK_K, PLANNED)
        first, end, clear, sure = visible_tiles(key_tile, flat_head, sizes, program, BLOCK_Q, BLOCK_K, PLANNED)
        announce(work, done, total, first_key, batch, k_head)
        kv_place = [batch, k_head, first_key, 0]
        k_slot = done % K_STAGES
        mbarrier.wait(k_empty.index(k_slot), (done // K_STAGES & 1) ^ 1)
        mbarrier.expect(k_full.index(k_slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, kv_place, k_full.index(k_slot), k_smem.index(k_slot))
        tile = first
        for i in range(total):
            slot = loaded % STAGES
            phase = (loaded // STAGES & 1) ^ 1
            row = tile * BLOCK_Q
            dq_row = flat_head * padded_queries + row
            flags = tile_flags(row, first_key, clear, sure, sizes, BLOCK_Q, BLOCK_K, RAGGED, PLANNED)
            if LINES == 2:
                flags += 4 * gl.load(program[10] + dq_row // BLOCK_Q)
            mbarrier.wait(q_empty.index(slot), phase)
            tell(place_smem.index(4 * slot), row)
            tell(place_smem.index(4 * slot + 1), flags)
            tell(place_smem.index(4 * slot + 2), flat_head)
            tell(place_smem.index(4 * slot + 3), dq_row)
            gl.thread_barrier()  # the thread that arrives at the barrier may be another
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [batch, q_head, row, 0], q_full.index(slot), q_smem.index(slot))
            lse_place = [flat_head * LINES, row]
            tma.async_copy_global_to_shared(lse_desc, lse_place, q_full.index(slot), lse_smem.index(slot))
            if t_desc is not None:
                T_STAGES: gl.constexpr = t_smem.shape[0]
                lead = split_lead(flat_head, program[4])
                column_steps = (tile_steps[4], tile_steps[5], tile_steps[6], tile_steps[7])
                t_row = offset_of(lead, tile_steps).to(gl.int32) + row
                t_place = [t_row, offset_of(lead, column_steps).to(gl.int32) + first_key]
                t_slot = loaded % T_STAGES
                mbarrier.wait(t_empty.index(t_slot), (loaded // T_STAGES & 1) ^ 1)
                mbarrier.expect(t_full.index(t_slot), t_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(t_desc, t_place, t_full.index(t_slot), t_smem.index(t_slot))
            mbarrier.wait(do_empty.index(slot), phase)
            BYTES: gl.constexpr = do_desc.block_type.nbytes + delta_desc.block_type.nbytes
            if i == 0:  # V comes with its first tile; the last item's V was read for the last time for its last tile
                last = do_empty.index((loaded + STAGES - 1) % STAGES)
                mbarrier.wait(last, (loaded - 1) // STAGES & 1, pred=done > 0)
                mbarrier.expect(do_full.index(slot), BYTES + v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(v_desc, kv_place, do_full.index(slot), v_smem)
            else:
                mbarrier.expect(do_full.index(slot), BYTES)
            tma.async_copy_global_to_shared(do_desc, [batch, q_head, row, 0], do_full.index(slot), do_smem.index(slot))
            tma.async_copy_global_to_shared(delta_desc, [flat_head, row], do_full.index(slot), delta_smem.index(slot))
            loaded += 1
            tile += 1
            if tile == end:
                q_head += 1
                flat_head += 1
                if PLANNED and i + 1 < total:
                    first, end, clear, sure = visible_tiles(
                        key_tile, flat_head, sizes, program, BLOCK_Q, BLOCK_K, PLANNED
                    )
                tile = first
        done += 1
        item = upcoming
    announce(work, done, 0, 0, 0, 0)
