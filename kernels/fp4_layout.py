"""Memory layouts of packed FP4 weights: what checkpoints hold, and what tensor-core kernels read without shuffling.

``plain``
    Codes and block scales as in :class:`vbcompile.kernels.fp4.PackedWeight`.

``fragments2``, ``fragments8``, ``fragments2t``, ``fragments8t``
    The matrix is cut into tiles of 64 rows by 64 columns, padded with zeros to whole pairs of tiles both ways; a tile
    is 2048 consecutive bytes and each of 128 threads reads 16 of them: what it holds of the tile as the left operand of
    a matrix instruction. With row ``16 w + 8 rr + r`` and column ``16 ks + 8 kh + 2 c + b`` (``fragments2``) or
    ``32 kh + 8 c + kk`` (``fragments8``), bytes are ordered ``[w 4][r 8][c 4]`` then

    - ``fragments2``: ``[ks 4][kh 2][b 2]``, the low nibble ``rr = 0``, the high one ``rr = 1``;
    - ``fragments8``: ``[kh 2][rr 2][kk & 3]``, the low nibble ``kk < 4``, the high one ``kk >= 4``.

    A trailing ``t`` means that the eight codes of each 32-bit word are interleaved by bits, so that three of the four
    pairs of 16-bit floats are one rotation and one mask away.

    Block scales are ordered ``[w 4][r 8][group][rr 2]`` a tile, one byte ``exponent << 3 | mantissa`` each, where the
    scale is ``2**(exponent - 9) * (1 + mantissa / 8)``: every positive E4M3 scale has one, and so has every power of
    two within ``2**18`` of a row's largest. A power of two goes to the row's scale, so that the largest exponent of a
    row is 17 (NVFP4) or 18: products in FP8 then have all of E4M3's range for each row.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vbcompile.kernels.fp4 import PackedWeight, dequantize, row_scales
from vbcompile.kernels.fp4_formats import (
    Fp4Format,
    decode_e2m1,
    decode_scales,
    fp4_format,
    pack_nibbles,
    unpack_nibbles,
)

TILE: Final = 64
PAIR: Final = 2 * TILE
LAYOUTS: Final = ("plain", "fragments2", "fragments8", "fragments2t", "fragments8t")
_LARGEST_EXPONENT = 18
_LARGEST_NVFP4_EXPONENT = 17  # of 448
_E4M3_EXPONENT_SHIFT = 9


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """The tensors of one weight as ``vblackwell::fp4_linear`` takes them.

    Attributes:
        codes: uint8, ``[N, Kp / 2]`` (plain) or ``[Np / 64, Kp / 64, 2048]``.
        block_scales: uint8, ``[N, Kp / block]`` (plain) or ``[Np / 64, Kp / 64, 64 * 64 / block]``.
        row_scale: float32 ``[N]``.
        k: columns without padding.
        format_name: ``nvfp4`` or ``mxfp4``.
        layout: one of :data:`LAYOUTS`.
    """

    codes: Tensor
    block_scales: Tensor
    row_scale: Tensor
    k: int
    format_name: str
    layout: str

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.block_scales, self.row_scale

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


def to_layout(packed: PackedWeight, layout: str) -> LinearWeight:
    """A packed matrix in ``layout``, on its device.

    Raises:
        ValueError: unknown layout, a stack of experts, or MXFP4 scales too far apart within a row for ``layout`` (see
            :func:`refuses_layout`).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown FP4 layout {layout!r}; valid: {', '.join(LAYOUTS)}")
    if len(packed.shape) != 2:
        raise ValueError(f"fp4_linear takes a matrix [N, K], not {list(packed.shape)}")
    scale, k, name = row_scales(packed), packed.shape[1], packed.format_name
    if layout == "plain":
        return LinearWeight(packed.codes, packed.block_scales, scale, k, name, layout)
    codes, scale_bytes, exponent = _byte_scales(packed)
    if int(scale_bytes.min()) < 0:
        raise ValueError(f"scales of one row differ by more than 2**{_LARGEST_EXPONENT}: {layout} cannot hold them")
    tiles = _tile_codes(_padded(codes, 1), layout)
    groups = TILE // packed.format.block_size
    scales = _tile_scales(_padded(scale_bytes.to(torch.uint8), packed.format.block_size), groups)
    return LinearWeight(tiles, scales, scale * torch.exp2(exponent), k, name, layout)


def refuses_layout(packed: PackedWeight, layout: str) -> str | None:
    """Why a weight cannot be stored in ``layout`` exactly; reads the scales, so it waits for the device."""
    if layout == "plain" or packed.format.has_tensor_scale:
        return None
    if int(_byte_scales(packed)[1].min()) < 0:
        return f"block scales of one row differ by more than 2**{_LARGEST_EXPONENT}"
    return None


