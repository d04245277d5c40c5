"""The FP4 pass: products with constant weights become ``vblackwell::fp4_linear`` on packed copies of the weights.

Packed tensors are new placeholders at the end of the graph; a wrapper around the compiled graph supplies them, so that
they are ordinary inputs to every cache and CUDA graph, and a weight that was updated is packed again before it is used.
The parameters stay where they are unless the option ``fp4_master`` says ``drop``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbcompile.compat import copy_graph, mark_as_static_input, static_fake
from vbcompile.device import Target
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_grouped import Fp4GroupedCase
from vbcompile.kernels.fp4_linear import Fp4LinearCase, make_case
from vbcompile.kernels.fp4_linear_triton import prepare
from vbcompile.kernels.fp4_quantize import Fp4QuantizeCase, refuse_weight
from vbcompile.kernels.fp4_tuning import relative_cost
from vbcompile.kernels.registry import Choice, operator
from vbcompile.kernels.triton_target import refuses_triton
from vbcompile.passes.fp4_epilogues import Epilogue, find_epilogues
from vbcompile.passes.fp4_experts import ExpertSite, expert_sites, rewrite_experts
from vbcompile.passes.fp4_feed import FedWeight, WeightFeed
from vbcompile.passes.fp4_groups import (
    Candidate,
    rewrite_products,
    with_epilogues,
    with_shared_inputs,
)
from vbcompile.passes.fp4_progress import progress
from vbcompile.passes.fp4_refusals import ignored_activations, refuses_site, rows_of, too_slow
from vbcompile.passes.fp4_sites import (
    LinearSite,
    add_placeholder,
    erase_if_unread,
    linear_sites,
    rematch,
    weight_inputs,
)
from vbcompile.passes.fp4_training import TrainedWeights
from vbcompile.passes.fp4_weights import (
    Packed,
    PackKey,
    adopted_format,
    canonical_form,
    is_hollow,
    pack,
    pack_key,
    state_of,
)
from vbcompile.passes.graph_autocast import autocast_dtypes, operand_dtype
from vbcompile.passes.graph_effects import Effects
from vbcompile.passes.graph_ops import describe_site, module_graphs, value_of
from vbcompile.passes.pass_context import PassContext
from vbcompile.report import Decision

PASS_NAME = "fp4"
SLOWEST_BESIDE_ITS_MASTER = 1.03
"""Most times that a layer may take of its unpacked product's, where that was measured and the unpacked weight stays in
memory anyway."""
_WORTH_A_BAR = 2**28  # elements that are packed before a progress bar helps
_PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True)
class _Packing:
    """Weights that will be packed together, and the placeholders of their tensors."""

    fed: FedWeight
    nodes: tuple[fx.Node, ...]


def quantize_weights(gm: fx.GraphModule, context: PassContext) -> list[Decision]:
    """Rewrite every product with a constant weight that gains by it (in place).

    Args:
        gm: torch-level graph as Dynamo hands it over.
        context: what a pass may know; gets the packed tensors as example inputs, and a
            wrapper that supplies them.

    Returns:
        A decision for every product with a parameter or buffer.
    """
    return _Fp4Pass(gm, context).run() + _checkpointed(gm)


class _Fp4Pass:
    def __init__(self, gm: fx.GraphModule, context: PassContext) -> None:
        self.gm, self.context, self.config = gm, context, context.config
        self.original = gm.graph
        self.graph = copy_graph(gm.graph)  # Dynamo goes through its own graph's placeholders once more afterwards
        self.weights = weight_inputs(self.graph, context.example_inputs)
        self.effects = Effects(self.graph)
        self.autocast = autocast_dtypes(self.graph, context.target.device_type)
        self.packings: dict[tuple[tuple[fx.Node, ...], PackKey], _Packing] = {}
        self.decisions: dict[fx.Node, Decision] = {}
        self.apart: set[fx.Node] = set()  # layers whose activation the product could do, were no gradient wanted

    def run(self) -> list[Decision]:
        experts = list(expert_sites(self.graph, self.weights))
        taken = {site.node for site in experts}
        sites: list[Any] = [s for s in linear_sites(self.graph, self.weights) if s.node not in taken] + experts
        found = {site.node: self._candidate(site) for site in sites}
        candidates = [c for c in found.values() if isinstance(c, Candidate)]
        for node, reason in found.items():
            if isinstance(reason, str):
                self._leave(node, reason)
        groups = [group for group in self._groups(candidates) if not self._is_faster_unpacked(group)]
        takes_long = sum(c.n * c.k for c in candidates) >= _WORTH_A_BAR
        with progress(groups, "packing FP4 weights", takes_long) as packing:
            plans = [plan for group in packing for plan in self._packed(group)]
        trained = self._train([site for site in sites if found[site.node] is None])
        for group, packed in plans:
            if isinstance(group[0].site, ExpertSite):
                self._rewrite_experts(group[0], packed)
            else:
                self._rewrite(group, packed)
        if plans or trained:
            self._remove_transposes()
            self.graph.lint()
            unpacked = fx.GraphModule(self.gm, copy_graph(self.original))
            self.gm.graph = self.graph
            if self.packings:
                self._feed(unpacked)
        self._refuse_to_read_hollow_weights()
        return [self.decisions[site.node] for site in sites]

    def _groups(self, candidates: list[Candidate]) -> list[list[Candidate]]:
        """The candidates, those together that will be one product."""
        linear = [c for c in candidates if isinstance(c.site, LinearSite)]
        experts = [[c] for c in candidates if isinstance(c.site, ExpertSite)]
        if not self.config.fp4_fuse:
            return [[c] for c in linear] + experts
        with_more = with_epilogues(linear, self.graph, self._epilogues(linear))
        taken = {c.site.node for group in with_more for c in group}
        return with_shared_inputs([c for c in linear if c.site.node not in taken], self.graph) + with_more + experts

    def _epilogues(self, linear: list[Candidate]) -> list[Epilogue]:
        """What follows the products that they can do; where gradients are wanted, those need its input."""
        if refuses_triton(self.context.target):
            return []
        found = find_epilogues(c.site for c in linear)
        if self.context.training:
            self.apart = {layer for epilogue in found for layer in epilogue.layers}
            return []
        return found

    def _leave(self, node: fx.Node, reason: str) -> None:
        self.decisions[node] = Decision(PASS_NAME, describe_site(node), "left", reason)

    # -------------------------------------------------------------------------------------------------- what to rewrite
    def _candidate(self, site: LinearSite | ExpertSite) -> "Candidate | str | None":
        """What to do with a site: run it on a packed weight, leave it for a reason, or (None) train it for FP4."""
        weight = self.weights[site.weight][1]
        trained = self.context.training and weight.requires_grad
        if trained and not self.config.fp4_qat:
            return "the weight requires gradients: it stays in high precision; fp4_qat=True trains it for FP4"
        if reason := self._refuses(site):
            return reason
        if trained:
            return None
        dtype, rows = self._dtype(site), rows_of(site.x)
        n, k = reversed(weight.shape[-2:]) if site.transposed else weight.shape[-2:]
        format_name = adopted_format(weight) or self.config.fp4_format
        key = pack_key(self.context, format_name, site.transposed, dtype, rows, isinstance(site, LinearSite))
        candidate = Candidate(site, key, dtype, rows, int(n), int(k))
        return candidate if is_hollow(weight) else self._too_slow(candidate) or candidate

    def _refuses(self, site: LinearSite | ExpertSite) -> str | None:
        """Why a site stays as it is, as far as that shows without reading the weight's data."""
        weight = self.weights[site.weight][1]
        if weight.is_inference():
            return "made under inference_mode: later updates of the weight could not be noticed"
        if type(weight) not in _PLAIN_TYPES:
            return f"the weight is a {type(weight).__name__}"
        if reason := refuses_site(site, self.effects, weight.dtype, weight.numel(), self.config.fp4_lm_head):
            return reason
        oriented = weight.detach().transpose(-2, -1) if site.transposed else weight.detach()
        return refuse_weight(oriented, fp4_format(self.config.fp4_format))

    def _case(self, candidate: Candidate, n: int, layout: str) -> Fp4LinearCase | Fp4GroupedCase:
        rows = 1 if candidate.rows is None else candidate.rows
        if isinstance(candidate.site, ExpertSite):
            return self._grouped_case(candidate, rows, layout)
        name, activations = candidate.key.format_name, self.config.fp4_activations
        return make_case(candidate.dtype, rows, n, candidate.k, name, layout, activations)

    def _grouped_case(self, candidate: Candidate, rows: int, layout: str) -> Fp4GroupedCase:
        experts = int(self.weights[candidate.site.weight][1].shape[0])
        rows = 1 << (rows - 1).bit_length() if rows else 0
        name = candidate.key.format_name
        return Fp4GroupedCase(candidate.dtype, rows, experts, candidate.n, candidate.k, name, layout)

    def _too_slow(self, candidate: Candidate) -> str | None:
        target, case = self.context.target, self._case(candidate, candidate.n, candidate.key.layout)
        rows = candidate.rows if isinstance(candidate.site, LinearSite) else None
        return too_slow(_choose(target, case), target, case, rows)

    def _is_faster_unpacked(self, group: list[Candidate]) -> bool:
        """Whether the products of a group were measured to be faster with their own weights, which are kept; if so,
        leave them."""
        first, n = group[0], sum(c.n for c in group)
        if not first.rows or not isinstance(first.site, LinearSite) or first.dtype == torch.float32:
            return False
        if any(self._master(c.site.weight) != "keep" or is_hollow(self.weights[c.site.weight][1]) for c in group):
            return False
        case = self._case(first, n, first.key.layout)
        choice = _choose(self.context.target, case)
        name = choice.implementation.name
        cost = relative_cost(self.context.target, name, case.format_name, n, case.k, first.rows)
        if choice.asked or cost is None or math.isinf(cost) or cost <= SLOWEST_BESIDE_ITS_MASTER:
            return False
        for candidate in group:
            reason = f"with {first.rows} rows FP4 takes {cost:.2f} times as long as the unpacked weight, which is kept"
            self._leave(candidate.site.node, f"{reason}; fp4_master='drop' frees that and packs it")
        return True

    def _dtype(self, site: LinearSite | ExpertSite) -> torch.dtype:
        """The dtype that the product computes in."""
        cast = None if getattr(site, "form", "") == "grouped" else self.autocast.get(site.node)
        return operand_dtype(value_of(site.x).dtype, cast)

    # ---------------------------------------------------------------------------------------------------------- packing
    def _packed(self, group: list[Candidate]) -> list[tuple[list[Candidate], _Packing]]:
        """The group packed together, without members that cannot be; those are left with the reason."""
        nodes = tuple(c.site.weight for c in group)
        names = tuple(c.name for c in group)
        known = self.packings.get((nodes, group[0].key))
        if known is not None:
            return [(group, known)]
        weights = [self.weights[node][1] for node in nodes]
        master = tuple(self._master(node) for node in nodes)
        try:
            packed = pack(weights, group[0].key, names, self.config.fp4_watch, keep="keep" not in master)
        except ValueError:
            return self._packed(good) if (good := [c.alone() for c in group if self._can_be_packed(c)]) else []
        good = [c.alone() for c, error in zip(group, packed.errors, strict=True) if self._accepts(c, error)]
        if len(good) < len(group):
            return self._packed(good) if good else []
        return [(group, self._supply(group, packed, master))]

    def _can_be_packed(self, candidate: Candidate) -> bool:
        weight = self.weights[candidate.site.weight][1]
        try:
            canonical_form(weight, state_of(weight), candidate.key, candidate.name)
        except ValueError as error:
            self._leave(candidate.site.node, str(error))
            return False
        return True

    def _accepts(self, candidate: Candidate, error: float) -> bool:
        limit = self.config.fp4_max_error
        if error > limit:
            self._leave(candidate.site.node, f"relative error {error:.3f} is above fp4_max_error={limit}")
        return error <= limit

    def _supply(self, group: list[Candidate], packed: Packed, master: tuple[str, ...]) -> _Packing:
        """Placeholders for the tensors of a packed copy."""
        prepare(packed.linear.codes.device)
        nodes = tuple(c.site.weight for c in group)
        placeholders = tuple(
            self._placeholder(f"{nodes[0].name}_{part}", tensor)
            for part, tensor in zip(("codes", "block_scales", "row_scale"), packed.linear.tensors, strict=True)
        )
        positions = tuple(self.weights[node][0] for node in nodes)
        fed = FedWeight(positions, group[0].key, tuple(c.name for c in group), packed, master)
        packing = self.packings[nodes, group[0].key] = _Packing(fed, placeholders)
        return packing

    def _placeholder(self, name: str, tensor: Tensor) -> fx.Node:
        fake = static_fake(tensor)
        node = add_placeholder(self.graph, name)
        node.meta["example_value"] = fake
        mark_as_static_input(node)
        self.context.example_inputs.append(fake)
        return node

    def _master(self, weight: fx.Node) -> str:
        """What becomes of a weight's own memory, as far as the options say."""
        choice = self.config.fp4_master
        if choice == "host" and self.weights[weight][1].device.type == "cpu":
            return "keep"  # that is where it is
        return "keep" if self.context.training else choice

    # -------------------------------------------------------------------------------------------------------- rewriting
    def _rewrite(self, group: list[Candidate], packing: _Packing) -> None:
        sites = [rematch(c.site, self.weights) for c in group]  # their inputs may have been rewritten
        linear = packing.fed.packed.linear
        for candidate, error in zip(group, packing.fed.packed.errors, strict=True):
            self.decisions[candidate.site.node] = self._rewritten(candidate, error, group, packing)
        settings = linear.k, linear.format_name, linear.layout, self.config.fp4_activations
        rewrite_products(self.graph, group, sites, packing.nodes, settings, sites[0].node in self.autocast)

    def _rewrite_experts(self, candidate: Candidate, packing: _Packing) -> None:
        site = candidate.site
        assert isinstance(site, ExpertSite)
        error = packing.fed.packed.errors[0]
        self.decisions[site.node] = self._rewritten(candidate, error, [candidate], packing)
        cast = None if value_of(site.x).dtype == candidate.dtype else candidate.dtype
        rewrite_experts(site, packing.fed.packed, packing.nodes, cast)

    def _rewritten(self, candidate: Candidate, error: float, group: list[Candidate], packing: _Packing) -> Decision:
        linear, weight = packing.fed.packed.linear, self.weights[candidate.site.weight][1]
        others = [c.name for c in group if c is not candidate]
        then = "" if candidate.epilogue is None else candidate.epilogue.name
        more = [f"one product with {', '.join(others)}"] if others else []
        more += [f"does {then} too"] if then else []
        if candidate.site.node in self.apart:
            more.append("the activation behind it stays apart: gradients need what it reads")
        more += ignored_activations(self.context.target, self.config.fp4_activations)
        n, k, total = candidate.n, candidate.k, sum(c.n for c in group)
        shape = [*weight.shape[:-2], n, k]
        reason = f"{linear.format_name} weight {shape}, relative error {error:.4f}"
        return Decision(
            PASS_NAME,
            candidate.site.name,
            "rewritten",
            ", ".join([reason, *more]),
            _explain(self.context.target, self._case(candidate, total, linear.layout), candidate.rows),
            {
                "shape": [int(size) for size in shape],
                "error": error,
                "bytes": weight.numel() * weight.element_size(),
                "packed_bytes": linear.nbytes * n // total,
                "layout": linear.layout,
                "packed_by": self._packed_by(candidate, weight),
                "fused_with": others,
                "epilogue": then,
                "master": {"keep": "kept", "host": "in host memory", "drop": "dropped"}[
                    self._master(candidate.site.weight)
                ],
            },
        )

    def _packed_by(self, candidate: Candidate, weight: Tensor) -> str:
        """What packs the weight on the target, and why nothing else."""
        key = candidate.key
        case = Fp4QuantizeCase(weight.dtype, candidate.k, key.format_name, key.method, False)
        return operator("fp4_quantize").choose(self.context.target, case).explain()

    def _train(self, sites: list[LinearSite | ExpertSite]) -> int:
        """Round the trained weights of ``sites`` in the forward; returns how many sites were rewritten."""
        trained = TrainedWeights(self.graph, self.config.fp4_format, self.config.fp4_max_error)
        for site in sites:
            name = site.name
            self.decisions[site.node] = Decision(PASS_NAME, name, *trained.read_by(site, self.weights[site.weight][1]))
        return sum(self.decisions[site.node].action == "rewritten" for site in sites)

    def _remove_transposes(self) -> None:
        """Erase the transposes of weights that nothing reads any more."""
        for weight in self.weights:
            for user in list(weight.users):
                erase_if_unread(user)

    def _feed(self, unpacked: fx.GraphModule) -> None:
        """Add the wrapper that supplies the packed tensors. Weights that the graph still reads keep their memory."""
        placeholders = self.graph.find_nodes(op="placeholder")
        fed = [packing.fed for packing in self.packings.values()]
        for one in fed:
            read = [bool(placeholders[position].users) for position in one.positions]
            one.master = tuple("keep" if r else m for m, r in zip(one.master, read, strict=True))
        feed = WeightFeed(fed, self.config.fp4_max_error, self.config.fp4_watch, unpacked)
        self.context.wrappers.append(feed.wrap)

    def _refuse_to_read_hollow_weights(self) -> None:
        """Have calls fail where the graph would read weights whose values were given up."""
        read = [node for node, (_, weight) in self.weights.items() if is_hollow(weight) and node.users]
        if not read:
            return
        reasons = [d.reason for d in self.decisions.values() if d.action == "left"]
        message = (
            f"{len(read)} weights were given up by fp4_master but this graph reads them, {read[0].name} the first"
            f" ({'; '.join(dict.fromkeys(reasons)) or 'not as the weight of a product'}): restore or reload them"
        )

        def wrap(compiled: Callable[..., Any]) -> Callable[..., Any]:
            def refuse(*args: Any) -> Any:
                raise RuntimeError(message)

            return refuse

        self.context.wrappers.append(wrap)


def _choose(target: Target, case: Fp4LinearCase | Fp4GroupedCase) -> Choice:
    name = "fp4_linear" if isinstance(case, Fp4LinearCase) else "fp4_grouped_linear"
    return operator(name).choose(target, case)


def _explain(target: Target, case: Fp4LinearCase | Fp4GroupedCase, rows: int | None) -> str:
    """The implementation, how it compares with the unpacked product, and what else was considered."""
    if rows is None:
        return "chosen at each call by the number of rows"
    choice = _choose(target, case)
    if isinstance(case, Fp4GroupedCase):
        return choice.explain()
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
