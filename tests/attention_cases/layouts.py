"""Where the axes lie: heads, batch, windows, packed projections, grouped heads, caches."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import INFERENCE, Draw, Sizes, cross, folded, fuses, grouped, plus, qkv, rows_first, tokens


@fuses("layout", lambda d: (d.normal(d.B, d.S, d.D), d.normal(d.B, d.T, d.D), d.normal(d.B, d.T, d.D)))
def one_head_three_dimensions(q, k, v):
    return F.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1) @ v


@fuses("layout", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.D, d.T), d.normal(d.B, d.H, d.T, d.D)))
def keys_stored_transposed(q, k, v):
    return F.softmax(q @ k * 0.35, dim=-1) @ v


@fuses("layout", rows_first)
def keys_permuted_to_features_first(q, k, v):
    scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) * 0.35
    return (F.softmax(scores, dim=-1) @ v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)


@fuses("layout", lambda d: (d.normal(d.H, d.B, d.S, d.D), d.normal(d.H, d.B, d.T, d.D), d.normal(d.H, d.B, d.T, d.D)))
def heads_before_batch(q, k, v):
    return F.softmax(q @ k.mT * 0.35, dim=-1) @ v


@fuses(
    "layout",
    lambda d: (d.normal(d.B, 3, d.H, d.S, d.D), d.normal(d.B, 3, d.H, d.T, d.D), d.normal(d.B, 3, d.H, d.T, d.D)),
)
def five_dimensions(q, k, v):
    return F.softmax(q @ k.mT * 0.35, dim=-1) @ v


@fuses("layout", plus(folded, lambda d: d.normal(d.B, d.H, d.S, d.T)))
def scores_unfolded_for_the_mask(q, k, v, bias):
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores.view(bias.shape) + bias
    weights = F.softmax(scores.view(-1, q.shape[1], k.shape[1]), dim=-1)
    return torch.bmm(weights, v)


@fuses("layout", cross)
def folded_by_reshape_inside(q, k, v):
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    return (torch.bmm(q, k.mT) * 0.35).softmax(-1).bmm(v).view(b, h, s, d).transpose(1, 2).reshape(b, s, h * d)


@fuses("layout", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def scores_folded_after_the_mask(q, k, v, mask):
    b, h, s, d = q.shape
    scores = (q @ k.mT * 0.35).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).view(b * h, s, -1)
    return torch.bmm(weights, v.reshape(b * h, -1, d)).view(b, h, s, d)


@fuses("layout", cross)
def scores_transposed(q, k, v):
    weights = torch.softmax(k @ q.transpose(-1, -2) * 0.35, dim=-2)
    return weights.transpose(-1, -2) @ v


@fuses("layout", lambda d: (d.normal(d.B, d.D, 3, d.S), d.normal(d.B, d.D, 3, d.S), d.normal(d.B, d.D, 3, d.S)))
def channels_first_image(q, k, v):
    """The attention of Stable Diffusion's autoencoder: ``[B, C, height, width]``."""
    b, c, h, w = q.shape
    q, k, v = q.reshape(b, c, h * w).permute(0, 2, 1), k.reshape(b, c, h * w), v.reshape(b, c, h * w)
    weights = F.softmax(torch.bmm(q, k) * c**-0.5, dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, h, w)


@fuses("layout", cross)
def values_on_the_left(q, k, v):
    weights = F.softmax(q @ k.mT * 0.35, dim=-1)
    return (v.mT @ weights.mT).mT


@fuses(
    "layout",
    lambda d: (
        d.normal(d.B, 3, d.S, d.H, d.D),
        d.normal(d.B, 3, d.S, d.H, d.D),
        d.normal(d.B, 3, d.S, d.H, d.D),
        d.normal(d.B, d.H, d.S, d.S),
    ),
)
def triangle_attention(q, k, v, bias):
    """Rows of a pair representation attend within themselves; the bias is shared by the rows."""
    scores = torch.einsum("bnqhd,bnkhd->bnhqk", q * 0.35, k) + bias[:, None]
    return torch.einsum("bnhqk,bnkhd->bnqhd", scores.softmax(-1), v)


