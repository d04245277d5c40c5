"""Attention on Intel Gaudi by the fused operators under ``FusedSDPA``: ``hpu::sdpa_recomp_fwd`` and ``_bwd``.

Inference calls the first; training calls both where ``FusedSDPA.apply`` (:mod:`vbcompile.kernels.vendor_hpu_training`)
cannot run: the operator's backward needs nothing but ``lse``. Their arguments have no defaults, so each call passes
what this release's schema lists, in its order. Masks are additive; queries that share a head of keys come as
``[B, groups, heads / groups, S, D]``.
"""

from typing import Any

import torch
from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels.attention import attention_backward_reference
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.attention_dense import DenseScores, is_coarse
from vbcompile.kernels.registry import Implementation, always, operator
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.vendor_attention import FoldedCall, refuses_captured_gradients, refuses_case
from vbcompile.kernels.vendor_operators import VendorOperator

NAME = "hpu_fused"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

FORWARD = VendorOperator("hpu::sdpa_recomp_fwd", "hpu", "1.15")
BACKWARD = VendorOperator("hpu::sdpa_recomp_bwd", "hpu", "1.15")


_OFF = {  # arguments that some releases have, with the values that mean nothing
    "valid_seq_len": None,
    "seq_padding_type": "left",
    "window_size": (-1, -1),
    "sink": None,
}
_COMMON = {"q", "k", "v", "attention_mask", "p", "scale", "is_causal", "softmax_mode"}
_FORWARD = {*_COMMON, "requires_backward", *_OFF}
_BACKWARD = {*_COMMON, "grad", "m", "linv", "seed", "fwd_out"}


def _refuses(target: Target, case: AttentionCase | None) -> str | None:
    if target.vendor != "habana":
        return "runs on Intel Gaudi"
    if reason := FORWARD.refuses() or BACKWARD.refuses():
        return reason
    if reason := FORWARD.refuses_unknown(_FORWARD) or BACKWARD.refuses_unknown(_BACKWARD):
        return reason
    if case is None:
        return None
    if case.dropout:
        return "draws a seed of its own, which the backward of another call could not repeat"
    return refuses_case(case, DTYPES) or refuses_captured_gradients(case)


class GaudiCall:
    """Tensors and mask as the operators take them.

    Attributes:
        tensors: q, k, v; 5-D where heads of keys are shared.
        causal: whether the operator's own causal mask says all that the mask does.
        mask: additive, of dtype and rank of the tensors; None: no bias and no further mask.
        scores: bias and mask as tensors.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, captured: list[Tensor], function: ScoreFunction) -> None:
        self.call = FoldedCall(q, k, v, captured, function)
        band, q_length, k_length = self.call.band, self.call.q_length, self.call.k_length
        # with other lengths the releases do not agree on the corner that the mask starts in
        aligned = band is not None and q_length == k_length and band.high == 0 and band.low <= 1 - q_length
        self.causal = aligned and function.program[function.score] == ("score",)  # flag and mask exclude each other
        self.scores: DenseScores | None = None if self.causal else self.call.score_tensors(with_band=True)
        self.tensors = tuple(map(self.grouped, (self.call.q, self.call.k, self.call.v)))
        self.mask = (
            None if self.scores is None else self.grouped(self.call.folded(self.scores.additive).to(self.call.dtype))
        )

    def grouped(self, t: Tensor) -> Tensor:
        """``[B, N, S, D]`` (N may be one) with the heads as ``[groups, heads / groups]``, where groups share keys."""
        call = self.call
        if call.heads == call.kv_heads:
            return t
        heads = t.shape[1]
        groups = (call.kv_heads, heads // call.kv_heads) if heads != 1 else (1, 1)
        return t.unflatten(1, groups)

    def flat(self, t: Tensor) -> Tensor:
        """Inverse of :meth:`grouped`."""
        return t if t.dim() == 4 else t.flatten(1, 2)


def _forward(q, k, v, captured, scale, dropout_p, seed, score_function):
    gaudi = GaudiCall(q, k, v, captured, ScoreFunction.loads(score_function))
    out, largest, inverse_sum, *_ = FORWARD.call_in_order(
        _common(gaudi, scale)
        | dict(zip("qkv", gaudi.tensors, strict=True))
        | {"requires_backward": True}  # without it there are no row statistics
        | _OFF
    )
    lse = gaudi.flat(largest).float()[..., 0] - gaudi.flat(inverse_sum).float()[..., 0].log()
    return gaudi.call.finish(gaudi.flat(out), lse, gaudi.scores)


def _backward(grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs):
    gaudi = GaudiCall(q, k, v, captured, ScoreFunction.loads(score_function))
    call, scores = gaudi.call, gaudi.scores
    if (scores is not None and scores.absorbed) or is_coarse(lse, q.dtype):
        return attention_backward_reference(
            grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs
        )
    out4, grad4, lse3 = call.fold_results(out, grad_out, lse, scores)
    # the maximum has the tensors' dtype: what its rounding takes from lse goes to the sum, so that weights stay exact
    largest = lse3.unsqueeze(-1).to(call.dtype)
    inverse_sum = torch.exp(largest.float() - lse3.unsqueeze(-1).float())
    grads = BACKWARD.call_in_order(
        _common(gaudi, scale)
        | dict(zip("qkv", gaudi.tensors, strict=True))
        | {
            "grad": gaudi.grouped(grad4),
            "m": gaudi.grouped(largest),
            "linv": gaudi.grouped(inverse_sum),
            "seed": None,
            "fwd_out": gaudi.grouped(out4),
        }
    )
    found = call.gradients([gaudi.flat(g) for g in grads[:3]], scores)
    return [*found, *call.sink_gradients(grad_out, out, lse, needs)]


def _common(gaudi: GaudiCall, scale: float) -> dict[str, Any]:
    return {
        "attention_mask": gaudi.mask,
        "p": 0.0,
        "scale": scale,
        "is_causal": gaudi.causal,
        "softmax_mode": "none",
    }


operator("attention").register(Implementation(NAME, _forward, _refuses, always(1.0)))
operator("attention_backward").register(Implementation(NAME, _backward, _refuses, always(1.0)))
