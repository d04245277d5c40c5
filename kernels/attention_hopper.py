"""Attention for Hopper (sm_90a): what its kernels take, and the forward. Backward: ``attention_hopper_gradients``.

    out[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k[b, h // (H / Hk), j]) v[b, h // (H / Hk), j]
    lse[b, h, i] = log sum_j exp(scale * q[b, h, i] . k[..., j])      natural logarithm
    causal: key j is visible to row i if j <= i + causal_offset
    with a score function (``attention_hopper_call``), logits and mask are what it says

The kernels are warp-specialised (FlashAttention-3, arXiv 2407.08608) and written in Triton's Gluon dialect, whose
interface is experimental: they are used with the Triton releases that they were verified with, and refused elsewhere.
Everything that these kernels cannot do is refused with a reason (``refuses``); the general Triton kernels take it.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vbcompile.kernels.attention_hopper_call import ScoreCall, tile_operand
from vbcompile.kernels.attention_hopper_program import HopperProgram
from vbcompile.kernels.attention_hopper_tanh import capped_numbers
from vbcompile.kernels.attention_layout import pad_lead
from vbcompile.kernels.launches import launch

VERIFIED_TRITON = ("3.6",)
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
NO_CAUSAL_BOUND = 1 << 30  # an offset beyond all keys
MAX_ROWS = 1 << 29  # row numbers plus offsets stay inside 32 bits


@dataclass(frozen=True)
class ForwardConfig:
    """Shape of one forward launch.

    consumers: warpgroups of 64 query rows each (2 or 3); block_k: keys per tile; stages, q_stages: K and V tiles, query
    tiles in flight; ping_pong: consumers take turns at the tensor cores, passed on when (1) a turn's products are
    issued, (2) its scores have come, 0 without; rounding: when weights are rounded (``attention_hopper_step.advance``);
    poly: eighths of the exponentials on the FMA units;
    group: heads whose longest query tiles start together; dynamic: work items from a counter, not in rounds; t_stages:
    tiles of a captured tensor in flight per consumer.
    """

    consumers: int = 2
    block_k: int = 128
    stages: int = 2
    q_stages: int = 1
    ping_pong: int = 1
    rounding: str = "next"
    poly: int = 0
    group: int = 8
    dynamic: bool = False
    t_stages: int = 1

    @property
    def registers(self) -> int:
        """Registers per thread at entry; the warpgroups share them out again (setmaxnreg)."""
        return {2: 168, 3: 128}[self.consumers]


# (head_dim, causal) -> configuration; measured on an H200 beside cuDNN, see bench/attention_hopper.py
FORWARD_CONFIGS: dict[tuple[int, bool], ForwardConfig] = {
    (64, False): ForwardConfig(consumers=3, stages=3, q_stages=2, ping_pong=2, rounding="halfway", group=1),
    (64, True): ForwardConfig(stages=3, q_stages=2, ping_pong=2, group=64, dynamic=True),
    (128, False): ForwardConfig(q_stages=2, ping_pong=0, rounding="halfway", group=8, dynamic=True),
    (128, True): ForwardConfig(q_stages=2, ping_pong=0, rounding="halfway", group=8, dynamic=True),
}


def scored_config(dim: int, causal: bool, call: ScoreCall) -> ForwardConfig:
    """The configuration for a score function."""
    config = SCORED_CONFIGS[dim, call.tile is not None]
    masked = causal or call.planned
    if call.program.cap is not None:
        config = replace(config, rounding="halfway" if dim == 128 else "next", ping_pong=0)
    elif dim == 128:  # weights are rounded early where there would be no registers
        added = call.program.offset is not None
        others = call.program.sink is not None or (call.reads_rows and not added)
        if masked and call.tile is None and not others:
            config = replace(config, rounding="halfway", ping_pong=1 if added else 0)
        elif others or added or call.program.tiled == 2:
            config = replace(config, rounding="early", ping_pong=1)
    if call.tile is None or call.tile.element_size() < 4 or dim == 64:
        return config
    return replace(config, block_k=64)  # what a block can hold


# (head_dim, whether a captured tensor comes as tiles) -> configuration for score functions
SCORED_CONFIGS: dict[tuple[int, bool], ForwardConfig] = {
    (64, False): ForwardConfig(stages=3, q_stages=2, rounding="halfway", group=32, dynamic=True),
    (64, True): ForwardConfig(stages=3, q_stages=2, ping_pong=2, rounding="halfway", dynamic=True),
    (128, False): ForwardConfig(q_stages=2, group=16, dynamic=True),
    (128, True): ForwardConfig(ping_pong=2, rounding="halfway", dynamic=True),
}


# ------------------------------------------------------------------------------------------- what is refused
@lru_cache(maxsize=1)
def refuses_triton() -> str | None:
    """Why the installed Triton cannot be used, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    release = ".".join(triton.__version__.split(".")[:2])
    if release not in VERIFIED_TRITON:
        return f"Gluon of Triton {triton.__version__} is unverified here (verified: {', '.join(VERIFIED_TRITON)})"
    return None