@fuses("layout", lambda d: (d.normal(d.B, 3, d.S, d.D), d.normal(d.B, 3, d.S, d.D), d.normal(d.B, 3, d.S, d.D)))
def axial_over_columns(q, k, v):
    q, k, v = (x.movedim(1, 2) for x in (q, k, v))
    return (F.softmax(q @ k.mT * 0.35, -1) @ v).movedim(2, 1)


@fuses("layout", lambda d: (d.normal(d.S, d.B, d.H * 4), d.normal(d.T, d.B, d.H * 4), d.normal(d.T, d.B, d.H * 4)))
def sequence_first_folded(q, k, v):
    """The form of fairseq."""
    s, b, width = q.shape
    q, k, v = (x.contiguous().view(-1, b * (width // 4), 4).transpose(0, 1) for x in (q * 0.5, k, v))
    weights = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1)
    return torch.bmm(weights, v).transpose(0, 1).contiguous().view(s, b, width)


@fuses(
    "layout",
    lambda d: tuple(d.normal(d.B, d.S, d.D, d.H).detach().permute(0, 3, 1, 2).requires_grad_() for _ in range(3)),
)
def inputs_not_contiguous(q, k, v):
    return (F.softmax(q @ k.mT * 0.35, -1) @ v).contiguous()


@fuses("layout", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.E)))
def values_of_other_width(q, k, v):
    return F.softmax(q @ k.mT * 0.35, -1) @ v


