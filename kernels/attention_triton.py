"""Our Triton flash attention: what it refuses, and the launches of forward and backward.

Meaning and shapes are those of :mod:`vbcompile.kernels.attention`. Nothing here waits for the device.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.attention_layout import (
    RowView,
    broadcast_strides,
    empty_output,
    pad_lead,
    row_view,
    sum_to,
    tile_strides,
)
from vbcompile.kernels.attention_program import TileProgram, compile_program
from vbcompile.kernels.attention_tuning import TileConfig, tile_config
from vbcompile.kernels.score_function import ScoreFunction, causal_offset
from vbcompile.kernels.score_triton import LEAD_AXES, CapturedPattern

MAX_HEAD_SIZE = 256
_MAX_LENGTH = 2**30  # indices and their sums fit 32 bits
_CAPTURED_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REFINE_FLOAT32, _REFINE_HALF = 4.0, 64.0
_MOST_DECODED = 16  # queries up to which the keys are split between programs
_DECODE_ROWS = 64  # most rows of a tile there
_DECODE_PROGRAMS, _MOST_SPLITS, _TYPICAL_MULTIPROCESSORS = 2, 128, 128
_OLDEST_NVIDIA = (8, 0)  # asynchronous copies and bfloat16 products


# ------------------------------------------------------------------------------------------------- refusals
def refuses(target: Target, case: AttentionCase | None) -> str | None:
    """Why these kernels cannot run a case on a target; ``case`` None asks about the target alone."""
    if reason := _refuses_target(target):
        return reason
    return None if case is None else _refuses_case(case)


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``), as tests without an accelerator do."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def _refuses_target(target: Target) -> str | None:
    if target.vendor == "cpu" and interpreted():
        return None
    if target.vendor not in ("nvidia", "amd", "intel"):
        return f"no Triton attention for {target.vendor}"
    if "triton" not in target.features:
        return "Triton is not installed with a compiler for this device"
    capability = target.compute_capability
    if capability is not None and capability < _OLDEST_NVIDIA:
        return f"needs sm_80 or later, this is {target.arch}"
    return None


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
        if dtype.is_complex or (dtype.is_floating_point and dtype not in _CAPTURED_FLOATS):
            return f"captured tensor {number} is {dtype}"
    return None


# -------------------------------------------------------------------------------------------------- problem
@dataclass(frozen=True)
class _Problem:
    """One call, analysed: sizes, the compiled score function and what kernels need to know about it."""

    target_arch: str
    lead: tuple[int, ...]
    q_length: int
    k_length: int
    d: int
    dv: int
    program: TileProgram
    captured: tuple[Tensor, ...]
    captured_strides: tuple[tuple[int, ...], ...]
    plain: bool
    unbounded: bool
    element_size: int
    empty_is_zero: bool
    dropout: bool
    precision: str

    @property
    def heads(self) -> int:
        return math.prod(self.lead)

    @property
    def d_padded(self) -> int:
        return max(16, 1 << (self.d - 1).bit_length())

    @property
    def dv_padded(self) -> int:
        return max(16, 1 << (self.dv - 1).bit_length())

    @property
    def widths(self) -> dict[str, int]:
        return {"D": self.d, "D_PADDED": self.d_padded, "DV": self.dv, "DV_PADDED": self.dv_padded}

    def tiles(self, kernel: str) -> TileConfig:
        light = self.program.logits is None and self.program.opaque is None and not self.dropout
        return tile_config(self.target_arch, kernel, self.element_size, max(self.d_padded, self.dv_padded), light)

    @property
    def wide(self) -> bool:
        return self.heads * self.q_length * self.k_length >= 2**31

    def uses_tma(self, tiles: TileConfig) -> bool:
        return tiles.tma and self.d == self.d_padded and self.dv == self.dv_padded


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    function: ScoreFunction,
    wanted: tuple[int, ...] = (),
) -> _Problem:
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v, *captured)))
    function = _with_padded_lead(function, len(lead))
    precise = q.dtype == torch.float32
    program = compile_program(function, tuple(map(CapturedPattern.of, captured)), precise, wanted)
    plain = program.logits is None and program.sink is None and scale > 0 and not precise
    return _Problem(
        target_arch=_arch(q),
        lead=tuple(map(int, lead)),
        q_length=int(q.shape[-2]),
        k_length=int(k.shape[-2]),
        d=int(q.shape[-1]),
        dv=int(v.shape[-1]),
        program=program,
        captured=tuple(c.view(torch.uint8) if c.dtype == torch.bool else c for c in captured),
        captured_strides=tuple(map(broadcast_strides, captured)),
        plain=plain and not function.depends_on(function.mask, "score"),
        unbounded=program.unbounded or precise,
        element_size=q.element_size(),
        empty_is_zero=function.empty_rows == "zero",
        dropout=dropout_p > 0,
        precision="tf32" if precise and q.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee",
    )


@functools.lru_cache(maxsize=1024)
def _with_padded_lead(function: ScoreFunction, rank: int) -> ScoreFunction:
    """Leading axes numbered as the kernels' four."""
    shift = LEAD_AXES - rank
    moved = tuple((n, *(a + shift for a in rest)) if n == "lead_index" else (n, *rest) for n, *rest in function.program)
    return replace(function, program=moved).pruned()


