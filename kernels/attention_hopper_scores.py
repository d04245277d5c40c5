"""Score functions and masks on one tile of scores in the registers of a Hopper warpgroup, and the range of key tiles.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_forward``. The functions of a score function
(``attention_hopper_program``) work on tiles split into ``[64, N / 8, 4, 2]``: rows, then key ``8 a + 2 lane + c``, as
the tensor cores leave them. Key numbers are a register plus a constant of the instruction that way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def split_lead(linear, sizes):
    """Leading indices of a row-major linear index; ``sizes``: four axes."""
    d = linear % sizes[3]
    linear //= sizes[3]
    c = linear % sizes[2]
    linear //= sizes[2]
    return (linear // sizes[1], linear % sizes[1], c, d)


@gluon.jit
def offset_of(lead, strides):
    """Elements from the start of a tensor to one head."""
    return (
        lead[0].to(gl.int64) * strides[0]
        + lead[1].to(gl.int64) * strides[1]
        + lead[2].to(gl.int64) * strides[2]
        + lead[3].to(gl.int64) * strides[3]
    )


@gluon.jit
def key_tiles(query_tile, head, sizes, program, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, PLANNED: gl.constexpr):
    """Key tiles of a query tile: ``(first, end, first and end of those that need no mask, first and end of those that
    need no more than their bounds)``.

    From the plan, int32 ``[*lead, query tiles, 8]``, or from the causal offset and the number of keys.
    """
    if PLANNED:
        _, _, _, _, lead_sizes, plan, plan_strides, _, _ = program
        entry = plan + offset_of(split_lead(head, lead_sizes), plan_strides) + query_tile * 8
        clear = (gl.load(entry + 1), gl.load(entry + 2))
        return gl.load(entry), gl.load(entry + 3), clear, (gl.load(entry + 4), gl.load(entry + 5))
    else:
        first = query_tile * BLOCK_Q + sizes[3]
        last = gl.minimum(sizes[0], first + BLOCK_Q)
        nothing = gl.to_tensor(0)
        clear = (nothing, gl.minimum(sizes[0], first + 1) // BLOCK_K)
        return nothing, gl.cdiv(last, BLOCK_K), clear, (nothing, nothing)


@gluon.jit
def place_tile(first_row, tile, clear, sure, BLOCK_K: gl.constexpr, PLANNED: gl.constexpr):
    """(first row, first key, whether the tile needs a mask, whether it needs more than its bounds)."""
    masked = tile >= clear[1]
    unsure = masked
    if PLANNED:
        masked = masked | (tile < clear[0])
        unsure = (tile >= sure[1]) | (tile < sure[0])
    return first_row, tile * BLOCK_K, masked, unsure


@gluon.jit
def rows_of(first_row, split: gl.constexpr, COUNT: gl.constexpr = 64):
    """Row numbers ``[COUNT, 1, 1, 1]`` of a tile in the layout ``split``."""
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, split))
    rows = first_row + gl.arange(0, COUNT, gl.SliceLayout(1, lanes))
    return gl.expand_dims(gl.expand_dims(rows[:, None], 1), 3)


@gluon.jit
def lanes_of(split: gl.constexpr):
    """``2 lane`` of every element, ``[1, 1, 4, 1]``."""
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, split))
    two = 2 * gl.arange(0, 4, gl.SliceLayout(0, lanes))[None, :]
    return gl.expand_dims(gl.expand_dims(two, 1), 3)


@gluon.jit
def steps_of(N: gl.constexpr, split: gl.constexpr):
    """``8 a + c`` of every element, ``[1, N / 8, 1, 2]``: constants."""
    steps: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, split))
    eights = 8 * gl.arange(0, N // 8, gl.SliceLayout(1, steps))[:, None]
    both = eights + gl.arange(0, 2, gl.SliceLayout(0, steps))[None, :]
    return gl.expand_dims(gl.expand_dims(both, 0), 2)


@gluon.jit
def split_layout(s_layout: gl.constexpr, N: gl.constexpr):
    """A tile's ``[64, N / 8, 4, 2]`` form of zeros, for its layout."""
    return gl.full([64, N], 0.0, gl.float32, s_layout).reshape(64, N // 8, 4, 2)


@gluon.jit
def per_row(
    FUNCTION: gl.constexpr, s_layout: gl.constexpr, N: gl.constexpr, first_row, rows, lead, queries, keys, program
):
    """A function of rows as ``[64]``; zeros without one."""
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    if FUNCTION is None:
        return gl.full([64], 0.0, gl.float32, s_rows)
    else:
        split: gl.constexpr = split_layout(s_layout, N).type.layout
        i = rows_of(first_row, split)
        first = first_row.to(gl.float32)
        values = FUNCTION(i, i.to(gl.float32), first, rows, lead, queries, keys, program[2], program[3])
        return gl.convert_layout(values.reshape(64), s_rows)


@gluon.jit
def describe_rows(
    s_layout: gl.constexpr,
    N: gl.constexpr,
    first_row,
    head,
    queries,
    keys,
    program,
    ROWS: gl.constexpr,
    OFFSET: gl.constexpr,
):
    """What a score function says about the rows of a tile: (loaded values, leading indices, number of queries, what is
    added to all logits ``[64]``)."""
    lead = split_lead(head, program[4])
    rows = (0,)
    if ROWS is not None:
        split: gl.constexpr = split_layout(s_layout, N).type.layout
        i = rows_of(first_row, split)
        rows = ROWS(i, i < queries, lead, program[2], program[3])
    return rows, lead, queries, per_row(OFFSET, s_layout, N, first_row, rows, lead, queries, keys, program)


@gluon.jit
def at_tile(context, slope, place, SLOPE: gl.constexpr):
    """``context`` for one tile, and how far it lies from the rows as far as elements count that; with SLOPE they do
    not, and rows get ``slope [64]`` times that distance instead."""
    rows, lead, queries, offset = context
    away = place[1] - place[0]
    if SLOPE is None:
        return rows, lead, queries, offset, away
    else:
        return rows, lead, queries, offset + slope * away.to(gl.float32), 0


@gluon.jit
def bits_below(bound):
    """A lane's keys ``8 a + 2 lane + c`` below ``bound + 2 lane``, one bit each: keys of a lane in their order."""
    count = gl.maximum(2 * (bound >> 3) + gl.minimum(bound & 7, 2), 0)
    return gl.where(count > 31, -1, (1 << count) - 1)


@gluon.jit
def keep_range(parts, first, end, lanes, other):
    """``other`` where a key is not in ``[first, end)``; ``first`` may be None. ``lanes`` is each lane's first key,
    see ``lanes_of``; a lane has 32 keys at most. A test of one bit per element: two comparisons would wait for each
    other."""
    split: gl.constexpr = parts.type.layout
    bits = bits_below(end - lanes)
    if first is not None:
        bits = bits & ~bits_below(first - lanes)
    numbers: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, split))
    twos = 2 * gl.arange(0, parts.shape[1], gl.SliceLayout(1, numbers))[:, None]
    number = twos + gl.arange(0, 2, gl.SliceLayout(0, numbers))[None, :]
    one = gl.expand_dims(gl.expand_dims(1 << number, 0), 2)
    return gl.where((bits & one) != 0, parts, other)