@fuses("layout", lambda d: (d.normal(d.B, d.S, 3 * d.H * d.D),))
def packed_then_permuted(x):
    """The form of timm's vision transformer."""
    b, n, width = x.shape
    q, k, v = x.reshape(b, n, 3, 2, width // 6).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) * (width // 6) ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, width // 3)


@fuses("layout", lambda d: (d.normal(d.B, d.S, 3 * d.H * d.D),))
def packed_then_split(x):
    b, n, width = x.shape
    q, k, v = (t.view(b, n, 2, -1).transpose(1, 2) for t in x.split(width // 3, dim=2))
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(k.size(-1)), dim=-1)
    return (weights @ v).transpose(1, 2).contiguous().view(b, n, -1)


@fuses("layout", lambda d: (d.normal(d.B, d.S, 3 * d.H * d.D),))
def packed_interleaved_in_heads(x):
    """The form of BLOOM and GPT-NeoX: ``[B, S, heads, 3, features]``."""
    b, n, width = x.shape
    packed = x.view(b, n, 2, 3, width // 6)
    q, k, v = (packed[..., i, :].transpose(1, 2) for i in range(3))
    return (torch.softmax(q @ k.mT * 0.2, -1) @ v).transpose(1, 2).flatten(2)


@fuses("layout", lambda d: (d.normal(3, d.B, d.H, d.S, d.D),))
def packed_indexed(x):
    q, k, v = x[0], x[1], x[2]
    return F.softmax(q @ k.mT * 0.35, -1) @ v


@fuses("layout", cross)
def output_squeezed_and_flattened(q, k, v):
    out = F.softmax(q.unsqueeze(1) @ k.unsqueeze(1).mT * 0.35, -1) @ v.unsqueeze(1)
    return out.squeeze(1).permute(0, 2, 1, 3).flatten(-2)


@fuses("layout", lambda d: (d.normal(d.D), d.normal(d.B, d.T, d.D), d.normal(d.B, d.T, d.D)))
def learned_query_pools(query, k, v):
    q = query.expand(k.shape[0], 1, -1)
    return (F.softmax(q @ k.mT * 0.35, -1) @ v).squeeze(1)


@fuses("layout", cross)
def scores_made_contiguous(q, k, v):
    scores = (q @ k.mT).contiguous() * 0.35
    return torch.matmul(F.softmax(scores, dim=-1).clone(), v.contiguous())


# in place


@fuses("inplace", cross)
def inplace_scale(q, k, v):
    scores = q @ k.mT
    scores.mul_(0.35)
    return scores.softmax(-1) @ v


@fuses("inplace", plus(cross, lambda d: d.constant(d.B, 1, d.S, d.T)))
def inplace_divide_and_add(q, k, v, mask):
    scores = q @ k.mT
    scores /= math.sqrt(q.shape[-1])
    scores += mask
    return scores.softmax(-1) @ v


@fuses("inplace", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def inplace_masked_fill(q, k, v, mask):
    scores = q @ k.mT * 0.35
    scores.masked_fill_(mask.logical_not(), float("-inf"))
    return scores.softmax(-1) @ v


@fuses("inplace", plus(cross, lambda d: d.flags(d.S, d.T)))
def inplace_add_to_product_output(q, k, v, mask):
    scores = torch.matmul(q, k.mT).mul_(0.35).add_(torch.where(mask, 0.0, -1e9).to(q.dtype))
    return F.softmax(scores, dim=-1) @ v


@fuses("inplace", qkv)
def inplace_assignment_to_the_future(q, k, v):
    scores = q @ k.mT * 0.35
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores[..., future] = float("-inf")
    return scores.softmax(-1) @ v


@fuses("inplace", plus(cross, lambda d: d.flags(d.B, 1, 1, d.T)))
def inplace_masked_queries(q, k, v, keep):
    q = q * 0.35
    scores = q @ k.mT
    scores.masked_fill_(~keep, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    out = weights @ v
    out.mul_(2.0)
    return out


# grouped heads


@fuses("grouped", grouped)
def grouped_repeat_interleave(q, k, v):
    rate = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(rate, dim=1), v.repeat_interleave(rate, dim=1)
    return F.softmax(q @ k.mT * 0.35, -1) @ v


@fuses("grouped", grouped)
def grouped_torch_repeat_interleave(q, k, v):
    rate = q.shape[1] // k.shape[1]
    k, v = torch.repeat_interleave(k, repeats=rate, dim=1), torch.repeat_interleave(v, repeats=rate, dim=1)
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]), -1).matmul(v)


def _repeat_kv(x, rate):
    b, g, t, d = x.shape
    return x[:, :, None, :, :].expand(b, g, rate, t, d).reshape(b, g * rate, t, d)


@fuses("grouped", grouped)
def grouped_expand_reshape(q, k, v):
    rate = q.shape[1] // k.shape[1]
    k, v = _repeat_kv(k, rate), _repeat_kv(v, rate)
    weights = F.softmax(q @ k.transpose(2, 3) * 0.35, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous()


@fuses("grouped", grouped)
def grouped_tiled(q, k, v):
    """``repeat`` tiles: head ``h`` reads key head ``h % G``, not ``h // (H / G)``."""
    rate = q.shape[1] // k.shape[1]
    k, v = k.repeat(1, rate, 1, 1), v.repeat(1, rate, 1, 1)
    return F.softmax(q @ k.mT * 0.35, -1) @ v


@fuses("grouped", grouped)
def grouped_broadcast_in_five_dimensions(q, k, v):
    b, h, s, d = q.shape
    q = q.view(b, k.shape[1], h // k.shape[1], s, d)
    out = F.softmax(q @ k.unsqueeze(2).mT * 0.35, -1) @ v.unsqueeze(2)
    return out.reshape(b, h, s, d)


@fuses("grouped", grouped)
def grouped_einsum(q, k, v):
    b, h, s, d = q.shape
    q = q.unflatten(1, (k.shape[1], -1))
    weights = torch.einsum("bgrsd,bgtd->bgrst", q, k).mul(0.35).softmax(-1)
    return torch.einsum("bgrst,bgtd->bgrsd", weights, v).reshape(b, h, s, d)


@fuses("grouped", grouped)
def grouped_queries_folded_into_rows(q, k, v):
    b, h, s, d = q.shape
    q = q.reshape(b, k.shape[1], -1, d)
    return (F.softmax(q @ k.mT * 0.35, -1) @ v).view(b, h, s, d)


@fuses("grouped", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, 1, d.T, d.D), d.normal(d.B, 1, d.T, d.D)))
def one_key_head_by_broadcast(q, k, v):
    return F.softmax(q @ k.mT * 0.35, -1) @ v


@fuses("grouped", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.T, d.D), d.normal(d.B, d.T, d.D)))
def one_key_head_by_einsum(q, k, v):
    weights = torch.einsum("bhsd,btd->bhst", q, k).mul(0.35).softmax(-1)
    return torch.einsum("bhst,btd->bhsd", weights, v)


