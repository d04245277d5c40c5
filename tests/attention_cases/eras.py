"""Language and speech models of many years, in the way that their authors wrote the attention."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import Draw, Sizes, cross, either, fuses, grouped, plus, qkv, refuses, rows_first, tokens

INF = float("inf")


def _merge(x):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotary(x, base=100.0):
    positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    inverse = 1.0 / base ** (torch.arange(0, x.shape[-1], 2, device=x.device).float() / x.shape[-1])
    angles = torch.outer(positions, inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return x * angles.cos().to(x.dtype) + _rotate_half(x) * angles.sin().to(x.dtype)


# ------------------------------------------------------------------------------------------------ encoders
@fuses("eras", plus(qkv, lambda d: d.padding(d.B, d.S)))
def attention_is_all_you_need(q, k, v, padding):
    """The annotated transformer of 2018."""
    mask = padding.unsqueeze(1).unsqueeze(1)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(mask == 0, -1e9 if q.dtype == torch.float32 else -1e4)
    p_attn = scores.softmax(dim=-1)
    return torch.matmul(p_attn, v).transpose(1, 2).contiguous().view(q.size(0), -1, q.size(1) * q.size(-1))


@fuses("eras", plus(rows_first, lambda d: d.padding(d.B, d.T)))
def fairseq_before_flash(q, k, v, keep):
    """Heads in the batch, a uint8-like padding mask viewed back and forth, the softmax in float32."""
    b, s, h, f = q.shape
    t = k.shape[1]
    q = (q * f**-0.5).transpose(0, 1).contiguous().view(s, b * h, f).transpose(0, 1)
    k = k.transpose(0, 1).contiguous().view(t, b * h, f).transpose(0, 1)
    v = v.transpose(0, 1).contiguous().view(t, b * h, f).transpose(0, 1)
    weights = torch.bmm(q, k.transpose(1, 2))
    weights = weights.view(b, h, s, t).masked_fill(~keep.unsqueeze(1).unsqueeze(2).to(torch.bool), -INF)
    weights = F.softmax(weights.view(b * h, s, t), dim=-1, dtype=torch.float32).type_as(weights)
    out = torch.bmm(weights, v)
    return out.transpose(0, 1).contiguous().view(s, b, h * f)


@fuses("eras", tokens)
class RobertaWithRelativeKeyQuery(nn.Module):
    """``position_embedding_type='relative_key_query'``: two more contractions with one table."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.features = sizes.heads, sizes.features
        width = sizes.heads * sizes.features
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.distance = nn.Embedding(2 * 16 - 1, sizes.features)

    def split(self, x):
        return x.view(*x.size()[:-1], self.heads, self.features).permute(0, 2, 1, 3)

    def forward(self, x):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2))
        n = x.shape[1]
        left = torch.arange(n, dtype=torch.long, device=x.device).view(-1, 1)
        table = self.distance(left - left.view(1, -1) + 15).to(q.dtype)
        scores = scores + torch.einsum("bhld,lrd->bhlr", q, table) + torch.einsum("bhrd,lrd->bhlr", k, table)
        weights = nn.functional.softmax(scores / math.sqrt(self.features), dim=-1)
        context = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        return context.view((*context.size()[:-2], -1))


@fuses("eras", plus(cross, lambda d: d.constant(d.B, 1, 1, d.T)))
def electra_head_mask_of_none(q, k, v, mask):
    head_mask = None
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)) + mask
    weights = nn.Softmax(dim=-1)(scores)
    if head_mask is not None:
        weights = weights * head_mask
    return _merge(torch.matmul(weights, v))


@fuses("eras", plus(cross, lambda d: d.constant(d.H)))
def bert_head_mask(q, k, v, head_mask):
    """Whole heads weighed after the softmax."""
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))).softmax(-1)
    weights = weights * head_mask.view(1, -1, 1, 1)
    return _merge(weights @ v)


