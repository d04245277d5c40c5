"""Quantisation-aware training: a product with a trained weight reads the weight's FP4 values instead."""

from typing import Any

import torch
from torch import Tensor, fx

from vbcompile.kernels.fp4_quantize import quantize, relative_error
from vbcompile.kernels.fp4_straight_through import fp4_fake_quantize
from vbcompile.passes.fp4_sites import is_view
from vbcompile.passes.graph_ops import call_of, value_of


class TrainedWeights:
    """Rounds trained weights of a graph in the forward, each once."""

    def __init__(self, graph: fx.Graph, format_name: str, max_error: float) -> None:
        self._graph, self._format, self._max_error = graph, format_name, max_error
        self._rounded: dict[tuple[fx.Node, bool], tuple[fx.Node, float] | str] = {}

    def read_by(self, site: Any, weight: Tensor) -> tuple[str, str]:
        """Have a ``LinearSite`` or ``ExpertSite`` compute with the FP4 values of its live ``weight``.

        Returns:
            Action and reason of the decision.
        """
        key = (site.weight, site.transposed)
        if key not in self._rounded:
            name = site.name.split(" ")[0] or site.weight.name
            self._rounded[key] = self._round(site.weight, weight, site.transposed, name)
        rounded = self._rounded[key]
        if isinstance(rounded, str):
            return "left", rounded
        values, error = rounded
        operand = [node for node in site.node.all_input_nodes if _leads_to(node, site.weight)][-1]
        with self._graph.inserting_before(site.node):
            new_operand = self._copied(operand, site.weight, values)
            new = self._graph.node_copy(site.node, lambda node: new_operand if node is operand else node)
        site.node.replace_all_uses_with(new)
        self._graph.erase_node(site.node)
        return "rewritten", f"trained for {self._format}, relative error {error:.4f} now"

    def _round(self, node: fx.Node, weight: Tensor, transposed: bool, name: str) -> tuple[fx.Node, float] | str:
        oriented = weight.detach().transpose(-2, -1) if transposed else weight.detach()
        try:
            error = relative_error(oriented, quantize(oriented, self._format, name=name))
        except ValueError as refusal:
            return str(refusal)
        if error > self._max_error:
            return f"relative error {error:.3f} is above fp4_max_error={self._max_error}"
        last = self._graph.find_nodes(op="placeholder")[-1]  # before anything that switches gradients off
        with self._graph.inserting_after(last):
            values = self._graph.call_function(
                torch.ops.vblackwell.fp4_fake_quantize.default, (node, self._format, transposed)
            )
        values.meta["example_value"] = fp4_fake_quantize(value_of(node), self._format, transposed)
        return values, error

    def _copied(self, node: fx.Node, weight: fx.Node, values: fx.Node) -> fx.Node:
        """The views that lead from the weight to ``node``, of ``values`` instead."""
        if node is weight:
            return values
        call = call_of(node)
        assert call is not None
        source = self._copied(call.input, weight, values)
        return self._graph.node_copy(node, lambda n: source if n is call.input else n)


def _leads_to(node: fx.Node, weight: fx.Node) -> bool:
    """Whether ``node`` is the weight or a view of it."""
    while node is not weight:
        call = call_of(node)
        if call is None or call.in_place or not is_view(call) or not isinstance(call.input, fx.Node):
            return False
        node = call.input
    return True
