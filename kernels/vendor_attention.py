"""What the attention kernels of all vendors have in common: four axes, a bias, a mask, one extra logit per head."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.kernels.attention import arrange, reduce_to
from vbcompile.kernels.attention_band import mask_band
from vbcompile.kernels.attention_case import AttentionCase, lead_shape
from vbcompile.kernels.attention_dense import DenseScores
from vbcompile.kernels.attention_fold import fold, fold_heads
from vbcompile.kernels.score_function import ScoreFunction, accumulation_dtype, additive_bias, evaluate


# -------------------------------------------------------------------------------------------- refusals
def refuses_case(case: AttentionCase, dtypes: Sequence[torch.dtype]) -> str | None:
    """What no vendor's kernel expresses."""
    if case.dtype not in dtypes:
        return f"takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {case.dtype}"
    if 0 in (*case.q, *case.k, *case.v):
        return "a tensor is empty"
    if additive_bias(case.score_function) is None:
        return "knows no score function beyond an additive bias and a mask"
    if case.lse_gradient and not case.dropout:
        return "has no gradient for the logarithm of the softmax's sum"
    return None


def sink_needs(case: AttentionCase) -> tuple[int, ...]:
    """Captured tensors that want a gradient and that the sink alone reads, as it is."""
    function = case.score_function
    number = _direct_capture(function, function.sink)
    if number is None or number in function.captured(function.score, function.mask):
        return ()
    return (number,) if case.needs and case.needs[3 + number] else ()


def refuses_captured_gradients(case: AttentionCase, allowed: Sequence[int] = ()) -> str | None:
    """A gradient is wanted for a captured tensor other than those ``allowed``."""
    wanted = [n for n, need in enumerate(case.needs[3:]) if need and n not in allowed]
    return "has no gradient for the bias" if wanted else None


def refuses_sink(case: AttentionCase) -> str | None:
    """The kernels take one number per head."""
    function = case.score_function
    if function.sink is None:
        return None
    shapes = [case.captured[n][0] for n in function.captured(function.sink)]
    varies = any(shape[0] != 1 or shape[-2:] != (1, 1) for shape in shapes)
    if varies or function.depends_on(function.sink, "q_index") or function.depends_on(function.sink, "lead_index"):
        return "takes one sink per head, the same for all rows and sequences"
    return None


def _direct_capture(function: ScoreFunction, position: int | None) -> int | None:
    """Number of the captured tensor that an instruction hands on unchanged."""
    if position is None:
        return None
    name, *arguments = function.program[position]
    if name == "captured":
        return arguments[0]
    return _direct_capture(function, arguments[0]) if name == "to_float" else None


