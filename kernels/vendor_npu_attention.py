"""Attention on Huawei Ascend by the operators of torch-npu that training uses: forward and backward.

``npu_fusion_attention`` runs calls without a bias. Its documentation adds a bias before the scale in the formula and
after it in the example; ``npu_fusion_attention_v2`` takes the order as an argument (``pse_type=0``: after), so it runs
calls with one. Masks are True where a key is hidden. Causal masks and windows need no mask of the full size: with
``sparse_mode`` 2, 3 or 4 the operator wants one upper triangle of 2048 x 2048.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from vbcompile.config_error import ConfigError
from vbcompile.device import Target
from vbcompile.kernels.attention import attention_backward_reference
from vbcompile.kernels.attention_band import UNBOUNDED, Band
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.attention_dense import DenseScores, is_coarse
from vbcompile.kernels.registry import Implementation, always, forced_implementation, operator
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.vendor_attention import (
    FoldedCall,
    refuses_captured_gradients,
    refuses_case,
)
from vbcompile.kernels.vendor_operators import VendorOperator

NAME = "npu_fusion"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_FEATURES, MOST_HEADS = 768, 256
TRIANGLE = 2048
_STATISTICS = 8  # columns of the row statistics, all equal
_LATER = "2.7.1"

FUSION = VendorOperator("npu::npu_fusion_attention", "npu", "2.1")
FUSION_GRAD = VendorOperator("npu::npu_fusion_attention_grad", "npu", "2.1")
FUSION_BIAS = VendorOperator("npu::npu_fusion_attention_v2", "npu", "2.5.1")
FUSION_BIAS_GRAD = VendorOperator("npu::npu_fusion_attention_grad_v2", "npu", "2.5.1")


# -------------------------------------------------------------------------------------------- refusals
def refuses_ascend(target: Target) -> str | None:
    """Why torch-npu's attention does not run on a target."""
    if target.vendor != "huawei":
        return "runs on Huawei Ascend"
    if not target.arch.startswith(("Ascend910B", "Ascend910_", "Ascend950")):
        return f"needs an Ascend 910B, 910_93 or 950, this is {target.arch}"
    return None


def _refuses(target: Target, case: AttentionCase | None) -> str | None:
    if reason := refuses_ascend(target) or FUSION.refuses() or FUSION_GRAD.refuses():
        return reason
    if case is None:
        return None
    if reason := refuses_case(case, DTYPES) or _refuses_features(case):
        return reason
    return _refuses_dropout(case) or refuses_captured_gradients(case)


def _refuses_features(case: AttentionCase) -> str | None:
    function = case.score_function
    if max(case.q[-1], case.v[-1]) > MOST_FEATURES:
        return f"takes up to {MOST_FEATURES} features per head"
    if math.prod(map(max, case.q[1:-2], case.k[1:-2], case.v[1:-2])) > MOST_HEADS:
        return f"takes up to {MOST_HEADS} heads"
    return FUSION_BIAS.refuses() if function.program[function.score] != ("score",) else None


def _refuses_dropout(case: AttentionCase) -> str | None:
    """The kernel draws its own numbers, so whoever runs the forward must run the backward: a backward with dropout may
    refuse nothing that its forward took."""
    if not case.dropout:
        return None
    if any(dtype.is_floating_point for _, dtype in case.captured):
        return "dropout beside a bias that may want a gradient, which its backward does not have"
    return FUSION.refuses("seed", _LATER)


