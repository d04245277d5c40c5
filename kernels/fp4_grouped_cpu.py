"""The grouped FP4 linear layer on CPUs: one ``fp4_linear`` for every expert that has rows."""

import torch
from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels.fp4_grouped import Fp4GroupedCase
from vbcompile.kernels.fp4_linear import choose, fp4_linear, make_case
from vbcompile.kernels.registry import Implementation, always, operator


def grouped_product(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, ends: Tensor, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """See :func:`vbcompile.kernels.fp4_grouped.fp4_grouped_linear`."""
    out = torch.zeros(x.shape[0], row_scale.shape[1], dtype=x.dtype)
    begin = 0
    for expert, end in enumerate(min(end, x.shape[0]) for end in ends.tolist()):
        if end > begin:
            weight = (codes[expert], block_scales[expert], row_scale[expert])
            out[begin:end] = fp4_linear(x[begin:end], *weight, None, k, format_name, layout)
            begin = end
    return out


def _refuses(target: Target, case: Fp4GroupedCase | None) -> str | None:
    if target.device_type != "cpu":
        return "runs on CPUs only"
    if case is None:
        return None
    one = make_case(case.dtype, -(-case.rows // case.experts), case.n, case.k, case.format_name, case.layout)
    choice = choose(target, one)
    return choice.explain() if choice.implementation.name == "reference" else None


operator("fp4_grouped_linear").register(Implementation("experts", grouped_product, _refuses, always(2.0)))
