"""Softmax weights of a transposed tile of scores in the registers of Hopper warpgroups, and the range of query tiles.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_backward``. Tiles are ``[keys, queries]``; the
functions of a score function (``attention_hopper_program``) work on them split into ``[keys, N / 8, 4, 2]``, then query
``8 a + 2 lane + c``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vbcompile.kernels.attention_hopper_scores import lanes_of, offset_of, rows_of, split_lead, steps_of

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def query_tiles(key_tile, head, program):
    """Query tiles of a key tile by the plan, int32 ``[*lead, key tiles, 8]``: ``(first, end, first and end of those
    that need no mask, first and end of those that need no more than their bounds)``."""
    _, _, _, _, lead_sizes, plan, plan_strides, _, _, _, _ = program
    entry = plan + offset_of(split_lead(head, lead_sizes), plan_strides) + key_tile * 8
    clear = (gl.load(entry + 1), gl.load(entry + 2))
    return gl.load(entry), gl.load(entry + 3), clear, (gl.load(entry + 4), gl.load(entry + 5))


@gluon.jit
def tile_flags(
    first_row,
    first_key,
    clear,
    sure,
    sizes,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    RAGGED: gl.constexpr,
    PLANNED: gl.constexpr,
):
    """1 for a tile that needs a mask, plus 2 where it needs more than its bounds. RAGGED: rows past the end count."""
    masked = first_key + BLOCK_K > sizes[1]
    if RAGGED:
        masked = masked | (first_row + BLOCK_Q > sizes[0])
    if PLANNED:
        tile = first_row // BLOCK_Q
        masked = masked | (tile < clear[0]) | (tile >= clear[1])
        unsure = (tile < sure[0]) | (tile >= sure[1])
        return gl.where(masked, 1, 0) + gl.where(unsure, 2, 0)
    else:
        return gl.where(masked | (first_row + sizes[4] < first_key + BLOCK_K - 1), 1, 0)


@gluon.jit
def weigh_tile(
    s,
    lse,
    low_row,
    t_tile,
    place,
    head,
    program,
    sizes,
    TILED: gl.constexpr,
    LOGITS: gl.constexpr,
    GRADIENT: gl.constexpr,
    BOUNDS: gl.constexpr,
    MASK: gl.constexpr,
    ROWS: gl.constexpr,
    UNBOUNDED: gl.constexpr,
    RAGGED: gl.constexpr,
):
    """``(weights, weights times the slope of the logits)`` of products of keys and queries ``s``, masked ones zero.

    ``lse`` as ``prepare_scores`` wrote it, ``[1, queries]``; ``low_row`` its second line in shared memory, ``t_tile``
    the captured tensor's tile there, transposed, or 0 for none; ``place``: (first row, first key, ``tile_flags`` plus 4
    for a second line that is not zero). TILED: 1 where LOGITS reads the tile, 2 where MASK alone does. GRADIENT None:
    the slope is 1.
    """
    BLOCK_K: gl.constexpr = s.shape[0]
    BLOCK_Q: gl.constexpr = s.shape[1]
    first_row, first_key, flags = place
    inner, outer, captured, strides, lead_sizes, _, _, _, _, _, _ = program
    queries, keys, offset = sizes[0], sizes[1], sizes[4]
    lead = split_lead(head, lead_sizes)
    layout: gl.constexpr = s.type.layout
    parts = s.reshape(BLOCK_K, BLOCK_Q // 8, 4, 2)
    split: gl.constexpr = parts.type.layout
    j = rows_of(first_key, split, BLOCK_K)
    lanes = lanes_of(split) + first_row
    steps = steps_of(BLOCK_Q, split)
    fi = lanes.to(gl.float32) + steps.to(gl.float32)
    fj = j.to(gl.float32)
    distance = (j - first_row).to(gl.float32)
    rows = (0,)
    tile = 0
    score = parts
    if LOGITS is not None:
        if TILED == 1:
            tile = t_tile.load(layout).reshape(BLOCK_K, BLOCK_Q // 8, 4, 2)
        if ROWS is not None:
            rows = ROWS(lanes + steps, lanes + steps < queries, lead, captured, strides)
        score = parts * inner
        logits = LOGITS(
            score, lanes + steps, j, fi, fj, 0.0, distance, rows, tile, lead, queries, keys, captured, strides
        )
    else:
        logits = parts
    # Masked logits serve the gradient, too, which saves the registers of unmasked ones. Not where rows may be -inf
    # without a mask: what takes part in them is NaN, what does not is zero.
    LOGITS_FIRST: gl.constexpr = GRADIENT is not None and not UNBOUNDED
    exponents = logits
    if not LOGITS_FIRST:
        flat = gl.convert_layout(logits.reshape(BLOCK_K, BLOCK_Q), layout, assert_trivial=True)
        if UNBOUNDED:
            exponents = (flat * outer - lse) * LOG2E
            if (flags & 4) != 0:
                exponents -= low_row.load(layout)
        else:
            exponents = flat * (outer * LOG2E) - lse
        exponents = exponents.reshape(BLOCK_K, BLOCK_Q // 8, 4, 2)
    if (flags & 1) != 0:
        if BOUNDS is not None:
            seen = rows
            if ROWS is not None:
                seen = ROWS(lanes + steps, lanes + steps < queries, lead, captured, strides)
            first, end = BOUNDS(lanes + steps, fi, first_row, seen, lead, queries, keys, captured, strides)
            keep = (j >= first) & (j < gl.minimum(end, keys))
        else:
            bound = gl.where(j < keys, j - offset, 1 << 30)
            keep = steps >= bound - lanes
        if RAGGED:
            keep = keep & (steps < queries - lanes)
        exponents = gl.where(keep, exponents, float("-inf"))
    if MASK is not None:  # noqa: SIM102 - known at compile time, the place is not
        if (flags & 2) != 0:
            seen = rows
            if ROWS is not None:
                seen = ROWS(lanes + steps, lanes + steps < queries, lead, captured, strides)
            shown = tile
            if TILED == 2:
                shown = t_tile.load(layout).reshape(BLOCK_K, BLOCK_Q // 8, 4, 2)
            keep = MASK(
                score, lanes + steps, j, fi, fj, 0.0, distance, seen, shown, lead, queries, keys, captured, strides
            )
            exponents = gl.where(keep != 0, exponents, float("-inf"))
    # Masked before the exponential: after it the assembler would wait for every single product of the tensor cores.
    if LOGITS_FIRST:
        logits = exponents
        flat = gl.convert_layout(logits.reshape(BLOCK_K, BLOCK_Q), layout, assert_trivial=True)
        exponents = (flat * (outer * LOG2E) - lse).reshape(BLOCK_K, BLOCK_Q // 8, 4, 2)
    weights = gl.exp2(exponents)
    sloped = weights
    if GRADIENT is not None:
        sloped = GRADIENT(
            score,
            logits,
            weights,
            lanes + steps,
            j,
            fi,
            fj,
            0.0,
            distance,
            rows,
            tile,
            lead,
            queries,
            keys,
            captured,
            strides,
        )
        sloped = gl.where(weights == 0.0, 0.0, sloped)  # whatever the slope of masked ones is
    weights = gl.convert_layout(weights.reshape(BLOCK_K, BLOCK_Q), layout, assert_trivial=True)
    sloped = gl.convert_layout(sloped.reshape(BLOCK_K, BLOCK_Q), layout, assert_trivial=True)
    return weights, sloped


@gluon.jit
def add_captured(ds, first_row, first_key, head, program, sizes, ADD: gl.constexpr, ROWS: gl.constexpr):
    """Add to the gradients of captured tensors, by a tile of the gradient of the logits ``ds``."""
    BLOCK_K: gl.constexpr = ds.shape[0]
    BLOCK_Q: gl.constexpr = ds.shape[1]
    _, outer, captured, strides, lead_sizes, _, _, _, gradients, gradient_strides, _ = program
    queries, keys = sizes[0], sizes[1]
    lead = split_lead(head, lead_sizes)
    upstream = (ds * outer).reshape(BLOCK_K, BLOCK_Q // 8, 4, 2)
    split: gl.constexpr = upstream.type.layout
    j = rows_of(first_key, split, BLOCK_K)
    i = lanes_of(split) + first_row + steps_of(BLOCK_Q, split)
    distance = (j - first_row).to(gl.float32)
    rows = (0,)
    if ROWS is not None:
        rows = ROWS(i, i < queries, lead, captured, strides)
    ADD(
        upstream, i, j, i.to(gl.float32), j.to(gl.float32), 0.0, distance, rows, lead, queries, keys, captured, strides,
        gradients, gradient_strides,
    )  # fmt: skip
