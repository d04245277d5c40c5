"""Factors of the weights that differ from key to key, before and after they are divided by their sum."""

import torch
import torch.nn.functional as F

from attention_cases.case import Draw, cross, fuses, plus, qkv, refuses

_per_key = plus(cross, lambda d: d.normal(d.B, 1, 1, d.T))
_per_head_and_key = plus(cross, lambda d: d.normal(d.H, 1, d.T))
_per_score = plus(cross, lambda d: d.normal(d.B, 1, d.S, d.T))


def _scores(q, k):
    return q @ k.mT * 0.3


def _with_zeros(d: Draw):
    """Whole numbers, so that ``relu`` closes keys; the first of them is open."""
    gate = d.integers(-2, 3, d.B, 1, 1, d.T).to(d.constant(1))
    gate[..., 0] = 1.0
    return gate.requires_grad_()


@fuses("gate", _per_key)
def gate_of_the_exponentials(q, k, v, gate):
    weights = torch.exp(_scores(q, k)) * torch.sigmoid(gate)
    return weights / weights.sum(-1, keepdim=True) @ v


@fuses("gate", plus(cross, _with_zeros))
def gate_that_closes_keys(q, k, v, gate):
    s = _scores(q, k)
    weights = torch.exp(s - s.amax(-1, keepdim=True)) * F.relu(gate)
    return weights / weights.sum(-1, keepdim=True) @ v


@fuses("gate", _per_key)
def gate_that_is_an_exponential(q, k, v, gate):
    weights = gate.exp() * torch.exp(_scores(q, k))
    return weights @ v / weights.sum(-1, keepdim=True)


@fuses("gate", _per_score)
def gate_of_each_weight_normalised_again(q, k, v, gate):
    weights = _scores(q, k).softmax(-1) * (1 - gate.sigmoid())
    return weights / weights.sum(-1, keepdim=True) @ v


@fuses("gate", plus(cross, _with_zeros))
def gate_normalised_again_with_a_guard(q, k, v, gate):
    weights = _scores(q, k).softmax(-1) * gate.square()
    return weights / (weights.sum(-1, keepdim=True) + 1e-3) @ v


@fuses("gate", _per_head_and_key)
def gate_after_the_softmax(q, k, v, gate):
    return (_scores(q, k).softmax(-1) * gate) @ v


@fuses("gate", plus(cross, lambda d: d.flags(d.S, d.T), lambda d: d.normal(d.B, 1, 1, d.T)))
def gates_on_both_sides_of_the_sum(q, k, v, keep, gate):
    weights = _scores(q, k).masked_fill(~keep, -float("inf")).softmax(-1) * F.softplus(gate)
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights / (2 + gate.square())) @ v


@fuses("gate", plus(_per_key, lambda d: d.normal(d.H, 1, d.T)))
def two_gates_of_the_exponentials(q, k, v, gate, other):
    weights = torch.exp(_scores(q, k)) * gate.sigmoid() * other.exp()
    return weights / weights.sum(-1, keepdim=True) @ v


@refuses(_per_key)
def gate_that_may_be_negative(q, k, v, gate):
    weights = torch.exp(_scores(q, k)) * (2 + gate)
    return weights / weights.sum(-1, keepdim=True) @ v


@refuses(_per_score)
def gate_of_each_weight(q, k, v, gate):
    return (_scores(q, k).softmax(-1) * gate.sigmoid()) @ v


@refuses(_per_key)
def gate_outside_the_sum_inside_the_guard(q, k, v, gate):
    weights = _scores(q, k).softmax(-1)
    return weights * gate.sigmoid() / (weights.sum(-1, keepdim=True) + gate.sigmoid()) @ v


@refuses(_per_key)
def gate_with_a_limit_of_the_sum(q, k, v, gate):
    weights = _scores(q, k).softmax(-1) * gate.sigmoid()
    return weights / weights.sum(-1, keepdim=True).clamp(min=0.5) @ v


@fuses("gate", plus(qkv, lambda d: d.normal(d.B, 1, 1, d.S)))
def gate_beside_a_causal_fill(q, k, v, gate):
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    weights = _scores(q, k).masked_fill(future, torch.finfo(q.dtype).min).softmax(-1) * gate.sigmoid()
    return weights / weights.sum(-1, keepdim=True) @ v


@refuses(plus(_per_key, lambda d: d.flags_with_an_empty_row(d.S, d.T)))
def gate_beside_a_fill_of_whole_rows(q, k, v, gate, keep):
    """Weights of the filled row are equal but for the gate, whose logarithm would vanish beside the fill."""
    weights = _scores(q, k).masked_fill(~keep, -1e9).softmax(-1) * gate.sigmoid()
    return weights / weights.sum(-1, keepdim=True) @ v


@refuses(plus(_per_key, lambda d: torch.where(d.flags_with_an_empty_row(d.S, d.T), 0.0, -1e9).to(d.constant(1))))
def gate_beside_an_additive_mask(q, k, v, gate, mask):
    weights = (_scores(q, k) + mask).softmax(-1) * gate.sigmoid()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


@refuses(plus(_per_key, lambda d: d.flags_with_an_empty_row(d.S, d.T).long()))
def gate_beside_a_mask_made_inside(q, k, v, gate, keep):
    weights = (_scores(q, k) + (1.0 - keep.to(q.dtype)).cumsum(0) * -10000.0).softmax(-1) * gate.sigmoid()
    return weights / weights.sum(-1, keepdim=True) @ v


@fuses("gate", plus(cross, lambda d: d.flags_with_an_empty_row(d.S, d.T), lambda d: d.integers(0, 4, d.T)))
def counts_after_a_fill_of_whole_rows(q, k, v, keep, count):
    return (_scores(q, k).masked_fill(~keep, -1e9).softmax(-1) * count) @ v
