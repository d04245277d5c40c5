"""New nodes in a torch-level graph, with the metadata that Dynamo's own nodes have."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from vbcompile.compat_symbols import symbolic_operators
from vbcompile.passes.graph_axes import Dim, Dims, product
from vbcompile.passes.graph_gradients import records_at, wants_gradient
from vbcompile.passes.graph_ops import known_equal, tensor_of, value_of

_CUTS = ("detach", torch.detach)


class Emitter:
    """Adds nodes before one node of a graph; they inherit its source position.

    Args:
        before: new nodes go right before this one.
        position: place of every node; new nodes get the place of ``before``.
        within: the mode that new nodes run under, such as autocast.

    Attributes:
        made: the new nodes.
    """

    def __init__(
        self,
        before: fx.Node,
        position: dict[fx.Node, int],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.graph = before.graph
        self.before = before
        self.position = position
        self._within = within
        self.made: list[fx.Node] = []
        self._meta = {
            k: v for k, v in before.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")
        }
        self._mode = next(
            (v.fake_mode for v in map(value_of, [before, *before.all_input_nodes]) if isinstance(v, FakeTensor)), None
        )

    @cached_property
    def _records(self) -> bool:
        return records_at(self.before)

    def function(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        return self._finish(node, lambda a, k: target(*a, **k))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_method(name, args, kwargs)
        return self._finish(node, lambda a, k: getattr(a[0], name)(*a[1:], **k))

    def operator(self, target: Any, *args: Any, value: Any) -> fx.Node:
        """A call whose fake result ``value()`` makes, for operators that are slow to run on fake tensors."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args)
        return self._finish(node, lambda a, k: value())

    def _finish(self, node: fx.Node, run: Any) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        node.meta = dict(self._meta)
        if self._mode is None:
            raise RuntimeError("the graph holds no fake tensors")
        operands = pytree.tree_leaves((args, kwargs))
        with self._mode, symbolic_operators(operands), torch.no_grad(), self._within():
            value = node.meta["example_value"] = run(args, kwargs)
        if node.target not in _CUTS and wants_gradient(operands) and self._records:
            for tensor in pytree.tree_leaves(value):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.requires_grad_()
        self.position[node] = self.position[self.before]
        self.made.append(node)
        return node

    def undo(self) -> None:
        """Erase every node made so far (nothing else may read them yet)."""
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()

    # ------------------------------------------------------------------------------------------------------- views
    def arrange(self, node: fx.Node, dims: Dims, target: list[Dim]) -> fx.Node:
        """A view of ``node`` (of dimensions ``dims``, in finest atoms) with one dimension per entry of ``target``.

        Entries that the node does not have become dimensions of size one. Merging atoms that lie apart copies.
        """
        present = {atom for dim in dims for atom in dim}
        wanted: list[Dim] = [group if set(group) & present else () for group in target]
        if list(dims) == wanted:
            return node
        pieces = [piece for dim in dims for piece in _pieces(dim, target)]
        order = [p for group in target for p in sorted(_inside(pieces, group), key=lambda p: group.index(p[0]))]
        if order != pieces:
            if list(dims) != pieces:
                node = self._reshape(node, dims, pieces)
            node = self.method("permute", node, [pieces.index(p) for p in order])
            dims = tuple(order)
        return node if list(dims) == wanted else self._reshape(node, dims, wanted)

    def spread(self, node: fx.Node, dims: Dims, target: list[Dim]) -> tuple[fx.Node, Dims]:
        """The node broadcast to the whole of every merged entry of ``target`` that it covers in part.

        Raises LookupError where the graph has no node that holds a size known at run time only.
        """
        present = {atom for dim in dims for atom in dim}
        missing = [a for group in target if set(group) & present for a in group if a not in present]
        if not missing:
            return node, dims
        for _ in missing:
            node = self.method("unsqueeze", node, -1)
        node = self.method("expand", node, (*(-1 for _ in dims), *(self.size(a.size) for a in missing)))
        return node, (*dims, *((a,) for a in missing))

    def _reshape(self, node: fx.Node, dims: Dims, sizes: list[Dim]) -> fx.Node:
        places = {dim: place for place, dim in enumerate(dims)}
        wanted: list[Any] = [product(dim) for dim in sizes]
        symbolic = [n for n, size in enumerate(wanted) if isinstance(size, SymInt)]
        if len(symbolic) == 1:
            return self.method("reshape", node, tuple(-1 if n in symbolic else size for n, size in enumerate(wanted)))
        inferred = False
        for n in symbolic:
            known = self.method("size", node, places[sizes[n]]) if sizes[n] in places else self._find_size(wanted[n])
            if known is None and inferred:
                raise LookupError(f"no node holds the size {wanted[n]}")
            inferred = inferred or known is None
            wanted[n] = -1 if known is None else known
        return self.method("reshape", node, tuple(wanted))

    def size(self, value: Any) -> Any:
        """The size as a number, or as a node that holds it; raises LookupError where the graph has none."""
        constant = value.node.maybe_as_int() if isinstance(value, SymInt) else value
        if constant is not None:
            return constant
        found = self._find_size(value)
        if found is None:
            raise LookupError(f"no node holds the size {value}")
        return found

    def _find_size(self, size: SymInt) -> fx.Node | None:
        """A node that holds a symbolic size; None where the graph has none before this place."""
        for node in self.graph.nodes:
            if node is self.before:
                break
            value = value_of(node)
            if isinstance(value, SymInt) and known_equal(value, size):
                return node
            for dim, have in enumerate(value.shape) if isinstance(value, Tensor) else ():
                if isinstance(have, SymInt) and known_equal(have, size):
                    return self.method("size", node, dim)
        return None

    def with_strides(self, node: fx.Node, wanted: Tensor) -> fx.Node:
        """The tensor in the memory order of ``wanted`` (of equal shape); a copy only where the order differs."""
        if same_strides(tensor_of(node), wanted):
            return node
        order = sorted(range(wanted.dim()), key=lambda d: (-_hint(wanted.stride(d)), d))
        if order == sorted(order):
            return self.method("contiguous", node)
        node = self.method("contiguous", self.method("permute", node, order))
        return self.method("permute", node, [order.index(d) for d in range(wanted.dim())])


def _hint(stride: Any) -> int:
    return stride.node.hint or 1 if isinstance(stride, SymInt) else stride


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; dimensions of size one do not matter."""
    return all(
        known_equal(size, 1) or known_equal(x, y) for size, x, y in zip(b.shape, a.stride(), b.stride(), strict=True)
    )


def _pieces(dim: Dim, target: list[Dim]) -> list[Dim]:
    """A dimension cut where the target cuts it."""
    pieces: list[Dim] = []
    rest = dim
    while rest:
        group = next(g for g in target if rest[0] in g)
        length = len(group) if rest[: len(group)] == group else 1
        pieces.append(rest[:length])
        rest = rest[length:]
    return pieces


def _inside(pieces: list[Dim], group: Dim) -> list[Dim]:
    return [p for p in pieces if p and p[0] in group]
