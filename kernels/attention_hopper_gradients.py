"""Backward attention for Hopper (sm_90a): its launches; see ``attention_hopper`` for what they take."""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vbcompile.kernels.attention_hopper import (
    NO_CAUSAL_BOUND,
    describe,
    describe_float32,
    multiprocessors,
    refuses,
    refuses_layout,
)
from vbcompile.kernels.attention_hopper_call import ScoreCall, tile_operand
from vbcompile.kernels.attention_layout import pad_lead
from vbcompile.kernels.launches import launch
from vbcompile.kernels.score_triton import LEAD_AXES

PAD = 128  # query rows of the backward's float32 buffers are padded to multiples of this
_FUNCTIONS = ("LOGITS", "GRADIENT", "BOUNDS", "MASK", "ROWS", "CAPTURED_GRADIENTS")


@dataclass(frozen=True)
class BackwardConfig:
    """Shape of one backward launch.

    block_q: queries per tile (64 or 128); block_k: keys of one block (64 or 128); stages: Q and dO tiles in flight;
    group: key heads whose longest key tiles start together; late: row statistics loaded when needed, fewer registers;
    k_stages: K tiles, 2 where one is loaded before the last one is done with; t_stages: tiles of a captured tensor in
    flight; dynamic: blocks stay and take key tiles from a counter, else there is one for each key tile.
    """

    block_q: int = 64
    block_k: int = 128
    stages: int = 2
    group: int = 1
    late: bool = False
    k_stages: int = 1
    t_stages: int = 1
    dynamic: bool = True

    @property
    def warps(self) -> int:
        """Computing warps: one warpgroup per 64 keys."""
        return self.block_k // 16

    @property
    def blocks(self) -> int:
        """Blocks that run on one multiprocessor at a time."""
        return 128 // self.block_k

    @property
    def registers(self) -> int:
        """Registers per thread at entry: one block per multiprocessor with 128 keys, two with 64."""
        return {64: 128, 128: 168}[self.block_k]


# (head_dim, causal) -> configuration
BACKWARD_CONFIGS: dict[tuple[int, bool], BackwardConfig] = {
    (64, False): BackwardConfig(block_k=64, stages=3, group=16),
    (64, True): BackwardConfig(block_k=64, stages=3, group=16),
    (128, False): BackwardConfig(late=True),
    (128, True): BackwardConfig(late=True, group=8),
}
SCORED_CONFIGS: dict[int, BackwardConfig] = {  # for score functions, by head_dim
    64: BackwardConfig(block_k=64, stages=2, group=16, late=True),
    128: BackwardConfig(group=8, late=True),
}


