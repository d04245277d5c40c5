"""Parts that the attention kernels share: where a head lies in memory, loading its tiles, ranges, dropout."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def split_index(linear, sizes):
    """Leading indices of a row-major linear index; ``sizes``: four axes."""
    d = linear % sizes[3]
    linear //= sizes[3]
    c = linear % sizes[2]
    linear //= sizes[2]
    return (linear // sizes[1], linear % sizes[1], c, d)


@triton.jit
def add_indices(a, b):
    """Elementwise sum of two tuples of leading indices."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])


@triton.jit
def join_index(lead, sizes):
    """Row-major linear index of leading indices."""
    return ((lead[0] * sizes[1] + lead[1]) * sizes[2] + lead[2]) * sizes[3] + lead[3]


@triton.jit
def offset_of(lead, strides):
    """Elements from the start of a tensor to one head."""
    return (
        tl.cast(lead[0], tl.int64) * strides[0]
        + tl.cast(lead[1], tl.int64) * strides[1]
        + tl.cast(lead[2], tl.int64) * strides[2]
        + tl.cast(lead[3], tl.int64) * strides[3]
    )


@triton.jit
def locate(source, lead, strides, TMA: tl.constexpr):
    """One head of a tensor.

    ``strides`` is, for a pointer, four leading strides, the row's and the column's: the result is the pointer to the
    head. For a two-dimensional descriptor it is four steps of its row and four of its column per leading index: the
    result is the pair of coordinates.
    """
    if TMA:
        row = lead[0] * strides[0] + lead[1] * strides[1] + lead[2] * strides[2] + lead[3] * strides[3]
        column = lead[0] * strides[4] + lead[1] * strides[5] + lead[2] * strides[6] + lead[3] * strides[7]
        return (row, column)
    else:
        return (source + offset_of(lead, strides), 0)


@triton.jit
def load_tile(
    source, head, strides, start, limit,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Rows ``start ..`` of a head, ``[ROWS, PADDED]``; zero beyond ``WIDTH`` and, if ``BOUNDED``, ``limit``."""
    rows = tl.arange(0, ROWS)
    if TMA:
        tile = source.load([head[0] + start, head[1]])
        if BOUNDED:  # the rows after the last one belong to another head
            tile = tl.where((start + rows < limit)[:, None], tile, tl.zeros_like(tile))
    else:
        columns = tl.arange(0, PADDED)
        pointers = (
            head[0] + tl.cast(start, tl.int64) * strides[4] + rows[:, None] * strides[4] + columns[None, :] * strides[5]
        )
        if WIDTH == PADDED:
            if BOUNDED:
                tile = tl.load(pointers, mask=(start + rows < limit)[:, None], other=0.0)
            else:
                tile = tl.load(pointers)
        else:
            exists = (columns < WIDTH)[None, :]
            if BOUNDED:
                exists = exists & (start + rows < limit)[:, None]
            tile = tl.load(pointers, mask=exists, other=0.0)
    return tile


@triton.jit
def store_tile(
    target, strides, start, limit, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Inverse of :func:`load_tile` for a pointer to a head."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    pointers = (
        target + tl.cast(start, tl.int64) * strides[4] + rows[:, None] * strides[4] + columns[None, :] * strides[5]
    )
    exists = (start + rows < limit)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=exists)


@triton.jit
def tile_range(
    RANGE: tl.constexpr, first, last, limit, i, i_ok, lead, q_length, k_length, captured, strides,
    summary, summary_step, SUMMARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``(begin, full_begin, full_end, end)``: tiles to visit are ``[begin, end)``, all in multiples of ``BLOCK`` but
    the end; those in ``[full_begin, full_end)`` need no check of the mask's bounds nor of the limit.

    From the mask's bounds; or, if ``SUMMARY`` (the number of its entries rounded up to a power of two) is given, from
    the entries at ``summary``, ``summary_step`` apart, that ``mask_summary_kernel`` wrote.
    """
    if SUMMARY is not None:
        begin, full_begin, full_end, end = _summary_range(summary, summary_step, limit, SUMMARY, BLOCK)
    elif RANGE is None:
        begin = 0
        full_begin = 0
        full_end = (limit // BLOCK) * BLOCK
        end = limit
    else:
        begin, full_begin, full_end, end = RANGE(
            first, last, limit, i, i_ok, lead, q_length, k_length, captured, strides
        )
        end = tl.maximum(tl.minimum(end, limit), 0)
        begin = tl.minimum(tl.maximum(begin, 0), end) // BLOCK * BLOCK
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_begin = (full_begin + BLOCK - 1) // BLOCK * BLOCK
        full_end = tl.maximum(tl.minimum(full_end, end), 0) // BLOCK * BLOCK
        full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _summary_range(summary, step, limit, SUMMARY: tl.constexpr, BLOCK: tl.constexpr):
    """From the first to the last tile that is needed; full: the first run of tiles whose elements all take part."""
    tiles = tl.cdiv(limit, BLOCK)
    place = tl.arange(0, SUMMARY)
    entries = tl.load(summary + place * step, mask=place < tiles, other=0)
    first = tl.min(tl.where(entries != 0, place, tiles), 0)
    last = tl.max(tl.where(entries != 0, place + 1, 0), 0)
    full_first = tl.min(tl.where(entries == 2, place, tiles), 0)
    full_last = tl.min(tl.where((entries != 2) & (place > full_first), place, tiles), 0)
    end = tl.minimum(last * BLOCK, limit)
    begin = tl.minimum(first, last) * BLOCK
    full_begin = tl.maximum(tl.minimum(full_first, last) * BLOCK, begin)
    full_end = tl.maximum(tl.minimum(tl.minimum(full_last, last), limit // BLOCK) * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def keep_weights(seed, dropout_p, head, i, j, q_length, k_length, WIDE: tl.constexpr):
    """Which weights dropout keeps; ``WIDE``: elements are numbered in 64 bits. See ``dropout.py``."""
    if WIDE:
        offset = (tl.cast(head, tl.int64) * q_length + i) * k_length + j
    else:
        offset = (head * q_length + i) * k_length + j
    return tl.rand(seed, offset) > dropout_p


@triton.jit
def softmax_step(accumulator, total, top, logits, factor, MAY_BE_EMPTY: tl.constexpr, UNBOUNDED: tl.constexpr):
    """One step of the online softmax: ``(weights of the tile, accumulator and row sum rescaled, new row maximum)``.

    Weights are ``2 ** (factor * (logits - maximum))``; ``UNBOUNDED`` takes the difference before the product.
    """
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MAY_BE_EMPTY else new_top
    if UNBOUNDED:
        weights = tl.exp2((logits - shift[:, None]) * factor)
        decay = tl.exp2((top - shift) * factor)
    else:
        scaled_shift = shift * factor
        weights = tl.exp2(logits * factor - scaled_shift[:, None])
        decay = tl.exp2(top * factor - scaled_shift)
    return weights, accumulator * decay[:, None], total * decay + tl.sum(weights, 1), new_top