@either("eras", plus(cross, lambda d: d.normal(d.H, d.S, d.T), lambda d: d.flags(d.B, 1, 1, d.T)))
def xlm_mask_then_bias(q, k, v, bias, keep):
    scores = torch.matmul(q / math.sqrt(q.size(-1)), k.transpose(2, 3))
    scores.masked_fill_(~keep, torch.finfo(scores.dtype).min)
    return (F.softmax((scores + bias).float(), dim=-1).type_as(scores)) @ v


def _deberta(d: Draw) -> tuple:
    span = 2 * d.S
    return (
        *(d.normal(d.B * d.H, d.S, d.D) for _ in range(3)),
        d.normal(d.H, span, d.D),
        d.normal(d.H, span, d.D),
        d.flags(d.B, 1, d.S, d.S),
    )


@fuses("eras", _deberta)
def deberta_v3_with_xsoftmax(q, k, v, pos_k, pos_q, keep):
    """Disentangled attention; the masked softmax zeroes what it masked."""
    n, h = q.shape[1], pos_k.shape[0]
    b = q.shape[0] // h
    scale = 1 / math.sqrt(q.size(-1) * 3)
    scores = torch.bmm(q, k.transpose(-1, -2) * scale)
    ids = torch.arange(n, device=q.device)
    relative = (ids[:, None] - ids[None, :] + n).clamp(0, 2 * n - 1)
    pos_k, pos_q = pos_k.repeat(b, 1, 1), pos_q.repeat(b, 1, 1)
    c2p = torch.bmm(q, pos_k.transpose(-1, -2))
    scores = scores + torch.gather(c2p, -1, relative.expand(b * h, n, n)) * scale
    p2c = torch.bmm(k, pos_q.transpose(-1, -2))
    p2c = torch.gather(p2c, -1, (n - relative + n - n).clamp(0, 2 * n - 1).expand(b * h, n, n)).transpose(-1, -2)
    scores = (scores + p2c * scale).view(b, h, n, n)
    weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~keep, 0.0)
    return torch.bmm(weights.view(-1, n, n), v)


# ------------------------------------------------------------------------------------------------ decoders
@fuses("eras", qkv)
def gpt2_scaled_by_layer_index(q, k, v):
    """``scale_attn_by_inverse_layer_idx`` and ``where`` with a buffer's slice."""
    weights = torch.matmul(q, k.transpose(-1, -2))
    weights = weights / torch.full([], v.size(-1) ** 0.5, dtype=weights.dtype, device=weights.device)
    weights = weights / float(3 + 1)
    bias = torch.tril(torch.ones((16, 16), dtype=torch.bool)).view(1, 1, 16, 16)
    causal = bias[:, :, k.size(-2) - q.size(-2) : k.size(-2), : k.size(-2)]
    lowest = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
    weights = nn.functional.softmax(torch.where(causal, weights.to(weights.dtype), lowest), dim=-1)
    return torch.matmul(weights.type(v.dtype), v)


