"""FP4 weights that are elsewhere: packed one by one on the device, and streamed packed.

At no time are two weights in high precision on the device. The packed copy is a master of its own in host memory, made
once for all graphs of a model; when the weight is written to, it is packed again before the next step.
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vbcompile.handles_memory import host_bundle, refill
from vbcompile.handles_payload import Bundle, Payload
from vbcompile.handles_store import WeightStore
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import LinearWeight, refuses_layout, to_layout
from vbcompile.kernels.fp4_linear import choose, make_case
from vbcompile.kernels.fp4_linear_triton import preferred_layout, prepare
from vbcompile.kernels.fp4_quantize import quantize, refuse_weight, relative_error
from vbcompile.passes.fp4_sites import (
    LinearSite,
    autocast_dtypes,
    is_vocabulary_projection,
    is_written,
    linear_sites,
)
from vbcompile.passes.graph_ops import value_of
from vbcompile.report import Decision

_PASS = "fp4"
_SMALLEST = 2**15  # elements: below, launching the product takes longer than reading the weight
_SLOWEST = 2.0  # times that a layer may take of its unpacked product's
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARTS = ("codes", "block_scales", "row_scale")


@dataclass
class _Form:
    """The packed form of a weight.

    Attributes:
        version: Of the weight when it was packed.
    """

    bundle: Bundle
    k: int
    layout: str
    error: float
    version: int


class Packer:
    """Replaces the products of a graph with offloaded weights by FP4 products.

    Args:
        graph: Changed in place; packed tensors become placeholders at its end.
        weights, fakes: Payload and fake tensor of each weight's placeholder; those of packed tensors are added.

    Attributes:
        parts: Which tensor of its bundle each new placeholder is.
    """

    def __init__(
        self,
        graph: fx.Graph,
        weights: MutableMapping[fx.Node, Payload],
        fakes: MutableMapping[fx.Node, Tensor],
        fake_mode: Any,
        store: WeightStore,
        context: Any,
    ) -> None:
        self.graph, self.weights, self.fakes, self.fake_mode = graph, weights, fakes, fake_mode
        self.store, self.context, self.config = store, context, context.config
        self.parts: dict[fx.Node, int] = {}
        self._nodes: dict[tuple[fx.Node, bool], tuple[fx.Node, ...]] = {}
        self._used: list[tuple[Payload, bool]] = []
        self._autocast = autocast_dtypes(graph, context.target.device_type)

    def run(self) -> list[Decision]:
        """A decision for every product with an offloaded weight; nothing where FP4 is not asked for."""
        if not self.config.fp4:
            return []
        known = {node: (0, value_of(node)) for node in self.weights}
        decisions = [self._decide(site) for site in linear_sites(self.graph, known)]
        for node in [node for node in self.weights if not node.users]:
            self.store.supersede(self.weights.pop(node))
            del self.fakes[node]
        return decisions

    def refresh(self) -> None:
        """Pack again what was written to since."""
        for payload, transposed in self._used:
            form = self.store.forms[payload.number, transposed, self.config.fp4_format]
            if form.version != payload.version:
                linear, form.error = self._packed(payload, transposed, form.layout)
                refill(form.bundle, linear.tensors)
                form.version = payload.version

    def _decide(self, site: LinearSite) -> Decision:
        reason = self._refuses(site)
        form = self._form(site) if reason is None else None
        if form is None or reason is not None:
            return Decision(_PASS, site.name, "left", reason or "")
        if isinstance(form, str):
            return Decision(_PASS, site.name, "left", form)
        payload = self.weights[site.weight]
        self._rewrite(site, form)
        return Decision(
            _PASS,
            site.name,
            "rewritten",
            f"{self.config.fp4_format} weight {list(payload.size)}, relative error {form.error:.4f}, streamed packed",
            "",
            {"bytes": payload.nbytes, "packed_bytes": form.bundle.nbytes, "layout": form.layout, "error": form.error},
        )

    def _refuses(self, site: LinearSite) -> str | None:
        payload = self.weights[site.weight]
        if self.context.training and bool(value_of(site.weight).requires_grad):
            return "the weight requires gradients: it stays in high precision"
        if payload.dtype not in _DTYPES:
            return f"{payload.dtype} weights are left alone"
        if is_written(site.weight):
            return "the graph writes to the weight"
        if is_vocabulary_projection(site) and not self.config.fp4_lm_head:
            return "projection onto the vocabulary; fp4_lm_head=True includes it"
        if math.prod(payload.size) < _SMALLEST:
            return f"{math.prod(payload.size)} elements: too small to gain"
        if not isinstance(value_of(site.x), Tensor):
            return "nothing is known about the activation"
        return self._too_slow(site)

    def _too_slow(self, site: LinearSite) -> str | None:
        n, k = self._shape(site)
        sizes = value_of(site.x).shape[:-1]
        rows = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
        layout = preferred_layout(self.context.target)
        case = make_case(self._dtype(site), rows or 1, n, k, self.config.fp4_format, layout)
        choice = choose(self.context.target, case)
        if choice.asked:
            return None
        if choice.implementation.name == "reference":
            return f"no kernel for this case: {choice.explain()}"
        cost = choice.implementation.cost(self.context.target, case)
        if rows and cost > _SLOWEST:
            return f"with {rows} rows FP4 would take an estimated {cost:.1f} times as long"
        return None

    def _shape(self, site: LinearSite) -> tuple[int, int]:
        size = self.weights[site.weight].size
        return (size[1], size[0]) if site.transposed else (size[0], size[1])

    def _dtype(self, site: LinearSite) -> torch.dtype:
        own: torch.dtype = value_of(site.x).dtype
        cast = self._autocast.get(site.node)
        return own if cast is None or own == torch.float64 else cast

    def _form(self, site: LinearSite) -> "_Form | str":
        """The packed form of a weight, or why it stays as it is."""
        payload = self.weights[site.weight]
        key = payload.number, site.transposed, self.config.fp4_format
        form: _Form | str | None = self.store.forms.get(key)
        if form is None:
            form = self.store.forms[key] = self._pack(payload, site.transposed)
        if isinstance(form, _Form) and form.error > self.config.fp4_max_error:
            return f"relative error {form.error:.3f} is above fp4_max_error={self.config.fp4_max_error}"
        if isinstance(form, _Form) and (payload, site.transposed) not in self._used:
            self._used.append((payload, site.transposed))
        return form

    def _pack(self, payload: Payload, transposed: bool) -> "_Form | str":
        try:
            linear, error = self._packed(payload, transposed, preferred_layout(self.context.target))
        except ValueError as problem:
            return str(problem)
        if linear.layout != "plain":
            prepare(payload.device)
        bundle = host_bundle(f"{payload.name} packed", linear.tensors, payload.device, self.store.host)
        self.store.add(bundle)
        return _Form(bundle, linear.k, linear.layout, error, payload.version)

    def _packed(self, payload: Payload, transposed: bool, layout: str) -> tuple[LinearWeight, float]:
        self.store.stop()  # resident weights and the ring leave room for the work on this one
        with torch.inference_mode(False), torch.no_grad():
            weight = payload.fetch()
            weight = weight.t().contiguous() if transposed else weight
            reason = refuse_weight(weight, fp4_format(self.config.fp4_format))
            if reason is not None:
                raise ValueError(reason)
            packed = quantize(weight, self.config.fp4_format, name=payload.name)
            error = relative_error(weight, packed)
            return to_layout(packed, "plain" if refuses_layout(packed, layout) else layout), error

    def _rewrite(self, site: LinearSite, form: _Form) -> None:
        nodes = self._placeholders(site, form)
        with self.graph.inserting_before(site.node):
            x = site.x
            if site.node in self._autocast:
                dtype = self._dtype(site)
                x = self.graph.call_method("to", (x, dtype))
                x.meta["example_value"] = value_of(site.x).to(dtype)
            new = self.graph.call_function(
                torch.ops.vblackwell.fp4_linear.default,
                (x, *nodes, site.bias, form.k, self.config.fp4_format, form.layout, self.config.fp4_activations),
            )
        new.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(new)
        self.graph.erase_node(site.node)
        for user in list(site.weight.users):  # transposes that nothing reads any more
            if not user.users and user.op != "output":
                self.graph.erase_node(user)

    def _placeholders(self, site: LinearSite, form: _Form) -> tuple[fx.Node, ...]:
        known = self._nodes.get((site.weight, site.transposed))
        if known is None:
            known = tuple(self._placeholder(site, form, part) for part in range(len(_PARTS)))
            self._nodes[site.weight, site.transposed] = known
        return known

    def _placeholder(self, site: LinearSite, form: _Form, part: int) -> fx.Node:
        _, shape, dtype = form.bundle.parts[part]
        with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
            node = self.graph.placeholder(f"{site.weight.name}_{_PARTS[part]}")
        with self.fake_mode, torch.inference_mode(False):
            fake = torch.empty(shape, dtype=dtype, device=form.bundle.device)
        node.meta["example_value"] = self.fakes[node] = fake
        self.weights[node] = form.bundle
        self.parts[node] = part
        return node