# ------------------------------------------------------------------------------------------- arguments
@functools.lru_cache(maxsize=16)
def triangle(device: torch.device) -> Tensor:
    """The mask that ``sparse_mode`` 2, 3 and 4 ask for: bool ``[2048, 2048]``, True above the diagonal."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)


def band_arguments(call: FoldedCall, band: Band | None) -> dict[str, Any]:
    """``sparse_mode`` and its companions for a mask that is a band."""
    q_length, k_length = call.q_length, call.k_length
    if band is None or band.sees_everything(q_length, k_length):
        return {}
    mask = {"atten_mask": triangle(call.q.device)}
    if band.low <= 1 - q_length and band.high == 0:
        return mask | {"sparse_mode": 2}  # aligned at the upper left corner
    corner = k_length - q_length
    if band.low <= 1 - q_length and band.high == corner >= 0:
        return mask | {"sparse_mode": 3}  # aligned at the lower right corner
    before = UNBOUNDED if band.low <= 1 - q_length else corner - band.low
    after = UNBOUNDED if band.high >= k_length - 1 else band.high - corner
    return mask | {"sparse_mode": 4, "before": before, "after": after}


def _arguments(call: FoldedCall, band: Band | None, scores: DenseScores | None, dropout_p: float) -> dict[str, Any]:
    """Keyword arguments by the names of ``npu_fusion_attention``; windows as ``before`` and ``after``."""
    arguments: dict[str, Any] = {"keep_prob": 1.0 - dropout_p} | band_arguments(call, band)
    if scores is None:
        return arguments
    if scores.shown is not None:
        arguments["atten_mask"] = _mask(call, ~scores.shown)
        arguments["inner_precise"] = 2  # rows without a key
    if scores.bias is not None:
        bias = scores.bias if scores.shown is None else scores.bias.masked_fill(~scores.shown, 0.0)
        arguments["pse"] = _expanded(call, call.folded(bias)).to(call.q.dtype)
    return arguments


def _mask(call: FoldedCall, hidden: Tensor) -> Tensor:
    """Of shape ``[1, 1, Q, K]``, ``[B, 1, Q, K]`` or ``[B, N, Q, K]``, contiguous."""
    hidden = call.folded(hidden)
    if hidden.shape[1] != 1:
        hidden = hidden.expand(call.q.shape[0], -1, -1, -1)
    return hidden.contiguous()


def _expanded(call: FoldedCall, bias: Tensor) -> Tensor:
    """With every head: ``[1, N, Q, K]`` or ``[B, N, Q, K]``, contiguous."""
    return bias.expand(-1, call.heads, -1, -1).contiguous()


def _named(arguments: dict[str, Any], biased: bool) -> dict[str, Any]:
    """Windows under the names of the operator: ``pre_tockens`` in the first one, ``pre_tokens`` in the second."""
    before, after = ("pre_tokens", "next_tokens") if biased else ("pre_tockens", "next_tockens")
    names = {"before": before, "after": after}
    named = {names.get(name, name): value for name, value in arguments.items()}
    return named | {"pse_type": 0} if biased else named


class _Layout:
    """``BSND`` where the tensors lie that way in memory, so that nothing is copied, else ``BNSD``."""

    def __init__(self, call: FoldedCall) -> None:
        tensors = (call.q, call.k, call.v)
        rows_first = all(t.transpose(1, 2).is_contiguous() for t in tensors)
        self.name = "BSND" if rows_first and not all(t.is_contiguous() for t in tensors) else "BNSD"

    def turn(self, t: Tensor) -> Tensor:
        """From ``[B, N, S, D]`` to the layout, or back."""
        return t.transpose(1, 2) if self.name == "BSND" else t


# --------------------------------------------------------------------------------------------- dropout
def _drawn(seed: Tensor | None, dropout_p: float, call: FoldedCall) -> dict[str, int]:
    """What the kernel draws its numbers from; reads the seed, so it waits for the device."""
    if not dropout_p:
        return {}
    for name in ("attention", "attention_backward"):
        if forced_implementation(name) not in (None, NAME):
            raise ConfigError(f"dropout by {NAME} needs forward and backward: force both or neither, not {name} alone")
    assert seed is not None
    return {"seed": int(seed.item()) & (2**62 - 1) | 1, "offset": 0}


def _numbers(call: FoldedCall) -> int:
    """How many numbers dropout draws."""
    return call.q.shape[0] * call.heads * call.q_length * call.k_length


def _check_draw(drawn: dict[str, int], result: tuple[Any, ...], call: FoldedCall) -> None:
    expected = (drawn["seed"], drawn["offset"], _numbers(call))
    if tuple(result[4:7]) != expected:
        raise RuntimeError(
            f"npu_fusion_attention drew its dropout by (seed, offset, count) {tuple(result[4:7])}, not {expected}: its "
            "backward could not repeat it. Set attention=False in the options, or dropout to 0"
        )


# --------------------------------------------------------------------------------- forward and backward
def _forward(
    q: Tensor, k: Tensor, v: Tensor, captured: list[Tensor], scale: float, dropout_p: float, seed: Tensor | None,
    score_function: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = FoldedCall(q, k, v, captured, ScoreFunction.loads(score_function))
    (band, scores), layout = call.band_and_scores(), _Layout(call)
    if dropout_p == 1.0:
        return _dropped_throughout(call, q, k, v, captured, scale, score_function)
    arguments = _arguments(call, band, scores, dropout_p)
    drawn = _drawn(seed, dropout_p, call)
    biased = "pse" in arguments
    tensors = (layout.turn(t) for t in (call.q, call.k, call.v))
    function = FUSION_BIAS if biased else FUSION
    sink = {"sink": call.head_sink} if call.head_sink is not None and function.takes("sink") else {}
    result = function(*tensors, call.heads, layout.name, scale=scale, **_named(arguments, biased), **drawn, **sink)
    if drawn:
        _check_draw(drawn, result, call)
    out, largest, total = result[:3]
    lse = largest[..., 0] + total[..., 0].log()
    return call.finish(layout.turn(out), lse, scores, bool(sink))


def _dropped_throughout(
    call: FoldedCall, q: Tensor, k: Tensor, v: Tensor, captured: list[Tensor], scale: float, score_function: str
) -> tuple[Tensor, Tensor]:
    """The operator takes no probability of one: all weights are dropped, the sums are as without dropout."""
    out, lse = _forward(q, k, v, captured, scale, 0.0, None, score_function)
    return torch.where(out.isnan(), out, 0.0), lse


def _backward(grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs):
    everything = (grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs)
    function = ScoreFunction.loads(score_function)
    call = FoldedCall(q, k, v, captured, function)
    (band, scores), layout = call.band_and_scores(), _Layout(call)
    if dropout_p == 1.0 or (scores is not None and scores.absorbed) or (not dropout_p and is_coarse(lse, q.dtype)):
        return attention_backward_reference(*everything)  # dropping all draws no number
    if dropout_p and grad_lse is not None:
        raise RuntimeError(f"{NAME}: no gradient for the logarithm of the softmax's sum under dropout")
    arguments = _arguments(call, band, scores, dropout_p)
    drawn = _drawn(seed, dropout_p, call)
    biased = "pse" in arguments
    out4, grad4, lse3 = call.fold_results(out, grad_out, lse, scores)
    largest = lse3.float().unsqueeze(-1).expand(*lse3.shape, _STATISTICS).contiguous()
    dq, dk, dv, *_ = (FUSION_BIAS_GRAD if biased else FUSION_GRAD)(
        *(layout.turn(t) for t in (call.q, call.k, call.v, grad4)),
        call.heads,
        layout.name,
        softmax_max=largest,
        softmax_sum=torch.ones_like(largest),
        attention_in=layout.turn(out4),
        scale_value=scale,
        **_named(arguments, biased),
        **(drawn | {"numels": _numbers(call)} if drawn else {}),
    )
    found = call.gradients([layout.turn(t) for t in (dq, dk, dv)], scores)
    return [*found, *call.sink_gradients(grad_out, out, lse, needs)]


operator("attention").register(Implementation(NAME, _forward, _refuses, always(1.0)))
operator("attention_backward").register(Implementation(NAME, _backward, _refuses, always(1.0)))
