"""The offload pass: a graph with offloaded weights runs as compiled segments between transfers that a plan orders.

The plan decides which weights stay on the device and when the others arrive. Where all of them fit, the graph is
compiled as one piece and nothing is streamed.
"""

import logging
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import SymInt, Tensor, fx

from vbcompile.compat import copy_graph, declare_static_inputs, fake_mode_of_compile, own_tracing_context
from vbcompile.handles import OffloadedTensor
from vbcompile.handles_payload import Payload
from vbcompile.handles_store import Part, WeightStore, store_of
from vbcompile.passes.fp4_sites import weight_inputs
from vbcompile.passes.graph_ops import describe_site, value_of
from vbcompile.passes.implementation_choice import name_implementations
from vbcompile.passes.offload_costs import bytes_of, nanoseconds, reserve
from vbcompile.passes.offload_fp4 import Packer
from vbcompile.passes.offload_inputs import describe, fix_floats, missing_sizes, plain_fake
from vbcompile.passes.offload_outer import Layout, Piece, emit
from vbcompile.passes.offload_segments import WRITTEN, Cutting, Segment, build, cut, joined, shape_of_graph, whole
from vbcompile.passes.pass_context import Compile, PassContext
from vbcompile.report import Decision
from vbcompile.vgpu_plan import DEVICE, Plan
from vbcompile.vgpu_size import size_text

log = logging.getLogger(__name__)

PASS_NAME = "offload"
_HEADROOM = 1.25  # times the inputs' size that a graph with symbolic sizes is planned for
_NAMED = 4  # weights per tier that a report names in its text


def stream_weights(gm: fx.GraphModule, context: PassContext) -> list[Decision]:
    """Plan the transfers of a graph's offloaded weights, and have the graph compiled in segments around them.

    Args:
        gm: torch-level graph as Dynamo hands it over; stays as it is.
        context: what a pass may know.

    Raises:
        PlanError: no plan keeps within the budget.
    """
    weights = offloaded_inputs(gm.graph, context.example_inputs)
    if not weights:
        return _ordinary(gm.graph, context)
    store = _store(weights.values(), context)
    if isinstance(store, str):
        log.warning("offload: each use fetches its weight, and nothing runs ahead: %s", store)
        return [Decision(PASS_NAME, "graph", "left", store)]
    fix_floats(gm.graph)
    streamed = StreamedGraphs(gm, weights, store, context)
    context.around.append(streamed.around)
    return streamed.first.decisions()


def _store(payloads: Iterable[Payload], context: PassContext) -> WeightStore | str:
    """The store that holds all of these, with the budget of this compile; why there is none."""
    stores = {id(payload.residence): payload.residence for payload in payloads}
    if len(stores) > 1:
        return "weights of several models that were offloaded one by one: offload them together, in one nn.ModuleList"
    (store,) = stores.values()
    if not isinstance(store, WeightStore):
        return "weights that belong to no offloaded model"
    if context.config.budget is not None and context.config.sources.get("budget") == "options":
        store.budget = context.config.budget  # said for this compile; the environment's was known to offload()
    return store


def _ordinary(graph: fx.Graph, context: PassContext) -> list[Decision]:
    """What to say of a graph all of whose weights are on the device."""
    budget = context.config.budget
    if budget is None or context.training:  # in training the budget is that of the whole step, and planned with it
        return []
    held = sum(value.nbytes for _, value in weight_inputs(graph, context.example_inputs).values())
    if held <= budget:
        fits = f"fits: {size_text(held)} of weights, {size_text(budget)} of the device allowed"
        return [Decision(PASS_NAME, "graph", "left", fits)]
    reason = (
        f"{size_text(held)} of weights are on the device already, and {size_text(budget)} are allowed: call "
        f"vbcompile.offload(model, max_memory={{0: {budget}}}) before torch.compile, so that they leave it"
    )
    log.warning("%s", reason)
    return [Decision(PASS_NAME, "graph", "left", reason)]


def offloaded_inputs(graph: fx.Graph, example_inputs: Sequence[Any]) -> dict[fx.Node, Payload]:
    """Placeholders that are read and hold offloaded tensors."""
    found = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = node.meta.get("offloaded", example_inputs[position])
        if isinstance(value, OffloadedTensor) and node.users:
            found[node] = value.payload
    return found


