"""What an implementation must know to accept or refuse a call of attention: shapes, dtypes, features, no tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vbcompile.kernels.score_function import ScoreFunction, additive_bias, causal_offset

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_SIZE = 256  # features of one head that our kernels take


@dataclass(frozen=True)
class AttentionCase:
    """What an implementation must know to accept or refuse, without the tensors.

    Attributes:
        q, k, v: shapes.
        captured: ``(shape, dtype)`` of each captured tensor.
        contiguous_rows: whether the last axis of q, k and v has stride 1.
        aligned: whether their rows start at multiples of 16 bytes, as the tensor memory accelerator needs.
        needs: for the backward, which of ``(q, k, v, *captured)`` want a gradient; empty for the forward.
        lse_gradient: whether a gradient with respect to ``lse`` comes in.
        positive_scale: whether the scores' factor is above zero.
        usable_scale: whether it is finite and not zero.
        deterministic: whether repeated runs must agree in every bit.
    """

    dtype: torch.dtype
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    captured: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    dropout: bool
    function: str
    contiguous_rows: bool = True
    aligned: bool = True
    needs: tuple[bool, ...] = ()
    lse_gradient: bool = False
    positive_scale: bool = True
    usable_scale: bool = True
    deterministic: bool = False

    @property
    def score_function(self) -> ScoreFunction:
        return ScoreFunction.loads(self.function)

    @property
    def lead(self) -> tuple[int, ...]:
        """The broadcast leading sizes."""
        shapes = (self.q, self.k, self.v, *(shape for shape, _ in self.captured))
        return _broadcast([shape[:-2] for shape in shapes])

    @property
    def q_length(self) -> int:
        return self.q[-2]

    @property
    def k_length(self) -> int:
        return self.k[-2]

    @property
    def causal_offset(self) -> int | None:
        """``c`` where the only thing that happens to the scores is the mask ``j <= i + c``."""
        return causal_offset(self.score_function, self.q_length, self.k_length)

    @property
    def form(self) -> str:
        """``plain``, ``causal``, ``additive`` (bias and mask that do not read the score) or ``general``."""
        function = self.score_function
        if function.program[function.score] == ("score",) and function.mask is None and function.sink is None:
            return "plain"
        if self.causal_offset is not None:
            return "causal"
        return "additive" if function.sink is None and additive_bias(function) else "general"


def make_case(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    function: str,
    needs: Sequence[bool] = (),
    lse_gradient: bool = False,
    traced: bool = False,
) -> AttentionCase:
    """Describe a call; ``traced``: of tensors without memory, which is taken to begin where it should."""
    return AttentionCase(
        q.dtype,
        tuple(map(int, q.shape)),
        tuple(map(int, k.shape)),
        tuple(map(int, v.shape)),
        tuple((tuple(map(int, c.shape)), c.dtype) for c in captured),
        dropout_p > 0,
        function,
        all(t.stride(-1) == 1 for t in (q, k, v)),
        all((traced or t.data_ptr() % 16 == 0) and _has_aligned_rows(t) for t in (q, k, v)),
        tuple(needs),
        lse_gradient,
        scale > 0,
        0 < abs(scale) < math.inf,
        torch.are_deterministic_algorithms_enabled(),
    )


def _has_aligned_rows(t: Tensor) -> bool:
    itemsize = t.element_size()
    return all(n == 1 or stride * itemsize % 16 == 0 for n, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True))


def rounds_to_tf32(t: Tensor) -> bool:
    """Whether PyTorch's own products of such tensors do, by whichever of its settings: ``allow_tf32`` is an error to
    read where another one was used."""
    return t.dtype == torch.float32 and t.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"


def lead_shape(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]) -> torch.Size:
    """The broadcast leading axes."""
    return _broadcast([t.shape[:-2] for t in (q, k, v, *captured)])


def _broadcast(shapes: Sequence[Sequence[int]]) -> torch.Size:
    if all(type(size) is int for shape in shapes for size in shape):  # much quicker than PyTorch's own
        sizes = [{size for size in column if size != 1} or {1} for column in zip(*shapes, strict=True)]
        if all(len(different) == 1 for different in sizes):
            return torch.Size(different.pop() for different in sizes)
    return torch.broadcast_shapes(*shapes)


def check(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], dropout_p: float, seed: Tensor | None) -> None:
    """Raise ValueError, naming the tensor, for inputs that do not fit together."""
    named = {"q": q, "k": k, "v": v, **{f"captured[{n}]": c for n, c in enumerate(captured)}}
    for name, t in named.items():
        if t.dim() != q.dim() or not 3 <= t.dim() <= 6:
            raise ValueError(f"attention: {name} has shape {tuple(t.shape)}; all need one rank from 3 to 6")
        if t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device}, q on {q.device}")
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v need one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(f"attention: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"attention: dropout probability {dropout_p} is not in [0, 1]")
    if dropout_p > 0 and seed is None:
        raise ValueError("attention: dropout needs a seed tensor")
