"""Pictures, proteins, graphs, sets and joint streams of tokens, as their papers' code attends over them."""

import math

import torch
import torch.nn.functional as F
from torch import einsum, nn

from attention_cases.case import Draw, Sizes, cross, either, fuses, plus, qkv, refuses, tokens

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.3


# ------------------------------------------------------------------------------------------------ proteins
def _pairs(d: Draw) -> tuple:
    """Pair representation ``[B, S, S, H, D]`` for queries, keys and values, a gate and a bias ``[B, H, S, S]``."""
    return (*(d.normal(d.B, d.S, d.S, d.H, d.D) for _ in range(4)), d.normal(d.B, d.H, d.S, d.S))


@fuses("structures", plus(_pairs, lambda d: d.flags(d.B, d.S, d.S)))
def openfold_triangle_from_the_start(q, k, v, gate, bias, keep):
    """A list of biases, added one after the other; the mask as a huge negative number."""
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    biases = [(1e9 * (keep.to(q.dtype) - 1))[..., :, None, None, :], bias.unsqueeze(-4)]
    q = q / math.sqrt(q.shape[-1])
    a = torch.matmul(q, k.permute(0, 1, 2, 4, 3))
    for b in biases:
        a += b
    a = F.softmax(a, -1)
    o = torch.matmul(a, v).transpose(-2, -3)
    return (o * torch.sigmoid(gate)).flatten(-2)


@fuses("structures", _pairs)
def alphafold_triangle_to_the_end(q, k, v, gate, bias):
    q, k, v, gate = (x.transpose(1, 2) for x in (q, k, v, gate))
    logits = einsum("bnqhc,bnkhc->bnhqk", q * q.shape[-1] ** -0.5, k) + bias[:, None]
    weights = torch.softmax(logits, dim=-1)
    return (einsum("bnhqk,bnkhc->bnqhc", weights, v) * gate.sigmoid()).transpose(1, 2)


def _alignment(d: Draw) -> tuple:
    return (*(d.normal(d.B, d.T, d.S, d.H, d.D) for _ in range(3)), d.normal(d.B, d.S, d.S, d.H))


@fuses("structures", _alignment)
def alignment_rows_with_pair_bias(q, k, v, pair):
    logits = einsum("b s i h d, b s j h d -> b h s i j", q, k) * q.shape[-1] ** -0.5
    logits = logits + pair.permute(0, 3, 1, 2).unsqueeze(2)
    return einsum("b h s i j, b s j h d -> b s i h d", logits.softmax(-1), v)


@fuses("structures", _alignment)
def alignment_global_column(q, k, v, pair):
    """One query per column, the mean of all; keys and values without heads."""
    q, k, v = q.mean(1), k[..., 0, :].transpose(1, 2), v[..., 0, :].transpose(1, 2)
    weights = torch.softmax(torch.einsum("bshd,bstd->bsht", q * 0.3, k), dim=-1)
    return torch.einsum("bsht,bstd->bshd", weights, v) + pair.sum()


@fuses("structures", plus(qkv, lambda d: d.normal(d.B, d.S, d.S, d.H), lambda d: d.normal(d.B, d.S, d.S, d.H)))
def evoformer_with_two_pair_biases(q, k, v, first, second):
    logits = einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    logits = logits + first.movedim(-1, 1) + second.permute(0, 3, 2, 1)
    return logits.softmax(dim=-1) @ v


@refuses(_alignment)
def outer_product_mean(q, k, v, pair):
    """Two products and a softmax that has nothing to do with them."""
    outer = einsum("bsihd,bsjhe->bijde", q, k) / q.shape[1]
    return outer.sum((-1, -2)).unsqueeze(-1) * pair.softmax(dim=-1) + v.sum()


@fuses("structures", plus(qkv, lambda d: d.normal(d.B, d.S, 3)))
def squared_distances_of_points(q, k, v, x):
    """Squared distances of points beside the product."""
    distance = (x[:, :, None] - x[:, None, :]).square().sum(-1)
    logits = _scores(q, k) - 0.5 * distance[:, None]
    return torch.softmax(logits * math.sqrt(1 / 3), dim=-1) @ v


# ------------------------------------------------------------------------------------------------ graphs and sets
@fuses("structures", plus(qkv, lambda d: d.integers(0, 2, d.B, d.S, d.S), lambda d: d.normal(4, d.H)))
def graphormer_of_path_lengths(q, k, v, adjacency, table):
    hops = adjacency + torch.eye(q.shape[-2], dtype=torch.long) * 2
    bias = table[hops].permute(0, 3, 1, 2)
    return torch.softmax((q * 0.3) @ k.transpose(2, 3) + bias, dim=3) @ v