# ------------------------------------------------------------------------------------------------ call
class FoldedCall:
    """A call of the operator in the form ``[batch, heads, length, features]``.

    Queries, keys and values get one number of features, by zeros, which change neither scores nor sums.

    Attributes:
        q: ``[B, N, Q, D]``; k, v: ``[B, M, K, D]``, where a group of N / M query heads shares a head of keys.
        heads, kv_heads: N and M.
        band: the mask, where it is a band in which every row sees a key.
        scores: bias and mask as tensors, without what ``band`` says; None where there are none.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], function: ScoreFunction) -> None:
        self.inputs, self.captured, self.function = (q, k, v), captured, function
        self.lead = lead_shape(q, k, v, captured)
        self.kv_lead = _shared_lead(self.lead, k, v)
        self.heads, self.kv_heads = fold_heads(self.lead), fold_heads(self.kv_lead)
        self.q_length, self.k_length = q.shape[-2], k.shape[-2]
        self.width = max(q.shape[-1], v.shape[-1])
        self.q = _widened(fold(q, self.lead, self.heads), self.width)
        self.k, self.v = (_widened(fold(t, self.kv_lead, self.kv_heads), self.width) for t in (k, v))
        band = mask_band(function, self.q_length, self.k_length)
        self.band = band if band is not None and band.reaches_all_rows(self.q_length, self.k_length) else None

    def score_tensors(self, with_band: bool = False) -> DenseScores | None:
        """Bias and mask as tensors, None where there is nothing; the band's part only ``with_band``."""
        mask = self.function.mask
        if self.band is not None and (not with_band or self.band.sees_everything(self.q_length, self.k_length)):
            mask = None
        if mask is None and self.function.program[self.function.score] == ("score",):
            return None
        function, q = replace(self.function, mask=mask, sink=None), self.inputs[0]
        return DenseScores(function, self.captured, self.lead, self.q_length, self.k_length, q.device, q.dtype)

    def folded(self, t: Tensor) -> Tensor:
        """``[*lead, Q, K]``, any leading size 1, as ``[B, N, Q, K]`` in which B and N may be 1."""
        t = t.reshape((1,) * (len(self.lead) + 2 - t.dim()) + tuple(t.shape))
        lead = t.shape[:-2]
        shared = all(size == 1 for size in lead[1:])
        lead = (lead[0], *((1,) * (len(lead) - 1) if shared else self.lead[1:]))
        return fold(t, lead, 1 if shared else self.heads)

    @cached_property
    def sink(self) -> Tensor | None:
        """The extra logit of each head, float32 ``[N]``."""
        if self.function.sink is None:
            return None
        q = self.inputs[0]
        (sink,) = evaluate(
            self.function,
            (self.function.sink,),
            score=None,
            captured=self.captured,
            lead=self.lead,
            q_length=self.q_length,
            k_length=self.k_length,
            device=q.device,
            dtype=accumulation_dtype(q.dtype),
        )
        assert sink is not None
        return sink.float().expand(1, *self.lead[1:], 1, 1).reshape(self.heads)

    # -------------------------------------------------------------------------------------- results
    def finish(self, out: Tensor, lse: Tensor, empty: Tensor | None) -> tuple[Tensor, Tensor]:
        """The operator's results from a kernel's ``out [B, N, Q, D]`` and ``lse [B, N, Q]``."""
        out = out[..., : self.inputs[2].shape[-1]].reshape(*self.lead, self.q_length, -1)
        lse = lse.reshape(*self.lead, self.q_length).to(accumulation_dtype(out.dtype))
        if empty is not None:
            lost = torch.nan if self.function.empty_rows == "nan" else 0.0
            if self.function.sink is None:
                lse = lse.masked_fill(empty, -torch.inf)
                out = out.masked_fill(empty.unsqueeze(-1), lost)
            else:  # the sink alone takes part
                rows = empty.reshape(-1, self.heads, self.q_length)
                only = self.sink.view(1, -1, 1).expand(rows.shape)  # type: ignore[union-attr]
                lse = torch.where(empty, only.reshape(lse.shape).to(lse.dtype), lse)
                out = out.masked_fill(empty.unsqueeze(-1), 0.0)
        return arrange(out, self.function.rows_first), lse.contiguous()

    def fold_results(self, out: Tensor, grad: Tensor, lse: Tensor, empty: Tensor | None) -> tuple[Tensor, ...]:
        """``out``, its gradient and ``lse`` as a backward kernel takes them; empty rows have no part in any sum."""
        rows = None if empty is None else empty.reshape(-1, self.heads, self.q_length)
        lse = lse.reshape(-1, self.heads, self.q_length)
        out, grad = (_widened(fold(t, self.lead, self.heads), self.width) for t in (out, grad))
        if rows is None:
            return out, grad, lse
        blank = rows.unsqueeze(-1)
        return out.masked_fill(blank, 0.0), grad.masked_fill(blank, 0.0), lse.masked_fill(rows, 0.0)

    def gradients(self, dq: Tensor, dk: Tensor, dv: Tensor, scores: DenseScores | None) -> list[Tensor | None]:
        """Gradients of q, k and v from those of the folded tensors."""
        if self.function.sink is None and scores is not None and scores.poisoned is not None:
            assert scores.empty is not None
            poisoned, empty = (
                t.expand(*self.lead, -1).reshape(-1, self.heads, self.q_length) for t in (scores.poisoned, scores.empty)
            )
            dq = dq.masked_fill(poisoned.unsqueeze(-1), torch.nan)
            dk = dk.masked_fill(self._groups(poisoned), torch.nan)
            dv = dv.masked_fill(self._groups(empty), torch.nan)
        found: list[Tensor | None] = []
        for gradient, t, lead in zip((dq, dk, dv), self.inputs, (self.lead, self.kv_lead, self.kv_lead), strict=True):
            gradient = gradient[..., : t.shape[-1]].reshape(*lead, *t.shape[-2:])
            found.append(reduce_to(gradient, t.shape))
        return found

    def _groups(self, rows: Tensor) -> Tensor:
        """Heads of keys whose group holds such a row, ``[B, M, 1, 1]``."""
        return rows.any(-1).reshape(-1, self.kv_heads, self.heads // self.kv_heads).any(-1)[..., None, None]


def _shared_lead(lead: Sequence[int], k: Tensor, v: Tensor) -> tuple[int, ...]:
    """``lead`` with one in place of its last axes (the first excepted) along which keys and values are shared."""
    shared = list(lead)
    for axis in range(len(lead) - 1, 0, -1):
        if k.shape[axis] != 1 or v.shape[axis] != 1:
            break
        shared[axis] = 1
    return tuple(shared)


def _widened(t: Tensor, width: int) -> Tensor:
    return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))
