"""Tensors that are written into after they were computed: what they were computed as is no longer what they hold."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention_cases.case import INFERENCE, Draw, either, fuses, plus, qkv

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.3


def _flags(d: Draw):
    return d.flags(d.S, d.S)


@fuses("writes")
def mask_with_a_column_set(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2]).tril()
    mask[:, 2] = 1.0
    return _scores(q, k).masked_fill(mask == 0, -INF).softmax(-1) @ v


@fuses("writes")
def mask_of_an_index_filled(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    mask.index_fill_(1, torch.tensor([3]), False)
    return _scores(q, k).masked_fill(~mask, -INF).softmax(-1) @ v


@fuses("writes", plus(qkv, _flags))
def mask_cloned_and_set(q, k, v, keep):
    keep = keep.clone()
    keep[:, 3] = False
    return _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


@fuses("writes", plus(qkv, _flags))
def mask_of_sdpa_cloned_and_set(q, k, v, keep):
    keep = keep.clone()
    keep[:, 3] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@fuses("writes", sites=2)
def mask_set_between_two_layers(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2]).tril()
    x = _scores(q, k).masked_fill(mask == 0, -INF).softmax(-1) @ v
    mask[:, 2] = 1.0
    return _scores(x, k).masked_fill(mask == 0, -INF).softmax(-1) @ v


@either("writes")
def mask_set_before_a_checkpoint(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    mask[:, 2] = True

    def attend(q, k, v, mask):
        return _scores(q, k).masked_fill(~mask, -INF).softmax(-1) @ v

    return checkpoint(attend, q, k, v, mask, use_reentrant=False)


@fuses("writes")
def positions_overwritten(q, k, v):
    positions = torch.arange(q.shape[-2])
    positions[2] = 0
    keep = positions[:, None] >= torch.arange(k.shape[-2])[None, :]
    return _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


@fuses("writes", plus(qkv, lambda d: d.constant(d.S, d.S)))
def bias_doubled_and_set(q, k, v, bias):
    bias = bias * 2
    bias[2] = 0.5
    bias[:, 1].add_(3)
    return (_scores(q, k) + bias).softmax(-1) @ v


@fuses("writes", plus(qkv, lambda d: d.constant(d.S, d.S)))
def bias_copied_into_zeros(q, k, v, bias):
    copy = torch.zeros_like(bias)
    copy.copy_(bias)
    return (_scores(q, k) + copy).softmax(-1) @ v


@fuses("writes")
def bias_written_through_a_view(q, k, v):
    bias = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
    bias.view(-1)[3] = 4.0
    return (_scores(q, k) + bias).softmax(-1) @ v


@fuses("writes", plus(qkv, lambda d: d.normal(d.H, 1, 1)))
def sink_set_for_one_head(q, k, v, sink):
    sink = sink * 1.0
    sink[0] = 2.0
    column = sink.expand(q.shape[0], -1, q.shape[-2], -1)
    return torch.cat([_scores(q, k), column], -1).softmax(-1)[..., :-1] @ v


@fuses("writes", plus(qkv, lambda d: d.normal(d.H, 1, 1)))
def temperature_set_for_one_head(q, k, v, temperature):
    temperature = temperature * 1.0
    temperature[0] = 2.0
    return (q @ k.mT * temperature).softmax(-1) @ v


@fuses("writes")
def queries_scaled_and_set(q, k, v):
    q = q * 0.5
    q[:, :, 2] = 0.5
    return (q @ k.mT).softmax(-1) @ v


@fuses("writes")
def keys_and_values_cloned_and_set(q, k, v):
    """A cache that is copied before it is written."""
    place = torch.tensor([3])
    k_cache, v_cache = k.clone(), v.clone()
    k_cache[:, :, place] = q[:, :, :1]
    v_cache[:, :, place] = q[:, :, :1]
    return _scores(q, k_cache).softmax(-1) @ v_cache


@fuses("writes")
def values_repeated_and_set(q, k, v):
    v = v[:, :2].repeat_interleave(3, 1)
    v[:, 1] = 0.25
    return _scores(q, k).softmax(-1) @ v


@fuses("writes")
def values_of_sdpa_cloned_and_set(q, k, v):
    v = v.clone()
    v[:, :, 2] = 0.5
    return F.scaled_dot_product_attention(q, k, v)


@either("writes", plus(qkv, lambda d: d.constant(d.S, 1)), modes=(INFERENCE,))
def factor_set_after_it_was_applied(q, k, v, gate):
    gate = gate * 2
    weights = _scores(q, k).softmax(-1) * gate
    gate[1] = 3.0
    return weights @ v + gate.sum()


@either("writes")
def values_set_before_a_late_division(q, k, v):
    v = v * 1.0
    p = torch.exp(_scores(q, k))
    out = p @ v.clone()
    v[:, :, 1] = 5.0
    return out / p.sum(-1, keepdim=True) + v.sum()


@either("writes", plus(qkv, _flags))
def filler_of_the_weights_raised(q, k, v, keep):
    """Zero when it was made, not when it fills."""
    filler = torch.full((), 0.0, dtype=q.dtype, device=q.device)
    filler += 0.25
    return _scores(q, k).softmax(-1).masked_fill(~keep, filler) @ v


@either("writes", plus(qkv, _flags))
def filler_of_the_weights_written_through_a_view(q, k, v, keep):
    filler = torch.zeros(k.shape[-2], dtype=q.dtype, device=q.device)
    filler[2:] = 0.25
    return torch.where(keep, _scores(q, k).softmax(-1), filler) @ v