@gluon.jit
def mask_scores(s, first_row, first_key, sizes):
    """-inf where a key lies past the end or, causal, past the row's own position.

    A lane holds keys ``8 a + 2 lane + c`` of a row. Compared as ``8 a + c <= bound - 2 lane`` the left side is a
    constant of the instruction; whole key numbers would be hoisted out of the loops and held in registers.
    """
    parts = s.reshape(64, s.shape[1] // 8, 4, 2)
    split: gl.constexpr = parts.type.layout
    bound = gl.minimum(rows_of(first_row, split) + sizes[3], sizes[0] - 1) - first_key - lanes_of(split)
    masked = gl.where(steps_of(s.shape[1], split) <= bound, parts, float("-inf")).reshape(64, s.shape[1])
    return gl.convert_layout(masked, s.type.layout, assert_trivial=True)


@gluon.jit
def zero_masked(s, step: gl.constexpr, place, context, program, sizes, BOUNDED: gl.constexpr, BOUNDS: gl.constexpr):
    """Part of a tile, from its ``step``-th key on, with 0 at masked keys; BOUNDED and BOUNDS are all of the mask."""
    first_row, first_key, masked, _ = place
    if BOUNDED:  # noqa: SIM102 - known at compile time, the place is not
        if masked:
            parts = s.reshape(64, s.shape[1] // 8, 4, 2)
            split: gl.constexpr = parts.type.layout
            i = rows_of(first_row, split)
            lanes = lanes_of(split) + first_key + step
            if BOUNDS is not None:
                first, end = BOUNDS(
                    i, i.to(gl.float32), first_row, context[0], context[1], context[2], sizes[0], program[2],
                    program[3],
                )  # fmt: skip
                parts = keep_range(parts, first, gl.minimum(end, sizes[0]), lanes, 0.0)
            else:
                parts = keep_range(parts, None, gl.minimum(i + sizes[3] + 1, sizes[0]), lanes, 0.0)
            s = gl.convert_layout(parts.reshape(64, s.shape[1]), s.type.layout, assert_trivial=True)
    return s


@gluon.jit
def wait_for_tile(tiles, number, w: gl.constexpr, CONSUMERS: gl.constexpr):
    """Where the part of the captured tensor under tile ``number`` of scores lies, once it has come."""
    t_smem, t_full, _ = tiles
    STAGES: gl.constexpr = t_smem.shape[0] // CONSUMERS
    slot = w + number % STAGES * CONSUMERS
    mbarrier.wait(t_full.index(slot), number // STAGES & 1)
    return slot


@gluon.jit
def load_tile(tiles, slot, layout: gl.constexpr):
    """That part as stored, ``[64, N / 8, 4, 2]``."""
    values = tiles[0].index(slot).load(layout)
    return values.reshape(64, values.shape[1] // 8, 4, 2)


@gluon.jit
def widen(tile):
    """bfloat16 as float32, anything else as it is. Neighbours are taken apart by one instruction each; extracting the
    upper one first would take two."""
    if tile.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=r,=r,r", [tile], dtype=gl.int32, is_pure=True, pack=2
        ).to(gl.float32, bitcast=True)
    else:
        return tile


@gluon.jit
def give_back(tiles, slot):
    """Lets the copy engine overwrite a buffer: what was read of it must have arrived, a barrier alone does not wait."""
    fence_async_shared()
    mbarrier.arrive(tiles[2].index(slot))


@gluon.jit
def take_tile(tiles, number, w: gl.constexpr, CONSUMERS: gl.constexpr, layout: gl.constexpr):
    """The part of the captured tensor under tile ``number`` of scores, its buffer given back."""
    slot = wait_for_tile(tiles, number, w, CONSUMERS)
    tile = load_tile(tiles, slot, layout)
    give_back(tiles, slot)
    return tile


@gluon.jit
def score_tile(
    s,
    tile,
    number,
    tiles,
    place,
    context,
    program,
    sizes,
    w: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TILED: gl.constexpr,
    BOUNDS: gl.constexpr,
    LOGITS: gl.constexpr,
    MASK: gl.constexpr,
):
    """Logits of a tile of products of queries and keys ``s [64, N]``, less what is added to whole rows.

    ``tile``: what ``take_tile`` gave where LOGITS reads it; ``number`` counts key tiles; ``place``: see
    ``place_tile``; ``context``: see ``at_tile``. Without LOGITS they stay unscaled. TILED: 1 where LOGITS reads a
    captured tensor's tile, 2 where MASK alone does, 0 where neither does.
    """
    N: gl.constexpr = s.shape[1]
    first_row, first_key, masked, unsure = place
    if BOUNDS is None:  # then MASK checks the end of the keys, too
        unsure = masked
    rows, lead, queries, _, away = context
    inner, _, captured, strides, _, _, _, _, _ = program
    keys = sizes[0]
    parts = s.reshape(64, N // 8, 4, 2)
    split: gl.constexpr = parts.type.layout
    i = rows_of(first_row, split)
    lanes = lanes_of(split) + first_key
    steps = steps_of(N, split)
    fi = i.to(gl.float32)
    fj = lanes.to(gl.float32) + steps.to(gl.float32)
    step = steps.to(gl.float32)
    distance = (lanes_of(split) + away).to(gl.float32)
    score = parts
    layout: gl.constexpr = s.type.layout
    if TILED == 1:
        tile = widen(tile)
    if TILED == 2:
        slot = wait_for_tile(tiles, number, w, CONSUMERS)
    if LOGITS is not None:
        score = parts * inner
        parts = LOGITS(
            score, i, lanes + steps, fi, fj, step, distance, rows, tile, lead, queries, keys, captured, strides
        )
    if BOUNDS is not None:  # noqa: SIM102 - known at compile time, the place is not
        if masked:
            first, end = BOUNDS(i, fi, first_row, rows, lead, queries, keys, captured, strides)
            end = gl.minimum(end, keys)
            parts = keep_range(parts, first, end, lanes, float("-inf"))
    if MASK is not None:  # noqa: SIM102
        if unsure:
            seen = tile
            if TILED == 2:
                seen = load_tile(tiles, slot, layout)
            keep = MASK(
                score, i, lanes + steps, fi, fj, step, distance, rows, seen, lead, queries, keys, captured, strides
            )
            parts = gl.where((steps < keys - lanes) & (keep != 0), parts, float("-inf"))
    if TILED == 2:
        give_back(tiles, slot)
    return gl.convert_layout(parts.reshape(64, N), layout, assert_trivial=True)
