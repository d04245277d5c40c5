"""Attention calls whose implementation is one of PyTorch's own operators become that operator in the graph.

A custom operator costs the host a way through Python at every call, and hides what is computed around the kernel, masks
above all, from the compiler. Where shapes are fixed and the implementation consists of PyTorch's operators
(``registry.Implementation.inlines``), an inference graph holds these themselves: the choice is then made when it is
compiled. Graphs compiled while an implementation is forced in the process keep choosing at every call.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from vbcompile.device import get_target
from vbcompile.kernels import registry
from vbcompile.kernels.attention_case import make_case


def inline_attention(graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]]) -> int:
    """Rewrite calls in a graph of AOTAutograd without gradients, in place; returns how many.

    Args:
        graph: with the fake value of each node in ``node.meta["val"]``.
        decompositions: of the operators that the compiler does not take.
    """
    count = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.vblackwell.attention.default):
        run = _inlined(*_values(node.args), **node.kwargs)
        if run is not None:
            _replace(node, run, decompositions)
            count += 1
    return count


def has_fixed_layout(values: Iterable[Any]) -> bool:
    """Whether no size or stride of the tensors among some values is symbolic."""
    tensors = (t for t in values if isinstance(t, Tensor))
    return all(type(n) is int for t in tensors for n in (*t.shape, *t.stride()))


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, lambda node: node.meta["val"])


def _inlined(
    q: Tensor, k: Tensor, v: Tensor, captured: list[Tensor], scale: float, dropout_p: float, seed: Tensor | None,
    score_function: str, *, implementations: str = "",
) -> Callable[..., Any] | None:  # fmt: skip
    """What runs the call, if it is to be inlined."""
    if registry.forced_implementation("attention"):
        return None
    if not has_fixed_layout((q, k, v, *captured)):
        return None
    if not isinstance(scale, float) or dropout_p != 0:
        return None
    case = make_case(q, k, v, captured, scale, dropout_p, score_function, traced=True)
    chosen = registry.operator("attention").choose(get_target(q.device), case, implementations).implementation
    return chosen.run if chosen.inlines else None


def _replace(node: fx.Node, run: Callable[..., Any], decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    """Put what ``run`` does in the place of a call."""
    leaves, form = pytree.tree_flatten(node.args)
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def on_tensors(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return run(*pytree.tree_unflatten([next(given) if isinstance(x, fx.Node) else x for x in leaves], form))

    traced = make_fx(on_tensors, dict(decompositions))(*_values(nodes)).graph
    traced.eliminate_dead_code()
    known = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
    with node.graph.inserting_before(node):
        results: Any = node.graph.graph_copy(traced, known)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)