class StreamedGraphs:
    """One graph of Dynamo's for each set of weights that it is called with.

    Models, or layers of a model, that share their code share one compiled graph: weights are arguments of it.
    """

    def __init__(
        self, gm: fx.GraphModule, weights: Mapping[fx.Node, Payload], store: WeightStore, context: PassContext
    ) -> None:
        self.gm, self.context = fx.GraphModule(gm, copy_graph(gm.graph)), replace(context, example_inputs=[])
        self.compiled: dict[Any, Callable[..., Any]] = {}
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        twins = dict(zip(gm.graph.find_nodes(op="placeholder"), placeholders, strict=True))
        self.nodes = [twins[node] for node in weights]
        self.positions = [placeholders.index(node) for node in self.nodes]
        self.first = StreamedGraph(gm, weights, store, self.context, self.compiled)
        self.runs: dict[tuple[int, ...], Callable[..., Any]] = {}  # by the numbers of the weights
        self.runs[tuple(payload.number for payload in weights.values())] = self.first.run
        self.alive: dict[tuple[int, ...], weakref.ref[Any]] = {}  # a weight of each but the first
        self.last: tuple[list[Any], Callable[..., Any]] = ([], self.first.run)
        self.compile: Compile | None = None

    def around(self, compile_graph: Compile) -> Compile:
        """Instead of the graph as one piece, compile what the plan asks for."""

        def compile_streamed(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            self.compile = compile_graph
            self.first.prepare(compile_graph)
            return self.run

        return compile_streamed

    def run(self, *args: Any) -> Any:
        """Called with the inputs of the graph; offloaded ones are only names."""
        handles = [args[position] for position in self.positions]
        known, run = self.last  # at once: another thread may call with other weights
        if len(handles) != len(known) or not all(map(operator.is_, handles, known)):
            del known  # else weights that are gone would look alive
            run = self._run_of(handles)
            self.last = handles, run
        return run(*args)

    def _run_of(self, handles: Sequence[OffloadedTensor]) -> Callable[..., Any]:
        payloads = [handle.payload for handle in handles]
        numbers = tuple(payload.number for payload in payloads)
        if numbers not in self.runs:
            self.last = [], self.first.run  # it would keep its weights
            for gone in [key for key, handle in self.alive.items() if handle() is None]:
                del self.runs[gone], self.alive[gone]
            self.runs[numbers], self.alive[numbers] = self._made(payloads), weakref.ref(handles[0])
        return self.runs[numbers]

    def _made(self, payloads: Sequence[Payload]) -> Callable[..., Any]:
        store = _store(payloads, self.context)
        if isinstance(store, str):
            log.warning("offload: a graph runs uncompiled, each use fetching its weight: %s", store)
            uncompiled: Callable[..., Any] = self.gm.forward
            return uncompiled
        graph = StreamedGraph(self.gm, dict(zip(self.nodes, payloads, strict=True)), store, self.context, self.compiled)
        assert self.compile is not None
        graph.prepare(self.compile)
        return graph.run


class StreamedGraph:
    """One graph with one set of weights, cut, planned, and run.

    Args:
        known: Compiled segments, also of the same graph with other weights.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        weights: Mapping[fx.Node, Payload],
        store: WeightStore,
        context: PassContext,
        known: dict[Any, Callable[..., Any]],
    ) -> None:
        self.known = known
        self.graph = copy_graph(gm.graph)
        self.root = gm
        twins = dict(zip(gm.graph.find_nodes(op="placeholder"), self.graph.find_nodes(op="placeholder"), strict=True))
        self.weights = {twins[node]: payload for node, payload in weights.items()}
        self.key = store.key
        self.fake_mode = fake_mode_of_compile(*(value_of(node) for node in twins))
        self.fakes = {node: plain_fake(payload, node, self.fake_mode) for node, payload in self.weights.items()}
        self.arguments, self.training = len(twins), context.training
        self.packer = Packer(self.graph, self.weights, self.fakes, self.fake_mode, store, context)
        self.packed = self.packer.run()
        name_implementations(self.graph, context.implementations)
        self.parts = self.packer.parts
        sizes = {payload: payload.nbytes for payload in self.weights.values()}
        largest = largest_segment([*sizes.values()])
        self.cutting: Cutting = cut(self.graph, self.fakes, largest, lookups=not context.training)
        self.compile: Compile | None = None
        self.pieces: dict[str, list[Piece]] = {}  # by how the graph is cut
        self.outer: Callable[..., Any] | None = None
        self.plan: Plan | None = None
        self.start = 0
        inputs = [value_of(node) for node in self.graph.find_nodes(op="placeholder")[: self.arguments]]
        self.dynamic = any(isinstance(value, SymInt) for value in inputs)
        self.planned_inputs = _HEADROOM * max(sum(map(bytes_of, filter(_is_plain, inputs))), 1)
        self.part = self._part(store)
        store.add_part(self.part)

    # planning

    def _part(self, store: WeightStore) -> Part:
        operators = []
        rows = set[Payload]()
        for segment in self.cutting.segments:
            payloads = tuple(dict.fromkeys(self.weights[node] for node in segment.weights))
            if segment.lookup is not None:
                rows.update(payloads)
                payloads = ()
            ns = nanoseconds(segment.nodes, [self.fakes[node] for node in segment.weights], store.rates)
            operators.append((_title(segment), ns, payloads))
        if self.training:
            operators += [(f"{name} backward", 2 * ns, payloads) for name, ns, payloads in reversed(operators)]
        fixed = {self.weights[node]: reason for node, reason in self.cutting.fixed.items()}
        beside = reserve(self.graph, self.weights, self.training) + self._returned_bytes()
        if self.dynamic:
            beside = int(_HEADROOM * beside)
        return Part(operators, fixed, frozenset(rows), beside, weakref.ref(self))

    def _returned_bytes(self) -> int:
        """Weights of which the graph returns a view are fetched for that, and the view is copied."""
        roots = {root for node in self.cutting.returned for root in node.all_input_nodes if root in self.weights}
        return 2 * sum(self.weights[root].nbytes for root in roots)

    def rebuild(self, plan: Plan, start: int) -> None:
        """The plan has changed: the next call runs by the new one."""
        self.plan, self.start, self.outer = plan, start, None

    # compiling

    def prepare(self, compile_graph: Compile) -> None:
        """Compile what the plan asks for."""
        self.compile = compile_graph
        self._prepare()

    def _prepare(self) -> None:
        """Make the outer graph for the plan as it is now."""
        assert self.plan is not None
        stays = not self.plan.copies and not self.training
        form = "whole" if self.plan.declined else "joined" if stays else "cut"
        if form not in self.pieces:
            self.pieces[form] = self._compiled(self._segments(form), stays)
        index = store_of(self.key).index_of
        written = frozenset(node for node, reason in self.cutting.fixed.items() if reason == WRITTEN)
        places = {node: index(payload) for node, payload in self.weights.items()}
        last = self.start + len(self.part.operators) - 1
        layout = Layout(self.key, self.plan, places, self.parts, written, self.start, last, self.training)
        outer = emit(self.graph, self.arguments, self.pieces[form], self.cutting.returned, layout)
        self.outer = outer.forward  # called as a module it would print every error of the user's

    def _segments(self, form: str) -> Sequence[Segment]:
        """The graph as one piece where everything stays on the device, as few where only embeddings do not."""
        if form == "whole":
            return [whole(self.graph, self.cutting)]
        return joined(self.graph, self.cutting, self.fakes) if form == "joined" else self.cutting.segments

    def _compiled(self, segments: Sequence[Segment], stays: bool) -> list[Piece]:
        """Compile each distinct segment once.

        Args:
            stays: Whether the weights stay where they are from step to step, as CUDA graphs want it. A graph would copy
                every streamed weight into memory of its own.
        """
        assert self.compile is not None
        known: dict[Any, Callable[..., Any]] = {} if stays else self.known  # CUDA graphs hold addresses of weights
        pieces = []
        for segment in segments:
            extra = missing_sizes(self.graph, segment)
            module = build(self.root, segment, extra)
            inputs = [self._input(node) for node in (*segment.inputs, *extra)]
            for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
                node.meta["example_value"] = value
            same = shape_of_graph(module, describe)
            if same is None or same not in known:
                if stays:
                    placeholders = module.graph.find_nodes(op="placeholder")
                    declare_static_inputs(module, placeholders[: len(segment.weights)])
                with own_tracing_context(self.fake_mode):
                    compiled = self.compile(module, inputs, cudagraphs=stays)
                known[same if same is not None else object()] = compiled
            else:
                compiled = known[same]
            pieces.append(Piece(segment, extra, compiled))
        log.debug("offload: %d segments, %d compiled", len(pieces), len(known))
        return pieces

    def _input(self, node: fx.Node) -> Any:
        value = self.fakes.get(node, value_of(node))
        if isinstance(value, Tensor) and not value.is_leaf:
            return value.detach().requires_grad_(value.requires_grad)
        return value

    # running

    def run(self, *args: Any) -> Any:
        """Called with the inputs of the graph; offloaded ones are only names."""
        store = store_of(self.key)
        with store.turn:
            self.packer.refresh()
            if self.dynamic:
                self._follow_sizes(args)
            if self.outer is None:
                self._prepare()
            try:
                return self.outer(*args)  # type: ignore[misc]
            except BaseException:
                store.abandon()
                raise

    def _follow_sizes(self, args: Sequence[Any]) -> None:
        """Plan for more memory beside the weights where the inputs have outgrown those that were planned for."""
        held = sum(a.nbytes for a in args if isinstance(a, Tensor) and not isinstance(a, OffloadedTensor))
        if held > self.planned_inputs:
            grown = _HEADROOM * held
            self.part.reserve = int(self.part.reserve * grown / self.planned_inputs)
            self.planned_inputs = grown
            store = store_of(self.key)
            store.replan(store.budget)

    # reporting

    def decisions(self) -> list[Decision]:
        """One record for the graph, one for each weight that has to stay for another reason than the plan."""
        plan = self.plan
        assert plan is not None
        found = [
            Decision(PASS_NAME, payload.name, "left", f"stays on the device: {reason}")
            for payload, reason in self.part.fixed.items()
        ]
        action = "left" if plan.declined else "rewritten"
        details = self._details(plan)
        whole_graph = Decision(PASS_NAME, "graph", action, plan.summary(), _tiers_text(details["tiers"]), details)
        return [*self.packed, whole_graph, *found]

    def _details(self, plan: Plan) -> dict[str, Any]:
        names = {level: [] for level in {DEVICE, *plan.levels}}  # type: dict[int, list[str]]
        for weight, level in zip(plan.sweep.weights, plan.levels, strict=True):
            names[level].append(weight.name.partition(":")[2])
        prediction = plan.prediction
        return {
            "segments": len(self.cutting.segments),
            "tiers": {
                ("device" if level == DEVICE else plan.tier(level).name): {
                    "bytes": plan.bytes_per_level.get(level, 0),
                    "weights": listed,
                }
                for level, listed in names.items()
            },
            "budget": plan.budget,
            "reserve": plan.sweep.reserve,
            "ring": plan.ring_bytes,
            "peak": plan.peak_bytes,
            "streamed_bytes": plan.streamed_bytes,
            "predicted_ms": prediction.step_ns / 1e6,
            "bottleneck": prediction.bottleneck,
            "roofline_share": prediction.efficiency,
        }


def largest_segment(sizes: Sequence[int]) -> int:
    """Bytes of weights that a segment may read: half of all bytes are in weights of at least this size.

    Small matrices are taken together up to it, so that a launch is worth its while; large ones stay apart, so that
    copies and computation overlap.
    """
    passed = 0
    for size in sorted(sizes, reverse=True):
        passed += size
        if 2 * passed >= sum(sizes):
            return size
    return 0


def _tiers_text(tiers: Mapping[str, Any]) -> str:
    """The weights of each tier in a line: how many, how large, the first by name."""
    parts = []
    for place, held in tiers.items():
        named = ", ".join(held["weights"][:_NAMED]) + (", ..." if len(held["weights"]) > _NAMED else "")
        parts.append(f"{place}: {len(held['weights'])} weights, {size_text(held['bytes'])} ({named})")
    return "; ".join(parts)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, OffloadedTensor)


def _title(segment: Segment) -> str:
    """The operator that reads the segment's first weight, in the user's terms."""
    if not segment.weights:
        return segment.nodes[0].name
    reader = next((n for n in segment.nodes if segment.weights[0] in n.all_input_nodes), segment.nodes[0])
    return describe_site(reader).split(" ")[0]
