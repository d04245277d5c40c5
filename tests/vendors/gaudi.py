"""What Gaudi's fused attention computes, on CPU tensors, from the vendor's bridge and FusedSDPA.py (1.19.0).

Row statistics: the maximum in the dtype of q, the reciprocal of the sum in float32; so lse is ``m - log(linv)``.
"""

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODES = ("none", "fast", "fp32")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"habana-torch-plugin (simulated): {message}")


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, is_causal: bool, softmax_mode: str) -> Tensor:
    _check(q.dim() in (4, 5) and q.dim() == k.dim(), f"ranks {q.dim()} and {k.dim()}")
    _check(all(a == b or 1 in (a, b) for a, b in zip(q.shape[:-2], k.shape[:-2], strict=True)),
           "GQA must be reshaped to [B, groups, heads / groups, S, D]")  # fmt: skip
    _check(softmax_mode in MODES, f"softmax_mode {softmax_mode!r} is not one of {MODES}")
    _check(mask is None or not is_causal, "a mask beside is_causal")
    _check(mask is None or (mask.dtype == q.dtype and mask.dim() == q.dim()), "the mask is added: dtype and rank of q")
    scores = q.double() @ k.double().mT * scale
    if is_causal:
        _check(q.shape[-2] == k.shape[-2], "is_causal with different lengths")
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores if mask is None else scores + mask.double()


def _kept(weights: Tensor, p: float, seed: Tensor) -> Tensor:
    """The operator's own numbers: anything that the seed fixes."""
    generator = torch.Generator().manual_seed(int(seed))
    return (torch.rand(weights.shape, generator=generator, dtype=torch.float64) >= p) / (1 - p)


def sdpa_recomp_fwd(q, k, v, attention_mask, p, scale, is_causal, requires_backward, softmax_mode, valid_seq_len,
                    seq_padding_type, window_size=(-1, -1), sink=None):  # fmt: skip
    _check(valid_seq_len is None, "valid_seq_len is not simulated")
    _check(tuple(window_size) == (-1, -1) and sink is None, "windows and sinks are not simulated")
    _check(seq_padding_type in ("left", "right"), f"seq_padding_type {seq_padding_type!r}")
    scores = _scores(q, k, attention_mask, scale, is_causal, softmax_mode)
    largest = scores.amax(-1, keepdim=True).masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0.0).to(q.dtype)
    weights = (scores - largest.double()).exp()
    inverse = 1 / weights.sum(-1, keepdim=True)
    seed = torch.randint(0, 2**31 - 1, (1,) if p else (0,), dtype=torch.int32)
    out = ((weights * _kept(weights, p, seed) if p else weights) @ v.double()) * inverse
    if not requires_backward:
        return out.to(q.dtype), q.new_empty(0), q.new_empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.int32)
    return out.to(q.dtype), largest, inverse.float(), seed


def sdpa_recomp_bwd(grad, q, k, v, attention_mask, m, linv, seed, is_causal, p, scale, softmax_mode, fwd_out=None):
    _check(m.dtype == q.dtype and linv.dtype == torch.float32, "m has the dtype of q, linv is float32")
    rows = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], 1)
    _check(m.shape == rows and linv.shape == rows, f"m and linv are {tuple(rows)}, not {tuple(m.shape)}")
    _check(grad.dim() == q.dim(), "grad of another rank than q")
    _check(fwd_out is None or fwd_out.shape == grad.shape, "fwd_out of another shape than grad")
    scores = _scores(q, k, attention_mask, scale, is_causal, softmax_mode)
    weights = (scores - m.double()).exp() * linv.double()
    dy, kept = grad.double(), _kept(weights, p, seed) if p else 1.0
    out = (weights * kept) @ v.double() if fwd_out is None else fwd_out.double()
    delta = (dy * out).sum(-1, keepdim=True)
    ds = weights * (dy @ v.double().mT * kept - delta) * scale
    grads = ds @ k.double(), ds.mT @ q.double(), (weights * kept).mT @ dy
    return tuple(g.sum_to_size(t.shape).to(t.dtype).contiguous() for g, t in zip(grads, (q, k, v), strict=True))


