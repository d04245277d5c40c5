"""Attention as language and speech models write it: buffers, biases, caches, relative positions, sinks."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import INFERENCE, Draw, Sizes, cross, either, folded, fuses, grouped, plus, qkv, refuses

INF = float("inf")


def _one_query(d: Draw) -> tuple:
    return d.normal(d.B, d.H, 1, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.D)


@fuses("language", qkv)
class Gpt2Attention(nn.Module):
    """The buffer's slice chooses between scores and a tensor of the lowest number."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(32, 32, dtype=torch.bool)).view(1, 1, 32, 32))
        self.layer = 3

    def forward(self, q, k, v):
        weights = torch.matmul(q, k.transpose(-1, -2))
        weights = weights / torch.full([], v.size(-1) ** 0.5, dtype=weights.dtype, device=weights.device)
        weights = weights / float(self.layer + 1)
        n, m = q.size(-2), k.size(-2)
        causal = self.bias[:, :, m - n : m, :m]
        lowest = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype, device=weights.device)
        weights = torch.where(causal, weights.to(weights.dtype), lowest)
        return torch.matmul(F.softmax(weights, dim=-1).type(v.dtype), v)


@fuses("language", qkv)
class GptNeoLocalAttention(nn.Module):
    """A band made of two triangles of bytes, exclusive or."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        causal = torch.tril(torch.ones(32, 32, dtype=torch.bool)).view(1, 1, 32, 32)
        self.register_buffer("bias", torch.bitwise_xor(causal, torch.tril(causal, -4)))

    def forward(self, q, k, v):
        weights = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2))
        n, m = q.size(-2), k.size(-2)
        causal = self.bias[:, :, m - n : m, :m]
        lowest = torch.tensor(torch.finfo(weights.dtype).min, dtype=weights.dtype, device=weights.device)
        weights = torch.where(causal, weights, lowest)
        return torch.matmul(F.softmax(weights, dim=-1).to(v.dtype), v)


@fuses("language", plus(qkv, lambda d: d.padding(d.B, d.S)))
def gpt_neox_baddbmm(q, k, v, padding):
    """Heads folded, a tensor of zeros for ``baddbmm`` to add to, causal and padding one after the other."""
    b, h, n, d = q.shape
    zeros = torch.zeros(b * h, n, n, dtype=q.dtype, device=q.device)
    flat = torch.baddbmm(
        zeros, q.reshape(-1, n, d), k.reshape(-1, n, d).transpose(1, 2), beta=1.0, alpha=1.0 / math.sqrt(d)
    )
    scores = flat.view(b, h, n, n)
    causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    scores = torch.where(causal, scores, torch.finfo(scores.dtype).min)
    scores = scores + (1.0 - padding[:, None, None, :].to(scores.dtype)) * -10000.0
    return torch.matmul(F.softmax(scores, dim=-1), v)


@fuses("language", plus(qkv, lambda d: d.padding(d.B, d.S)))
def bloom_alibi(q, k, v, padding):
    """Positions counted over real tokens only."""
    b, h, n, d = q.shape
    slopes = torch.pow(2.0 ** -(8.0 / h), torch.arange(1, 1 + h, device=q.device, dtype=torch.int32))
    places = ((padding.long().cumsum(dim=-1) - 1) * padding)[:, None, :]
    alibi = (slopes[:, None] * places).reshape(b * h, 1, n).to(q.dtype)
    scores = alibi.baddbmm(q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(-1, -2), beta=1.0, alpha=0.35)
    scores = scores.view(b, h, n, -1).to(torch.float)
    hidden = ~torch.ones(n, n, dtype=torch.bool, device=q.device).tril() | ~padding[:, None, None, :]
    weights = F.softmax(scores.masked_fill(hidden, torch.finfo(q.dtype).min), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(b * h, n, -1), v.reshape(b * h, n, d)).view(b, h, n, d)


@fuses("language", plus(qkv, lambda d: d.normal(d.H, 1, d.S)))
def mpt_alibi_per_key(q, k, v, slopes):
    scores = q.matmul(k.transpose(-1, -2)) * 0.35
    scores = scores + slopes[:, :, -scores.size(-1) :]
    n = q.shape[-2]
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(scores.masked_fill(future, torch.finfo(q.dtype).min).float(), -1).to(q.dtype) @ v


@fuses("language", plus(cross, lambda d: d.normal(32, d.H)))
def t5_buckets(q, k, v, table):
    n, m = q.shape[-2], k.shape[-2]
    relative = torch.arange(m, device=q.device)[None, :] - torch.arange(n, device=q.device)[:, None]
    bucket = (relative > 0).to(torch.long) * 16
    relative = torch.abs(relative)
    large = 8 + (torch.log(relative.float() / 8) / math.log(128 / 8) * 8).to(torch.long)
    large = torch.min(large, torch.full_like(large, 15))
    bucket = bucket + torch.where(relative < 8, relative, large)
    bias = F.embedding(bucket, table).permute([2, 0, 1]).unsqueeze(0)
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def _deberta(d: Draw) -> tuple:
    n = d.B * d.H
    return *(d.normal(n, d.S, d.D) for _ in range(3)), d.normal(d.H, 2 * d.S, d.D), d.normal(d.H, 2 * d.S, d.D)


@fuses("language", _deberta)
def deberta_disentangled(q, k, v, pos_k, pos_q):
    """Content to position and position to content, both gathered."""
    n = q.shape[-2]
    scale = 1 / math.sqrt(q.shape[-1] * 3)
    scores = torch.bmm(q, k.transpose(-1, -2) * scale)
    places = torch.arange(n, device=q.device)
    index = torch.clamp(places[:, None] - places[None, :] + n, 0, 2 * n - 1)[None].expand(q.shape[0], -1, -1)
    repeat = q.shape[0] // pos_k.shape[0]
    c2p = torch.bmm(q, pos_k.repeat(repeat, 1, 1).transpose(-1, -2))
    scores = scores + torch.gather(c2p, dim=-1, index=index) * scale
    p2c = torch.bmm(k, pos_q.repeat(repeat, 1, 1).transpose(-1, -2))
    scores = scores + torch.gather(p2c, dim=-1, index=index).transpose(-1, -2) * scale
    return torch.bmm(F.softmax(scores, dim=-1), v)


@fuses("language", plus(qkv, lambda d: d.normal(d.H, 2 * d.S - 1, d.D), lambda d: d.normal(d.H, 1, d.D)))
def transformer_xl_relative_shift(q, k, v, r, u):
    """Scores of positions shifted by padding and reshaping."""
    b, h, n, _ = q.shape
    bd = q @ r.mT
    bd = torch.cat([bd.new_zeros(b, h, n, 1), bd], dim=-1).view(b, h, -1, n)[:, :, 1:].view(b, h, n, 2 * n - 1)
    scores = ((q + u) @ k.mT + bd[..., :n]) * 0.35
    return scores.softmax(-1) @ v


@fuses("language", lambda d: (*(d.normal(d.S, d.B, d.H, d.D) for _ in range(3)), d.normal(2 * d.S, d.B, d.H, d.D)))
def xlnet_relative_attention(q, k, v, r):
    ac = torch.einsum("ibnd,jbnd->bnij", q, k)
    bd = torch.einsum("ibnd,jbnd->bnij", q, r)
    b, n, i, j = bd.shape
    bd = bd.reshape(b, n, j, i)[:, :, 1:, :].reshape(b, n, i, j - 1)
    bd = torch.index_select(bd, 3, torch.arange(i, device=bd.device, dtype=torch.long))
    score = (ac + bd) * 0.35
    return torch.einsum("bnij,jbnd->ibnd", F.softmax(score, dim=3), v)


@fuses("language", plus(qkv, lambda d: d.flags(d.B, d.S, share=0.2)))
def longformer_band_and_global(q, k, v, is_global):
    i = torch.arange(q.shape[-2], device=q.device)
    near = (i[:, None] - i[None, :]).abs().le(2)[None]
    keep = near | is_global[:, :, None] | is_global[:, None, :]
    scores = q @ k.mT * 0.35
    scores = (
        scores.masked_fill(keep.logical_not().unsqueeze(1), -1e9)
        if q.dtype != torch.float16
        else (scores.masked_fill(keep.logical_not().unsqueeze(1), -INF))
    )
    return scores.softmax(-1) @ v


@fuses("language", lambda d: (d.normal(d.B, d.H, 3, d.D), d.normal(d.B, d.G, d.T, d.D), d.normal(d.B, d.G, d.T, d.D)))
def mistral_window_after_a_cache(q, k, v):
    """The queries are the last ones; two triangles of one width make the window."""
    b, g, m, d = k.shape
    n = q.shape[2]
    ones = torch.full((n, m), fill_value=1, device=q.device, dtype=q.dtype)
    mask = torch.tril(ones, diagonal=m - n)
    mask = torch.triu(mask, diagonal=m - n - 4)
    mask = torch.log(mask)
    k, v = (x[:, :, None].expand(b, g, 3, m, d).reshape(b, 3 * g, m, d) for x in (k, v))
    return (q @ k.mT * 0.35 + mask).softmax(-1) @ v


@fuses("language", plus(grouped, lambda d: d.padding(d.B, d.T)))
def gemma2_softcap_and_window(q, k, v, padding):
    n, m = q.shape[2], k.shape[2]
    k, v = (torch.repeat_interleave(x, 3, dim=1) for x in (k, v))
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * 0.35 / 50.0) * 50.0
    lowest = torch.finfo(q.dtype).min
    keep = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n) & padding[:, None, None, :]
    mask = torch.where(keep, 0.0, lowest).to(q.dtype)
    near = torch.tril(torch.ones_like(mask, dtype=torch.bool), diagonal=-5 + m - n)
    mask = torch.where(near, lowest, mask)
    return F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@fuses("language", plus(grouped, lambda d: d.normal(d.H)))
def gpt_oss_sinks_in_five_dimensions(q, k, v, sinks):
    """OpenAI's own code: einsum over groups, a concatenated column that is cut off again."""
    b, _, n, _ = q.shape
    q = q.permute(0, 2, 1, 3).unflatten(2, (k.shape[1], -1))
    k = k.permute(0, 2, 1, 3)[:, :, :, None, :].expand(-1, -1, -1, 3, -1)
    v = v.permute(0, 2, 1, 3)[:, :, :, None, :].expand(-1, -1, -1, 3, -1)
    sinks = sinks.reshape(1, -1, 3, 1, 1).expand(b, -1, -1, n, -1)
    mask = torch.triu(q.new_full((n, k.shape[1]), -INF), diagonal=1)
    scores = torch.einsum("bqhmd,bkhmd->bhmqk", q, k) * 0.35 + mask[None, None, None]
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return torch.einsum("bhmqk,bkhmd->bqhmd", weights, v).reshape(b, n, -1)


