"""Attention outside of text and images: proteins, graphs, sets, points, time series."""

import torch
import torch.nn.functional as F

from attention_cases.case import Draw, cross, either, fuses, plus, qkv, rows_first

INF = float("inf")


def _pairs(d: Draw) -> tuple:
    """Rows of an alignment ``[B, R, S, H*D]``, their mask, a bias of pairs ``[B, H, S, S]``."""
    return d.normal(d.B, 3, d.S, d.H * d.D), d.padding(d.B, d.S), d.normal(d.B, d.H, d.S, d.S)


@fuses("science", _pairs)
def evoformer_rows_with_pair_bias(x, padding, bias):
    """Five dimensions; a mask of -1e9 per sequence and a bias that all rows of the alignment share."""
    q, k, v = (y.unflatten(-1, (6, -1)) for y in (x * 0.35, x.sin(), x.cos()))
    gate = torch.sigmoid(x).unflatten(-1, (6, -1))
    mask = 1e9 * (padding[:, None, None, None, :].float() - 1.0)
    logits = torch.einsum("bsqhc,bskhc->bshqk", q, k) + mask.to(x.dtype)
    logits = logits + bias.unsqueeze(1)
    out = torch.einsum("bshqk,bskhc->bsqhc", F.softmax(logits, dim=-1), v)
    return (out * gate).flatten(-2)


@fuses("science", _pairs)
def evoformer_columns(x, padding, bias):
    """Along the alignment: rows and columns exchanged around the call, no bias."""
    x = x.swapaxes(-2, -3)
    q, k, v = (y.unflatten(-1, (6, -1)).transpose(-2, -3) for y in (x * 0.35, x.sin(), x.cos()))
    out = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), v)
    return out.transpose(-2, -3).flatten(-2).swapaxes(-2, -3)


@fuses("science", lambda d: (d.normal(d.B, 5, 5, 24), d.flags(d.B, 5, 5), d.normal(24, 3)))
def openfold_triangle_ending_node(x, mask, weight):
    """The pair matrix attends to itself along columns, biased by its own projection."""
    x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
    mask_bias = (1e9 * (mask.to(x.dtype) - 1))[..., :, None, None, :]
    triangle = torch.matmul(x, weight).permute(0, 3, 1, 2).unsqueeze(-4)
    q, k, v = (y.view(*y.shape[:-1], 3, 8).transpose(-2, -3) for y in (x * 0.35, x.sin(), x.cos()))
    a = torch.matmul(q, k.permute(0, 1, 2, 4, 3))
    for bias in (mask_bias, triangle):
        a = a + bias
    out = torch.matmul(F.softmax(a, dim=-1), v).transpose(-2, -3)
    return out.flatten(-2).transpose(-2, -3)


@fuses("science", lambda d: (*cross(d), d.normal(d.B, d.H, d.S, 3), d.normal(d.B, d.H, d.T, 3), d.normal(d.H)))
def invariant_points(q, k, v, points_q, points_k, weight):
    """Distances of points beside the product of features."""
    a = q @ k.mT * 0.3
    distance = (points_q.unsqueeze(-2) - points_k.unsqueeze(-3)).square().sum(-1)
    a = a - 0.5 * F.softplus(weight)[None, :, None, None] * distance
    return torch.softmax(a, dim=-1) @ v


@fuses("science", plus(qkv, lambda d: d.flags(d.B, d.S, d.S, share=0.4), lambda d: d.normal(d.B, d.S, d.S, d.H)))
def graph_attention_by_adjacency(q, k, v, adjacency, edges):
    scores = q @ k.mT * 0.35 + edges.permute(0, 3, 1, 2)
    return torch.where(adjacency[:, None] > 0, scores, torch.full_like(scores, -INF)).softmax(dim=-1) @ v


@fuses("science", plus(qkv, lambda d: d.integers(0, 9, d.B, d.S, d.S), lambda d: d.normal(9, d.H)))
def graphormer_spatial_encoding(q, k, v, distance, table):
    bias = F.embedding(distance, table).permute(0, 3, 1, 2)
    scores = q @ k.mT * 0.35 + bias
    return scores.masked_fill((distance > 6).unsqueeze(1), -INF).softmax(-1) @ v


@either("science", lambda d: (d.normal(d.B, d.S, 8), d.normal(8), d.normal(8), d.flags(d.B, d.S, d.S)))
def gat_of_sums(x, a, b, adjacency):
    """Scores are sums of two numbers per node: no matrix product."""
    scores = F.leaky_relu((x @ a)[:, :, None] + (x @ b)[:, None, :], 0.2)
    return torch.where(adjacency, scores, -9e15 if x.dtype != torch.float16 else -6e4).softmax(-1) @ x


@fuses("science", lambda d: (d.normal(d.B, d.S, 24), d.normal(1, 4, 24)), sites=2)
def set_transformer_inducing_points(x, points):
    def attend(q, k):
        q_ = torch.cat(q.split(8, 2), 0)
        k_ = torch.cat(k.split(8, 2), 0)
        weights = torch.softmax(q_.bmm(k_.transpose(1, 2)) / 24**0.5, 2)
        return torch.cat((q_ + weights.bmm(k_)).split(q.size(0), 0), 2)

    hidden = attend(points.repeat(x.size(0), 1, 1), x)
    return attend(x, hidden)


