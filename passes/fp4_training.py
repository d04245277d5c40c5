"""Quantisation-aware training: a product with a trained weight reads the weight's FP4 values instead."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vbcompile.kernels.fp4_quantize import quantize, relative_error
from vbcompile.kernels.fp4_straight_through import fp4_fake_quantize
from vbcompile.passes.fp4_sites import LinearSite
from vbcompile.passes.graph_ops import value_of


def train_for_fp4(
    graph: fx.Graph, site: LinearSite, weight: Tensor, format_name: str, max_error: float
) -> tuple[str, str]:
    """Have one site compute with the FP4 values of its live ``weight``; returns action and reason of the decision."""
    name = site.name.split(" ")[0] or site.weight.name
    oriented = weight.detach().t() if site.transposed else weight.detach()
    try:
        error = relative_error(oriented, quantize(oriented, format_name, name=name))
    except ValueError as refusal:
        return "left", str(refusal)
    if error > max_error:
        return "left", f"relative error {error:.3f} is above fp4_max_error={max_error}"
    with graph.inserting_before(site.node):
        values = graph.call_function(
            torch.ops.vblackwell.fp4_fake_quantize.default, (site.weight, format_name, site.transposed)
        )
        values.meta["example_value"] = fp4_fake_quantize(value_of(site.weight), format_name, site.transposed)
        if site.transposed:
            seen = values.meta["example_value"]
            values = graph.call_method("t", (values,))
            values.meta["example_value"] = seen.t()
        new = graph.call_function(F.linear, (site.x, values, site.bias))
    new.meta = dict(site.node.meta)
    site.node.replace_all_uses_with(new)
    graph.erase_node(site.node)
    return "rewritten", f"trained for {format_name}, relative error {error:.4f} now"
