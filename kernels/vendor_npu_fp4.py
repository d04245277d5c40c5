"""FP4 linear layers on Huawei Ascend 950, whose matrix units read MXFP4 (E2M1 codes, an E8M0 scale every 32 columns).

``npu_weight_quant_batchmatmul`` multiplies activations as they are; with ``activations="fp8"`` or ``"fp4"`` they may be
rounded to MXFP8 or MXFP4 by ``npu_dynamic_mx_quant``, for ``npu_quant_matmul``; to MXFP4 as an implementation of
``fp4_quantize``, which weights that want the nearest rule take too. Weights are read as checkpoints hold them: the
operators take them transposed, packed along the columns. Older chips have no unit for FP4: weights keep their
precision there.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels.fp4_costs import roofline
from vbcompile.kernels.fp4_formats import MXFP4
from vbcompile.kernels.fp4_linear import Fp4LinearCase
from vbcompile.kernels.fp4_quantize import Fp4QuantizeCase, rounded
from vbcompile.kernels.registry import Implementation, always, operator
from vbcompile.kernels.vendor_operators import VendorOperator

WEIGHT_ONLY = VendorOperator("npu::npu_weight_quant_batchmatmul", "npu", "2.5.1")
QUANTIZE = VendorOperator("npu::npu_dynamic_mx_quant", "npu", "2.7.1")
PRODUCT = VendorOperator("npu::npu_quant_matmul", "npu", "2.5.1")

# torch-npu's numbers of types that PyTorch does not have under a number of its own
_FLOAT8_E4M3, _E8M0, _FLOAT4 = 292, 293, 296
_OUTPUT_CODES = {torch.float16: 5, torch.bfloat16: 15}
_MOST = 65535
_LATER = "2.7.1"
_OPERATIONS_A_BYTE = 250.0
_PAIRED = f"columns in multiples of {2 * MXFP4.block_size}"


def _refuses_target(target: Target) -> str | None:
    if target.vendor != "huawei":
        return "runs on Huawei Ascend"
    if "fp4" not in target.features:
        return f"needs the FP4 units of an Ascend 950, this is {target.arch}"
    return None


def _refuses_case(case: Fp4LinearCase) -> str | None:
    if case.format_name != MXFP4.name:
        return f"reads MXFP4, not {case.format_name}: set fp4_format='mxfp4'"
    if case.layout != "plain":
        return f"takes the plain layout, not {case.layout}"
    if case.dtype not in _OUTPUT_CODES:
        return f"takes float16 and bfloat16, not {case.dtype}"
    if case.m == 0:
        return "there are no rows"
    if max(case.n, case.k) > _MOST:
        return f"takes up to {_MOST} rows and columns"
    return None


def _refuses_weight_only(target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := _refuses_target(target) or WEIGHT_ONLY.refuses("weight_dtype", _LATER):
        return reason
    return None if case is None else _refuses_case(case)


def _refuses_rounding(activations: str, target: Target, case: Fp4LinearCase | None) -> str | None:
    if reason := _refuses_target(target) or QUANTIZE.refuses() or PRODUCT.refuses("x2_dtype", _LATER):
        return reason
    if case is None:
        return None
    if case.activations != activations:
        return f"rounds activations to {activations.upper()}, which was not asked for"
    if case.k % (2 * MXFP4.block_size):
        return f"takes {_PAIRED}"
    return _refuses_case(case)


# ------------------------------------------------------------------------------------------------------------- products
def _weight_only(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """``x @ weight.T + bias``, the weight decoded inside the product."""
    rows = _padded_rows(x, k, codes.shape[1] * 2)
    plain = _is_one(row_scale)
    out = WEIGHT_ONLY(
        rows,
        codes.t(),
        block_scales.t(),
        bias=bias.to(x.dtype) if bias is not None and plain else None,
        antiquant_group_size=MXFP4.block_size,
        weight_dtype=_FLOAT4,
    )
    return _scaled(out, None if plain else row_scale, None if plain else bias, x)


def _rounding(
    activations: str, x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int,
    format_name: str, layout: str,
) -> Tensor:  # fmt: skip
    """``x @ weight.T + bias``, x rounded to E4M3 (E2M1) with a power of two every 32 columns."""
    four, rows = activations == "fp4", _padded_rows(x, k, k)
    if four:
        packed = rounded(rows, MXFP4.name, "nearest")
        rows, scales = packed.codes, packed.block_scales.unflatten(1, (-1, 2))
    else:
        rows, scales = QUANTIZE(rows, dst_type=_FLOAT8_E4M3)
    out = PRODUCT(
        rows,
        codes.t(),
        block_scales.unflatten(1, (-1, 2)).transpose(0, 1),
        pertoken_scale=scales,
        output_dtype=_OUTPUT_CODES[x.dtype],
        x1_dtype=_FLOAT4 if four else None,
        x2_dtype=_FLOAT4,
        scale_dtype=_E8M0,
        pertoken_scale_dtype=_E8M0,
        group_sizes=[1, 1, MXFP4.block_size] if four else [0, 0, MXFP4.block_size],
    )
    return _scaled(out, None if _is_one(row_scale) else row_scale, bias, x)


def _quantize(weight: Tensor, format_name: str, method: str, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """MXFP4 by the nearest rule; blocks that hold NaN or infinity get the scale of NaN."""
    codes, scales = QUANTIZE(weight, dst_type=_FLOAT4)
    return codes, scales.flatten(-2), weight.new_ones(*weight.shape[:-2], 1, dtype=torch.float32)


def _refuses_quantize(target: Target, case: Fp4QuantizeCase | None) -> str | None:
    if reason := _refuses_target(target) or QUANTIZE.refuses():
        return reason
    if case is None:
        return None
    if case.format_name != MXFP4.name:
        return f"makes MXFP4, not {case.format_name}"
    if case.method != "nearest":
        return f"knows the method nearest, not {case.method}"
    if case.dtype not in _OUTPUT_CODES:
        return f"takes float16 and bfloat16, not {case.dtype}"
    return f"takes {_PAIRED}" if case.k % (2 * MXFP4.block_size) else None


def _padded_rows(x: Tensor, k: int, columns: int) -> Tensor:
    rows = x.reshape(-1, k)
    return F.pad(rows, (0, columns - k)) if columns != k else rows


def _scaled(out: Tensor, row_scale: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    if row_scale is not None:
        out = out * row_scale
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])


_ones: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}


def _is_one(row_scale: Tensor) -> bool:
    """Whether the scales of the rows are all one, as in MXFP4 checkpoints; waits for the device once a tensor."""
    known = _ones.get(id(row_scale))
    if known is None or known[0]() is not row_scale or known[1] != row_scale._version:
        identity = id(row_scale)
        reference = weakref.ref(row_scale, lambda _: _ones.pop(identity, None))
        known = _ones[identity] = (reference, row_scale._version, bool((row_scale == 1).all()))
    return known[2]


def _cost(target: Target, case: Fp4LinearCase) -> float:
    """Time beside the bfloat16 product: bytes of the weight, or operations where there are many rows."""
    return roofline(case, 0.8, 0.8, balance=_OPERATIONS_A_BYTE)


def _rounded_cost(faster: float) -> Callable[[Target, Fp4LinearCase], float]:
    """Units that multiply ``faster`` times as fast as bfloat16's, behind a pass over the activations."""

    def cost(target: Target, case: Fp4LinearCase) -> float:
        return roofline(case, 0.7, 0.7, faster=faster, balance=_OPERATIONS_A_BYTE)

    return cost


operator("fp4_quantize").register(Implementation("npu_dynamic_mx", _quantize, _refuses_quantize, always(1.0)))
operator("fp4_linear").register(Implementation("npu_mxfp4", _weight_only, _refuses_weight_only, _cost))
for _activations, _faster in (("fp8", 2.0), ("fp4", 4.0)):
    operator("fp4_linear").register(
        Implementation(
            f"npu_mxfp4_{_activations}",
            partial(_rounding, _activations),
            partial(_refuses_rounding, _activations),
            _rounded_cost(_faster),
        )
    )
