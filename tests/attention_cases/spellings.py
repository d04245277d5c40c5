"""The same computation in other words: products, softmax, scale."""

import math

import einops
import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import INFERENCE, Draw, Sizes, cross, folded, fuses, plus, qkv, rows_first, tokens


def _matrices(d: Draw):
    return d.normal(d.S, d.D), d.normal(d.T, d.D), d.normal(d.T, d.D)


# products


@fuses("product", cross)
def matmul_over_root(q, k, v):
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    return torch.matmul(F.softmax(scores, dim=-1), v)


@fuses("product", cross)
def at_operator(q, k, v):
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


@fuses("product", cross)
def tensor_matmul_swapaxes(q, k, v):
    return q.matmul(k.swapaxes(2, 3)).div(q.shape[-1] ** 0.5).softmax(dim=-1).matmul(v)


@fuses("product", folded)
def bmm_of_folded_heads(q, k, v):
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5, dim=-1)
    return torch.bmm(weights, v)


@fuses("product", folded)
def bmm_method(q, k, v):
    return (q * 0.35).bmm(k.permute(0, 2, 1)).softmax(2).bmm(v)


@fuses("product", folded)
def baddbmm_without_bias(q, k, v):
    start = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(start, q, k.transpose(-1, -2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), v)


@fuses("product", plus(folded, lambda d: d.normal(d.B * d.H, 1, d.T)))
def baddbmm_bias_in_keywords(q, k, v, bias):
    scores = bias.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=0.3)
    return F.softmax(scores, dim=-1) @ v


@fuses("product", plus(folded, lambda d: d.normal(d.B * d.H, d.S, d.T)))
def baddbmm_scaled_bias(q, k, v, bias):
    scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.25)
    return torch.bmm(F.softmax(scores, -1), v)


@fuses("product", _matrices)
def mm_one_head(q, k, v):
    return torch.mm(F.softmax(torch.mm(q, k.t()) / math.sqrt(q.shape[1]), dim=1), v)


@fuses("product", plus(_matrices, lambda d: d.normal(d.S, d.T), lambda d: d.normal(d.S, d.D)))
def addmm_chain(q, k, v, bias, residual):
    scores = torch.addmm(bias, q, k.t(), alpha=q.shape[-1] ** -0.5)
    return torch.addmm(residual, scores.softmax(-1), v)


@fuses("product", plus(folded, lambda d: d.normal(d.B * d.H, d.S, d.D)))
def baddbmm_adds_the_residual(q, k, v, residual):
    weights = (q @ k.mT * 0.4).softmax(-1)
    return torch.baddbmm(residual, weights, v)