@fuses("eras", qkv)
def gpt2_reordered_and_upcast(q, k, v):
    """``reorder_and_upcast_attn``: baddbmm with beta 0 into an empty tensor, in float32."""
    b, h, s, f = q.shape
    scores = torch.empty(b * h, s, s, dtype=torch.float32, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        left, right = q.reshape(-1, s, f), k.transpose(-1, -2).reshape(-1, f, s)
        scores = torch.baddbmm(scores, left.float(), right.float(), beta=0, alpha=1 / (f**0.5 * 2))
        scores = scores.reshape(b, h, s, s)
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    return nn.functional.softmax(scores, dim=-1).type(v.dtype) @ v


@fuses("eras", rows_first)
def gptj_rotates_every_second(q, k, v):
    def rotate(x):
        angles = torch.arange(x.shape[1])[:, None] / 10.0 ** (torch.arange(x.shape[-1] // 2) / 2)
        sin, cos = (
            torch.repeat_interleave(t[None, :, None, :], 2, 3).to(x.dtype) for t in (angles.sin(), angles.cos())
        )
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin

    q, k = rotate(q).permute(0, 2, 1, 3).to(torch.float32), rotate(k).permute(0, 2, 1, 3).to(torch.float32)
    weights = torch.matmul(q, k.transpose(-1, -2)) / torch.sqrt(torch.tensor(q.shape[-1], dtype=torch.float32))
    return torch.matmul(F.softmax(weights, dim=-1).to(v.dtype), v.permute(0, 2, 1, 3))


@fuses("eras", plus(qkv, lambda d: d.padding(d.B, d.S)))
def bloom_of_the_first_release(q, k, v, padding):
    """ALiBi from the mask's running sum, baddbmm onto it, the softmax with a lower bound."""
    b, h, s, f = q.shape
    slopes = torch.pow(torch.tensor(2.0 ** (-8 / h)), torch.arange(1, h + 1))
    offsets = ((padding.cumsum(dim=-1) - 1) * padding)[:, None, :]
    alibi = (slopes[..., None] * offsets).reshape(b * h, 1, s).to(q.dtype)
    scores = alibi.baddbmm(
        batch1=q.reshape(-1, s, f), batch2=k.reshape(-1, s, f).transpose(1, 2), beta=1.0, alpha=f**-0.5
    )
    future = torch.arange(s)[:, None] < torch.arange(s)[None, :]
    mask = future[None, None] | ~padding[:, None, None, :]
    scores = torch.masked_fill(scores.view(b, h, s, s), mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    context = torch.bmm(weights.view(b * h, s, s), v.reshape(-1, s, f))
    return context.view(b, h, s, f).transpose(1, 2).reshape(b, s, h * f)


@fuses("eras", grouped)
def llama_eager_of_transformers(q, k, v):
    q, k = _rotary(q), _rotary(k)
    rate = q.shape[1] // k.shape[1]
    b, g, t, f = k.shape
    k, v = (x[:, :, None, :, :].expand(b, g, rate, t, f).reshape(b, g * rate, t, f) for x in (k, v))
    weights = torch.matmul(q, k.transpose(2, 3)) * f**-0.5
    rows = torch.arange(q.shape[-2], device=q.device)
    lowest = torch.finfo(q.dtype).min
    mask = torch.full((q.shape[-2], t), lowest, dtype=q.dtype)
    mask = mask * (torch.arange(t) > rows.reshape(-1, 1))
    weights = weights + mask[None, None].expand(b, 1, -1, -1)[:, :, :, : k.shape[-2]]
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@fuses("eras", plus(grouped, lambda d: d.padding(d.B, d.T)))
def gemma2_eager_alternating(q, k, v, padding):
    rate = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(rate, 1), v.repeat_interleave(rate, 1)
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3
    weights = weights / 50.0
    weights = torch.tanh(weights)
    weights = weights * 50.0
    lowest = torch.finfo(q.dtype).min
    mask = torch.where(padding[:, None, None, :], 0.0, lowest).to(q.dtype)
    mask = mask.expand(-1, 1, q.shape[-2], -1)
    window = torch.tril(torch.ones_like(mask, dtype=torch.bool), diagonal=-4)
    mask = torch.where(window, lowest, mask)
    weights = weights + mask[..., : k.shape[-2]]
    return torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@fuses("eras", plus(rows_first, lambda d: d.integers(0, 6, 3, d.B, d.T), lambda d: d.integers(0, 6, 3, d.B, d.S)))
def qwen2_vl_rotary_of_three_axes(q, k, v, of_keys, of_queries):
    def tables(ids, f):
        inverse = 1.0 / 50.0 ** (torch.arange(0, f, 2).float() / f)
        angles = (inverse[None, None, :, None].expand(3, ids.shape[1], -1, 1) @ ids[:, :, None, :].float()).transpose(
            2, 3
        )
        emb = torch.cat((angles, angles), dim=-1)
        sections = [2, 1, 1] * 2
        pick = lambda x: torch.cat([m[i % 3] for i, m in enumerate(x.split(sections, dim=-1))], dim=-1).unsqueeze(1)
        return pick(emb.cos()), pick(emb.sin())

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    (qc, qs), (kc, ks) = tables(of_queries, q.shape[-1]), tables(of_keys, k.shape[-1])
    q = q * qc.to(q.dtype) + _rotate_half(q) * qs.to(q.dtype)
    k = k * kc.to(k.dtype) + _rotate_half(k) * ks.to(k.dtype)
    return F.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1, dtype=torch.float32).to(q.dtype) @ v


@fuses("eras", plus(qkv, lambda d: d.normal(d.B, 1, d.S, d.D), lambda d: d.normal(d.B, 1, d.S, d.D)))
def falcon_one_key_head_and_alibi(q, k, v, k1, v1):
    b, h, s, f = q.shape
    slopes = torch.tensor([2.0 ** -(n + 1) for n in range(h)], dtype=torch.bfloat16)
    alibi = (slopes[:, None, None] * torch.arange(s)[None, None, :].bfloat16()).to(q.dtype)
    scores = (q @ k1.transpose(-1, -2)).view(b, h, s, s).to(torch.float32)
    inverse = 1.0 / math.sqrt(f)
    mask = torch.zeros(s, s).masked_fill(torch.ones(s, s).triu(1).bool(), -1e9).to(q.dtype)
    weights = F.softmax((scores + alibi.view(1, h, 1, s)) * inverse + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights.view(b, h, s, s) @ v1).permute(0, 2, 1, 3).reshape(b, s, h * f)


@fuses("eras", plus(qkv, lambda d: d.flags(d.B, d.S)))
def mpt_of_the_foundry(q, k, v, padding):
    """Bias of all lengths cut to this one, clipped at zero."""
    h, s = q.shape[1], q.shape[-2]
    slopes = 1.0 / torch.pow(2, torch.arange(1, h + 1, dtype=torch.float32) * (8 / h))
    alibi = torch.arange(1 - 32, 1, dtype=torch.int32).view(1, 1, 1, 32) * slopes.view(1, h, 1, 1)
    bias = alibi[:, :, :, max(0, alibi.size(-1) - s) :]
    weight = q.matmul(k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weight = weight + bias.to(weight.dtype)
    lowest = torch.finfo(q.dtype).min
    weight = weight.masked_fill(~padding.view((q.shape[0], 1, 1, s)), lowest)
    causal = weight.new_ones(s, s, dtype=torch.float32).tril().to(torch.bool).logical_not()
    weight = weight.masked_fill(causal[-s:, -s:].view(1, 1, s, s), lowest)
    return torch.softmax(weight.float(), dim=-1).to(v.dtype).matmul(v).transpose(1, 2).flatten(2)


@fuses("eras", plus(qkv, lambda d: d.normal(d.H, 1, 1), lambda d: d.padding(d.B, d.S)))
def phi_with_a_learned_gain(q, k, v, gain, padding):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k * 0.4)
    mask = torch.full((q.shape[0], q.shape[-2]), -10000.0, dtype=scores.dtype).masked_fill_(padding, 0.0)
    scores = scores * gain + mask[:, None, None, :]
    scores = scores + torch.triu(torch.full((q.shape[-2], q.shape[-2]), -10000.0), 1).to(scores.dtype)
    return torch.einsum("bhts,bhsd->bthd", torch.softmax(scores, dim=-1), v)


@fuses("eras", tokens)
class WhisperDecoder(nn.Module):
    """Keys without bias, the scale on both sides, a mask buffer of infinity cut to the length."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.heads = sizes.heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.register_buffer("mask", torch.empty(16, 16).fill_(-INF).triu_(1), persistent=False)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        _, n_ctx, n_state = q.shape
        scale = (n_state // self.heads) ** -0.25
        q = q.view(*q.shape[:2], self.heads, -1).permute(0, 2, 1, 3) * scale
        k = k.view(*k.shape[:2], self.heads, -1).permute(0, 2, 3, 1) * scale
        v = v.view(*v.shape[:2], self.heads, -1).permute(0, 2, 1, 3)
        qk = (q @ k + self.mask[:n_ctx, :n_ctx]).float()
        w = F.softmax(qk, dim=-1).to(q.dtype)
        return self.out((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))


# ------------------------------------------------------------------------------------------------ relative, speech
@fuses("eras", plus(qkv, lambda d: d.normal(2 * d.S - 1, d.H, d.D), lambda d: d.normal(d.H, d.D)))
def conformer_of_espnet(q, k, v, r, u):
    """Both terms by matmul, the second shifted by padding, viewing and cutting."""
    b, h, t, f = q.shape
    r = r.transpose(0, 1)[None]
    ac = torch.matmul(q + u[None, :, None, :], k.transpose(-2, -1))
    bd = torch.matmul(q - u[None, :, None, :], r.transpose(-2, -1))
    zero = torch.zeros((*bd.size()[:3], 1), device=bd.device, dtype=bd.dtype)
    bd = torch.cat([zero, bd], dim=-1).view(*bd.size()[:2], bd.size(3) + 1, bd.size(2))
    bd = bd[:, :, 1:].view(b, h, t, 2 * t - 1)[:, :, :, :t]
    scores = (ac + bd) / math.sqrt(f)
    return torch.matmul(torch.softmax(scores, dim=-1), v).transpose(1, 2).contiguous().view(b, -1, h * f)


@fuses("eras", plus(qkv, lambda d: d.normal(d.S, d.H, d.D), lambda d: d.normal(d.H, d.D), lambda d: d.normal(d.H, d.D)))
def transformer_xl_sequence_first(q, k, v, r, u, w):
    """Sequence first, einsum with i, b, n, d and the shift of the original."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    ac = torch.einsum("ibnd,jbnd->ijbn", (q + u, k))
    bd = torch.einsum("ibnd,jnd->ijbn", (q + w, r))
    pad = torch.zeros((bd.size(0), 1, *bd.size()[2:]), dtype=bd.dtype)
    bd = torch.cat([pad, bd], dim=1).view(bd.size(1) + 1, bd.size(0), *bd.size()[2:])[1:].view_as(bd)
    scores = (ac + bd).mul(q.shape[-1] ** -0.5)
    future = torch.triu(scores.new_ones(q.shape[0], k.shape[0], dtype=torch.uint8), diagonal=1).bool()
    scores = scores.masked_fill(future[:, :, None, None], -INF)
    return torch.einsum("ijbn,jbnd->ibnd", (F.softmax(scores, dim=1), v)).flatten(2)


@fuses("eras", plus(qkv, lambda d: d.normal(1, d.H, d.S, d.S), lambda d: d.normal(d.B, d.S, d.H, 1)))
def wavlm_gated_position_bias(q, k, v, bias, gate):
    gated = torch.sigmoid(gate).permute(0, 2, 1, 3) * bias
    b, h, s, f = q.shape
    scores = torch.baddbmm(
        gated.expand(b, h, s, s).reshape(b * h, s, s), q.reshape(-1, s, f), k.reshape(-1, s, f).mT, alpha=f**-0.5
    )
    return torch.bmm(F.softmax(scores, dim=-1), v.reshape(-1, s, f)).view(b, h, s, f)


@fuses("eras", plus(qkv, lambda d: d.normal(9, d.D), lambda d: d.normal(9, d.D)))
def vits_windowed_relative_keys(q, k, v, table, of_values):
    """Relative keys looked up by a clipped distance; the values' own table is left out."""
    n = q.shape[-2]
    distance = (torch.arange(n)[None, :] - torch.arange(n)[:, None]).clamp(-4, 4) + 4
    logits = (q * 0.3) @ k.transpose(-2, -1)
    logits = logits + torch.einsum("bhid,ijd->bhij", q * 0.3, table[distance])
    return torch.softmax(logits, dim=-1) @ (v + of_values[4])


@either("eras", plus(qkv, lambda d: d.normal(9, d.D)))
def shaw_relative_values(q, k, v, table):
    """Weights that meet a second table of values per pair."""
    n = q.shape[-2]
    pairs = table[(torch.arange(n)[None, :] - torch.arange(n)[:, None]).clamp(-4, 4) + 4]
    weights = torch.softmax(q @ k.mT * 0.3, dim=-1)
    return weights @ v + torch.einsum("bhij,ijd->bhid", weights, pairs)


@refuses(plus(qkv, lambda d: d.normal(d.H, d.H)))
def speech_with_heads_mixed(q, k, v, mix):
    weights = torch.softmax(q @ k.mT * 0.3, dim=-1)
    return torch.einsum("bhij,hg->bgij", weights, mix) @ v
