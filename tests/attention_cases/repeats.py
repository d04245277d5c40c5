"""What is repeated along an axis that queries, keys or values do not have by themselves."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import Sizes, cross, either, fuses, grouped, plus, qkv, refuses

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.3


def _attend(q, k, v):
    return _scores(q, k).softmax(-1) @ v


# ------------------------------------------------------------------------------------------- scores and weights
@fuses("repeats", cross)
def scores_expanded_over_a_new_axis(q, k, v):
    return _scores(q, k).unsqueeze(1).expand(-1, 3, -1, -1, -1).softmax(-1) @ v.unsqueeze(1)


@fuses("repeats", cross)
def weights_expanded_over_a_new_axis(q, k, v):
    return _scores(q, k).softmax(-1).unsqueeze(1).expand(-1, 3, -1, -1, -1) @ v.unsqueeze(1)


@fuses("repeats", cross)
def weights_repeated_for_more_values(q, k, v):
    return _scores(q[:, :2], k[:, :2]).softmax(-1).repeat_interleave(3, 1) @ v


@fuses("repeats", cross)
def weights_of_one_head_for_all_batches_of_values(q, k, v):
    weights = _scores(q[:1, :1], k[:1, :1]).softmax(-1)
    return weights.expand(q.shape[0], 6, -1, -1) @ v.sum((0, 1))


@fuses("repeats", cross)
def scores_of_one_query_for_many_rows(q, k, v):
    return _scores(q[:, :, :1], k).expand(-1, -1, 5, -1).softmax(-1) @ v


@either("repeats", cross)
def logsumexp_of_repeated_scores(q, k, v):
    scores = _scores(q, k).unsqueeze(1).expand(-1, 3, -1, -1, -1)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1) @ v.unsqueeze(1), lse


@refuses(cross)
def weights_repeated_along_keys(q, k, v):
    return (_scores(q, k).softmax(-1).repeat_interleave(2, -1) / 2) @ torch.cat([v, v], -2)


# --------------------------------------------------------------------------------------------------- operands
@fuses("repeats", cross)
def everything_expanded_over_the_batch(q, k, v):
    """One example for several guidance scales."""
    return _attend(*(x[:1].expand(4, -1, -1, -1) for x in (q, k, v)))


@fuses("repeats", cross)
def everything_repeated_over_heads(q, k, v):
    return _attend(*(x[:, :2].repeat(1, 3, 1, 1) for x in (q, k, v)))


@fuses("repeats", cross)
def everything_interleaved_over_heads(q, k, v):
    return _attend(*(x[:, :2].repeat_interleave(3, 1) for x in (q, k, v)))


@fuses("repeats", cross)
def beams_flattened_into_the_batch(q, k, v):
    return _attend(*(x.unsqueeze(1).expand(-1, 3, -1, -1, -1).reshape(-1, *x.shape[1:]) for x in (q, k, v)))


@fuses("repeats", cross)
def queries_expanded_alone(q, k, v):
    return _attend(q.unsqueeze(1).expand(-1, 3, -1, -1, -1), k.unsqueeze(1), v.unsqueeze(1))


@fuses("repeats", cross)
def values_repeated_alone(q, k, v):
    return _attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1).repeat(1, 3, 1, 1, 1))


@fuses("repeats", cross)
def operands_of_sdpa_all_expanded(q, k, v):
    return F.scaled_dot_product_attention(*(x[:1].expand(3, -1, -1, -1) for x in (q, k, v)))


@fuses("repeats", grouped)
def keys_broadcast_to_groups(q, k, v):
    b, g, t, d = k.shape
    k, v = (torch.broadcast_to(x[:, :, None], (b, g, 3, t, d)).flatten(1, 2) for x in (k, v))
    return _attend(q, k, v)


# ------------------------------------------------------------------------------------------ axes of positions alone
@fuses("repeats", cross)
def temperatures_make_the_axis(q, k, v):
    temperature = torch.arange(1, 4, device=q.device).to(q.dtype).view(3, 1, 1, 1)
    return (_scores(q, k)[:, None] / temperature).softmax(-1) @ v[:, None]


@fuses("repeats", qkv)
def windows_make_the_axis(q, k, v):
    n = q.shape[2]
    distance = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs().to(q.device)
    hidden = distance > torch.tensor([1, 2, 4], device=q.device).view(3, 1, 1)
    return _scores(q, k)[:, None].masked_fill(hidden[:, None], -INF).softmax(-1) @ v[:, None]


@fuses("repeats", cross)
def lengths_make_the_batch(q, k, v):
    shown = torch.arange(k.shape[2])[None, :] < torch.arange(2, 5)[:, None]
    lowest = torch.finfo(q.dtype).min
    return torch.where(shown[:, None, None].to(q.device), _scores(q[:1], k[:1]), lowest).softmax(-1) @ v[:1]


@fuses("repeats", plus(cross, lambda d: d.flags_with_an_empty_row(3, d.S, d.T)))
def masks_make_the_batch(q, k, v, keep):
    scores = _scores(q[:1], k[:1]).masked_fill(~keep[:, None], torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v[:1]


# -------------------------------------------------------------------------------------------- beside a learned bias
@fuses("repeats", qkv)
class FramesOfAVideo(nn.Module):
    """The largest score of a row, over a learned bias, is subtracted before the mask."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.table = nn.Embedding(8, sizes.heads)

    def forward(self, q, k, v):
        n = q.shape[2]
        ahead = torch.arange(n, device=q.device)[None, :] - torch.arange(n, device=q.device)[:, None]
        scores = _scores(q, k) + self.table((-ahead).clamp(min=0, max=7)).permute(2, 0, 1)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        return scores.masked_fill(ahead > 0, -torch.finfo(scores.dtype).max).softmax(-1) @ v


@fuses("repeats", plus(cross, lambda d: d.constant(d.B, d.H, d.S, d.T)), modes=("inference",))
def scores_detached_in_inference(q, k, v, bias):
    with torch.no_grad():
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).detach()
        return (scores + bias).softmax(-1) @ v


@fuses("repeats", lambda d: (d.normal(d.S, d.D), d.normal(d.T, d.D), d.normal(d.B, d.T, d.D), d.normal(d.B, d.S, 1)))
def numbers_of_rows_of_each_sequence_subtracted(q, k, v, shift):
    """The scores have no batch, what is subtracted from their rows has."""
    scores = (q @ k.mT).reshape(-1).view(1, q.shape[0], k.shape[0])
    return (scores - shift.detach()).softmax(-1) @ v
