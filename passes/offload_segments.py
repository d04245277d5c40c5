"""Cut a torch-level graph at the operators that read weights from elsewhere, into graphs that are compiled one by one.

Order is kept, so that in-place operators, random numbers and assertions stay where they were. A cut is made only where
everything that crosses it is a tensor or a number, outside of function transforms and of regions in another grad mode;
autocast that is open at a cut is closed before it and opened again behind it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vbcompile.passes.graph_effects import storage_of_value, written_tensors
from vbcompile.passes.graph_gradients import recording_at
from vbcompile.passes.graph_ops import call_of, nesting_change, value_of

_ENTER = torch.amp.autocast_mode._enter_autocast
_LEAVE = torch.amp.autocast_mode._exit_autocast
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
# may share memory with their input, and take sizes or shapes from other nodes
_MIXED_VIEWS = {"expand", "expand_as", "view_as", "reshape", "narrow", "select", "getitem", "unflatten", "flatten"}


WRITTEN = "the graph writes to it"


@dataclass
class Segment:
    """A stretch of a graph.

    Attributes:
        nodes: Of the original graph, in order.
        weights: Placeholders of the weights that it reads, in order of first use.
        inputs: Everything it reads, weights first.
        outputs: What later segments, or the graph's output, read of it.
        autocast: Autocast regions that are open when it begins.
        lookup: The embedding that is all of it, where its rows may be read on the host.
    """

    nodes: list[fx.Node]
    weights: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    autocast: list[fx.Node] = field(default_factory=list)
    lookup: fx.Node | None = None


@dataclass(frozen=True)
class Cutting:
    """A graph cut into segments.

    Attributes:
        fixed: Weights that have to stay on the device, each with the reason.
        returned: Views of weights that are made for the graph's output alone, in order; in no segment.
    """

    segments: list[Segment]
    fixed: dict[fx.Node, str]
    returned: list[fx.Node]


def cut(graph: fx.Graph, weights: Mapping[fx.Node, Tensor], largest: int, lookups: bool) -> Cutting:
    """Cut before an operator that reads new weights, if with them a segment would read more than ``largest`` bytes.

    Args:
        graph: Is changed: views of weights move to where they are used, each use having its own.
        weights: Placeholders, each with an ordinary fake tensor in place of the weight.
        largest: Bytes of weights; a single operator may read more.
        lookups: Give embeddings segments of their own.
    """
    views = _Views(graph, weights)
    fixed = _fixed(graph, views)
    views.sink()
    reads = {node: views.weights_of(node) for node in graph.nodes}
    returned = [node for node in graph.nodes if node in views.roots and views.is_returned(node)]
    segments = _group(graph, reads, weights, fixed, largest, lookups, returned)
    _connect(graph, segments, weights)
    return Cutting(segments, fixed, returned)


class _Views:
    """Nodes that are made of weights alone and share their memory: transposes, slices, reshapes."""

    def __init__(self, graph: fx.Graph, weights: Mapping[fx.Node, Tensor]) -> None:
        self.graph = graph
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {weight: frozenset((weight,)) for weight in weights}
        self.values: dict[fx.Node, Any] = dict(weights)
        for node in graph.nodes:
            sources = [n for n in node.all_input_nodes if n in self.roots]
            if sources and len(sources) == len(node.all_input_nodes) and node.op in ("call_function", "call_method"):
                self._follow(node, sources)

    def _follow(self, node: fx.Node, sources: Sequence[fx.Node]) -> None:
        if written_tensors(node) != []:
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        value = _run(node, args, kwargs)
        roots = frozenset[fx.Node]().union(*(self.roots[source] for source in sources))
        memory = {storage_of_value(self.values[root]) for root in roots}
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(part, Tensor) and storage_of_value(part) in memory for part in parts):
            self.roots[node], self.values[node] = roots, value

    def weights_of(self, node: fx.Node) -> list[fx.Node]:
        """Weights whose memory a node reads; views themselves read nothing."""
        if node in self.roots or node.op == "placeholder":
            return []
        found = [root for n in node.all_input_nodes for root in sorted(self.roots.get(n, ()), key=lambda r: r.name)]
        return list(dict.fromkeys(found))

    def is_returned(self, node: fx.Node) -> bool:
        """Whether a view is made for the graph's output."""
        follow = [user for user in node.users if user in self.roots]
        if node.op == "placeholder":
            return False
        return any(user.op == "output" for user in node.users) or any(map(self.is_returned, follow))

    def sink(self) -> None:
        """Give each use of a view a view of its own, right before it; those of the output stay."""
        for node in reversed([n for n in self.roots if n.op != "placeholder"]):
            for user in list(node.users):
                if user.op == "output" or (user in self.roots and self.is_returned(user)):
                    continue
                with self.graph.inserting_before(user):
                    twin = self.graph.node_copy(node, lambda n: n)
                self.roots[twin], self.values[twin] = self.roots[node], self.values[node]
                user.replace_input_with(node, twin)
            if not node.users:
                self.graph.erase_node(node)
                del self.roots[node]


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fixed(graph: fx.Graph, views: _Views) -> dict[fx.Node, str]:
    """Weights that the graph writes to or returns a view of."""
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        written = node.all_input_nodes if (changed := written_tensors(node)) is None else changed
        for target in written:
            for root in views.roots.get(target, ()):
                found.setdefault(root, WRITTEN)
        call = call_of(node)
        if call is not None and call.name in _MIXED_VIEWS and node not in views.roots:
            for source in node.all_input_nodes:
                for root in views.roots.get(source, ()):
                    found.setdefault(root, "a view of it depends on other tensors")
        if node.op != "output" and any(a.op == "get_attr" for a in node.all_input_nodes):
            for source in node.all_input_nodes:
                for root in views.roots.get(source, ()):
                    found.setdefault(root, "a higher-order operator reads it")
    return found


