"""Hopper's attention of few queries (:mod:`vbcompile.kernels.attention_hopper_decode`): what it takes, its launch."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from vbcompile.device import get_target
from vbcompile.kernels import attention_problem as problems
from vbcompile.kernels.attention_hopper import (
    DTYPES,
    HEAD_DIMS,
    describe,
    refuses_layout,
    refuses_triton,
)
from vbcompile.kernels.attention_layout import pad_lead, tile_strides
from vbcompile.kernels.attention_parts import Parts, split_count
from vbcompile.kernels.attention_problem import Problem
from vbcompile.kernels.triton_target import multiprocessor_count

MOST_ROWS = 32  # of one head of k and v
_MOST_HEADS = 65535  # along an axis of a grid
_LOOKED_AT, _LOOK_ELEMENTS = 4, 2048  # tiles of a program from which it looks at the mask first; elements at a time


@dataclass(frozen=True)
class FewConfig:
    """Shape of a launch: keys a tile, tiles in flight, programs that a multiprocessor holds."""

    block_k: int = 64
    stages: int = 4
    programs: int = 1


CONFIGS = {64: FewConfig(stages=7), 128: FewConfig()}  # by head size


@dataclass(frozen=True)
class Operands:
    """Keys and values as ``[batch, heads, K, D]``, and what ``shared_axes`` says of their leading axes."""

    k: Tensor
    v: Tensor
    outer: tuple[int, ...]
    group: tuple[int, ...]


def operands(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Operands | str:
    """What the kernel takes of a call, or why it cannot run it."""
    program = problem.program
    if problem.arch != "sm_90":
        return "uses the instructions of Hopper (sm_90)"
    if reason := refuses_triton():
        return reason
    if q.dtype not in DTYPES or problem.d != problem.dv or problem.d not in HEAD_DIMS:
        return "takes float16 and bfloat16, head sizes 64 and 128"
    if not problem.plain:
        return "knows no score function"
    outer, group = problems.shared_axes(k, v, problem.lead)
    if math.prod(group) * problem.q_length > MOST_ROWS:
        return f"takes up to {MOST_ROWS} rows of one head of k and v"
    if program.mask is not None and (
        (program.mask_reads_row and problem.q_length > 1)
        or any(size > 1 for size, members in zip(problem.mask_sizes, pad_lead(group), strict=True) if members > 1)
    ):
        return "its mask is the same for all rows"
    k_heads, v_heads = _as_heads(k, outer), _as_heads(v, outer)
    if k_heads is None or v_heads is None or max(k_heads.shape[:2]) > _MOST_HEADS:
        return "leading axes of k and v are no batch and heads"
    return refuses_layout("k", k_heads) or refuses_layout("v", v_heads) or Operands(k_heads, v_heads, outer, group)


def _as_heads(t: Tensor, outer: tuple[int, ...]) -> Tensor | None:
    """``[batch, heads, K, D]`` of keys or values in place; None where their strides do not allow it."""
    whole = t.expand(*outer, *t.shape[-2:])
    try:
        return whole.view(outer[0], math.prod(outer[1:]), *t.shape[-2:])
    except RuntimeError:
        return None


def choose_config(dim: int, programs: int, multiprocessors: int, masked: bool) -> FewConfig:
    """One program with many tiles in flight for each multiprocessor while keys can be split so; two where there are
    many heads, or a mask that takes its time per tile."""
    config = CONFIGS[dim]
    alone = 2 * programs <= multiprocessors and not masked
    return config if alone else replace(config, stages=config.stages - 1, programs=2)


def decode(problem: Problem, q: Tensor, operands: Operands, out: Tensor, lse: Tensor, scale: float) -> None:
    """Attention of a call whose operands :func:`operands` gave."""
    from vbcompile.kernels.attention_hopper_decode import attention_hopper_decode_kernel

    outer, group = operands.outer, operands.group
    members, programs = math.prod(group), math.prod(outer)
    multiprocessors = multiprocessor_count(get_target(q.device))
    program = problem.program
    config = choose_config(problem.d, programs, multiprocessors, program.mask is not None)
    tiles = -(-problem.k_length // config.block_k)
    splits = split_count(config.programs * multiprocessors, programs, tiles)
    parts = Parts.of(problem, q, splits)
    problems.launch(
        attention_hopper_decode_kernel, (splits, *operands.k.shape[1::-1]),
        q, describe(operands.k, config.block_k), describe(operands.v, config.block_k), out, lse, parts.out, parts.rows,
        problem.captured, pad_lead(problem.lead), pad_lead(outer), pad_lead(group), tile_strides(q), tile_strides(out),
        problem.captured_strides, scale, problem.q_length, problem.k_length, members, splits, parts.total_rows,
        program.mask, program.key_range, program.column_opaque if tiles >= _LOOKED_AT * splits else None,
        EMPTY_IS_ZERO=problem.empty_is_zero, D=problem.d,
        WIDTH=max(8, problems.power_of_two(members * problem.q_length)), BLOCK_K=config.block_k,
        STAGES=config.stages, TILES=_LOOK_ELEMENTS // config.block_k, SPLIT=splits > 1,
        EARLY=parts.early, num_warps=4,
    )  # fmt: skip
    parts.merge(out, lse)
