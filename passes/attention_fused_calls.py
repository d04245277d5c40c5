"""Calls that are attention by name: ``scaled_dot_product_attention`` and ``multi_head_attention_forward``."""

import inspect
import math
import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from vbcompile.passes.attention_checks import check_dropout, check_operands
from vbcompile.passes.attention_expression import BOOL, Algebra, Expression
from vbcompile.passes.attention_lift import Lifter, Refusal
from vbcompile.passes.attention_masks import split_logits
from vbcompile.passes.attention_matcher import Matcher
from vbcompile.passes.attention_site import Detail, Operand, Site
from vbcompile.passes.graph_autocast import under_autocast
from vbcompile.passes.graph_axes import AxisError, Dim, Dims, Space, broadcast_input, product
from vbcompile.passes.graph_emit import Emitter
from vbcompile.passes.graph_ops import call_of, is_tensor, known_equal, shape_of, tensor_of, value_of

_MHA_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


# ------------------------------------------------------------------------------------ scaled_dot_product_attention
def match_sdpa(matcher: Matcher, node: fx.Node, detail: Detail) -> Site:
    """The site of an SDPA call, with SDPA's own meaning of rows without a key (zero); raises Refusal."""
    call = call_of(node)
    assert call is not None
    q, k, v = call.get("query"), call.get("key"), call.get("value")
    if not all(is_tensor(t) for t in (q, k, v, node)):
        raise Refusal("operands that are not plain tensors")
    matcher.check_place(node)
    space = Space()
    out_dims = tuple(space.dim(size) for size in shape_of(node))
    keys, features = space.dim(shape_of(k)[-2]), space.dim(shape_of(q)[-1])
    batch, rows = out_dims[:-2], out_dims[-2]
    grouped = call.get("enable_gqa") is True
    k_batch, v_batch = (_batch(space, batch, t, grouped) for t in (k, v))
    site = _new_site(
        matcher, space, Operand(node, out_dims), rows, keys, features,
        q=Operand(q, (*_batch(space, batch, q, False), rows, features)),
        k=Operand(k, (*k_batch, keys, features)),
        v=Operand(v, (*v_batch, keys, out_dims[-1])),
    )  # fmt: skip
    site.spread = detail is Detail.SPREAD
    lifter = _lifter(matcher, site, detail)
    mask = call.get("attn_mask")
    logits = site.algebra.score
    if mask is not None:
        logits = add_mask(lifter, logits, mask, broadcast_input((*batch, rows, keys), shape_of(mask)), True)
    if call.get("is_causal", False) is not False:
        logits = _causal(lifter, logits, call.get("is_causal"), rows, keys)
    site.logits = split_logits(site.algebra, logits, keys, guard=matcher.guard(node))
    _set_scale(site, call.get("scale"), q)
    site.dropout = check_dropout(call.get("dropout_p", 0.0))
    check_operands(site)
    return site


def _new_site(
    matcher: Matcher,
    space: Space,
    out: Operand,
    rows: Dim,
    keys: Dim,
    features: Dim,
    q: Operand,
    k: Operand,
    v: Operand,
) -> Site:
    algebra = Algebra()
    return Site(
        space, algebra, q, k, v, out.node, out.dims, rows, keys, features, values=out.dims[-1],
        logits=split_logits(algebra, algebra.score, keys), empty_rows="zero", region={out.node},
        score_dtype=tensor_of(out.node).dtype, first=matcher.effects.position[out.node],
    )  # fmt: skip


def _lifter(matcher: Matcher, site: Site, detail: Detail) -> Lifter:
    place = matcher.effects.position[site.out]
    return matcher.lifter(site.space, site.algebra, None, place - 1, place, detail)


