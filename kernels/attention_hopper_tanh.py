"""Polynomials for capped scores: what the Hopper forward is told about ``factor * tanh(inner * score)``.

    tanh(u) = u (a + b u^2 + c u^4)    for |u| < limit

The kernel evaluates them in ``t = score^2 + shift``. The shift makes ``t`` reach a power of two where ``|u|`` reaches
the limit, and never fall below half of that: the exponents of all ``t``, or-ed, tell whether a limit was passed.
"""

import math
from typing import Final

# terms -> limit, coefficients (minimax); relative errors 9.4e-4 and 2.2e-4, where rounding to bfloat16 makes 2e-3
TANH: Final[dict[int, tuple[float, tuple[float, ...]]]] = {
    2: (0.5, (0.99906306, -0.30277883)),
    3: (0.75, (0.99978525, -0.32629693, 0.09735557)),
}
_ORDINARY: Final = (2.0**-60, 2.0**60)  # sizes of scores at the limit for which nothing here overflows


def capped_numbers(inner: float, factor: float, shift: float) -> tuple[float, ...]:
    """Numbers for the kernel: ``reference``, taken from all logits in base two, which is their bound less ``shift``;
    inner; factor; the largest weight of a score within the shorter polynomial's limit; then of each polynomial, the
    shorter one first, its shift, the power of two and the coefficients of ``t``.

    The reference is a whole number: equal scores near zero, the common case of equal ones, then have weights that
    rounding does not change.
    """
    reference = float(int(factor - shift + 1.0))
    numbers = [reference, inner, factor, 2.0 ** (factor * math.tanh(TANH[2][0]) - reference)]
    for limit, coefficients in TANH.values():
        size = abs(limit / inner) if inner else math.inf
        if not _ORDINARY[0] < size < _ORDINARY[1]:  # a power of two that every ``t`` passes
            numbers += [1.0, 0.0, *(0.0 for _ in coefficients)]
            continue
        end = 4.0 * 2.0 ** math.floor(math.log2(size * size))
        start = end - size * size
        a, b, c = (factor * inner ** (2 * n + 1) * x for n, x in enumerate((*coefficients, 0.0)[:3]))
        numbers += [start, end, *(a - b * start + c * start * start, b - 2 * c * start, c)[: len(coefficients)]]
    return tuple(numbers)
