"""Flash attention forward in Triton: tiles of rows, one pass over the keys that the mask needs.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135, 2307.08691) in base two. A tile
of rows visits three ranges of keys: before and after the range where the mask's bounds hold for every element, tiles
are masked; inside, they are not. The score function is compiled in.
"""

import triton
import triton.language as tl

from vbcompile.kernels.attention_blocks import (
    LOG2E,
    join_index,
    keep_weights,
    load_tile,
    locate,
    offset_of,
    softmax_step,
    split_index,
    store_tile,
    tile_range,
)


@triton.jit
def _visit(
    state, q_tile, k, v, k_head, v_head, start, first_row, captured, seed, lead, lead_sizes,
    k_strides, v_strides, captured_strides, scale, dropout_p, q_length, k_length,
    LOGITS: tl.constexpr, MASK: tl.constexpr, MAY_BE_EMPTY: tl.constexpr, UNBOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PLAIN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr, EVEN_Q: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the keys ``start ..`` to ``state = (accumulator [BLOCK_Q, DV], row sum, row maximum)``."""
    accumulator, total, top = state
    k_tile = load_tile(k, k_head, k_strides, start, k_length, BLOCK_K, D, D_PADDED, TMA, BOUNDED)
    logits = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
    i = (first_row + tl.arange(0, BLOCK_Q))[:, None]
    j = (start + tl.arange(0, BLOCK_K))[None, :]
    factor = scale * LOG2E if PLAIN else LOG2E
    if not PLAIN:
        logits = logits * scale
    i_ok = None if EVEN_Q else i < q_length
    j_ok = j < k_length if BOUNDED else None
    if EVEN_Q:
        ok = j_ok
    else:
        ok = i_ok & j_ok if BOUNDED else i_ok
    score = logits
    if LOGITS is not None:
        logits = LOGITS(score, i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, captured_strides)
    if MASK is not None:
        keep = MASK(score, i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, captured_strides)
        if BOUNDED:
            keep = keep & j_ok
        logits = tl.where(keep, logits, float("-inf"))
    elif BOUNDED:
        logits = tl.where(j_ok, logits, float("-inf"))
    weights, accumulator, total, top = softmax_step(accumulator, total, top, logits, factor, MAY_BE_EMPTY, UNBOUNDED)
    if DROPOUT:
        keep = keep_weights(seed, dropout_p, join_index(lead, lead_sizes), i, j, q_length, k_length, WIDE)
        weights = tl.where(keep, weights, 0.0)
    v_tile = load_tile(v, v_head, v_strides, start, k_length, BLOCK_K, DV, DV_PADDED, TMA, BOUNDED)
    accumulator = tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision=PRECISION)
    return (accumulator, total, top)


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, captured, seed, summary, lead_sizes,
    q_strides, k_strides, v_strides, out_strides, captured_strides, summary_strides,
    scale, dropout_p, q_length, k_length,
    LOGITS: tl.constexpr, MASK: tl.constexpr, OPAQUE: tl.constexpr, SINK: tl.constexpr, KEY_RANGE: tl.constexpr,
    PLAIN: tl.constexpr, MAY_BE_EMPTY: tl.constexpr, EMPTY_IS_ZERO: tl.constexpr, UNBOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr, SUMMARY: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_Q`` rows of one head. The grid is ``[heads * tiles]``, the last tile of a head first.

    Args:
        q: ``[*lead, Q, D]``; k: ``[*lead, K, D]``; v: ``[*lead, K, DV]``; pointers, or descriptors if ``TMA``.
        out: pointer, ``[*lead, Q, DV]``; lse: pointer, float32 ``[*lead, Q]``, contiguous.
        captured: tuple of pointers; seed: pointer to int64 ``[1]`` or None; lead_sizes: four sizes.
        *_strides: see ``locate``; captured_strides: six strides for each captured tensor.
        LOGITS, MASK, OPAQUE, SINK, KEY_RANGE: functions of ``attention_program.TileProgram``.
        PLAIN: logits are the scaled scores and scale is positive, so that scaling moves into the exponent.
        summary, SUMMARY: see ``tile_range``; None without; ``summary_strides`` as those of a captured tensor.
        HEAD, TAIL: whether masked tiles may come before, after the full ones.
        EVEN_Q, EVEN_K: whether blocks divide the lengths.
    """
    scale = tl.cast(scale, tl.float32)
    tiles = tl.cdiv(q_length, BLOCK_Q)
    program = tl.program_id(0)
    head = program // tiles
    first_row = (tiles - 1 - program % tiles) * BLOCK_Q
    lead = split_index(head, lead_sizes)
    rows = first_row + tl.arange(0, BLOCK_Q)
    row_ok = rows < q_length
    q_tile = load_tile(
        q, locate(q, lead, q_strides, TMA), q_strides, first_row, q_length, BLOCK_Q, D, D_PADDED, TMA, not EVEN_Q
    )
    k_head = locate(k, lead, k_strides, TMA)
    v_head = locate(v, lead, v_strides, TMA)
    if DROPOUT:
        dropout_p = tl.cast(dropout_p, tl.float32)
        seed = tl.load(seed)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    if SINK is not None:
        top = tl.zeros([BLOCK_Q], tl.float32) + SINK(
            rows, rows, row_ok, row_ok, row_ok, lead, q_length, k_length, captured, captured_strides
        )
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    state = (tl.zeros([BLOCK_Q, DV_PADDED], tl.float32), total, top)
    tile_entries = summary
    if SUMMARY is not None:
        tile_entries += offset_of(lead, summary_strides) + first_row // BLOCK_Q * summary_strides[4]
    begin, full_begin, full_end, end = tile_range(
        KEY_RANGE, first_row, tl.minimum(first_row + BLOCK_Q, q_length) - 1, k_length, rows[:, None], row_ok[:, None],
        lead, q_length, k_length, captured, captured_strides,
        tile_entries, summary_strides[5], SUMMARY, BLOCK_K,
    )  # fmt: skip
    if HEAD:
        for start in range(begin, full_begin, BLOCK_K):
            state = _visit(
                state, q_tile, k, v, k_head, v_head, start, first_row, captured, seed, lead, lead_sizes,
                k_strides, v_strides, captured_strides, scale, dropout_p, q_length, k_length,
                LOGITS, MASK, MAY_BE_EMPTY, UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA, PRECISION,
                not EVEN_K, EVEN_Q, D, D_PADDED, DV, DV_PADDED, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    for start in range(full_begin, full_end, BLOCK_K):
        state = _visit(
            state, q_tile, k, v, k_head, v_head, start, first_row, captured, seed, lead, lead_sizes,
            k_strides, v_strides, captured_strides, scale, dropout_p, q_length, k_length,
            LOGITS, OPAQUE, MAY_BE_EMPTY, UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA, PRECISION,
            False, EVEN_Q, D, D_PADDED, DV, DV_PADDED, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    if TAIL:
        for start in range(full_end, end, BLOCK_K):
            state = _visit(
                state, q_tile, k, v, k_head, v_head, start, first_row, captured, seed, lead, lead_sizes,
                k_strides, v_strides, captured_strides, scale, dropout_p, q_length, k_length,
                LOGITS, MASK, MAY_BE_EMPTY, UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA, PRECISION,
                not EVEN_K, EVEN_Q, D, D_PADDED, DV, DV_PADDED, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    accumulator, total, top = state
    denominator = tl.where(total == 0.0, 1.0, total) if EMPTY_IS_ZERO else total
    if DROPOUT:
        denominator *= tl.where(dropout_p < 1.0, 1.0 - dropout_p, 1.0)
    tl.store(
        lse + tl.cast(head, tl.int64) * q_length + rows, (top * scale if PLAIN else top) + tl.log(total), mask=row_ok
    )
    store_tile(
        out + offset_of(lead, out_strides), out_strides, first_row, q_length,
        accumulator * (1.0 / denominator)[:, None], BLOCK_Q, DV, DV_PADDED,
    )  # fmt: skip
