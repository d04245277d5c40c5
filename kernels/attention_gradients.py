"""Launches of the Triton attention backward: values per row, then gradients by tiles of rows and of columns."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vbcompile.kernels import attention_problem as problems
from vbcompile.kernels.attention_layout import (
    broadcast_strides,
    pad_lead,
    tile_strides,
    with_contiguous_rows,
    within_reach,
)
from vbcompile.kernels.attention_problem import Problem
from vbcompile.kernels.attention_results import sum_to
from vbcompile.kernels.attention_tuning import TileConfig
from vbcompile.kernels.score_function import ScoreFunction, causal_offset
from vbcompile.kernels.score_triton import LEAD_AXES

_REFINE_FLOAT32, _REFINE_HALF = 4.0, 64.0  # |lse| from which its rounding matters to the weights
_SMALLEST_BLOCK = 16  # rows of the smallest tile


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    function: ScoreFunction,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``(q, k, v, *captured)``, each in the shape and dtype of its tensor; None where not needed.

    Args:
        grad_out: like ``out``; grad_lse: like ``lse``, or None for zero.
        out, lse: what the forward returned.
        needs: which gradients are wanted; those of captured tensors that are not floating point are None.

    Sums over captured tensors that several programs share use atomic additions, unless
    ``torch.use_deterministic_algorithms`` is on: then each program writes a buffer of its own.
    """
    q, k, v, out, grad_out = map(with_contiguous_rows, (q, k, v, out, grad_out))  # as in the forward
    wanted = tuple(n for n, c in enumerate(captured) if needs[3 + n] and c.is_floating_point())
    problem = problems.describe(q, k, v, captured, scale, dropout_p, function, wanted)
    run = Backward(problem, q, k, v, captured, wanted, grad_out, lse, scale, dropout_p, seed, function)
    with problems.on_device(q):
        run.rows(grad_lse, out)
        grad_q = run.grad_q(needs[0])
        grad_k, grad_v = run.grad_kv(needs[1] or needs[2])
    found = [grad_q, grad_k, grad_v, *run.captured_gradients()]
    return [g if need else None for g, need in zip(found, needs, strict=True)]