def _group(
    graph: fx.Graph,
    reads: Mapping[fx.Node, list[fx.Node]],
    weights: Mapping[fx.Node, Tensor],
    fixed: Mapping[fx.Node, str],
    largest: int,
    lookups: bool,
    returned: Sequence[fx.Node],
) -> list[Segment]:
    allowed, apart = _allowed_cuts(graph), set(returned)
    segments, held = [Segment([])], 0
    pending: list[fx.Node] = []  # views of weights: they go with what follows
    autocast: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in apart:
            continue
        if _is_prelude(node, reads, weights):
            pending.append(node)
            continue
        fresh = [w for w in reads.get(node, ()) if w not in segments[-1].weights and w not in fixed]
        size = sum(weights[w].nbytes for w in fresh)
        first = pending[0] if pending else node
        alone = lookups and bool(fresh) and is_lookup(node)
        full = bool(fresh) and held > 0 and held + size > largest
        if (full or alone or segments[-1].lookup is not None) and first in allowed:
            if segments[-1].nodes:
                segments.append(Segment([], autocast=list(autocast)))
            held = 0
            segments[-1].lookup = node if alone and not pending else None
        segments[-1].nodes += [*pending, node]
        pending.clear()
        segments[-1].weights += [w for w in reads.get(node, ()) if w not in segments[-1].weights]
        held += size
        if node.target is _ENTER:
            autocast.append(node)
        elif node.target is _LEAVE:
            autocast = [n for n in autocast if n is not node.args[0]]
    segments[-1].nodes += pending
    return [segment for segment in segments if segment.nodes]


def is_lookup(node: fx.Node) -> bool:
    """Whether a node does nothing but read rows of a weight."""
    if node.op != "call_function" or node.target is not F.embedding:
        return False
    changes_weight = (node.args[3] if len(node.args) > 3 else None) or node.kwargs.get("max_norm")
    weight = lookup_operands(node)[1]
    return changes_weight is None and isinstance(weight, fx.Node) and weight.op == "placeholder"


def lookup_operands(node: fx.Node) -> tuple[Any, Any]:
    """Indices and matrix of an embedding."""
    given = dict(zip(("input", "weight"), node.args, strict=False)) | dict(node.kwargs)
    return given.get("input"), given.get("weight")


def _is_prelude(node: fx.Node, reads: Mapping[fx.Node, Any], weights: Mapping[fx.Node, Tensor]) -> bool:
    """Whether a node is a sunk view: made of weights alone, for one user behind it."""
    inputs = node.all_input_nodes
    return bool(inputs) and not reads.get(node) and len(node.users) == 1 and all(_is_weight(n, weights) for n in inputs)


def _is_weight(node: fx.Node, weights: Mapping[fx.Node, Tensor]) -> bool:
    if node.op == "placeholder":
        return node in weights
    return bool(node.all_input_nodes) and all(_is_weight(n, weights) for n in node.all_input_nodes)


def _allowed_cuts(graph: fx.Graph) -> set[fx.Node]:
    """Nodes before which the graph may be cut."""
    last_use: dict[fx.Node, int] = {}
    for place, node in enumerate(graph.nodes):
        for source in node.all_input_nodes:
            last_use[source] = place
    awkward_until, depth = -1, 0
    allowed = set()
    for place, (node, recording) in enumerate(recording_at(graph)):
        if place > awkward_until and depth == 0 and recording == torch.is_grad_enabled():
            allowed.add(node)
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        depth += nesting_change(node) + (name == "_enter_inference_mode") - (name == "_exit_inference_mode")
        if node.op not in ("placeholder", "output") and node.target not in (_ENTER, _LEAVE) and not _may_cross(node):
            awkward_until = max(awkward_until, last_use.get(node, -1))
    return allowed


