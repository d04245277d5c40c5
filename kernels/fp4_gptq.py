"""Round a weight to FP4 so that the layer's output, not the weight, changes least: GPTQ (arXiv 2210.17323).

Columns are rounded one after another; each one's error is made up for by the columns that are still to come, by the
second-order model ``|(W - Q) X|**2`` with ``H = X X^T`` of calibration inputs X. Block scales are searched when their
block is reached, on the weights as they have become by then, so no format changes and the result runs on any kernel.
"""

import torch
from torch import Tensor

from vbcompile.kernels.fp4 import PackedWeight
from vbcompile.kernels.fp4_formats import decode_scales, encode_e2m1, fp4_format, pack_nibbles, round_e2m1
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.fp4_rounding import choose_scales, scale_rule

_GROUP = 32  # columns whose updates of the rest are one product


def quantize_with_inputs(
    weight: Tensor, second_moment: Tensor, format_name: str = "nvfp4", *, damping: float = 0.01, name: str = "weight"
) -> PackedWeight:
    """Pack ``weight`` for inputs with the given second moment.

    Args:
        weight: ``[N, K]``, floating point.
        second_moment: ``X X^T`` of the inputs, float32 ``[K, K]``; any positive factor.
        format_name: ``nvfp4`` or ``mxfp4``.
        damping: share of the mean of the diagonal that is added to it.
        name: what errors call the weight.

    Raises:
        ValueError: for the reasons of :func:`vbcompile.kernels.fp4_quantize.quantize`, or ``second_moment`` is of
            another shape or not finite.
    """
    fmt, (n, k) = fp4_format(format_name), weight.shape
    plain = quantize(weight, format_name, name=name)
    if second_moment.shape != (k, k) or not bool(torch.isfinite(second_moment).all()):
        raise ValueError(f"{name}: the second moment of the inputs must be finite [{k}, {k}]")
    factor = _inverse_factor(second_moment.float(), damping)
    pivots = factor.diagonal().tolist()
    rest = weight.detach().t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # what is to come
    rounded = torch.zeros(plain.codes.shape[1] * 2, n, device=weight.device)  # in units of the block's scale
    scales = torch.empty_like(plain.block_scales)
    unit, rule = plain.tensor_scale.expand(n).unsqueeze(1), scale_rule(fmt, "mse")
    for start in range(0, k, _GROUP):
        stop = min(start + _GROUP, k)
        errors = torch.empty(stop - start, n, device=weight.device)
        for column in range(start, stop):
            if column % fmt.block_size == 0:
                block = rest[column : column + fmt.block_size].t()
                block = torch.nn.functional.pad(block, (0, fmt.block_size - block.shape[1])).contiguous()
                chosen = choose_scales(block.unsqueeze(1), unit, fmt, rule)[:, 0]
                scales[:, column // fmt.block_size] = chosen
                scale = decode_scales(chosen, fmt) * unit[:, 0]
                inverse = torch.where(scale == 0, 0.0, 1 / scale)
            code = round_e2m1(rest[column] * inverse)
            rounded[column] = code
            error = errors[column - start]
            torch.addcmul(rest[column], code, scale, value=-1, out=error).div_(pivots[column])
            rest[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    codes = pack_nibbles(encode_e2m1(rounded.t().contiguous()))
    return PackedWeight(codes, scales, plain.tensor_scale, fmt.name, (n, k))


def _inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped matrix's inverse; more damping where rounding makes it indefinite."""
    diagonal = second_moment.diagonal()
    mean = diagonal.mean()
    identity = torch.eye(len(diagonal), device=second_moment.device)
    scaled = second_moment / torch.where(mean == 0, 1.0, mean)
    while damping < 1e3:
        lower, failed = torch.linalg.cholesky_ex(scaled + damping * identity)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return upper
        damping *= 10
    raise ValueError("the second moment of the inputs is not positive")
