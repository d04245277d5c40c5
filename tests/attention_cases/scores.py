"""Biases with gradients, functions of the score, sinks, several score terms, several softmaxes."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import Draw, Sizes, cross, either, folded, fuses, grouped, plus, qkv, tokens

INF = float("inf")


def _scores(q, k):
    return torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5


def _future(q, k):
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)


def _distance(q, k):
    return torch.arange(k.shape[-2], device=q.device)[None, :] - torch.arange(q.shape[-2], device=q.device)[:, None]


# biases


@fuses("bias")
def alibi_of_constant_slopes(q, k, v):
    heads = q.shape[1]
    slopes = torch.pow(2.0, -8.0 * torch.arange(1, heads + 1, device=q.device) / heads).to(q.dtype)
    bias = slopes[:, None, None] * _distance(q, k).to(q.dtype)
    return F.softmax((_scores(q, k) + bias).masked_fill(_future(q, k), -INF), dim=-1) @ v


@fuses("bias", plus(qkv, lambda d: d.normal(d.H)))
def alibi_of_learned_slopes(q, k, v, slopes):
    bias = -slopes.abs()[None, :, None, None] * _distance(q, k).abs()
    return F.softmax(_scores(q, k) + bias.to(q.dtype), dim=-1) @ v


@fuses("bias", plus(folded, lambda d: d.constant(d.B * d.H, 1, d.T)))
def alibi_of_bloom(q, k, v, alibi):
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=0.35)
    scores = torch.max(scores, torch.tensor(torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device))
    return torch.bmm(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


@fuses("bias", plus(cross, lambda d: d.normal(1, d.H, d.S, d.T)))
def bias_per_head(q, k, v, bias):
    return F.softmax(_scores(q, k) + bias, dim=-1) @ v


@fuses("bias", plus(cross, lambda d: d.normal(d.B, d.H, d.S, d.T)))
def bias_per_batch_and_head(q, k, v, bias):
    return F.softmax(_scores(q, k) + bias, dim=-1) @ v


@fuses("bias", plus(cross, lambda d: d.normal(d.S, d.T)))
def bias_shared_by_all_heads(q, k, v, bias):
    return F.softmax(bias + _scores(q, k), dim=-1) @ v


@fuses("bias", plus(cross, lambda d: d.normal(d.H, 1, d.T), lambda d: d.normal(d.B, 1, d.S, 1)))
def bias_per_key_and_per_query(q, k, v, key_bias, query_bias):
    return F.softmax(_scores(q, k) + key_bias + query_bias, dim=-1) @ v


@fuses("bias", plus(cross, lambda d: d.normal(d.B, 1, d.S, d.T)))
def bias_multiplies_the_scores(q, k, v, gate):
    return F.softmax(_scores(q, k) * torch.sigmoid(gate), dim=-1) @ v


@fuses("bias", plus(cross, lambda d: d.normal(d.B, 1, d.S, d.T), lambda d: d.flags(d.B, 1, 1, d.T)))
def bias_and_mask(q, k, v, bias, keep):
    return F.softmax((_scores(q, k) + bias).masked_fill(~keep, -INF), dim=-1) @ v


@fuses("bias", plus(cross, lambda d: d.normal(d.B, d.S, d.T, 3), lambda d: d.normal(d.H, 3)))
def bias_of_projected_pairs(q, k, v, pairs, weight):
    """Pair representations projected to one bias per head, as in structure prediction."""
    bias = F.linear(pairs, weight).permute(0, 3, 1, 2)
    return F.softmax(_scores(q, k) + bias, dim=-1) @ v


@fuses("bias", tokens)
class RelativeBiasT5(nn.Module):
    """T5: no scale, bucketed relative positions, bias with gradient."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, width = sizes.heads, sizes.heads * sizes.features
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.relative_attention_bias = nn.Embedding(8, sizes.heads)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (y(x).view(b, s, self.heads, -1).transpose(1, 2) for y in (self.q, self.k, self.v))
        positions = torch.arange(s, device=x.device)
        buckets = (positions[None, :] - positions[:, None]).clamp(-4, 3) + 4
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        return self.o(torch.matmul(weights, v).transpose(1, 2).contiguous().view(b, s, -1))


