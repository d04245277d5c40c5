"""Weights that are masked once more after the softmax, and maybe divided by what is left of their sum."""

import torch

from attention_cases.case import Draw, cross, either, fuses, plus, refuses

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.35


def _flags(d: Draw):
    return d.flags(d.B, 1, d.S, d.T)


# ------------------------------------------------------------------------------------- masked again, then divided again
@either("normaliser", plus(cross, _flags))
def weights_under_a_low_fill_masked_by_another_mask(q, k, v, keep):
    """In rows where the second mask shows none of the first one's keys, nothing is left: 0 / 0."""
    first = torch.arange(k.shape[-2], device=q.device) < 2
    p = _scores(q, k).masked_fill(~first, -1e4).softmax(-1)
    keep = keep & (first | (torch.arange(q.shape[-2], device=q.device)[:, None] > 2))
    p = p * (keep & ~(first & (torch.arange(q.shape[-2], device=q.device)[:, None] == 4)))
    return p / p.sum(-1, keepdim=True) @ v


@fuses("normaliser", plus(cross, _flags))
def weights_under_a_low_fill_masked_once_more(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, -1e4).softmax(-1).masked_fill(~keep, 0.0)
    return p / p.sum(-1, keepdim=True) @ v


@either("normaliser", plus(cross, _flags, lambda d: d.flags(d.B, 1, 1, d.T)))
def weights_under_an_additive_mask_masked_by_another_mask(q, k, v, keep, other):
    bias = torch.where(keep, 0.0, -1e9).to(q.dtype)
    p = (_scores(q, k) + bias).softmax(-1) * (other & (torch.arange(k.shape[-2], device=q.device) > 0))
    return p / p.sum(-1, keepdim=True) @ v


@fuses("normaliser", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def weights_under_a_low_fill_set_to_zero(q, k, v, keep):
    """Conformers of NeMo: -10000 is lower than any score, and what is left of such weights is cleared."""
    scores = torch.matmul(q, k.transpose(-2, -1)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~keep, -10000.0)
    return torch.softmax(scores, dim=-1).masked_fill(~keep, 0.0) @ v


@fuses("normaliser", plus(cross, _flags, lambda d: d.constant(d.S, d.T), lambda d: d.normal(d.B, d.H, d.S, d.D)))
def weights_beside_relative_scores_set_to_zero(q, k, v, keep, rows, r):
    """Scores of relative positions, products as well, are no mask."""
    scores = (torch.matmul(q, k.mT) + r @ (rows.mT @ r).mT @ k.mT) / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(~keep, -1e4), dim=-1).masked_fill(~keep, 0.0) @ v


def _two_masks(d: Draw):
    """A mask that is added, which leaves row 1 nothing but what the other one hides."""
    added = torch.where(d.flags(d.B, 1, d.S, d.T), 0.0, -1e4)
    keep = d.flags(d.B, 1, d.S, d.T)
    added[:, :, 1], keep[:, :, 1] = -1e4, torch.arange(d.T) < 3
    return (*cross(d), keep, added.to(d.constant(1)))


@refuses(_two_masks)
def weights_under_two_masks_set_to_zero_by_one(q, k, v, keep, added):
    """Keys that the second mask hides share the weight of a row whose other keys the first one hides."""
    scores = (_scores(q, k) + added).masked_fill(~keep, -1e4)
    return torch.softmax(scores, dim=-1).masked_fill(~keep, 0.0) @ v


@refuses(_two_masks)
def weights_under_two_lowest_masks_set_to_zero_by_one(q, k, v, keep, added):
    lowest = torch.finfo(q.dtype).min
    scores = (_scores(q, k) + torch.where(added < 0, lowest, 0.0).to(q)).masked_fill(~keep, lowest)
    return torch.softmax(scores, dim=-1).masked_fill(~keep, 0.0) @ v


@either("normaliser", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def weights_under_a_fill_in_reach_set_to_zero(q, k, v, keep):
    """Keys filled with -100 keep a share of scores that are as low."""
    scores = (_scores(q, k) - 99.0).masked_fill(~keep, -100.0)
    return torch.softmax(scores, dim=-1).masked_fill(~keep, 0.0) @ v


_WITH_AN_EMPTY_ROW = plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T))


@fuses("normaliser", _WITH_AN_EMPTY_ROW)
def weights_masked_again_over_their_sum_and_a_guard(q, k, v, keep):
    """The sum is one where a row has a key; where it has none, zero is divided by the guard."""
    p = _scores(q, k).masked_fill(~keep, -1e9).softmax(-1) * keep.to(q.dtype)
    return p / (p.sum(-1, keepdim=True) + 1e-3) @ v


@fuses("normaliser", _WITH_AN_EMPTY_ROW)
def weights_masked_again_over_their_limited_sum(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, -INF).softmax(-1) * keep
    return p / p.sum(-1, keepdim=True).clamp(min=1e-5) @ v


@fuses("normaliser", cross, sites=2)
def softmax_over_its_sum_and_a_guard(q, k, v):
    """Means of clusters: the weights are divided by how much each cluster got, which is one."""
    p = torch.softmax(k @ q.mT, dim=-2).mT
    return p @ v / 2 + (p / (p.sum(-1, keepdim=True) + 1e-2)) @ v.sin()


@refuses(_WITH_AN_EMPTY_ROW)
def weights_masked_only_afterwards_over_their_guarded_sum(q, k, v, keep):
    p = _scores(q, k).softmax(-1) * keep
    return p / (p.sum(-1, keepdim=True) + 1e-3) @ v


@refuses(cross)
def weights_over_a_sum_limited_above_one(q, k, v):
    p = _scores(q, k).softmax(-1)
    return p / p.sum(-1, keepdim=True).clamp(min=1.5) @ v