class Backward:
    """The launches of one backward call, in the order ``rows``, ``grad_q``, ``grad_kv``, and their buffers."""

    def __init__(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        wanted: tuple[int, ...],
        grad_out: Tensor,
        lse: Tensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        function: ScoreFunction,
    ) -> None:
        self._problem = problem
        self._q, self._k, self._v, self._grad_out = map(within_reach, (q, k, v, grad_out))
        self._lse = lse.contiguous()
        self._inputs, self._wanted = captured, wanted
        self._scale, self._dropout_p, self._seed = float(scale), float(dropout_p), seed if problem.dropout else None
        self._function = function
        self.gradients = tuple(self._captured_buffer(captured[n]) for n in wanted)
        self.gradient_strides = tuple(map(broadcast_strides, self.gradients))
        per_row = [*problem.lead, problem.q_length]
        self.delta = q.new_empty(per_row, dtype=torch.float32)
        self.low = q.new_empty(per_row, dtype=torch.float32) if problem.unbounded else None
        self.empty = q.new_zeros([problem.heads], dtype=torch.int32) if self._may_poison() else None
        self._summary = functools.cache(problem.mask_summary)

    def _may_poison(self) -> bool:
        """Whether a row without keys may make the gradients of all values NaN, as the softmax of ``-inf`` does."""
        if self._problem.program.mask is None or self._problem.empty_is_zero:
            return False
        offset = causal_offset(self._function, self._problem.q_length, self._problem.k_length)
        return offset is None or offset < 0

    def _captured_buffer(self, t: Tensor) -> Tensor:
        """Where the gradient of a captured tensor is summed: its own shape, or a place for every program."""
        shape = list(t.shape)
        if torch.are_deterministic_algorithms_enabled():
            shape[:-2] = self._problem.lead
            if t.shape[-2] == 1 and t.shape[-1] == 1:
                shape[-2] = -(-self._problem.q_length // _SMALLEST_BLOCK)
        return t.new_zeros(shape, dtype=torch.float32)

    def rows(self, grad_lse: Tensor | None, out: Tensor) -> None:
        """``delta`` and the other values per row; gradients of the sink."""
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        out = within_reach(out)
        self._problem.fitted("rows", lambda tiles: self._rows(tiles, grad_lse, out))

    def _rows(self, tiles: TileConfig, grad_lse: Tensor | None, out: Tensor) -> None:
        from vbcompile.kernels.attention_backward import attention_rows_kernel

        problem, program = self._problem, self._problem.program
        refine_above = _REFINE_FLOAT32 if problem.element_size == 4 else _REFINE_HALF
        problems.launch(
            attention_rows_kernel, (problem.heads * -(-problem.q_length // tiles.block_q),),
            self._q, self._k, out, self._grad_out, grad_lse, self._lse, self.delta, self.low, self.empty,
            problem.captured, self.gradients, pad_lead(problem.lead),
            tile_strides(self._q), tile_strides(self._k), tile_strides(out), tile_strides(self._grad_out),
            problem.captured_strides, self.gradient_strides, self._scale, problem.q_length, problem.k_length,
            program.logits, program.mask, program.sink, program.sink_step,
            REFINE_ABOVE=refine_above if problem.unbounded else None, PRECISION=problem.precision, **problem.widths,
            BLOCK_Q=tiles.block_q, BLOCK_K=tiles.block_k, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def grad_q(self, need: bool) -> Tensor | None:
        """Gradient of q, and of captured tensors by tiles of rows."""
        by_rows = any(self._inputs[n].shape[-1] == 1 or self._inputs[n].shape[-2] != 1 for n in self._wanted)
        if not need and not by_rows:
            return None
        target = self._buffer(self._q, self._problem.lead) if need else None
        self._problem.fitted("grad_q", lambda tiles: self._grad_q(tiles, target))
        return None if target is None else sum_to(target, self._q.shape, self._q.dtype)

    def _grad_q(self, tiles: TileConfig, target: Tensor | None) -> None:
        from vbcompile.kernels.attention_backward import attention_grad_q_kernel

        problem, program = self._problem, self._problem.program
        sources, strides, tma = self._operands(tiles)
        summary, summary_strides = self._summary(program.opaque, tiles)
        seen = summary is not None
        problems.launch(
            attention_grad_q_kernel, (problem.heads * -(-problem.q_length // tiles.block_q),),
            *sources, target, self._lse, self.delta, self.low, problem.captured, self.gradients, self._seed, summary,
            pad_lead(problem.lead), *strides, (0,) * (LEAD_AXES + 2) if target is None else tile_strides(target),
            problem.captured_strides, self.gradient_strides, summary_strides,
            self._scale, self._dropout_p, problem.q_length, problem.k_length,
            program.logits, program.mask, None if seen else program.opaque, program.key_range,
            program.row_step, program.row_finish, program.row_sums,
            HEAD=seen or program.key_head,
            TAIL=seen or program.key_tail or problem.k_length % tiles.block_k != 0,
            SUMMARY=problems.power_of_two(summary.shape[-1]) if summary is not None else None,
            **problem.flags(tma), **problem.widths, **problem.cuts(tiles),
        )  # fmt: skip

    def grad_kv(self, need: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of k and v, and of captured tensors by tiles of columns."""
        if not need and not self._problem.program.column_sums:
            return None, None
        outer, _ = problems.shared_axes(self._k, self._v, self._problem.lead)
        grad_k, grad_v = (self._buffer(t, outer) for t in (self._k, self._v))
        self._problem.fitted("grad_kv", lambda tiles: self._grad_kv(tiles, grad_k, grad_v))
        return sum_to(grad_k, self._k.shape, self._k.dtype), sum_to(grad_v, self._v.shape, self._v.dtype)

    def _grad_kv(self, tiles: TileConfig, grad_k: Tensor, grad_v: Tensor) -> None:
        from vbcompile.kernels.attention_backward import attention_grad_kv_kernel

        problem, program = self._problem, self._problem.program
        outer, group = problems.shared_axes(self._k, self._v, problem.lead)
        sources, strides, tma = self._operands(tiles)
        summary, summary_strides = self._summary(program.query_opaque, tiles)
        seen = summary is not None
        problems.launch(
            attention_grad_kv_kernel, (math.prod(outer) * -(-problem.k_length // tiles.block_k),),
            *sources, grad_k, grad_v, self._lse, self.delta, self.low, self.empty, problem.captured, self.gradients,
            self._seed, summary, pad_lead(problem.lead), pad_lead(outer), pad_lead(group),
            *strides, tile_strides(grad_k), tile_strides(grad_v), problem.captured_strides, self.gradient_strides,
            summary_strides, self._scale, self._dropout_p, problem.q_length, problem.k_length,
            program.logits, program.mask, None if seen else program.query_opaque, program.query_range,
            program.column_step, program.column_finish, program.column_sums,
            HEAD=seen or program.query_head,
            TAIL=seen or program.query_tail or problem.q_length % tiles.block_q != 0,
            SUMMARY=problems.power_of_two(summary.shape[-2]) if summary is not None else None,
            **problem.flags(tma), **problem.widths, **problem.cuts(tiles),
        )  # fmt: skip

    def captured_gradients(self) -> list[Tensor | None]:
        """Gradients of the captured tensors in their shapes and dtypes."""
        found: list[Tensor | None] = [None] * len(self._inputs)
        for n, gradient in zip(self._wanted, self.gradients, strict=True):
            found[n] = sum_to(gradient, self._inputs[n].shape, self._inputs[n].dtype)
        return found

    def _operands(self, tiles: TileConfig):
        """q, k, v and the output's gradient as kernels take them."""
        q_rows, k_rows = tiles.block_q, tiles.block_k
        pairs = [(self._q, q_rows), (self._k, k_rows), (self._v, k_rows), (self._grad_out, q_rows)]
        return self._problem.operands(tiles, pairs)

    def _buffer(self, t: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Where a kernel writes the gradient of ``t``; float32 where programs' results are summed afterwards."""
        if tuple(t.shape[:-2]) == tuple(lead):
            return torch.empty_like(t)
        return t.new_empty([*lead, *t.shape[-2:]], dtype=torch.float32)
