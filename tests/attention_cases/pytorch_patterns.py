"""The forms that PyTorch's own pass for fused attention knows, and their near misses, as models bring them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import INFERENCE, Draw, Sizes, cross, folded, fuses, plus, qkv, refuses, rows_first, tokens

INF = float("inf")


def _same_rows(d: Draw) -> tuple:
    """``[B, S, H, D]`` three times."""
    return tuple(d.normal(d.B, d.S, d.H, d.D) for _ in range(3))


def _one_batch(d: Draw) -> tuple:
    return tuple(d.normal(1, n, d.H, d.D) for n in (d.S, d.T, d.T))


def _key_padding(d: Draw):
    return d.padding(d.B, d.S).long()


@fuses("pytorch", cross)
def divided_by_a_root_of_a_tensor(q, k, v):
    return torch.matmul(q, k.transpose(-2, -1)).div(math.sqrt(k.shape[-1])).softmax(dim=-1).matmul(v)


@fuses("pytorch", cross)
def multiplied_by_a_root_spelled_in_tensors(q, k, v):
    scale = 1.0 / torch.sqrt(torch.tensor(q.size(-1), dtype=q.dtype, device=q.device))
    return torch.matmul(q, k.transpose(-2, -1)).mul(scale).softmax(dim=-1).matmul(v)


@fuses("pytorch", cross)
def root_as_a_full_tensor(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores / torch.full([], v.size(-1) ** 0.5, dtype=scores.dtype, device=scores.device)
    return F.softmax(scores, dim=-1).type(v.dtype) @ v


@fuses("pytorch", _same_rows)
def permuted_root_and_float_softmax(q, k, v):
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).to(torch.float32)
    weights = torch.dropout(torch.softmax(scores, dim=-1), 0.0, False).to(v.dtype)
    return weights @ v


@fuses("pytorch", _same_rows)
def permuted_queries_divided_first(q, k, v):
    q, k, v = (x.permute([0, 2, 1, 3]) for x in (q, k, v))
    q = q / math.sqrt(q.size(-1))
    weights = torch.softmax((q @ k.transpose(-2, -1)).to(torch.float32), dim=-1)
    return weights.to(v.dtype) @ v


@fuses("pytorch", _one_batch)
def one_batch_permuted(q, k, v):
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return torch.matmul(q, k.transpose(-1, -2)).div(3.0).softmax(dim=-1).matmul(v)


@fuses("pytorch", plus(_one_batch, lambda d: d.constant(1, 1, d.S, d.T)))
def one_batch_with_an_additive_mask(q, k, v, mask):
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)).div(3.0) + mask
    return scores.softmax(dim=-1).matmul(v)


@fuses("pytorch", plus(_one_batch, lambda d: d.flags(1, d.T)))
def one_batch_key_mask_viewed(q, k, v, keep):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.matmul(q, k.transpose(-2, -1)) / 3.0
    mask = (keep == 0).view(1, 1, 1, k.size(2)).expand_as(scores)
    return torch.softmax(scores.masked_fill(mask, -INF), dim=-1) @ v


@fuses("pytorch", folded)
def three_dimensions_without_scale(q, k, v):
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(F.dropout(weights, p=0.0), v)


@fuses("pytorch", plus(_same_rows, lambda d: d.constant(d.B, 1, 1, d.S)))
def bert_large_of_the_benchmarks(q, k, v, mask):
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)).div(3.0) + mask
    return scores.softmax(dim=-1) @ v


@fuses("pytorch", plus(_same_rows, _key_padding))
def distilbert_filled_by_a_tensor(q, k, v, padding):
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / 3.0
    fill = torch.full((), -INF, dtype=q.dtype, device=q.device)
    mask = (padding == 0).view(padding.size(0), 1, 1, padding.size(1)).expand(scores.size())
    return torch.softmax(scores.masked_fill(mask, fill), dim=-1) @ v


@fuses("pytorch", _same_rows)
def gpt2_returns_its_cache(q, k, v):
    q, k, v = (x.permute([0, 2, 1, 3]) for x in (q, k, v))
    weights = torch.matmul(q, k.permute(0, 1, 3, 2))
    weights = weights / torch.full([], v.size(-1) ** 0.5, dtype=weights.dtype, device=weights.device)
    length = k.size(-2)
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None, None]
    weights = torch.where(causal, weights, torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype))
    return weights.softmax(dim=-1).to(v.dtype).matmul(v), k, v


@fuses("pytorch", plus(qkv, lambda d: d.flags(d.S, d.S), lambda d: d.constant(d.B, 1, 1, d.S)))
def causal_where_then_an_additive_mask(q, k, v, causal, mask):
    weights = torch.matmul(q, k.permute(0, 1, 3, 2))
    weights = weights / torch.full([], v.size(-1) ** 0.5, dtype=weights.dtype)
    lowest = torch.full([], torch.finfo(q.dtype).min, dtype=weights.dtype)
    weights = torch.where(causal | torch.eye(q.size(-2), dtype=torch.bool), weights, lowest) + mask
    return F.dropout(weights.softmax(dim=-1).to(v.dtype), p=0.0) @ v


@fuses("pytorch", plus(_same_rows, _key_padding))
def distilbert_scales_queries(q, k, v, padding):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.matmul(q.div(math.sqrt(q.size(-1))), k.transpose(-2, -1))
    mask = (padding == 0).view((padding.size(0), 1, 1, k.size(2))).expand_as(scores)
    weights = F.softmax(torch.masked_fill(scores, mask, torch.tensor(torch.finfo(scores.dtype).min)), dim=-1)
    return torch.matmul(weights, v).transpose(1, 2).contiguous().flatten(2)


@fuses("pytorch", plus(_same_rows, lambda d: d.constant(1, d.H, d.S, d.S)))
def t5_two_masks_of_which_one_is_zero(q, k, v, mask):
    q, k, v = (x.permute([0, 2, 1, 3]) for x in (q, k, v))
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    masked = scores + (mask + torch.zeros((1, 1, 1, 1), dtype=q.dtype))
    weights = masked.float().softmax(dim=-1).type_as(scores)
    return weights.matmul(v), k, v


@fuses("pytorch", _same_rows)
def t5_without_any_mask(q, k, v):
    q, k, v = (x.permute([0, 2, 1, 3]) for x in (q, k, v))
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    fp32 = scores.float()
    return fp32.softmax(dim=-1).type_as(scores).matmul(v), k


@fuses("pytorch", plus(qkv, lambda d: d.constant(d.B, 1, d.S, d.S)))
def opt_viewed_for_the_mask(q, k, v, mask):
    b, h, s, f = q.shape
    q, k, v = (x.reshape(b * h, s, f) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, h, s, s) + mask
    scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min))
    weights = F.softmax(scores.view(b * h, s, s), dim=-1)
    return torch.bmm(weights, v).view(b, h, s, f).transpose(1, 2).reshape(b, s, h * f)


@fuses("pytorch", plus(qkv, lambda d: d.constant(d.H, d.S, d.S)))
def albert_mask_of_three_dimensions(q, k, v, mask):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + mask).softmax(-1) @ v


@fuses("pytorch", plus(cross, lambda d: d.normal(1, d.S, d.T)))
def mask_that_wants_a_gradient(q, k, v, mask):
    weights = torch.softmax((q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))) + mask, dim=-1)
    return weights @ v


@fuses("pytorch", plus(cross, lambda d: d.normal(d.B, 1, 1, 1), lambda d: d.constant(1)))
def factor_that_is_a_tensor(q, k, v, factor, offset):
    return (torch.matmul(q, k.transpose(-2, -1)).div(factor.exp()) + offset).softmax(dim=-1).matmul(v)


@fuses("pytorch", plus(cross, lambda d: d.constant(1, 1, 1)))
def mask_of_one_element(q, k, v, mask):
    return (torch.matmul(q, k.transpose(-2, -1)) / 2.0 + mask).softmax(dim=-1).matmul(v)


@refuses(cross)
def weights_reused_by_a_second_result(q, k, v):
    weights = torch.matmul(q, k.transpose(-2, -1)).mul(0.4).softmax(dim=-1)
    return weights.matmul(v), weights.sum(-2)


@fuses("pytorch", plus(cross, lambda d: d.constant(1)))
def scores_of_an_inserted_axis(q, k, v, bias):
    scores = torch.matmul(q.unsqueeze(1), k.unsqueeze(1).transpose(-2, -1)) / 3.0 + bias
    return scores.softmax(-1).matmul(v.unsqueeze(1)).squeeze(1)


@fuses("pytorch", _same_rows)
def strides_that_do_not_matter(q, k, v):
    q, k, v = (x.transpose(1, 2).as_strided(x.transpose(1, 2).shape, x.transpose(1, 2).stride()) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


@fuses("pytorch", tokens)
class FrozenProjections(nn.Module):
    """One projection for all, split by ``chunk``; the constants of the graph are the weights."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.qkv, self.heads, self.features = nn.Linear(width, 3 * width), sizes.heads, sizes.features
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, s, w = x.shape
        q, k, v = (
            t.view(b, s, self.heads, self.features).permute(0, 2, 1, 3) for t in torch.chunk(self.qkv(x), 3, dim=-1)
        )
        scores = torch.matmul(q, k.permute(0, 1, 3, 2)).div(math.sqrt(self.features))
        return self.out(scores.softmax(dim=-1).matmul(v).permute(0, 2, 1, 3).reshape(b, s, w))


