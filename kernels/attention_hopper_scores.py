"""Score functions and masks on one tile of scores in the registers of a Hopper warpgroup, and the range of key tiles.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_forward``. The functions of a score function
(``attention_hopper_program``) work on tiles split into ``[64, N / 8, 4, 2]``: rows, then key ``8 a + 2 lane + c``, as
the tensor cores leave them. Key numbers are a register plus a constant of the instruction that way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


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
    """Key tiles of a query tile: ``(first, end, first and end of those that need no mask)``.

    From the plan, int32 ``[*lead, query tiles, 4]``, or from the causal offset and the number of keys.
    """
    if PLANNED:
        _, _, _, _, lead_sizes, plan, plan_strides, _ = program
        entry = plan + offset_of(split_lead(head, lead_sizes), plan_strides) + query_tile * 4
        return gl.load(entry), gl.load(entry + 3), gl.load(entry + 1), gl.load(entry + 2)
    else:
        first = query_tile * BLOCK_Q + sizes[3]
        last = gl.minimum(sizes[0], first + BLOCK_Q)
        clear = gl.minimum(sizes[0], first + 1)
        return gl.to_tensor(0), gl.cdiv(last, BLOCK_K), gl.to_tensor(0), clear // BLOCK_K


@gluon.jit
def rows_of(first_row, split: gl.constexpr):
    """Row numbers ``[64, 1, 1, 1]`` of a tile in the layout ``split``."""
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, split))
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, lanes))
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
def load_rows(s_layout: gl.constexpr, N: gl.constexpr, first_row, lead, queries, program, ROWS: gl.constexpr):
    """What the score function reads once per row or head; 0 where it reads nothing of that kind."""
    if ROWS is None:
        return 0
    else:
        split: gl.constexpr = gl.full([64, N], 0.0, gl.float32, s_layout).reshape(64, N // 8, 4, 2).type.layout
        i = rows_of(first_row, split)
        return ROWS(i, i < queries, lead, program[2], program[3])


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
def take_tile(tiles, number, w: gl.constexpr, CONSUMERS: gl.constexpr, layout: gl.constexpr):
    """The part of the captured tensor under tile ``number`` of scores, ``[64, N / 8, 4, 2]``, as stored."""
    t_smem, t_full, t_empty = tiles
    STAGES: gl.constexpr = t_smem.shape[0] // CONSUMERS
    slot = w + number % STAGES * CONSUMERS
    mbarrier.wait(t_full.index(slot), number // STAGES & 1)
    values = t_smem.index(slot).load(layout)
    mbarrier.arrive(t_empty.index(slot))
    return values.reshape(64, values.shape[1] // 8, 4, 2)


@gluon.jit
def score_tile(
    s,
    tile,
    place,
    context,
    program,
    sizes,
    LOGITS: gl.constexpr,
    MASK: gl.constexpr,
):
    """Logits of a tile of products of queries and keys ``s [64, N]``.

    ``place`` = (first row, first key, whether the tile needs the mask); ``context`` = (values per row, leading indices,
    number of queries). Without LOGITS they stay unscaled.
    """
    N: gl.constexpr = s.shape[1]
    first_row, first_key, masked = place
    rows, lead, queries = context
    inner, _, captured, strides, _, _, _, _ = program
    parts = s.reshape(64, N // 8, 4, 2)
    split: gl.constexpr = parts.type.layout
    i = rows_of(first_row, split)
    lanes = lanes_of(split) + first_key
    steps = steps_of(N, split)
    if LOGITS is not None:
        score = parts * inner
        fj = lanes.to(gl.float32) + steps.to(gl.float32)
        parts = LOGITS(
            score, i, lanes + steps, i.to(gl.float32), fj, rows, tile, lead, queries, sizes[0], captured, strides
        )
    else:
        score = parts
    if MASK is not None:  # noqa: SIM102 - known at compile time, the place is not
        if masked:
            j = lanes + steps
            keep = MASK(
                score, i, j, i.to(gl.float32), j.to(gl.float32), rows, tile, lead, queries, sizes[0], captured, strides
            )
            parts = gl.where((steps < sizes[0] - lanes) & keep, parts, float("-inf"))
    return gl.convert_layout(parts.reshape(64, N), s.type.layout, assert_trivial=True)
