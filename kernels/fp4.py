"""A weight in packed FP4 and its exact value.

``weight[n, k] = e2m1(codes[n, k]) * scale(block_scales[n, k // block]) * tensor_scale[n]``

The fields hold what checkpoints hold, byte for byte; layouts that a kernel prefers are derived from them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vbcompile.kernels.fp4_formats import Fp4Format, decode_pairs, decode_scales, fp4_format

DECODED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """An FP4 weight of logical shape ``[N, K]``, or ``[E, N, K]`` for a stack of experts; ``...`` is ``E`` or nothing.

    ``Kp`` is K rounded up to whole blocks; the elements past K have code 0.

    Attributes:
        codes: uint8 ``[..., N, Kp / 2]``, E2M1, element ``2j`` of a row in the low nibble of byte ``j``.
        block_scales: uint8 ``[..., N, Kp / block_size]``, the bytes of E4M3FN (nvfp4) or E8M0 (mxfp4).
        tensor_scale: float32 ``[..., 1]`` or, one scale a row, ``[..., N]``; finite and positive; 1 for mxfp4 from
            other producers.
        format_name: ``nvfp4`` or ``mxfp4``.
        shape: ``(N, K)`` or ``(E, N, K)``.
        scale_divides: the value is divided by ``tensor_scale``, as compressed-tensors stores it, instead of multiplied.

    Raises:
        ValueError: unknown format, tensors that are not contiguous, or dtypes, shapes and devices that do not fit.
    """

    codes: Tensor
    block_scales: Tensor
    tensor_scale: Tensor
    format_name: str
    shape: tuple[int, ...]
    scale_divides: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise ValueError(f"packed weight: shape {tuple(self.shape)} is not [N, K] or [E, N, K]")
        lead, blocks = self.shape[:-1], -(-self.shape[-1] // self.format.block_size)
        self._require("codes", torch.uint8, [(*lead, blocks * self.format.block_size // 2)])
        self._require("block_scales", torch.uint8, [(*lead, blocks)])
        self._require("tensor_scale", torch.float32, [(*lead[:-1], 1), lead])

        object.__setattr__(self, "shape", tuple(self.shape))

    def _require(self, field: str, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
        tensor: Tensor = getattr(self, field)
        fits = tensor.dtype == dtype and tuple(tensor.shape) in shapes and tensor.is_contiguous()
        if not fits or tensor.device != self.codes.device:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            found = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            raise ValueError(
                f"packed weight {list(self.shape)} in {self.format_name}: {field} must be contiguous {dtype} "
                f"{expected} on {self.codes.device}, not {found}"
            )

    @property
    def format(self) -> Fp4Format:
        return fp4_format(self.format_name)

    @property
    def padding(self) -> int:
        """Elements past K in a row of ``codes``."""
        return self.codes.shape[-1] * 2 - self.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.block_scales, self.tensor_scale))

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same weight on ``device``."""
        codes, block_scales, scale = (t.to(device) for t in (self.codes, self.block_scales, self.tensor_scale))
        return replace(self, codes=codes, block_scales=block_scales, tensor_scale=scale)


def row_scales(packed: PackedWeight) -> Tensor:
    """What a row's sums are multiplied by after the product: float32 ``[..., N]``, contiguous.

    Where the checkpoint divides, the reciprocal is rounded to float32.
    """
    scale = packed.tensor_scale.reciprocal() if packed.scale_divides else packed.tensor_scale
    return scale.expand(packed.shape[:-1]).contiguous()


