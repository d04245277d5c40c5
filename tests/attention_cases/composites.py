"""Attention inside larger calls: multi-head modules under autocast, compound operators, function transforms."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_cases.case import TRAINING, Draw, Sizes, fuses, plus, tokens


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
