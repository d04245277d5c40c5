"""Attention as vision models write it: windows, images, decomposed positions, pooled keys, pictures with text."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import Draw, Sizes, cross, folded, fuses, plus, qkv, tokens

INF = float("inf")


def _packed(d: Draw) -> tuple:
    """Hidden states and a projection to queries, keys and values."""
    width = d.H * d.D
    return d.normal(d.B, d.S, width), d.normal(3 * width, width, scale=width**-0.5)


def _image(d: Draw) -> tuple:
    """Channels first, ``[B, H*D, 4, 6]``."""
    return (d.normal(d.B, d.H * d.D, 4, 6),)


# --------------------------------------------------------------------------------------------------- transformers
@fuses("vision", _packed)
def vit_of_timm(x, weight):
    b, n, c = x.shape
    q, k, v = F.linear(x, weight).reshape(b, n, 3, 6, c // 6).permute(2, 0, 3, 1, 4).unbind(0)
    attn = (q * (c // 6) ** -0.5) @ k.transpose(-2, -1)
    attn = F.dropout(attn.softmax(dim=-1), 0.0)
    return (attn @ v).transpose(1, 2).reshape(b, n, c)


@fuses("vision", plus(_packed, lambda d: d.normal(2 * d.S - 1, d.H)))
def beit_with_relative_positions(x, weight, table):
    b, n, _ = x.shape
    qkv = F.linear(x, weight).reshape(b, n, 3, 6, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0] * 8**-0.5, qkv[1], qkv[2]
    places = torch.arange(n, device=x.device)
    index = places[:, None] - places[None, :] + n - 1
    bias = table[index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
    attn = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(dim=-1)
    return (attn @ v).transpose(1, 2).reshape(b, n, -1)


@fuses("vision", plus(_packed, lambda d: d.normal(3, d.H * d.D)))
def deit_with_extra_tokens(x, weight, extra):
    x = torch.cat([extra[None, :2].expand(x.shape[0], -1, -1), x], dim=1)
    b, n, _ = x.shape
    q, k, v = F.linear(x, weight).chunk(3, dim=-1)
    q, k, v = (y.reshape(b, n, 6, -1).transpose(1, 2) for y in (q, k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v).permute(0, 2, 1, 3).flatten(2)[:, 0]


@fuses("vision", plus(_packed, lambda d: d.normal(d.B, d.H * d.D)))
def cait_class_attention(x, weight, class_token):
    """One query, the class token, over all patches."""
    b, n, c = x.shape
    joined = torch.cat((class_token[:, None], x), dim=1)
    wq, wk, wv = weight.chunk(3)
    q = F.linear(class_token, wq).unsqueeze(1).reshape(b, 1, 6, c // 6).permute(0, 2, 1, 3) * 0.35
    k = F.linear(joined, wk).reshape(b, n + 1, 6, c // 6).permute(0, 2, 1, 3)
    v = F.linear(joined, wv).reshape(b, n + 1, 6, c // 6).permute(0, 2, 1, 3)
    attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return (attn @ v).transpose(1, 2).reshape(b, 1, c)


@fuses("vision", lambda d: (d.normal(d.B * 4, 6, d.H * d.D), d.normal(15, d.H), d.constant(4, 6, 6)))
def swin_shifted_windows(x, table, mask):
    """Windows folded into the batch, the shift's mask per window, a bias per head."""
    rows, n, c = x.shape
    q, k, v = (y.reshape(rows, n, 6, c // 6).transpose(1, 2) for y in (x, x + 1, x - 1))
    attn = (q * 0.35) @ k.transpose(-2, -1)
    index = (torch.arange(n)[:, None] - torch.arange(n)[None, :] + n - 1).to(x.device)
    attn = attn + table[index.view(-1)].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
    attn = attn.view(rows // 4, 4, 6, n, n) + mask.sign().mul(100.0).sub(100.0).unsqueeze(1).unsqueeze(0)
    attn = F.softmax(attn.view(-1, 6, n, n), dim=-1)
    return (attn @ v).transpose(1, 2).reshape(rows, n, c)


@fuses("vision", lambda d: (d.normal(d.B * 4, 6, d.H * d.D), d.normal(d.H, 1, 1), d.normal(d.H, 6, 6)))
def swin_of_the_second_version(x, logit_scale, positions):
    rows, n, c = x.shape
    q, k, v = (y.reshape(rows, n, 6, c // 6).transpose(1, 2) for y in (x, x.cos(), x - 1))
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    attn = attn * torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp()
    attn = attn + 16 * torch.sigmoid(positions).unsqueeze(0)
    return (attn.softmax(-1) @ v).transpose(1, 2).reshape(rows, n, c)


@fuses("vision", lambda d: (d.normal(d.B, 8, 12, d.H * d.D),))
def swin_windows_partitioned_inside(x):
    b, height, width, c = x.shape
    x = x.view(b, height // 4, 4, width // 4, 4, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, c)
    q, k, v = (y.view(-1, 16, 6, c // 6).permute(0, 2, 1, 3) for y in (x, x.sin(), x.cos()))
    out = ((q @ k.transpose(-2, -1) * 0.35).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 4, c)
    out = out.view(b, height // 4, width // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).contiguous()
    return out.view(b, height, width, c)


@fuses("vision", lambda d: (d.normal(d.B, 8, 12, d.H * d.D), d.normal(d.H, 6, 6)))
def maxvit_grid_attention(x, bias):
    """Tokens of one grid lie far apart: the window's axes are the outer ones."""
    b, height, width, c = x.shape
    grid = x.view(b, 2, height // 2, 3, width // 3, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, 6, 6, c // 6)
    q, k, v = (y.transpose(1, 2) for y in (grid, grid * 0.5, grid + 1))
    scores = q @ k.mT * 0.35 + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, 6, c)


@fuses("vision", plus(_image, lambda d: d.normal(d.H, 24, 24)))
def coatnet_with_image_bias(x, bias):
    b, c, height, width = x.shape
    q, k, v = (y.reshape(b, 6, c // 6, height * width) for y in (x, x.sin(), x.cos()))
    scores = torch.matmul(q.transpose(-1, -2), k) * 0.35 + bias
    return torch.matmul(v, scores.softmax(dim=-1).transpose(-1, -2)).reshape(b, c, height, width)


# ------------------------------------------------------------------------------------------- images and positions
@fuses("vision", lambda d: (*(d.normal(d.B * d.H, 12, d.D) for _ in range(3)), d.normal(5, d.D), d.normal(7, d.D)))
def sam_decomposed_positions(q, k, v, of_rows, of_columns):
    """Scores viewed as an image on both sides, two biases added by broadcasting."""
    height, width = 3, 4
    attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    row, column = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
    rh = of_rows[row[:, None] - row[None, :] + height - 1]
    rw = of_columns[column[:, None] - column[None, :] + width - 1]
    image = q.reshape(-1, height, width, q.shape[-1])
    rel_h = torch.einsum("bhwc,hkc->bhwk", image, rh)
    rel_w = torch.einsum("bhwc,wkc->bhwk", image, rw)
    attn = attn.view(-1, height, width, height, width)
    attn = (attn + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]).view(-1, height * width, height * width)
    return attn.softmax(dim=-1) @ v


@fuses("vision", lambda d: (d.normal(d.B, 12, 3 * d.H * d.D), d.normal(3, 3, d.D), d.normal(4, 4, d.D)))
def sam_decomposed_positions_of_sdpa(qkv, rh, rw):
    """Rows of pixels are cut into lines and columns for the bias, which is read as one tensor."""
    b, n, _ = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, 6, -1).permute(2, 0, 3, 1, 4).reshape(3, b * 6, n, -1).unbind(0)
    image = q.reshape(b * 6, 3, 4, -1)
    rel_h, rel_w = torch.einsum("bhwc,hkc->bhwk", image, rh), torch.einsum("bhwc,wkc->bhwk", image, rw)
    bias = (rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]).reshape(b, 6, n, n)
    q, k, v = (x.view(b, 6, n, -1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@fuses("vision", lambda d: (d.normal(d.B, d.H, 4, 6, d.D), d.normal(d.B, d.H, 4, 6, d.D), d.normal(d.B, d.H, 4, 6, 5)))
def axial_over_rows(q, k, v):
    """Every column by itself, along the height."""
    q, k, v = (x.permute(0, 1, 3, 2, 4) for x in (q, k, v))
    out = torch.softmax(torch.einsum("bnwid,bnwjd->bnwij", q, k) * 0.35, -1)
    return torch.einsum("bnwij,bnwjd->bnwid", out, v).permute(0, 1, 3, 2, 4)


@fuses("vision", lambda d: (d.normal(d.B, 4, 6, d.H * d.D),), sites=2)
def axial_over_both(x):
    heads = x.unflatten(-1, (6, -1))
    scores = torch.einsum("bxyhd,bzyhd->bhyxz", heads, heads * 0.3)
    tall = torch.einsum("bhyxz,bzyhd->bxyhd", scores.softmax(-1), heads)
    scores = torch.einsum("bxyhd,bxzhd->bhxyz", tall, tall * 0.3)
    return torch.einsum("bhxyz,bxzhd->bxyhd", scores.softmax(-1), tall).flatten(-2)


@fuses("vision", plus(_image, lambda d: d.normal(d.H * d.D, d.H * d.D, 2, 2, scale=0.1)))
def pvt_pooled_keys(x, reduce):
    b, c, height, width = x.shape
    pooled = F.conv2d(x, reduce, stride=2).flatten(2)
    q = x.flatten(2).unflatten(1, (6, -1)).transpose(-1, -2)
    k, v = pooled.unflatten(1, (6, -1)).transpose(-1, -2), pooled.sin().unflatten(1, (6, -1)).transpose(-1, -2)
    attn = ((q @ k.transpose(-2, -1)) * 0.35).softmax(dim=-1)
    return (attn @ v).transpose(1, 2).reshape(b, height * width, c)


@fuses("vision", _image)
def mvit_residual_pooling(x):
    """Queries pooled, keys pooled, the pooled queries added to the result."""
    q, k = F.max_pool2d(x, 2).flatten(2), F.avg_pool2d(x, 2).flatten(2)
    q, k, v = (y.unflatten(1, (6, -1)).mT for y in (q, k, k.cos()))
    return torch.matmul(((q * 0.35) @ k.transpose(-2, -1)).softmax(-1), v) + q


@fuses("vision", _image)
def self_attention_of_a_gan(x):
    """Features of queries are fewer than those of values; both products are bmm over channels."""
    b, c, height, width = x.shape
    q, k, v = x[:, : c // 8].reshape(b, -1, height * width), x[:, -c // 8 :].reshape(b, -1, height * width), x
    energy = torch.bmm(q.permute(0, 2, 1), k)
    attention = torch.softmax(energy, dim=-1)
    out = torch.bmm(v.reshape(b, c, height * width), attention.permute(0, 2, 1))
    return 0.5 * out.view(b, c, height, width) + x


@fuses("vision", _image)
def channel_attention_of_danet(x):
    """Channels are the tokens; the largest energy less each."""
    b, c, height, width = x.shape
    q = x.view(b, c, -1)
    energy = torch.bmm(q, q.permute(0, 2, 1)) * 0.1
    energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
    return torch.bmm(F.softmax(energy, dim=-1), q).view(b, c, height, width)


@fuses("vision", _image)
def cross_covariance_of_xcit(x):
    """Features attend to features, over normalised tokens."""
    q = F.normalize(x.flatten(2).unflatten(1, (6, -1)), dim=-1)
    k, v = F.normalize(x.sin().flatten(2).unflatten(1, (6, -1)), dim=-1), x.cos().flatten(2).unflatten(1, (6, -1))
    attn = ((q @ k.transpose(-2, -1)) * 2.0).softmax(dim=-1)
    return (attn @ v).permute(0, 3, 1, 2).flatten(2)


# ------------------------------------------------------------------------------------------- detection, perceivers
@fuses("vision", lambda d: (d.normal(9, d.B, 24), d.normal(7, d.B, 24), d.flags(d.B, 7, share=0.3)))
def detr_cross_attention(queries, memory, padding):
    """Sequence first, heads folded, padding filled through a view."""
    s, b, c = queries.shape
    q = (queries * 0.35).contiguous().view(s, b * 4, c // 4).transpose(0, 1)
    k = memory.contiguous().view(-1, b * 4, c // 4).transpose(0, 1)
    v = memory.sin().contiguous().view(-1, b * 4, c // 4).transpose(0, 1)
    padding = padding.roll(1, -1)
    weights = torch.bmm(q, k.transpose(1, 2)).view(b, 4, s, -1)
    weights = weights.masked_fill(padding.unsqueeze(1).unsqueeze(2), -INF).view(b * 4, s, -1)
    return torch.bmm(F.softmax(weights, dim=-1), v).transpose(0, 1).contiguous().view(s, b, c)


@fuses("vision", lambda d: (d.normal(4, d.H * d.D), d.normal(d.B, d.S, d.H * d.D), d.padding(d.B, d.S)))
def perceiver_latents(latents, x, keep):
    b = x.shape[0]
    q = latents.expand(b, -1, -1).unflatten(-1, (6, -1)).transpose(1, 2)
    joined = torch.cat([x, latents.expand(b, -1, -1)], dim=1)
    keep = torch.cat([keep, keep.new_ones(b, 4)], dim=1)
    k, v = joined.unflatten(-1, (6, -1)).transpose(1, 2), joined.cos().unflatten(-1, (6, -1)).transpose(1, 2)
    sim = torch.einsum("b h i d, b h j d -> b h i j", q * 0.35, k)
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    sim = sim.masked_fill(~keep[:, None, None, :], -torch.finfo(sim.dtype).max)
    return torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)


@fuses("vision", lambda d: (d.normal(d.B, 9, 24), d.normal(d.B, 3, 24)))
def q_former_of_one_memory(x, queries):
    """Queries attend to themselves and the image by one concatenation."""
    k = torch.cat([queries, x], 1).unflatten(-1, (3, 8)).transpose(1, 2)
    q = queries.unflatten(-1, (3, 8)).transpose(1, 2)
    return (torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ k.sin()).transpose(1, 2).flatten(2)


@fuses("vision", lambda d: (d.normal(d.B, 24, 4, 4), d.normal(24), d.normal(17, 24)))
def clip_attention_pooling(x, first, positions):
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(dim=0, keepdim=True) + first, tokens], dim=0) + positions[:, None, :]
    q, k, v = (y.unflatten(-1, (3, 8)).permute(1, 2, 0, 3) for y in (tokens[:1], tokens, tokens.sin()))
    return ((q @ k.mT * 0.35).softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2).squeeze(0)


@fuses("vision", tokens)
class ClipTextAttention(nn.Module):
    """The causal mask is a buffer of ``-inf`` above the diagonal, heads are folded into the batch."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.projection = nn.Linear(sizes.heads * sizes.features, 3 * sizes.heads * sizes.features)
        self.heads = sizes.heads
        mask = torch.empty(32, 32)
        mask.fill_(-INF)
        mask.triu_(1)
        self.register_buffer("mask", mask)

    def forward(self, x):
        b, n, c = x.shape
        shape = (b * self.heads, -1, c // self.heads)
        parts = self.projection(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (y.reshape(*shape) for y in parts)
        weights = torch.bmm(q, k.transpose(1, 2)) * 0.35
        weights = weights.view(b, self.heads, n, n) + self.mask[:n, :n]
        weights = F.softmax(weights.view(b * self.heads, n, n), dim=-1)
        return torch.bmm(weights, v).view(b, self.heads, n, -1).transpose(1, 2).reshape(b, n, c)


# --------------------------------------------------------------------------------------------------- diffusion
@fuses("vision", plus(folded, lambda d: d.constant(d.B * d.H, 1, d.T)))
def unet_baddbmm_with_a_mask(q, k, v, mask):
    scores = torch.baddbmm(mask, q, k.transpose(-1, -2), beta=1, alpha=0.35)
    return torch.bmm(scores.softmax(dim=-1), v)


@fuses("vision", folded)
def unet_upcast_attention(q, k, v):
    dtype = q.dtype
    start = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float32, device=q.device)
    scores = torch.baddbmm(start, q.float(), k.float().transpose(-1, -2), beta=0, alpha=0.35)
    return torch.bmm(scores.softmax(dim=-1).to(dtype), v)


@fuses("vision", lambda d: (d.normal(d.B, 3 * d.H * d.D, d.S),))
def openai_unet_legacy_order(x):
    """Both operands scaled by the fourth root; heads before the split into queries, keys, values."""
    b, width, length = x.shape
    q, k, v = x.reshape(b * 6, width // 6, length).split(width // 18, dim=1)
    scale = 1 / math.sqrt(math.sqrt(width // 18))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, length)


@fuses("vision", _image)
def autoencoder_attention_block(x):
    """One head over pixels; the values are on the left."""
    b, c, height, width = x.shape
    q, k, v = x.reshape(b, c, -1).permute(0, 2, 1), x.sin().reshape(b, c, -1), x.cos().reshape(b, c, -1)
    w = torch.bmm(q, k) * (int(c) ** (-0.5))
    w = F.softmax(w, dim=2).permute(0, 2, 1)
    return x + torch.bmm(v, w).reshape(b, c, height, width)


@fuses("vision", lambda d: tuple(d.normal(d.B, n, d.H, d.D) for n in (4, 4, 4, 7, 7, 7)))
def flux_joint_attention(qt, kt, vt, qi, ki, vi):
    """Text and image tokens together, apart again afterwards."""
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in ((qt, qi), (kt, ki), (vt, vi)))
    angle = torch.arange(11, device=q.device)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001], device=q.device)
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def turned(x):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    out = (torch.softmax(turned(q) @ turned(k).mT * 0.35, dim=-1) @ v).transpose(1, 2).flatten(2)
    return out[:, :4], out[:, 4:]


@fuses("vision", lambda d: (*qkv(d), d.normal(d.B, d.H, 4, d.D), d.normal(d.B, d.H, 4, d.D)), sites=2)
def picture_prompt_adapter(q, k, v, k2, v2):
    """Two attentions of the same queries, the second one weighted."""
    text = (q @ k.mT * 0.35).softmax(-1) @ v
    return text + 0.6 * ((q @ k2.mT * 0.35).softmax(-1) @ v2)


@fuses("vision", plus(cross, lambda d: d.flags(d.B, d.S, share=0.5)))
def regions_see_their_own_text(q, k, v, inside):
    """Some queries see the first half of the keys, the others all of them."""
    early = torch.arange(k.shape[-2], device=q.device) < k.shape[-2] // 2
    keep = early[None, None, :] | inside[:, :, None]
    return (q @ k.mT * 0.35).masked_fill(~keep[:, None], -INF).softmax(-1) @ v
