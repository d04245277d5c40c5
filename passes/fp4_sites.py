"""Where a graph multiplies by a parameter or buffer: ``linear``, ``addmm``, ``mm`` and ``matmul``."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vbcompile.compat import is_module_state
from vbcompile.handles import is_offloaded
from vbcompile.passes.graph_ops import Call, call_of, describe_site, known_equal, positive_dim, value_of

HEAD_NAMES = ("lm_head", "embed_out", "output_projection")


@dataclass(frozen=True)
class LinearSite:
    """A product with a weight.

    Attributes:
        node: the call.
        x, bias: its operands; bias None or a node.
        weight: placeholder of the weight.
        transposed: the weight is ``[K, N]``.
        unlike: what it does that a linear layer does not; empty where it is one.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None
    unlike: str = ""

    @property
    def name(self) -> str:
        return describe_site(self.node)


def weight_inputs(graph: fx.Graph, example_inputs: list[Any]) -> dict[fx.Node, tuple[int, Tensor]]:
    """Placeholders that hold parameters and buffers, with their position and the live tensor."""
    found = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = example_inputs[position] if position < len(example_inputs) else None
        if is_offloaded(value):
            continue  # packed where it is planned when it is to arrive: by the offload pass
        static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
        if isinstance(value, nn.Parameter) or (static and isinstance(value, Tensor) and is_module_state(node)):
            found[node] = (position, value)
    return found


def add_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new placeholder behind the others; a name that is taken is varied, since it becomes an argument's."""
    others = graph.find_nodes(op="placeholder")
    taken = {node.target for node in others}
    with graph.inserting_after(others[-1]):
        return graph.placeholder(next(n for n in _varied(name) if n not in taken))


def _varied(name: str) -> Iterator[str]:
    yield name
    for number in itertools.count(2):
        yield f"{name}_{number}"


def linear_sites(graph: fx.Graph, weights: dict[fx.Node, tuple[int, Tensor]]) -> Iterator[LinearSite]:
    """The products of the graph whose right factor is one of ``weights``, in order."""
    for node in graph.nodes:
        site = _match(node)
        if site is not None and site.weight in weights:
            yield site


def rematch(site: LinearSite, weights: dict[fx.Node, tuple[int, Tensor]]) -> LinearSite:
    """The site as it is after its operands were rewritten."""
    fresh = _match(site.node)
    assert fresh is not None and fresh.weight in weights
    return fresh


def _match(node: fx.Node) -> LinearSite | None:
    call = call_of(node)
    if call is None or call.in_place or call.name not in ("linear", "matmul", "mm", "addmm"):
        return None
    unlike = ""
    if call.name == "linear":
        x, bias, (weight, flipped) = call.input, call.get("bias"), _source(call.get("weight"))
        transposed = flipped
    elif call.name == "addmm":
        if any(call.get(factor, 1) != 1 for factor in ("beta", "alpha")):
            unlike = "addmm with beta or alpha"
        x, bias, (weight, flipped) = call.get("mat1"), call.input, _source(call.get("mat2"))
        transposed = not flipped
    else:
        x, bias, (weight, flipped) = call.input, None, _source(call.get("other"))
        transposed = not flipped
    if not isinstance(x, fx.Node) or weight is None or getattr(value_of(weight), "ndim", 0) != 2:
        return None
    if bias is not None and not _is_vector(bias, value_of(weight).shape[1 if transposed else 0]):
        unlike = "the added tensor is not one number for each output"
    return LinearSite(node, x, weight, transposed, bias, unlike)


def _is_vector(node: Any, length: Any) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.ndim == 1 and known_equal(value.shape[0], length)


def _source(node: Any) -> tuple[fx.Node | None, bool]:
    """The placeholder behind transposes of a matrix, and whether their number is odd."""
    flipped = False
    while isinstance(node, fx.Node) and node.op != "placeholder":
        call = call_of(node)
        if call is None or call.in_place or getattr(value_of(call.input), "ndim", 0) != 2 or not is_transpose(call):
            return None, False
        node, flipped = call.input, not flipped
    return (node, flipped) if isinstance(node, fx.Node) else (None, False)


def erase_if_unread(node: fx.Node) -> None:
    """Erase a view of a weight, and views of it, that nothing reads any more."""
    call = call_of(node)
    if call is None or call.in_place or call.name not in _VIEWS:
        return
    for user in list(node.users):
        erase_if_unread(user)
    if not node.users:
        node.graph.erase_node(node)


def is_view(call: Call) -> bool:
    """Whether a call gives another view of its input's memory, or may."""
    return call.name in _VIEWS


def is_transpose(call: Call) -> bool:
    """Whether a call does nothing but swap the last two dimensions of a matrix, or of a stack of them."""
    rank, arguments = getattr(value_of(call.input), "ndim", 0), call.arguments
    if call.name == "transpose":
        swapped = {positive_dim(arguments[d], rank) for d in ("dim0", "dim1") if isinstance(arguments.get(d), int)}
        return rank >= 2 and swapped == {rank - 2, rank - 1}
    if call.name == "permute":
        order = [positive_dim(d, rank) for d in arguments.get("dims", ())]
        return rank >= 2 and order == [*range(rank - 2), rank - 1, rank - 2]
    return (rank >= 2 and call.name == "mT") or (rank == 2 and call.name in ("t", "T"))


_VIEWS = {
    "t", "T", "mT", "transpose", "permute", "reshape", "getitem", "detach", "narrow", "select", "unsqueeze", "squeeze",
    "expand", "flatten", "unflatten", "view_as",
}  # fmt: skip


def is_vocabulary_projection(site: LinearSite) -> bool:
    """Whether a site makes logits: by its module's name, or because its weight is an embedding's too."""
    embeddings = (F.embedding, torch.embedding)
    if any(user.target in embeddings for user in site.weight.users):
        return True
    path = site.name.split(" ")[0]
    return any(name in path.replace("'", ".").split(".") for name in HEAD_NAMES)
