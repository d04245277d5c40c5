"""Attention in training on Intel Gaudi by ``FusedSDPA.apply``, the vendor's own ``autograd.Function``.

It takes its arguments by position, and releases append to them: seven at first (up to ``scale``), eleven, thirteen in
1.19, fifteen since 2025. Each call passes those of ours that the installed release has, in its order. Masks are added
to the scores; queries that share a head of keys come as ``[B, groups, heads / groups, S, D]``. Dropout is the vendor's:
its seed goes from its forward to its backward.
"""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels import vendor_operators
from vbcompile.kernels.attention_band import mask_band
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.registry import Implementation, always, forced_implementation, operator
from vbcompile.kernels.score_function import ScoreFunction, additive_bias
from vbcompile.kernels.vendor_attention import refuses_captured_gradients, refuses_case
from vbcompile.kernels.vendor_hpu_attention import DTYPES, GaudiCall

NAME = "hpu_fused_sdpa"
MODULE, FUNCTION = "habana_frameworks.torch.hpex.kernels", "FusedSDPA"
SINCE = "1.11"
_NEEDED = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale")
_INSTEAD = "the operators under it are called instead"


def fused_sdpa() -> Any:
    """The vendor's class, None where this installation has none."""
    try:
        return getattr(importlib.import_module(MODULE), FUNCTION, None)
    except ImportError:
        return None


def parameters(function: Any) -> list[inspect.Parameter]:
    """What ``apply`` of the installed release takes, in order."""
    return list(inspect.signature(function.forward).parameters.values())[1:]


def _refuses_package() -> str | None:
    if not vendor_operators.is_present("hpu"):
        return None  # another machine is assumed to have the newest release
    function, found = fused_sdpa(), vendor_operators.package_found("hpu")
    if function is None:
        return f"{FUNCTION}.apply needs {SINCE} or later of {found}, with its {MODULE}; {_INSTEAD}"
    names = [p.name for p in parameters(function)]
    if tuple(names[: len(_NEEDED)]) != _NEEDED:
        return f"{FUNCTION}.apply of {found} takes {', '.join(names)}, which is not known here; {_INSTEAD}"
    new = [p.name for p in parameters(function)[len(_NEEDED) :] if p.default is p.empty]
    return f"{FUNCTION}.apply of {found} wants {new[0]!r}, which is not known here; {_INSTEAD}" if new else None


def _refuses(target: Target, case: AttentionCase | None) -> str | None:
    if target.vendor != "habana":
        return "runs on Intel Gaudi"
    if reason := _refuses_package():
        return reason
    if case is None:
        return None
    if any(forced_implementation(name) for name in ("attention", "attention_backward")):
        return "an implementation of attention or attention_backward was asked for"
    if reason := refuses_case(case, DTYPES) or refuses_captured_gradients(case):
        return reason
    function = case.score_function
    if function.sink is not None:
        return "knows no sinks in training"
    return "gives rows without a key no NaN" if _may_give_nan(case, function) else None


def _may_give_nan(case: AttentionCase, function: ScoreFunction) -> bool:
    """Whether a row may lose all keys where the model would compute NaN there, in gradients too."""
    _, bias = additive_bias(function) or (function, None)
    if function.empty_rows != "nan" or (function.mask is None and bias is None):
        return False
    band = mask_band(function, case.q_length, case.k_length)
    return bias is not None or band is None or not band.reaches_all_rows(case.q_length, case.k_length)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    score_function: str,
) -> tuple[Tensor, ...]:
    gaudi = GaudiCall(q, k, v, list(captured), ScoreFunction.loads(score_function))
    values = dict(zip("qkv", gaudi.tensors, strict=True)) | {
        "attn_mask": gaudi.mask,
        "dropout_p": dropout_p,
        "is_causal": gaudi.causal,
        "scale": scale,
        "softmax_mode": "None",
        "recompute_mode": True,  # keeps the row statistics, not the weights
    }
    function = fused_sdpa()
    if function is None:
        raise RuntimeError(_refuses_package() or f"{MODULE}.{FUNCTION}: no device of type hpu is in use here")
    out = gaudi.flat(function.apply(*(values[p.name] for p in parameters(function) if p.name in values)))
    return gaudi.call.finish(out, out.new_zeros(out.shape[:-1]), gaudi.scores)[:1]


operator("attention_training").register(Implementation(NAME, _run, _refuses, always(0.9)))
