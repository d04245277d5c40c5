"""Attention through the fused kernels that PyTorch ships: cuDNN and FlashAttention-2 on GPUs, flash attention on CPU.

They are called one by one, not through ``scaled_dot_product_attention``, because the operator needs the logarithm of
the softmax's sum and because forward and backward must agree on the kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.compat import is_fake
from vbcompile.device import Target
from vbcompile.kernels.attention import attention_backward_reference, attention_reference
from vbcompile.kernels.attention_case import AttentionCase, lead_shape
from vbcompile.kernels.attention_dense import DenseScores, last_place
from vbcompile.kernels.attention_fold import fold, fold_heads, fold_inputs, unfold_gradients
from vbcompile.kernels.attention_results import arrange
from vbcompile.kernels.registry import Implementation, always, operator
from vbcompile.kernels.score_function import (
    ScoreFunction,
    accumulation_dtype,
    causal_offset,
)

aten = torch.ops.aten
_MOST_ALONG_AXIS = 65535  # of a grid of programs, but the first; cuDNN counts a batch in 16 bits


# -------------------------------------------------------------------------------------------- refusals
def refuses_common(case: AttentionCase) -> str | None:
    """What none of PyTorch's fused operators does."""
    if case.dropout:
        return "dropout needs a seed that forward and backward share"
    if case.lse_gradient:
        return "has no gradient for the logarithm of the softmax's sum"
    if 0 in (*case.q, *case.k, *case.v):
        return "a tensor is empty"
    if case.q[-1] != case.v[-1]:
        return f"head dimensions {case.q[-1]} and {case.v[-1]} differ"
    if len({len(case.q), len(case.k), len(case.v)}) != 1:
        return "ranks differ"
    return None


def refuses_structure(case: AttentionCase) -> str | None:
    """The GPU kernels know no mask but the causal one."""
    if case.form == "plain":
        return None
    if case.form != "causal":
        return "knows no bias, mask or score function"
    if case.causal_offset != 0 or case.q_length != case.k_length:
        return "its causal mask needs as many queries as keys"
    return None


def _refuses_cuda(target: Target | None, case: AttentionCase | None) -> str | None:
    if target is not None and target.vendor != "nvidia":
        return "needs an NVIDIA GPU"
    if case is None:
        return None
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {case.dtype}"
    if case.q[-1] % 8 or case.q[-1] > 256:
        return f"head dimension {case.q[-1]} is no multiple of 8 up to 256"
    if not case.contiguous_rows:
        return "the last axis is not contiguous"
    return refuses_common(case) or refuses_structure(case) or _refuses_number(case)


def _refuses_number(case: AttentionCase) -> str | None:
    batch, heads = case.lead[0], fold_heads(case.lead)
    if max(batch, heads) > _MOST_ALONG_AXIS:
        return f"a batch of {batch} with {heads} heads: takes {_MOST_ALONG_AXIS} of each"
    return None


def _refuses_flash(target: Target | None, case: AttentionCase | None) -> str | None:
    reason = _refuses_cuda(target, case)
    if reason or case is None or not case.needs:
        return reason
    unit = 32 if case.q[-1] <= 128 else 64
    rows, width = -(-case.q_length // 128) * 128, -(-case.q[-1] // unit) * unit
    if math.prod(case.lead) * rows * width > 2**31:
        return "counts the elements of its sums for q in 32 bits"
    return None


def _refuses_cudnn(target: Target, case: AttentionCase | None) -> str | None:
    if target.vendor == "nvidia" and target.arch not in ("sm_90", "sm_100"):
        return f"is slower than FlashAttention-2 on {target.arch}"
    if target.vendor == "nvidia" and not torch.backends.cudnn.is_available():
        return "cuDNN is not available"
    if case is not None and (case.q[-1] > 128 or min(case.q_length, case.k_length) < 64):
        return "head dimension above 128 or fewer than 64 queries or keys"
    return _refuses_cuda(target, case)


def _refuses_cpu(target: Target, case: AttentionCase | None) -> str | None:
    if target.device_type != "cpu":
        return "runs on CPU only"
    if case is None:
        return None
    if case.form == "general":
        return "knows no score function beyond an additive bias and a mask"
    if case.needs and any(case.needs[3:]):
        return "has no gradient for the bias"
    return refuses_common(replace(case, v=(*case.v[:-1], case.q[-1])))  # other widths are padded


# ------------------------------------------------------------------------------------ GPU: cuDNN, FA-2
def fused_forward(kernel: str):
    """The forward by one of PyTorch's fused operators, ``cudnn`` or ``flash``."""

    def run(q, k, v, captured, scale, dropout_p, seed, score_function):
        function = ScoreFunction.loads(score_function)
        lead = lead_shape(q, k, v, captured)
        q4, k4, v4 = fold_inputs(q, k, v, lead)
        causal = function.mask is not None
        if kernel == "cudnn":
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q4, k4, v4, None, True, 0.0, causal, scale=scale)
        else:
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q4, k4, v4, 0.0, causal, scale=scale)
        out = arrange(out.reshape(*lead, *out.shape[-2:]), function.rows_first)
        return out, lse.reshape(*lead, q.shape[-2])

    return run


