"""What the attention kernels of all vendors have in common: four axes, a bias, a mask, one extra logit per head."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.kernels.attention_band import Band, mask_band
from vbcompile.kernels.attention_case import AttentionCase, lead_shape
from vbcompile.kernels.attention_dense import DenseScores, bias_fits
from vbcompile.kernels.attention_fold import fold, fold_heads
from vbcompile.kernels.attention_results import arrange, sum_to
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


def refuses_captured_gradients(case: AttentionCase) -> str | None:
    """A gradient is wanted for a captured tensor that is more than a sink."""
    function = case.score_function
    sink = _direct_capture(function, function.sink)
    elsewhere = function.captured(function.score, function.mask)
    wanted = [n for n, need in enumerate(case.needs[3:]) if need and (n != sink or n in elsewhere)]
    return "has no gradient for the bias" if wanted else None


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

    Queries, keys and values get one number of features, by zeros, which change neither scores nor sums. A backward
    kernel that asks for each row's maximum and sum gets ``lse`` and one: ``exp(score - lse) / 1`` is the weight, sinks
    included, so nothing but ``lse`` is kept for it.

    Attributes:
        q: ``[B, N, Q, D]``; k, v: ``[B, M, K, D]``, in ``dtype``; a group of N / M query heads shares a head of keys.
        heads, kv_heads: N and M.
        dtype: that the kernel computes in: of the inputs, or float32 where theirs would spoil the bias.
        band: the mask, where it is a band in which every row sees a key.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], function: ScoreFunction) -> None:
        self.inputs, self.captured, self.function = (q, k, v), captured, function
        self.lead = lead_shape(q, k, v, captured)
        self.kv_lead = _shared_lead(self.lead, k, v)
        self.heads, self.kv_heads = fold_heads(self.lead), fold_heads(self.kv_lead)
        self.q_length, self.k_length = q.shape[-2], k.shape[-2]
        self.width = max(q.shape[-1], v.shape[-1])
        fits = bias_fits(function, tuple(c.dtype for c in captured), q.dtype)
        self.dtype = q.dtype if fits else accumulation_dtype(q.dtype)
        self.q = self._prepared(q, self.lead, self.heads)
        self.k, self.v = (self._prepared(t, self.kv_lead, self.kv_heads) for t in (k, v))
        band = mask_band(function, self.q_length, self.k_length)
        self.band = band if band is not None and band.reaches_all_rows(self.q_length, self.k_length) else None

    def _prepared(self, t: Tensor, lead: Sequence[int], heads: int) -> Tensor:
        t = fold(t, lead, heads).to(self.dtype)
        return t if t.shape[-1] == self.width else F.pad(t, (0, self.width - t.shape[-1]))

    def score_tensors(self, with_band: bool = False) -> DenseScores | None:
        """Bias and mask as tensors, None where there is nothing; the band's part only ``with_band``."""
        mask = self.function.mask
        if self.band is not None and (not with_band or self.band.sees_everything(self.q_length, self.k_length)):
            mask = None
        if mask is None and self.function.program[self.function.score] == ("score",):
            return None
        function, q = replace(self.function, mask=mask, sink=None), self.inputs[0]
        return DenseScores(function, self.captured, self.lead, self.q_length, self.k_length, q.device, q.dtype)

    def band_and_scores(self) -> tuple[Band | None, DenseScores | None]:
        """The band where it can stand for the mask, and the rest; a bias that hides keys takes the mask in."""
        scores = self.score_tensors()
        if self.band is not None and scores is not None and scores.may_hold_infinity:
            return None, self.score_tensors(with_band=True)
        return self.band, scores

    def folded(self, t: Tensor) -> Tensor:
        """``[*lead, Q, K]``, any leading size 1, as ``[B, N, Q, K]`` in which B and N may be 1."""
        t = t.reshape((1,) * (len(self.lead) + 2 - t.dim()) + tuple(t.shape))
        shared = all(size == 1 for size in t.shape[1:-2])
        lead = (t.shape[0], *((1,) * (len(self.lead) - 1) if shared else self.lead[1:]))
        return fold(t, lead, 1 if shared else self.heads)

    @cached_property
    def sink(self) -> Tensor | None:
        """The extra logits in the accumulation type, broadcasting to ``[*lead, Q, 1]``."""
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
        return sink.reshape((1,) * (len(self.lead) + 2 - sink.dim()) + tuple(sink.shape)).to(
            accumulation_dtype(q.dtype)
        )

    @property
    def head_sink(self) -> Tensor | None:
        """The extra logits as float32 ``[N]``; None where there are none or where they differ from row to row."""
        if self.sink is None or self.sink.shape[0] != 1 or self.sink.shape[-2] != 1:
            return None
        return self.sink.float().expand(1, *self.lead[1:], 1, 1).reshape(self.heads)

    # -------------------------------------------------------------------------------------- results
    def finish(
        self, out: Tensor, lse: Tensor, scores: DenseScores | None, with_sink: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The operator's results from a kernel's ``out [B, N, Q, D]`` and ``lse [B, N, Q]``.

        Args:
            with_sink: whether the kernel knew of the sinks. If not they shrink its weights afterwards.
        """
        q, _, v = self.inputs
        out = out[..., : v.shape[-1]].reshape(*self.lead, self.q_length, -1).to(q.dtype)
        lse = lse.reshape(*self.lead, self.q_length).to(accumulation_dtype(q.dtype))
        empty = None if scores is None else scores.empty
        if empty is not None:
            lost = torch.nan if self.function.empty_rows == "nan" and self.sink is None else 0.0
            lse = lse.masked_fill(empty, -torch.inf)
            out = out.masked_fill(empty.unsqueeze(-1), lost)
        if self.sink is not None and (empty is not None or not with_sink):
            out, lse = self._with_sink(out, lse, empty if with_sink else None)
        return arrange(out, self.function.rows_first), lse.contiguous()

    def _with_sink(self, out: Tensor, lse: Tensor, only: Tensor | None) -> tuple[Tensor, Tensor]:
        """Results in which the sinks take part, in rows ``only`` if given."""
        assert self.sink is not None
        joint = torch.logaddexp(lse, self.sink.expand(*lse.shape, 1).squeeze(-1))
        if only is not None:
            return out, torch.where(only, joint, lse)
        return (out * (lse - joint).exp().unsqueeze(-1)).to(out.dtype), joint

    def sink_gradients(self, grad: Tensor, out: Tensor, lse: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the captured tensors: of the one that the sinks are, None for others."""
        found: list[Tensor | None] = [None] * len(self.captured)
        for number, need in enumerate(needs[3:]):
            if need:
                assert self.sink is not None
                delta = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)
                t = self.captured[number]
                row = -(self.sink - lse.unsqueeze(-1)).exp() * delta
                found[number] = sum_to(row, t.shape, t.dtype)
        return found

    def fold_results(
        self, out: Tensor, grad: Tensor, lse: Tensor, scores: DenseScores | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``out``, its gradient and ``lse`` as a backward kernel takes them; empty rows have no part in any sum."""
        empty = None if scores is None else scores.empty
        rows = None if empty is None else empty.reshape(-1, self.heads, self.q_length)
        lse = lse.reshape(-1, self.heads, self.q_length)
        out, grad = (self._prepared(t, self.lead, self.heads) for t in (out, grad))
        if rows is None:
            return out, grad, lse
        blank = rows.unsqueeze(-1)
        return out.masked_fill(blank, 0.0), grad.masked_fill(blank, 0.0), lse.masked_fill(rows, 0.0)

    def gradients(self, folded: Sequence[Tensor], scores: DenseScores | None) -> list[Tensor | None]:
        """Gradients of q, k and v from those of the folded tensors."""
        dq, dk, dv = folded
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
            found.append(sum_to(gradient, t.shape, t.dtype))
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
