"""Attention inside larger calls: multi-head modules under autocast, compound operators, function transforms."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_cases.case import TRAINING, Draw, Sizes, cross, either, fuses, plus, qkv, refuses, rows_first, tokens


# --------------------------------------------------------------------------------- multi-head calls under autocast
class _MultiHead(nn.Module):
    options: dict = {}

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.attention = nn.MultiheadAttention(width, sizes.heads, batch_first=True, **self.options)

    def low(self, x):
        return torch.autocast(x.device.type, dtype=torch.bfloat16)


@fuses("module", plus(tokens, lambda d: ~d.padding(d.B, d.S)))
class AutocastMultiHead(_MultiHead):
    options = {"add_bias_kv": True, "add_zero_attn": True}

    def forward(self, x, padding):
        with self.low(x):
            return self.attention(x, x, x, key_padding_mask=padding)[0]


@fuses("module", tokens, sites=2)
class AutocastMultiHeadSwitchedOff(_MultiHead):
    def forward(self, x):
        with self.low(x):
            y = self.attention(x, x, x, need_weights=False)[0].to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                return self.attention(y, y, x)[0]


@fuses("checkpoint", tokens)
class AutocastAroundCheckpoint(_MultiHead):
    def forward(self, x):
        with self.low(x):
            return checkpoint(lambda x: self.attention(x, x, x)[0], x, use_reentrant=False)


class _EncoderLayer(nn.Module):
    """In inference the layer is one call of PyTorch's, for an even number of heads."""

    options: dict = {}

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            sizes.heads * sizes.features, sizes.heads, 24, 0.0, batch_first=True, **self.options
        )

    def forward(self, x):
        return self.layer(x)


@fuses("multihead", tokens)
class EncoderLayer(_EncoderLayer):
    options = {"activation": "gelu", "norm_first": True}


@fuses("multihead", tokens)
class EncoderLayerCausal(_EncoderLayer):
    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        return self.layer(x, src_mask=mask, is_causal=True)


@fuses("multihead", plus(tokens, lambda d: ~d.padding(d.B, d.S)))
class EncoderLayerPaddedAndCausal(_EncoderLayer):
    def forward(self, x, padding):
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.layer(x, src_mask=future, src_key_padding_mask=padding)


@fuses("multihead", plus(tokens, lambda d: ~d.padding(d.B, d.S)), sites=2)
class EncoderOfTwoLayers(_EncoderLayer):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.encoder = nn.TransformerEncoder(self.layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


@fuses("module", tokens, sites=2, modes=(TRAINING,))
class AutocastEncoder(EncoderOfTwoLayers):
    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.encoder(x)


def _one_sequence_is_padding(d: Draw):
    padding = ~d.padding(d.B, d.S)
    padding[0] = True
    return padding


@fuses("multihead", plus(tokens, _one_sequence_is_padding), sites=2)
class MultiHeadOfPaddingAlone(_MultiHead):
    """Rows without a key: NaN of a softmax, zeros of ``scaled_dot_product_attention``."""

    def forward(self, x, padding):
        a = self.attention(x, x, x, key_padding_mask=padding)[0]
        b = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return torch.stack([a, b])


@fuses("multihead", plus(tokens, _one_sequence_is_padding))
class EncoderLayerOfPaddingAlone(_EncoderLayer):
    def forward(self, x, padding):
        return self.layer(x, src_key_padding_mask=padding)


# -------------------------------------------------------------------------------------------- compound operators
@fuses("product", plus(cross, lambda d: d.normal(d.H, 1, 1)))
def scores_by_cosine_similarity(q, k, v, temperature):
    scores = F.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1)
    return (scores * temperature.exp()).softmax(-1) @ v


@fuses("product", lambda d: (d.normal(d.B, d.D, d.S), d.normal(d.B, d.D, d.T), d.normal(d.B, d.T, d.E)))
def scores_by_cosine_similarity_features_first(q, k, v):
    """Queries of zeros are divided by the lower limit of the norm."""
    q = torch.cat([q[..., :-1], torch.zeros_like(q[..., :1])], -1)
    return (torch.cosine_similarity(q.unsqueeze(-1), k.unsqueeze(-2)) * 8).softmax(-1) @ v


@fuses("product", cross)
def scores_by_vecdot(q, k, v):
    return (torch.linalg.vecdot(q.unsqueeze(-2), k.unsqueeze(-3)) * 0.3).softmax(-1) @ v


@fuses("product", cross)
def scores_by_mean_of_product(q, k, v):
    return (q.unsqueeze(-2) * k.unsqueeze(-3)).mean(-1).softmax(-1) @ v


def _one_matrix_each(d: Draw):
    return d.normal(d.S, d.D), d.normal(d.T, d.D), d.normal(d.T, d.E), d.normal(d.D, d.D), d.normal(d.E, d.D)


@fuses("product", _one_matrix_each)
def chains_of_matrices(q, k, v, between, after):
    scores = torch.linalg.multi_dot([q, between, k.T]) * 0.3
    return torch.linalg.multi_dot([scores.softmax(-1), v, after])


# ---------------------------------------------------------------------------------- einsum of three operands and more
@fuses("einsum", plus(cross, lambda d: d.normal(d.H)))
def einsum_with_a_temperature(q, k, v, temperature):
    return torch.einsum("bhqd,bhkd,h->bhqk", q, k, temperature).softmax(-1) @ v