def cast_from_fp8(input, scale, out_dtype, scale_shape=None):
    _check(input.dtype in (torch.float8_e4m3fn, torch.float8_e5m2), f"type {input.dtype}")
    _check(scale is None and scale_shape is None, "scales are not simulated")
    wide = input.float()
    _check(
        input.dtype != torch.float8_e4m3fn or bool((wide.abs() <= 240).all()), "beyond Gaudi 2's largest E4M3 number"
    )
    return wide.to(out_dtype)


# --------------------------------------------------------------------------------------- the vendor's autograd function
def _shapes_forward(q, k, v, attention_mask, p, *rest):
    rows = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2])
    largest, inverse = q.new_empty([*rows, 1]), q.new_empty([*rows, 1], dtype=torch.float32)
    return q.new_empty([*rows, v.shape[-1]]), largest, inverse, q.new_empty(1 if p else 0, dtype=torch.int32)


def _shapes_backward(grad, q, k, v, *rest):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


SHAPES = {"sdpa_recomp_fwd": _shapes_forward, "sdpa_recomp_bwd": _shapes_backward}  # as the vendor's meta kernels
_APPENDED = (  # what releases added to FusedSDPA.apply, and their defaults, after the arguments that it began with
    ("earlier", {"softmax_mode": "None", "recompute_mode": None, "valid_seq_len": None, "seq_padding_type": "left"}),
    ("1.19.0", {"return_dropout_mask": False, "return_attn_probs": False}),
    ("later", {"window_size": (-1, -1), "sink": None}),
)


def fused_sdpa(version: str) -> type[torch.autograd.Function]:
    """A stand-in for the release's ``FusedSDPA``: its arguments, and the operators that it calls under them."""
    releases = [name for name, _ in _APPENDED]
    appended = {k: v for _, new in _APPENDED[: releases.index(version) + 1] for k, v in new.items()}

    def forward(ctx, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *rest):
        values = appended | dict(zip(appended, rest, strict=False))
        _check(len(rest) <= len(appended), f"apply takes {7 + len(appended)} arguments")
        _check(bool(values["recompute_mode"]), "the mode that keeps the weights is not simulated")
        mode, padding = values["softmax_mode"].lower(), values["seq_padding_type"].lower()
        newer = (values["window_size"], values["sink"]) if "sink" in appended else ()
        arguments = q, k, v, attn_mask, dropout_p, scale, is_causal, True, mode, None, padding, *newer
        out, largest, inverse, seed = torch.ops.hpu.sdpa_recomp_fwd(*arguments)
        ctx.save_for_backward(q, k, v, attn_mask, largest, inverse, seed, out)
        ctx.rest = is_causal, dropout_p, scale, mode
        ctx.given = 7 + len(rest)
        return out

    def backward(ctx, dout):
        *saved, out = ctx.saved_tensors
        after = () if version == "earlier" else (out,)
        grads = torch.ops.hpu.sdpa_recomp_bwd(dout, *saved, *ctx.rest, *after)
        return (*grads, *[None] * (ctx.given - 3))

    signature = inspect.signature(forward)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    named = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=d) for n, d in appended.items()]
    forward.__signature__ = signature.replace(parameters=[*kept, *named])
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("FusedSDPA", (torch.autograd.Function,), members)


@contextmanager
def python_package(function: Any) -> Iterator[None]:
    """``habana_frameworks.torch.hpex.kernels`` with this as its ``FusedSDPA``, until the block ends."""
    parts = ["habana_frameworks", "torch", "hpex", "kernels"]
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    added = [name for name in names if name not in sys.modules]
    sys.modules.update({name: ModuleType(name) for name in added})
    if function is not None:
        sys.modules[names[-1]].FusedSDPA = function
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def kernels(version: str) -> dict[str, Any]:
    return {f.__name__: f for f in (sdpa_recomp_fwd, sdpa_recomp_bwd, cast_from_fp8)}
