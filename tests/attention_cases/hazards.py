"""Writes through views, lists, ``out=`` and detached copies, before, between and after the two products."""

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import INFERENCE, Draw, Sizes, cross, either, plus, qkv

INF = float("inf")
_FLAGS = {"mutates": True, "modes": (INFERENCE,)}


def _scores(q, k):
    return q @ k.mT * 0.35


def _plain(d: Draw) -> tuple:
    return tuple(x.detach() for x in qkv(d))


# --------------------------------------------------------------------------------------------------- parts of scores
@either("hazard", qkv)
def diagonal_of_scores_filled(q, k, v):
    s = _scores(q, k)
    s.diagonal(dim1=-2, dim2=-1).fill_(-INF)
    return s.softmax(-1) @ v


@either("hazard", qkv)
def scores_filled_through_their_transpose(q, k, v):
    s = _scores(q, k)
    n = q.shape[-2]
    s.mT.masked_fill_(torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-1), -INF)
    return s.softmax(-1) @ v


@either("hazard", qkv)
def one_column_of_scores_set(q, k, v):
    s = _scores(q, k)
    s[..., 1] = -3.0
    return s.softmax(-1) @ v


@either("hazard", qkv)
def one_row_of_scores_scaled(q, k, v):
    s = _scores(q, k)
    s[:, :, 2].mul_(3.0)
    return s.softmax(-1) @ v


@either("hazard", qkv)
def flat_scores_set(q, k, v):
    s = _scores(q, k)
    s.view(-1)[7] = 5.0
    return s.softmax(-1) @ v


@either("hazard", plus(qkv, lambda d: d.flags(d.S, d.S)))
def scores_indexed_by_a_mask(q, k, v, keep):
    s = _scores(q, k)
    s[:, :, ~keep] = -INF
    return s.softmax(-1) @ v


@either("hazard", plus(qkv, lambda d: d.flags(d.B, 1, d.S, d.S)))
def scores_indexed_by_an_expanded_mask(q, k, v, keep):
    s = _scores(q, k)
    s[~keep.expand_as(s)] = -INF
    return s.softmax(-1) @ v


@either("hazard", plus(qkv, lambda d: d.integers(0, 5, 2)))
def columns_of_scores_filled_by_index(q, k, v, index):
    return _scores(q, k).index_fill_(-1, index + 1, -INF).softmax(-1) @ v


@either("hazard", plus(qkv, lambda d: d.integers(1, 5, d.B, d.H, d.S, 2)))
def scores_scattered(q, k, v, index):
    return _scores(q, k).scatter_(-1, index, -INF).softmax(-1) @ v


@either("hazard", qkv)
def scores_tril_in_place(q, k, v):
    """Hidden scores are zero, so they take part."""
    return _scores(q, k).tril_().softmax(-1) @ v


# ------------------------------------------------------------------------------------------------- weights, results
@either("hazard", qkv)
def diagonal_of_weights_cleared(q, k, v):
    p = _scores(q, k).softmax(-1)
    p = p.clone()
    p.diagonal(dim1=-2, dim2=-1).zero_()
    return p @ v


@either("hazard", qkv, modes=(INFERENCE,))
def weights_doubled_in_place(q, k, v):
    p = _scores(q, k).softmax(-1)
    p *= 2.0
    return p @ v


@either("hazard", qkv)
def a_view_of_the_result_written(q, k, v):
    out = _scores(q, k).softmax(-1) @ v
    flat = out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)
    out.view(-1)[:3] = 0.0
    return out, flat


@either("hazard", _plain, **_FLAGS)
def result_written_into_the_queries(q, k, v):
    torch.matmul(_scores(q, k).softmax(-1), v, out=q)
    return q + 1


@either("hazard", _plain, sites=2, **_FLAGS)
def result_copied_into_the_values(q, k, v):
    out = _scores(q, k).softmax(-1) @ v
    v.copy_(out)
    return out * 2, _scores(q, k).softmax(-1) @ v