@fuses("bias", lambda d: (d.normal(d.B * 3, 4, d.H * d.D), d.constant(3, 4, 4)))
class RelativeBiasSwin(nn.Module):
    """Windows of 2 x 2 pixels, a table of relative positions, and the mask of shifted windows."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, width = sizes.heads, sizes.heads * sizes.features
        self.qkv = nn.Linear(width, 3 * width)
        self.table = nn.Parameter(torch.randn(9, sizes.heads))
        coords = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("index", relative[..., 0] * 3 + relative[..., 1])

    def forward(self, x, mask):
        windows, n, c = x.shape
        q, k, v = self.qkv(x).reshape(windows, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        attn = attn.view(windows // mask.shape[0], mask.shape[0], self.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
        attn = F.softmax(attn.view(-1, self.heads, n, n), dim=-1)
        return (attn @ v).transpose(1, 2).reshape(windows, n, c)


@fuses(
    "bias",
    lambda d: (
        d.normal(d.B * d.H, 6, d.D),
        d.normal(d.B * d.H, 6, d.D),
        d.normal(d.B * d.H, 6, d.D),
        d.normal(2, 2, d.D),
        d.normal(3, 3, d.D),
    ),
)
def bias_decomposed_over_the_image(q, k, v, rows, columns):
    """Relative positions along height (2) and width (3), as in SAM and MViT."""
    n, _, d = q.shape
    q_image = q.reshape(n, 2, 3, d)
    by_row = torch.einsum("bhwc,hkc->bhwk", q_image, rows)
    by_column = torch.einsum("bhwc,wkc->bhwk", q_image, columns)
    bias = (by_row[..., :, None] + by_column[..., None, :]).reshape(n, 6, 6)
    return ((q * d**-0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v


@fuses("bias", plus(cross, lambda d: d.normal(d.S, d.T, d.D)))
def shaw_relative_keys(q, k, v, relative):
    scores = q @ k.mT + torch.einsum("bhsd,std->bhst", q, relative)
    return F.softmax(scores * q.shape[-1] ** -0.5, dim=-1) @ v


@fuses("bias", plus(cross, lambda d: d.normal(d.S, d.T, d.D)))
def shaw_relative_keys_by_matmul(q, k, v, relative):
    second = torch.matmul(q.permute(2, 0, 1, 3).flatten(1, 2), relative.transpose(1, 2))
    second = second.unflatten(1, (q.shape[0], q.shape[1])).permute(1, 2, 0, 3)
    return F.softmax((q @ k.mT + second) / 3.0, dim=-1) @ v


# functions of the score


@fuses("score")
def softcap_and_causal(q, k, v):
    scores = torch.tanh(_scores(q, k) / 5.0) * 5.0
    return F.softmax(scores.masked_fill(_future(q, k), -INF), dim=-1) @ v


@fuses("score", plus(cross, lambda d: d.constant(d.B, 1, d.S, d.T)))
def softcap_of_gemma(q, k, v, mask):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.35
    scores = scores / 2.0
    scores = torch.tanh(scores)
    scores = scores * 2.0
    scores = scores + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


@fuses("score", plus(cross, lambda d: d.normal(d.H, 1, 1)))
def cosine_attention(q, k, v, log_scale):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scale = torch.clamp(log_scale, max=math.log(1.0 / 0.01)).exp()
    return F.softmax(scores * scale, dim=-1) @ v


@fuses("score", cross)
def cosine_attention_divides_by_norms(q, k, v):
    norms = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).transpose(-1, -2)
    return F.softmax(10.0 * (q @ k.mT) / (norms + 1e-6), dim=-1) @ v


@fuses("score", plus(cross, lambda d: d.normal(1)))
def learned_temperature(q, k, v, temperature):
    return F.softmax(_scores(q, k) / F.softplus(temperature), dim=-1) @ v


@fuses("score", cross)
def score_clamped(q, k, v):
    return F.softmax(torch.clamp(_scores(q, k), -1.0, 1.0), dim=-1) @ v


@fuses("score", cross)
def score_clipped_at_the_top(q, k, v):
    return F.softmax(_scores(q, k).clamp(max=0.5), dim=-1) @ v


@fuses("score", cross)
def score_leaky(q, k, v):
    scores = _scores(q, k)
    return F.softmax(torch.where(scores > 0, scores, 0.2 * scores), dim=-1) @ v


@fuses("score", cross)
def score_leaky_relu(q, k, v):
    """As graph attention networks do."""
    return F.softmax(F.leaky_relu(_scores(q, k), 0.2), dim=-1) @ v


@fuses("score", cross)
def score_gated_by_itself(q, k, v):
    scores = _scores(q, k)
    return F.softmax(scores * torch.sigmoid(scores), dim=-1) @ v


@fuses("score", cross)
def score_squared(q, k, v):
    return F.softmax(-((_scores(q, k) - 1.0) ** 2), dim=-1) @ v


@fuses("score")
def score_decays_with_distance(q, k, v):
    distance = _distance(q, k).abs().to(q.dtype)
    return F.softmax(_scores(q, k) - torch.log1p(distance) * 0.5, dim=-1) @ v


@fuses("score", cross)
def score_depends_on_the_head(q, k, v):
    heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
    scores = _scores(q, k)
    return F.softmax(torch.where(heads % 2 == 0, scores, scores * 0.5), dim=-1) @ v


@fuses("score", cross)
def negative_squared_distance(q, k, v):
    """``-|q - k|^2`` expanded: two rank-one terms and a product."""
    squares = q.pow(2).sum(-1, keepdim=True) + k.pow(2).sum(-1)[..., None, :]
    return F.softmax((2.0 * q @ k.mT - squares) * 0.2, dim=-1) @ v


# several terms


def _rotary_parts(d):
    """q and k, each with a part that carries positions, and v; keys share the positions."""
    return (
        d.normal(d.B, d.H, d.S, d.D),
        d.normal(d.B, d.H, d.S, 4),
        d.normal(d.B, d.H, d.S, d.D),
        d.normal(d.B, 1, d.S, 4),
        d.normal(d.B, d.H, d.S, d.E),
    )


@fuses("terms", _rotary_parts)
def latent_attention_two_terms(q, q_rope, k, k_rope, v):
    """MLA: a part without position per head, and a rotary part whose key is shared by the heads."""
    scores = (q @ k.mT + q_rope @ k_rope.mT) * (q.shape[-1] + 4) ** -0.5
    return F.softmax(scores.masked_fill(_future(q, k), -INF), dim=-1) @ v


@fuses(
    "terms",
    lambda d: (
        d.normal(d.B, d.S, d.H, d.D),
        d.normal(d.B, d.S, d.H, 4),
        d.normal(d.B, d.T, d.D),
        d.normal(d.B, d.T, 4),
    ),
)
def latent_attention_absorbed(q, q_rope, latent, k_rope):
    """MLA with the projections absorbed: keys and values are the same latent."""
    scores = torch.einsum("bshc,btc->bsht", q, latent) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
    weights = (scores * 0.3).softmax(dim=-1)
    return torch.einsum("bsht,btc->bshc", weights, latent)


@fuses("terms", _rotary_parts)
def latent_attention_concatenated(q, q_rope, k, k_rope, v):
    q = torch.cat([q, q_rope], dim=-1)
    k = torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], dim=-1)
    return F.softmax(_scores(q, k), dim=-1) @ v


def _differential(d: Draw):
    return (*(d.normal(d.B, d.H, d.S, d.D) for _ in range(4)), d.normal(d.B, d.H, d.S, d.D), d.normal())


@fuses("differential", _differential, sites=2)
def differential_on_weights(q1, k1, q2, k2, v, rate):
    weights = F.softmax(_scores(q1, k1), dim=-1) - rate * F.softmax(_scores(q2, k2), dim=-1)
    return weights @ v


@fuses("differential", _differential, sites=2)
def differential_on_outputs(q1, k1, q2, k2, v, rate):
    return F.softmax(_scores(q1, k1), dim=-1) @ v - rate * (F.softmax(_scores(q2, k2), dim=-1) @ v)


@fuses("differential", _differential, sites=2)
def differential_and_causal(q1, k1, q2, k2, v, rate):
    future = _future(q1, k1)
    first = F.softmax(_scores(q1, k1).masked_fill(future, -INF), dim=-1)
    second = F.softmax(_scores(q2, k2).masked_fill(future, -INF), dim=-1)
    return (first - torch.sigmoid(rate) * second) @ v


def _double_heads(d: Draw):
    """Queries and keys of twice as many heads as the values have."""
    double = (d.normal(d.B, 2 * d.H, d.S, d.D), d.normal(d.B, 2 * d.H, d.S, d.D))
    return (*double, d.normal(d.B, d.H, d.S, d.D), d.normal())


@fuses("differential", _double_heads)
def differential_of_one_softmax(q, k, v, rate):
    """Both maps in one tensor, split after the softmax."""
    weights = F.softmax(_scores(q, k), dim=-1).unflatten(1, (-1, 2))
    return (weights[:, :, 0] - rate * weights[:, :, 1]) @ v


@fuses("differential", plus(_double_heads, lambda d: d.normal(d.H, 1, 1)))
def differential_of_one_masked_softmax(q, k, v, rate, gain):
    """As the authors write it, with rates per head and a mask; the maps are halves of the heads."""
    weights = _scores(q, k).masked_fill(_future(q, k), -INF)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(q)
    weights = weights.view(q.shape[0], 2, -1, *weights.shape[2:])
    weights = weights[:, 0] - (rate.exp() + gain) / 2 * weights.select(1, -1)
    return torch.matmul(weights, v)


@either("differential", plus(_double_heads, lambda d: d.normal(d.H, 1, d.S)))
def differential_with_a_rate_per_key(q, k, v, rate, gain):
    weights = F.softmax(_scores(q, k), dim=-1).unflatten(1, (-1, 2))
    return (weights[:, :, 0] - rate * gain * weights[:, :, 1]) @ v


@either("differential", _double_heads)
def differential_of_three_parts(q, k, v, rate):
    """The same map twice, and a place of the rows instead of a map."""
    weights = F.softmax(_scores(q, k), dim=-1).unflatten(1, (-1, 2))
    return (weights[:, :, 0] + weights[:, :, 0] / 2 - rate * weights[:, :, 1, :1]) @ v


# sinks


@fuses("sink", plus(grouped, lambda d: d.normal(d.H), lambda d: d.constant(d.B, 1, d.S, d.T)))
def sink_of_gpt_oss(q, k, v, sinks, mask):
    rate = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(rate, 1), v.repeat_interleave(rate, 1)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.35
    scores = scores + mask
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    combined = torch.cat([scores, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probabilities = F.softmax(combined, dim=-1, dtype=combined.dtype)
    return torch.matmul(probabilities[..., :-1], v).transpose(1, 2).contiguous()


@fuses("sink", plus(qkv, lambda d: d.normal(d.H, 1, 1)))
def sink_without_maximum(q, k, v, sink):
    scores = _scores(q, k).masked_fill(_future(q, k), -INF)
    column = sink.expand(q.shape[0], -1, q.shape[-2], 1)
    return F.softmax(torch.cat((scores, column), -1), dim=-1)[..., : k.shape[-2]] @ v


@fuses("sink", plus(cross, lambda d: d.normal(d.H)))
def sink_in_the_first_column(q, k, v, sink):
    column = sink.view(1, -1, 1, 1).expand(q.shape[0], q.shape[1], q.shape[2], 1)
    return torch.softmax(torch.cat([column, _scores(q, k)], dim=-1), -1)[..., 1:] @ v


@fuses("sink", cross)
def softmax_plus_one(q, k, v):
    scores = _scores(q, k)
    top = scores.amax(dim=-1, keepdim=True).clamp(min=0)
    weights = torch.exp(scores - top)
    return (weights / (weights.sum(-1, keepdim=True) + torch.exp(-top))) @ v


@fuses("sink", cross)
def softmax_plus_one_naive(q, k, v):
    weights = torch.exp(_scores(q, k))
    return (weights / (1.0 + weights.sum(dim=-1, keepdim=True))) @ v


@fuses("sink", cross)
def softmax_plus_one_by_padding(q, k, v):
    return F.softmax(F.pad(_scores(q, k), (0, 1)), dim=-1)[..., :-1] @ v


@either("sink", plus(cross, lambda d: d.normal(d.H, 1)))
def sink_by_logsumexp_afterwards(q, k, v, sink):
    """Granite's form: the output is scaled by a function of the scores' logsumexp."""
    scores = _scores(q, k)
    gate = torch.sigmoid(torch.logsumexp(scores, dim=-1) - sink)
    return (F.softmax(scores, dim=-1) @ v) * gate.unsqueeze(-1)


@fuses("score", cross, sites=2)
def error_function_and_arc_tangent(q, k, v):
    s = F.gelu(q @ k.mT)
    return s.softmax(-1) @ v + (q @ k.mT * 0.3).atan().mul(5).softmax(-1) @ v
