"""Estimated times of FP4 products beside the vendor's bfloat16 product of the same shape: a roofline per weight.

Times are bytes of memory traffic for each element of the weight, on a device that computes ``balance`` operations in
bfloat16 while it moves a byte.
"""

from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_linear import Fp4LinearCase

BALANCE = 260.0
"""Of data-centre GPUs."""


def bits_per_weight(format_name: str) -> float:
    """Stored bits of a weight, its share of the block scale included."""
    return 4 + 8 / fp4_format(format_name).block_size


def dense(m: int, weight_bytes: float = 2, balance: float = BALANCE) -> float:
    """Time of a product of ``m`` rows with unpacked weights."""
    return max(weight_bytes, 2 * m / balance)


def roofline(
    case: Fp4LinearCase,
    memory_share: float,
    compute_share: float,
    *,
    faster: float = 1.0,
    before: float = 0.0,
    balance: float = BALANCE,
) -> float:
    """Time of a product that reads packed weights, over that of the bfloat16 one.

    Args:
        memory_share, compute_share: of the device's limits that the kernel reaches.
        faster: times as fast as bfloat16 that the units multiply.
        before: time of a pass ahead of the product, such as rounding x.
    """
    stored = bits_per_weight(case.format_name) / 8
    ours = before + max(stored / memory_share, 2 * case.m / balance / faster / compute_share)
    return ours / dense(case.m, balance=balance)
