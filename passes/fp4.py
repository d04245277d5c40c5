"""The FP4 pass: products with constant weights become ``vblackwell::fp4_linear`` on packed copies of the weights.

Packed tensors are new placeholders at the end of the graph; a wrapper around the compiled graph supplies them, so that
they are ordinary inputs to every cache and CUDA graph, and a weight that was updated is packed again before it is used.
The parameters stay where they are unless the option ``fp4_master`` says ``drop``.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbcompile.compat import copy_graph, mark_as_static_input, static_fake
from vbcompile.device import Target
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_linear import Fp4LinearCase, choose, make_case
from vbcompile.kernels.fp4_linear_triton import preferred_layout, prepare
from vbcompile.kernels.fp4_quantize import refuse_weight
from vbcompile.passes.fp4_sites import (
    LinearSite,
    autocast_dtypes,
    is_transpose,
    is_vocabulary_projection,
    is_written,
    linear_sites,
    weight_inputs,
)
from vbcompile.passes.fp4_weights import Packed, PackKey, WeightFeed, pack
from vbcompile.passes.graph_ops import call_of, module_graphs, value_of
from vbcompile.report import Decision

PASS_NAME = "fp4"
SMALLEST = 2**15
"""Fewest elements of a weight that is worth packing: below, launching the product takes longer than reading it."""
SLOWEST = 2.0
"""Most times that a layer may take of its unpacked product's, where the number of rows is known."""
_PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Packing:
    """A weight that will be packed, and the placeholders of its tensors."""

    position: int
    key: PackKey
    packed: Packed
    name: str
    nodes: tuple[fx.Node, ...]


def quantize_weights(gm: fx.GraphModule, context: Any) -> list[Decision]:
    """Rewrite every product with a constant weight that gains by it (in place).

    Args:
        gm: torch-level graph as Dynamo hands it over.
        context: what a pass may know (``pipeline.PassContext``); gets the packed tensors as example inputs, and a
            wrapper that supplies them.

    Returns:
        A decision for every product with a parameter or buffer.
    """
    return _Fp4Pass(gm, context).run() + _checkpointed(gm)


