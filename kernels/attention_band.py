"""Masks that are a band: row ``i`` sees the keys ``i + low <= j <= i + high``, as causal masks and windows do."""

import functools
from dataclasses import dataclass

from vbcompile.kernels.score_function import ScoreFunction, affine

UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Band:
    """Which keys a row sees.

    Attributes:
        low, high: bounds of ``j - i``, both included; ``-UNBOUNDED`` and ``UNBOUNDED`` where there is none.
    """

    low: int = -UNBOUNDED
    high: int = UNBOUNDED

    def __and__(self, other: "Band") -> "Band":
        return Band(max(self.low, other.low), min(self.high, other.high))

    def sees_everything(self, q_length: int, k_length: int) -> bool:
        """Whether the mask hides nothing."""
        return self.low <= 1 - q_length and self.high >= k_length - 1

    def reaches_all_rows(self, q_length: int, k_length: int) -> bool:
        """Whether every row sees at least one key."""
        return self.low <= self.high and self.high >= 0 and self.low <= k_length - q_length


@functools.lru_cache(maxsize=1024)
def mask_band(function: ScoreFunction, q_length: int, k_length: int) -> Band | None:
    """The band that the mask of ``function`` is; None for no mask, and for masks that are anything else."""
    if function.mask is None:
        return None
    return _Bands(function, q_length, k_length).of(function.mask)


class _Bands:
    """Reads instructions of one function as bands."""

    def __init__(self, function: ScoreFunction, q_length: int, k_length: int) -> None:
        self.function, self.q_length, self.k_length = function, q_length, k_length

    def of(self, position: int) -> Band | None:
        name, *arguments = self.function.program[position]
        if name == "const":
            return Band() if arguments[0] is True else None
        if name == "and":
            left, right = (self.of(a) for a in arguments)
            return None if left is None or right is None else left & right
        if name == "not":
            name, *arguments = self.function.program[arguments[0]]
            name = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}.get(name, name)
        if name in ("le", "lt"):
            return self.at_most(arguments[0], arguments[1], int(name == "lt"))
        if name in ("ge", "gt"):
            return self.at_most(arguments[1], arguments[0], int(name == "gt"))
        return None

    def at_most(self, small: int, large: int, gap: int) -> Band | None:
        """The band of ``small + gap <= large``."""
        name, *arguments = self.function.program[small]
        if name == "abs":
            return self.within(arguments[0], large, gap)
        left, right = self.affine(small), self.affine(large)
        if left is None or right is None:
            return None
        rows, columns, constant = (b - a for a, b in zip(left, right, strict=True))
        if (rows, columns) == (1, -1):
            return Band(high=constant - gap)
        return Band(low=gap - constant) if (rows, columns) == (-1, 1) else None

    def within(self, difference: int, limit: int, gap: int) -> Band | None:
        """The band of ``abs(difference) + gap <= limit``."""
        middle, bound = self.affine(difference), self.affine(limit)
        if middle is None or bound is None or bound[:2] != (0, 0) or middle[:2] not in ((1, -1), (-1, 1)):
            return None
        reach = bound[2] - gap
        center = middle[2] if middle[0] == 1 else -middle[2]  # abs(i - j + center)
        return Band(center - reach, center + reach)

    def affine(self, position: int) -> tuple[int, int, int] | None:
        return affine(self.function, position, self.q_length, self.k_length)
