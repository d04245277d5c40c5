"""FP4 weights times activations rounded to FP8, on tensor cores that multiply FP8: both as E4M3 with a scale a row.

An E2M1 code times its block scale is exact in E4M3 for every MXFP4 weight and for 73 % of the pairs of NVFP4, the rest
is rounded to nearest. Gaussian layers: 21.1 dB with NVFP4, of 21.7 dB with exact products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.device import Target, get_target
from vbcompile.kernels import fp4_linear_triton
from vbcompile.kernels.fp4_layout import rows_of
from vbcompile.kernels.launches import launch

NEEDS = "needs NVIDIA's FP8 tensor cores (sm_89 or later)"
_OLDEST = (8, 9)
_ALIGNMENT = 16
_ROW_BLOCK = 4096
_ENOUGH_ROWS = 512  # that blocks of few warps fill the device
_WEIGHT_FACTOR = 8.0  # what fp4_linear_triton.dequantize leaves out in FP8


def multiplies_fp8(target: Target) -> bool:
    """Whether a target has NVIDIA's FP8 tensor cores."""
    capability = target.compute_capability
    return target.vendor == "nvidia" and capability is not None and capability >= _OLDEST


def refuses_fp8(target: Target, dtype: torch.dtype, n: int, k: int, layout: str, activations: str) -> str | None:
    """Why this path cannot run a case."""
    if activations != "fp8":
        return "rounds activations to FP8, which was not asked for"
    if not multiplies_fp8(target):
        return NEEDS
    if layout == "plain":
        return "the weight is in the plain layout"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    if n % _ALIGNMENT or k % _ALIGNMENT:
        return f"takes rows and columns in multiples of {_ALIGNMENT}"
    return None


def quantize_rows(x: Tensor, paired: bool = False, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """``x [m, k]`` as float8_e4m3fn and scales float32 ``[m, 1]`` times ``factor``: the largest of a row becomes 448.

    ``paired``: of every 16 columns, ``2 i + h`` of the result is ``8 h + i`` of x, which puts the columns that a thread
    holds of the layout ``fragments2t`` side by side.
    """
    from vbcompile.kernels.fp4_linear_kernels import fp8_rows_kernel

    m, k = x.shape
    out = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    most = _ROW_BLOCK if m >= _ENOUGH_ROWS else 16384  # the longest rows are read twice, which keeps more in flight
    block = min(most, 1 << (k - 1).bit_length())
    launch(
        fp8_rows_kernel,
        (m,),
        x,
        out,
        scale,
        k,
        x.stride(0),
        factor,
        BLOCK=block,
        PAIRED=paired,
        num_warps=max(1, min(16, block // 1024)),
        **fp4_linear_triton.early(get_target(x.device)),
    )
    return out, scale


def product_fp8(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """``x [..., k] @ weight.T + bias`` in the dtype of x: weight decoded to FP8, then the vendor's product."""
    left, left_scale = quantize_rows(rows_of(x, k), factor=_WEIGHT_FACTOR)
    weight = fp4_linear_triton.dequantize(codes, block_scales, row_scale, k, format_name, layout, torch.float8_e4m3fn)
    recipe = F.ScalingType.RowWise
    out = F.scaled_mm(
        left, weight.t(), left_scale, recipe, row_scale.unsqueeze(0), recipe,
        bias=None if bias is None else bias.to(torch.bfloat16), output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], row_scale.shape[0])
