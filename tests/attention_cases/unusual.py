"""Rarer spellings: other bases, sums and masks by hand, operators called by other names, biases over image axes."""

import math

import torch
import torch.nn.functional as F

from attention_cases.case import Draw, fuses, plus, qkv, refuses, rows_first

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.3


def _some_rows_empty(d: Draw):
    return d.flags_with_an_empty_row(d.S, d.S)


# ------------------------------------------------------------------------------------------------ powers and sums
@fuses("softmax")
def softmax_to_base_two(q, k, v):
    s = _scores(q, k) * math.log2(math.e)
    p = torch.exp2(s - s.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True) @ v


@fuses("softmax")
def softmax_as_power_of_ten_divided_late(q, k, v):
    p = 10 ** _scores(q, k)
    return (p @ v) / p.sum(-1, keepdim=True)


@fuses("softmax", plus(qkv, lambda d: d.normal(d.H, 1, 1)))
def softmax_to_base_two_with_a_sink(q, k, v, sink):
    p = torch.exp2(_scores(q, k))
    return p / (p.sum(-1, keepdim=True) + torch.exp2(sink)) @ v


@fuses("softmax")
def softmin_of_distances(q, k, v):
    return F.softmin(-_scores(q, k), dim=-1) @ v


@fuses("softmax")
def sum_guarded_against_zero(q, k, v):
    p = torch.exp(_scores(q, k))
    return p / (p.sum(-1, keepdim=True) + 0.01) @ v


@refuses()
def sum_guarded_after_a_shift(q, k, v):
    """What the guard weighs depends on each row's largest score."""
    s = _scores(q, k)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    return p / (p.sum(-1, keepdim=True) + 0.01) @ v


@fuses("softmax")
def powers_times_a_gate_of_many_parts(q, k, v):
    gate = (1 - k[..., 0].sigmoid()) * k[..., 1].clamp(min=0.1) / 3 + k[..., 2] ** 2 * 0.5
    p = torch.exp(_scores(q, k)) * gate.unsqueeze(-2)
    return p / p.sum(-1, keepdim=True) @ v


@fuses("softmax", plus(qkv, lambda d: d.normal(d.S, d.S)))
def maximum_taken_off_before_factors_and_a_bias(q, k, v, bias):
    s = _scores(q, k)
    return torch.softmax(-(-2.0 * (s - s.amax(-1, keepdim=True)) / 3.0) + bias, -1) @ v


@fuses("softmax", plus(qkv, lambda d: d.flags(d.S, d.S)))
def powers_times_mask(q, k, v, keep):
    p = torch.exp(_scores(q, k)) * keep.to(q.dtype)
    return p / p.sum(-1, keepdim=True) @ v


@fuses("softmax", plus(qkv, lambda d: d.flags(d.B, 1, 1, d.S)))
def powers_masked_and_guarded(q, k, v, keep):
    p = torch.exp(_scores(q, k)).masked_fill(~keep, 0.0)
    return p / (p.sum(-1, keepdim=True) + 1e-3) @ v


@fuses("softmax", plus(qkv, lambda d: d.flags(d.S, d.S)))
def masked_after_softmax_and_normalised_again(q, k, v, keep):
    p = _scores(q, k).softmax(-1) * keep
    return p / p.sum(-1, keepdim=True) @ v


@refuses()
def weights_times_a_gate_of_the_scores(q, k, v):
    s = _scores(q, k)
    return (s.softmax(-1) * s.amax(-1, keepdim=True).sigmoid()) @ v


@refuses(plus(qkv, lambda d: d.flags(d.S, d.S)))
def masked_powers_over_the_sum_of_all(q, k, v, keep):
    p = torch.exp(_scores(q, k))
    return (p * keep) / p.sum(-1, keepdim=True) @ v


@refuses(plus(qkv, lambda d: d.flags(d.S, d.S)))
def weights_times_another_mask(q, k, v, keep):
    """Nothing divides by what the mask left."""
    return (_scores(q, k).softmax(-1) * keep) @ v


# ---------------------------------------------------------------------------------------------- rows without a key
@fuses("mask", plus(qkv, _some_rows_empty))
def empty_rows_where_nan(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, -INF).softmax(-1)
    return torch.where(torch.isnan(p), torch.zeros_like(p), p) @ v


@fuses("mask", plus(qkv, _some_rows_empty))
def empty_rows_filled_where_unequal_to_themselves(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, -INF).softmax(-1)
    return p.masked_fill(p != p, 0.0) @ v