@fuses("einsum", cross)
def einsum_heads_first(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.35).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@fuses("einsum", rows_first)
def einsum_rows_first(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


@fuses("einsum", cross)
def einsum_odd_letters(q, k, v):
    weights = torch.einsum("zntf,znsf->znts", q * 0.3, k).softmax(-1)
    return torch.einsum("znts,znsg->zntg", weights, v)


@fuses("einsum", cross)
def einsum_ellipsis(q, k, v):
    weights = F.softmax(torch.einsum("...id,...jd->...ij", q, k) * 0.35, dim=-1)
    return torch.einsum("... i j, ... j d -> ... i d", weights, v)


@fuses("einsum", cross)
def einsum_operands_swapped(q, k, v):
    weights = torch.einsum("bhkd,bhqd->bhqk", k, q).div(3.0).softmax(-1)
    return torch.einsum("bhkd,bhqk->bqhd", v, weights)


@fuses("einsum", cross)
def einsum_keys_before_queries(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhkq", q * 0.35, k).softmax(dim=-2)
    return torch.einsum("bhkq,bhkd->bhqd", weights, v)


@fuses("einsum", cross)
def einsum_heads_last(q, k, v):
    weights = torch.einsum("bhid,bhjd->bijh", q * 0.35, k).softmax(dim=2)
    return torch.einsum("bijh,bhjd->bihd", weights, v)


@fuses("einsum", lambda d: (d.normal(d.S, d.B, d.H, d.D), d.normal(d.T, d.B, d.H, d.D), d.normal(d.T, d.B, d.H, d.D)))
def einsum_sequence_first(q, k, v):
    weights = torch.einsum("sbhd,tbhd->bhst", q, k).mul(0.35).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(2)


@fuses("einsum", rows_first)
def einsum_scores_matmul_values(q, k, v):
    weights = torch.einsum("blhe,bshe->bhls", q, k).mul(0.35).softmax(-1)
    return torch.matmul(weights, v.transpose(1, 2)).transpose(1, 2)


@fuses("einops", tokens)
class EinopsAttention(nn.Module):
    """The form of the lucidrains repositories."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, width = sizes.heads, sizes.heads * sizes.features
        self.scale = sizes.features**-0.5
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attend = nn.Softmax(dim=-1)

    def forward(self, x):
        q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        weights = self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale)
        return einops.rearrange(torch.matmul(weights, v), "b h n d -> b n (h d)")


@fuses("einops", tokens)
class EinopsPackedProjection(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, width = sizes.heads, sizes.heads * sizes.features
        self.to_qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = einops.rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads).unbind(0)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(q.shape[-1] ** -0.5).softmax(dim=-1)
        return einops.rearrange(torch.einsum("bhij,bhjd->bhid", weights, v), "b h n d -> b n (h d)")


@fuses("einops", rows_first)
def einops_einsum(q, k, v):
    weights = einops.einsum(q, k, "b i h d, b j h d -> b h i j").mul(0.35).softmax(-1)
    return einops.einsum(weights, v, "b h i j, b j h d -> b i h d")


@fuses(
    "einops", lambda d: (d.normal(d.B, d.S, d.H * d.D), d.normal(d.B, d.T, d.H * d.D), d.normal(d.B, d.T, d.H * d.D))
)
def einops_heads_folded_into_batch(q, k, v):
    q, k, v = (einops.rearrange(x, "b n (h d) -> (b h) n d", h=2) for x in (q, k, v))
    weights = torch.einsum("b i d, b j d -> b i j", q, k).mul(0.2).softmax(dim=-1)
    return einops.rearrange(torch.einsum("bij,bjd->bid", weights, v), "(b h) n d -> b n (h d)", h=2)


# softmax


@fuses("softmax", cross)
class SoftmaxAndDropoutModules(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.0)

    def forward(self, q, k, v):
        return self.dropout(self.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)))) @ v


@fuses("softmax", cross)
def softmax_of_torch_special(q, k, v):
    return torch.special.softmax(q @ k.mT * 0.35, 3) @ v


@fuses("softmax", cross)
def softmax_by_exp_and_detached_maximum(q, k, v):
    scores = q @ k.mT * 0.35
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


@fuses("softmax", cross)
def softmax_by_exp_and_max_values(q, k, v):
    scores = q @ k.mT / 3
    scores = scores - scores.max(dim=-1, keepdim=True).values
    weights = scores.exp()
    return torch.matmul(weights / torch.sum(weights, -1, keepdim=True), v)


@fuses("softmax", cross)
def softmax_by_exp_alone(q, k, v):
    weights = torch.exp(q @ k.mT * 0.35)
    return torch.div(weights, weights.sum(-1).unsqueeze(-1)) @ v


@fuses("softmax", cross)
def softmax_divides_after_values(q, k, v):
    scores = q @ k.mT * 0.35
    weights = torch.exp(scores - scores.max(-1, keepdim=True)[0])
    return (weights @ v) / weights.sum(-1, keepdim=True)


@fuses("softmax", cross)
def softmax_by_logsumexp(q, k, v):
    scores = q @ k.mT * 0.35
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


@fuses("softmax", cross)
def softmax_as_exp_of_log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT * 0.35, dim=-1).exp() @ v


@fuses("softmax", cross)
def softmax_by_reciprocal(q, k, v):
    scores = q @ k.mT * 0.35
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights * weights.sum(-1, keepdim=True).reciprocal()) @ v


@fuses("softmax", cross)
def softmax_of_scores_less_maximum(q, k, v):
    scores = q @ k.mT * 0.35
    return F.softmax(scores - scores.max(dim=-1, keepdim=True)[0], dim=-1) @ v


@fuses("softmax", cross)
def softmax_in_float32_cast_back(q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.35
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


@fuses("softmax", cross)
def scores_in_float32_type_as(q, k, v):
    return F.softmax((q @ k.mT * 0.35).float(), dim=-1).type_as(q) @ v


@fuses("softmax", cross)
def operands_in_float32(q, k, v):
    return (F.softmax(q.float() @ k.float().mT * 0.35, dim=-1) @ v.float()).to(q.dtype)


# a module's parameters stay float32 under autocast, and so do these inputs
@fuses("softmax", cross)
def under_autocast(q, k, v):
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        return torch.softmax(q @ k.mT * 0.35, dim=-1) @ v


# scale


@fuses("scale", cross)
def scale_none(q, k, v):
    return F.softmax(q @ k.mT, dim=-1) @ v


@fuses("scale", cross)
def scale_on_queries(q, k, v):
    return torch.softmax((q * q.size(-1) ** -0.5) @ k.transpose(-1, -2), -1) @ v


@fuses("scale", cross)
def scale_on_keys(q, k, v):
    return torch.softmax(q @ (k / math.sqrt(k.size(-1))).transpose(-1, -2), -1) @ v


@fuses("scale", cross)
def scale_on_both_sides(q, k, v):
    side = q.shape[-1] ** -0.25
    return torch.softmax((q * side) @ (k * side).transpose(-1, -2), -1) @ v


@fuses("scale", cross)
def scale_on_queries_and_scores(q, k, v):
    scores = (q / 2.0) @ k.mT
    return torch.softmax(0.7 * scores, -1) @ v


@fuses("scale", cross)
def scale_divides_by_tensor(q, k, v):
    scores = q @ k.mT / torch.sqrt(torch.tensor(q.shape[-1], dtype=q.dtype, device=q.device))
    return scores.softmax(-1) @ v


@fuses("scale", plus(cross, lambda d: d.normal()))
def scale_zero_dimensional_input(q, k, v, scale):
    return (q @ k.mT * scale.exp()).softmax(-1) @ v


@fuses("scale", plus(cross, lambda d: d.normal(d.H, 1, 1)))
def scale_learned_per_head(q, k, v, temperature):
    return (q @ k.mT * temperature.exp()).softmax(-1) @ v


@fuses("scale", cross)
def scale_by_log_length(q, k, v):
    return (q @ k.mT * (math.log(k.shape[-2]) / math.sqrt(q.shape[-1]))).softmax(-1) @ v


@fuses("scale", cross)
def scale_by_query_position(q, k, v):
    positions = torch.arange(q.shape[-2], device=q.device)
    tuning = torch.log1p(torch.floor((positions.to(q.dtype) + 1.0) / 4)) * 0.1 + 1.0
    return ((q * tuning[:, None]) @ k.mT * 0.35).softmax(-1) @ v


@fuses("scale", cross)
def scale_after_softmax_argument_negated(q, k, v):
    return torch.softmax(-(q @ k.mT) / 2, -1) @ v


# PyTorch's own


@fuses("sdpa", cross)
def sdpa_plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@fuses("sdpa", qkv)
def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@fuses("sdpa", cross)
def sdpa_causal_rectangle(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


@fuses("sdpa", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def sdpa_bool_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@fuses("sdpa", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def sdpa_bool_mask_with_an_empty_row(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@fuses("sdpa", plus(cross, lambda d: d.normal(1, d.H, d.S, d.T)))
def sdpa_float_mask_with_gradient(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, bias, 0.0, False, scale=0.4)


@fuses("sdpa", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.G, d.S, d.D), d.normal(d.B, d.G, d.S, d.D)))
def sdpa_grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@fuses("sdpa", folded)
def sdpa_three_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)


@fuses("sdpa", rows_first)
def sdpa_between_transposes(q, k, v):
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).contiguous().flatten(2)


class _Multihead(nn.Module):
    options: dict = {}

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.attention = nn.MultiheadAttention(width, sizes.heads, **self.options)


@fuses("multihead", tokens)
class MultiheadDefault(_Multihead):
    """``need_weights`` is left at its default, True, but the weights are not used."""

    options = {"batch_first": True}

    def forward(self, x):
        return self.attention(x, x, x)[0]


@fuses("multihead", tokens)
class MultiheadSequenceFirst(_Multihead):
    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@fuses("multihead", plus(tokens, lambda d: d.normal(d.B, d.T, d.H * d.D)))
class MultiheadCross(_Multihead):
    options = {"batch_first": True, "bias": False}

    def forward(self, x, memory):
        return self.attention(x, memory, memory, need_weights=False)[0]


@fuses("multihead", tokens)
class MultiheadCausal(_Multihead):
    options = {"batch_first": True}

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


@fuses("multihead", plus(tokens, lambda d: ~d.padding(d.B, d.S)))
class MultiheadPadding(_Multihead):
    options = {"batch_first": True}

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


@fuses("multihead", plus(tokens, lambda d: d.flags(d.S, d.B, share=0.0).mT))
class MultiheadAllPadding(_Multihead):
    """All of the first sequence; as PyTorch computes weights that nobody reads, rows are NaN there, not zero."""

    options = {"batch_first": True}

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding)[0]


@fuses("multihead", plus(tokens, lambda d: ~d.padding(d.B, d.S)))
class MultiheadPaddingAndMask(_Multihead):
    options = {"batch_first": True}

    def forward(self, x, padding):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask)[0]


@fuses("multihead", plus(tokens, lambda d: ~d.padding(d.B, d.S)))
class MultiheadWithExtraKeys(MultiheadPaddingAndMask):
    """A learned key and one of zeros, which no mask hides."""

    options = {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}


@fuses("multihead", plus(tokens, lambda d: ~d.padding(d.B, d.S)), modes=(INFERENCE,))
class MultiheadInEvaluation(_Multihead):
    options = {"batch_first": True, "dropout": 0.1}

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
