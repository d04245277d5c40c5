"""Our Triton flash attention: what it refuses, and the forward's launches. The backward is in ``attention_gradients``.

Meaning and shapes are those of :mod:`vbcompile.kernels.attention`. Nothing here waits for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels import attention_hopper_few
from vbcompile.kernels import attention_problem as problems
from vbcompile.kernels.attention_case import FLOATS, MAX_HEAD_SIZE, AttentionCase
from vbcompile.kernels.attention_gradients import backward
from vbcompile.kernels.attention_layout import (
    is_within_reach,
    pad_lead,
    tile_strides,
    with_contiguous_rows,
    within_reach,
)
from vbcompile.kernels.attention_parts import Parts, split_count
from vbcompile.kernels.attention_problem import Problem
from vbcompile.kernels.attention_results import empty_output
from vbcompile.kernels.attention_tuning import TileConfig, refuses_tiles
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.triton_target import multiprocessor_count, refuses_triton

__all__ = ["backward", "forward", "refuses"]

_MAX_LENGTH = 2**30  # indices and their sums fit 32 bits
_MOST_DECODED = 16  # queries up to which the keys are split between programs
_DECODE_ROWS = 64  # most rows of a tile there
_DECODE_PROGRAMS = 2  # programs a multiprocessor
_LOOKED_AT, _LOOK_ELEMENTS = 4, 1024  # tiles of a program from which it looks at the mask first; elements at a time


# ------------------------------------------------------------------------------------------------- refusals
FORWARD_KERNELS = ("forward", "decode")
BACKWARD_KERNELS = ("rows", "grad_q", "grad_kv")


def refuses(kernels: Sequence[str], target: Target, case: AttentionCase | None) -> str | None:
    """Why ``kernels`` cannot run a case on a target; ``case`` None asks about the target alone."""
    if reason := refuses_triton(target):
        return reason
    if case is None:
        return None
    if reason := _refuses_case(case):
        return reason
    arch = "interpreter" if target.vendor == "cpu" else target.arch
    head = max(problems.padded(case.q[-1]), problems.padded(case.v[-1]))
    return refuses_tiles(arch, kernels, case.dtype.itemsize, head)


def _refuses_case(case: AttentionCase) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {case.dtype}"
    if max(case.q[-1], case.v[-1]) > MAX_HEAD_SIZE:
        return f"head size {max(case.q[-1], case.v[-1])} is beyond {MAX_HEAD_SIZE}"
    if 0 in (*case.q, *case.k, *case.v) or any(0 in shape for shape, _ in case.captured):
        return "a size is zero"
    if max(case.q_length, case.k_length) > _MAX_LENGTH:
        return f"a sequence is longer than {_MAX_LENGTH}"
    for number, (_, dtype) in enumerate(case.captured):
        if dtype.is_complex or (dtype.is_floating_point and dtype not in FLOATS):
            return f"captured tensor {number} is {dtype}"
    return None


# -------------------------------------------------------------------------------------------------- forward
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    function: ScoreFunction,
) -> tuple[Tensor, Tensor]:
    """Attention of tensors in the canonical space.

    Args:
        q: ``[*lead, Q, D]``; k: ``[*lead, K, D]``; v: ``[*lead, K, Dv]``: float16, bfloat16 or float32, any strides,
            one to four leading axes that broadcast.
        captured: tensors that broadcast to ``[*lead, Q, K]``.
        seed: int64 ``[1]`` on the device where ``dropout_p > 0``.

    Returns:
        ``out [*lead, Q, Dv]`` in the dtype of q, in the memory order that the function names, and ``lse [*lead, Q]``
        in float32: natural logarithm of the sum over the keys and the sink.
    """
    narrow = max(q.shape[-1], v.shape[-1]) * q.element_size() < problems.MOST_SWIZZLED
    tiled = dropout_p > 0 or q.shape[-2] > _MOST_DECODED
    if narrow or tiled:
        # tiles of keys stored transposed are swizzled by their keys, those of values are not: see Problem
        q, k, v = map(with_contiguous_rows, (q, k, v))
    q, k, v = map(within_reach, (q, k, v))
    problem = problems.describe(q, k, v, captured, scale, dropout_p, function)
    promised = empty_output(problem.lead, problem.q_length, problem.dv, function.rows_first, q)
    out = promised if is_within_reach(promised) else torch.empty(promised.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty([*problem.lead, problem.q_length], dtype=torch.float32)
    scale, dropout_p = float(scale), float(dropout_p)
    with problems.on_device(q):
        if tiled:
            problem.fitted("forward", lambda tiles: _tiled(problem, tiles, q, k, v, out, lse, scale, dropout_p, seed))
        elif not isinstance(few := attention_hopper_few.operands(problem, q, k, v), str):
            attention_hopper_few.decode(problem, q, few, out, lse, scale)
        else:
            problem.fitted("decode", lambda tiles: _decode(problem, tiles, q, k, v, out, lse, scale))
    return (out if out is promised else promised.copy_(out)), lse


def _tiled(
    problem: Problem,
    tiles: TileConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """One pass: programs take tiles of rows."""
    from vbcompile.kernels.attention_forward import attention_forward_kernel

    sources, strides, tma = problem.operands(tiles, [(q, tiles.block_q), (k, tiles.block_k), (v, tiles.block_k)])
    program = problem.program
    summary, summary_strides = problem.mask_summary(program.opaque, tiles)
    seen = summary is not None
    problems.launch(
        attention_forward_kernel, (problem.heads * -(-problem.q_length // tiles.block_q),),
        *sources, out, lse, problem.captured, seed if problem.dropout else None, summary, pad_lead(problem.lead),
        *strides, tile_strides(out), problem.captured_strides, summary_strides,
        scale, dropout_p, problem.q_length, problem.k_length,
        program.logits, program.mask, None if seen else program.opaque, program.sink, program.key_range,
        MAY_BE_EMPTY=program.may_be_empty,
        HEAD=seen or program.key_head,
        TAIL=seen or program.key_tail or problem.k_length % tiles.block_k != 0,
        SUMMARY=problems.power_of_two(summary.shape[-1]) if summary is not None else None,
        **problem.flags(tma), **problem.widths, **problem.cuts(tiles),
    )  # fmt: skip


def _decode(
    problem: Problem, tiles: TileConfig, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> None:
    """Programs take parts of the keys, which are merged afterwards."""
    from vbcompile.kernels.attention_decode import attention_decode_kernel

    outer, group = problems.shared_axes(k, v, problem.lead)
    members = math.prod(group)
    block_q = min(_DECODE_ROWS, max(tiles.block_q, problems.power_of_two(members * problem.q_length)))
    programs = math.prod(outer) * -(-members * problem.q_length // block_q)
    key_tiles = -(-problem.k_length // tiles.block_k)
    slots = _DECODE_PROGRAMS * multiprocessor_count(get_target(q.device))
    splits = -(-key_tiles // -(-key_tiles // split_count(slots, programs, key_tiles)))  # no more than the longest needs
    parts, program = Parts.of(problem, q, splits), problem.program
    pairs = zip(problem.column_sizes, pad_lead(group), strict=True)
    looks = key_tiles >= _LOOKED_AT * splits and all(size == 1 for size, of_group in pairs if of_group > 1)
    problems.launch(
        attention_decode_kernel, (splits * programs,),
        q, k, v, out, lse, parts.out, parts.rows, problem.captured,
        pad_lead(problem.lead), pad_lead(outer), pad_lead(group),
        tile_strides(q), tile_strides(k), tile_strides(v), tile_strides(out), problem.captured_strides,
        scale, problem.q_length, problem.k_length, members, splits, parts.total_rows,
        program.logits, program.mask, program.sink, program.scattered_key_range,
        program.column_opaque if looks else None,
        PLAIN=problem.plain, UNBOUNDED=problem.unbounded, EMPTY_IS_ZERO=problem.empty_is_zero,
        PRECISION=problem.precision, **problem.widths, BLOCK_Q=block_q, BLOCK_K=tiles.block_k,
        TILES=max(1, _LOOK_ELEMENTS // tiles.block_k), SPLIT=splits > 1, EARLY=parts.early,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    parts.merge(out, lse)
