"""Which tiles a mask needs that only its tensors know: a pass over the mask before attention, without the scores.

For masks with terms that interval arithmetic cannot bound (documents, arbitrary boolean masks), one small program per
tile evaluates the mask and notes whether none, some or all of its elements take part. The attention kernels then visit
the tiles between the first and the last one needed, and leave out the mask in the first run of full tiles.
"""

import triton
import triton.language as tl

from vbcompile.kernels.attention_blocks import split_index


@triton.jit
def mask_summary_kernel(
    summary, captured, lead_sizes, captured_strides, q_length, k_length,
    MASK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one tile's entry of ``summary``, uint8 ``[*lead of the mask, tiles of rows, tiles of columns]``: 0 if none
    of its elements takes part, 1 if some do, 2 if all.

    The grid is ``[tiles of columns, tiles of rows, heads of the mask]``. Rows beyond the last count for nothing; tiles
    that reach beyond the last column are never full.
    """
    lead = split_index(tl.program_id(2), lead_sizes)
    i = (tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
    j = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    i_ok = i < q_length
    j_ok = j < k_length
    ok = i_ok & j_ok
    keep = MASK(0.0, i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, captured_strides)
    some = tl.max((keep & ok).to(tl.int32))
    every = tl.min(((keep & j_ok) | (i >= q_length)).to(tl.int32))
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(summary + place, (some + every * some).to(tl.uint8))
