"""Bias and mask of a call of attention as tensors, for kernels that read them, and the rows that they leave empty."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from vbcompile.kernels.score_function import ScoreFunction, accumulation_dtype, additive_bias, evaluate

_ABSORBS = -1e4  # from here on, float32 has no more than three decimals left beside the bias
_LARGEST = 1e30  # of constants that no few additions and products make infinite
_FINITE = {"add", "sub", "mul", "neg", "abs", "maximum", "minimum", "where", "to_float", "to_int", "floordiv", "mod"}
_FINITE |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "to_bool", "tanh", "sigmoid", "sin", "cos"}
_INDICES = {"q_index", "k_index", "lead_index", "q_length", "k_length"}


class DenseScores:
    """What is added to the scores, and what is hidden.

    Args:
        function: its logits are the score plus a bias (``additive_bias``).
        lead: leading sizes of the canonical space.
        dtype: of the queries.

    Attributes:
        bias: in the accumulation type, broadcasts to ``[*lead, Q, K]`` and has the sizes Q and K; None: no bias.
        keep: boolean of such a shape, True where a key takes part; None: all do.
    """

    def __init__(
        self,
        function: ScoreFunction,
        captured: Sequence[Tensor],
        lead: Sequence[int],
        q_length: int,
        k_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        split = _split(function)
        if split is None:
            raise ValueError("the score function is no additive bias with a mask")
        self._function, self._position = split
        self._captured, self._lead, self._size = captured, tuple(lead), (q_length, k_length)
        self._device, self._dtype = device, accumulation_dtype(dtype)

    @cached_property
    def bias(self) -> Tensor | None:
        value = self._value(self._position)
        return None if value is None else value.to(self._dtype)

    @cached_property
    def keep(self) -> Tensor | None:
        return self._value(self._function.mask)

    def _value(self, position: int | None) -> Tensor | None:
        (value,) = evaluate(
            self._function,
            (position,),
            score=None,
            captured=self._captured,
            lead=self._lead,
            q_length=self._size[0],
            k_length=self._size[1],
            device=self._device,
            dtype=self._dtype,
        )
        if value is None:
            return None
        return value.broadcast_to(torch.broadcast_shapes(value.shape, (1,) * len(self._lead) + self._size))

    @cached_property
    def additive(self) -> Tensor:
        """Bias and mask in one tensor, ``-inf`` where a key does not take part."""
        assert self.bias is not None or self.keep is not None
        if self.keep is None:
            return self.bias  # type: ignore[return-value]
        shown = torch.zeros((), dtype=self._dtype, device=self.keep.device) if self.bias is None else self.bias
        return torch.where(self.keep, shown, -torch.inf)

    @cached_property
    def may_hold_infinity(self) -> bool:
        """Whether the bias itself may hide keys, by ``-inf``: it may unless it is made of indices and small numbers."""
        return self._position is not None and not self._is_finite(self._position)

    def _is_finite(self, position: int) -> bool:
        name, *arguments = self._function.program[position]
        if name == "const":
            return abs(arguments[0]) < _LARGEST
        return name in _INDICES or (name in _FINITE and all(map(self._is_finite, arguments)))

    @cached_property
    def shown(self) -> Tensor | None:
        """True where a key takes part, whether mask or bias says so; None: all do."""
        if not self.may_hold_infinity:
            return self.keep
        assert self.bias is not None
        finite = self.bias > -torch.inf
        return finite if self.keep is None else finite & self.keep

    @cached_property
    def empty(self) -> Tensor | None:
        """Rows without a key, ``[*lead, Q]``; None where there can be none."""
        return None if self.shown is None else self._rows(~self.shown.any(-1))

    @cached_property
    def poisoned(self) -> Tensor | None:
        """Empty rows whose scores still get a gradient (NaN, as softmax gives): emptied by a bias, not by a mask."""
        if self._function.empty_rows != "nan" or self.empty is None:
            return None
        return self.empty if self.keep is None else self.empty & self._rows(self.keep.any(-1))

    @cached_property
    def absorbed(self) -> bool:
        """Whether a row's bias is so low that the logarithm of its sum cannot hold its number of keys (a minimum for
        all). Waits for the device where there is a bias."""
        if self.bias is None:
            return False
        highest = self.additive.amax(-1)
        return bool(((highest <= _ABSORBS) & (highest > -torch.inf)).any())

    def _rows(self, t: Tensor) -> Tensor:
        return t.expand(*self._lead, t.shape[-1])


def last_place(lse: Tensor) -> float:
    """Unit in the last place of the largest finite number: how far weights ``exp(score - lse)`` are off at most. Waits
    for the device."""
    largest = lse.masked_fill(~lse.isfinite(), 0.0).abs().amax() if lse.numel() else 0.0
    return torch.finfo(lse.dtype).eps * float(largest)


def is_coarse(lse: Tensor, dtype: torch.dtype) -> bool:
    """Whether weights that a vendor's backward computes from ``lse`` would be off by more than those of a float32 call
    may be; those of 16-bit calls may. Waits for the device in float32."""
    return dtype == torch.float32 and last_place(lse) > 256 * torch.finfo(dtype).eps


_split = lru_cache(maxsize=1024)(additive_bias)


@lru_cache(maxsize=1024)
def bias_fits(function: ScoreFunction, captured: tuple[torch.dtype, ...], dtype: torch.dtype) -> bool:
    """Whether a kernel that reads the bias in ``dtype`` loses nothing that a model computing in ``dtype`` has.

    True where the bias is chosen from, or a sum of, captured tensors of that type and constants that it holds. A bias
    that is computed from indices or captured in a wider type has digits, or finite minima, that ``dtype`` has not.
    """
    extended, bias = _split(function) or (function, None)
    if bias is None:
        return True

    def fits(position: int) -> bool:
        name, *arguments = extended.program[position]
        if name == "captured":
            return captured[arguments[0]] == dtype
        if name == "const":
            return float(torch.tensor(float(arguments[0])).to(dtype)) == arguments[0]
        if name == "where":
            return all(map(fits, arguments[1:]))
        return name in ("add", "sub", "neg", "maximum", "minimum", "to_float") and all(map(fits, arguments))

    return fits(bias)
