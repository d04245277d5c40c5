"""Flash attention backward in Triton: gradients of queries by tiles of rows, of keys and values by columns.

Weights are recomputed from the logarithm of the row sums (Dao, arXiv 2307.08691). With
``delta = rowsum(dO * O) - dlse`` the gradient of the logits is ``weights * (dO V^T - delta)``; the score function's own
derivative is compiled in. Both kernels work without exchange between programs, so results do not depend on their order;
only sums over captured tensors that several tiles share use atomic additions.
"""

import triton
import triton.language as tl

from vbcompile.kernels.attention_blocks import (
    LOG2E,
    add_indices,
    join_index,
    keep_weights,
    load_tile,
    locate,
    offset_of,
    split_index,
    store_tile,
    tile_range,
)


@triton.jit
def _weights(
    score, lse, low, i, j, i_ok, j_ok, ok, lead, captured, captured_strides, scale, q_length, k_length,
    LOGITS: tl.constexpr, PLAIN: tl.constexpr, UNBOUNDED: tl.constexpr,
):  # fmt: skip
    """Softmax weights of a tile of scores (scaled unless ``PLAIN``), masked elements not yet taken out."""
    logits = score
    if LOGITS is not None:
        logits = LOGITS(score, i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, captured_strides)
    if UNBOUNDED:
        weights = tl.exp2((logits - lse) * LOG2E - low)
    else:
        weights = tl.exp2(logits * (scale * LOG2E if PLAIN else LOG2E) - lse * LOG2E)
    return weights