# ------------------------------------------------------------------------------------------ operands, between products
@either("hazard", _plain, **_FLAGS)
def keys_scaled_through_a_list(q, k, v):
    s = _scores(q, k)
    torch._foreach_mul_([k, v], 2.0)
    return s.softmax(-1) @ v + k


@either("hazard", _plain, **_FLAGS)
def queries_written_through_a_view(q, k, v):
    view = q.flatten(0, 1)
    s = _scores(q, k)
    view[0].zero_()
    return s.softmax(-1) @ v


@either("hazard", _plain, **_FLAGS)
def values_written_through_a_detached_alias(q, k, v):
    alias = v.detach()
    p = _scores(q, k).softmax(-1)
    alias[:, :, 1:].add_(1.0)
    return p @ v


@either("hazard", _plain, **_FLAGS)
def sum_written_into_the_keys(q, k, v):
    s = _scores(q, k)
    torch.add(k, 1.0, out=k)
    return s.softmax(-1) @ v + k


@either("hazard", _plain, sites=2, **_FLAGS)
def operands_of_sdpa_written_afterwards(q, k, v):
    out = F.scaled_dot_product_attention(q, k, v)
    k.zero_()
    return out + F.scaled_dot_product_attention(q, k, v)


@either("hazard", _plain, sites=2, **_FLAGS)
def cache_appended_between_two_steps(q, k, v):
    cache = torch.zeros(q.shape[0], q.shape[1], 12, q.shape[3], dtype=q.dtype, device=q.device)
    cache[:, :, :3] = k[:, :, :3]
    first = _scores(q, cache[:, :, :3]).softmax(-1) @ v[:, :, :3]
    cache[:, :, 3:6] = k[:, :, 3:6]
    return first + _scores(q, cache[:, :, :6]).softmax(-1) @ v[:, :, :6]


@either("hazard", plus(_plain, lambda d: d.constant(d.S, d.S)), **_FLAGS)
def bias_changed_between_sum_and_softmax(q, k, v, bias):
    s = _scores(q, k) + bias
    bias.mul_(2.0)
    return s.softmax(-1) @ v + bias.sum()


@either("hazard", plus(_plain, lambda d: d.constant(d.S, d.S)), sites=2, **_FLAGS)
def bias_changed_between_two_layers(q, k, v, bias):
    doubled = bias * 2
    out = (_scores(q, k) + doubled).softmax(-1) @ v
    bias.zero_()
    return (_scores(out, k) + doubled + bias).softmax(-1) @ v


@either("hazard", plus(_plain, lambda d: d.flags(d.S, d.S)), sites=2, **_FLAGS)
def mask_inverted_between_two_layers(q, k, v, keep):
    out = _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v
    keep.logical_not_()
    keep[:, 0] = True
    return _scores(out, k).masked_fill(~keep, -INF).softmax(-1) @ v


@either("hazard", cross)
def positions_counted_on(q, k, v):
    i, j = torch.arange(q.shape[-2], device=q.device), torch.arange(k.shape[-2], device=q.device)
    keep = j[None, :] <= i[:, None]
    i += 3
    j.mul_(2)
    near = (j[None, :] - i[:, None]).abs() < 9
    return _scores(q, k).masked_fill(~(keep | near), -INF).softmax(-1) @ v


@either("hazard", qkv, sites=2, modes=(INFERENCE,))
class BufferChangedByEveryCall(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(16, 16))

    def forward(self, q, k, v):
        n = q.shape[-2]
        out = (_scores(q, k) + self.bias[:n, :n]).softmax(-1) @ v
        self.bias.add_(torch.eye(16, device=q.device, dtype=q.dtype))
        out = out + (_scores(q, k) + self.bias[:n, :n]).softmax(-1) @ v
        self.bias.sub_(torch.eye(16, device=q.device, dtype=q.dtype))
        return out