@fuses("grouped", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, 1, d.T, d.D), d.normal(d.B, 1, d.T, d.D)))
def one_key_head_by_expand(q, k, v):
    k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    return torch.matmul((torch.matmul(q, k.transpose(-1, -2)) * 0.35).softmax(-1), v)


@fuses("grouped", lambda d: (d.normal(d.B, d.S, d.H, d.D), d.normal(d.B, d.T, d.G, d.D), d.normal(d.B, d.T, d.G, d.D)))
def grouped_rows_first_then_transposed(q, k, v):
    rate = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(rate, dim=2), v.repeat_interleave(rate, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (F.softmax(q @ k.mT * 0.35, -1) @ v).transpose(1, 2)


# other lengths and caches


@fuses("cache", lambda d: (d.normal(d.B, d.H, 1, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.D)))
def one_query(q, k, v):
    return F.softmax(q @ k.mT * 0.35, -1) @ v


def _with_past(d: Draw):
    new = (d.normal(d.B, d.H, d.S, d.D) for _ in range(3))
    return (*new, d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.D))


@fuses("cache", _with_past)
def cache_concatenated(q, k, v, past_k, past_v):
    k, v = torch.cat([past_k, k], dim=-2), torch.cat((past_v, v), dim=2)
    rows = torch.arange(q.shape[-2], device=q.device)[:, None] + past_k.shape[-2]
    visible = torch.arange(k.shape[-2], device=q.device)[None, :] <= rows
    scores = (q @ k.mT * 0.35).masked_fill(~visible, float("-inf"))
    return F.softmax(scores, -1) @ v, k, v


@fuses("cache", _with_past)
def cache_concatenated_tril(q, k, v, past_k, past_v):
    k, v = torch.cat([past_k, k], dim=-2), torch.cat((past_v, v), dim=-2)
    s, t = q.shape[-2], k.shape[-2]
    mask = torch.tril(torch.ones(s, t, dtype=torch.bool, device=q.device), diagonal=t - s)
    return torch.where(mask, q @ k.mT * 0.35, -torch.inf).softmax(-1) @ v


def _static_cache(d: Draw):
    new = (d.constant(d.B, d.H, 1, d.D) for _ in range(3))
    return (*new, d.constant(d.B, d.H, d.S, d.D), d.constant(d.B, d.H, d.S, d.D), d.position(d.S // 2))


@fuses("cache", _static_cache, mutates=True, modes=(INFERENCE,))
def cache_static_index_copy(q, k, v, cache_k, cache_v, position):
    cache_k.index_copy_(2, position, k)
    cache_v.index_copy_(2, position, v)
    visible = torch.arange(cache_k.shape[2], device=q.device) <= position
    scores = q @ cache_k.mT * 0.35 + torch.where(visible, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return scores.softmax(-1) @ cache_v


@fuses("cache", _static_cache, mutates=True, modes=(INFERENCE,))
def cache_static_assignment(q, k, v, cache_k, cache_v, position):
    cache_k[:, :, position] = k
    cache_v[:, :, position] = v
    scores = q @ cache_k.transpose(2, 3) * 0.35
    scores = scores.masked_fill(torch.arange(cache_k.shape[2], device=q.device)[None, None, None] > position, -1e9)
    return F.softmax(scores.float(), -1).to(q.dtype) @ cache_v


@fuses("cache", tokens)
class PerceiverLatents(nn.Module):
    """Learned queries attend to the tokens and to themselves."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.heads = sizes.heads
        self.latents = nn.Parameter(torch.randn(3, width))
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x):
        latents = self.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(latents), k, v))
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2)
