"""The producer of the Hopper forward attention: the warp that keeps the shared buffers full.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_forward``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from vbcompile.kernels.attention_hopper_scores import key_tiles, offset_of, split_lead
from vbcompile.kernels.attention_hopper_tiles import locate


@gluon.jit
def hand_out(work, number, entry):
    """Producer: publish a work item, see ``describe_item``; ``number`` counts the items before it."""
    slots, full, empty = work
    mbarrier.wait(empty.index(0), (number & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for n in gl.static_range(9):
        slots.index(n).store(gl.full([1], 0, gl.int32, layout) + entry[n])
    mbarrier.arrive(full.index(0))


@gluon.jit
def take_number(slots, n: gl.constexpr, WARPS: gl.constexpr):
    """One number of a work item."""
    return gl.max(slots.index(n).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def take_over(work, number, WARPS: gl.constexpr):
    """Whoever follows the producer: the ``number``-th work item, see ``describe_item``."""
    slots, full, empty = work
    mbarrier.wait(full.index(0), number & 1)
    query_tile = take_number(slots, 0, WARPS)
    batch = take_number(slots, 1, WARPS)
    head = take_number(slots, 2, WARPS)
    first = take_number(slots, 3, WARPS)
    end = take_number(slots, 4, WARPS)
    clear = (take_number(slots, 5, WARPS), take_number(slots, 6, WARPS))
    sure = (take_number(slots, 7, WARPS), take_number(slots, 8, WARPS))
    mbarrier.arrive(empty.index(0))
    return query_tile, batch, head, first, end, clear, sure


@gluon.jit
def place_item(item, sizes, GROUP: gl.constexpr, SHARED: gl.constexpr):
    """Work item -> (query tile, flat head). SHARED: heads that differ in their batch alone are neighbours, since they
    read the same part of a captured tensor."""
    _, q_heads, _, _, query_tiles, heads, _ = sizes
    query_tile, head = locate(item, query_tiles, heads, GROUP)
    if SHARED:
        batches = heads // q_heads
        head = head % batches * q_heads + head // batches
    return query_tile, head


@gluon.jit
def describe_item(
    item,
    sizes,
    program,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    PLANNED: gl.constexpr,
    SHARED: gl.constexpr,
):
    """What all warps need to know of a work item: query tile, batch, flat head (past the last for none: the end), and
    its key tiles, see ``key_tiles``. Divisions and the plan's entry take longer than a consumer should wait."""
    _, q_heads, _, _, query_tiles, heads, _ = sizes
    query_tile, head = place_item(gl.minimum(item, query_tiles * heads - 1), sizes, GROUP, SHARED)
    first, end, clear, sure = key_tiles(query_tile, head, sizes, program, BLOCK_Q, BLOCK_K, PLANNED)
    real = gl.where(item < query_tiles * heads, head, heads)
    return query_tile, head // q_heads, real, first, end, clear[0], clear[1], sure[0], sure[1]


@gluon.jit
def next_item(item, counter, DYNAMIC: gl.constexpr):
    """The work item after ``item``. The counter's answer takes about a microsecond and is waited for here."""
    if DYNAMIC:
        return gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
    else:
        return item + gl.num_programs(0)


@gluon.jit
def load_tiles(shared, descriptors, loaded, begin, stop, end, batch, k_head, BLOCK_K: gl.constexpr):
    """Copies the ``begin``-th .. ``stop - 1``-th tile of keys and of values in the order of the walk; ``loaded`` came
    before. Returns how many have come then."""
    buffers, barriers, _, _, _, _, _, _ = shared
    _, k_desc, v_desc = descriptors
    _, _, k_smem, v_smem = buffers
    _, _, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_smem.shape[0]
    for j in range(begin, stop):
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
    return loaded


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
    q_desc, _, _ = descriptors
    q_smem, _, _, _ = buffers
    q_full, q_empty, _, _, _, _ = barriers
    _, q_heads, heads_per_key_head, _, query_tiles, heads, counter = sizes
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS
    loaded = gl.to_tensor(0)
    done = gl.to_tensor(0)
    if PLANNED:  # this kernel may have started before the one that makes the plan has ended
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, $1;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1
        )
    item = gl.program_id(0)
    entry = describe_item(item, sizes, program, BLOCK_Q, BLOCK_K, GROUP, PLANNED, SHARED)
    hand_out(work, done, entry)
    while item < query_tiles * heads:
        query_tile, batch, head, first, end, _clear_first, _clear_end, _sure_first, _sure_end = entry
        tiles = end - first
        ahead = tiles
        if not PLANNED:
            item = next_item(item, counter, DYNAMIC)
        q_head = head - batch * q_heads
        k_head = q_head // heads_per_key_head
        for w in gl.static_range(CONSUMERS):
            slot = w + done % Q_STAGES * CONSUMERS
            mbarrier.wait(q_empty.index(slot), (done // Q_STAGES & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
            row = query_tile * BLOCK_Q + w * 64
            tma.async_copy_global_to_shared(q_desc, [batch, q_head, row, 0], q_full.index(slot), q_smem.index(slot))
        if PLANNED:  # items may be short and a plan's entry takes long to come: it does under tiles on their way
            ahead = gl.minimum(tiles, 2)
        loaded = load_tiles(shared, descriptors, loaded, 0, ahead, end, batch, k_head, BLOCK_K)
        if PLANNED:
            item = next_item(item, counter, DYNAMIC)
        entry = describe_item(item, sizes, program, BLOCK_Q, BLOCK_K, GROUP, PLANNED, SHARED)
        hand_out(work, done + 1, entry)
        if PLANNED:
            loaded = load_tiles(shared, descriptors, loaded, ahead, tiles, end, batch, k_head, BLOCK_K)
        done += 1


@gluon.jit
def produce_tiles(shared, t_desc, tile_steps, CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr):
    """A second producer warp, for the captured tensor that comes as tiles: its consumers keep different pace.

    ``tile_steps``: rows, then columns, by which leading indices move in that tensor. Nothing to do without it.
    """
    if t_desc is not None:
        _, _, tiles, work, _, sizes, program, _ = shared
        t_smem, t_full, t_empty = tiles
        heads = sizes[5]
        STAGES: gl.constexpr = t_smem.shape[0] // CONSUMERS
        BLOCK_Q: gl.constexpr = 64 * CONSUMERS
        loaded = gl.to_tensor(0)
        done = gl.to_tensor(0)
        query_tile, _batch, head, first, end, _clear, _sure = take_over(work, done, 1)
        while head < heads:
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
            done += 1
            query_tile, _batch, head, first, end, _clear, _sure = take_over(work, done, 1)
