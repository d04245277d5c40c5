"""Why a layer keeps its own precision: what holds for weights on the device and for those that are elsewhere."""

import math
from typing import Any

import torch
from torch import Tensor, fx

from vbcompile.device import Target
from vbcompile.kernels.registry import Choice, operator
from vbcompile.passes.fp4_experts import ExpertSite
from vbcompile.passes.fp4_sites import LinearSite, is_vocabulary_projection
from vbcompile.passes.graph_effects import Effects
from vbcompile.passes.graph_ops import value_of

SMALLEST = 2**15
"""Fewest elements of a weight that is worth packing: below, launching the product takes longer than reading it."""
SLOWEST = 2.0
"""Most times that a layer may take of its unpacked product's, where the number of rows is known."""
_ROUNDING = {"fp8": ("hopper_fp8", "triton_fp8", "npu_mxfp4_fp8"), "fp4": ("native", "npu_mxfp4_fp4")}
"""Implementations for each kind of rounded activations; one that runs on the target says itself why not a case."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses_site(
    site: LinearSite | ExpertSite, effects: Effects, dtype: torch.dtype, elements: int, lm_head: bool
) -> str | None:
    """Why a site stays as it is, as far as that shows without reading the weight's data.

    Args:
        dtype, elements: of the weight.
        lm_head: whether the projection onto the vocabulary is packed too.
    """
    if dtype not in _DTYPES:
        return f"{dtype} weights are left alone"
    if effects.is_written_at_all(site.weight):
        return "the graph writes to the weight"
    if effects.is_transformed(site.node):
        return "inside a function transform (vmap, jvp, ...)"
    if isinstance(site, LinearSite) and site.unlike:
        return site.unlike
    if isinstance(site, LinearSite) and is_vocabulary_projection(site) and not lm_head:
        return "projection onto the vocabulary; fp4_lm_head=True includes it"
    if elements < SMALLEST:
        return f"{elements} elements: too small to gain"
    if not isinstance(value_of(site.x), Tensor):
        return "nothing is known about the activation"
    return None


def too_slow(choice: Choice, target: Any, case: Any, rows: int | None) -> str | None:
    """Why the packed product is not worth it.

    Args:
        rows: of the activation of a linear layer; None where they, or what the unpacked product takes, are unknown.
    """
    if choice.asked:
        return None
    if choice.implementation.name == "reference":
        return f"no kernel for this case: {choice.explain()}"
    cost = choice.implementation.cost(target, case)
    return f"with {rows} rows FP4 would take an estimated {cost:.1f} times as long" if rows and cost > SLOWEST else None


def rows_of(x: fx.Node) -> int | None:
    """Rows of the activation; None where they are symbolic."""
    sizes = value_of(x).shape[:-1]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def ignored_activations(target: Target, activations: str) -> list[str]:
    """A sentence where nothing on the target rounds activations as the option ``fp4_activations`` allows."""
    able = (i for i in operator("fp4_linear").implementations if i.name in _ROUNDING.get(activations, ()))
    if activations not in _ROUNDING or any(i.refuses(target, None) is None for i in able):
        return []
    return [f"fp4_activations={activations!r} changes nothing on {target.arch}: no kernel multiplies so there"]
