"""FP4 linear layers on Intel Gaudi, which multiplies nothing narrower than FP8: MXFP4 weights become exact FP8 ones.

A row's E8M0 scales are powers of two, so an E2M1 code times its scale is an E4M3 number as long as the scales of that
row lie within 2**13 of each other; the row's largest goes to the row's scale. The FP8 copy is made once a weight, takes
half the memory of bfloat16, and is cast beside the product. Weights whose scales lie further apart are decoded to the
dtype of x once instead. NVFP4's block scales have digits of their own, which FP8 does not hold.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels.fp4_formats import MXFP4, decode_e2m1, power_of_two, unpack_nibbles
from vbcompile.kernels.fp4_layout import dequantize_weight
from vbcompile.kernels.fp4_linear import Fp4LinearCase
from vbcompile.kernels.registry import Implementation, operator
from vbcompile.kernels.vendor_operators import VendorOperator

CAST = VendorOperator("hpu::cast_from_fp8", "hpu", "1.15")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_EXPONENT = 5  # 1.5 * 2**(2 + 5) = 192 is below 240, the largest E4M3 number of Gaudi 2
_RANGE = 13  # 0.5 * 2**(5 - 13) = 2**-9, the smallest E4M3 number
_BIAS = 127


@dataclass(frozen=True, eq=False)
class Folded:
    """A weight for the product.

    Attributes:
        weight: ``[N, K]``; float8_e4m3fn, or decoded to the dtype of x where the scales do not fold.
        row_scale: float32 ``[N]`` that the products are multiplied by; None: nothing is left to multiply.
    """

    weight: Tensor
    row_scale: Tensor | None


def fold_into_fp8(codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int) -> Folded | None:
    """The weight of plain MXFP4 tensors in FP8, exactly; None where a row's scales lie too far apart.

    Reads the scales, so it waits for the device.
    """
    blocks = unpack_nibbles(codes).unflatten(1, (-1, MXFP4.block_size))
    empty = ((blocks & 7) == 0).all(-1)
    exponents = torch.where(empty, -1, block_scales.int())
    largest = exponents.amax(1, keepdim=True)
    largest = torch.where(largest < 0, _BIAS, largest)  # rows of zeros
    steps = torch.where(empty, 0, exponents - largest)
    if bool((steps < -_RANGE).any()):
        return None
    values = decode_e2m1(blocks, torch.float32) * power_of_two(steps + _LARGEST_EXPONENT).unsqueeze(-1)
    shift = (largest - _BIAS - _LARGEST_EXPONENT).flatten()
    weight = values.flatten(1)[:, :k].to(torch.float8_e4m3fn)
    return Folded(weight, torch.ldexp(row_scale, shift))


# ---------------------------------------------------------------------------------------------- one copy for a weight
@dataclass(frozen=True, eq=False)
class _Known:
    """A prepared weight and the tensors that it was made from."""

    sources: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    folded: Folded

    def is_of(self, tensors: tuple[Tensor, ...]) -> bool:
        same = all(source() is t for source, t in zip(self.sources, tensors, strict=True))
        return same and self.versions == tuple(t._version for t in tensors)


_known: dict[tuple[int, torch.dtype], _Known] = {}


def _prepared(
    codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, dtype: torch.dtype
) -> Folded:
    """The weight for the product, made anew where its tensors are others or were written to."""
    key, tensors = (id(codes), dtype), (codes, block_scales, row_scale)
    known = _known.get(key)
    if known is not None and known.is_of(tensors):
        return known.folded
    folded = fold_into_fp8(codes, block_scales, row_scale, k)
    if folded is None:
        folded = Folded(dequantize_weight(codes, block_scales, row_scale, k, format_name, "plain", dtype), None)
    sources = (weakref.ref(codes, lambda _: _known.pop(key, None)), weakref.ref(block_scales), weakref.ref(row_scale))
    _known[key] = _Known(sources, tuple(t._version for t in tensors), folded)
    return folded


def _operand(folded: Folded, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight in ``dtype``, and the scale of each row that is left for the products."""
    if folded.row_scale is None:
        return folded.weight, None
    weight = CAST(folded.weight, None, dtype)
    if dtype == torch.float16:  # sums of unscaled numbers might not fit
        return (weight * folded.row_scale.unsqueeze(1)).to(dtype), None
    return weight, folded.row_scale  # a power of two where the checkpoint has no scale of its own: it rounds nothing


def _product(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    weight, scale = _operand(_prepared(codes, block_scales, row_scale, k, format_name, x.dtype), x.dtype)
    if scale is None:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    out = F.linear(x, weight) * scale
    return (out if bias is None else out + bias).to(x.dtype)


def _backward(
    grad: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str
) -> Tensor:
    weight, scale = _operand(_prepared(codes, block_scales, row_scale, k, format_name, grad.dtype), grad.dtype)
    return (grad if scale is None else (grad * scale).to(grad.dtype)) @ weight


def _refuses(target: Target, case: Fp4LinearCase | None) -> str | None:
    if target.vendor != "habana":
        return "runs on Intel Gaudi"
    if "fp8" not in target.features:
        return f"needs FP8 (Gaudi 2 or later), this is {target.arch}"
    if reason := CAST.refuses():
        return reason
    if case is None:
        return None
    if case.format_name != MXFP4.name:
        return f"folds MXFP4 into FP8 exactly, {case.format_name} it cannot: set fp4_format='mxfp4'"
    if case.layout != "plain":
        return f"takes the plain layout, not {case.layout}"
    return None if case.dtype in _DTYPES else f"takes 16-bit floats and float32, not {case.dtype}"


def _cost(target: Target, case: Fp4LinearCase) -> float:
    """The FP8 weight is half the bytes of a bfloat16 one; with many rows the cast is small beside the product."""
    few = case.m <= 64
    return 0.65 if few else 1.1


operator("fp4_linear").register(Implementation("hpu_fp8", _product, _refuses, _cost))
operator("fp4_linear_backward").register(Implementation("hpu_fp8", _backward, _refuses, _cost))
