"""The block of a decoder that the backend's tests compile on every device."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm causal attention written by hand around a residual, with a buffer.

    Args:
        width: of hidden states ``[batch, length, width]``.
        heads: of the queries.
        kv_heads: of keys and values, each shared by a group of query heads; None: as many as ``heads``.
        dropout: rate of the weights' dropout.
        bias: learned bias of the scores, ``[heads, length, length]``.
    """

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads or heads, width // heads
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * self.size)
        self.out = nn.Linear(width, width)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        packed = self.qkv(self.norm(x)).view(b, s, self.heads + 2 * self.kv_heads, self.size).transpose(1, 2)
        q, k, v = packed.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.heads != self.kv_heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / self.size**0.5
        if self.bias is not None:
            scores = scores + self.bias[:, :s, :s]
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        y = self.dropout(scores.softmax(-1)) @ v
        return x + self.gain * self.out(y.transpose(1, 2).reshape(b, s, w))
