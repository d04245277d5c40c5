"""The joint forward and backward graph as the memory passes see it: what is saved, what it costs to make it again.

Forward operators are of three kinds. Views and pointwise operators, norms and reductions are *cheap*: the backward may
run them again. Matrix products and convolutions are *costly*: again only where the plan says so. All others are
*fixed* (random numbers, attention, custom operators, whatever writes in place): never again.

Of all sets of tensors from which the backward can be computed by cheap operators alone, the smallest is found as a
minimum cut (Chen et al., "Training deep nets with sublinear memory cost", 2016, gave the idea of recomputing; PyTorch's
own partitioner the cut), and of several the one nearest to the backward.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx

from vbcompile.compat import OperatorKinds
from vbcompile.compat_symbols import bytes_hint

_SMALL_RESULT = 64  # times smaller than what it summarises
_LONGEST_CHAIN = 64  # cheap operators that are run again one behind the other: a tensor in between is saved


@dataclass
class JointGraph:
    """One joint graph.

    Attributes:
        graph: From AOTAutograd, after Inductor's own passes.
        outputs: Number of outputs that belong to the forward.
        kinds: PyTorch's lists of operators.
    """

    graph: fx.Graph
    outputs: int
    kinds: OperatorKinds = field(default_factory=OperatorKinds)

    @cached_property
    def backward(self) -> dict[fx.Node, None]:
        """What depends on the gradients that come in, in order."""
        found: dict[fx.Node, None] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if "tangents" in str(node.target):
                    found[node] = None
            elif node.op != "output" and any(source in found for source in node.all_input_nodes):
                found[node] = None
        return found

    @cached_property
    def forward(self) -> dict[fx.Node, None]:
        """Operators that the forward's results, and what it writes to inputs, are made from, in order."""
        results = self._output_nodes()[: self.outputs]
        wanted = {node for node in results if node is not None} | self._writes
        for node in reversed(self.graph.nodes):
            if node in wanted:
                wanted.update(node.all_input_nodes)
        found: dict[fx.Node, None] = {}
        for node in self.graph.nodes:
            # a further result of a forward operator is made with it, even if only the backward reads it
            made = node in wanted or (_is_selection(node) and node.args[0] in found)
            if made and node.op == "call_function" and node not in self.backward:
                found[node] = None
        return found

    @cached_property
    def results(self) -> set[fx.Node]:
        """Operators whose value leaves the graph, directly or as the base of a view."""
        found = {node for node in self._output_nodes() if node is not None}
        for node in reversed(self.graph.nodes):
            if node in found and node.op == "call_function" and self.kinds.is_view(node):
                found.update(node.all_input_nodes)
        return found

    @cached_property
    def gradients(self) -> tuple[fx.Node, ...]:
        """What the backward returns."""
        return tuple(dict.fromkeys(n for n in self._output_nodes()[self.outputs :] if n is not None))

    @cached_property
    def needed(self) -> dict[fx.Node, None]:
        """Forward operators whose values the rest of the graph reads."""
        ends = set(self.gradients)
        reads = (
            n for n in self.forward if n in ends or any(u.op != "output" and u not in self.forward for u in n.users)
        )
        return dict.fromkeys(reads)

    def _output_nodes(self) -> list[fx.Node | None]:
        values = self.graph.output_node().args[0]
        return [
            v if isinstance(v, fx.Node) else None for v in (values if isinstance(values, (list, tuple)) else [values])
        ]

    def is_cheap(self, node: fx.Node) -> bool:
        """Whether the backward may run this forward operator again at any time."""
        if node.op != "call_function" or _is_number(node):
            return False
        if _is_selection(node):
            return self.is_cheap(node.args[0])  # type: ignore[arg-type]
        if self.kinds.is_saved_by_user(node) or self._reads_what_changes(node):
            return False
        if self.kinds.is_recomputed_by_user(node):
            return not self.kinds.is_random(node)
        return self.kinds.is_view(node) or (self.kinds.is_cheap(node) and not _is_small_result(node))

    def is_costly(self, node: fx.Node) -> bool:
        """Whether running this forward operator again gives the same result, at a price."""
        return self.kinds.is_matrix_product(node) and not self._reads_what_changes(node)

    def _reads_what_changes(self, node: fx.Node) -> bool:
        """The backward would find another value in inputs that the forward writes."""
        return any(source in self._written for source in node.all_input_nodes)

    @cached_property
    def _writes(self) -> set[fx.Node]:
        """What stores new values in inputs; AOTAutograd puts that at the graph's end, though the forward does it."""
        return {n for n in self._copies if n not in self.backward}

    @cached_property
    def _written(self) -> set[fx.Node]:
        return {n.args[0] for n in self._copies if isinstance(n.args[0], fx.Node)}

    @cached_property
    def _copies(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default))

    def smallest_cut(self) -> dict[fx.Node, None]:
        """The tensors to save if all cheap operators, and no others, run again; in order of production."""
        import networkx

        flow = networkx.DiGraph()
        flow.add_nodes_from(("source", "sink"))
        chain: dict[fx.Node, int] = {}
        for node in self.forward:
            if _is_number(node):
                continue
            entry, leave = (node, 0), (node, 1)
            flow.add_edge(entry, leave, capacity=self._price(node))
            sources = [s for s in node.all_input_nodes if s in self.forward and not _is_number(s)]
            chain[node] = max((chain[s] for s in sources), default=0) + (0 if self.kinds.is_view(node) else 1)
            if not self.is_cheap(node) or chain[node] > _LONGEST_CHAIN:
                flow.add_edge("source", entry, capacity=math.inf)
                chain[node] = 0
            for source in sources:
                flow.add_edge((source, 1), entry, capacity=math.inf)
            if node in self.needed:
                flow.add_edge(leave, "sink", capacity=math.inf)
        _, (before, after) = networkx.minimum_cut(flow, "source", "sink")
        return dict.fromkeys(n for n in self.forward if (n, 0) in before and (n, 1) in after)

    def _price(self, node: fx.Node) -> float:
        """What saving costs: bytes; views are made again, and what is no tensor cannot be saved."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or self.kinds.is_view(node):
            return math.inf
        return bytes_hint(value) + 1

    def made_from(self, node: fx.Node, saved: Sequence[fx.Node] | dict[fx.Node, None]) -> list[fx.Node]:
        """Forward operators that have to run to make ``node`` from the other saved tensors; ``node`` comes last."""
        kept = dict.fromkeys(saved)
        seen, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in self.forward and source not in kept and source not in seen and not _is_number(source):
                    seen.add(source)
                    stack.append(source)
        return [n for n in self.forward if n in seen]


def node_bytes(node: fx.Node) -> int:
    """Size in bytes of a node's results."""
    return sum(map(bytes_hint, tensors_of(node)))


def tensors_of(node: fx.Node) -> Iterator[torch.Tensor]:
    """The fake tensors that a node results in."""
    value: Any = node.meta.get("val")
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, torch.Tensor):
            yield item


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _is_selection(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _is_small_result(node: fx.Node) -> bool:
    """Sums and maxima are worth their few bytes: making them again reads everything that they summarise."""
    largest = max((node_bytes(source) for source in node.all_input_nodes), default=0)
    return 0 < node_bytes(node) * _SMALL_RESULT <= largest
