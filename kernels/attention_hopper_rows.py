"""Before and after the Hopper backward: what it needs per query row, dQ rounded. Plain Triton kernels."""

import triton
import triton.language as tl

from vbcompile.kernels.attention_blocks import split_index


@triton.jit(do_not_specialize=["queries", "padded_queries", "heads"])
def prepare_backward(
    out,
    grad_out,
    lse,
    grad_lse,
    lse_log2,
    delta,
    dq,
    counter,
    queries,
    padded_queries,
    heads,
    out_batch,
    out_head,
    out_row,
    grad_batch,
    grad_head,
    grad_row,
    HAS_GRAD_LSE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """log2(e) lse and delta = rowsum(dO * O) - d lse, ``[B * H, padded Q]``; zeros the sum of dQ and the counter.

    Rows past the end get lse = inf, so that their exponentials vanish.
    """
    if tl.program_id(0) == 0:
        tl.store(counter, 0)
    tiles = padded_queries // ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)
    batch = head // heads
    inner = head - batch * heads
    rows = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    real = rows < queries
    o = tl.load(
        out + batch * out_batch + inner * out_head + rows[:, None] * out_row + columns[None, :],
        mask=real[:, None],
        other=0.0,
    ).to(tl.float32)
    g = tl.load(
        grad_out + batch * grad_batch + inner * grad_head + rows[:, None] * grad_row + columns[None, :],
        mask=real[:, None],
        other=0.0,
    ).to(tl.float32)
    value = tl.sum(o * g, 1)
    if HAS_GRAD_LSE:
        value -= tl.load(grad_lse + head * queries + rows, mask=real, other=0.0)
    padded = head * padded_queries + rows
    tl.store(delta + padded, value)
    tl.store(
        lse_log2 + padded, tl.load(lse + head * queries + rows, mask=real, other=float("inf")) * 1.4426950408889634
    )
    tl.store(dq + padded[:, None] * D + columns[None, :], tl.zeros([ROWS, D], tl.float32))


@triton.jit(do_not_specialize=["queries", "padded_queries", "heads"])
def finish_backward(
    total, dq, scale, queries, padded_queries, heads, dq_batch, dq_head, dq_row, D: tl.constexpr, ROWS: tl.constexpr
):
    """dQ = scale * float32 sum, rounded once."""
    tiles = padded_queries // ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)
    batch = head // heads
    inner = head - batch * heads
    rows = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    value = tl.load(total + (head * padded_queries + rows)[:, None] * D + columns[None, :])
    place = dq + batch * dq_batch + inner * dq_head + rows[:, None] * dq_row + columns[None, :]
    tl.store(place, (value * scale).to(dq.dtype.element_ty), mask=rows[:, None] < queries)


@triton.jit(do_not_specialize=["queries", "keys", "padded_queries"])
def prepare_scores(
    lse,
    row_delta,
    row_low,
    lse_out,
    low_tiles,
    delta,
    dq,
    counter,
    captured,
    captured_strides,
    lead_sizes,
    outer,
    queries,
    keys,
    padded_queries,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    UNBOUNDED: tl.constexpr,
    EMPTY_IS_ZERO: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Per row what ``weigh_tile`` subtracts, less what OFFSET adds to all logits of the row: log2(e) lse; UNBOUNDED:
    lse and the part of it that float32 rounds off, in base two (``[B * H, 1 or 2, padded Q]``, and 1 in ``low_tiles``
    for tiles where any is not zero); delta ``[B * H, padded Q]``. Zeros the sum of dQ and the counter.

    Rows past the end and those without keys (unless UNBOUNDED and not EMPTY_IS_ZERO) get lse = inf, so that their
    exponentials vanish.
    """
    if tl.program_id(0) == 0:
        tl.store(counter, 0)
    tiles = padded_queries // BLOCK_Q
    head = tl.program_id(0) // tiles
    first_row = tl.program_id(0) % tiles * BLOCK_Q
    i = first_row + tl.arange(0, BLOCK_Q)
    real = i < queries
    place = head.to(tl.int64) * queries + i
    padded = head.to(tl.int64) * padded_queries + i
    value = tl.load(lse + place, mask=real, other=float("inf"))
    if EMPTY_IS_ZERO or not UNBOUNDED:
        value = tl.where(value == float("-inf"), float("inf"), value)
    if OFFSET is not None:
        lead = split_index(head, lead_sizes)
        rows = (0,)
        if ROWS is not None:
            rows = ROWS(i, real, lead, captured, captured_strides)
        fi = i.to(tl.float32)
        first = first_row.to(tl.float32)
        added = OFFSET(i, fi, first, rows, lead, queries, keys, captured, captured_strides)
        value = tl.where(real, value - added * outer, value)
    if UNBOUNDED:
        line = head.to(tl.int64) * 2 * padded_queries + i
        tl.store(lse_out + line, value)
        low = tl.load(row_low + place, mask=real, other=0.0)
        tl.store(lse_out + line + padded_queries, low)
        tl.store(low_tiles + tl.program_id(0), tl.max((low != 0.0).to(tl.int32), 0))
    else:
        tl.store(lse_out + padded, value * 1.4426950408889634)
    tl.store(delta + padded, tl.load(row_delta + place, mask=real, other=0.0))
    columns = tl.arange(0, D)
    tl.store(dq + padded[:, None] * D + columns[None, :], tl.zeros([BLOCK_Q, D], tl.float32))
