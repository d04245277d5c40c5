"""A call of the Hopper kernels with a score function: its compiled program and the operands that it reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vbcompile.kernels import attention_problem as problems
from vbcompile.kernels.attention_hopper_program import (
    HopperProgram,
    compile_hopper,
    refuses,
    refuses_backward,
    refuses_gradients,
)
from vbcompile.kernels.attention_hopper_source import MAX_LENGTH
from vbcompile.kernels.attention_layout import broadcast_strides, row_view
from vbcompile.kernels.attention_tuning import TileConfig
from vbcompile.kernels.score_function import ScoreFunction, causal_offset
from vbcompile.kernels.score_triton import LEAD_AXES, CapturedPattern

_TILE_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class ScoreCall:
    """What a score function adds to a plain call.

    Attributes:
        causal_offset: bound ``j <= i + offset`` that the kernel itself checks, or None.
        lead: leading sizes, their product the number of query heads over all batches.
        captured: captured tensors, booleans as bytes; strides: six for each, zero where broadcast.
        planned: whether the program masks, along a plan of tiles that ``plan`` makes.
        empty_is_zero: what a row without keys gives, else NaN.
        function: the score function, its leading axes numbered as the caller does.
        wanted: captured tensors whose gradients are wanted.
    """

    program: HopperProgram
    causal_offset: int | None
    lead: tuple[int, ...]
    captured: tuple[Tensor, ...]
    strides: tuple[tuple[int, ...], ...]
    planned: bool
    empty_is_zero: bool
    function: ScoreFunction
    originals: tuple[Tensor, ...]
    wanted: tuple[int, ...]

    @property
    def tile(self) -> Tensor | None:
        """The captured tensor that comes as tiles."""
        return None if self.program.tile is None else self.captured[self.program.tile]

    @property
    def reads_rows(self) -> bool:
        """Whether the logits read a captured tensor that does not come as tiles."""
        return any(number != self.program.tile for number in self.function.captured(self.function.score))

    @property
    def shared(self) -> bool:
        """Whether heads that differ in their first leading index alone read the same part of that tensor."""
        return self.tile is not None and self.strides[self.program.tile or 0][LEAD_AXES - len(self.lead)] == 0

    def plan(
        self, q: Tensor, k: Tensor, block_q: int, block_k: int, by_keys: bool = False
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """The plan of tiles with its leading strides, ``by_keys`` that of the backward; None where the program does not
        mask."""
        if not self.planned:
            return None, (0,) * LEAD_AXES
        q, k = q.reshape(*self.lead, *q.shape[-2:]), k[:1, :1].reshape(*(1 for _ in self.lead), *k.shape[-2:])
        problem = problems.describe(q, k, k, self.originals, 1.0, 0.0, self.function)
        return problem.tile_plan(q, TileConfig(block_q, block_k, 4, 1), self.program.exact, by_keys)


def describe_call(
    q: Tensor,
    k: Tensor,
    captured: Sequence[Tensor],
    lead: Sequence[int],
    scale: float,
    function: ScoreFunction,
    wanted: tuple[int, ...] | None = None,
) -> ScoreCall:
    """Analyse a call that ``refuses_call`` takes; ``lead``: leading sizes of the canonical space; ``wanted``: for the
    backward, the captured tensors whose gradients are wanted."""
    patterns = tuple(map(CapturedPattern.of, captured))
    given, function = function, problems.with_padded_lead(function, len(lead))
    offset = _own_bound(function, q.shape[-2], k.shape[-2])
    masked = function.mask is not None and offset is None
    program = compile_hopper(function, patterns, q.dtype == torch.bfloat16, masked, scale <= 0, wanted)
    return ScoreCall(
        program=program,
        causal_offset=offset,
        lead=tuple(map(int, lead)),
        captured=tuple(c.view(torch.uint8) if c.dtype == torch.bool else c for c in captured),
        strides=tuple(map(broadcast_strides, captured)),
        planned=masked,
        empty_is_zero=function.empty_rows == "zero",
        function=given,
        originals=tuple(captured),
        wanted=wanted or (),
    )


def refuses_call(
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
    q_length: int,
    k_length: int,
    function: ScoreFunction,
    wanted: tuple[int, ...] | None = None,
) -> str | None:
    """Why a score function with captured tensors of these shapes and dtypes is refused, or None; ``wanted``: for the
    backward, those whose gradients are wanted."""
    if max(q_length, k_length) > MAX_LENGTH:
        return f"a sequence is longer than {MAX_LENGTH}, positions are computed in float32"
    patterns = tuple(CapturedPattern.of(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in shapes)
    for number in function.captured(function.score, function.mask, function.sink):
        pattern, (shape, dtype) = patterns[number], shapes[number]
        if pattern.is_tile:
            if dtype not in _TILE_DTYPES:
                return f"captured tensor {number} has rows and columns of {dtype}"
            if shape[-1] * dtype.itemsize % 16:
                return f"rows of captured tensor {number} are no multiple of 16 bytes"
    reason = refuses(function, patterns)
    if reason is None and wanted is not None:
        logits = replace(function, mask=None).pruned()
        reason = refuses_backward(logits, patterns) or refuses_gradients(function, patterns, wanted)
    return reason


def _own_bound(function: ScoreFunction, q_length: int, k_length: int) -> int | None:
    """The offset of a causal mask that the kernel checks without a plan; every row sees a key."""
    if function.mask is None:
        return None
    alone = ScoreFunction((*function.program, ("score",)), len(function.program), function.mask)
    offset = causal_offset(alone.pruned(), q_length, k_length)
    return offset if offset is not None and offset >= 0 else None


def tile_operand(t: Tensor | None, block_k: int) -> tuple[Any, tuple[int, ...]]:
    """(tensor map of the captured tensor as a matrix in blocks ``[64, block_k]``, steps of its leading indices)."""
    if t is None:
        return None, (0,) * (2 * LEAD_AXES)
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    view = row_view(t, any_width=True)
    if view is None:
        t = t.contiguous()
        view = row_view(t, any_width=True)
        assert view is not None
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, block_k * t.element_size()), element_bitwidth=8 * t.element_size(), rank=2
    )
    return TensorDescriptor(t, [view.rows, view.columns], [view.pitch, 1], [64, block_k], layout), view.steps