@triton.jit
def _keep(
    score, i, j, i_ok, j_ok, ok, lead, captured, captured_strides, q_length, k_length,
    MASK: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile exist (asked if ``BOUNDED``) and are not masked."""
    if MASK is None:
        keep = ok
    else:
        keep = MASK(score, i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, captured_strides)
        if BOUNDED:
            keep = keep & ok
    return keep


@triton.jit
def attention_rows_kernel(
    q, k, out, grad_out, grad_lse, lse, delta, low, empty, captured, gradients, lead_sizes,
    q_strides, k_strides, out_strides, grad_out_strides, captured_strides, gradient_strides,
    scale, q_length, k_length,
    LOGITS: tl.constexpr, MASK: tl.constexpr, SINK: tl.constexpr, SINK_STEP: tl.constexpr,
    REFINE_ABOVE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the backward needs per row. One program: ``BLOCK_Q`` rows of one head; the grid is ``[heads * tiles]``.

    Writes ``delta``; also ``low``, the part of ``lse`` (in base two) that float32 rounds off, computed for tiles with a
    row whose ``|lse|`` is above ``REFINE_ABOVE`` (None: not written); if ``empty`` is given, 1 for heads with a row
    that has no key; gradients of the sink.
    """
    tiles = tl.cdiv(q_length, BLOCK_Q)
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first_row = tile * BLOCK_Q
    lead = split_index(head, lead_sizes)
    rows = first_row + tl.arange(0, BLOCK_Q)
    row_ok = rows < q_length
    out_tile = load_tile(
        out, (out + offset_of(lead, out_strides), 0), out_strides, first_row, q_length,
        BLOCK_Q, DV, DV_PADDED, False, True,
    )  # fmt: skip
    grad_tile = load_tile(
        grad_out, (grad_out + offset_of(lead, grad_out_strides), 0), grad_out_strides, first_row, q_length,
        BLOCK_Q, DV, DV_PADDED, False, True,
    )  # fmt: skip
    difference = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    place = tl.cast(head, tl.int64) * q_length + rows
    if grad_lse is not None:
        difference -= tl.load(grad_lse + place, mask=row_ok, other=0.0)
    tl.store(delta + place, difference, mask=row_ok)
    row_lse = tl.load(lse + place, mask=row_ok, other=0.0)
    if empty is not None:
        tl.atomic_or(empty + head, tl.max((row_lse == float("-inf")).to(tl.int32), 0), sem="relaxed")
    if SINK_STEP is not None:
        sink = SINK(rows, rows, row_ok, row_ok, row_ok, lead, q_length, k_length, captured, captured_strides)
        upstream = -tl.exp2((sink - row_lse) * LOG2E) * difference
        SINK_STEP(
            upstream, tile, rows, rows, row_ok, row_ok, row_ok, lead, q_length, k_length, captured, captured_strides,
            gradients, gradient_strides,
        )  # fmt: skip
    if REFINE_ABOVE is not None:
        correction = tl.zeros([BLOCK_Q], tl.float32)
        finite = tl.abs(row_lse) != float("inf")
        if tl.max(tl.where(finite, tl.abs(row_lse), 0.0), 0) > REFINE_ABOVE:
            correction = _row_correction(
                q, k, row_lse, first_row, lead, captured, q_strides, k_strides, captured_strides,
                tl.cast(scale, tl.float32), q_length, k_length, LOGITS, MASK, SINK, PRECISION,
                D, D_PADDED, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        tl.store(low + place, tl.where(finite, correction, 0.0), mask=row_ok)


@triton.jit
def _row_correction(
    q, k, row_lse, first_row, lead, captured, q_strides, k_strides, captured_strides, scale, q_length, k_length,
    LOGITS: tl.constexpr, MASK: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Base-two logarithm of ``sum exp(logits - lse)``, which is zero but for the rounding of ``lse``."""
    rows = first_row + tl.arange(0, BLOCK_Q)
    row_ok = rows < q_length
    q_tile = load_tile(
        q, (q + offset_of(lead, q_strides), 0), q_strides, first_row, q_length, BLOCK_Q, D, D_PADDED, False, True
    )
    total = tl.zeros([BLOCK_Q], tl.float32)
    if SINK is not None:
        sink = SINK(rows, rows, row_ok, row_ok, row_ok, lead, q_length, k_length, captured, captured_strides)
        total += tl.exp2((sink - row_lse) * LOG2E)
    for start in range(0, k_length, BLOCK_K):
        k_tile = load_tile(
            k, (k + offset_of(lead, k_strides), 0), k_strides, start, k_length, BLOCK_K, D, D_PADDED, False, True
        )
        j = (start + tl.arange(0, BLOCK_K))[None, :]
        j_ok = j < k_length
        i_ok = row_ok[:, None]
        i = rows[:, None]
        ok = i_ok & j_ok
        score = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale
        weights = _weights(
            score, row_lse[:, None], 0.0, i, j, i_ok, j_ok, ok, lead, captured, captured_strides, scale,
            q_length, k_length, LOGITS, False, True,
        )  # fmt: skip
        keep = _keep(
            score, i, j, i_ok, j_ok, ok, lead, captured, captured_strides, q_length, k_length, MASK, True
        )  # fmt: skip
        weights = tl.where(keep, weights, 0.0)
        total += tl.sum(weights, 1)
    return tl.log2(tl.where(total > 0.0, total, 1.0))


@triton.jit
def _rows_of(values, place, ok):
    """A tile's part of a per-row vector; ``+inf`` for rows that do not exist, so that their weights vanish."""
    return tl.load(values + place) if ok is None else tl.load(values + place, mask=ok, other=float("inf"))


@triton.jit
def _visit_keys(
    state, q_tile, grad_tile, lse, low, delta, k, v, k_head, v_head, start, first_row, captured, gradients, seed, lead,
    lead_sizes, k_strides, v_strides, captured_strides, gradient_strides, scale, dropout_p, q_length, k_length,
    LOGITS: tl.constexpr, MASK: tl.constexpr, STEP: tl.constexpr, UNBOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PLAIN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr, EVEN_Q: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the keys ``start ..`` to ``state = (gradient of the rows' queries, sums for captured tensors)``."""
    grad_q, sums = state
    k_tile = load_tile(k, k_head, k_strides, start, k_length, BLOCK_K, D, D_PADDED, TMA, BOUNDED)
    v_tile = load_tile(v, v_head, v_strides, start, k_length, BLOCK_K, DV, DV_PADDED, TMA, BOUNDED)
    i = (first_row + tl.arange(0, BLOCK_Q))[:, None]
    j = (start + tl.arange(0, BLOCK_K))[None, :]
    i_ok = None if EVEN_Q else i < q_length
    j_ok = j < k_length if BOUNDED else None
    if EVEN_Q:
        ok = j_ok
    else:
        ok = i_ok & j_ok if BOUNDED else i_ok
    score = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
    if not PLAIN:
        score *= scale
    weights = _weights(
        score, lse[:, None], low[:, None], i, j, i_ok, j_ok, ok, lead, captured, captured_strides, scale,
        q_length, k_length, LOGITS, PLAIN, UNBOUNDED,
    )  # fmt: skip
    if MASK is not None or ok is not None:
        keep = _keep(
            score, i, j, i_ok, j_ok, ok, lead, captured, captured_strides, q_length, k_length, MASK, ok is not None
        )
        weights = tl.where(keep, weights, 0.0)
    else:
        keep = None
    grad_weights = tl.dot(grad_tile, v_tile.T, input_precision=PRECISION)
    if DROPOUT:
        kept = keep_weights(seed, dropout_p, join_index(lead, lead_sizes), i, j, q_length, k_length, WIDE)
        grad_weights = tl.where(kept, grad_weights / (1.0 - dropout_p), 0.0)
    upstream = weights * (grad_weights - delta[:, None])
    grad_score, sums = STEP(
        sums, score, upstream, keep, i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, captured_strides,
        gradients, gradient_strides,
    )  # fmt: skip
    grad_q = tl.dot(grad_score.to(k_tile.dtype), k_tile, grad_q, input_precision=PRECISION)
    return (grad_q, sums)


@triton.jit
def attention_grad_q_kernel(
    q, k, v, grad_out, grad_q, lse, delta, low, captured, gradients, seed, summary, lead_sizes,
    q_strides, k_strides, v_strides, grad_out_strides, grad_q_strides, captured_strides, gradient_strides,
    summary_strides, scale, dropout_p, q_length, k_length,
    LOGITS: tl.constexpr, MASK: tl.constexpr, OPAQUE: tl.constexpr, KEY_RANGE: tl.constexpr,
    STEP: tl.constexpr, FINISH: tl.constexpr, SUMS: tl.constexpr,
    PLAIN: tl.constexpr, EMPTY_IS_ZERO: tl.constexpr, UNBOUNDED: tl.constexpr, DROPOUT: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr, SUMMARY: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries and of captured tensors without columns or with rows and columns.

    One program: ``BLOCK_Q`` rows of one head. The grid is ``[heads * tiles]``, the last tile of a head first.
    Arguments as for the forward kernel; ``gradients``: tuple of float32 pointers, zero at first; ``STEP``, ``FINISH``:
    ``row_step``, ``row_finish`` of ``TileProgram``, which carry ``SUMS`` vectors.
    """
    scale = tl.cast(scale, tl.float32)
    tiles = tl.cdiv(q_length, BLOCK_Q)
    program = tl.program_id(0)
    head = program // tiles
    tile = tiles - 1 - program % tiles
    first_row = tile * BLOCK_Q
    lead = split_index(head, lead_sizes)
    rows = first_row + tl.arange(0, BLOCK_Q)
    row_ok = rows < q_length
    q_tile = load_tile(
        q, locate(q, lead, q_strides, TMA), q_strides, first_row, q_length, BLOCK_Q, D, D_PADDED, TMA, not EVEN_Q
    )
    grad_tile = load_tile(
        grad_out, locate(grad_out, lead, grad_out_strides, TMA), grad_out_strides, first_row, q_length,
        BLOCK_Q, DV, DV_PADDED, TMA, not EVEN_Q,
    )  # fmt: skip
    place = tl.cast(head, tl.int64) * q_length + rows
    exists = None if EVEN_Q else row_ok
    row_lse = _rows_of(lse, place, exists)
    if EMPTY_IS_ZERO:
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    row_delta = tl.load(delta + place, mask=row_ok, other=0.0)
    row_low = tl.load(low + place, mask=row_ok, other=0.0) if UNBOUNDED else row_delta
    k_head = locate(k, lead, k_strides, TMA)
    v_head = locate(v, lead, v_strides, TMA)
    if DROPOUT:
        dropout_p = tl.cast(dropout_p, tl.float32)
        seed = tl.load(seed)
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros([BLOCK_Q, 1], tl.float32),)  # noqa: RUF005
    state = (tl.zeros([BLOCK_Q, D_PADDED], tl.float32), sums)
    tile_entries = summary
    if SUMMARY is not None:
        tile_entries += offset_of(lead, summary_strides) + tile * summary_strides[4]
    begin, full_begin, full_end, end = tile_range(
        KEY_RANGE, first_row, tl.minimum(first_row + BLOCK_Q, q_length) - 1, k_length, rows[:, None], row_ok[:, None],
        lead, q_length, k_length, captured, captured_strides,
        tile_entries, summary_strides[5], SUMMARY, BLOCK_K,
    )  # fmt: skip
    if HEAD:
        for start in range(begin, full_begin, BLOCK_K):
            state = _visit_keys(
                state, q_tile, grad_tile, row_lse, row_low, row_delta, k, v, k_head, v_head, start, first_row,
                captured, gradients, seed, lead, lead_sizes, k_strides, v_strides, captured_strides, gradient_strides,
                scale, dropout_p, q_length, k_length, LOGITS, MASK, STEP, UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA,
                PRECISION, not EVEN_K, EVEN_Q, D, D_PADDED, DV, DV_PADDED, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    for start in range(full_begin, full_end, BLOCK_K):
        state = _visit_keys(
            state, q_tile, grad_tile, row_lse, row_low, row_delta, k, v, k_head, v_head, start, first_row,
            captured, gradients, seed, lead, lead_sizes, k_strides, v_strides, captured_strides, gradient_strides,
            scale, dropout_p, q_length, k_length, LOGITS, OPAQUE, STEP, UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA,
            PRECISION, False, EVEN_Q, D, D_PADDED, DV, DV_PADDED, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    if TAIL:
        for start in range(full_end, end, BLOCK_K):
            state = _visit_keys(
                state, q_tile, grad_tile, row_lse, row_low, row_delta, k, v, k_head, v_head, start, first_row,
                captured, gradients, seed, lead, lead_sizes, k_strides, v_strides, captured_strides, gradient_strides,
                scale, dropout_p, q_length, k_length, LOGITS, MASK, STEP, UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA,
                PRECISION, not EVEN_K, EVEN_Q, D, D_PADDED, DV, DV_PADDED, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    accumulator, sums = state
    i = rows[:, None]
    i_ok = row_ok[:, None]
    FINISH(
        sums, tile, i, i, i_ok, i_ok, i_ok, lead, q_length, k_length, captured, captured_strides,
        gradients, gradient_strides,
    )  # fmt: skip
    if grad_q is not None:
        store_tile(
            grad_q + offset_of(lead, grad_q_strides), grad_q_strides, first_row, q_length, accumulator * scale,
            BLOCK_Q, D, D_PADDED,
        )  # fmt: skip


@triton.jit
def _visit_queries(
    state, k_tile, v_tile, q, grad_out, q_head, grad_head, lse, low, delta, start, first_column, captured, gradients,
    seed, lead, lead_sizes, q_strides, grad_out_strides, captured_strides, gradient_strides, scale, dropout_p,
    q_length, k_length,
    LOGITS: tl.constexpr, MASK: tl.constexpr, STEP: tl.constexpr, EMPTY_IS_ZERO: tl.constexpr, UNBOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PLAIN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr, EVEN_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the rows ``start ..`` to ``state = (gradients of keys and values, sums for captured tensors)``.

    Tiles of scores are ``[BLOCK_K, BLOCK_Q]`` here, so that weights are the left operand of both last products.
    """
    grad_k, grad_v, sums = state
    q_tile = load_tile(q, q_head, q_strides, start, q_length, BLOCK_Q, D, D_PADDED, TMA, BOUNDED)
    grad_tile = load_tile(grad_out, grad_head, grad_out_strides, start, q_length, BLOCK_Q, DV, DV_PADDED, TMA, BOUNDED)
    rows = start + tl.arange(0, BLOCK_Q)
    i = rows[None, :]
    j = (first_column + tl.arange(0, BLOCK_K))[:, None]
    i_ok = i < q_length if BOUNDED else None
    j_ok = None if EVEN_K else j < k_length
    if EVEN_K:
        ok = i_ok
    else:
        ok = i_ok & j_ok if BOUNDED else j_ok
    place = tl.cast(join_index(lead, lead_sizes), tl.int64) * q_length + rows
    exists = rows < q_length if BOUNDED else None
    row_lse = _rows_of(lse, place, exists)
    if EMPTY_IS_ZERO:
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    row_low = tl.load(low + place, mask=exists) if UNBOUNDED else row_lse
    score = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
    if not PLAIN:
        score *= scale
    weights = _weights(
        score, row_lse[None, :], row_low[None, :], i, j, i_ok, j_ok, ok, lead, captured, captured_strides, scale,
        q_length, k_length, LOGITS, PLAIN, UNBOUNDED,
    )  # fmt: skip
    if MASK is not None or ok is not None:
        keep = _keep(
            score, i, j, i_ok, j_ok, ok, lead, captured, captured_strides, q_length, k_length, MASK, ok is not None
        )
        weights = tl.where(keep, weights, 0.0)
    else:
        keep = None
    grad_weights = tl.dot(v_tile, grad_tile.T, input_precision=PRECISION)
    row_delta = tl.load(delta + place, mask=exists)
    dropped = weights
    if DROPOUT:
        kept = keep_weights(seed, dropout_p, join_index(lead, lead_sizes), i, j, q_length, k_length, WIDE)
        dropped = tl.where(kept, weights / (1.0 - dropout_p), 0.0)
    grad_v = tl.dot(dropped.to(grad_tile.dtype), grad_tile, grad_v, input_precision=PRECISION)
    if DROPOUT:
        grad_weights = tl.where(kept, grad_weights / (1.0 - dropout_p), 0.0)
    upstream = weights * (grad_weights - row_delta[None, :])
    grad_score, sums = STEP(
        sums, score, upstream, keep, i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, captured_strides,
        gradients, gradient_strides,
    )  # fmt: skip
    grad_k = tl.dot(grad_score.to(q_tile.dtype), q_tile, grad_k, input_precision=PRECISION)
    return (grad_k, grad_v, sums)


@triton.jit
def attention_grad_kv_kernel(
    q, k, v, grad_out, grad_k, grad_v, lse, delta, low, empty, captured, gradients, seed, summary,
    lead_sizes, outer_sizes, group_sizes,
    q_strides, k_strides, v_strides, grad_out_strides, grad_k_strides, grad_v_strides, captured_strides,
    gradient_strides, summary_strides, scale, dropout_p, q_length, k_length,
    LOGITS: tl.constexpr, MASK: tl.constexpr, OPAQUE: tl.constexpr, QUERY_RANGE: tl.constexpr,
    STEP: tl.constexpr, FINISH: tl.constexpr, SUMS: tl.constexpr,
    PLAIN: tl.constexpr, EMPTY_IS_ZERO: tl.constexpr, UNBOUNDED: tl.constexpr, DROPOUT: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr, SUMMARY: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, values and captured tensors with columns but no rows.

    One program: ``BLOCK_K`` columns of one head of k and v; it visits the rows of every head of q that reads them, so
    that grouped queries need no sum afterwards. The grid is ``[heads of k and v * tiles]``. ``outer_sizes`` are the
    leading sizes of k and v, ``group_sizes`` those along which both are broadcast; elsewhere they are 1.
    """
    scale = tl.cast(scale, tl.float32)
    tiles = tl.cdiv(k_length, BLOCK_K)
    tile = tl.program_id(0) % tiles
    first_column = tile * BLOCK_K
    outer = split_index(tl.program_id(0) // tiles, outer_sizes)
    columns = first_column + tl.arange(0, BLOCK_K)
    column_ok = columns < k_length
    k_tile = load_tile(
        k, locate(k, outer, k_strides, TMA), k_strides, first_column, k_length, BLOCK_K, D, D_PADDED, TMA, not EVEN_K
    )
    v_tile = load_tile(
        v, locate(v, outer, v_strides, TMA), v_strides, first_column, k_length, BLOCK_K, DV, DV_PADDED, TMA, not EVEN_K
    )
    if DROPOUT:
        dropout_p = tl.cast(dropout_p, tl.float32)
        seed = tl.load(seed)
    grad_k_tile = tl.zeros([BLOCK_K, D_PADDED], tl.float32)
    grad_v_tile = tl.zeros([BLOCK_K, DV_PADDED], tl.float32)
    poison = 0.0
    j = columns[:, None]
    j_ok = column_ok[:, None]
    for member in range(group_sizes[0] * group_sizes[1] * group_sizes[2] * group_sizes[3]):
        lead = add_indices(outer, split_index(member, group_sizes))
        sums = ()
        for _ in tl.static_range(SUMS):
            sums = sums + (tl.zeros([BLOCK_K, 1], tl.float32),)  # noqa: RUF005
        state = (grad_k_tile, grad_v_tile, sums)
        q_head = locate(q, lead, q_strides, TMA)
        grad_head = locate(grad_out, lead, grad_out_strides, TMA)
        tile_entries = summary
        if SUMMARY is not None:
            tile_entries += offset_of(lead, summary_strides) + tile * summary_strides[5]
        begin, full_begin, full_end, end = tile_range(
            QUERY_RANGE, first_column, tl.minimum(first_column + BLOCK_K, k_length) - 1, q_length, j, j_ok,
            lead, q_length, k_length, captured, captured_strides,
            tile_entries, summary_strides[4], SUMMARY, BLOCK_Q,
        )  # fmt: skip
        if HEAD:
            for start in range(begin, full_begin, BLOCK_Q):
                state = _visit_queries(
                    state, k_tile, v_tile, q, grad_out, q_head, grad_head, lse, low, delta, start, first_column,
                    captured, gradients, seed, lead, lead_sizes, q_strides, grad_out_strides, captured_strides,
                    gradient_strides, scale, dropout_p, q_length, k_length, LOGITS, MASK, STEP, EMPTY_IS_ZERO,
                    UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA, PRECISION, not EVEN_Q, EVEN_K, D, D_PADDED, DV, DV_PADDED,
                    BLOCK_Q, BLOCK_K,
                )  # fmt: skip
        for start in range(full_begin, full_end, BLOCK_Q):
            state = _visit_queries(
                state, k_tile, v_tile, q, grad_out, q_head, grad_head, lse, low, delta, start, first_column,
                captured, gradients, seed, lead, lead_sizes, q_strides, grad_out_strides, captured_strides,
                gradient_strides, scale, dropout_p, q_length, k_length, LOGITS, OPAQUE, STEP, EMPTY_IS_ZERO,
                UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA, PRECISION, False, EVEN_K, D, D_PADDED, DV, DV_PADDED,
                BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        if TAIL:
            for start in range(full_end, end, BLOCK_Q):
                state = _visit_queries(
                    state, k_tile, v_tile, q, grad_out, q_head, grad_head, lse, low, delta, start, first_column,
                    captured, gradients, seed, lead, lead_sizes, q_strides, grad_out_strides, captured_strides,
                    gradient_strides, scale, dropout_p, q_length, k_length, LOGITS, MASK, STEP, EMPTY_IS_ZERO,
                    UNBOUNDED, DROPOUT, WIDE, PLAIN, TMA, PRECISION, not EVEN_Q, EVEN_K, D, D_PADDED, DV, DV_PADDED,
                    BLOCK_Q, BLOCK_K,
                )  # fmt: skip
        grad_k_tile, grad_v_tile, sums = state
        FINISH(
            sums, tile, j, j, j_ok, j_ok, j_ok, lead, q_length, k_length, captured, captured_strides,
            gradients, gradient_strides,
        )  # fmt: skip
        if empty is not None:
            poison += tl.where(tl.load(empty + join_index(lead, lead_sizes)) != 0, float("nan"), 0.0)
    if empty is not None:
        grad_v_tile += poison
    store_tile(
        grad_k + offset_of(outer, grad_k_strides), grad_k_strides, first_column, k_length, grad_k_tile * scale,
        BLOCK_K, D, D_PADDED,
    )  # fmt: skip
    store_tile(
        grad_v + offset_of(outer, grad_v_strides), grad_v_strides, first_column, k_length, grad_v_tile,
        BLOCK_K, DV, DV_PADDED,
    )  # fmt: skip