@fuses("language", lambda d: (d.normal(d.B, 3, d.H, d.D), *(d.normal(d.B, n, w) for n, w in ((7, 5), (7, 4))),
                              d.normal(d.H, d.D - 4 + 6, 5)))  # fmt: skip
def deepseek_absorbed_in_pytorch(q, latent, k_rope, weight):
    """Multi-head latent attention: keys and values are the latent itself, weights go to the queries and the result."""
    nope, rope = q.split([4, 4], dim=-1)
    absorbed = torch.einsum("bshd,hdc->bshc", nope, weight[:, :4])
    scores = torch.einsum("bshc,btc->bsht", absorbed, latent) + torch.einsum("bshr,btr->bsht", rope, k_rope)
    scores = (scores * 0.35).softmax(dim=-1, dtype=torch.float32).type_as(q)
    out = torch.einsum("bsht,btc->bshc", scores, latent)
    return torch.einsum("bshc,hdc->bshd", out, weight[:, -6:])


@fuses("language", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.S, d.D), d.normal(d.B, d.S, d.D)))
def starcoder_one_key_head(q, k, v):
    """Queries of all heads in rows, one head of keys: bmm after a view."""
    b, h, n, d = q.shape
    rows = q.transpose(1, 2).reshape(b, n * h, d)
    weights = torch.baddbmm(torch.empty_like(rows[..., :1]).expand(b, n * h, n), rows, k.mT, beta=0, alpha=0.35)
    weights = weights.view(b, n, h, n)
    causal = torch.tril(torch.ones(n, n, dtype=torch.bool, device=q.device)).view(1, n, 1, n)
    weights = torch.where(causal, weights, torch.finfo(q.dtype).min).softmax(-1)
    return torch.bmm(weights.view(b, n * h, n), v).view(b, n, h, d)


