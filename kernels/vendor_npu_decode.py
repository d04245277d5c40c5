"""Attention of a few queries on Huawei Ascend: torch-npu's operator for inference, which takes no gradient.

``npu_fused_infer_attention_score_v2`` where the release has it, else the first one, whose arguments have other names.
Both give the logarithm of the softmax's sum, so that the forward of a training step may run them too.
"""

from typing import Any

import torch

from vbcompile.device import Target
from vbcompile.kernels.attention_band import Band
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.attention_dense import DenseScores, bias_fits
from vbcompile.kernels.registry import Implementation, always, operator
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.vendor_attention import FoldedCall, refuses_case
from vbcompile.kernels.vendor_npu_attention import band_arguments, refuses_ascend
from vbcompile.kernels.vendor_operators import VendorOperator

NAME = "npu_infer"
MOST_QUERIES = 16
_DTYPES = (torch.float16, torch.bfloat16)
_MOST_FEATURES, _FEATURE_STEP, _MOST_GROUP = 512, 16, 64

INFER = VendorOperator("npu::npu_fused_infer_attention_score", "npu", "2.1")
INFER_V2 = VendorOperator("npu::npu_fused_infer_attention_score_v2", "npu", "2.7.1")
_NAMES = {  # ours -> the first operator's, the second one's
    "heads": ("num_heads", "num_query_heads"),
    "scale": ("scale", "softmax_scale"),
    "lse": ("softmax_lse_flag", "return_softmax_lse"),
    "before": ("pre_tokens", "pre_tokens"),
    "after": ("next_tokens", "next_tokens"),
}


def _refuses(target: Target, case: AttentionCase | None) -> str | None:
    if reason := refuses_ascend(target):
        return reason
    if INFER_V2.refuses() and (reason := INFER.refuses()):
        return reason
    if case is None:
        return None
    if case.needs:
        return "has no backward"
    return refuses_case(case, _DTYPES) or _refuses_shape(case) or _refuses_form(case)


def _refuses_shape(case: AttentionCase) -> str | None:
    width = max(case.q[-1], case.v[-1])
    if case.q_length > MOST_QUERIES:
        return f"is meant for up to {MOST_QUERIES} queries"
    if width % _FEATURE_STEP or width > _MOST_FEATURES:
        return f"{width} features per head are no multiple of {_FEATURE_STEP} up to {_MOST_FEATURES}"
    if len(case.q) == 5 and case.q[2] > _MOST_GROUP:
        return f"more than {_MOST_GROUP} query heads share a head of keys"
    return None


def _refuses_form(case: AttentionCase) -> str | None:
    function = case.score_function
    if case.dropout:
        return "has no dropout"
    if not bias_fits(function, tuple(dtype for _, dtype in case.captured), case.dtype):
        return "adds the bias in the type of the queries, which cannot hold it"
    per_head = [n for n in function.captured(function.score, function.mask) if set(case.captured[n][0][1:-2]) != {1}]
    if (
        per_head
        or function.depends_on(function.mask, "lead_index")
        or function.depends_on(function.score, "lead_index")
    ):
        return "takes one mask for all heads"
    return None


def _forward(q, k, v, captured, scale, dropout_p, seed, score_function):
    call = FoldedCall(q, k, v, captured, ScoreFunction.loads(score_function))
    # one row alone has no use for windows
    band, scores = call.band_and_scores() if call.q_length > 1 else (None, call.score_tensors(with_band=True))
    arguments = _arguments(call, band, scores) | {
        "heads": call.heads,
        "num_key_value_heads": call.kv_heads,
        "input_layout": "BNSD",
        "scale": scale,
        "lse": True,
    }
    newer = INFER_V2.refuses() is None
    named = {_NAMES.get(name, (name, name))[newer]: value for name, value in arguments.items()}
    tensors = (t.contiguous() for t in (call.q, call.k, call.v))
    out, lse = (INFER_V2 if newer else INFER)(*tensors, **named)
    return call.finish(out, lse[..., 0], scores)


def _arguments(call: FoldedCall, band: Band | None, scores: DenseScores | None) -> dict[str, Any]:
    arguments = band_arguments(call, band)
    if scores is None:
        return arguments
    if scores.shown is not None:
        arguments["atten_mask"] = call.folded(~scores.shown).contiguous()
        if call.q_length > 1:
            arguments["inner_precise"] = 2  # rows without a key
    if scores.bias is not None:
        bias = scores.bias if scores.shown is None else scores.bias.masked_fill(~scores.shown, 0.0)
        arguments["pse_shift"] = call.folded(bias).expand(-1, call.heads, -1, -1).to(call.q.dtype).contiguous()
    return arguments


_COST = always(0.8)  # it splits the keys among the cores

operator("attention").register(Implementation(NAME, _forward, _refuses, _COST))
