"""FP4 number formats, exact and in plain PyTorch on every device.

E2M1, the element: ``s ee m``, magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; no infinity, no NaN; rounding is to nearest, ties
to the even code, and saturates at 6 (OCP Microscaling Formats v1.0, section 5.3.3).

==========  ======  =======================================  ====================  ===============
format      block   block scale, one byte                    tensor scale          bits per weight
==========  ======  =======================================  ====================  ===============
``nvfp4``   16      E4M3FN without sign, 0 to 448            float32               4.5
``mxfp4``   32      E8M0, ``2**(byte - 127)``, 255 is NaN    none                  4.25
==========  ======  =======================================  ====================  ===============

Blocks run along the last dimension. Element ``2j`` of a row is the low nibble of byte ``j``, element ``2j + 1`` the
high one.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

E2M1_MAX: Final = 6.0
E2M1_VALUES: Final = tuple(s * m for s in (1.0, -1.0) for m in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
E4M3_MAX: Final = 448.0


def _e4m3_value(byte: int) -> float:
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


@dataclass(frozen=True)
class Fp4Format:
    """A block-scaled FP4 format.

    Attributes:
        name: ``nvfp4`` or ``mxfp4``.
        block_size: consecutive elements of a row that share a scale.
        scale_values: value of each of the 256 scale bytes.
        largest_scale: largest byte that is a scale; those above are NaN or carry a sign.
        has_tensor_scale: whether a float32 scale multiplies the block scales.
    """

    name: str
    block_size: int
    scale_values: tuple[float, ...]
    largest_scale: int
    has_tensor_scale: bool

    @property
    def nan_scale(self) -> int:
        """The scale byte of NaN."""
        return self.largest_scale + 1


NVFP4: Final = Fp4Format("nvfp4", 16, tuple(map(_e4m3_value, range(256))), 0x7E, True)
MXFP4: Final = Fp4Format("mxfp4", 32, (*(2.0 ** (b - 127) for b in range(255)), float("nan")), 254, False)
FORMATS: Final = {f.name: f for f in (NVFP4, MXFP4)}


def fp4_format(name: str, block_size: int | None = None) -> Fp4Format:
    """The format of that name.

    Raises:
        ValueError: no such format, or ``block_size`` is not the format's; the message lists what exists.
    """
    found = FORMATS.get(name)
    if found is None:
        raise ValueError(f"unknown FP4 format {name!r}; valid formats: {', '.join(FORMATS)}")
    if block_size is not None and block_size != found.block_size:
        raise ValueError(f"{name} has blocks of {found.block_size} elements, not {block_size}")
    return found


def encode_e2m1(x: Tensor) -> Tensor:
    """E2M1 codes (uint8, 0 to 15) nearest to ``x`` (floating point, any shape); the sign of zero is kept."""
    a = x.abs().clamp_max(E2M1_MAX)
    # in each binade the codes are evenly spaced, so half-even rounding of the quotient is half-even on the code
    magnitude = torch.where(a < 2, (a * 2).round(), torch.where(a < 4, a.round() + 2, (a / 2).round() + 4))
    return magnitude.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def round_e2m1(x: Tensor) -> Tensor:
    """Float32 ``x`` rounded to the nearest E2M1 value, ties to the even code, saturating; no NaN.

    Adding and taking away ``1.5 * 2**23`` spacings leaves a multiple of the spacing, rounded half to even.
    """
    out = x.clamp(-E2M1_MAX, E2M1_MAX)
    spacings = (out.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2**floor(log2(|x|))
    spacings.clamp_min_(1.0)
    return out.add_(spacings, alpha=1.5 * 2.0**22).sub_(spacings, alpha=1.5 * 2.0**22)


def decode_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of E2M1 ``codes`` (uint8, 0 to 15), exact in every floating dtype."""
    return torch.tensor(E2M1_VALUES, dtype=dtype, device=codes.device)[codes.int()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """``codes [..., K]`` (uint8, 0 to 15, K even) as bytes ``[..., K / 2]``, first element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_pairs(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Values ``[..., K]`` of packed codes ``[..., K / 2]``: one table look-up a byte."""
    pairs = [(E2M1_VALUES[byte & 15], E2M1_VALUES[byte >> 4]) for byte in range(256)]
    table = torch.tensor(pairs, dtype=dtype, device=packed.device)
    return table[packed.int()].flatten(-2)


def decode_scales(scales: Tensor, fmt: Fp4Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of block-scale bytes (uint8), exact in float32 and float64."""
    return torch.tensor(fmt.scale_values, dtype=dtype, device=scales.device)[scales.int()]


def encode_e4m3(x: Tensor) -> Tensor:
    """E4M3FN bytes nearest to ``x >= 0`` (float32), ties to even, saturating at 448; int32, 0 to 0x7E.

    Written with float32 arithmetic because not every device and release casts to float8 alike.
    """
    x = x.clamp_max(E4M3_MAX)
    exponent = floor_log2(x).clamp_min(-6)  # below 2**-6 the spacing stays that of 2**-6
    steps = (x * power_of_two(3 - exponent)).round()  # 8 to 16 in a binade, 0 to 8 below the first
    return (exponent + 6) * 8 + steps.int()


def floor_log2(x: Tensor) -> Tensor:
    """Exponent field of float32 ``x >= 0``, unbiased, as int32; -127 for zero and subnormals."""
    return (x.view(torch.int32) >> 23) - 127


def power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` in float32 for int32 exponents from -126 to 127, exact on every device."""
    return ((exponent + 127) << 23).view(torch.float32)
