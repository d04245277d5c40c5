"""Activations and SwiGLU gates behind FP4 products, which the products then do themselves.

    down(f(gate(x)) * up(x))          two layers of one input
    gate, up = layer(x).chunk(2, -1)  one layer that holds both, in either order
    f(layer(x))                       f: SiLU, GELU (both forms), ReLU

A gated weight is packed with its rows in turns of gate and up, so every graph that shares it must want it so: what is
found here does not depend on the number of rows of x.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from vbcompile.kernels.fp4_epilogue import TURN, gated
from vbcompile.passes.fp4_sites import LinearSite
from vbcompile.passes.graph_ops import call_of, value_of

_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}


@dataclass(frozen=True)
class Epilogue:
    """What a product does to its sums, and which node then is its result.

    Attributes:
        name: as ``vblackwell::fp4_linear`` calls it.
        layers: the linear layers, the gate first.
        between: nodes from the layers to the result that nobody else reads, the last ones first.
        result: the node whose value the product gives.
        gate: which half of the weight's rows is the gate: ``first``, ``second``, or nothing where there is none.
    """

    name: str
    layers: tuple[fx.Node, ...]
    between: tuple[fx.Node, ...]
    result: fx.Node
    gate: str = ""


def find_epilogues(sites: Iterable[Any]) -> list[Epilogue]:
    """Those behind the linear layers among ``sites``; no layer is in two."""
    layers = {site.node for site in sites if isinstance(site, LinearSite)}
    found = [_halves(layer) or _pair(layer, layers) or _alone(layer) for layer in layers]
    pairs = {layer for e in found if e is not None and len(e.layers) == 2 for layer in e.layers}
    return [e for e in found if e is not None and (len(e.layers) == 2 or e.layers[0] not in pairs)]


def _alone(layer: fx.Node) -> Epilogue | None:
    user = _only_user(layer)
    name = None if user is None else _function(user, layer)
    if name is None or user is None or not _alike(layer, user):
        return None
    return Epilogue(name, (layer,), (), user)


def _pair(gate: fx.Node, layers: set[fx.Node]) -> Epilogue | None:
    alone = _alone(gate)
    product = None if alone is None else _only_user(alone.result)
    if alone is None or product is None:
        return None
    up = _other_factor(product, alone.result)
    if up not in layers or up is gate or _only_user(up) is not product or not _alike(gate, up, product):
        return None
    if value_of(gate).shape[-1] % TURN:
        return None
    return Epilogue(gated(alone.name), (gate, up), (alone.result,), product, "first")


def _halves(layer: fx.Node) -> Epilogue | None:
    """A layer whose result is cut in two."""
    cut = _only_user(layer)
    width = value_of(layer).shape[-1]
    if cut is None or not _cuts_in_half(cut, width) or width % (2 * TURN):
        return None
    parts = {user.args[1]: user for user in cut.users if user.target is operator.getitem}
    if len(cut.users) != 2 or set(parts) != {0, 1}:
        return None
    for place, other in ((0, 1), (1, 0)):
        activation = _only_user(parts[place])
        name = None if activation is None else _function(activation, parts[place])
        product = None if activation is None else _only_user(activation)
        if name is None or activation is None or product is None:
            continue
        if _other_factor(product, activation) is not parts[other] or _only_user(parts[other]) is not product:
            continue
        if _alike(parts[place], activation, product) and value_of(layer).dtype == value_of(product).dtype:
            between = (activation, *parts.values(), cut)
            return Epilogue(gated(name), (layer,), between, product, "second" if place else "first")
    return None


def _cuts_in_half(node: fx.Node, width: int) -> bool:
    call = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    arguments = dict(zip(("size", "dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    size = next((arguments[name] for name in ("size", "chunks", "split_size", "split_size_or_sections")
                 if name in arguments), None)  # fmt: skip
    if arguments.get("dim", 0) not in (-1, getattr(value_of(node.args[0]), "ndim", 0) - 1):
        return False
    if call == "chunk":
        return isinstance(size, int) and size == 2
    sizes = [size] * (width // size) if isinstance(size, int) and size > 0 else size
    return call == "split" and isinstance(sizes, (list, tuple)) and list(sizes) == [width // 2] * 2


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _function(node: fx.Node, source: fx.Node) -> str | None:
    """The activation of ``source`` that a node is; it may write into ``source``, which nobody else reads."""
    if not node.args or node.args[0] is not source or node.all_input_nodes != [source]:
        return None
    if node.op == "call_method":
        return "relu" if node.target in ("relu", "relu_") else None
    name = _FUNCTIONS.get(node.target) if callable(node.target) else None
    if name != "gelu":
        return name
    approximate = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))


def _other_factor(product: fx.Node, factor: fx.Node) -> Any:
    call = call_of(product)
    if call is None or call.in_place or call.name != "mul":
        return None
    one, other = call.input, call.get("other")
    return other if one is factor else one if other is factor else None


def _alike(*nodes: fx.Node) -> bool:
    """Whether values have one shape and dtype."""
    first, *others = (value_of(node) for node in nodes)
    return all(other.shape == first.shape and other.dtype == first.dtype for other in others)