def _byte_scales(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, Kp]``, scales as bytes of the tile layouts (int32 ``[N, Kp / block]``, negative where there is no
    such byte) and the power of two that each row's scale takes over (float32 ``[N]``)."""
    fmt, codes = packed.format, unpack_nibbles(packed.codes)
    blocks = codes.view(codes.shape[0], -1, fmt.block_size)
    if fmt.has_tensor_scale:
        # the byte has no zero: where the scale is zero the codes are made so
        codes = torch.where((packed.block_scales == 0).unsqueeze(-1), 0, blocks).flatten(1)
        bits = decode_scales(packed.block_scales, fmt).clamp_min(2.0**-9).view(torch.int32)
        scales = ((bits >> 20) & 7) | ((bits >> 23) - 127 + _E4M3_EXPONENT_SHIFT) << 3
        room = _LARGEST_NVFP4_EXPONENT - (scales.amax(1) >> 3)
        # not so far that the row's scale becomes subnormal
        room = torch.minimum(room, (torch.frexp(row_scales(packed)).exponent + 125).clamp_min(0))
        raised = torch.where(packed.block_scales == 0, 0, scales + (room << 3).unsqueeze(1))
        return codes, raised, -room.float()
    empty = ((blocks & 7) == 0).all(-1)
    exponents = packed.block_scales.int()
    largest = torch.where(empty, -1, exponents).amax(1, keepdim=True)
    largest = torch.where(largest < 0, 127, largest)  # rows of zeros
    steps = torch.where(empty, 0, exponents - largest + _LARGEST_EXPONENT)
    return codes, steps << 3, (largest - 127 + _E4M3_EXPONENT_SHIFT - _LARGEST_EXPONENT).flatten().float()