def fused_backward(kernel: str):
    """Its backward."""

    def run(grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs):
        function = ScoreFunction.loads(score_function)
        lead = lead_shape(q, k, v, captured)
        q4, k4, v4 = fold_inputs(q, k, v, lead)
        heads, causal = fold_heads(lead), function.mask is not None
        out4, grad4 = fold(out, lead, heads), fold(grad_out, lead, heads)
        lse4 = lse.reshape(-1, heads, lse.shape[-1])
        none = torch.zeros((), dtype=torch.int64, device=q.device)
        lengths = (None, None, q4.shape[-2], k4.shape[-2], 0.0, causal)
        if kernel == "cudnn":
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                grad4, q4, k4, v4, out4, lse4.unsqueeze(-1), none, none, None, *lengths, scale=scale
            )
        else:
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad4, q4, k4, v4, out4, lse4, *lengths, none, none, scale=scale
            )
        return unfold_gradients(grads, (q, k, v), lead, captured)

    return run


# ------------------------------------------------------------------------------------------------- CPU
class _CpuCall:
    """4-D inputs, causal flag and additive mask of a call.

    Only the last leading axis becomes the heads, so that what is shared along it (grouped keys and values) is not
    copied. Head sizes are padded to the larger one.

    Attributes:
        factor: what the queries are multiplied by beforehand, and ``scale``, what is left to the kernel.
        scores: bias and mask; None where the causal flag says all.
        bias: both in one tensor ``[batch, heads, Q, K]``, sizes of one where shared by all.
        empty: rows without a key, ``[*lead, Q]``; None where there can be none.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], scale: float, function: ScoreFunction
    ) -> None:
        self.factor, self.scale = (1.0, scale) if _is_exact(scale, q.dtype) else (scale, 1.0)
        self.lead = lead_shape(q, k, v, captured)
        self.heads = self.lead[-1] if len(self.lead) > 1 else 1
        self.widths = [int(t.shape[-1]) for t in (q, k, v)]
        self.tensors = [self.folded(t) for t in (q if self.factor == 1.0 else q * self.factor, k, v)]
        self.causal = causal_offset(function, q.shape[-2], k.shape[-2]) == 0
        self.scores: DenseScores | None = None
        self.bias: Tensor | None = None
        self.empty: Tensor | None = None
        if self.causal or (function.mask is None and function.program[function.score] == ("score",)):
            return
        self.scores = DenseScores(function, captured, self.lead, q.shape[-2], k.shape[-2], q.device, q.dtype)
        flags_only = self.scores.bias is None  # a bias keeps its digits: the kernel reads float32 beside 16 bits too
        self.bias = self._fold_bias(self.scores.additive.to(q.dtype) if flags_only else self.scores.additive)
        self.empty = self.scores.empty

    def folded(self, t: Tensor) -> Tensor:
        """``[batch, heads, length, widest head size]``."""
        missing = max(self.widths) - t.shape[-1]
        return fold(F.pad(t, (0, missing)) if missing else t, self.lead, self.heads)

    def _fold_bias(self, total: Tensor) -> Tensor:
        *lead, rows, columns = total.shape
        if math.prod(lead[:-1]) > 1:
            lead[:-1] = self.lead[:-1]
        heads = lead[-1] if len(lead) > 1 else 1
        return total.expand(*lead, rows, columns).reshape(-1, heads, rows, columns)


def _is_exact(scale: float, dtype: torch.dtype) -> bool:
    """Whether the kernel's forward and backward agree on scaled scores: they round a product at different places."""
    usual = dtype in (torch.float32, torch.float64) and 1e-30 < abs(scale) < 1e30
    return not usual or abs(math.frexp(scale)[0]) == 0.5


def _cpu_forward(q, k, v, captured, scale, dropout_p, seed, score_function):
    function = ScoreFunction.loads(score_function)
    call = _CpuCall(q, k, v, captured, scale, function)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *call.tensors, 0.0, call.causal, attn_mask=call.bias, scale=call.scale
    )
    odd = _odd_rows(out, lse, call)
    if is_fake(out):  # a graph is made, which cannot choose by values
        out, lse = out.masked_fill(odd.unsqueeze(-1), torch.nan), lse.masked_fill(odd, torch.nan)
    elif bool(odd.any()):
        return attention_reference(q, k, v, captured, scale, dropout_p, seed, score_function)
    out = out[..., : v.shape[-1]].reshape(*call.lead, *out.shape[-2:-1], v.shape[-1])
    lse = lse.reshape(*call.lead, q.shape[-2]).to(accumulation_dtype(q.dtype))
    if call.empty is not None:
        lse = lse.masked_fill(call.empty, -torch.inf)
    if call.empty is not None and function.empty_rows == "nan":
        out = out.masked_fill(call.empty.unsqueeze(-1), torch.nan)
    return arrange(out, function.rows_first), lse.contiguous()