def _may_cross(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    value = value_of(node)
    return isinstance(value, (Tensor, *_NUMBERS))


def _connect(graph: fx.Graph, segments: Sequence[Segment], weights: Mapping[fx.Node, Tensor]) -> None:
    """Fill in what each segment takes and gives."""
    home = {node: index for index, segment in enumerate(segments) for node in segment.nodes}
    results = set(graph.output_node().all_input_nodes)
    for index, segment in enumerate(segments):
        crossing = []
        for node in segment.nodes:
            for source in node.all_input_nodes:
                outside = source.op == "placeholder" or home.get(source, index) != index
                if outside and source.op != "get_attr" and source.target is not _ENTER:
                    crossing.append(source)
        inputs = list(dict.fromkeys(crossing))
        segment.weights = [n for n in inputs if n in weights]
        segment.inputs = [*segment.weights, *(n for n in inputs if n not in weights)]
        segment.outputs = [
            node for node in segment.nodes
            if node.op != "get_attr" and node.target not in (_ENTER, _LEAVE)
            and (node in results or any(home.get(user, index) != index for user in node.users))
        ]  # fmt: skip


def joined(graph: fx.Graph, cutting: Cutting, weights: Mapping[fx.Node, Tensor]) -> list[Segment]:
    """The segments as few as possible: embeddings whose rows are read on the host stay apart."""
    found: list[Segment] = []
    for segment in cutting.segments:
        if found and segment.lookup is None and found[-1].lookup is None:
            found[-1].nodes += segment.nodes
        else:
            found.append(Segment(list(segment.nodes), autocast=list(segment.autocast), lookup=segment.lookup))
    _connect(graph, found, weights)
    return found


def whole(graph: fx.Graph, cutting: Cutting) -> Segment:
    """The graph as one segment."""
    apart = set(cutting.returned)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output") and node not in apart]
    inputs = [
        n for n in graph.find_nodes(op="placeholder") if any(u.op != "output" and u not in apart for u in n.users)
    ]
    outputs = [n for n in graph.output_node().all_input_nodes if n.op != "placeholder" and n not in apart]
    weights = list(dict.fromkeys(node for segment in cutting.segments for node in segment.weights))
    return Segment(nodes, weights, [*weights, *(n for n in inputs if n not in weights)], outputs)


def build(root: fx.GraphModule, segment: Segment, extra: Iterable[fx.Node] = ()) -> fx.GraphModule:
    """The segment as a module of its own: inputs in order (then ``extra``), outputs as a tuple."""
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in (*segment.inputs, *extra):
        known[node] = graph.placeholder(node.name)
        kept = ("example_value", "tensor_dict")  # Dynamo notes in the latter which inputs stay where they are
        known[node].meta = {key: value for key, value in node.meta.items() if key in kept}
    for node in segment.autocast:
        known[node] = graph.node_copy(node)
    for node in segment.nodes:
        for source in node.all_input_nodes:
            if source not in known and source.op == "get_attr":
                known[source] = graph.node_copy(source)
        known[node] = graph.node_copy(node, known.__getitem__)
    for node in _left_open(segment):
        graph.call_function(_LEAVE, (known[node],))
    graph.output(tuple(known[node] for node in segment.outputs))
    return fx.GraphModule(root, graph)


def _left_open(segment: Segment) -> list[fx.Node]:
    opened = [*segment.autocast, *(n for n in segment.nodes if n.target is _ENTER)]
    closed = {n.args[0] for n in segment.nodes if n.target is _LEAVE}
    return [node for node in reversed(opened) if node not in closed]


def shape_of_graph(module: fx.GraphModule, describe: Callable[[Any], Any]) -> Any:
    """A value that is equal for two segments if one compiled graph serves both; None where that cannot be told."""
    place: dict[fx.Node, int] = {}
    storages: dict[Any, int] = {}
    rows: list[Any] = []
    for index, node in enumerate(module.graph.nodes):
        place[node] = index
        if node.op in ("get_attr", "call_module"):
            return None
        if node.op == "placeholder":
            value = value_of(node)
            alias = storages.setdefault(storage_of_value(value), index) if isinstance(value, Tensor) else index
            rows.append(("placeholder", describe(value), alias))
            continue
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"%{place[n]}")
        target = node.target if isinstance(node.target, str) else f"{id(node.target)}"
        rows.append((node.op, target, repr(arguments)))
    return repr(rows)
