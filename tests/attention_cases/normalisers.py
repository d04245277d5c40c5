"""Softmax by hand, in parts, over other axes, masked or weighted afterwards, kept for later."""

import torch
import torch.nn.functional as F

from attention_cases.case import Draw, cross, either, fuses, plus, qkv, refuses

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.35


def _flags(d: Draw):
    return d.flags(d.B, 1, d.S, d.T)


# ----------------------------------------------------------------------------------------------------------- by hand
@fuses("normaliser", cross)
def shifted_by_the_mean(q, k, v):
    s = _scores(q, k)
    p = torch.exp(s - s.mean(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True) @ v


@either("normaliser", cross)
def shifted_by_the_largest_of_all(q, k, v):
    s = _scores(q, k)
    p = torch.exp(s - s.max())
    return p / p.sum(-1, keepdim=True) @ v


@either("normaliser", cross)
def shifted_by_the_largest_of_each_key(q, k, v):
    """A shift that differs from key to key is none."""
    s = _scores(q, k)
    p = torch.exp(s - s.amax(-2, keepdim=True))
    return p / p.sum(-1, keepdim=True) @ v


@fuses("normaliser", plus(cross, _flags))
def shifted_before_the_mask(q, k, v, keep):
    s = _scores(q, k)
    s = s - s.amax(dim=-1, keepdim=True).detach()
    return s.masked_fill(~keep, -torch.finfo(s.dtype).max).softmax(dim=-1) @ v


@fuses("normaliser", cross)
def largest_less_each(q, k, v):
    s = _scores(q, k)
    return torch.softmax(s.amax(-1, keepdim=True) - s, dim=-1) @ v


@fuses("normaliser", cross)
def stable_softmax_of_cogview(q, k, v):
    """Divided, shifted, multiplied again."""
    s = _scores(q, k) / 32
    s = s - torch.amax(s, dim=-1, keepdim=True).detach()
    return (s * 32).softmax(dim=-1) @ v


@either("normaliser", cross)
def shifted_then_capped(q, k, v):
    """What the cap does depends on each row's largest score."""
    s = _scores(q, k)
    s = s - s.amax(-1, keepdim=True)
    return torch.softmax(torch.tanh(s), -1) @ v


@either("normaliser", cross)
def shifted_then_clamped(q, k, v):
    s = _scores(q, k)
    s = s - s.amax(-1, keepdim=True)
    return torch.softmax(s.clamp(min=-1.0), -1) @ v


@either("normaliser", plus(cross, _flags))
def shifted_then_filled_with_a_moderate_number(q, k, v, keep):
    s = _scores(q, k)
    s = s - s.amax(-1, keepdim=True)
    return torch.softmax(s.masked_fill(~keep, -2.0), -1) @ v


@either("normaliser", cross)
def divided_by_the_largest(q, k, v):
    s = _scores(q, k)
    return torch.softmax(s / s.abs().amax(-1, keepdim=True), -1) @ v


@fuses("normaliser", cross)
def weights_by_logarithms(q, k, v):
    s = _scores(q, k)
    return (s - torch.logsumexp(s, -1, keepdim=True)).exp() @ v


@either("normaliser", cross)
def logsumexp_spelled_out(q, k, v):
    s = _scores(q, k)
    top = s.max(-1, keepdim=True).values
    total = top + (s - top).exp().sum(-1, keepdim=True).log()
    return torch.exp(s - total) @ v


@either("normaliser", cross)
def normalised_by_function(q, k, v):
    p = _scores(q, k).exp()
    return F.normalize(p, p=1, dim=-1) @ v


@fuses("normaliser", cross)
def normalised_twice(q, k, v):
    p = _scores(q, k).softmax(-1)
    return p / p.sum(-1, keepdim=True) @ v


@either("normaliser", cross)
def normalised_by_the_norm(q, k, v):
    p = _scores(q, k).softmax(-1)
    return p / p.norm(dim=-1, keepdim=True) @ v


@either("normaliser", cross)
def softmax_of_softmax(q, k, v):
    return _scores(q, k).softmax(-1).softmax(-1) @ v


@either("normaliser", cross)
def sharpened(q, k, v):
    p = _scores(q, k).softmax(-1) ** 2
    return p / p.sum(-1, keepdim=True) @ v


@either("normaliser", cross)
def exponential_less_one(q, k, v):
    p = torch.expm1(_scores(q, k)) + 1
    return p / p.sum(-1, keepdim=True) @ v


@either("normaliser", cross)
def powers_below_one(q, k, v):
    p = 0.5 ** _scores(q, k)
    return p / p.sum(-1, keepdim=True) @ v


@either("normaliser", cross)
def two_blocks_of_keys_merged(q, k, v):
    """The online softmax of two halves, by hand."""
    s1, s2 = _scores(q, k[..., :3, :]), _scores(q, k[..., 3:, :])
    m1, m2 = s1.amax(-1, keepdim=True), s2.amax(-1, keepdim=True)
    m = torch.maximum(m1, m2)
    p1, p2 = (s1 - m).exp(), (s2 - m).exp()
    total = p1.sum(-1, keepdim=True) + p2.sum(-1, keepdim=True)
    return (p1 @ v[..., :3, :] + p2 @ v[..., 3:, :]) / total


@either("normaliser", cross, sites=2)
def two_blocks_merged_by_logsumexp(q, k, v):
    s1, s2 = _scores(q, k[..., :3, :]), _scores(q, k[..., 3:, :])
    l1, l2 = s1.logsumexp(-1, keepdim=True), s2.logsumexp(-1, keepdim=True)
    total = torch.logaddexp(l1, l2)
    return s1.softmax(-1) @ v[..., :3, :] * (l1 - total).exp() + s2.softmax(-1) @ v[..., 3:, :] * (l2 - total).exp()


# -------------------------------------------------------------------------------------------------- axes and places
@fuses("normaliser", cross)
def scores_of_keys_first(q, k, v):
    return (v.mT @ torch.softmax(k @ q.mT * 0.35, dim=-2)).mT


@refuses(cross)
def scores_of_keys_first_over_rows(q, k, v):
    return (v.mT @ torch.softmax(k @ q.mT * 0.35, dim=-1)).mT


@either("normaliser", qkv)
def square_scores_over_either_axis(q, k, v):
    """As many rows as keys: nothing but the axis tells which product this is."""
    return torch.softmax(_scores(q, k), dim=-2) @ v, torch.softmax(_scores(q, k), dim=-1).mT @ v


@either("normaliser", cross)
def weights_centred(q, k, v):
    p = _scores(q, k).softmax(-1)
    return (p - p.mean(-1, keepdim=True)) @ v


@either("normaliser", cross)
def weights_less_a_constant(q, k, v):
    return (_scores(q, k).softmax(-1) - 1 / k.shape[-2]) @ v


@either("normaliser", cross)
def weights_of_largest_three(q, k, v):
    p = _scores(q, k).softmax(-1)
    return torch.where(p >= p.topk(3, -1).values[..., -1:], p, 0.0) @ v


@either("normaliser", cross)
def scores_of_largest_three(q, k, v):
    s = _scores(q, k)
    return s.masked_fill(s < s.topk(3, -1).values[..., -1:], -INF).softmax(-1) @ v


@either("normaliser", cross)
def scores_above_a_threshold(q, k, v):
    s = _scores(q, k)
    return s.masked_fill(s < -0.5, -INF).softmax(-1) @ v


@either("normaliser", plus(cross, _flags))
def weights_masked_without_normalising(q, k, v, keep):
    return (_scores(q, k).softmax(-1) * keep) @ v


@either("normaliser", plus(cross, _flags))
def weights_masked_and_normalised(q, k, v, keep):
    p = _scores(q, k).softmax(-1) * keep
    return p / p.sum(-1, keepdim=True) @ v


@either("normaliser", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def weights_masked_and_normalised_with_a_guard(q, k, v, keep):
    p = _scores(q, k).softmax(-1) * keep
    return p / (p.sum(-1, keepdim=True) + 1e-3) @ v


@either("normaliser", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def weights_masked_and_sum_clamped(q, k, v, keep):
    p = _scores(q, k).exp() * keep
    return p / p.sum(-1, keepdim=True).clamp(min=1e-3) @ v


@either("normaliser", plus(cross, _flags, _flags))
def masked_before_and_otherwise_after(q, k, v, before, after):
    s = _scores(q, k).masked_fill(~before, -INF)
    return s.softmax(-1).masked_fill(~after, 0.0) @ v


@either("normaliser", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def masked_before_and_after(q, k, v, keep):
    s = _scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min)
    return s.softmax(-1).masked_fill(~keep, 0.0) @ v


@fuses("normaliser", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def weights_cleared_by_a_tensor_in_cpm_ant(q, k, v, keep):
    s = torch.masked_fill(_scores(q, k), keep == torch.tensor(False), torch.scalar_tensor(-INF, dtype=q.dtype))
    cleared = torch.masked_fill(s.softmax(-1), keep == torch.tensor(False), torch.scalar_tensor(0, dtype=q.dtype))
    return cleared @ v


@either("normaliser", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def rows_without_keys_zeroed_in_the_result(q, k, v, keep):
    out = _scores(q, k).masked_fill(~keep, -INF).softmax(-1).nan_to_num(0.0) @ v
    return out * keep.any(-1, keepdim=True)


@either("normaliser", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def rows_without_keys_in_the_result(q, k, v, keep):
    out = _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v
    return torch.where(keep.any(-1, keepdim=True), out, 0.0)


@either("normaliser", plus(cross, lambda d: d.constant(d.B, 1, d.S, 1)))
def weights_times_a_factor_per_row(q, k, v, factor):
    return (_scores(q, k).softmax(-1) * factor.exp()) @ v


@either("normaliser", plus(cross, lambda d: d.normal(d.B, 1, 1, d.T)))
def weights_times_a_factor_per_key(q, k, v, factor):
    return (_scores(q, k).softmax(-1) * factor.exp()) @ v


@either("normaliser", plus(cross, lambda d: d.normal(d.B, d.H, d.S, d.T)))
def weights_plus_a_fixed_part(q, k, v, fixed):
    return (_scores(q, k).softmax(-1) + fixed) @ v


@either("normaliser", plus(cross, lambda d: d.normal(d.H, 1, 1)), sites=2)
def weights_mixed_with_another_softmax(q, k, v, rate):
    rate = torch.sigmoid(rate)
    other = (-(q.sum(-1)[..., None] - k.sum(-1)[..., None, :]).square()).softmax(-1)
    return (rate * _scores(q, k).softmax(-1) + (1 - rate) * other) @ v


@either("normaliser", cross, sites=2)
def weights_applied_twice(q, k, v):
    p = _scores(q, k).softmax(-1)
    once = p @ v
    return once, p.detach() @ v.square() - once.square()


@either("normaliser", cross)
def weights_of_neighbouring_heads(q, k, v):
    return _scores(q, k).softmax(-1).roll(1, 1) @ v


@either("normaliser", cross)
def weights_copied_into_a_buffer(q, k, v):
    p = torch.zeros(*q.shape[:-1], k.shape[-2], dtype=q.dtype, device=q.device)
    p[:] = _scores(q, k).softmax(-1)
    return p @ v


@either("normaliser", cross)
def result_of_the_previous_position(q, k, v):
    p = _scores(q, k).softmax(-1)
    return F.pad(p, (0, 0, 1, 0))[..., :-1, :] @ v


@either("normaliser", cross)
def output_accumulated(q, k, v):
    out = torch.ones_like(q)
    return out.flatten(0, 1).baddbmm_(_scores(q, k).softmax(-1).flatten(0, 1), v.flatten(0, 1), beta=0.5, alpha=2.0)


@either("normaliser", cross)
def residual_by_addcmul(q, k, v):
    return torch.addcmul(q, _scores(q, k).softmax(-1) @ v, q, value=0.5)


@either("normaliser", plus(qkv, lambda d: d.normal(d.S, d.S)))
def weights_times_a_matrix(q, k, v, mix):
    return (_scores(q, k).softmax(-1) @ mix) @ v


@either("normaliser", plus(qkv, lambda d: d.normal(d.S, d.S)))
def scores_times_a_matrix(q, k, v, mix):
    return (_scores(q, k) @ mix).softmax(-1) @ v


@either("normaliser", qkv)
def scores_added_to_their_transpose(q, k, v):
    s = _scores(q, k)
    return (s + s.mT).softmax(-1) @ v


@either("normaliser", qkv)
def scores_of_this_and_the_last_head(q, k, v):
    s = _scores(q, k)
    return (s + 0.5 * s.roll(1, 1)).softmax(-1) @ v


@either("normaliser", cross)
def dropout_before_the_softmax(q, k, v):
    """Off, and on at a rate of zero."""
    s = F.dropout(_scores(q, k), 0.5, training=False)
    return F.dropout(s, 0.0).softmax(-1) @ v


@either("normaliser", cross, sites=2)
def logsumexp_returned_and_scaled(q, k, v):
    s = _scores(q, k)
    lse = s.logsumexp(-1)
    return s.softmax(-1) @ v, lse * 2


@either("normaliser", cross)
def weights_computed_by_the_returned_logsumexp(q, k, v):
    s = _scores(q, k)
    lse = s.logsumexp(-1)
    return torch.exp(s - lse[..., None]) @ v, lse


@either("normaliser", cross)
def other_logsumexp_subtracted(q, k, v):
    s = _scores(q, k)
    return torch.exp(s - (2 * s).logsumexp(-1, keepdim=True)) @ v


@either("normaliser", cross)
def largest_weight_returned(q, k, v):
    p = _scores(q, k).softmax(-1)
    return p @ v, p.amax(-1)


@either("normaliser", cross)
def largest_score_returned(q, k, v):
    s = _scores(q, k)
    return s.softmax(-1) @ v, s.amax(-1)


@refuses(plus(cross, lambda d: d.normal(d.H, 1, 1)))
def shifted_beside_a_sink(q, k, v, sink):
    """The sink is not shifted with the scores."""
    s = _scores(q, k)
    s = (s - s.amax(-1, keepdim=True)) * 1.5
    s = torch.cat([s, sink.expand(*s.shape[:-1], 1)], dim=-1)
    return s.softmax(-1)[..., :-1] @ v


@either("normaliser", cross)
def shifted_logits_and_their_logsumexp(q, k, v):
    s = _scores(q, k)
    s = (s - s.amax(-1, keepdim=True)) * 1.5
    return s.softmax(-1) @ v, s.logsumexp(-1)


@fuses("normaliser", plus(cross, _flags))
def shifted_and_scaled_under_a_mask(q, k, v, keep):
    """CogView's and LayoutLMv3's way against overflow, with a row of which nothing is left."""
    keep = keep & (torch.arange(q.shape[-2], device=q.device)[:, None] != 2)
    s = _scores(q, k).masked_fill(~keep, -torch.inf) / 32
    s = (s - s.amax(dim=-1).unsqueeze(-1)) * 32
    return torch.softmax(s, dim=-1) @ v


@either("normaliser", plus(cross, _flags))
def shifted_and_negated_under_a_mask(q, k, v, keep):
    s = _scores(q, k).masked_fill(~keep, -1e4)
    s = (s.amin(dim=-1, keepdim=True) - s) * 2 / 4
    return (s * 0.5).softmax(-1) @ v


@either("normaliser", cross)
def shift_used_elsewhere(q, k, v):
    s = _scores(q, k)
    top = s.amax(-1, keepdim=True)
    return ((s - top) * 1.5).softmax(-1) @ v + top