@fuses("mask", plus(qkv, _some_rows_empty))
def empty_rows_multiplied_by_the_mask(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1)
    return (p * keep.to(p.dtype)) @ v


@fuses("mask", plus(qkv, _some_rows_empty))
def empty_rows_multiplied_stay_nan(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, -INF).softmax(-1)
    return (p * keep) @ v


@fuses("mask", plus(qkv, _some_rows_empty))
def empty_rows_of_a_moderate_fill_cleared(q, k, v, keep):
    """No score is as low as the fill, so that the weights it gives are zero before they are cleared."""
    p = _scores(q, k).masked_fill(~keep, -1e9 if q.dtype != torch.float16 else -65504.0).softmax(-1)
    return p.masked_fill(~keep, 0.0) @ v


@fuses("mask", plus(qkv, _some_rows_empty))
def shifted_before_a_moderate_fill(q, k, v, keep):
    scores = _scores(q, k)
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.masked_fill(~keep, -1e9 if q.dtype != torch.float16 else -65504.0).softmax(-1) @ v


@fuses("mask")
def causal_bool_filled_with_inf_and_added(q, k, v):
    """The fill makes every element of a boolean tensor True: all scores move by one."""
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return torch.softmax(_scores(q, k) + mask.masked_fill(~mask, -INF), -1) @ v


@fuses("mask", plus(qkv, lambda d: d.integers(-3, 4, d.B, d.H, d.S, d.S)))
def mask_of_integers_added(q, k, v, mask):
    return torch.softmax(_scores(q, k) + mask, -1) @ v


# --------------------------------------------------------------------------------------------------- other names
@fuses("product", rows_first)
def operators_of_aten(q, k, v):
    aten = torch.ops.aten
    q, k, v = (aten.permute(x, [0, 2, 1, 3]) for x in (q, k, v))
    scores = aten.mul.Scalar(q, 0.5) @ aten.mul.Scalar(aten.transpose.int(k, -2, -1), 0.5)
    return aten.matmul.default(aten._safe_softmax(scores, -1), v)


@fuses("product")
def dropout_switched_off_by_keyword(q, k, v):
    return torch.dropout(_scores(q, k).softmax(-1), p=0.5, train=False) @ v


@fuses("product")
def products_of_linalg(q, k, v):
    return torch.linalg.matmul(torch.softmax(torch.linalg.matmul(q, k.mT) * 0.3, -1), v)


@fuses("product")
def einsum_with_numbered_axes(q, k, v):
    scores = torch.einsum(q, [0, 1, 2, 3], k, [0, 1, 30, 3], [0, 1, 2, 30]) * 0.3
    return torch.einsum(scores.softmax(-1), [0, 1, 2, 4], v, [0, 1, 4, 3], [0, 1, 2, 3])


@fuses("product")
def inner_product_of_one_head(q, k, v):
    return torch.inner(q[0, 0], k[0, 0]).mul(0.3).softmax(-1) @ v[0, 0]


@fuses("product")
def tensordot_of_one_head(q, k, v):
    scores = torch.tensordot(q[0, 0], k[0, 0], dims=([1], [1])) * 0.3
    return torch.tensordot(scores.softmax(-1), v[0, 0], dims=1)


# --------------------------------------------------------------------------------------------------------- biases
@fuses("bias", plus(qkv, lambda d: d.normal(d.B, d.H, d.S, d.S), lambda d: d.normal(d.B, d.H, d.S, d.S)))
def bias_twice(q, k, v, first, second):
    """Two inputs with one gradient."""
    return (_scores(q, k) + first + second).softmax(-1) @ v


def _image(d: Draw):
    """Heads folded into the batch, an image of 2 rows and 3 columns."""
    return tuple(d.normal(d.B * d.H, 6, d.D) for _ in range(3))


@fuses("bias", plus(_image, lambda d: d.normal(2, 2, d.D), lambda d: d.normal(3, 3, d.D)), static_only=True)
def bias_added_to_scores_of_an_image(q, k, v, of_rows, of_columns):
    """Segment Anything's decomposed relative positions, added in five dimensions."""
    grid = q.unflatten(1, (2, 3))
    rows = torch.einsum("bhwc,hkc->bhwk", grid, of_rows)
    columns = torch.einsum("bhwc,wkc->bhwk", grid, of_columns)
    scores = (q * 0.3) @ k.transpose(-2, -1)
    scores = scores.view(-1, 2, 3, 2, 3) + rows[:, :, :, :, None] + columns[:, :, :, None, :]
    return scores.view(-1, 6, 6).softmax(-1) @ v