def _odd_rows(out: Tensor, lse: Tensor, call: _CpuCall) -> Tensor:
    """Rows with infinite scores or NaN, where the kernel may give what plain PyTorch does not.

    Its largest score of a row ignores NaN, and a row without one counts as a row without keys: zeros in place of NaN.
    Under a mask, which it adds, NaN of hidden keys spreads to rows that do not see them.
    """
    odd, zero = ~lse.isfinite(), lse == 0.0
    if is_fake(out) or bool(zero.any()):  # a graph cannot choose by values
        odd = odd | (zero & (out == 0.0).all(-1) & ~_sees_a_number(call))
    return odd if call.empty is None else odd & ~call.empty.reshape(lse.shape)


def _sees_a_number(call: _CpuCall) -> Tensor:
    """Whether a key that the row sees has a finite score, so that zeros are a sum of values that are zero."""
    q, k, _ = (t.to(accumulation_dtype(t.dtype)) for t in call.tensors)
    if call.bias is None:  # every row sees the first key
        return ((q * k[..., :1, :]).sum(-1) * call.scale).isfinite()
    if q.shape[-2] > _FEW_ROWS:  # reading the keys once more is little beside them
        largest = q.abs().amax(-1) * k.abs().amax((-2, -1)).unsqueeze(-1) * (q.shape[-1] * abs(call.scale))
        return largest.isfinite()
    highest, place = call.bias.max(-1)
    seen = k.gather(-2, place.expand(q.shape[:-1]).unsqueeze(-1).expand(q.shape))
    return ((q * seen).sum(-1) * call.scale + highest).isfinite()


_FEW_ROWS = 16


def _cpu_backward(grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs):
    function = ScoreFunction.loads(score_function)
    call = _CpuCall(q, k, v, captured, scale, function)
    odd = ~lse.isfinite() if call.empty is None else ~lse.isfinite() & ~call.empty
    unit = last_place(lse)
    saturated = q.dtype == torch.float32 and unit > _SATURATED
    if saturated or bool(odd.any()) or (call.scores is not None and call.scores.absorbed):
        return attention_backward_reference(
            grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs
        )
    out4, grad4 = (call.folded(t) for t in (out, grad_out))
    lse4 = lse.reshape(-1, call.heads, lse.shape[-1])
    bias = call.bias
    if call.empty is not None:  # such a row would spoil the kernel's sums over rows
        rows = call.empty.reshape(lse4.shape)
        out4, lse4 = out4.masked_fill(rows.unsqueeze(-1), 0.0), lse4.masked_fill(rows, 0.0)
    if unit > 16 * torch.finfo(q.dtype).eps:  # weights that backward computes from it would be off by as much
        out4, bias, lse4 = _shifted(call, lse4)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad4, *call.tensors, out4, lse4, 0.0, call.causal, attn_mask=bias, scale=call.scale
    )
    dq = dq if call.factor == 1.0 else dq * call.factor
    if call.scores is not None and call.scores.poisoned is not None:
        poisoned = call.scores.poisoned.expand(*call.lead, -1).reshape(lse4.shape)
        dq = dq.masked_fill(poisoned.unsqueeze(-1), torch.nan)
        dk = dk.masked_fill(poisoned.any(-1)[..., None, None], torch.nan)
        dv = dv.masked_fill(rows.any(-1)[..., None, None], torch.nan)
    grads = [g[..., :width] for g, width in zip((dq, dk, dv), call.widths, strict=True)]
    return unfold_gradients(grads, (q, k, v), call.lead, captured)


_SATURATED = 2.0**-12  # in float32 of scores beyond 2000, whose gradients are what rounding leaves of sums


def _shifted(call: _CpuCall, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Another forward with ``lse`` as a part of the bias: its result, that bias, and the small rest of ``lse``.

    Saturated rows have gradients that cancel, so the result too has to be that of the weights which backward computes.
    """
    bias = -lse.unsqueeze(-1) if call.bias is None else call.bias.to(lse.dtype) - lse.unsqueeze(-1)
    out, rest = aten._scaled_dot_product_flash_attention_for_cpu(
        *call.tensors, 0.0, call.causal, attn_mask=bias, scale=call.scale
    )
    return out, bias, rest.to(lse.dtype)


# ---------------------------------------------------------------------------------------- registration
for _operator, _cudnn, _flash, _cpu in (
    ("attention", fused_forward("cudnn"), fused_forward("flash"), _cpu_forward),
    ("attention_backward", fused_backward("cudnn"), fused_backward("flash"), _cpu_backward),
):
    for _name, _run, _refuses, _cost, _replays in (
        ("cudnn", _cudnn, _refuses_cudnn, 1.0, True),
        ("flash_attention_2", _flash, _refuses_flash, 1.7, True),
        ("cpu_flash", _cpu, _refuses_cpu, 1.0, False),
    ):
        _inlines = _operator == "attention"  # graphs with gradients keep our operators
        operator(_operator).register(
            Implementation(_name, _run, _refuses, always(_cost), replays=_replays, inlines=_inlines)
        )