class RowValues(Protocol):
    """What the general kernels know per row, ``[*lead, Q]`` float32, and per head.

    Attributes:
        delta: rowsum(dO * O) - d lse. low: the part of lse that float32 rounds off, in base two, where logits are
            unbounded. empty: int32 ``[heads]``, 1 for heads with a row that makes dV NaN, or None for no such.
        gradients: of the captured tensors that are wanted, float32, to be added to, with their strides.
    """

    delta: Tensor
    low: Tensor | None
    empty: Tensor | None
    gradients: tuple[Tensor, ...]
    gradient_strides: tuple[tuple[int, ...], ...]


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal_offset: int | None,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention_hopper.forward``.

    Args:
        grad_out: ``[B, H, Q, D]``, gradient of out, any strides. grad_lse: ``[B, H, Q]`` gradient of lse, or None.
        q, k, v, scale, causal_offset: as in ``forward``; out, lse: what it returned.
        config: shape of the launch; the shipped one by default.

    Returns:
        dq, dk, dv, shapes and dtypes of q, k, v. dq is summed in float32 in no fixed order: repeated runs may differ
        in the last bit of it.

    Raises:
        ValueError: what ``refuses`` names.
    """
    _check(q, k, v, scale, causal_offset)
    from vbcompile.kernels.attention_hopper_rows import prepare_backward

    heads, queries, dim = q.shape[1:]
    bounded = causal_offset is not None and causal_offset < k.shape[2] - 1
    config = config or BACKWARD_CONFIGS[dim, bounded]
    grad_out = _addressable(grad_out)
    out = out if out.stride(-1) == 1 else out.contiguous()
    dq_sum, lse_log2, delta = _row_buffers(q, 1)
    counter = q.new_empty(1, dtype=torch.int32)
    with torch.cuda.device(q.device):
        launch(
            prepare_backward,
            _row_grid(q, 64),
            out,
            grad_out,
            lse.contiguous(),
            None if grad_lse is None else grad_lse.contiguous(),
            lse_log2,
            delta,
            dq_sum,
            counter,
            queries,
            _padded(q),
            heads,
            *out.stride()[:3],
            *grad_out.stride()[:3],
            HAS_GRAD_LSE=grad_lse is not None,
            D=dim,
            ROWS=64,
        )
        operands = {**_nothing(), "counter": counter, "scale_log2": scale * math.log2(math.e)}
        offset = causal_offset if causal_offset is not None and bounded else NO_CAUSAL_BOUND
        return _launch(q, k, v, grad_out, lse_log2, delta, dq_sum, scale, offset, config, operands)


def backward_scored(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    call: ScoreCall,
    rows: RowValues,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`backward`, with a score function; ``call`` described for the backward.

    Raises:
        ValueError: what ``refuses`` names.
    """
    _check(q, k, v, abs(scale), call.causal_offset)
    from vbcompile.kernels.attention_hopper_rows import prepare_scores

    queries, dim, keys = q.shape[2], q.shape[3], k.shape[2]
    program = call.program
    config = scored_config(dim, call)
    inner = float(scale) * program.inner if program.logits else 1.0
    outer = program.outer if program.logits else float(scale) * program.outer
    grad_out = _addressable(grad_out)
    dq_sum, lse_rows, delta = _row_buffers(q, 2 if program.unbounded else 1)
    counter = q.new_empty(1, dtype=torch.int32)
    low_tiles = q.new_empty(q.shape[0] * q.shape[1], _padded(q) // config.block_q, dtype=torch.int32)
    shared = {
        "captured": call.captured,
        "captured_strides": call.strides,
        "lead_sizes": pad_lead(call.lead),
        "outer": outer,
    }
    with torch.cuda.device(q.device):
        plan, plan_strides = call.plan(q, k, config.block_q, config.block_k, by_keys=True)
        launch(
            prepare_scores,
            _row_grid(q, config.block_q),
            lse.contiguous(),
            rows.delta,
            rows.low,
            lse_rows,
            low_tiles,
            delta,
            dq_sum,
            counter,
            queries=queries,
            keys=keys,
            padded_queries=_padded(q),
            **shared,
            ROWS=program.rows,
            OFFSET=program.offset,
            UNBOUNDED=program.unbounded,
            EMPTY_IS_ZERO=call.empty_is_zero,
            D=dim,
            BLOCK_Q=config.block_q,
        )
        t_desc, tile_steps = tile_operand(call.tile, config.block_k)
        g_desc, gradient_steps = _tile_gradient(call, rows, config)
        operands = {
            **shared,
            "t_desc": t_desc,
            "counter": counter,
            "low_tiles": low_tiles if program.unbounded else None,
            "tile_steps": tile_steps,
            "plan": plan,
            "plan_strides": plan_strides,
            "empty": rows.empty,
            "gradients": rows.gradients,
            "gradient_strides": rows.gradient_strides,
            "g_desc": g_desc,
            "gradient_steps": gradient_steps,
            "inner": inner,
            "scale_log2": outer * math.log2(math.e),
            "SCORED": True,
            "TILED": program.tiled,
            "OUTER": program.outer if program.logits else None,
            **{name: getattr(program, name.lower()) for name in _FUNCTIONS},
        }
        offset = NO_CAUSAL_BOUND if call.causal_offset is None else call.causal_offset
        return _launch(q, k, v, grad_out, lse_rows, delta, dq_sum, inner * outer, offset, config, operands)


def scored_config(dim: int, call: ScoreCall) -> BackwardConfig:
    """The configuration for a score function."""
    config = SCORED_CONFIGS[dim]
    if call.planned and (call.tile is None or call.tile.element_size() < 4):  # short loops; what a block can hold
        config = replace(config, k_stages=2)
    return config


def _tile_gradient(call: ScoreCall, rows: RowValues, config: BackwardConfig) -> tuple[Any, tuple[int, ...]]:
    """(tensor map of the gradient of the captured tensor that comes as tiles, rows by which leading indices move in
    it); None where nobody wants it."""
    if call.program.tile is None or call.program.tile not in call.wanted:
        return None, (0,) * LEAD_AXES
    place = call.wanted.index(call.program.tile)
    matrix = rows.gradients[place].flatten(0, -2)
    steps = tuple(s // matrix.shape[1] for s in rows.gradient_strides[place][:LEAD_AXES])
    return describe_float32(matrix, [config.block_q, config.block_k], 128), steps


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_offset: int | None) -> None:
    reason = refuses(q, k, v, scale, causal_offset)
    if reason:
        raise ValueError(f"Hopper attention: {reason}")


def _addressable(x: Tensor) -> Tensor:
    return x if refuses_layout("grad_out", x) is None else x.contiguous()


def _padded(q: Tensor) -> int:
    """Query rows of a head in the backward's own buffers."""
    return -(-q.shape[2] // PAD) * PAD


def _row_grid(q: Tensor, rows: int) -> tuple[int]:
    return (q.shape[0] * q.shape[1] * (_padded(q) // rows),)


def _row_buffers(q: Tensor, lines: int) -> tuple[Tensor, Tensor, Tensor]:
    """The float32 sum of dQ, ``lines`` lines per head of lse, and delta; all padded."""
    heads, padded = q.shape[0] * q.shape[1], _padded(q)
    dq_sum = q.new_empty(heads * padded, q.shape[3], dtype=torch.float32)
    lines_of_rows = q.new_empty((lines + 1) * heads, padded, dtype=torch.float32)
    return dq_sum, lines_of_rows[heads:], lines_of_rows[:heads]


def _nothing() -> dict[str, Any]:
    """The kernel's arguments that a score function decides, without one."""
    tuples = {
        "captured": (),
        "gradients": (),
        "gradient_strides": (),
        "gradient_steps": (0,) * LEAD_AXES,
        "captured_strides": (),
        "lead_sizes": (1, 1, 1, 1),
        "plan_strides": (0,) * 4,
    }
    flags = {"SCORED": False, "TILED": 0, "inner": 1.0, "outer": 1.0, "tile_steps": (0,) * 8}
    return {
        **tuples,
        **flags,
        **dict.fromkeys(("t_desc", "g_desc", "plan", "empty", "low_tiles", "OUTER", *_FUNCTIONS)),
    }


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse_rows: Tensor,
    delta: Tensor,
    dq_sum: Tensor,
    scale: float,
    offset: int,
    config: BackwardConfig,
    operands: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel itself, between buffers that are filled and dQ rounded."""
    from vbcompile.kernels.attention_hopper_backward import attention_backward
    from vbcompile.kernels.attention_hopper_rows import finish_backward

    batch, heads, queries, dim = q.shape
    k_heads, keys = k.shape[1], k.shape[2]
    padded, lines = _padded(q), lse_rows.shape[0] // delta.shape[0]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    items = -(-keys // config.block_k) * batch * k_heads
    blocks = min(items, config.blocks * multiprocessors(q.device)) if config.dynamic else items
    launch(
        attention_backward,
        (blocks,),
        describe(q, config.block_q),
        describe(k, config.block_k),
        describe(v, config.block_k),
        describe(grad_out, config.block_q),
        describe_float32(lse_rows, [lines, config.block_q], 0),
        delta_desc=describe_float32(delta, [1, config.block_q], 0),
        dq_desc=describe_float32(dq_sum, [config.block_q, dim], 128),
        dk_desc=describe(dk, config.block_k),
        dv_desc=describe(dv, config.block_k),
        scale=scale,
        queries=queries,
        keys=keys,
        k_heads=k_heads,
        per_key_head=heads // k_heads,
        offset=offset,
        heads=batch * k_heads,
        padded_queries=padded,
        STAGES=config.stages,
        K_STAGES=config.k_stages,
        T_STAGES=config.t_stages,
        GROUP=config.group,
        DYNAMIC=config.dynamic,
        LATE=config.late,
        **operands,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    rows = dq_sum, dq, scale, queries, padded, heads, *dq.stride()[:3]
    launch(finish_backward, _row_grid(q, 64), *rows, D=dim, ROWS=64)
    return dq, dk, dv
