"""When the backward makes pointwise results: those that read one tensor come from one kernel.

A gated layer's backward needs the layer's own result again, and the gradients of both halves. All three are functions
of the same tensors, so that Inductor makes them in one kernel as soon as the last of its inputs is there: each then
lives from that kernel on, and products that read one of them run behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch.fx as fx

from vbcompile.passes.activation_graph import JointGraph, node_bytes

_ALIKE = 4  # tensors that one kernel goes through differ at most by this factor in size


@dataclass
class FusedKernels:
    """Operators at which the backward's pointwise results begin, and at which what reads them has run.

    Args:
        index: Operator of each node.
        is_light: Whether a node is a view or pointwise, so that it is fused with others.
        saved: What the forward saves: not made again.
        first: First operator of the backward.
    """

    joint: JointGraph
    index: dict[fx.Node, int]
    is_light: Callable[[fx.Node], bool]
    saved: set[fx.Node]
    first: int

    def begin(self, node: fx.Node, alone: int) -> int:
        """First operator during which a result takes memory; ``alone`` where no other is made with it."""
        return min(alone, self._births.get(node, alone))

    def end(self, node: fx.Node) -> int:
        """Operator at whose end an operator has run, for whatever it reads."""
        return max(self.index[node], self._ends.get(node, 0))

    @cached_property
    def _order(self) -> list[fx.Node]:
        """What runs in the backward: made again, then the backward itself."""
        again = [n for n in self.joint.forward if self.is_light(n) and n not in self.saved and n in self.index]
        return [*again, *(n for n in self.index if n not in self.joint.forward)]

    @cached_property
    def _traits(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int], dict[fx.Node, frozenset[fx.Node]]]:
        """Of each node: the operator whose result it needs last, all operators that it needs, tensors it reads."""
        ready: dict[fx.Node, int] = {}
        needs: dict[fx.Node, int] = {}
        roots: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self._order:
            at, needed, read = self.first, 0, set[fx.Node]()
            for source in node.all_input_nodes:
                if source in ready and self.is_light(source):
                    at, needed = max(at, ready[source]), needed | needs[source]
                    read |= roots[source]
                elif source in ready:
                    at, needed = max(at, self.index[source]), needed | needs[source] | 1 << self.index[source]
                    read.add(source)
                else:
                    read.add(source)
            ready[node], needs[node] = at, needed
            roots[node] = frozenset(read) if self.is_light(node) else frozenset()
        return ready, needs, roots

    def _products(self, node: fx.Node) -> list[fx.Node]:
        """Operators of the backward that read a node's memory and are not fused with it."""
        found, stack = [], [node]
        while stack:
            for user in stack.pop().users:
                if user not in self.index:
                    continue
                if self.joint.kinds.is_view(user):
                    stack.append(user)
                elif not self.is_light(user) and user not in self.joint.forward:
                    found.append(user)
        return found

    @cached_property
    def _births(self) -> dict[fx.Node, int]:
        """For pointwise results that are written to memory by one kernel, the operator behind which that runs."""
        ready, needs, roots = self._traits
        written: dict[fx.Node, int] = {}
        for node in self._order:
            readers = self._products(node) if self.is_light(node) and not self.joint.kinds.is_view(node) else []
            if readers:
                written[node] = sum(1 << i for i in {self.index[r] for r in readers})
        births: dict[fx.Node, int] = {}
        sharing: dict[fx.Node, list[fx.Node]] = {}
        for node in written:
            for root in roots[node]:
                if node_bytes(root) * _ALIKE >= node_bytes(node) and node_bytes(root) <= _ALIKE * node_bytes(node):
                    sharing.setdefault(root, []).append(node)
        for nodes in sharing.values():
            groups: list[list[fx.Node]] = []
            for node in nodes:
                group = next((g for g in groups if self._can_join(node, g, needs, written)), None)
                if group is None:
                    groups.append([node])
                else:
                    group.append(node)
            for group in groups:
                at = max(ready[node] for node in group)
                for node in group if len(group) > 1 else ():
                    births[node] = max(births.get(node, 0), at)
        return births

    @staticmethod
    def _can_join(node: fx.Node, group: list[fx.Node], needs: dict[fx.Node, int], written: dict[fx.Node, int]) -> bool:
        """Whether neither needs a product of the other."""
        return all(not needs[node] & written[other] and not needs[other] & written[node] for other in group)

    @cached_property
    def _ends(self) -> dict[fx.Node, int]:
        """Of pointwise operators and of products that read what a kernel makes: when they have run."""
        ends: dict[fx.Node, int] = {}
        for node, birth in self._births.items():
            for reader in self._products(node):
                ends[reader] = max(ends.get(reader, 0), birth)
        for node in reversed(self._order):
            if not self.is_light(node):
                continue
            later = [ends.get(u, 0) for u in node.users if u in self.index and self.is_light(u) and self._runs(u)]
            own = self._births.get(node)
            ends[node] = own if own is not None else max(later, default=0)
        return ends

    def _runs(self, node: fx.Node) -> bool:
        return node not in self.joint.forward or node not in self.saved