def refuses_capability(capability: tuple[int, int]) -> str | None:
    """Why a CUDA device of this compute capability cannot run these kernels, or None."""
    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]}, the kernels use Hopper's (9.0) instructions"
    return None


def refuses_layout(name: str, x: Tensor) -> str | None:
    """Why the tensor memory accelerator cannot address ``x [B, H, S, D]``, or None."""
    if x.stride(-1) != 1:
        return f"{name}: last dimension has stride {x.stride(-1)}, not 1"
    if x.data_ptr() % 16:
        return f"{name}: storage is not aligned to 16 bytes"
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size > 1 and (stride <= 0 or stride * x.element_size() % 16):
            return f"{name}: stride {stride} is no positive multiple of 16 bytes"
    return None


def refuses(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_offset: int | None) -> str | None:
    """Why these kernels cannot compute this attention, or None when they can.

    q ``[B, H, Q, D]``, k and v ``[B, Hk, K, D]``.
    """
    if not q.is_cuda or torch.version.hip is not None:
        return "not an NVIDIA GPU"
    return (
        refuses_capability(torch.cuda.get_device_capability(q.device))
        or refuses_triton()
        or refuses_problem(q, k, v, scale, causal_offset)
        or refuses_layout("q", q)
        or refuses_layout("k", k)
        or refuses_layout("v", v)
    )


def refuses_problem(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_offset: int | None) -> str | None:
    """The part of ``refuses`` that depends on shapes, dtypes and scalars alone."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return f"q, k, v must be [B, H, S, D], got {q.ndim}, {k.ndim} and {v.ndim} dimensions"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: needs one of bfloat16, float16 for all three"
    if q.device != k.device or q.device != v.device:
        return "q, k and v are on different devices"
    if q.shape[-1] not in HEAD_DIMS or k.shape[-1] != q.shape[-1] or v.shape[-1] != q.shape[-1]:
        return f"head dimensions {q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]}: needs 64 or 128 for all three"
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        return f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit together"
    if min(q.shape) == 0 or min(k.shape) == 0:
        return "an empty tensor"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads"
    if max(q.shape[2], k.shape[2]) > MAX_ROWS or q.shape[0] * q.shape[1] * q.shape[2] >= 2**31:
        return "too many rows for 32-bit row numbers"
    if not (math.isfinite(scale) and scale > 0):
        return f"scale {scale} is not positive and finite"
    if causal_offset is not None and not 0 <= causal_offset <= MAX_ROWS:
        return f"causal offset {causal_offset}: rows that see no key (or out of range)"
    return None


# ------------------------------------------------------------------------------------------- launch
@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def describe(x: Tensor, rows: int) -> Any:
    """Tensor map of ``x [B, H, S, D]`` in blocks of ``rows`` rows of one head.

    A dimension of size 1 may carry any stride; the accelerator wants multiples of 16 bytes all the same.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = [stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape, x.stride(), strict=True)]
    strides[-1] = 1
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, x.shape[-1]], layout)