class _Fp4Pass:
    def __init__(self, gm: fx.GraphModule, context: Any) -> None:
        self.gm, self.context, self.config = gm, context, context.config
        self.original = gm.graph
        self.graph = copy_graph(gm.graph)  # Dynamo goes through its own graph's placeholders once more afterwards
        self.weights = weight_inputs(self.graph, context.example_inputs)
        self.autocast = autocast_dtypes(self.graph, context.target.device_type)
        self.packings: dict[tuple[fx.Node, bool], _Packing | str] = {}

    def run(self) -> list[Decision]:
        decisions = [self._decide(site) for site in linear_sites(self.graph, self.weights)]
        packings = [p for p in self.packings.values() if isinstance(p, _Packing)]
        if packings:
            self._remove_transposes()
            self.graph.lint()
            unpacked = fx.GraphModule(self.gm, copy_graph(self.original))
            self.gm.graph = self.graph
            self._feed(packings, unpacked)
        return decisions

    def _decide(self, site: LinearSite) -> Decision:
        name = site.name
        reason = self._refuses(site)
        if reason:
            return Decision(PASS_NAME, name, "left", reason)
        dtype, rows = self._dtype(site), _rows(site.x)
        weight = self.weights[site.weight][1]
        n, k = reversed(weight.shape) if site.transposed else weight.shape
        key = PackKey(self.config.fp4_format, preferred_layout(self.context.target), site.transposed)
        activations = self.config.fp4_activations
        case = make_case(dtype, rows if rows is not None else 1, n, k, key.format_name, key.layout, activations)
        if reason := self._too_slow(case, rows):
            return Decision(PASS_NAME, name, "left", reason)
        packing = self._pack(site, key)
        if isinstance(packing, str):
            return Decision(PASS_NAME, name, "left", packing)
        linear, error = packing.packed.linear, packing.packed.error
        self._rewrite(site, packing, dtype)
        case = make_case(dtype, case.m, n, k, key.format_name, linear.layout, activations)
        return Decision(
            PASS_NAME,
            name,
            "rewritten",
            f"{key.format_name} weight [{n}, {k}], relative error {error:.4f}",
            _explain(self.context.target, case, rows),
            {
                "shape": [int(n), int(k)],
                "error": error,
                "bytes": weight.numel() * weight.element_size(),
                "packed_bytes": linear.nbytes,
                "layout": linear.layout,
                "master": "dropped" if self._may_drop(site.weight) else "kept",
            },
        )

    def _refuses(self, site: LinearSite) -> str | None:
        """Why a site stays as it is, as far as that shows without reading the weight's data."""
        weight = self.weights[site.weight][1]
        if self.context.training and weight.requires_grad:
            return "the weight requires gradients: it stays in high precision"
        if weight.is_inference():
            return "made under inference_mode: later updates of the weight could not be noticed"
        if type(weight) not in _PLAIN_TYPES:
            return f"the weight is a {type(weight).__name__}"
        if weight.dtype not in _DTYPES:
            return f"{weight.dtype} weights are left alone"
        if is_written(site.weight):
            return "the graph writes to the weight"
        if is_vocabulary_projection(site) and not self.config.fp4_lm_head:
            return "projection onto the vocabulary; fp4_lm_head=True includes it"
        if weight.numel() < SMALLEST:
            return f"{weight.numel()} elements: too small to gain"
        if not isinstance(value_of(site.x), Tensor):
            return "nothing is known about the activation"
        oriented = weight.detach().t() if site.transposed else weight.detach()
        return refuse_weight(oriented, fp4_format(self.config.fp4_format))

    def _too_slow(self, case: Fp4LinearCase, rows: int | None) -> str | None:
        choice = choose(self.context.target, case)
        if choice.implementation.name == "reference":
            return f"no kernel for this case: {choice.explain()}"
        cost = choice.implementation.cost(self.context.target, case)
        if rows and cost > SLOWEST:
            return f"with {rows} rows FP4 would take an estimated {cost:.1f} times as long"
        return None

    def _dtype(self, site: LinearSite) -> torch.dtype:
        """The dtype that the product computes in."""
        own = value_of(site.x).dtype
        cast = self.autocast.get(site.node)
        return own if cast is None or own == torch.float64 else cast

    def _pack(self, site: LinearSite, key: PackKey) -> "_Packing | str":
        """The packed weight, once for each weight of the graph; or why it stays as it is."""
        known = self.packings.get((site.weight, site.transposed))
        if known is None:
            known = self.packings[site.weight, site.transposed] = self._pack_once(site, key)
        return known

    def _pack_once(self, site: LinearSite, key: PackKey) -> "_Packing | str":
        position, weight = self.weights[site.weight]
        name = site.name.split(" ")[0] or site.weight.name
        try:
            packed = pack(weight, key, name)
        except ValueError as error:
            return str(error)
        if packed.error > self.config.fp4_max_error:
            return f"relative error {packed.error:.3f} is above fp4_max_error={self.config.fp4_max_error}"
        if packed.linear.layout != "plain":
            prepare(weight.device)
        nodes = tuple(
            self._placeholder(f"{site.weight.name}_{part}", tensor)
            for part, tensor in zip(("codes", "block_scales", "row_scale"), packed.linear.tensors, strict=True)
        )
        return _Packing(position, key, packed, name, nodes)

    def _placeholder(self, name: str, tensor: Tensor) -> fx.Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        fake = static_fake(tensor)
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["example_value"] = fake
        mark_as_static_input(node)
        self.context.example_inputs.append(fake)
        return node

    def _rewrite(self, site: LinearSite, packing: _Packing, dtype: torch.dtype) -> None:
        linear = packing.packed.linear
        with self.graph.inserting_before(site.node):
            x = site.x
            if site.node in self.autocast:
                x = self.graph.call_method("to", (x, dtype))
                x.meta["example_value"] = value_of(site.x).to(dtype)
            new = self.graph.call_function(
                torch.ops.vblackwell.fp4_linear.default,
                (
                    x,
                    *packing.nodes,
                    site.bias,
                    linear.k,
                    linear.format_name,
                    linear.layout,
                    self.config.fp4_activations,
                ),
            )
        new.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(new)
        self.graph.erase_node(site.node)

    def _remove_transposes(self) -> None:
        """Erase the transposes of weights that nothing reads any more."""
        for weight in self.weights:
            for user in list(weight.users):
                if not user.users and _is_transpose(user):
                    self.graph.erase_node(user)

    def _may_drop(self, weight: fx.Node) -> bool:
        return self.config.fp4_master == "drop" and not self.context.training

    def _feed(self, packings: list[_Packing], unpacked: fx.GraphModule) -> None:
        placeholders = self.graph.find_nodes(op="placeholder")
        feed = WeightFeed(
            [p.position for p in packings],
            [p.key for p in packings],
            [p.name for p in packings],
            [p.packed for p in packings],
            self.config.fp4_max_error,
            [self._may_drop(placeholders[p.position]) and not placeholders[p.position].users for p in packings],
            unpacked,
        )
        self.context.wrappers.append(feed.wrap)


def _is_transpose(node: fx.Node) -> bool:
    call = call_of(node)
    return call is not None and not call.in_place and is_transpose(call)


def _rows(x: fx.Node) -> int | None:
    """Rows of the activation; None where they are symbolic."""
    sizes = value_of(x).shape[:-1]
    return math.prod(sizes) if all(isinstance(s, int) for s in sizes) else None


def _explain(target: Target, case: Fp4LinearCase, rows: int | None) -> str:
    """The implementation, how it compares with the unpacked product, and what else was considered."""
    if rows is None:
        return "chosen at each call by the number of rows"
    choice = choose(target, case)
    cost = choice.implementation.cost(target, case)
    return f"{choice.explain()}; estimated {cost:.2f} of the unpacked product's time"


def _checkpointed(gm: fx.GraphModule) -> list[Decision]:
    """Products inside higher-order operators (activation checkpointing): their weights are not inputs of the graph."""
    decisions = []
    for module in module_graphs(gm):
        if module is gm:
            continue
        placeholders = {
            node: (0, value_of(node)) for node in module.graph.find_nodes(op="placeholder")
            if isinstance(value_of(node), nn.Parameter)
        }  # fmt: skip
        for site in linear_sites(module.graph, placeholders):
            decisions.append(Decision(PASS_NAME, site.name, "left", "inside an activation-checkpointing region"))
    return decisions