def _padded(x: Tensor, columns_each: int) -> Tensor:
    """``[N, C]`` padded with zeros to whole pairs of tiles, where an element stands for so many columns."""
    rows, columns = -x.shape[0] % PAIR, -(x.shape[1]) % (PAIR // columns_each)
    return torch.nn.functional.pad(x, (0, columns, 0, rows))


def _tile_codes(codes: Tensor, layout: str) -> Tensor:
    """Codes ``[Np, Kp]`` as bytes ``[Np / 64, Kp / 64, 2048]``."""
    n, k = codes.shape[0] // TILE, codes.shape[1] // TILE
    if layout.startswith("fragments2"):
        # [n, w, rr, r, k, ks, kh, c, b] -> [n, k, w, r, c, ks, kh, b, rr]
        parts = codes.view(n, 4, 2, 8, k, 4, 2, 4, 2).permute(0, 4, 1, 3, 7, 5, 6, 8, 2)
    else:
        # [n, w, rr, r, k, kh, c, half, kk & 3] -> [n, k, w, r, c, kh, rr, kk & 3, half]
        parts = codes.view(n, 4, 2, 8, k, 2, 4, 2, 4).permute(0, 4, 1, 3, 6, 5, 2, 8, 7)
    flat = parts.reshape(n, k, -1)
    return _interleave(flat) if layout.endswith("t") else pack_nibbles(flat)


def _untile_codes(tiles: Tensor, layout: str) -> Tensor:
    """Inverse of :func:`_tile_codes`."""
    n, k = tiles.shape[:2]
    flat = _deinterleave(tiles) if layout.endswith("t") else unpack_nibbles(tiles)
    if layout.startswith("fragments2"):
        parts = flat.view(n, k, 4, 8, 4, 4, 2, 2, 2).permute(0, 2, 8, 3, 1, 5, 6, 4, 7)
    else:
        parts = flat.view(n, k, 4, 8, 4, 2, 2, 4, 2).permute(0, 2, 6, 3, 1, 5, 4, 8, 7)
    return parts.reshape(n * TILE, k * TILE)


def _tile_scales(scales: Tensor, groups: int) -> Tensor:
    """Scale bytes ``[Np, Kp / block]`` as ``[Np / 64, Kp / 64, 64 * groups]``."""
    n, k = scales.shape[0] // TILE, scales.shape[1] // groups
    return scales.view(n, 4, 2, 8, k, groups).permute(0, 4, 1, 3, 5, 2).reshape(n, k, -1)


def _untile_scales(tiles: Tensor, groups: int) -> Tensor:
    n, k = tiles.shape[:2]
    return tiles.view(n, k, 4, 8, groups, 2).permute(0, 2, 5, 3, 1, 4).reshape(n * TILE, k * groups)


# Where sign and magnitude bits (high, middle, low) of the code of each pair lie within 16 bits: pair 2 is in place,
# rotations of the word by 6 and 28 take pairs 0 and 3 there, rotations by 26 and 2 the two parts of pair 1. Moved by at
# most eight, the magnitudes of pair n are the n-th of four bits each, as selectors of bytes want them.
_BIT_PLACES = ((9, 2, 1, 0), (5, 14, 13, 4), (15, 8, 7, 6), (3, 12, 11, 10))
_SIGNS_CROSS = (1, 3)  # pairs whose signs lie in each other's 16 bits: the rotations bring them home


def _interleave(flat: Tensor) -> Tensor:
    """Codes ``[..., 8 a word in the order (byte, half)]`` as bytes of interleaved words."""
    # (byte high, byte low, half) -> pairs ordered (half, byte high), each of (byte low)
    pairs = flat.view(*flat.shape[:-1], -1, 2, 2, 2).movedim(-1, -3).flatten(-3, -2).to(torch.int32)
    halves = torch.zeros_like(pairs[..., 0, :])
    for pair, (sign, *places) in enumerate(_BIT_PLACES):
        signs = pairs[..., pair, :] >> 3
        halves |= (signs.flip(-1) if pair in _SIGNS_CROSS else signs) << sign
        for bit, place in zip((2, 1, 0), places, strict=True):
            halves |= ((pairs[..., pair, :] >> bit) & 1) << place
    return torch.stack((halves & 255, halves >> 8), -1).flatten(-3).to(torch.uint8)


def _deinterleave(tiles: Tensor) -> Tensor:
    """Inverse of :func:`_interleave`."""
    halves = tiles.view(*tiles.shape[:-1], -1, 2, 2).to(torch.int32)
    halves = halves[..., 0] | halves[..., 1] << 8
    pairs = []
    for pair, (sign, *places) in enumerate(_BIT_PLACES):
        code = ((halves.flip(-1) if pair in _SIGNS_CROSS else halves) >> sign & 1) << 3
        for bit, place in zip((2, 1, 0), places, strict=True):
            code |= ((halves >> place) & 1) << bit
        pairs.append(code)
    stacked = torch.stack(pairs, -2).unflatten(-2, (2, 2))  # half, byte high, byte low
    return stacked.movedim(-3, -1).flatten(-4).to(torch.uint8)


def dequantize_weight(
    codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str, dtype: torch.dtype
) -> Tensor:
    """The weight ``[N, K]`` in ``dtype`` from any layout, in plain PyTorch.

    float32 is the value correctly rounded; bfloat16 and float16 are that rounded again.
    """
    fmt, n = fp4_format(format_name), row_scale.shape[0]
    if layout == "plain":
        packed = PackedWeight(codes, block_scales, row_scale, format_name, (n, k))
        return dequantize(packed, dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = _decode_tiles(codes, block_scales, fmt, layout, work)[:n, :k]
    return (values * row_scale.to(work).unsqueeze(1)).to(dtype)


def _decode_tiles(codes: Tensor, block_scales: Tensor, fmt: Fp4Format, layout: str, work: torch.dtype) -> Tensor:
    scale_bytes = _untile_scales(block_scales, TILE // fmt.block_size).to(work)
    exponent = torch.floor(scale_bytes / 8)
    scales = (1 + (scale_bytes - 8 * exponent) / 8) * torch.exp2(exponent - _E4M3_EXPONENT_SHIFT)
    values = decode_e2m1(_untile_codes(codes, layout), work).view(*scales.shape, -1)
    return (values * scales.unsqueeze(-1)).flatten(1)


def check_operands(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    k: int,
    layout: str,
    block: int,
) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit together."""
    n = row_scale.shape[0] if row_scale.ndim == 1 else -1
    if layout not in LAYOUTS:
        raise ValueError(f"unknown FP4 layout {layout!r}; valid: {', '.join(LAYOUTS)}")
    if x.ndim < 1 or x.shape[-1] != k or not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise ValueError(f"fp4_linear: x must be floating point [..., {k}], not {x.dtype} {list(x.shape)}")
    if n < 0 or row_scale.dtype != torch.float32:
        raise ValueError(f"fp4_linear: row_scale must be float32 [N], not {row_scale.dtype} {list(row_scale.shape)}")
    if bias is not None and (tuple(bias.shape) != (n,) or not bias.dtype.is_floating_point):
        raise ValueError(f"fp4_linear: bias must be floating point [{n}], not {bias.dtype} {list(bias.shape)}")
    expected = _operand_shapes(n, k, layout, block)
    found = (tuple(codes.shape), tuple(block_scales.shape))
    if expected != found or codes.dtype != torch.uint8 or block_scales.dtype != torch.uint8:
        raise ValueError(f"fp4_linear: codes and block scales must be uint8 {expected} in layout {layout}, not {found}")
    devices = {t.device for t in (x, codes, block_scales, row_scale, *(() if bias is None else (bias,)))}
    if len(devices) > 1:
        raise ValueError(f"fp4_linear: operands on several devices: {sorted(map(str, devices))}")


def rows_of(x: Tensor, k: int, together: int = 1) -> Tensor:
    """``x [..., k]`` as ``[rows, k]``, copied where so many elements of 16 bits cannot be loaded at once."""
    rows = x.reshape(-1, k)
    is_loadable = rows.stride(1) == 1 and rows.stride(0) % together == 0 and rows.data_ptr() % (2 * together) == 0
    return rows if is_loadable else rows.contiguous()


def _operand_shapes(n: int, k: int, layout: str, block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if layout == "plain":
        blocks = -(-k // block)
        return (n, blocks * block // 2), (n, blocks)
    tiles = (-(-n // PAIR) * 2, -(-k // PAIR) * 2)
    return (*tiles, TILE * TILE // 2), (*tiles, TILE * TILE // block)