@fuses("structures", plus(qkv, lambda d: d.integers(0, 2, d.B, d.S, d.S)))
def graph_attention_over_neighbours(q, k, v, adjacency):
    """Self loops are added; non-neighbours get a large negative number."""
    adjacency = adjacency + torch.eye(q.shape[-2], dtype=adjacency.dtype)
    scores = torch.where(adjacency.unsqueeze(1) > 0, _scores(q, k), -9e15 if q.dtype == torch.float32 else -9e4)
    return F.softmax(scores, dim=-1) @ v


@either("structures", plus(qkv, lambda d: d.normal(d.H, 2 * d.D)))
def graph_attention_of_two_sums(q, k, v, a):
    """Scores are a sum of one number per node each: a product of keys with one row, and a bias."""
    f = q.shape[-1]
    left, right = torch.einsum("bhid,hd->bhi", q, a[:, :f]), torch.einsum("bhjd,hd->bhj", k, a[:, f:])
    return F.softmax(F.leaky_relu(left.unsqueeze(-1) + right.unsqueeze(-2), 0.2), dim=-1) @ v


@refuses(plus(qkv, lambda d: d.normal(d.H, d.D)))
def additive_attention_of_bahdanau(q, k, v, w):
    return torch.softmax(torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) @ w[:, None, :, None], -2).squeeze(-1) @ v


@fuses("structures", plus(qkv, lambda d: d.normal(d.B, d.S, d.S, d.D, scale=0.3)))
def edges_added_to_keys(q, k, v, edges):
    """Every pair has a key of its own beside the node's."""
    scores = (q.unsqueeze(3) * edges.unsqueeze(1)).sum(-1) + q @ k.transpose(-1, -2)
    return torch.softmax(scores / math.sqrt(q.shape[-1]), dim=-1) @ v


def _set(d: Draw) -> tuple:
    return d.normal(1, d.T, d.H * d.D), d.normal(d.B, d.S, d.H * d.D)


@fuses("structures", _set, sites=2)
def set_transformer_induced_points(points, x):
    """Heads cut from the features and stacked along the batch; queries are added to the result."""

    def block(q, k):
        pieces = [torch.cat(t.split(8, 2), 0) for t in (q, k, k)]
        weights = torch.softmax(pieces[0].bmm(pieces[1].transpose(1, 2)) / math.sqrt(q.size(2)), 2)
        return torch.cat((pieces[0] + weights.bmm(pieces[2])).split(q.size(0), 0), 2)

    hidden = block(points.repeat(x.size(0), 1, 1), x)
    return block(x, hidden)


@fuses("structures", tokens)
class PoolingBySeedVectors(nn.Module):
    """One learned query per output; it has no batch."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.randn(3, sizes.heads * sizes.features))

    def forward(self, x):
        scores = torch.matmul(self.seed, x.transpose(1, 2)) / math.sqrt(x.shape[-1])
        return torch.softmax(scores, dim=-1) @ x


@refuses(tokens)
class PoolingByOneScore(nn.Module):
    """A linear layer gives one score per token."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.score = nn.Linear(sizes.heads * sizes.features, 1)

    def forward(self, x):
        return (torch.softmax(self.score(x), dim=1).transpose(1, 2) @ x).squeeze(1)


