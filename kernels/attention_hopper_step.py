"""One key tile of the Hopper forward attention: products, softmax, and what of it runs under which product.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_forward``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from vbcompile.kernels.attention_hopper_capped import capped_exponentials
from vbcompile.kernels.attention_hopper_scores import (
    at_tile,
    mask_scores,
    place_tile,
    score_tile,
    take_tile,
    zero_masked,
)
from vbcompile.kernels.attention_hopper_tiles import (
    TURN,
    carry_weights,
    exponentials,
    finish_first,
    halves,
    next_reference,
    pack_weights,
    pass_turn,
    sum_within_lane,
    use_weights,
    wait_turn,
)


@gluon.jit
def to_logits(
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
    BOUNDED: gl.constexpr,
    TILED: gl.constexpr,
    PLANNED: gl.constexpr,
    BOUNDS: gl.constexpr,
    LOGITS: gl.constexpr,
    MASK: gl.constexpr,
):
    """Products of queries and keys -> logits. ``number`` counts key tiles; ``place`` as in ``score_tile``. BOUNDED: the
    causal bound and the end of the keys are checked where the place says so."""
    if LOGITS is not None or PLANNED:
        s = score_tile(
            s, tile, number, tiles, place, context, program, sizes, w, CONSUMERS, TILED, BOUNDS, LOGITS, MASK
        )  # fmt: skip
    if BOUNDED and not PLANNED:  # noqa: SIM102 - known at compile time, the place is not
        if place[2]:
            s = mask_scores(s, place[0], place[1], sizes)
    return s


@gluon.jit
def refer(
    s,
    tile,
    m,
    number,
    tiles,
    place,
    context,
    program,
    sizes,
    w: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BOUNDED: gl.constexpr,
    TILED: gl.constexpr,
    PLANNED: gl.constexpr,
    BOUNDS: gl.constexpr,
    LOGITS: gl.constexpr,
    MASK: gl.constexpr,
    CAP: gl.constexpr,
    UNBOUNDED: gl.constexpr,
):
    """Products of queries and keys -> (logits or, where capped, products; new reference of the rows; factor of the sums
    so far; what ``exponentials`` takes). Nothing of that changes where logits are capped."""
    factor = program[1]
    if CAP is not None:
        reference = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, s.type.layout)) + program[8][0]
        return s, reference, 1.0, factor, reference
    else:
        s = to_logits(
            s, tile, number, tiles, place, context, program, sizes, w, CONSUMERS, BOUNDED, TILED, PLANNED, BOUNDS,
            LOGITS, MASK,
        )  # fmt: skip
        new_m, alpha, own, base = next_reference(s, m, context[3], factor, UNBOUNDED)
        return s, new_m, alpha, own, base


@gluon.jit
def weigh(
    s,
    own,
    base,
    step: gl.constexpr,
    place,
    context,
    program,
    sizes,
    BOUNDED: gl.constexpr,
    POLY: gl.constexpr,
    BOUNDS: gl.constexpr,
    CAP: gl.constexpr,
):
    """Weights of part of a tile, from its ``step``-th key on; other arguments from ``refer``. CAP: None, or how many
    terms the polynomial has that capped weights are computed by."""
    if CAP is not None:
        p = capped_exponentials(s, program[8], CAP)
        return zero_masked(p, step, place, context, program, sizes, BOUNDED, BOUNDS)
    else:
        return exponentials(s, own, base, POLY)


@gluon.jit
def advance(
    state,
    taken,
    q_tile,
    k_smem,
    v_smem,
    barriers,
    tiles,
    place,
    context,
    program,
    sizes,
    w: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
    ROUNDING: gl.constexpr,
    POLY: gl.constexpr,
    TILED: gl.constexpr,
    PLANNED: gl.constexpr,
    BOUNDS: gl.constexpr,
    LOGITS: gl.constexpr,
    MASK: gl.constexpr,
    CAP: gl.constexpr,
    UNBOUNDED: gl.constexpr,
):
    """One key tile: S of the next tile, P V of the current one, softmax of the next one under P V.

    ``place`` = (first query row, first key of the next tile, ...) of ``place_tile``. ROUNDING says when the new weights
    are rounded: "next" under the next S, which takes most registers; "early" before P V is waited for; "halfway" with
    that wait after half of the exponentials: the others hide the rounding and the scaling of the sums.
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
    if PING_PONG > 0:
        wait_turn(TURN + w)
    k_tile = k_smem.index(next_slot).reshape([BLOCK_K, D]).permute((1, 0))
    zero = gl.full([64, BLOCK_K], 0.0, gl.float32, s_layout)
    s = warpgroup_mma(q_tile, k_tile, zero, use_acc=False, is_async=True)
    weights = use_weights(p, q_tile.dtype, o_layout, ROUNDING)
    mbarrier.wait(v_full.index(slot), taken // STAGES & 1)
    o = warpgroup_mma(weights, v_smem.index(slot).reshape([BLOCK_K, D]), o, is_async=True)
    if PING_PONG == 1:
        pass_turn(TURN + (w + 1) % CONSUMERS)
    tile = 0
    if TILED == 1:  # there are registers for it while S is computed
        tile = take_tile(tiles, taken + 1, w, CONSUMERS, s_layout)
    s = warpgroup_mma_wait(1, [s])
    if PING_PONG == 2:
        pass_turn(TURN + (w + 1) % CONSUMERS)
    mbarrier.arrive(k_empty.index(next_slot))
    s, new_m, alpha, own, base = refer(
        s, tile, m, taken + 1, tiles, place, context, program, sizes, w, CONSUMERS, CAUSAL, TILED, PLANNED, BOUNDS,
        LOGITS, MASK, CAP, UNBOUNDED,
    )  # fmt: skip
    MASKED: gl.constexpr = CAUSAL or PLANNED
    if ROUNDING == "halfway":
        left, right = halves(s)
        left = weigh(left, own, base, 0, place, context, program, sizes, MASKED, POLY, BOUNDS, CAP)
        part = finish_first(sum_within_lane(left))
        o, left, right = warpgroup_mma_wait(0, [o, left, right])
        mbarrier.arrive(v_empty.index(slot))
        right = weigh(
            right, own, base, BLOCK_K // 2, place, context, program, sizes, MASKED, POLY, BOUNDS, CAP
        )  # fmt: skip
        part = part + gl.convert_layout(sum_within_lane(right), part.type.layout)
        carried = (pack_weights(left, q_tile.dtype), pack_weights(right, q_tile.dtype))
    else:
        weighed = weigh(s, own, base, 0, place, context, program, sizes, MASKED, POLY, BOUNDS, CAP)
        part = finish_first(sum_within_lane(weighed))
        carried = carry_weights(weighed, q_tile.dtype, ROUNDING)
        if ROUNDING == "early":
            # The old weights are kept until P V has read them: the new ones must not take their registers.
            o, _old, carried = warpgroup_mma_wait(0, [o, p, carried])
        else:
            o, carried = warpgroup_mma_wait(0, [o, carried])
        mbarrier.arrive(v_empty.index(slot))
    part = gl.convert_layout(part, total.type.layout)
    if CAP is not None:
        return new_m, total + part, o, carried
    else:
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        total = total * gl.convert_layout(alpha, gl.SliceLayout(1, total.type.layout))[:, None] + part
        return new_m, total, o, carried


@gluon.jit
def walk(
    state,
    taken,
    begin,
    stop,
    item,
    rows,
    q_tile,
    k_smem,
    v_smem,
    barriers,
    tiles,
    program,
    sizes,
    w: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
    ROUNDING: gl.constexpr,
    POLY: gl.constexpr,
    TILED: gl.constexpr,
    PLANNED: gl.constexpr,
    SLOPE: gl.constexpr,
    BOUNDS: gl.constexpr,
    LOGITS: gl.constexpr,
    MASK: gl.constexpr,
    CAP: gl.constexpr,
    UNBOUNDED: gl.constexpr,
    MASKED: gl.constexpr,
):
    """``advance`` to the ``begin``-th .. ``stop - 1``-th key tile of a work item in the order of the walk. ``item``:
    first row, end of its key tiles, ranges of ``place_tile``; ``rows``: see ``at_tile``. Not MASKED: none of these
    tiles needs a mask."""
    first_row, end, clear, sure = item
    context, slope = rows
    BLOCK_K: gl.constexpr = k_smem.shape[3]
    for j in range(begin, stop):
        place = place_tile(first_row, end - 1 - j, clear, sure, BLOCK_K, PLANNED)
        state = advance(
            state, taken, q_tile, k_smem, v_smem, barriers, tiles, place, at_tile(context, slope, place, SLOPE),
            program, sizes, w, CONSUMERS, CAUSAL and MASKED, PING_PONG, ROUNDING, POLY, TILED, PLANNED and MASKED,
            BOUNDS if MASKED else None, LOGITS, MASK if MASKED else None, CAP, UNBOUNDED,
        )  # fmt: skip
        taken += 1
    return state, taken
