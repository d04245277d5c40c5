"""The outer graph of a streamed model: transfers as nodes, in the plan's order, around compiled segments.

It is executed as it is written. Inside one Inductor graph the scheduler would move each prefetch back to its wait.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from vbcompile.handles_store import store_of
from vbcompile.passes.offload_segments import Segment, lookup_operands
from vbcompile.passes.offload_training import Streamed, TrainedSegment
from vbcompile.vgpu_plan import DEVICE, Plan


# nodes of the outer graph; ``key`` names the store, so that a graph holds no pointer to it
def begin(key: str, first: int) -> None:
    """A graph begins whose first operator is ``first``."""
    store_of(key).begin(first)


def prefetch(key: str, copy: int) -> None:
    """Hand a copy of the plan to its link."""
    store_of(key).prefetch(copy)


def wait(key: str, copy: int) -> Tensor:
    """The weight of a copy; what is queued from here on runs when it has arrived."""
    return store_of(key).wait(copy)


def release(key: str, copy: int) -> None:
    """Nothing that is queued from here on reads this copy."""
    store_of(key).release(copy)


def resident(key: str, weight: int) -> Tensor:
    """A weight that stays on the device."""
    return store_of(key).resident(weight)


def rows(key: str, weight: int, indices: Tensor) -> Tensor:
    """Rows of a matrix that stays on the host."""
    return store_of(key).rows(weight, indices)


def write_back(key: str, weight: int) -> None:
    """The computation has written to a resident weight."""
    store_of(key).write_back(weight)


def end(key: str, last: int) -> None:
    """The graph has been queued, whose last operator is ``last``."""
    store_of(key).end(last)


class CompiledSegment(nn.Module):
    """A compiled stretch of the graph, an operator of the plan; identical stretches share the compiled code."""

    def __init__(self, compiled: Callable[..., Any], key: str, operator: int) -> None:
        super().__init__()
        self.compiled, self.key, self.operator = compiled, key, operator

    def forward(self, *args: Any) -> Any:
        store = store_of(self.key)
        store.operator_begin(self.operator)
        results = self.compiled(*args)
        store.operator_end(self.operator)
        return results


class Piece(NamedTuple):
    """A segment of the graph, and how it runs.

    Attributes:
        extra: Further inputs: the numbers that symbolic sizes are made of.
    """

    segment: Segment
    extra: tuple[fx.Node, ...]
    compiled: Callable[..., Any]


class Layout(NamedTuple):
    """Where the weights of a graph are in the plan.

    Attributes:
        weights: Index of each weight in the plan.
        parts: Which tensor of a bundle an input is, where it is one.
        written: Weights that the graph writes to.
        start, last: Indices of the graph's first and last operator in the plan.
        training: Whether the second half of these is the backward.
    """

    key: str
    plan: Plan
    weights: Mapping[fx.Node, int]
    parts: Mapping[fx.Node, int]
    written: frozenset[fx.Node]
    start: int
    last: int
    training: bool


def emit(
    graph: fx.Graph, arguments: int, pieces: Sequence[Piece], returned: Sequence[fx.Node], layout: Layout
) -> fx.GraphModule:
    """The outer graph, with the outputs of ``graph`` and the first ``arguments`` of its inputs.

    ``returned`` are views of weights that the graph returns: they are fetched on demand.
    """
    return _Emitter(graph, arguments, pieces, returned, layout).run()


class _Emitter:
    def __init__(
        self,
        graph: fx.Graph,
        arguments: int,
        pieces: Sequence[Piece],
        returned: Sequence[fx.Node],
        layout: Layout,
    ) -> None:
        self.source, self.pieces, self.layout = graph, pieces, layout
        self.arguments, self.returned = arguments, returned
        self.outer = fx.Graph()
        self.known: dict[fx.Node, fx.Node] = {}
        self.arrived: dict[int, fx.Node] = {}  # weight -> node that holds it now
        self.modules: dict[str, nn.Module] = {}
        self.issued = _issued(layout.plan)
        self.operator = layout.start

    def run(self) -> fx.GraphModule:
        for node in self.source.find_nodes(op="placeholder")[: self.arguments]:
            self.known[node] = self.outer.placeholder(node.name)
        self._call(begin, self.layout.start)
        for number, piece in enumerate(self.pieces):
            self._piece(number, piece)
        if not self.layout.training:
            self._call(end, self.layout.last)
        results = {node: self.known[node] for node in self.known}
        for node in self.returned:
            results[node] = self.outer.node_copy(node, results.__getitem__)
        for node in self.source.output_node().all_input_nodes:
            if node in self.returned:
                results[node] = self.outer.call_method("clone", (results[node],))
        self.outer.output(fx.map_arg(self.source.output_node().args[0], results.__getitem__))
        self.outer.lint()
        return fx.GraphModule(self.modules, self.outer)

    def _piece(self, number: int, piece: Piece) -> None:
        plan, operator = self.layout.plan, self.layout.start + number
        self.operator = operator
        for copy in plan.waits[operator]:
            self.arrived[plan.copies[copy].weight] = self._call(wait, copy)
        results = self._run(number, piece)
        for position, node in enumerate(piece.segment.outputs):
            self.known[node] = self.outer.call_function(_item, (results, position))
        for weight in piece.segment.weights:
            if weight in self.layout.written:
                self._call(write_back, self.layout.weights[weight])
        for copy in plan.releases[operator]:
            self._call(release, copy)
            self.arrived.pop(plan.copies[copy].weight, None)
        for copy in self.issued[operator]:
            self._call(prefetch, copy)

    def _run(self, number: int, piece: Piece) -> fx.Node:
        lookup = piece.segment.lookup
        if lookup is not None:
            indices, matrix = lookup_operands(lookup)
            weight = self.layout.weights.get(matrix)
            if weight is not None and self.layout.plan.levels[weight] != DEVICE:
                found = self._call(rows, weight, self._value(indices))
                return self.outer.call_function(_tuple, (found,))
        name, code = f"segment_{number}", CompiledSegment(piece.compiled, self.layout.key, self.operator)
        inputs = tuple(self._value(node) for node in (*piece.segment.inputs, *piece.extra))
        if not self.layout.training:
            self.modules[name] = code
            return self.outer.call_module(name, inputs)
        self.modules[name] = TrainedSegment(code, self._streamed(number, piece))
        return self.outer.call_module(name, (*inputs, *(self.known.get(node) for node in piece.segment.weights)))

    def _streamed(self, number: int, piece: Piece) -> Streamed:
        operator = self.layout.last - number if len(self.pieces) > 1 else self.layout.last
        weights = tuple(self.layout.weights[node] for node in piece.segment.weights)
        written = frozenset(self.layout.weights[node] for node in self.layout.written)
        last, issued = operator == self.layout.last, tuple(self.issued[operator])
        return Streamed(self.layout.key, weights, operator, last, issued, written)

    def _value(self, node: fx.Node) -> fx.Node:
        weight = self.layout.weights.get(node)
        if weight is None:
            return self.known[node]
        if weight not in self.arrived:
            self.arrived[weight] = self._arrival(weight)
        part = self.layout.parts.get(node)
        held = self.arrived[weight]
        return held if part is None else self.outer.call_function(_item, (held, part))

    def _arrival(self, weight: int) -> fx.Node:
        """A weight that no copy brings for this operator: it is resident, or held since a graph before this one."""
        plan = self.layout.plan
        if plan.levels[weight] == DEVICE:
            return self._call(resident, weight)
        held = [
            index for index, copy in enumerate(plan.copies)
            if copy.weight == weight and copy.first_use <= self.operator <= copy.last_use
        ]  # fmt: skip
        assert held, f"no copy brings {plan.sweep.weights[weight].name}"
        return self._call(wait, held[0])

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.outer.call_function(function, (self.layout.key, *args))


def _item(results: Sequence[Any], position: int) -> Any:
    return results[position]


def _tuple(value: Any) -> tuple[Any]:
    return (value,)


def _issued(plan: Plan) -> list[list[int]]:
    """For each operator, the copies that are handed to their links behind it."""
    found: list[list[int]] = [[] for _ in plan.sweep.operators]
    operator = -1
    for action, target in plan.program():
        if action == "run":
            operator = target
        elif action == "prefetch":
            found[operator].append(target)
    return found
