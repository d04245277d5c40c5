"""Attention of few queries over many keys in Triton: the keys are split between programs, which a second kernel merges.

One program takes the rows of all queries that read one head of k and v (grouped queries become rows of one tile, so
that keys and values are read once) and every so-manieth tile of the keys that the mask needs: what a mask leaves out,
on whichever side, is left out for all programs alike. Parts are merged by their largest logits and sums of weights, as
in Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
"""

import triton
import triton.language as tl

from vbcompile.kernels.attention_blocks import (
    LOG2E,
    add_indices,
    join_index,
    load_tile,
    locate,
    offset_of,
    softmax_step,
    split_index,
)


@triton.jit
def let_next_start():
    """Let a kernel that was launched to start early do so; NVIDIA's, from sm_90 on."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_previous():
    """In a kernel that may have started early: wait for the end of the one before, and for what it wrote."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def needed_tiles(
    begin, end, step, lead, q_length, k_length, captured, captured_strides,
    MASK: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``(first, after last)`` of the tiles at ``begin, begin + step ..`` that a mask needs which is the same for all
    rows; ``TILES`` of them are looked at together."""
    first = end
    last = begin
    row = tl.zeros([1, 1], tl.int32)
    for start in range(begin, end, step * TILES):
        tile = (start + tl.arange(0, TILES) * step)[:, None]
        j = tile + tl.arange(0, BLOCK_K)[None, :]
        j_ok = j < end
        keep = MASK(
            0.0, row, j, row == 0, j_ok, j_ok, lead, q_length, k_length, captured, captured_strides
        )  # fmt: skip
        keep = keep & j_ok
        first = tl.minimum(first, tl.min(tl.where(keep, tile, end)))
        last = tl.maximum(last, tl.max(tl.where(keep, tile + 1, begin)))
    return first, last


@triton.jit
def attention_decode_kernel(
    q, k, v, out, lse, part_out, part_rows, captured, lead_sizes, outer_sizes, group_sizes,
    q_strides, k_strides, v_strides, out_strides, captured_strides, scale, q_length, k_length, group, splits,
    total_rows,
    LOGITS: tl.constexpr, MASK: tl.constexpr, SINK: tl.constexpr, KEY_RANGE: tl.constexpr, LOOK: tl.constexpr,
    PLAIN: tl.constexpr, UNBOUNDED: tl.constexpr, EMPTY_IS_ZERO: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_Q`` of the ``group * q_length`` rows of one head of k and v, one of ``splits`` parts.

    The grid is ``[heads of k and v * tiles of rows * splits]``, the splits of a tile side by side.

    Args:
        part_out: float32 ``[splits, total_rows, DV]``, sums of values; part_rows: float32 ``[2, splits, total_rows]``,
            the largest logits that weights are relative to, and sums of weights; rows are those of ``[*lead, Q]``.
            Unused if not SPLIT: then the results are written.
        outer_sizes: leading sizes of k and v; group_sizes: those along which both are broadcast, elsewhere 1.
        LOOK: a part of the mask that is the same for all rows of a program; tiles before the first and after the last
            one that it needs are not read. None where that does not pay. TILES: see ``needed_tiles``.
        EARLY: the merging kernel may be launched while this one runs; it waits for the end by itself.
    """
    if EARLY:
        let_next_start()
    scale = tl.cast(scale, tl.float32)
    split = tl.program_id(0) % splits
    program = tl.program_id(0) // splits
    tiles = tl.cdiv(group * q_length, BLOCK_Q)
    outer = split_index(program // tiles, outer_sizes)
    packed = (program % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
    i_ok = packed < group * q_length
    packed = tl.where(i_ok, packed, 0)
    lead = add_indices(outer, split_index(packed // q_length, group_sizes))
    i = packed % q_length
    widths = tl.arange(0, D_PADDED)[None, :]
    q_tile = tl.load(
        q + offset_of(lead, q_strides) + i * q_strides[4] + widths * q_strides[5], mask=i_ok & (widths < D), other=0.0
    )
    accumulator = tl.zeros([BLOCK_Q, DV_PADDED], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    if SINK is not None:
        sink = SINK(i, i, i_ok, i_ok, i_ok, lead, q_length, k_length, captured, captured_strides)
        first = tl.where(i_ok & (split == 0), sink + tl.zeros([BLOCK_Q, 1], tl.float32), float("-inf"))
        top = tl.max(first, 1)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    begin = 0
    end = k_length
    if KEY_RANGE is not None:
        begin, _, _, end = KEY_RANGE(
            0, 0, k_length, i, i_ok, lead, q_length, k_length, captured, captured_strides
        )  # fmt: skip
        end = tl.maximum(tl.minimum(end, k_length), 0)
        begin = tl.minimum(tl.maximum(begin, 0), end) // BLOCK_K * BLOCK_K
    step = splits * BLOCK_K
    begin += split * BLOCK_K
    if LOOK is not None:
        begin, end = needed_tiles(
            begin, end, step, outer, q_length, k_length, captured, captured_strides, LOOK, BLOCK_K, TILES
        )
    k_head = locate(k, outer, k_strides, False)
    v_head = locate(v, outer, v_strides, False)
    for start in range(begin, end, step):
        k_tile = load_tile(k, k_head, k_strides, start, k_length, BLOCK_K, D, D_PADDED, False, True)
        v_tile = load_tile(v, v_head, v_strides, start, k_length, BLOCK_K, DV, DV_PADDED, False, True)
        logits = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if not PLAIN:
            logits = logits * scale
        j = (start + tl.arange(0, BLOCK_K))[None, :]
        j_ok = j < k_length
        keep = i_ok & j_ok
        score = logits
        if LOGITS is not None:
            logits = LOGITS(score, i, j, i_ok, j_ok, keep, lead, q_length, k_length, captured, captured_strides)
        if MASK is not None:
            keep = keep & MASK(score, i, j, i_ok, j_ok, keep, lead, q_length, k_length, captured, captured_strides)
        logits = tl.where(keep, logits, float("-inf"))
        weights, accumulator, total, top = softmax_step(
            accumulator, total, top, logits, scale * LOG2E if PLAIN else LOG2E, True, UNBOUNDED
        )
        accumulator = tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision=PRECISION)
    top = top * scale if PLAIN else top
    row = tl.cast(join_index(lead, lead_sizes), tl.int64) * q_length + i
    values = tl.arange(0, DV_PADDED)[None, :]
    stored = i_ok & (values < DV)
    if SPLIT:
        place = split * tl.cast(total_rows, tl.int64) + row
        tl.store(part_rows + place, top[:, None], mask=i_ok)
        tl.store(part_rows + tl.cast(splits, tl.int64) * total_rows + place, total[:, None], mask=i_ok)
        tl.store(part_out + place * DV + values, accumulator, mask=stored)
    else:
        tl.store(lse + row, (top + tl.log(total))[:, None], mask=i_ok)
        denominator = tl.where(total == 0.0, 1.0, total) if EMPTY_IS_ZERO else total
        target = out + offset_of(lead, out_strides) + i * out_strides[4] + values * out_strides[5]
        tl.store(target, (accumulator / denominator[:, None]).to(out.dtype.element_ty), mask=stored)


@triton.jit
def attention_merge_kernel(
    part_out, part_rows, out, lse, lead_sizes, out_strides, q_length, splits, total_rows,
    EMPTY_IS_ZERO: tl.constexpr, SPLITS_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row. The grid is ``[total_rows]``; arguments as for ``attention_decode_kernel``."""
    row = tl.program_id(0)
    parts = tl.arange(0, SPLITS_PADDED)
    place = parts * tl.cast(total_rows, tl.int64) + row
    values = tl.arange(0, DV_PADDED)
    exists = (parts < splits)[:, None] & (values < DV)[None, :]
    lead = split_index(row // q_length, lead_sizes)
    target = out + offset_of(lead, out_strides) + row % q_length * out_strides[4] + values * out_strides[5]
    if EARLY:
        wait_for_previous()
    tops = tl.load(part_rows + place, mask=parts < splits, other=float("-inf"))
    sums = tl.load(part_rows + tl.cast(splits, tl.int64) * total_rows + place, mask=parts < splits, other=0.0)
    partial = tl.load(part_out + place[:, None] * DV + values[None, :], mask=exists, other=0.0)
    top = tl.max(tops, 0)
    shares = tl.exp2((tops - tl.where(top == float("-inf"), 0.0, top)) * LOG2E)
    total = tl.sum(shares * sums, 0)
    denominator = tl.where(total == 0.0, 1.0, total) if EMPTY_IS_ZERO else total
    merged = tl.sum(partial * shares[:, None], 0) / denominator
    tl.store(lse + row, top + tl.log(total))
    tl.store(target, merged.to(out.dtype.element_ty), mask=values < DV)