@fuses("science", lambda d: (d.normal(d.B, 16, 9), d.normal(d.B, 12, 9)))
def point_cloud_transformer(q, v):
    """One weight for queries and keys; the result less the input."""
    energy = torch.bmm(q.permute(0, 2, 1), q)
    attention = torch.softmax(energy * 0.25, dim=-1)
    return v - torch.bmm(v, attention.permute(0, 2, 1))


@either("science", lambda d: (d.normal(d.B, 16, 9), d.normal(d.B, 12, 9)))
def point_cloud_normalised_twice(q, v):
    """Weights divided by their sums over the other axis."""
    attention = torch.softmax(torch.bmm(q.permute(0, 2, 1), q) * 0.25, dim=-1)
    attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
    return v - torch.bmm(v, attention)


@fuses("science", lambda d: (d.normal(d.B, 7, d.H, d.D), d.normal(d.B, 9, d.H, d.D), d.normal(d.B, 9, d.H, 5)))
def informer_full_attention(q, k, v):
    """Length first, einsum, the output made contiguous."""
    scores = torch.einsum("blhe,bshe->bhls", q, k)
    b, _, n, m = scores.shape
    mask = torch.triu(torch.ones([b, 1, n, m], dtype=torch.bool, device=q.device), diagonal=1)
    scores.masked_fill_(mask, -INF)
    return torch.einsum("bhls,bshd->blhd", torch.softmax(0.35 * scores, dim=-1), v).contiguous()


@fuses("science", plus(rows_first, lambda d: d.normal(d.B, 1), lambda d: d.normal(d.B, d.T)))
def nonstationary_transformer(q, k, v, tau, delta):
    """A factor per sequence and a shift per key, learned elsewhere."""
    scores = torch.einsum("blhe,bshe->bhls", q, k) * tau.exp()[:, None, None] + delta[:, None, None, :]
    return torch.einsum("bhls,bshd->blhd", torch.softmax(0.35 * scores, dim=-1), v)


@fuses("science", lambda d: (d.normal(d.B, d.T, d.H, d.D), d.normal(d.H, d.D), d.padding(d.B, d.T)))
def pooling_by_a_learned_query(x, query, padding):
    """Weights per head without an axis of queries."""
    scores = torch.einsum("bthd,hd->bht", x, query) * 0.35
    weights = scores.masked_fill(~padding[:, None], -INF).softmax(-1)
    return torch.einsum("bht,bthd->bhd", weights, x)


@either("science", lambda d: (d.normal(d.B, 6, d.D), d.normal(9, d.D)))
def prototypes_by_distance(x, prototypes):
    """Soft assignment to prototypes by squared distances through cdist, which knows no type of 16 bits."""
    wide = torch.promote_types(x.dtype, torch.float32)
    distances = torch.cdist(x.to(wide), prototypes[None].to(wide)).to(x.dtype)
    return torch.softmax(-distances.square(), dim=-1) @ prototypes


@fuses("science", lambda d: (d.normal(9, d.D), d.normal(7, d.D), d.normal(7, 5)))
def hopfield_retrieval(state, patterns, targets):
    return torch.softmax(2.0 * state @ patterns.T, dim=1) @ targets


@either("science", lambda d: (d.normal(d.B, 9, 24), d.normal(d.B, 4, 24)))
def slot_attention(x, slots):
    """Softmax over slots, then normalised over inputs."""
    weights = torch.softmax(torch.einsum("bid,bjd->bij", slots, x) * 0.2, dim=1) + 1e-8
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bjd,bij->bid", x, weights)


@fuses("science", lambda d: (*qkv(d), d.constant(d.B, d.S)))
def attention_over_elapsed_time(q, k, v, time):
    """A bias by differences of real times, and no look ahead."""
    gap = time.cumsum(-1)[:, None, :, None] - time.cumsum(-1)[:, None, None, :]
    scores = q @ k.mT * 0.35 - 0.1 * torch.log1p(gap.abs())
    n = q.shape[-2]
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), -INF).softmax(-1) @ v


@fuses("science", lambda d: (*cross(d), d.normal(d.B, d.S, d.H), d.normal(d.B, d.T, d.H)))
def scores_multiplied_by_gates(q, k, v, gate_q, gate_k):
    gate = torch.sigmoid(gate_q).permute(0, 2, 1).unsqueeze(-1) * torch.sigmoid(gate_k).permute(0, 2, 1).unsqueeze(-2)
    return torch.softmax(q @ k.mT * gate, dim=-1) @ v


@fuses("science", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def scores_multiplied_by_a_mask(q, k, v, mask):
    """Hidden scores are zero: they take part."""
    return torch.softmax(q @ k.mT * 0.35 * mask, dim=-1) @ v