@refuses(tokens)
class SlotAttention(nn.Module):
    """Softmax over the slots, that is the queries, then normalised over the inputs."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(3, sizes.heads * sizes.features))

    def forward(self, x):
        logits = torch.einsum("id,bjd->bij", self.slots, x) * 0.1
        weights = logits.softmax(dim=1) + 1e-8
        return torch.einsum("bij,bjd->bid", weights / weights.sum(dim=-1, keepdim=True), x)


# ------------------------------------------------------------------------------------------------ pictures
@fuses("structures", plus(qkv, lambda d: d.normal(d.H, 1, 1), lambda d: d.normal(d.H, d.S, d.S)))
def swin_v2_by_functions(q, k, v, logit_scale, bias):
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    attn = attn * torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp()
    attn = attn + 16 * torch.sigmoid(bias).unsqueeze(0)
    return (F.softmax(attn, dim=-1) @ v).transpose(1, 2).flatten(2)


def _windows(d: Draw) -> tuple:
    """Two windows per picture: ``[B * 2, H, S, D]`` three times, a mask ``[2, S, S]``, a bias ``[H, S, S]``."""
    shape = (d.B * 2, d.H, d.S, d.D)
    return *(d.normal(*shape) for _ in range(3)), d.flags(2, d.S, d.S), d.normal(d.H, d.S, d.S)


@fuses("structures", _windows)
def swin_windows_viewed_for_the_mask(q, k, v, keep, bias):
    b, h, n, _ = q.shape
    mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -100.0)
    attn = (q * 0.3) @ k.transpose(-2, -1) + bias.unsqueeze(0)
    attn = attn.view(b // 2, 2, h, n, n) + mask.unsqueeze(1).unsqueeze(0)
    return F.softmax(attn.view(-1, h, n, n), dim=-1) @ v


def _image(d: Draw) -> tuple:
    """``[B * H, 15, D]`` three times and relative tables for heights (3) and widths (5)."""
    n = d.B * d.H
    return *(d.normal(n, 15, d.D) for _ in range(3)), d.normal(5, d.D), d.normal(9, d.D)


@fuses("structures", _image)
def sam_adds_in_five_dimensions(q, k, v, table_h, table_w):
    """Decomposed relative positions of segment-anything: gathered tables, two einsums, one view."""
    h, w = 3, 5
    coordinates = [torch.arange(n)[:, None] - torch.arange(n)[None, :] + n - 1 for n in (h, w)]
    rh, rw = table_h[coordinates[0].long()], table_w[coordinates[1].long()]
    r_q = q.reshape(q.shape[0], h, w, q.shape[-1])
    rel_h, rel_w = torch.einsum("bhwc,hkc->bhwk", r_q, rh), torch.einsum("bhwc,wkc->bhwk", r_q, rw)
    attn = (q * 0.3) @ k.transpose(-2, -1)
    attn = attn.view(-1, h, w, h, w) + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
    return attn.view(-1, h * w, h * w).softmax(dim=-1) @ v


@fuses("structures", plus(cross, lambda d: d.normal(d.B, d.S, d.T)))
def mask2former_masked_cross_attention(q, k, v, predicted):
    """Rows whose predicted mask is empty see everything."""
    mask = (predicted.sigmoid().unsqueeze(1).repeat(1, q.shape[1], 1, 1) < 0.5).bool().detach()
    mask = mask & (~mask.all(dim=-1, keepdim=True))
    return torch.softmax(_scores(q, k).masked_fill(mask, -INF), dim=-1) @ v


@fuses("structures", plus(cross, lambda d: d.normal(d.B, d.S, d.T)))
def mask2former_by_indexing(q, k, v, predicted):
    """The same with the index of the full rows assigned to."""
    mask = (predicted.sigmoid().flatten(1).view_as(predicted) < 0.5).unsqueeze(1).repeat(1, q.shape[1], 1, 1)
    mask = mask.flatten(0, 1).detach()
    mask[torch.where(mask.sum(-1) == mask.shape[-1])] = False
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -INF)
    b, h, s, f = q.shape
    weights = torch.baddbmm(bias, q.flatten(0, 1) * f**-0.5, k.flatten(0, 1).transpose(-2, -1)).softmax(-1)
    return torch.bmm(weights, v.flatten(0, 1)).view(b, h, s, -1)


@fuses("structures", plus(cross, lambda d: d.normal(d.B, d.S, d.H * d.D), lambda d: d.normal(d.B, d.T, d.H * d.D)))
def conditional_detr_concatenates_positions(q, k, v, q_pos, k_pos):
    """Content and position side by side in every head."""
    b, h, s, f = q.shape
    q = torch.cat([q, q_pos.view(b, s, h, f).transpose(1, 2)], dim=3)
    k = torch.cat([k, k_pos.view(b, -1, h, f).transpose(1, 2)], dim=3)
    return torch.softmax(q @ k.transpose(2, 3) * (2 * f) ** -0.5, dim=-1) @ v


@fuses("structures", tokens)
def channels_attend_to_channels(x):
    """Rows and keys are features; the weights stand at the right of the values."""
    q = F.normalize(x, dim=1)
    weights = (q.transpose(1, 2) @ q).softmax(dim=-2)
    return x @ weights


# ------------------------------------------------------------------------------------------------ joint streams
def _streams(d: Draw) -> tuple:
    return (
        *(d.normal(d.B, d.S, d.H * d.D) for _ in range(3)),
        *(d.normal(d.B, d.T, d.H * d.D) for _ in range(3)),
        d.normal(d.D),
    )


@fuses("structures", _streams)
def sd3_joint_attention(q, k, v, eq, ek, ev, gain):
    """Normalised queries and keys of two streams, concatenated along tokens, split afterwards."""
    b, s, _ = q.shape
    split = lambda x: x.view(b, -1, 6, 8).transpose(1, 2)
    norm = lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype) * gain
    q = torch.cat([norm(split(q)), norm(split(eq))], dim=2)
    k = torch.cat([norm(split(k)), norm(split(ek))], dim=2)
    v = torch.cat([split(v), split(ev)], dim=2)
    out = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(b, -1, 48)
    return out[:, :s], out[:, s:]


@fuses("structures", _streams)
def flux_text_first_with_complex_rotation(q, k, v, eq, ek, ev, gain):
    b = q.shape[0]
    split = lambda x: x.unflatten(-1, (6, 8)).transpose(1, 2)
    q, k, v = (torch.cat((split(e), split(x)), dim=2) for e, x in ((eq, q), (ek, k), (ev, v)))
    angle = torch.arange(q.shape[2]).float()[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.1])
    table = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))

    def rotate(x):
        x_ = x.float().reshape(*x.shape[:-1], -1, 1, 2)
        return (table[..., 0] * x_[..., 0] + table[..., 1] * x_[..., 1]).reshape(*x.shape).type_as(x)

    x = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
    return x.permute(0, 2, 1, 3).reshape(b, -1, 48) * gain.repeat(6)


@fuses("structures", plus(qkv, lambda d: d.normal(d.B, d.S, d.H), lambda d: d.normal(d.H)))
def gated_by_heads_and_tokens(q, k, v, gate, gain):
    """A gate of every head and token on the result, as in gated attention for long contexts."""
    out = torch.softmax(_scores(q, k), -1) @ v
    return (out * gate.sigmoid().transpose(1, 2).unsqueeze(-1) * gain[:, None, None]).transpose(1, 2).flatten(2)


@fuses("structures", plus(qkv, lambda d: d.normal(d.H)), sites=2)
def differential_with_a_rate_per_head(q, k, v, rate):
    """Halves of the features attend apart; the second is subtracted, the result normalised."""
    (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
    first = F.softmax(q1 @ k1.transpose(-1, -2) * 0.5, dim=-1, dtype=torch.float32).type_as(q)
    second = F.softmax(q2 @ k2.transpose(-1, -2) * 0.5, dim=-1, dtype=torch.float32).type_as(q)
    out = (first - rate.sigmoid()[:, None, None] * second) @ v
    return out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-5) * 0.2


@fuses("structures", plus(cross, lambda d: d.normal(d.H), lambda d: d.flags(d.B, 1, 1, d.T)))
def gpt_oss_of_transformers(q, k, v, sinks, keep):
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3
    weights = weights + torch.where(keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    combined = torch.cat([weights, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined, dim=-1, dtype=combined.dtype)
    return torch.matmul(F.dropout(probs[..., :-1], p=0.0, training=False).to(v.dtype), v)


@fuses("structures", plus(qkv, lambda d: d.normal(d.B, d.S, d.D), lambda d: d.normal(d.B, d.H, d.S, d.D)))
def latent_attention_of_deepseek_eager(q, k, v, k_rope, q_rope):
    """One rotary key for all heads, written into an empty tensor beside the others."""
    b, h, s, f = q.shape
    query, key = q.new_empty(b, h, s, 2 * f), k.new_empty(b, h, s, 2 * f)
    query[:, :, :, :f], query[:, :, :, f:] = q, q_rope
    key[:, :, :, :f], key[:, :, :, f:] = k, k_rope.view(b, 1, s, f)
    weights = torch.matmul(query, key.transpose(2, 3)) * (2 * f) ** -0.5
    return torch.matmul(torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


@either("structures", plus(qkv, lambda d: d.normal(3, d.H)), sites=3)
def native_sparse_three_branches(q, k, v, gates):
    """Compressed keys, the chosen blocks and a window, mixed by gates."""
    b, h, s, _ = q.shape
    ck, cv = (x[:, :, : s // 2 * 2].unflatten(2, (-1, 2)).mean(3) for x in (k, v))
    compressed = _scores(q, ck).softmax(-1)
    chosen = compressed.mean(-2, keepdim=True).topk(2, dim=-1).indices
    blocks = torch.zeros(b, h, 1, s // 2, dtype=torch.bool).scatter(-1, chosen, True)
    keep = blocks.repeat_interleave(2, dim=-1)
    keep = F.pad(keep, (0, s - keep.shape[-1]), value=True)
    selected = _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v
    near = (torch.arange(s)[:, None] - torch.arange(s)).abs() <= 1
    window = _scores(q, k).masked_fill(~near, -INF).softmax(-1) @ v
    g = gates.sigmoid()[:, None, :, None, None]
    return g[0] * (compressed @ cv) + g[1] * selected + g[2] * window