def _batch(space: Space, batch: Dims, operand: fx.Node, grouped: bool) -> Dims:
    """Batch dimensions of an operand; with grouped heads, the outer part of the head axis."""
    shape = shape_of(operand)[:-2]
    if not grouped or known_equal(shape[-1], product(batch[-1])):
        return broadcast_input(batch, shape)
    outer, _ = space.regroup((batch[-1],), (shape[-1], product(batch[-1]) // shape[-1]))
    return (*broadcast_input(batch[:-1], shape[:-1]), outer)


def add_mask(lifter: Lifter, logits: Expression, mask: fx.Node, dims: Dims, keep: bool) -> Expression:
    """Logits with a boolean mask (``keep``: the value of keys that take part) or an additive one."""
    value = lifter.lift(mask, dims)
    make = lifter.algebra.make
    if value.kind != BOOL and tensor_of(mask).dtype != torch.bool:
        return make("add", logits, make("to_float", value))
    condition = make("to_bool", value)
    return make("where", condition if keep else make("not", condition), logits, lifter.algebra.const(float("-inf")))


def _causal(lifter: Lifter, logits: Expression, flag: Any, rows: Dim, keys: Dim) -> Expression:
    if value_of(flag) is not True:
        raise Refusal("whether the mask is causal is known only at run time")
    make = lifter.algebra.make
    inside = make("le", lifter.index(keys), lifter.index(rows))
    return make("where", inside, logits, lifter.algebra.const(float("-inf")))


def _set_scale(site: Site, scale: Any, q: fx.Node) -> None:
    value, features = value_of(scale), shape_of(q)[-1]
    if isinstance(value, (int, float)):
        site.logits.scale = float(value)
    elif scale is None and isinstance(features, int):
        site.logits.scale = 1.0 / math.sqrt(features)
    elif scale is None:
        site.logits.features_of = q
    elif isinstance(scale, fx.Node) and isinstance(value, torch.SymFloat):
        site.logits.scalar = scale
    else:
        raise Refusal("a scale that is no number")


# ------------------------------------------------------------------------------------ multi_head_attention_forward
def is_multi_head(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is F.multi_head_attention_forward


@dataclass
class MultiHead:
    """One call, its arguments by name."""

    node: fx.Node
    arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.arguments[name]


@dataclass
class Expanded:
    """A multi-head call written as projections around an SDPA node that has no masks yet.

    Nothing reads the new nodes until :meth:`finish`; :meth:`undo` removes them.
    """

    call: MultiHead
    attention: fx.Node
    output: fx.Node
    emitter: Emitter

    def finish(self) -> None:
        result = next(u for u in self.call.node.users if u.args[1] == 0)
        result.replace_all_uses_with(self.output)
        for user in list(self.call.node.users):
            user.graph.erase_node(user)
        self.call.node.graph.erase_node(self.call.node)

    def undo(self) -> None:
        self.emitter.undo()


def without_weights(node: fx.Node) -> MultiHead:
    """The call, provided that nobody reads the weights that it returns; raises Refusal where somebody does."""
    bound = _MHA_SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    for user in node.users:
        is_item = user.op == "call_function" and user.target is operator.getitem
        if not is_item or (user.args[1] != 0 and user.users):
            raise Refusal("the attention weights are returned")
    if not any(user.args[1] == 0 for user in node.users):
        raise Refusal("nobody reads the result")
    return MultiHead(node, dict(bound.arguments))


def expand_multi_head(matcher: Matcher, call: MultiHead) -> Expanded:
    """Write the projections of a multi-head call into the graph; raises Refusal before anything is changed."""
    matcher.check_place(call.node)
    _check_multi_head(call)
    result = next(u for u in call.node.users if u.args[1] == 0)
    within = partial(under_autocast, tensor_of(call.query).device.type, matcher.autocast_at(call.node))
    emitter = Emitter(call.node, matcher.effects.position, within)
    q, k, v = _project(emitter, call)
    call = _with_longer_masks(emitter, call)
    attention = emitter.function(F.scaled_dot_product_attention, q, k, v)
    output = emitter.with_strides(_project_out(emitter, call, attention), tensor_of(result))
    if tensor_of(output).dtype != tensor_of(result).dtype:
        emitter.undo()
        raise Refusal("a multi-head call of mixed precision")
    output.meta["example_value"] = tensor_of(result)
    return Expanded(call, attention, output, emitter)


def _check_multi_head(call: MultiHead) -> None:
    if call.static_k is not None or call.static_v is not None:
        raise Refusal("keys or values that are given already projected (static_k, static_v)")
    if len(shape_of(call.query)) not in (2, 3):
        raise Refusal("queries of an unknown layout")
    if not isinstance(call.num_heads, int) or not isinstance(call.training, bool):
        raise Refusal("settings that are known only at run time")
    if call.is_causal and call.attn_mask is None:
        raise Refusal("is_causal without a mask")
    check_dropout(call.dropout_p if call.training else 0.0)


def _project(emitter: Emitter, call: MultiHead) -> list[fx.Node]:
    """Queries, keys and values, ``[N, heads, length, features]`` each."""
    inputs = [call.query, call.key, call.value]
    if len(shape_of(call.query)) == 2:
        unbatched = {x: emitter.method("unsqueeze", x, 1) for x in dict.fromkeys(inputs)}
        inputs = [unbatched[x] for x in inputs]
    heads = []
    for x, one_more in zip(_linear_inputs(emitter, call, inputs), (None, call.bias_k, call.bias_v), strict=True):
        if one_more is not None:
            x = emitter.function(torch.cat, [x, emitter.method("expand", one_more, (-1, *_sizes(emitter, x)[1:]))])
        split = emitter.method("unflatten", x, -1, (call.num_heads, shape_of(x)[-1] // call.num_heads))
        heads.append(emitter.method("permute", split, (1, 2, 0, 3)))
    if call.add_zero_attn:
        heads[1:] = [_with_a_zero(emitter, x) for x in heads[1:]]
    return heads


def _sizes(emitter: Emitter, node: fx.Node) -> list[Any]:
    return [emitter.method("size", node, d) if isinstance(n, torch.SymInt) else n for d, n in enumerate(shape_of(node))]


def _with_a_zero(emitter: Emitter, heads: fx.Node) -> fx.Node:
    n, count, _, features = _sizes(emitter, heads)
    return emitter.function(torch.cat, [heads, emitter.method("new_zeros", heads, (n, count, 1, features))], 2)


def _with_longer_masks(emitter: Emitter, call: MultiHead) -> MultiHead:
    """The call with masks that show the keys which it adds itself."""
    added = (call.bias_k is not None) + bool(call.add_zero_attn)
    masks = {
        name: call.arguments[name] for name in ("attn_mask", "key_padding_mask") if call.arguments[name] is not None
    }
    if added == 0 or _trusts_is_causal(call):
        return call
    longer = {name: emitter.function(F.pad, mask, (0, added)) for name, mask in masks.items()}
    return MultiHead(call.node, {**call.arguments, **longer})


def _trusts_is_causal(call: MultiHead) -> bool:
    """Whether PyTorch takes ``is_causal`` in place of the mask."""
    return bool(call.is_causal and call.key_padding_mask is None and not call.need_weights)


def _linear_inputs(emitter: Emitter, call: MultiHead, inputs: list[fx.Node]) -> list[fx.Node]:
    biases: list[Any] = [None] * 3
    packed = call.in_proj_bias
    if not call.use_separate_proj_weight and inputs[0] is inputs[1] is inputs[2]:
        joint = emitter.function(F.linear, inputs[0], call.in_proj_weight, packed)
        return _thirds(emitter, joint, -1)
    if packed is not None:
        biases = _thirds(emitter, packed, 0)
    if call.use_separate_proj_weight:
        weights = [call.q_proj_weight, call.k_proj_weight, call.v_proj_weight]
    else:
        weights = _thirds(emitter, call.in_proj_weight, 0)
    return [emitter.function(F.linear, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _thirds(emitter: Emitter, node: fx.Node, dim: int) -> list[fx.Node]:
    parts = emitter.method("chunk", node, 3, dim)
    return [emitter.function(operator.getitem, parts, n) for n in range(3)]


def _project_out(emitter: Emitter, call: MultiHead, attention: fx.Node) -> fx.Node:
    """``[length, N, features]`` (without N for unbatched input)."""
    rows_first = emitter.method("transpose", attention, 1, 2)
    flat = emitter.method("flatten", rows_first, 2)
    output = emitter.function(F.linear, flat, call.out_proj_weight, call.out_proj_bias)
    output = emitter.method("transpose", output, 0, 1)
    return emitter.method("squeeze", output, 1) if len(shape_of(call.query)) == 2 else output


def match_inner(matcher: Matcher, expanded: Expanded, detail: Detail) -> Site:
    """The site of the attention inside an expanded multi-head call, with the call's masks."""
    call = expanded.call
    site = match_sdpa(matcher, expanded.attention, detail)
    lifter = _lifter(matcher, site, detail)
    scale, features_of = site.logits.scale, site.logits.features_of
    n, heads = site.out_dims[:2]
    logits = site.algebra.score
    if _trusts_is_causal(call):
        logits = _causal(lifter, logits, True, site.rows, site.keys)
    elif call.attn_mask is not None:
        logits = add_mask(lifter, logits, call.attn_mask, _mask_dims(site, call.attn_mask, n, heads), False)
    if call.key_padding_mask is not None:
        padding = call.key_padding_mask
        dims: Dims = (n, site.keys) if len(shape_of(padding)) == 2 else (site.keys,)
        logits = add_mask(lifter, logits, padding, broadcast_input(dims, shape_of(padding)), False)
    site.logits = split_logits(site.algebra, logits, site.keys)
    site.logits.scale, site.logits.features_of = scale, features_of
    site.empty_rows = "nan" if call.need_weights else "zero"  # with weights, PyTorch calls its plain softmax
    site.dropout = check_dropout(call.dropout_p if call.training else 0.0)
    return site


def _mask_dims(site: Site, mask: fx.Node, n: Dim, heads: Dim) -> Dims:
    shape = shape_of(mask)
    if len(shape) == 2:
        return broadcast_input((site.rows, site.keys), shape)
    joint = (*n, *heads)
    if not known_equal(shape[0], product(joint)):
        raise AxisError("a mask of an unknown layout")
    return (joint, *broadcast_input((site.rows, site.keys), shape[1:]))