@fuses("einsum", plus(cross, lambda d: d.normal(d.D), lambda d: d.normal(d.S, d.T)))
def einsum_of_four_operands(q, k, v, features, gate):
    return torch.einsum("...qd,d,qk,...kd->...kq", q, features, gate, k).mT.softmax(-1) @ v


@fuses("einsum", plus(cross, lambda d: d.normal(d.H, d.D, d.D)))
def einsum_bilinear(q, k, v, between):
    return torch.einsum("bhqd,hde,bhke->bhqk", q, between, k).mul(0.2).softmax(-1) @ v


@fuses("einsum", plus(rows_first, lambda d: d.normal(d.H, d.D, d.E)))
def einsum_through_the_output_projection(q, k, v, out):
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.3).softmax(-1)
    return torch.einsum("bhqk,hde,bkhd->bqe", weights, out, v)


@fuses("einsum", plus(cross, lambda d: d.normal(d.B, d.T)))
def einsum_with_a_gate_of_the_values(q, k, v, gate):
    weights = (q @ k.mT * 0.3).softmax(-1)
    return torch.einsum("bhqk,bk,bhkd->bhqd", weights, gate, v)


@refuses(plus(cross, lambda d: d.normal(d.H, d.H)))
def einsum_of_talking_heads(q, k, v, mix):
    weights = (q @ k.mT * 0.3).softmax(-1)
    return torch.einsum("bhqk,hg,bgkd->bgqd", weights, mix, v)


# ---------------------------------------------------------------------------------------------- function transforms
def _attend(q, k, v):
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


@fuses("transform", plus(cross, lambda d: d.normal(d.S, d.T)))
def vmap_with_a_shared_bias(q, k, v, bias):
    function = lambda q, k, v, bias: (q @ k.mT * 0.3 + bias).softmax(-1) @ v
    return torch.vmap(torch.vmap(function, (0, 0, 0, None)), (0, 0, 0, None), 1)(q, k, v, bias)


@fuses("transform", qkv)
def vmap_of_sdpa(q, k, v):
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.vmap(function, in_dims=(1, 1, 1), out_dims=2)(q, k, v)


@fuses("transform", cross)
def vmap_over_queries(q, k, v):
    function = lambda q, k, v: _attend(q.unsqueeze(-2), k, v).squeeze(-2)
    return torch.vmap(function, (2, None, None), 2)(q, k, v)


@fuses("transform", cross)
def vmap_over_queries_alone(q, k, v):
    """Keys and values of one batch for the queries of all."""
    return torch.vmap(_attend, (0, None, None))(q, k[0], v[0])


@fuses("transform", cross)
def vmap_under_autocast(q, k, v):
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        return torch.vmap(_attend)(q, k, v)


@fuses("transform", cross)
def scores_mapped_before_the_softmax(q, k, v):
    scores = torch.vmap(lambda s: s * 0.3 + 1.0)(q @ k.mT)
    return torch.softmax(scores, -1) @ v


@fuses("transform", cross)
def weights_mapped_after_the_softmax(q, k, v):
    weights = torch.vmap(lambda p: p * 0.5)((q @ k.mT * 0.3).softmax(-1))
    return weights @ v


@either("transform", cross)
def gradient_per_sample(q, k, v):
    loss = lambda q, k, v: _attend(q, k, v).square().sum()
    return torch.vmap(torch.func.grad(loss))(q, k, v)


@either("transform", cross)
def gradient_per_sample_of_composites(q, k, v):
    def loss(q, k, v):
        scores = torch.einsum("hqd,hkd,h->hqk", q, k, q[:, 0, 0]) + F.cosine_similarity(q[:, :, None], k[:, None], -1)
        return (scores.softmax(-1) @ v).square().sum()

    return torch.vmap(torch.func.grad(loss))(q, k, v)


@either("transform", cross)
def vmap_that_writes(q, k, v):

    def function(q, k, v):
        scores = q @ k.mT
        scores *= 0.3
        return scores.softmax(-1) @ v

    return torch.vmap(function)(q, k, v)


@fuses("transform", plus(cross, lambda d: d.integers(1, d.T + 1, d.B), lambda d: d.normal(d.H)))
def vmap_with_lengths_and_slopes(q, k, v, length, slope):
    def function(q, k, v, length, slope):
        i, j = (torch.arange(n, device=q.device) for n in (q.shape[0], k.shape[0]))
        scores = q @ k.T * 0.3 - slope * (i[:, None] - j).abs()
        return scores.masked_fill(j >= length, -float("inf")).softmax(-1) @ v

    return torch.vmap(torch.vmap(function, (0, 0, 0, None, 0)), (0, 0, 0, 0, None))(q, k, v, length, slope)


@fuses("transform", tokens)
class EnsembleOfLayers(nn.Module):
    """Parameters of several modules in one tensor each."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.heads = sizes.heads
        self.weights = nn.Parameter(torch.randn(2, 3, width, width) * width**-0.5)

    def forward(self, x):
        def layer(weights, x):
            q, k, v = (F.linear(x, w).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in weights.unbind())
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

        return torch.vmap(layer, (0, None))(self.weights, x)
