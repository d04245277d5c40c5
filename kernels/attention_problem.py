"""One call of the Triton attention kernels, analysed: sizes, tiles, the compiled score function, operands in memory."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vbcompile.device import get_target
from vbcompile.kernels.attention_case import lead_shape, rounds_to_tf32
from vbcompile.kernels.attention_layout import RowView, broadcast_strides, pad_lead, row_view, tile_strides
from vbcompile.kernels.attention_program import TileProgram, compile_program
from vbcompile.kernels.attention_tuning import TileConfig, tile_config
from vbcompile.kernels.launches import launch
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.score_triton import LEAD_AXES, CapturedPattern

SUMMARY_TILES = 64  # tiles of scores per head from which a pass over an opaque mask pays
_PLAN_ELEMENTS = 16384  # positions, in whole tiles, that one step of a plan looks at
MOST_SWIZZLED = 128  # bytes of a tile's row; wider rows are cut into such pieces
_NO_STRIDES = (0,) * (LEAD_AXES + 2)
_fitting: dict[tuple[Any, ...], TileConfig] = {}  # tiles made smaller because a device could not hold the table's

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What kernels need to know about a call, apart from q, k and v.

    Attributes:
        lead: broadcast leading sizes of all tensors.
        d, dv: head sizes of q and v.
        captured: captured tensors, booleans as bytes; captured_strides: six for each, zero where broadcast;
            captured_leads: four leading sizes of each.
        plain: logits are the scaled scores and scaling can move into the exponent.
        unbounded: products of logits with ``log2(e)`` may overflow or round too much.
    """

    arch: str
    device: torch.device
    lead: tuple[int, ...]
    q_length: int
    k_length: int
    d: int
    dv: int
    program: TileProgram
    captured: tuple[Tensor, ...]
    captured_strides: tuple[tuple[int, ...], ...]
    captured_leads: tuple[tuple[int, ...], ...]
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
    def widths(self) -> dict[str, int]:
        d_padded, dv_padded = self._padded
        return {"D": self.d, "D_PADDED": d_padded, "DV": self.dv, "DV_PADDED": dv_padded}

    @property
    def _padded(self) -> tuple[int, int]:
        """Head sizes of tiles.

        On sm_90 their rows are swizzled alike in shared memory. Where tiles of two widths took turns in one place,
        ptxas 12.8 made one's matrix descriptor from a register that it had never set.
        """
        sizes = padded(self.d), padded(self.dv)
        if self.arch != "sm_90" or (self.element_size == 4 and self.precision == "ieee"):  # no such products
            return sizes
        least = min(max(sizes), MOST_SWIZZLED // self.element_size)
        return max(sizes[0], least), max(sizes[1], least)

    @property
    def wide(self) -> bool:
        """Whether weights are numbered in 64 bits."""
        return self.heads * self.q_length * self.k_length >= 2**31

    def flags(self, tma: bool) -> dict[str, Any]:
        """Compile-time arguments that the forward and both backward kernels share."""
        return {
            "PLAIN": self.plain,
            "EMPTY_IS_ZERO": self.empty_is_zero,
            "UNBOUNDED": self.unbounded,
            "DROPOUT": self.dropout,
            "WIDE": self.wide,
            "TMA": tma,
            "PRECISION": self.precision,
        }

    def cuts(self, tiles: TileConfig) -> dict[str, Any]:
        """Compile-time arguments that tiles decide, and launch options."""
        return {
            "EVEN_Q": self.q_length % tiles.block_q == 0,
            "EVEN_K": self.k_length % tiles.block_k == 0,
            "BLOCK_Q": tiles.block_q,
            "BLOCK_K": tiles.block_k,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    # ----------------------------------------------------------------------------------------------- tiles
    def tiles(self, kernel: str) -> TileConfig:
        """The table's tiles, or smaller ones where those did not fit the device."""
        if self._key(kernel) in _fitting:
            return _fitting[self._key(kernel)]
        light = self.program.logits is None and self.program.opaque is None and not self.dropout
        return tile_config(self.arch, kernel, self.element_size, max(padded(self.d), padded(self.dv)), light)

    def fitted(self, kernel: str, run: Callable[[TileConfig], T]) -> T:
        """Run with the kernel's tiles, with ever smaller ones while the device cannot hold them."""
        from triton.runtime.errors import OutOfResources

        while True:
            tiles = self.tiles(kernel)
            try:
                return run(tiles)
            except OutOfResources:
                smaller = tiles.smaller()
                if smaller is None:
                    raise
                _fitting[self._key(kernel)] = smaller

    def _key(self, kernel: str) -> tuple[Any, ...]:
        dtypes = tuple(c.dtype for c in self.captured)
        return kernel, self.arch, self.program.source, dtypes, self.element_size, self.d, self.dv, self.dropout

    # ------------------------------------------------------------------------------------------ operands
    def operands(
        self, tiles: TileConfig, pairs: Sequence[tuple[Tensor, int]]
    ) -> tuple[list[Any], list[tuple[int, ...]], bool]:
        """Tensors as a kernel takes them, given with the rows of a tile of each.

        Returns:
            operands (tensors or descriptors), strides or steps, and whether they are descriptors.
        """
        may = tiles.tma and self._padded == (self.d, self.dv)
        views: list[RowView | None] = [row_view(t) if may else None for t, _ in pairs]
        if None in views:
            return [t for t, _ in pairs], [tile_strides(t) for t, _ in pairs], False
        from triton.tools.tensor_descriptor import TensorDescriptor

        found = [(t, rows, w) for (t, rows), w in zip(pairs, views, strict=True) if w is not None]
        descriptors = [
            TensorDescriptor(t, [w.rows, w.columns], [w.pitch, 1], [rows, int(t.shape[-1])]) for t, rows, w in found
        ]
        return descriptors, [w.steps for _, _, w in found], True

    def mask_summary(self, opaque: Any, tiles: TileConfig) -> tuple[Tensor | None, tuple[int, ...]]:
        """What a pass over a mask with an opaque part finds, with its strides; None where that does not pay."""
        rows, columns = -(-self.q_length // tiles.block_q), -(-self.k_length // tiles.block_k)
        if opaque is None or self.program.mask_reads_score or rows * columns < SUMMARY_TILES:
            return None, _NO_STRIDES
        from vbcompile.kernels.attention_summary import mask_summary_kernel

        sizes = self.mask_sizes
        summary = torch.empty([*sizes, rows, columns], dtype=torch.uint8, device=self.device)
        launch(
            mask_summary_kernel, (math.prod(sizes) * rows * columns,),
            summary, self.captured, tuple(sizes), self.captured_strides, self.q_length, self.k_length,
            self.program.mask, BLOCK_Q=tiles.block_q, BLOCK_K=tiles.block_k, num_warps=4,
        )  # fmt: skip
        return summary, tile_strides(summary)

    @property
    def mask_sizes(self) -> list[int]:
        """Leading sizes of the mask: 1 along axes that it does not depend on."""
        return self._sizes(self.program.mask_axes, self.program.mask_captured)

    @property
    def column_sizes(self) -> list[int]:
        """The same of the terms in ``column_opaque``."""
        return self._sizes(self.program.column_axes, self.program.column_captured)

    def _sizes(self, axes: frozenset[int], captured: Sequence[int]) -> list[int]:
        return [
            max(1, self._lead[axis] if axis in axes else 1, *(self.captured_leads[n][axis] for n in captured))
            for axis in range(LEAD_AXES)
        ]

    def tile_plan(
        self, like: Tensor, tiles: TileConfig, exact: bool, by_keys: bool = False
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Which tiles of keys each tile of rows visits, or ``by_keys`` which tiles of rows each tile of keys: int32
        ``[*lead of the mask, tiles, 8]`` (see ``tile_plan_kernel``, where ``exact`` is explained), and its four leading
        strides, zero where the mask is broadcast."""
        from vbcompile.kernels.attention_summary import tile_plan_kernel

        program, sizes = self.program, self.mask_sizes
        counts = [-(-self.q_length // tiles.block_q), -(-self.k_length // tiles.block_k)]
        opaque, bounds, ranges = program.opaque, program.tile_bounds, program.key_range
        if by_keys:
            opaque, bounds, ranges = program.query_opaque, program.query_tile_bounds, program.query_range
        own, other = counts[::-1] if by_keys else counts
        summary, summary_strides = self.mask_summary(None if bounds else opaque, tiles)
        plan = like.new_empty([*sizes, own, 8], dtype=torch.int32)
        launch(
            tile_plan_kernel, (math.prod(sizes) * own,),
            plan, summary, self.captured, tuple(sizes), self.captured_strides, summary_strides,
            self.q_length, self.k_length, ranges,
            SUMMARY=power_of_two(other) if summary is not None else None,
            OPAQUE=summary is None and bounds is None and opaque is not None,
            BOUNDS=bounds,
            EXACT=exact,
            BY_KEYS=by_keys,
            TILES=min(_PLAN_ELEMENTS // (tiles.block_q if by_keys else tiles.block_k), power_of_two(other)),
            BLOCK_Q=tiles.block_q, BLOCK_K=tiles.block_k, EARLY=like.is_cuda, num_warps=8 if bounds else 1,
        )  # fmt: skip
        return plan, broadcast_strides(plan)[:LEAD_AXES]

    @property
    def _lead(self) -> tuple[int, ...]:
        return pad_lead(self.lead)


def padded(width: int) -> int:
    """A head size rounded up to what tiles can have."""
    return power_of_two(max(16, width))


def power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    function: ScoreFunction,
    wanted: tuple[int, ...] = (),
) -> Problem:
    """Analyse a call; ``wanted``: numbers of the captured tensors whose gradient is wanted."""
    lead = lead_shape(q, k, v, captured)
    precise = q.dtype == torch.float32
    patterns = tuple(map(CapturedPattern.of, captured))
    program = compile_program(with_padded_lead(function, len(lead)), patterns, precise, wanted)
    plain = program.logits is None and program.sink is None and scale > 0 and not precise
    return Problem(
        arch=arch_of(q),
        device=q.device,
        lead=tuple(map(int, lead)),
        q_length=int(q.shape[-2]),
        k_length=int(k.shape[-2]),
        d=int(q.shape[-1]),
        dv=int(v.shape[-1]),
        program=program,
        captured=tuple(c.view(torch.uint8) if c.dtype == torch.bool else c for c in captured),
        captured_strides=tuple(map(broadcast_strides, captured)),
        captured_leads=tuple(pad_lead(c.shape[:-2]) for c in captured),
        plain=plain and not program.mask_reads_score,
        unbounded=program.unbounded or precise,
        element_size=q.element_size(),
        empty_is_zero=function.empty_rows == "zero",
        dropout=dropout_p > 0,
        precision="tf32" if rounds_to_tf32(q) else "ieee",
    )


@functools.lru_cache(maxsize=1024)
def with_padded_lead(function: ScoreFunction, rank: int) -> ScoreFunction:
    """Leading axes numbered as the kernels' four."""
    shift = LEAD_AXES - rank
    moved = tuple((n, *(a + shift for a in rest)) if n == "lead_index" else (n, *rest) for n, *rest in function.program)
    return replace(function, program=moved).pruned()


def shared_axes(k: Tensor, v: Tensor, lead: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading sizes of k and v, and of the axes along which both are broadcast; 1 elsewhere."""
    shared = [ks == 1 and vs == 1 for ks, vs in zip(k.shape[:-2], v.shape[:-2], strict=True)]
    outer = tuple(1 if s else n for s, n in zip(shared, lead, strict=True))
    group = tuple(n if s else 1 for s, n in zip(shared, lead, strict=True))
    return outer, group


def arch_of(t: Tensor) -> str:
    """The key of the tile table for a tensor's device."""
    return "interpreter" if t.device.type == "cpu" else get_target(t.device).arch


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if t.device.type == "cpu":
        return contextlib.nullcontext()
    module = getattr(torch, t.device.type)
    return contextlib.nullcontext() if t.device.index == module.current_device() else module.device(t.device)
