"""What Gaudi's fused attention computes, on CPU tensors, from the vendor's bridge and FusedSDPA.py (1.19.0).

Row statistics: the maximum in the dtype of q, the reciprocal of the sum in float32; so lse is ``m - log(linv)``.
"""

import math
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


def sdpa_recomp_fwd(q, k, v, attention_mask, p, scale, is_causal, requires_backward, softmax_mode, valid_seq_len,
                    seq_padding_type, window_size=(-1, -1), sink=None):  # fmt: skip
    _check(p == 0 and valid_seq_len is None, "dropout and valid_seq_len are not simulated")
    _check(tuple(window_size) == (-1, -1) and sink is None, "windows and sinks are not simulated")
    _check(seq_padding_type in ("left", "right"), f"seq_padding_type {seq_padding_type!r}")
    scores = _scores(q, k, attention_mask, scale, is_causal, softmax_mode)
    largest = scores.amax(-1, keepdim=True).masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0.0).to(q.dtype)
    weights = (scores - largest.double()).exp()
    inverse = 1 / weights.sum(-1, keepdim=True)
    out = (weights @ v.double()) * inverse
    if not requires_backward:
        return out.to(q.dtype), q.new_empty(0), q.new_empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.int32)
    return out.to(q.dtype), largest, inverse.float(), torch.empty(0, dtype=torch.int32)


def sdpa_recomp_bwd(grad, q, k, v, attention_mask, m, linv, seed, is_causal, p, scale, softmax_mode, fwd_out):
    _check(m.dtype == q.dtype and linv.dtype == torch.float32, "m has the dtype of q, linv is float32")
    rows = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], 1)
    _check(m.shape == rows and linv.shape == rows, f"m and linv are {tuple(rows)}, not {tuple(m.shape)}")
    _check(grad.shape == fwd_out.shape and grad.dim() == q.dim(), "grad and fwd_out of other shapes than q")
    scores = _scores(q, k, attention_mask, scale, is_causal, softmax_mode)
    weights = (scores - m.double()).exp() * linv.double()
    dy = grad.double()
    delta = (dy * fwd_out.double()).sum(-1, keepdim=True)
    ds = weights * (dy @ v.double().mT - delta) * scale
    grads = ds @ k.double(), ds.mT @ q.double(), weights.mT @ dy
    return tuple(g.sum_to_size(t.shape).to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))


def cast_from_fp8(input, scale, out_dtype, scale_shape=None):
    _check(input.dtype in (torch.float8_e4m3fn, torch.float8_e5m2), f"type {input.dtype}")
    _check(scale is None and scale_shape is None, "scales are not simulated")
    wide = input.float()
    _check(
        input.dtype != torch.float8_e4m3fn or bool((wide.abs() <= 240).all()), "beyond Gaudi 2's largest E4M3 number"
    )
    return wide.to(out_dtype)


def kernels(version: str) -> dict[str, Any]:
    return {f.__name__: f for f in (sdpa_recomp_fwd, sdpa_recomp_bwd, cast_from_fp8)}