@fuses("language", lambda d: (d.normal(d.B, d.S, (d.H + 2) * d.D),))
def falcon_fused_projection(x):
    b, n, _ = x.shape
    heads = x.view(b, n, 8, 8)
    q, k, v = (
        heads[..., :-2, :].transpose(1, 2),
        heads[..., [-2], :].transpose(1, 2),
        heads[..., [-1], :].transpose(1, 2),
    )
    keep = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    return F.scaled_dot_product_attention(q, k, v, keep[None, None], 0.0, is_causal=False).transpose(1, 2).flatten(2)


@fuses("language", plus(folded, lambda d: d.constant(d.B, 1, d.S, d.T)))
def opt_maximum_of_the_lowest(q, k, v, mask):
    """Masked, then raised to the lowest number so that no row is lost."""
    weights = torch.bmm(q * 0.35, k.transpose(1, 2))
    weights = weights.view(-1, 6, *weights.shape[1:]) + mask * 100
    weights = torch.max(weights, torch.tensor(torch.finfo(weights.dtype).min, device=weights.device))
    weights = weights.view(-1, *weights.shape[2:])
    return torch.bmm(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


@fuses("language", qkv)
def whisper_decoder_mask(q, k, v):
    n = q.shape[-2]
    scale = (q.shape[-1]) ** -0.25
    mask = torch.empty(n, n, device=q.device).fill_(-INF).triu_(1)
    qk = (q * scale) @ (k * scale).transpose(-1, -2) + mask[:n, :n]
    qk = qk.float()
    return (F.softmax(qk, dim=-1).to(q.dtype) @ v).permute(0, 2, 1, 3).flatten(start_dim=2)


@fuses("language", plus(_one_query, lambda d: d.integers(1, d.T + 1, d.B)))
def decode_by_lengths(q, k, v, lengths):
    hidden = torch.arange(k.shape[-2], device=q.device)[None, :] >= lengths[:, None]
    return (q @ k.mT * 0.35).masked_fill(hidden[:, None, None, :], -INF).softmax(-1) @ v


@fuses("language", plus(cross, lambda d: d.integers(0, 3, d.B)))
def left_padding_and_offset_causal(q, k, v, skipped):
    """Keys before a sequence's start take no part, nor those behind a query; some rows keep none."""
    i, j = torch.arange(q.shape[-2], device=q.device)[:, None], torch.arange(k.shape[-2], device=q.device)
    keep = (j >= skipped[:, None, None]) & (j <= i + (k.shape[-2] - q.shape[-2]) + 4)
    return (q @ k.mT * 0.35).masked_fill(~keep[:, None], torch.finfo(q.dtype).min).softmax(-1) @ v


@fuses("language", plus(qkv, lambda d: d.integers(0, 3, d.B, d.S)))
def documents_in_any_order(q, k, v, ids):
    same = ids.unsqueeze(-1).eq(ids.unsqueeze(-2)) & ids.ne(0).unsqueeze(-1)
    return (q @ k.mT * 0.35).masked_fill(same.logical_not()[:, None], torch.finfo(q.dtype).min).softmax(-1) @ v


@fuses("language", plus(qkv, lambda d: d.integers(1, 4, d.B, 1, 1, 1)))
def prefix_lm(q, k, v, prefix):
    i = torch.arange(q.shape[-2], device=q.device)
    keep = (i[:, None] >= i[None, :]) | (i[None, :] < prefix)
    return torch.where(keep, q @ k.mT * 0.35, -INF).softmax(-1) @ v


@fuses("language", qkv)
def dilated_and_chunked(q, k, v):
    """Chunks of four that see the chunk before, and every third key."""
    i = torch.arange(q.shape[-2], device=q.device)
    gap = i[:, None] // 4 - i[None, :] // 4
    keep = ((gap >= 0) & (gap <= 1)) | ((i[:, None] - i[None, :]) % 3 == 0)
    return (q @ k.mT * 0.35).masked_fill(~keep, -INF).softmax(-1) @ v


@fuses("language", qkv)
def llama4_chunks(q, k, v):
    i = torch.arange(q.shape[-2], device=q.device)
    same = torch.div(i[:, None], 4, rounding_mode="floor") == torch.div(i[None, :], 4, rounding_mode="floor")
    keep = same & (i[None, :] <= i[:, None])
    scores = (q * (torch.log(torch.floor((i[:, None] + 1.0) / 4) + 1.0) * 0.1 + 1.0).to(q.dtype)) @ k.mT
    return scores.masked_fill(~keep, -INF).softmax(-1) @ v


@fuses("language", plus(qkv, lambda d: d.integers(0, 10, d.S)))
def tree_of_guesses(q, k, v, parent):
    """Speculative decoding: a guess sees itself, the prompt and its parent."""
    i = torch.arange(q.shape[-2], device=q.device)
    keep = (i[None, :] == i[:, None]) | (i[None, :] < 3) | (parent[:, None] == i[None, :])
    return (q @ k.mT * 0.35 + torch.where(keep, 0.0, -INF).to(q.dtype)).softmax(-1) @ v


@fuses("language", plus(qkv, lambda d: d.normal(d.B, d.H, d.S, 1)))
def forgetting_transformer(q, k, v, gate):
    """A decay between two positions, by sums of logarithms of forget gates."""
    decay = F.logsigmoid(gate.squeeze(-1)).cumsum(-1)
    scores = q @ k.mT * 0.35 + decay[..., :, None] - decay[..., None, :]
    n = q.shape[-2]
    return scores.masked_fill(torch.ones(n, n, device=q.device).triu(1).bool(), -INF).softmax(-1) @ v


@fuses("language", plus(qkv, lambda d: d.normal(d.H, 1, 1), lambda d: d.normal(d.H, 1, 1)))
def kerple_logarithmic_bias(q, k, v, a, b):
    i = torch.arange(q.shape[-2], device=q.device)
    distance = (i[:, None] - i[None, :]).abs().to(q.dtype)
    bias = -a.abs().clamp(min=0.01) * torch.log(1 + b.abs().clamp(min=0.01) * distance)
    return (q @ k.mT * 0.35 + bias).softmax(-1) @ v


@fuses("language", plus(qkv, lambda d: d.normal(d.H, 1, 1)))
def sandwich_of_cosines(q, k, v, scale):
    i = torch.arange(q.shape[-2], device=q.device, dtype=torch.float32)
    bias = torch.cos((i[:, None] - i[None, :]) * 0.5) + torch.cos((i[:, None] - i[None, :]) * 0.05)
    return (q @ k.mT * 0.35 + (bias * scale).to(q.dtype)).softmax(-1) @ v


@either("language", plus(cross, lambda d: d.constant(d.B, d.H, 16, d.D), lambda d: d.constant(d.B, d.H, 16, d.D)),
        mutates=True, modes=(INFERENCE,))  # fmt: skip
def cache_filled_by_slices(q, k, v, cache_k, cache_v):
    n = k.shape[-2]
    cache_k[:, :, 3 : 3 + n] = k
    cache_v[:, :, 3 : 3 + n] = v
    return (q @ cache_k[:, :, : 3 + n].mT * 0.35).softmax(-1) @ cache_v[:, :, : 3 + n]


@either("language", plus(cross, lambda d: d.constant(d.B, d.H, d.T, d.D)), mutates=True, modes=(INFERENCE,))
def cache_written_between_the_products(q, k, v, cache):
    scores = (q @ cache.mT * 0.35).softmax(-1)
    cache.index_copy_(2, torch.arange(2, device=q.device), k[:, :, :2])
    return scores @ cache


@either("language", plus(cross, lambda d: d.constant(d.S, d.T)), mutates=True, modes=(INFERENCE,))
def mask_reused_as_scratch(q, k, v, scratch):
    scratch.copy_(torch.ones_like(scratch).tril())
    scores = q @ k.mT * 0.35 + scratch.log()
    scratch.zero_()
    return scores.softmax(-1) @ v + scratch.sum()


@refuses(qkv)
def retention_without_softmax(q, k, v):
    i = torch.arange(q.shape[-2], device=q.device)
    decay = torch.where(i[:, None] >= i[None, :], 0.9 ** (i[:, None] - i[None, :]).clamp(min=0), 0.0).to(q.dtype)
    return (q @ k.mT * decay) @ v


@either("language", plus(qkv, lambda d: d.normal(d.H, d.H)))
def talking_heads_on_both_sides(q, k, v, mix):
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT * 0.35, mix)
    return torch.einsum("bhij,hg->bgij", scores.softmax(-1), mix) @ v


@fuses("language", plus(qkv, lambda d: d.normal(1, d.H, 1, d.D), lambda d: d.normal(1, d.H, 1, d.D)))
def learned_key_and_value_appended(q, k, v, extra_k, extra_v):
    """``bias_k`` and ``bias_v`` by hand, and a key of zeros."""
    b = q.shape[0]
    k = torch.cat([k, extra_k.expand(b, -1, -1, -1), k.new_zeros(b, k.shape[1], 1, k.shape[-1])], dim=-2)
    v = torch.cat([v, extra_v.expand(b, -1, -1, -1), v.new_zeros(b, v.shape[1], 1, v.shape[-1])], dim=-2)
    n = q.shape[-2]
    mask = F.pad(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), (0, 2), value=False)
    return (q @ k.mT * 0.35).masked_fill(mask, -INF).softmax(-1) @ v