def _operand(t: Tensor, view: RowView | None, rows: int, width: int) -> tuple[Any, tuple[int, ...]]:
    """What a kernel takes for a tensor: descriptor and steps, or tensor and strides."""
    if view is None:
        return t, tile_strides(t)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, [view.rows, view.columns], [view.pitch, 1], [rows, width]), view.steps


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    kernel[grid](*arguments, **options)


def _arch(t: Tensor) -> str:
    return "interpreter" if t.device.type == "cpu" else get_target(t.device).arch


def _on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if t.device.type == "cpu":
        return contextlib.nullcontext()
    module = getattr(torch, t.device.type)
    return contextlib.nullcontext() if t.device.index == module.current_device() else module.device(t.device)


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
    problem = _describe(q, k, v, captured, scale, dropout_p, function)
    out = empty_output(problem.lead, problem.q_length, problem.dv, function.rows_first, q)
    lse = q.new_empty([*problem.lead, problem.q_length], dtype=torch.float32)
    with _on_device(q):
        if problem.q_length <= _MOST_DECODED and not problem.dropout:
            _launch_decode(problem, q, k, v, out, lse, scale)
        else:
            _launch_forward(problem, problem.tiles("forward"), q, k, v, out, lse, scale, dropout_p, seed)
    return out, lse


