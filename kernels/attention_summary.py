"""Which tiles a mask needs that only its tensors know: a pass over the mask before attention, without the scores.

For masks with terms that interval arithmetic cannot bound (documents, arbitrary boolean masks), one small program per
tile evaluates the mask and notes whether none, some or all of its elements take part. The attention kernels then visit
the tiles between the first and the last one needed, and leave out the mask in the first run of full tiles.
"""

import triton
import triton.language as tl

from vbcompile.kernels.attention_blocks import offset_of, split_index, tile_range
from vbcompile.kernels.attention_decode import let_next_start


@triton.jit
def mask_summary_kernel(
    summary, captured, lead_sizes, captured_strides, q_length, k_length,
    MASK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one tile's entry of ``summary``, uint8 ``[*lead of the mask, tiles of rows, tiles of columns]``: 0 if none
    of its elements takes part, 1 if some do, 2 if all.

    The grid is ``[entries]``. Rows beyond the last count for nothing; tiles that reach beyond the last column are never
    full.
    """
    columns = tl.cdiv(k_length, BLOCK_K)
    rows = tl.cdiv(q_length, BLOCK_Q)
    entry = tl.program_id(0)
    lead = split_index(entry // columns // rows, lead_sizes)
    i = (entry // columns % rows * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
    j = (entry % columns * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    i_ok = i < q_length
    j_ok = j < k_length
    ok = i_ok & j_ok
    keep = MASK(0.0, i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, captured_strides)
    some = tl.max((keep & ok).to(tl.int32))
    every = tl.min(((keep & j_ok) | (i >= q_length)).to(tl.int32))
    tl.store(summary + entry, (some + every * some).to(tl.uint8))


@triton.jit
def _within_bounds(
    begin, full_begin, full_end, end, first_row, lead, captured, captured_strides, q_length, k_length,
    BOUNDS: tl.constexpr, BY_KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A range of tiles of keys (BY_KEYS: of queries, of a tile of keys) narrowed to those where the bounded terms may
    hold, the first run of tiles in ``[full_begin, full_end)`` where they hold for all elements, and the first such run
    anywhere."""
    OWN: tl.constexpr = BLOCK_K if BY_KEYS else BLOCK_Q
    OTHER: tl.constexpr = BLOCK_Q if BY_KEYS else BLOCK_K
    LANES: tl.constexpr = min(OTHER, 32)
    limit = q_length if BY_KEYS else k_length
    last_row = tl.minimum(first_row + OWN, k_length if BY_KEYS else q_length) - 1
    i = tl.minimum(first_row + tl.arange(0, OWN), last_row)
    first = end
    last = begin
    full_first = end
    full_last = end
    sure_first = end
    sure_last = end
    for start in range(begin, end, TILES):
        tiles = start + tl.arange(0, TILES)
        column_first = tl.minimum(tiles * OTHER, limit - 1)
        column_last = tl.minimum(tiles * OTHER + OTHER, limit) - 1
        # Triton deals the first axis to neighbouring threads and the second to warps: a warp reads neighbours, and most
        # of a tile's minimum is taken by single threads.
        inside = tl.arange(0, LANES)[:, None, None] + LANES * tl.arange(0, OTHER // LANES)[None, None, :]
        j = tl.minimum(tiles[None, :, None] * OTHER + inside, limit - 1)
        if BY_KEYS:
            some, every = BOUNDS(
                column_first, column_last, first_row, last_row, j, i, None, None,
                lead, q_length, k_length, captured, captured_strides,
            )  # fmt: skip
        else:
            some, every = BOUNDS(
                first_row, last_row, column_first, column_last, i, j, None, None,
                lead, q_length, k_length, captured, captured_strides,
            )  # fmt: skip
        some = (tiles < end) & some
        every = (tiles < end) & every
        full = (tiles >= full_begin) & (tiles < full_end) & every
        first = tl.minimum(first, tl.min(tl.where(some, tiles, end)))
        last = tl.maximum(last, tl.max(tl.where(some, tiles + 1, begin)))
        full_first = tl.minimum(full_first, tl.min(tl.where(full, tiles, end)))
        full_last = tl.minimum(full_last, tl.min(tl.where((full == 0) & (tiles > full_first), tiles, end)))
        sure_first = tl.minimum(sure_first, tl.min(tl.where(every, tiles, end)))
        sure_last = tl.minimum(sure_last, tl.min(tl.where((every == 0) & (tiles > sure_first), tiles, end)))
    return (
        tl.minimum(first, last), full_first, tl.maximum(full_last, full_first), last,
        sure_first, tl.maximum(sure_last, sure_first),
    )  # fmt: skip


@triton.jit
def tile_plan_kernel(
    plan, summary, captured, lead_sizes, captured_strides, summary_strides, q_length, k_length,
    RANGE: tl.constexpr, BOUNDS: tl.constexpr, SUMMARY: tl.constexpr, OPAQUE: tl.constexpr, EXACT: tl.constexpr,
    BY_KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write one entry of ``plan``, int32 ``[*lead of the mask, tiles of rows, 8]``: first tile of keys to visit; first
    and end of those where all elements take part; end; first and end of those where the terms that ``RANGE`` does
    not cover hold; nothing; 0, for kernels that count. Never none to visit: rows without keys get one masked tile.
    BY_KEYS: the same with rows and keys exchanged.

    The grid is ``[heads of the mask * tiles of rows]``. OPAQUE: the mask has terms that ``RANGE`` does not cover and
    nobody summed up, so that no tile may go without it. BOUNDS: ``tile_bounds`` of the program, TILES at a time.
    EXACT: whether the caller checks all else that ``RANGE`` covers row by row. EARLY: the kernel that uses the plan may
    be started at once, and waits.
    """
    if EARLY:
        let_next_start()
    OWN: tl.constexpr = BLOCK_K if BY_KEYS else BLOCK_Q
    OTHER: tl.constexpr = BLOCK_Q if BY_KEYS else BLOCK_K
    own_length = k_length if BY_KEYS else q_length
    limit = q_length if BY_KEYS else k_length
    number = tl.program_id(0) % tl.cdiv(own_length, OWN)
    lead = split_index(tl.program_id(0) // tl.cdiv(own_length, OWN), lead_sizes)
    first_row = number * OWN
    rows = (first_row + tl.arange(0, OWN))[:, None]
    entries = summary
    if SUMMARY is not None:
        entries += offset_of(lead, summary_strides) + number * summary_strides[5 if BY_KEYS else 4]
    begin, full_begin, full_end, end = tile_range(
        RANGE, first_row, tl.minimum(first_row + OWN, own_length) - 1, limit, rows, rows < own_length,
        lead, q_length, k_length, captured, captured_strides,
        entries, summary_strides[4 if BY_KEYS else 5], SUMMARY, OTHER,
    )  # fmt: skip
    begin = tl.minimum(begin // OTHER, tl.cdiv(limit, OTHER) - 1)
    end = tl.cdiv(end, OTHER)
    full_begin //= OTHER
    full_end //= OTHER
    sure_first = full_begin
    sure_last = full_end
    if BOUNDS is not None:
        begin, full_begin, full_end, end, sure_first, sure_last = _within_bounds(
            begin, full_begin, full_end, end, first_row, lead, captured, captured_strides, q_length, k_length,
            BOUNDS, BY_KEYS, BLOCK_Q, BLOCK_K, TILES,
        )  # fmt: skip
    end = tl.maximum(end, begin + 1)
    if not EXACT:
        sure_first = full_begin
        sure_last = full_end
    if OPAQUE:
        full_begin = 0
        full_end = 0
        sure_first = 0
        sure_last = 0
    place = plan + tl.cast(tl.program_id(0), tl.int64) * 8
    tl.store(place, begin)
    tl.store(place + 1, full_begin)
    tl.store(place + 2, full_end)
    tl.store(place + 3, end)
    tl.store(place + 4, sure_first)
    tl.store(place + 5, sure_last)
    tl.store(place + 7, 0)
