"""Masks: how they are made, how they are applied, and what a row without any key gives."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import Draw, Sizes, cross, fuses, plus, qkv, tokens

INF = float("inf")


def _attend(scores, v):
    return F.softmax(scores, dim=-1) @ v


def _scores(q, k):
    return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))


def _indices(q, k):
    return torch.arange(q.shape[-2], device=q.device)[:, None], torch.arange(k.shape[-2], device=q.device)[None, :]


def _bool_mask(d: Draw):
    return d.flags(d.B, 1, d.S, d.T)


def _some_rows_empty(d: Draw):
    return d.flags_with_an_empty_row(d.B, 1, d.S, d.T)


# causal


@fuses("causal")
def causal_tril_ones_equal_zero(q, k, v):
    s = q.shape[-2]
    mask = torch.tril(torch.ones(s, s, device=q.device))
    return _attend(_scores(q, k).masked_fill(mask == 0, -INF), v)


@fuses("causal")
def causal_triu_bool(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], device=q.device, dtype=torch.bool).triu(diagonal=1)
    return _attend(_scores(q, k).masked_fill(mask, -INF), v)


@fuses("causal")
def causal_triu_of_inf_added(q, k, v):
    mask = torch.triu(torch.full((q.shape[-2], k.shape[-2]), -INF, device=q.device, dtype=q.dtype), diagonal=1)
    return _attend(_scores(q, k) + mask, v)


@fuses("causal")
def causal_triu_inplace_of_inf(q, k, v):
    mask = torch.empty(q.shape[-2], q.shape[-2], device=q.device, dtype=q.dtype).fill_(-INF).triu_(1)
    scores = _scores(q, k)
    scores += mask
    return _attend(scores, v)


@fuses("causal")
def causal_arange_compared(q, k, v):
    rows, columns = _indices(q, k)
    return _attend(torch.where(rows >= columns, _scores(q, k), -INF), v)


@fuses("causal")
def causal_arange_less_finite_minimum(q, k, v):
    positions = torch.arange(q.shape[-2], device=q.device)
    mask = positions < (positions + 1).view(-1, 1)
    scores = _scores(q, k)
    return _attend(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), v)


@fuses("causal")
def causal_from_the_tutorial(q, k, v):
    s = q.size(-2)
    mask = (torch.triu(torch.ones(s, s, device=q.device)) == 1).transpose(0, 1)
    mask = mask.float().masked_fill(mask == 0, -INF).masked_fill(mask == 1, 0.0)
    return _attend(_scores(q, k) + mask.to(q.dtype), v)


@fuses("causal")
def causal_of_openai_gpt(q, k, v):
    """``w * b - 1e4 * (1 - b)``, as the first GPTs do."""
    b = torch.tril(torch.ones(q.shape[-2], k.shape[-2], device=q.device, dtype=q.dtype))
    return _attend(_scores(q, k) * b + -1e4 * (1 - b), v)


@fuses("causal", tokens)
class CausalBufferSlice(nn.Module):
    """The form of nanoGPT: a buffer larger than the sequence."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, width = sizes.heads, sizes.heads * sizes.features
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.c_attn(x).split(c, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = F.softmax(att.masked_fill(self.bias[:, :, :t, :t] == 0, -INF), dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(b, t, c))


@fuses("causal", qkv)
class CausalBoolBufferWhere(nn.Module):
    """The form of GPT-2 in Transformers."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(16, 16, dtype=torch.bool)).view(1, 1, 16, 16))

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores / torch.full([], v.size(-1) ** 0.5, dtype=scores.dtype, device=scores.device)
        rows, columns = q.size(-2), k.size(-2)
        mask = self.bias[:, :, columns - rows : columns, :columns]
        least = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
        return torch.matmul(F.softmax(torch.where(mask, scores.to(scores.dtype), least), dim=-1), v)


@fuses("causal", qkv)
class CausalNonPersistentInfBuffer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((16, 16), -INF).triu(1), persistent=False)

    def forward(self, q, k, v):
        s = q.shape[-2]
        return _attend(_scores(q, k) + self.mask[:s, :s], v)


@fuses("causal", cross)
def causal_rectangle_from_the_left(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], device=q.device).tril(0).bool()
    return _attend(_scores(q, k).masked_fill(~mask, -INF), v)


# masks that come in


@fuses("mask", plus(cross, lambda d: d.constant(d.B, 1, d.S, d.T)))
def mask_added(q, k, v, mask):
    return _attend(_scores(q, k) + mask, v)


@fuses("mask", plus(cross, lambda d: d.constant(d.B, 1, d.S, d.T)))
def mask_plus_scores(q, k, v, mask):
    return _attend(torch.add(mask, _scores(q, k)), v)


@fuses("mask", plus(cross, _bool_mask))
def mask_where_finite(q, k, v, mask):
    scores = _scores(q, k)
    return _attend(torch.where(mask, scores, torch.finfo(scores.dtype).min), v)


@fuses("mask", plus(cross, _bool_mask))
def mask_where_full_like(q, k, v, mask):
    scores = _scores(q, k)
    return _attend(torch.where(mask, scores, torch.full_like(scores, -INF)), v)


@fuses("mask", plus(cross, _bool_mask))
def mask_where_negated(q, k, v, mask):
    scores = _scores(q, k)
    return _attend(torch.where(mask.logical_not(), scores.new_tensor(-1e9), scores), v)


@fuses("mask", plus(cross, lambda d: _bool_mask(d).int()))
def mask_integer_equal_zero(q, k, v, mask):
    return _attend(_scores(q, k).masked_fill(mask == 0, -1e9), v)


@fuses("mask", plus(cross, _bool_mask))
def mask_method_where(q, k, v, mask):
    scores = _scores(q, k)
    return _attend(scores.where(mask, torch.tensor(-INF, dtype=scores.dtype, device=scores.device)), v)


@fuses("mask", plus(cross, lambda d: d.flags(d.B, d.S, d.T)))
def mask_of_three_dimensions(q, k, v, mask):
    return _attend(_scores(q, k).masked_fill(~mask.unsqueeze(1), -INF), v)


@fuses("mask", plus(cross, lambda d: d.flags(d.B, d.H, d.S, d.T)))
def mask_per_head(q, k, v, mask):
    return _attend(_scores(q, k).masked_fill(mask.bitwise_not(), -INF), v)


@fuses("mask", plus(cross, _bool_mask))
def mask_bool_made_additive(q, k, v, mask):
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -INF)
    return _attend(_scores(q, k) + bias, v)


@fuses("mask", plus(cross, lambda d: _bool_mask(d).to(torch.float32)))
def mask_float_in_a_wider_type(q, k, v, mask):
    return (F.softmax(_scores(q, k) + (1.0 - mask) * -10000.0, dim=-1)).to(v.dtype) @ v


@fuses("mask", plus(cross, _bool_mask, lambda d: d.flags(d.S, d.T)))
def mask_twice(q, k, v, first, second):
    scores = _scores(q, k).masked_fill(~first, torch.finfo(q.dtype).min)
    return _attend(scores.masked_fill(~second, torch.finfo(q.dtype).min), v)


@fuses("padding", plus(cross, lambda d: d.padding(d.B, d.T)))
def padding_masked_fill(q, k, v, padding):
    return _attend(_scores(q, k).masked_fill(~padding[:, None, None, :], -INF), v)


@fuses("padding", plus(cross, lambda d: d.padding(d.B, d.T).long()))
def padding_of_bert(q, k, v, attention_mask):
    extended = attention_mask[:, None, None, :].to(dtype=q.dtype)
    extended = (1.0 - extended) * torch.finfo(q.dtype).min
    return _attend(_scores(q, k) + extended, v)


@fuses("padding", plus(cross, lambda d: d.padding(d.B, d.T)))
def padding_of_distilbert(q, k, v, mask):
    scores = torch.matmul(q / math.sqrt(q.size(-1)), k.transpose(2, 3))
    mask = (mask == 0).view(mask.shape[0], 1, 1, -1).expand_as(scores)
    least = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    return torch.matmul(F.softmax(scores.masked_fill(mask, least), dim=-1), v)


@fuses("padding", plus(cross, lambda d: d.integers(2, d.T + 1, d.B)))
def padding_by_lengths(q, k, v, lengths):
    columns = torch.arange(k.shape[-2], device=q.device)
    keep = columns[None, None, None, :] < lengths[:, None, None, None]
    return _attend(torch.where(keep, _scores(q, k), -INF), v)


@fuses("padding", plus(qkv, lambda d: d.padding(d.B, d.S)))
def padding_left_and_causal(q, k, v, padding):
    """Left padding: the first rows of a padded sequence see no real token."""
    keep = padding.flip(-1)[:, None, None, :]
    rows, columns = _indices(q, k)
    mask = torch.where((columns <= rows) & keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return _attend(_scores(q, k) + mask, v)


@fuses("padding", plus(qkv, lambda d: d.padding(d.B, d.S)))
def padding_and_causal_added(q, k, v, padding):
    causal = torch.full((q.shape[-2], q.shape[-2]), -INF, device=q.device, dtype=q.dtype).triu(1)
    pad = torch.zeros_like(padding, dtype=q.dtype).masked_fill(~padding, -INF)
    return _attend(_scores(q, k) + causal + pad[:, None, None], v)


@fuses("padding", plus(qkv, lambda d: d.padding(d.B, d.S)))
def padding_of_rows_and_columns(q, k, v, padding):
    """Padded rows have no key at all and get the mean of the values."""
    keep = padding[:, None, :, None] & padding[:, None, None, :]
    return _attend(_scores(q, k).masked_fill(~keep, -1e4), v)


# structure


@fuses("structure", plus(qkv, lambda d: d.documents(d.B, d.S)))
def document_and_causal(q, k, v, documents):
    rows, columns = _indices(q, k)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return _attend(_scores(q, k).masked_fill(~(same & (rows >= columns)), -INF), v)


@fuses("structure", plus(qkv, lambda d: d.documents(1, d.S)[0]))
def document_of_one_sequence(q, k, v, documents):
    keep = documents[:, None].eq(documents[None, :])
    return _attend(torch.where(keep, _scores(q, k), -1e9), v)


@fuses("structure")
def window_and_causal(q, k, v):
    rows, columns = _indices(q, k)
    keep = torch.logical_and(rows - columns >= 0, rows - columns < 4)
    return _attend(_scores(q, k).masked_fill(~keep, -INF), v)


@fuses("structure")
def window_on_both_sides(q, k, v):
    rows, columns = _indices(q, k)
    return _attend(_scores(q, k).masked_fill((rows - columns).abs() > 3, -INF), v)


@fuses("structure")
def window_by_tril_and_triu(q, k, v):
    ones = torch.ones(q.shape[-2], k.shape[-2], device=q.device, dtype=torch.bool)
    return _attend(_scores(q, k).masked_fill(~(ones.tril() & ones.triu(-3)), -INF), v)


@fuses("structure")
def prefix_and_causal(q, k, v):
    rows, columns = _indices(q, k)
    return _attend(torch.where((columns <= rows) | (columns < 3), _scores(q, k), -INF), v)


@fuses("structure", plus(qkv, lambda d: d.integers(1, d.S, d.B)))
def prefix_of_each_sequence(q, k, v, prefix):
    rows, columns = _indices(q, k)
    keep = (columns <= rows) | (columns[None, None] < prefix[:, None, None, None])
    return _attend(_scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min), v)


@fuses("structure")
def blocks_and_stride(q, k, v):
    """The strided pattern of sparse transformers."""
    rows, columns = _indices(q, k)
    keep = (rows // 4 == columns // 4) | ((rows - columns) % 4 == 0)
    return _attend(_scores(q, k).masked_fill(~(keep & (columns <= rows)), -INF), v)


@fuses("structure", plus(qkv, lambda d: d.flags(d.B, d.S, share=0.3)))
def window_and_global_tokens(q, k, v, is_global):
    rows, columns = _indices(q, k)
    near = ((rows - columns).abs() <= 2)[None, None]
    keep = near | is_global[:, None, :, None] | is_global[:, None, None, :]
    return _attend(_scores(q, k).masked_fill(~keep, -INF), v)


@fuses("structure", plus(qkv, lambda d: d.padding(d.B, d.S)))
def mask_graph_of_transformers(q, k, v, padding):
    """Packed-sequence detection, causal comparison and padding, as Transformers builds its masks."""
    positions = torch.arange(q.shape[-2], device=q.device)[None]
    changes = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    packed = changes.cumsum(-1)
    keep = (positions[:, None, None, :] <= positions[:, None, :, None]) & (
        packed[:, None, :, None] == packed[:, None, None, :]
    )
    mask = torch.where(keep & padding[:, None, None, :], 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return torch.matmul(F.softmax(_scores(q, k) + mask, dim=-1, dtype=torch.float32).to(q.dtype), v)


@fuses("structure", plus(qkv, lambda d: d.normal(d.B, d.H, d.S, d.D)), sites=2)
def mask_once_for_two_layers(q, k, v, k2):
    mask = torch.full((q.shape[-2], q.shape[-2]), -INF, device=q.device, dtype=q.dtype).triu(1)
    hidden = _attend(_scores(q, k) + mask, v)
    return _attend(_scores(hidden, k2) + mask, hidden)


@fuses("structure", sites=3)
def mask_in_each_of_three_layers(q, k, v):
    for _ in range(3):
        mask = torch.tril(torch.ones(q.shape[-2], q.shape[-2], device=q.device)).bool()
        q = q + _attend(_scores(q, k).masked_fill(~mask, -INF), v)
    return q


@fuses("structure", sites=2)
def local_and_global_layers(q, k, v):
    rows, columns = _indices(q, k)
    causal = columns <= rows
    local = causal & (rows - columns < 3)
    hidden = _attend(_scores(q, k).masked_fill(~local, -INF), v)
    return _attend(_scores(hidden, k).masked_fill(~causal, -INF), v)


# rows without any key


@fuses("empty_rows", plus(cross, _some_rows_empty))
def empty_rows_give_nan(q, k, v, mask):
    return _attend(_scores(q, k).masked_fill(~mask, -INF), v)


@fuses("empty_rows", plus(cross, _some_rows_empty))
def empty_rows_give_nan_added(q, k, v, mask):
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -INF)
    return _attend(_scores(q, k) + bias, v)


@fuses("empty_rows", plus(cross, _some_rows_empty))
def empty_rows_give_the_mean(q, k, v, mask):
    return _attend(_scores(q, k).masked_fill(~mask, torch.finfo(q.dtype).min), v)


@fuses("empty_rows", plus(cross, _some_rows_empty))
def empty_rows_give_the_mean_added(q, k, v, mask):
    return _attend(_scores(q, k) + torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype), v)


@fuses("empty_rows", plus(cross, _some_rows_empty))
def empty_rows_give_raw_softmax(q, k, v, mask):
    """-30 does not swallow the scores: such a row is the softmax of its own scores."""
    return _attend(_scores(q, k) - 30.0 * (~mask).to(q.dtype), v)


@fuses("empty_rows", plus(cross, _some_rows_empty))
def empty_rows_nan_to_num(q, k, v, mask):
    weights = F.softmax(_scores(q, k).masked_fill(~mask, -INF), dim=-1)
    return torch.nan_to_num(weights, 0.0) @ v


@fuses("empty_rows", plus(cross, _some_rows_empty))
def empty_rows_masked_again(q, k, v, mask):
    weights = F.softmax(_scores(q, k).masked_fill(~mask, torch.finfo(q.dtype).min), dim=-1)
    return weights.masked_fill(~mask, 0.0) @ v


@fuses("empty_rows", plus(cross, _some_rows_empty))
def empty_rows_safe_again_after_inf(q, k, v, mask):
    weights = torch.softmax(torch.where(mask, _scores(q, k), -INF), dim=-1)
    return torch.where(mask, weights, torch.zeros_like(weights)) @ v
