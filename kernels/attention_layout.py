"""How tensors of the canonical space lie in memory, as the attention kernels take it.

Kernels know four leading axes. A tensor is a pointer with six strides (zero along axes that it is broadcast along), or,
on NVIDIA's sm_90 and later, a two-dimensional descriptor of the tensor memory accelerator: its rows are the tensor's
rows, and each leading axis moves by whole rows (``[B, H, S, D]``) or by columns within them (``[B, S, H, D]``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vbcompile.kernels.score_triton import LEAD_AXES

_MOST_ROWS, _REACH = 128, 2**31  # of a tile: rows, and elements from its first to its last one
_TMA_ALIGNMENT = 16  # bytes: base address and row pitch
_TMA_MAX_ROWS = 2**31 - 1


def pad_lead(lead: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    """Leading sizes or strides with axes put in front up to four."""
    return (*(fill for _ in range(LEAD_AXES - len(lead))), *map(int, lead))


def broadcast_strides(t: Tensor) -> tuple[int, ...]:
    """Four leading strides, the row's and the column's; zero along axes of size one."""
    strides = [0 if size == 1 else int(stride) for size, stride in zip(t.shape, t.stride(), strict=True)]
    return (*pad_lead(strides[:-2], 0), *strides[-2:])


def tile_strides(t: Tensor) -> tuple[int, ...]:
    """As :func:`broadcast_strides`, for tensors whose rows and columns are never broadcast."""
    return (*broadcast_strides(t)[:LEAD_AXES], int(t.stride(-2)), int(t.stride(-1)))


def with_contiguous_rows(t: Tensor) -> Tensor:
    """``t``, or a copy where the elements of its rows lie apart."""
    return t if t.stride(-1) == 1 else t.contiguous()


def is_within_reach(t: Tensor) -> bool:
    """Whether kernels, which count the elements of a tile in 32 bits, can address tiles of ``t``."""
    rows, columns = min(int(t.shape[-2]), _MOST_ROWS), int(t.shape[-1])
    return (rows - 1) * int(t.stride(-2)) + (columns - 1) * int(t.stride(-1)) < _REACH


def within_reach(t: Tensor) -> Tensor:
    """``t``, or a copy where a tile's elements lie too far apart."""
    return t if is_within_reach(t) else t.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class RowView:
    """A tensor seen as a matrix ``[rows, columns]`` of a fixed row pitch.

    Attributes:
        steps: rows, then columns, by which each of the four leading axes moves.
    """

    rows: int
    columns: int
    pitch: int
    steps: tuple[int, ...]


def row_view(t: Tensor, any_width: bool = False) -> RowView | None:
    """The matrix that a descriptor can address, or None where the layout does not allow one.

    ``any_width``: rows need not fit one block, whose sizes are powers of two.
    """
    *lead, length, width = map(int, t.shape)
    pitch, size = int(t.stride(-2)), t.element_size()
    if t.stride(-1) != 1 or pitch < width or (not any_width and (width & (width - 1) or width < 16)):
        return None
    if pitch * size % _TMA_ALIGNMENT or t.data_ptr() % _TMA_ALIGNMENT:
        return None
    row_steps, column_steps = [], []
    rows, columns = length, width
    for count, stride in zip(lead, t.stride()[:-2], strict=True):
        stride = 0 if count == 1 else int(stride)
        by_rows = stride % pitch == 0
        row_steps.append(stride // pitch if by_rows else 0)
        column_steps.append(0 if by_rows else stride)
        rows += (count - 1) * row_steps[-1]
        columns += (count - 1) * column_steps[-1]
    if columns > pitch or rows > _TMA_MAX_ROWS:
        return None
    return RowView(rows, columns, pitch, (*pad_lead(row_steps, 0), *pad_lead(column_steps, 0)))