def describe_float32(x: Tensor, block: list[int], swizzle: int) -> Any:
    """Tensor map of a contiguous float32 matrix in blocks of ``block``; swizzle in bytes."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=32, rank=2)
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], block, layout)


def allocate(like: Tensor, rows_first: bool) -> Tensor:
    """Empty ``[B, H, S, D]`` in memory order [B, S, H, D] (rows first) or [B, H, S, D]."""
    batch, heads, rows, dim = like.shape
    if rows_first:
        return like.new_empty(batch, rows, heads, dim).transpose(1, 2)
    return like.new_empty(batch, heads, rows, dim)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal_offset: int | None,
    rows_first: bool,
    config: ForwardConfig | None = None,
    call: ScoreCall | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention forward.

    Args:
        q: ``[B, H, Q, D]`` bfloat16 or float16, D 64 or 128, last dimension contiguous, other strides free
            (multiples of 16 bytes).
        k, v: ``[B, Hk, K, D]``, H a multiple of Hk.
        scale: factor of the scores, positive unless a score function comes in.
        causal_offset: None for full attention, else key j is visible to row i if ``j <= i + causal_offset``; >= 0.
        rows_first: memory order of the result, [B, Q, H, D] if true.
        config: shape of the launch; the shipped one by default.
        call: score function and what it reads; its causal offset replaces the argument.

    Returns:
        out ``[B, H, Q, D]`` in q's dtype, lse ``[B, H, Q]`` float32, natural logarithm.

    Raises:
        ValueError: what ``refuses`` names.
    """
    causal_offset = call.causal_offset if call else causal_offset
    reason = refuses(q, k, v, abs(scale) if call else scale, causal_offset)
    if reason:
        raise ValueError(f"Hopper attention: {reason}")
    from vbcompile.kernels.attention_hopper_forward import attention_forward

    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    causal = causal_offset is not None and causal_offset < keys - 1
    config = config or (scored_config(dim, causal, call) if call else FORWARD_CONFIGS[dim, causal])
    out = allocate(q, rows_first)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    items = -(-queries // (64 * config.consumers)) * batch * heads
    offset = causal_offset if causal_offset is not None and causal else NO_CAUSAL_BOUND
    with torch.cuda.device(q.device):
        launch(
            attention_forward,
            (min(items, multiprocessors(q.device)),),
            describe(q, 64),
            describe(k, config.block_k),
            describe(v, config.block_k),
            describe(out, 64),
            lse_pointer=lse,
            queries=queries,
            keys=keys,
            q_heads=heads,
            heads_per_key_head=heads // k.shape[1],
            offset=offset,
            heads=batch * heads,
            CONSUMERS=config.consumers,
            BLOCK_K=config.block_k,
            D=dim,
            STAGES=config.stages,
            Q_STAGES=config.q_stages,
            T_STAGES=config.t_stages,
            GROUP=batch if call and call.shared else config.group,
            CAUSAL=causal,
            PING_PONG=config.ping_pong,
            ROUNDING=config.rounding,
            POLY=config.poly,
            DYNAMIC=config.dynamic,
            **score_operands(q, k, scale, config, call),
            num_warps=4,
            maxnreg=config.registers,
            launch_pdl=call is not None and call.planned,
        )
    return out, lse


def work_counter(q: Tensor, config: ForwardConfig, plan: Tensor | None) -> Tensor | None:
    """The counter of work items, zero: a place that the plan left for it, or a tensor of its own."""
    if not config.dynamic:
        return None
    return torch.zeros(1, dtype=torch.int32, device=q.device) if plan is None else plan.view(-1)[7:]


_FUNCTIONS = ("LOGITS", "MASK", "ROWS", "OFFSET", "SLOPE", "BOUNDS", "SINK")


def _capped_numbers(scale: float, program: HopperProgram) -> tuple[float, ...]:
    if program.cap is None:
        return ()
    return capped_numbers(float(scale) * program.inner, program.outer * math.log2(math.e), program.cap)


def score_operands(q: Tensor, k: Tensor, scale: float, config: ForwardConfig, call: ScoreCall | None) -> dict[str, Any]:
    """The kernel's arguments that a score function decides; ``call`` None for scaled products alone."""
    if call is None:
        nothing: dict[str, Any] = dict.fromkeys(("t_desc", "plan", *_FUNCTIONS))
        tuples = {
            "captured": (),
            "captured_strides": (),
            "lead_sizes": (1, 1, 1, 1),
            "plan_strides": (0,) * 4,
            "capped": (),
        }
        flags = {"SHARED": False, "TILED": 0, "CAP": None, "UNBOUNDED": False, "EMPTY_IS_ZERO": False}
        values = {"inner": 1.0, "outer": float(scale), "tile_steps": (0,) * 8, "counter": work_counter(q, config, None)}
        return {**nothing, **tuples, **flags, **values}
    program = call.program
    plan, plan_strides = call.plan(q, k, 64 * config.consumers, config.block_k)
    t_desc, tile_steps = tile_operand(call.tile, config.block_k)
    return {
        "t_desc": t_desc,
        "captured": call.captured,
        "plan": plan,
        "counter": work_counter(q, config, plan),
        "inner": float(scale) * program.inner if program.logits else 1.0,
        "outer": program.outer if program.logits else float(scale) * program.outer,
        "lead_sizes": pad_lead(call.lead),
        "captured_strides": call.strides,
        "plan_strides": plan_strides,
        "tile_steps": tile_steps,
        "SHARED": call.shared,
        "TILED": program.tiled,
        **{name: getattr(program, name.lower()) for name in _FUNCTIONS},
        # Counted from a tile's first column positions are the same for all tiles: there must be registers for them.
        "SLOPE": program.slope if q.shape[-1] == 64 else None,
        "CAP": None if program.cap is None else 2,
        "capped": _capped_numbers(scale, program),
        "UNBOUNDED": program.unbounded,
        "EMPTY_IS_ZERO": call.empty_is_zero,
    }