def _launch_forward(
    problem: _Problem,
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
    from vbcompile.kernels.attention_forward import attention_forward_kernel

    views = [row_view(t) if problem.uses_tma(tiles) else None for t in (q, k, v)]
    tma = None not in views
    blocks = ((tiles.block_q, problem.d), (tiles.block_k, problem.d), (tiles.block_k, problem.dv))
    operands = [_operand(t, view if tma else None, *b) for t, view, b in zip((q, k, v), views, blocks, strict=True)]
    sources, strides = zip(*operands, strict=True)
    program = problem.program
    grid = (problem.heads * -(-problem.q_length // tiles.block_q),)
    _launch(
        attention_forward_kernel,
        grid,
        *sources,
        out,
        lse,
        problem.captured,
        seed if problem.dropout else None,
        pad_lead(problem.lead),
        *strides,
        tile_strides(out),
        problem.captured_strides,
        float(scale),
        float(dropout_p),
        problem.q_length,
        problem.k_length,
        program.logits,
        program.mask,
        program.opaque,
        program.sink,
        program.key_range,
        PLAIN=problem.plain,
        MAY_BE_EMPTY=program.may_be_empty,
        EMPTY_IS_ZERO=problem.empty_is_zero,
        UNBOUNDED=problem.unbounded,
        DROPOUT=problem.dropout,
        WIDE=problem.wide,
        TMA=tma,
        PRECISION=problem.precision,
        HEAD=program.key_head,
        TAIL=program.key_tail or problem.k_length % tiles.block_k != 0,
        EVEN_Q=problem.q_length % tiles.block_q == 0,
        EVEN_K=problem.k_length % tiles.block_k == 0,
        **problem.widths,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _shared_axes(k: Tensor, v: Tensor, lead: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading sizes of k and v, and of the axes along which both are broadcast; 1 elsewhere."""
    shared = [ks == 1 and vs == 1 for ks, vs in zip(k.shape[:-2], v.shape[:-2], strict=True)]
    outer = tuple(1 if s else n for s, n in zip(shared, lead, strict=True))
    group = tuple(n if s else 1 for s, n in zip(shared, lead, strict=True))
    return outer, group


def _launch_decode(problem: _Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    from vbcompile.kernels.attention_decode import attention_decode_kernel, attention_merge_kernel

    outer, group = _shared_axes(k, v, problem.lead)
    members, total_rows = math.prod(group), problem.heads * problem.q_length
    tiles = problem.tiles("decode")
    block_q = min(_DECODE_ROWS, max(tiles.block_q, 1 << (members * problem.q_length - 1).bit_length()))
    programs = math.prod(outer) * -(-members * problem.q_length // block_q)
    splits = _split_count(q.device, programs, -(-problem.k_length // tiles.block_k))
    part_out = q.new_empty([splits, total_rows, problem.dv], dtype=torch.float32)
    part_lse = q.new_empty([splits, total_rows], dtype=torch.float32)
    program = problem.program
    _launch(
        attention_decode_kernel,
        (splits, programs),
        q,
        k,
        v,
        part_out,
        part_lse,
        problem.captured,
        pad_lead(problem.lead),
        pad_lead(outer),
        pad_lead(group),
        tile_strides(q),
        tile_strides(k),
        tile_strides(v),
        problem.captured_strides,
        float(scale),
        problem.q_length,
        problem.k_length,
        members,
        splits,
        total_rows,
        program.logits,
        program.mask,
        program.sink,
        program.scattered_key_range,
        PLAIN=problem.plain,
        UNBOUNDED=problem.unbounded,
        PRECISION=problem.precision,
        **problem.widths,
        BLOCK_Q=block_q,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    _launch(
        attention_merge_kernel,
        (total_rows,),
        part_out,
        part_lse,
        out,
        lse,
        pad_lead(problem.lead),
        tile_strides(out),
        problem.q_length,
        splits,
        total_rows,
        EMPTY_IS_ZERO=problem.empty_is_zero,
        SPLITS_PADDED=1 << (splits - 1).bit_length(),
        DV=problem.dv,
        DV_PADDED=problem.dv_padded,
        num_warps=4,
    )


def _split_count(device: torch.device, programs: int, tiles: int) -> int:
    """Parts of the keys that fill the device: about two programs for each multiprocessor, equal numbers of tiles."""
    slots = _DECODE_PROGRAMS * (get_target(device).multiprocessors or _TYPICAL_MULTIPROCESSORS)
    wanted = max(1, min(slots // programs, tiles, _MOST_SPLITS))
    return -(-tiles // -(-tiles // wanted))


# ------------------------------------------------------------------------------------------------- backward
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
        out, lse: what :func:`forward` returned.
        needs: which gradients are wanted; those of captured tensors that are not floating point are None.

    Sums over captured tensors that several programs share use atomic additions, unless
    ``torch.use_deterministic_algorithms`` is on: then each program writes a buffer of its own.
    """
    wanted = tuple(n for n, c in enumerate(captured) if needs[3 + n] and c.is_floating_point())
    problem = _describe(q, k, v, captured, scale, dropout_p, function, wanted)
    run = _Backward(problem, q, k, v, captured, wanted, scale, dropout_p, seed, function)
    with _on_device(q):
        run.rows(grad_out, grad_lse, out, lse)
        grad_q = run.grad_q(grad_out, lse, needs[0])
        grad_k, grad_v = run.grad_kv(grad_out, lse, needs[1] or needs[2])
    others = run.captured_gradients(len(captured))
    found = [grad_q, grad_k, grad_v, *others]
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _refinement(problem: _Problem) -> float | None:
    """The ``|lse|`` from which its rounding matters to the weights; None where logits cannot get there."""
    if not problem.unbounded:
        return None
    return _REFINE_FLOAT32 if problem.element_size == 4 else _REFINE_HALF


class _Backward:
    """The three launches of one backward call and the buffers between them."""

    def __init__(
        self,
        problem: _Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        wanted: tuple[int, ...],
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        function: ScoreFunction,
    ) -> None:
        self._problem = problem
        self._q, self._k, self._v = q, k, v
        self._inputs = captured
        self._wanted = wanted
        self._scale, self._dropout_p, self._seed = float(scale), float(dropout_p), seed if problem.dropout else None
        self._function = function
        self._tiles = {kernel: problem.tiles(kernel) for kernel in ("rows", "grad_q", "grad_kv")}
        self._buffers = tuple(self._buffer(captured[n]) for n in wanted)
        self._buffer_strides = tuple(map(broadcast_strides, self._buffers))
        per_row = [*problem.lead, problem.q_length]
        self._delta = q.new_empty(per_row, dtype=torch.float32)
        self._low = q.new_empty(per_row, dtype=torch.float32) if problem.unbounded else None
        self._empty = q.new_zeros([problem.heads], dtype=torch.int32) if self._may_poison() else None

    def _may_poison(self) -> bool:
        """Whether a row without keys may make the gradients of all values NaN, as the softmax of ``-inf`` does."""
        if self._problem.program.mask is None or self._problem.empty_is_zero:
            return False
        offset = causal_offset(self._function, self._problem.q_length, self._problem.k_length)
        return offset is None or offset < 0

    def _buffer(self, t: Tensor) -> Tensor:
        """Where the gradient of a captured tensor is summed: its own shape, or a place for every program."""
        shape = list(t.shape)
        if torch.are_deterministic_algorithms_enabled():
            shape[:-2] = self._problem.lead
            if t.shape[-2] == 1 and t.shape[-1] == 1:
                smallest = min(self._tiles[kernel].block_q for kernel in ("rows", "grad_q"))
                shape[-2] = -(-self._problem.q_length // smallest)
        return t.new_zeros(shape, dtype=torch.float32)

    def rows(self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
        """``delta`` and the other values per row."""
        from vbcompile.kernels.attention_backward import attention_rows_kernel

        problem, program, tiles = self._problem, self._problem.program, self._tiles["rows"]
        grid = (problem.heads * -(-problem.q_length // tiles.block_q),)
        _launch(
            attention_rows_kernel,
            grid,
            self._q,
            self._k,
            out,
            grad_out,
            None if grad_lse is None else grad_lse.contiguous(),
            lse,
            self._delta,
            self._low,
            self._empty,
            problem.captured,
            self._buffers,
            pad_lead(problem.lead),
            tile_strides(self._q),
            tile_strides(self._k),
            tile_strides(out),
            tile_strides(grad_out),
            problem.captured_strides,
            self._buffer_strides,
            self._scale,
            problem.q_length,
            problem.k_length,
            program.logits,
            program.mask,
            program.sink,
            program.sink_step,
            REFINE_ABOVE=_refinement(problem),
            PRECISION=problem.precision,
            **problem.widths,
            BLOCK_Q=tiles.block_q,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def grad_q(self, grad_out: Tensor, lse: Tensor, need: bool) -> Tensor | None:
        """Gradient of q, and of captured tensors by tiles of rows."""
        from vbcompile.kernels.attention_backward import attention_grad_q_kernel

        problem, program, tiles = self._problem, self._problem.program, self._tiles["grad_q"]
        if not need and not any(self._inputs[n].shape[-1] == 1 or self._inputs[n].shape[-2] != 1 for n in self._wanted):
            return None
        buffer = self._gradient_buffer(self._q, problem.lead) if need else None
        blocks = (
            (tiles.block_q, problem.d),
            (tiles.block_k, problem.d),
            (tiles.block_k, problem.dv),
            (tiles.block_q, problem.dv),
        )
        (q, k, v, grad), strides, tma = self._operands(tiles, grad_out, blocks)
        grid = (problem.heads * -(-problem.q_length // tiles.block_q),)
        _launch(
            attention_grad_q_kernel,
            grid,
            q,
            k,
            v,
            grad,
            buffer,
            lse,
            self._delta,
            self._low,
            problem.captured,
            self._buffers,
            self._seed,
            pad_lead(problem.lead),
            *strides,
            (0,) * (LEAD_AXES + 2) if buffer is None else tile_strides(buffer),
            problem.captured_strides,
            self._buffer_strides,
            self._scale,
            self._dropout_p,
            problem.q_length,
            problem.k_length,
            program.logits,
            program.mask,
            program.opaque,
            program.key_range,
            program.row_step,
            program.row_finish,
            program.row_sums,
            **self._flags(tma),
            HEAD=program.key_head,
            TAIL=program.key_tail or problem.k_length % tiles.block_k != 0,
            EVEN_Q=problem.q_length % tiles.block_q == 0,
            EVEN_K=problem.k_length % tiles.block_k == 0,
            **problem.widths,
            BLOCK_Q=tiles.block_q,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return None if buffer is None else sum_to(buffer, self._q.shape, self._q.dtype)

    def grad_kv(self, grad_out: Tensor, lse: Tensor, need: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of k and v, and of captured tensors by tiles of columns."""
        from vbcompile.kernels.attention_backward import attention_grad_kv_kernel

        problem, program, tiles = self._problem, self._problem.program, self._tiles["grad_kv"]
        if not need and not program.column_sums:
            return None, None
        outer, group = _shared_axes(self._k, self._v, problem.lead)
        grad_k, grad_v = (self._gradient_buffer(t, outer) for t in (self._k, self._v))
        blocks = (
            (tiles.block_q, problem.d),
            (tiles.block_k, problem.d),
            (tiles.block_k, problem.dv),
            (tiles.block_q, problem.dv),
        )
        (q, k, v, grad), strides, tma = self._operands(tiles, grad_out, blocks)
        grid = (math.prod(outer) * -(-problem.k_length // tiles.block_k),)
        _launch(
            attention_grad_kv_kernel,
            grid,
            q,
            k,
            v,
            grad,
            grad_k,
            grad_v,
            lse,
            self._delta,
            self._low,
            self._empty,
            problem.captured,
            self._buffers,
            self._seed,
            pad_lead(problem.lead),
            pad_lead(outer),
            pad_lead(group),
            *strides,
            tile_strides(grad_k),
            tile_strides(grad_v),
            problem.captured_strides,
            self._buffer_strides,
            self._scale,
            self._dropout_p,
            problem.q_length,
            problem.k_length,
            program.logits,
            program.mask,
            program.query_opaque,
            program.query_range,
            program.column_step,
            program.column_finish,
            program.column_sums,
            **self._flags(tma),
            HEAD=program.query_head,
            TAIL=program.query_tail or problem.q_length % tiles.block_q != 0,
            EVEN_Q=problem.q_length % tiles.block_q == 0,
            EVEN_K=problem.k_length % tiles.block_k == 0,
            **problem.widths,
            BLOCK_Q=tiles.block_q,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return (
            sum_to(grad_k, self._k.shape, self._k.dtype),
            sum_to(grad_v, self._v.shape, self._v.dtype),
        )

    def captured_gradients(self, count: int) -> list[Tensor | None]:
        """Gradients of the captured tensors in their shapes and dtypes."""
        found: list[Tensor | None] = [None] * count
        for n, buffer in zip(self._wanted, self._buffers, strict=True):
            found[n] = sum_to(buffer, self._inputs[n].shape, self._inputs[n].dtype)
        return found

    def _flags(self, tma: bool) -> dict[str, Any]:
        problem = self._problem
        return {
            "PLAIN": problem.plain,
            "EMPTY_IS_ZERO": problem.empty_is_zero,
            "UNBOUNDED": problem.unbounded,
            "DROPOUT": problem.dropout,
            "WIDE": problem.wide,
            "TMA": tma,
            "PRECISION": problem.precision,
        }

    def _operands(
        self, tiles: TileConfig, grad_out: Tensor, blocks: Sequence[tuple[int, int]]
    ) -> tuple[list[Any], list[tuple[int, ...]], bool]:
        """q, k, v and the output's gradient as kernels take them: operands, strides, whether they are descriptors."""
        tensors = (self._q, self._k, self._v, grad_out)
        views = [row_view(t) if self._problem.uses_tma(tiles) else None for t in tensors]
        tma = None not in views
        operands = [_operand(t, w if tma else None, *b) for t, w, b in zip(tensors, views, blocks, strict=True)]
        return [o for o, _ in operands], [s for _, s in operands], tma

    def _gradient_buffer(self, t: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Where a kernel writes the gradient of ``t``; float32 where programs' results are summed afterwards."""
        if tuple(t.shape[:-2]) == tuple(lead):
            return torch.empty_like(t)
        return t.new_empty([*lead, *t.shape[-2:]], dtype=torch.float32)
