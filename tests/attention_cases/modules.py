"""Small modules as they stand in models: projections, rotary positions, dropout, checkpointing, several layers."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_cases.case import INFERENCE, TRAINING, Sizes, either, fuses, grouped, plus, qkv, tokens

INF = float("inf")


class _Projected(nn.Module):
    """Query, key and value projections of hidden states ``[B, S, H*D]``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.features = sizes.heads, sizes.features
        width = sizes.heads * sizes.features
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, self.features).transpose(1, 2)

    def merge(self, x):
        return x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], -1)


@fuses("module", plus(tokens, lambda d: d.padding(d.B, d.S)))
class BertSelfAttention(_Projected):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, padding):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.features)
        scores = scores + (1.0 - padding[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        weights = self.dropout(F.softmax(scores, dim=-1))
        return self.merge(torch.matmul(weights, v))


@fuses("module", tokens)
class KarpathyHead(nn.Module):
    """One head of the lecture's model."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.key, self.query, self.value = (nn.Linear(width, 4, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(16, 16)))

    def forward(self, x):
        t = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = F.softmax(wei.masked_fill(self.tril[:t, :t] == 0, -INF), dim=-1)
        return wei @ v


@fuses("module", tokens)
class LlamaAttention(nn.Module):
    """Rotary positions by complex numbers, grouped heads, mask made in the module: Meta's form."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.features = sizes.heads, sizes.kv_heads, sizes.features
        width = self.heads * self.features
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, self.kv_heads * self.features, bias=False) for _ in range(2))

    def rotate(self, x):
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * 0.1 ** torch.arange(
            x.shape[-1] // 2, device=x.device
        )
        cos, sin = (f(angles)[None, :, None, :].to(x.dtype) for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.rotate(self.wq(x).view(b, s, self.heads, self.features))
        k = self.rotate(self.wk(x).view(b, s, self.kv_heads, self.features))
        v = self.wv(x).view(b, s, self.kv_heads, self.features)
        rate = self.heads // self.kv_heads
        k = k[:, :, :, None, :].expand(b, s, self.kv_heads, rate, self.features).reshape(b, s, self.heads, -1)
        v = v[:, :, :, None, :].expand(b, s, self.kv_heads, rate, self.features).reshape(b, s, self.heads, -1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.features)
        scores = scores + torch.full((s, s), -INF, device=x.device, dtype=x.dtype).triu(1)
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        return self.wo(torch.matmul(scores, v).transpose(1, 2).contiguous().view(b, s, -1))


@fuses("module", tokens)
class QueryKeyNorm(_Projected):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.q_norm, self.k_norm = nn.LayerNorm(sizes.features), nn.LayerNorm(sizes.features)

    def forward(self, x):
        q, k, v = self.q_norm(self.split(self.q(x))), self.k_norm(self.split(self.k(x))), self.split(self.v(x))
        weights = ((q * self.features**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.out(self.merge(weights @ v))


@fuses("module", tokens)
class DiffusersProcessor(_Projected):
    """``get_attention_scores`` of diffusers: baddbmm over folded heads."""

    def forward(self, x):
        q, k, v = (self.split(y(x)).reshape(-1, x.shape[1], self.features) for y in (self.q, self.k, self.v))
        start = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(start, q, k.transpose(-1, -2), beta=0, alpha=self.features**-0.5)
        weights = scores.softmax(dim=-1).to(q.dtype)
        return self.out(self.merge(torch.bmm(weights, v).unflatten(0, (-1, self.heads))))


@fuses("module", tokens)
class GatedAttention(_Projected):
    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        hidden = F.softmax(q @ k.mT / math.sqrt(self.features), -1) @ v
        return self.merge(hidden) * torch.sigmoid(self.out(x))


@fuses("module", tokens, sites=2)
class TwoLayerEncoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList([QueryKeyNorm(sizes), GatedAttention(sizes)])
        self.norms = nn.ModuleList([nn.LayerNorm(sizes.heads * sizes.features) for _ in range(2)])

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return x


@fuses("module", plus(tokens, lambda d: d.normal(d.B, d.T, d.H * d.D)), sites=2, modes=(TRAINING,))
class PytorchDecoderLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.layer = nn.TransformerDecoderLayer(width, sizes.heads, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


# in inference PyTorch runs the whole layer as one operator, which Dynamo of 2.11 leaves out of graphs of dynamic shapes
@either("module", tokens, fullgraph=False)
class PytorchEncoderLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.layer = nn.TransformerEncoderLayer(width, sizes.heads, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


# checkpointing


def _causal(q, k, v):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(scores.masked_fill(future, -INF), dim=-1) @ v


@fuses("checkpoint", qkv)
def checkpointed_function(q, k, v):
    return checkpoint(_causal, q, k, v, use_reentrant=False)


@fuses("checkpoint", tokens, sites=2)
class CheckpointedLayers(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList([QueryKeyNorm(sizes), GatedAttention(sizes)])

    def forward(self, x):
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x


# dropout: (q, k, v, ...) -> [B, H, S, Dv], linear in v, so that the dropped weights can be read from the output


class _Dropout(nn.Module):
    rate = 0.25

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dropout = nn.Dropout(self.rate)


@fuses("dropout", qkv, dropout=0.25)
class DropoutModule(_Dropout):
    def forward(self, q, k, v):
        return self.dropout(F.softmax(q @ k.mT * 0.35, dim=-1)) @ v


@fuses("dropout", qkv, dropout=0.25)
class DropoutFunctional(_Dropout):
    def forward(self, q, k, v):
        weights = F.softmax(q @ k.mT * 0.35, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, p=self.rate, training=self.training), v)


@fuses("dropout", qkv, dropout=0.25)
class DropoutAndCausal(_Dropout):
    def forward(self, q, k, v):
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        weights = F.softmax((q @ k.mT * 0.35).masked_fill(future, -INF), dim=-1)
        return self.dropout(weights) @ v


@fuses("dropout", plus(qkv, lambda d: d.normal(1, d.H, d.S, d.S)), dropout=0.25)
class DropoutAndBias(_Dropout):
    def forward(self, q, k, v, bias):
        return torch.einsum("bhqk,bhkd->bhqd", self.dropout((q @ k.mT * 0.35 + bias).softmax(-1)), v)


@fuses("dropout", grouped, dropout=0.25)
class DropoutAndGroupedHeads(_Dropout):
    def forward(self, q, k, v):
        rate = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(rate, 1), v.repeat_interleave(rate, 1)
        return self.dropout(F.softmax(q @ k.mT * 0.35, dim=-1)) @ v


@fuses("dropout", qkv, dropout=0.25)
class DropoutInSdpa(_Dropout):
    def forward(self, q, k, v):
        rate = self.rate if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)


@fuses("dropout", qkv, modes=(INFERENCE,))
class DropoutInEvaluation(_Dropout):
    def forward(self, q, k, v):
        return self.dropout(F.softmax(q @ k.mT * 0.35, dim=-1)) @ v


@fuses("dropout", qkv)
class DropoutOfRateZero(_Dropout):
    rate = 0.0

    def forward(self, q, k, v):
        return self.dropout(F.softmax(q @ k.mT * 0.35, dim=-1)) @ v


@fuses("dropout", qkv)
class DropoutOnTheOutput(_Dropout):
    rate = 0.0

    def forward(self, q, k, v):
        return self.dropout(F.softmax(q @ k.mT * 0.35, dim=-1) @ v)