class _WithDropout(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.drop, self.features = nn.Dropout(0.2), sizes.features


@fuses("pytorch", cross, dropout=0.2)
class DropoutAfterDivision(_WithDropout):
    def forward(self, q, k, v):
        return self.drop(torch.matmul(q, k.transpose(-2, -1)).div(3.0).softmax(dim=-1)).matmul(v)


@fuses("pytorch", cross, dropout=0.2)
class DropoutThenCast(_WithDropout):
    """Dropout in float32, before the weights are rounded."""

    def forward(self, q, k, v):
        scores = (q @ k.transpose(-2, -1) / math.sqrt(self.features)).to(torch.float32)
        weights = self.drop(torch.softmax(scores, dim=-1)).to(v.dtype)
        return weights @ v


@fuses("pytorch", plus(cross, lambda d: d.flags(d.B, d.T)), dropout=0.2)
class DropoutAfterKeyMask(_WithDropout):
    def forward(self, q, k, v, keep):
        scores = torch.matmul(q, k.transpose(-2, -1)) / 3.0
        mask = (keep == 0).view(keep.size(0), 1, 1, -1).expand_as(scores)
        return self.drop(torch.softmax(scores.masked_fill(mask, -INF), dim=-1)) @ v


@fuses("pytorch", cross, dropout=0.2)
class DropoutByTorch(_WithDropout):
    """The function of another name, and a division afterwards."""

    def forward(self, q, k, v):
        p = torch.exp(q @ k.mT / 3.0)
        return torch.dropout(p / p.sum(-1, keepdim=True), 0.2, self.training) @ v


@refuses(qkv)
def keys_axis_is_not_the_last(q, k, v):
    return torch.matmul(torch.matmul(q, k.transpose(-2, -1)).softmax(dim=-2), v)


@fuses("pytorch", rows_first)
def keys_permuted_in_one_go(q, k, v):
    weights = torch.matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1)).mul(0.5).softmax(dim=-1)
    return weights.matmul(v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)


@fuses("pytorch", plus(cross, lambda d: d.constant(1)), modes=(INFERENCE,))
def scale_read_from_a_tensor_of_one(q, k, v, scale):
    return (q @ k.transpose(-2, -1) * scale.abs().add(0.1)).softmax(-1) @ v


@fuses("pytorch", plus(qkv, lambda d: d.normal(d.H, 2 * d.S - 1)))
def table_gathered_by_distance(q, k, v, table):
    n = q.size(-2)
    rows = torch.arange(n, device=q.device)
    index = rows[:, None] - rows[None, :] + n - 1
    bias = table[:, index.reshape(-1)].reshape(-1, n, n).unsqueeze(0)
    return (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + bias).softmax(-1) @ v
