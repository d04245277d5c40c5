"""``torch._transformer_encoder_layer_fwd``, what ``nn.TransformerEncoderLayer`` calls in inference, as its parts."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_matcher import Matcher
from vbcompile.passes.graph_emit import Emitter
from vbcompile.passes.graph_ops import is_tensor, shape_of, tensor_of

_PARAMETERS = (
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first",
    "eps", "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2", "ffn_weight_1", "ffn_bias_1",
    "ffn_weight_2", "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip
_PADDING, _MERGED = 1, 2  # masks of [N, L], of [N, heads, L, L]; others are of [L, L]


def is_encoder_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch._transformer_encoder_layer_fwd


@dataclass
class EncoderLayer:
    """A layer that was written out before ``node``; nothing reads it until :meth:`finish`, :meth:`undo` removes it.

    Attributes:
        multi_head: the call of ``F.multi_head_attention_forward`` inside.
    """

    node: fx.Node
    multi_head: fx.Node
    output: fx.Node
    emitter: Emitter

    def finish(self) -> None:
        self.node.replace_all_uses_with(self.output)
        self.node.graph.erase_node(self.node)

    def undo(self) -> None:
        self.emitter.undo()


def expand_encoder_layer(matcher: Matcher, node: fx.Node) -> EncoderLayer:
    """Write the layer out; raises Refusal before anything is changed."""
    given: dict[str, Any] = {**dict(zip(_PARAMETERS, node.args, strict=False)), **node.kwargs}
    src, mask = given["src"], given.get("mask")
    matcher.check_place(node)
    if not is_tensor(src) or tensor_of(src).is_nested or len(shape_of(src)) != 3:
        raise Refusal("an encoder layer of something else than a batch of sequences")
    if matcher.autocast_at(node) is not None:
        raise Refusal("autocast around an encoder layer that is one call")
    emitter = Emitter(node, matcher.effects.position)
    norm = lambda x, n: emitter.function(
        F.layer_norm, x, (given["embed_dim"],), given[f"norm_weight_{n}"], given[f"norm_bias_{n}"], given["eps"]
    )
    x = norm(src, 1) if given["norm_first"] else src
    multi_head, x = _attend(emitter, given, x, mask)
    x = emitter.function(torch.add, x, src)
    if not given["norm_first"]:
        x = norm(x, 1)
    y = _feed_forward(emitter, given, norm(x, 2) if given["norm_first"] else x)
    y = emitter.function(torch.add, y, x)
    y = y if given["norm_first"] else norm(y, 2)
    return EncoderLayer(node, multi_head, emitter.with_strides(y, tensor_of(node)), emitter)


def _attend(emitter: Emitter, given: dict[str, Any], x: fx.Node, mask: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    """The multi-head call, and its result; masks are True, or any number but zero, where keys are hidden."""
    masks: dict[str, fx.Node | None] = {"key_padding_mask": None, "attn_mask": None}
    if mask is not None:
        hidden = mask if tensor_of(mask).dtype == torch.bool else emitter.function(torch.ne, mask, 0)
        if given["mask_type"] == _MERGED:
            hidden = emitter.method("flatten", hidden, 0, 1)
        masks["key_padding_mask" if given["mask_type"] == _PADDING else "attn_mask"] = hidden
    x = emitter.method("transpose", x, 0, 1)
    multi_head = emitter.operator(
        F.multi_head_attention_forward, x, x, x, given["embed_dim"], given["num_heads"], given["qkv_weight"],
        given["qkv_bias"], None, None, False, 0.0, given["proj_weight"], given["proj_bias"], False,
        masks["key_padding_mask"], True, masks["attn_mask"],
        value=lambda: (tensor_of(x).new_empty(shape_of(x)), None),
    )  # fmt: skip
    result = emitter.function(operator.getitem, multi_head, 0)
    return multi_head, emitter.method("transpose", result, 0, 1)


def _feed_forward(emitter: Emitter, given: dict[str, Any], x: fx.Node) -> fx.Node:
    hidden = emitter.function(F.linear, x, given["ffn_weight_1"], given["ffn_bias_1"])
    if given["use_gelu"]:  # PyTorch's call takes the approximation on GPUs
        approximate = "tanh" if tensor_of(x).is_cuda else "none"
        hidden = emitter.function(F.gelu, hidden, approximate=approximate)
    else:
        hidden = emitter.function(F.relu, hidden)
    return emitter.function(F.linear, hidden, given["ffn_weight_2"], given["ffn_bias_2"])
