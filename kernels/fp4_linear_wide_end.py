"""The end of a tile in :mod:`vbcompile.kernels.fp4_linear_wide`: sums of blocks that share it, epilogue, results."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from vbcompile.kernels.fp4_linear_decode import activate


@gluon.jit
def _place(program, begin, left, programs):
    """Where a program keeps its sums of the tile whose first pair of steps is ``begin``."""
    return program * 2 + gl.where(left * program // programs < begin, 1, 0)


@gluon.jit
def _add_up(total, number, part: gl.constexpr, shape, partial_ptr, arrived_ptr, PARTS: gl.constexpr):
    """Store sums over a part of the columns; who comes last gets those over all, added in order -> (sums, if last).

    The order is that of the shares, but one comes first: who has that one and finds the others' sums stores none. It is
    the share that ends last: the longer one of several of one tile, else the first, with which its program ends.

    ``number``: of the work item among those that are shared; ``part``: of its PARTS tiles, the how many-th this is.
    """
    _, pairs_each, _, left, programs, splits, _ = shape
    LAYOUT: gl.constexpr = total.type.layout
    BLOCK_M: gl.constexpr = total.shape[1]
    # a thread's values lie in pieces of 16 bytes, those of a warp side by side
    FLAT: gl.constexpr = gl.BlockedLayout([1, BLOCK_M // 8, 4], [32, 1, 1], [4, 1, 1], [2, 1, 0])
    PLANE: gl.constexpr = gl.SliceLayout(2, FLAT)
    thread = gl.arange(0, 128, gl.SliceLayout(1, PLANE))[:, None, None]
    piece = gl.arange(0, BLOCK_M // 8, gl.SliceLayout(0, PLANE))[None, :, None]
    value = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, FLAT)))[None, None, :]
    STEP: gl.constexpr = PARTS * 64 * BLOCK_M
    AHEAD: gl.constexpr = 4 if BLOCK_M <= 32 else 2 if BLOCK_M <= 128 else 1  # loads under way at a time
    at = partial_ptr + part * (64 * BLOCK_M) + (piece * 512 + thread * 4) + value
    mine = total.reshape([4, 2, 8, BLOCK_M // 8, 4, 2]).permute((0, 2, 4, 3, 1, 5))
    mine = gl.convert_layout(mine.reshape([128, BLOCK_M // 8, 4]), FLAT, assert_trivial=True)
    begin = number * pairs_each
    first = ((begin + 1) * programs - 1) // left
    final = ((begin + pairs_each) * programs - 1) // left
    own = gl.program_id(0)
    late = gl.where(splits > 0, final, first)
    arrived = arrived_ptr + number * PARTS + part
    have = gl.to_tensor(0)
    if own == late:
        have = gl.atomic_add(arrived, 0, sem="acquire")
    last = have == final - first
    if have != final - first:
        gl.store(at + _place(own, begin, left, programs).to(gl.int64) * STEP, mine)
        gl.thread_barrier()
        last = gl.atomic_add(arrived, 1, sem="acq_rel") == final - first
    if last:
        gl.store(arrived, 0)
        if own != late:
            there = _place(late, begin, left, programs)
            mine = gl.load(at + there.to(gl.int64) * STEP, cache_modifier=".cg")
        after = first + gl.where(splits > 0, 0, 1)
        for i in range(0, final - first, AHEAD):
            for j in gl.static_range(AHEAD):
                there = _place(after + i + j, begin, left, programs).to(gl.int64)
                wanted = gl.full(mine.shape, i + j, gl.int32, FLAT) < final - first
                mine += gl.load(at + there * STEP, mask=wanted, other=0.0, cache_modifier=".cg")
    total = mine.reshape([4, 8, 4, BLOCK_M // 8, 2, 2]).permute((0, 4, 1, 3, 2, 5))
    return gl.convert_layout(total.reshape([64, BLOCK_M]), LAYOUT, assert_trivial=True), last


@gluon.jit
def row_scale(results, tile, BLOCK_M: gl.constexpr, FP8: gl.constexpr):
    """The scales of a tile's 64 rows, as its sums want them; asked for before the sums, they are there after them."""
    _, row_scale_ptr, _, _, _, _, _, n = results
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32 if FP8 else 16])
    rows = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    return gl.load(row_scale_ptr + rows, mask=rows < n, other=0.0)


@gluon.jit
def finish(
    total, scale, tile, part: gl.constexpr, tile_m, split, results, out_tile, shape, PARTS: gl.constexpr,
    FP8: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Store a tile after the epilogue, with SPLIT once its sums are complete.

    ``scale``: of the rows. ``part``: of the work item's tiles, the how many-th this is. ``split``: number of the work
    item among those that are shared, and pairs of steps that were done.
    """
    out_desc, _, bias_ptr, x_scale_ptr, partial_ptr, arrived_ptr, m, n = results
    LAYOUT: gl.constexpr = total.type.layout
    BLOCK_M: gl.constexpr = total.shape[1]
    last = tile * 64 < n
    if SPLIT:
        number, pairs = split
        if last & (pairs < shape[1]):
            total, last = _add_up(total, number, part, shape, partial_ptr, arrived_ptr, PARTS)
    if last:
        rows = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        if FP8:
            columns = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))
            x_scale = gl.load(x_scale_ptr + columns, mask=columns < m, other=0.0)
            total = total * x_scale[None, :] * (scale * 8.0)[:, None]
        else:
            total = total * (scale * 256.0)[:, None]
        if BIAS:
            total += gl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
        result = _after(total, FUNCTION, GATED)
        tma.store_wait(0)
        gl.thread_barrier()  # only the thread that issued the last store waited for it
        out_tile.permute((1, 0)).store(result.to(out_tile.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out_desc, [tile_m * BLOCK_M, tile * result.shape[0]], out_tile)


@gluon.jit
def _after(total, FUNCTION: gl.constexpr, GATED: gl.constexpr):
    """The epilogue; a thread holds a row of the gate and, eight rows further on, of up."""
    if GATED:
        BLOCK_M: gl.constexpr = total.shape[1]
        gate, up = gl.split(total.reshape([4, 2, 8, BLOCK_M]).permute((0, 2, 3, 1)))
        return (activate(gate, FUNCTION) * up).reshape([32, BLOCK_M])
    else:
        return activate(total, FUNCTION)
