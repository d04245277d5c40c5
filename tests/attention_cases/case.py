"""What a case of the attention corpus is, and how its inputs are drawn."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

INFERENCE: Final = "inference"
TRAINING: Final = "training"
BOTH: Final = (INFERENCE, TRAINING)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one run; the letters that cases use are in brackets.

    Attributes:
        batch: [B]
        heads: query heads [H]
        kv_heads: key and value heads of grouped attention [G], divides ``heads``.
        queries: query length, also the key length of self attention [S]
        keys: key length of cross attention [T]
        features: features per head of queries and keys [D]
        value_features: features per head of values, where a case lets them differ [E]
    """

    batch: int = 2
    heads: int = 6
    kv_heads: int = 2
    queries: int = 10
    keys: int = 7
    features: int = 8
    value_features: int = 5


DISTINCT: Final = Sizes()
LONGER: Final = replace(DISTINCT, batch=3, queries=13, keys=9)  # the second size of a dynamic run
COINCIDENT: Final = Sizes(4, 4, 2, 4, 4, 4, 4)  # equal sizes hide no confusion of axes from us, only from a size check
SINGLE: Final = replace(DISTINCT, batch=1)


class Draw:
    """Draws the inputs of a case: fresh random tensors, equal for equal seeds whatever the dtype and device."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> None:
        self.B, self.H, self.G = sizes.batch, sizes.heads, sizes.kv_heads
        self.S, self.T, self.D, self.E = sizes.queries, sizes.keys, sizes.features, sizes.value_features
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def constant(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the run's dtype, without gradient."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale
        return values.to(self._dtype).to(self._device)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """As ``constant``, with gradient."""
        return self.constant(*shape, scale=scale).requires_grad_()

    def flags(self, *shape: int, share: float = 0.7) -> Tensor:
        """Booleans, True with that probability, and at least once along the last axis."""
        flags = torch.rand(shape, generator=self._generator) < share
        flags[..., 0] = True
        return flags.to(self._device)

    def flags_with_an_empty_row(self, *shape: int) -> Tensor:
        """As ``flags``, and row 2 (the axis before the last) is False throughout."""
        flags = self.flags(*shape)
        flags[..., 2, :] = False
        return flags

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(self._device)

    def padding(self, batch: int, length: int) -> Tensor:
        """``[batch, length]``, True for real tokens: rows of different lengths, padded at the right."""
        lengths = self.integers(max(1, length // 2), length + 1, batch, 1)
        return torch.arange(length, device=self._device) < lengths

    def documents(self, batch: int, length: int) -> Tensor:
        """``[batch, length]`` document numbers of packed sequences, not decreasing."""
        return self.integers(0, 2, batch, length).cumsum(-1) // 2

    def position(self, index: int) -> Tensor:
        return torch.tensor([index], device=self._device)


def qkv(d: Draw) -> tuple[Tensor, ...]:
    """Self attention, ``[B, H, S, D]`` three times."""
    return d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.S, d.D)


def cross(d: Draw) -> tuple[Tensor, ...]:
    """``[B, H, S, D]``, ``[B, H, T, D]``, ``[B, H, T, D]``."""
    return d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.D)


def rows_first(d: Draw) -> tuple[Tensor, ...]:
    """``[B, S, H, D]``, then ``[B, T, H, D]`` twice."""
    return d.normal(d.B, d.S, d.H, d.D), d.normal(d.B, d.T, d.H, d.D), d.normal(d.B, d.T, d.H, d.D)


def folded(d: Draw) -> tuple[Tensor, ...]:
    """Heads folded into the batch: ``[B*H, S, D]``, then ``[B*H, T, D]`` twice."""
    n = d.B * d.H
    return d.normal(n, d.S, d.D), d.normal(n, d.T, d.D), d.normal(n, d.T, d.D)


def grouped(d: Draw) -> tuple[Tensor, ...]:
    """``[B, H, S, D]``, then ``[B, G, T, D]`` twice."""
    return d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.G, d.T, d.D), d.normal(d.B, d.G, d.T, d.D)


def tokens(d: Draw) -> tuple[Tensor, ...]:
    """Hidden states ``[B, S, H*D]``."""
    return (d.normal(d.B, d.S, d.H * d.D),)


def plus(base: Callable[[Draw], tuple[Tensor, ...]], *extra: Callable[[Draw], Tensor]) -> Callable[[Draw], tuple]:
    """``base`` followed by more inputs."""
    return lambda d: (*base(d), *(make(d) for make in extra))


@dataclass(frozen=True)
class Case:
    """One way of writing attention.

    Attributes:
        name: unique.
        family: what it varies.
        target: the function, or the module class, which takes ``Sizes``.
        inputs: draws the inputs.
        sites: accepted numbers of fused sites; ``(0,)`` where fusing would be wrong, ``(0, n)`` where both are right.
        modes: in which of inference and training the case makes sense.
        dropout: rate of active dropout in training, 0 for none. Results are then random: only statistics are compared.
        random: results depend on PyTorch's random numbers, so they equal eager's only where eager's operators run.
        mutates: whether the case writes to its inputs.
        fullgraph: whether Dynamo captures it as one graph.
        static_only: the case bakes sizes in, so it cannot run with dynamic shapes.
    """

    name: str
    family: str
    target: Any
    inputs: Callable[[Draw], tuple[Tensor, ...]]
    sites: tuple[int, ...]
    modes: tuple[str, ...] = BOTH
    dropout: float = 0.0
    random: bool = False
    mutates: bool = False
    fullgraph: bool = True
    static_only: bool = False

    @property
    def must_fuse(self) -> bool:
        return 0 not in self.sites

    @property
    def must_refuse(self) -> bool:
        return self.sites == (0,)

    def build(self, sizes: Sizes, dtype: torch.dtype, device: str) -> Callable[..., Any]:
        """The callable under test: the function itself, or a new module with reproducible parameters."""
        if not isinstance(self.target, type):
            return self.target
        torch.manual_seed(zlib.crc32(self.name.encode()))
        module: nn.Module = self.target(sizes)
        return module.to(device=device, dtype=dtype)

    def make_inputs(self, dtype: torch.dtype, device: str, seed: int, sizes: Sizes = DISTINCT) -> tuple[Tensor, ...]:
        """Fresh random inputs; those that want a gradient have ``requires_grad``."""
        return self.inputs(Draw(sizes, dtype, device, seed))


REGISTRY: dict[str, Case] = {}


def _register(sites: Sequence[int], family: str, inputs: Callable[[Draw], tuple], flags: dict[str, Any]) -> Callable:
    def add(target: Any) -> Any:
        name = target.__name__
        if name in REGISTRY:
            raise ValueError(f"two cases are called {name}")
        REGISTRY[name] = Case(name, family, target, inputs, tuple(sites), **flags)
        return target

    return add


def fuses(family: str, inputs: Callable[[Draw], tuple] = qkv, sites: int | Sequence[int] = 1, **flags: Any) -> Callable:
    """Register a case with that many fused sites (several accepted counts: a sequence)."""
    return _register([sites] if isinstance(sites, int) else sites, family, inputs, flags)


def refuses(inputs: Callable[[Draw], tuple] = qkv, **flags: Any) -> Callable:
    """Register a case that must be left alone."""
    return _register([0], "refuse", inputs, flags)


def either(family: str, inputs: Callable[[Draw], tuple] = qkv, sites: int = 1, **flags: Any) -> Callable:
    """Register a case that may be fused or left alone; only its results matter."""
    return _register(range(sites + 1), family, inputs, flags)
