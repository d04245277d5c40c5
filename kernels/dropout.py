"""Dropout masks that a kernel and plain PyTorch compute alike: counter-based, so that nothing is stored.

Element ``n`` of a row-major tensor is kept where ``uniform(seed, n) > p``. The generator is Philox 4x32 with ten rounds
(Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on the counter ``(n, 0, 0, 0)``,
its first word made a float in ``[0, 1)``; ``triton.language.rand`` gives the same numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_UNIT = 4.6566127342e-10  # the largest float32 that maps 2**31 - 1 below one


def dropout_keep(seed: Tensor, shape: Sequence[int], p: float, device: torch.device | str) -> Tensor:
    """Which elements dropout keeps.

    Args:
        seed: int64 ``[1]`` on ``device``; it is not read on the host.
        shape: shape of the tensor that is dropped from.
        p: probability with which an element is dropped.

    Returns:
        bool tensor of that shape, True where kept.
    """
    count = 1
    for size in shape:
        count *= size
    return (uniform(seed, torch.arange(count, device=device)) > p).view(list(shape))


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """Uniform float32 in ``[0, 1)`` for each 64-bit ``offset``, by a seed ``[1]`` of type int64."""
    word = _philox(seed, offset)
    signed = torch.where(word >= 2**31, word - 2**32, word)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * _UNIT


def _philox(seed: Tensor, offset: Tensor) -> Tensor:
    """First 32-bit word of the generator's output, as int64."""
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = offset & _LOW, (offset >> 32) & _LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2**64: the bits stay right
        c0, c2 = (product1 >> 32 & _LOW) ^ c1 ^ key0, (product0 >> 32 & _LOW) ^ c3 ^ key1
        c1, c3 = product1 & _LOW, product0 & _LOW
        key0, key1 = key0 + _KEY_STEPS[0] & _LOW, key1 + _KEY_STEPS[1] & _LOW
    return c0