def check_scales(packed: PackedWeight, name: str) -> None:
    """Raise ValueError where a scale of the weight ``name`` is NaN, infinite, negative, or a tensor scale is zero.

    Reads the scales, so it waits for the device.
    """
    bad = packed.block_scales > packed.format.largest_scale
    if bool(bad.any()):
        byte = int(packed.block_scales[bad][0])
        raise ValueError(
            f"{name}: block scale byte 0x{byte:02x} is not a scale of {packed.format_name} (NaN or signed)"
        )
    good = torch.isfinite(packed.tensor_scale) & (packed.tensor_scale > 0)
    if not bool(good.all()):
        raise ValueError(f"{name}: tensor scale {float(packed.tensor_scale[~good][0])} is not finite and positive")


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight's value, ``[N, K]`` or ``[E, N, K]`` on its device; scratch does not grow with the weight.

    Code times block scale is exact; the tensor scale rounds once, so float32 is the value correctly rounded, and
    bfloat16 and float16 are that float32 rounded again. float64 computes in float64 throughout.

    Raises:
        ValueError: ``dtype`` is not float64, float32, bfloat16 or float16.
    """
    if dtype not in DECODED_DTYPES:
        raise ValueError(f"cannot decode FP4 to {dtype}; valid: {', '.join(map(str, DECODED_DTYPES))}")
    rows = math.prod(packed.shape[:-1])
    out = torch.empty(rows, packed.shape[-1], dtype=dtype, device=packed.device)
    for start, stop in row_ranges(rows, packed.codes.shape[-1] * 2, packed.device):
        out[start:stop] = decode_rows(packed, start, stop, dtype)
    return out.view(packed.shape)


def decode_rows(packed: PackedWeight, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows ``start`` to ``stop``, counted through all experts, as ``[stop - start, K]`` in float32 or float64."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    block_scales = packed.block_scales.flatten(0, -2)[start:stop]
    values = decode_pairs(packed.codes.flatten(0, -2)[start:stop], work).view(*block_scales.shape, -1)
    values *= decode_scales(block_scales, packed.format, work).unsqueeze(-1)
    values = values.flatten(1)[:, : packed.shape[-1]]
    n, scale = packed.shape[-2], packed.tensor_scale.to(work)
    if scale.shape[-1] == n:
        scale = scale.flatten()[start:stop]
    else:
        scale = scale.flatten()[torch.arange(start, stop, device=packed.device) // n]
    return values.div_(scale.unsqueeze(1)) if packed.scale_divides else values.mul_(scale.unsqueeze(1))


def row_ranges(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold about as many elements as work best at a time: a cache's worth on a CPU."""
    elements = 2**16 if device.type == "cpu" else 2**22
    step = max(1, elements // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def concat_rows(parts: Sequence[PackedWeight]) -> PackedWeight:
    """One weight of the rows of ``parts`` in order (query, key and value; gate and up), codes and scales unchanged.

    Each part keeps its tensor scale: the result has one a row. Where some parts divide by theirs and some multiply, the
    divisors become float32 reciprocals.

    Raises:
        ValueError: no parts, or parts of different format, K, number of experts or device.
    """
    if not parts:
        raise ValueError("no packed weights to concatenate")
    kinds = {(p.format_name, p.shape[:-2], p.shape[-1], p.device) for p in parts}
    if len(kinds) > 1:
        raise ValueError(f"packed weights differ in format, experts, K or device: {sorted(map(str, kinds))}")
    first = parts[0]
    uniform = len({p.scale_divides for p in parts}) == 1
    scales = [p.tensor_scale.expand(p.shape[:-1]) if uniform else row_scales(p) for p in parts]
    return PackedWeight(
        codes=torch.cat([p.codes for p in parts], dim=-2),
        block_scales=torch.cat([p.block_scales for p in parts], dim=-2),
        tensor_scale=torch.cat(scales, dim=-1),
        format_name=first.format_name,
        shape=(*first.shape[:-2], sum(p.shape[-2] for p in parts), first.shape[-1]),
        scale_divides=uniform and first.scale_divides,
    )


def take_rows(packed: PackedWeight, rows: Tensor) -> PackedWeight:
    """The rows of a matrix in another order, each with its own scales."""
    scale = packed.tensor_scale
    return replace(
        packed,
        codes=packed.codes[rows],
        block_scales=packed.block_scales[rows],
        tensor_scale=scale if scale.shape[-1] == 1 else scale[rows],
        shape=(rows.shape[0], packed.shape[1]),
    )
