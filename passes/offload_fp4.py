"""FP4 weights that are elsewhere: packed one by one on the device, and streamed packed.

At no time are two weights in high precision on the device. The packed copy is a master of its own in host memory, made
once for all graphs of a model, or a file with checksums where a model that is partly on disk leaves no room in host
memory; when the weight is written to, it is packed again before the next step.
"""

import logging
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from vbcompile.handles_memory import bundle, refill
from vbcompile.handles_payload import Bundle, Payload
from vbcompile.handles_store import WeightStore
from vbcompile.kernels.fp4 import PackedWeight, concat_rows
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import LinearWeight, refuses_layout, to_layout
from vbcompile.kernels.fp4_linear import choose, make_case
from vbcompile.kernels.fp4_linear_triton import prepare
from vbcompile.kernels.fp4_quantize import quantize, refuse_weight, relative_error
from vbcompile.passes.fp4_groups import Candidate, rewrite_products, with_shared_inputs
from vbcompile.passes.fp4_refusals import refuses_site, rows_of, too_slow
from vbcompile.passes.fp4_sites import (
    LinearSite,
    add_placeholder,
    linear_sites,
    rematch,
)
from vbcompile.passes.fp4_weights import PackKey, pack_key
from vbcompile.passes.graph_autocast import autocast_dtypes, operand_dtype
from vbcompile.passes.graph_effects import Effects
from vbcompile.passes.graph_ops import value_of
from vbcompile.passes.pass_context import PassContext
from vbcompile.report import Decision

log = logging.getLogger(__name__)

_PASS = "fp4"
_PARTS = ("codes", "block_scales", "row_scale")


@dataclass
class _Form:
    """The packed form of some weights, one below the other.

    Attributes:
        key: How they were packed, with the layout that they are in.
        errors: Relative error of each.
        versions: Of each when it was packed.
    """

    bundle: Bundle
    k: int
    key: PackKey
    errors: list[float]
    versions: list[int]


@dataclass(frozen=True)
class _Member:
    """A weight of a group, and whether its parameter is ``[K, N]``."""

    payload: Payload
    transposed: bool


_Quantized = tuple[PackedWeight, float]  # and its relative error


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
        context: PassContext,
    ) -> None:
        self.graph, self.weights, self.fakes, self.fake_mode = graph, weights, fakes, fake_mode
        self.store, self.context, self.config = store, context, context.config
        self.parts: dict[fx.Node, int] = {}
        self._forms: dict[tuple[_Member, ...], _Form] = {}
        self._nodes: dict[tuple[_Member, ...], tuple[fx.Node, ...]] = {}
        self._decisions: dict[fx.Node, Decision] = {}
        self._effects = Effects(graph)
        self._autocast = autocast_dtypes(graph, context.target.device_type)

    def run(self) -> list[Decision]:
        """A decision for every product with an offloaded weight; nothing where FP4 is not asked for."""
        if not self.config.fp4:
            return []
        known = {node: (0, value_of(node)) for node in self.weights}
        sites = list(linear_sites(self.graph, known))
        names = {site.node: site.name for site in sites}
        candidates = [candidate for site in sites if (candidate := self._candidate(site)) is not None]
        together = self.config.fp4_fuse
        groups = with_shared_inputs(candidates, self.graph) if together else [[c] for c in candidates]
        for group in groups:
            fresh: dict[_Member, _Quantized] = {}
            good = [candidate for candidate in group if self._accepts(candidate, fresh)]
            if good:
                self._rewrite(good, self._form(good, fresh))
        for node in [node for node in self.weights if not node.users]:
            self.store.supersede(self.weights.pop(node))
            del self.fakes[node]
        return [self._decisions[node] for node in names]

    def refresh(self) -> None:
        """Pack again what was written to since."""
        for members, form in self._forms.items():
            if form.versions != [member.payload.version for member in members]:
                linear, form.errors = self._packed(members, form.key, {})
                refill(form.bundle, linear.tensors)
                form.versions = [member.payload.version for member in members]

    def _leave(self, site: LinearSite, reason: str) -> None:
        self._decisions[site.node] = Decision(_PASS, site.name, "left", reason)

    def _candidate(self, site: LinearSite) -> Candidate | None:
        """What a site asks for; None, with a decision, where it stays as it is."""
        if (reason := self._refuses(site)) is not None:
            self._leave(site, reason)
            return None
        rows = rows_of(site.x)
        # whatever the rows: a weight has one packed form for all graphs
        key = pack_key(self.context, self.config.fp4_format, site.transposed, self._dtype(site), None)
        n, k = self._shape(site)
        candidate = Candidate(site, key, self._dtype(site), rows, n, k)
        if (reason := self._too_slow(candidate)) is not None:
            self._leave(site, reason)
            return None
        return candidate

    def _refuses(self, site: LinearSite) -> str | None:
        payload = self.weights[site.weight]
        if self.context.training and bool(value_of(site.weight).requires_grad):
            return "the weight requires gradients: it stays in high precision"
        return refuses_site(site, self._effects, payload.dtype, math.prod(payload.size), self.config.fp4_lm_head)

    def _too_slow(self, candidate: Candidate) -> str | None:
        rows, key = candidate.rows, candidate.key
        case = make_case(
            candidate.dtype, rows or 1, candidate.n, candidate.k, key.format_name, key.layout,
            self.config.fp4_activations,
        )  # fmt: skip
        return too_slow(choose(self.context.target, case), self.context.target, case, rows)

    def _shape(self, site: LinearSite) -> tuple[int, int]:
        size = self.weights[site.weight].size
        return (size[1], size[0]) if site.transposed else (size[0], size[1])

    def _dtype(self, site: LinearSite) -> torch.dtype:
        return operand_dtype(value_of(site.x).dtype, self._autocast.get(site.node))

    def _member(self, candidate: Candidate) -> _Member:
        return _Member(self.weights[candidate.site.weight], candidate.site.transposed)

    def _accepts(self, candidate: Candidate, fresh: dict[_Member, _Quantized]) -> bool:
        """Whether a weight loses no more than it may; that is found out once for all graphs and contents."""
        member = self._member(candidate)
        place = (member, member.payload.version, candidate.key, "error")
        known: float | str | None = self.store.forms.get(place)
        if known is None:
            try:
                fresh[member] = self._quantized(member, candidate.key)
                known = fresh[member][1]
            except ValueError as problem:
                known = str(problem)
            self.store.forms[place] = known
        if isinstance(known, float) and known > self.config.fp4_max_error:
            known = f"relative error {known:.3f} is above fp4_max_error={self.config.fp4_max_error}"
        if isinstance(known, str):
            self._leave(candidate.site, known)
        return isinstance(known, float)

    def _form(self, group: Sequence[Candidate], fresh: dict[_Member, _Quantized]) -> _Form:
        """The packed form of a group's weights, made once for all graphs."""
        members = tuple(map(self._member, group))
        key = members, group[0].key
        if key not in self.store.forms:
            linear, errors = self._packed(members, group[0].key, fresh)
            device, name = members[0].payload.device, " + ".join(m.payload.name for m in members)
            if linear.layout != "plain":
                prepare(device)
            made = bundle(f"{name} packed", linear.tensors, device, self.store.host, self._folder(linear))
            self.store.add(made)
            versions = [member.payload.version for member in members]
            self.store.forms[key] = _Form(made, linear.k, replace(group[0].key, layout=linear.layout), errors, versions)
        found: _Form = self.store.forms[key]
        self._forms[members] = found
        return found

    def _folder(self, linear: LinearWeight) -> Path | None:
        """Where a packed copy goes that host memory has no room for; None: to host memory."""
        room = self.store.host_room
        if room is None or linear.nbytes <= room:
            return None
        if self.store.folder is None and "full" not in self.store.forms:
            self.store.forms["full"] = True
            log.warning(
                "weights and their packed copies together take more than max_memory['cpu'], and no disk is used"
            )
        return self.store.folder

    def _packed(
        self, members: Sequence[_Member], key: PackKey, fresh: dict[_Member, _Quantized]
    ) -> tuple[LinearWeight, list[float]]:
        found = [fresh.get(member) or self._quantized(member, key) for member in members]
        parts = [packed for packed, _ in found]
        whole = concat_rows(parts) if len(parts) > 1 else parts[0]
        return to_layout(whole, "plain" if refuses_layout(whole, key.layout) else key.layout), [
            error for _, error in found
        ]

    def _quantized(self, member: _Member, key: PackKey) -> _Quantized:
        """A weight packed as checkpoints hold it, on the device, and its relative error.

        Raises:
            ValueError: it cannot be packed.
        """
        self.store.stop()  # resident weights and the ring leave room for the work on this one
        with torch.inference_mode(False), torch.no_grad():
            weight = member.payload.fetch()
            weight = weight.t().contiguous() if member.transposed else weight
            reason = refuse_weight(weight, fp4_format(self.config.fp4_format))
            if reason is not None:
                raise ValueError(reason)
            fmt, name = self.config.fp4_format, member.payload.name
            packed = quantize(weight, fmt, method=key.method, name=name, implementations=key.implementations)
            return packed, float(relative_error(weight, packed))

    def _rewrite(self, group: Sequence[Candidate], form: _Form) -> None:
        nodes = self._placeholders(group, form)
        sites = [rematch(c.site, {c.site.weight: (0, value_of(c.site.weight))}) for c in group]
        for candidate, error in zip(group, form.errors, strict=True):
            self._decisions[candidate.site.node] = self._rewritten(candidate, error, group, form)
        settings = form.k, self.config.fp4_format, form.key.layout, self.config.fp4_activations
        rewrite_products(self.graph, group, sites, nodes, settings, sites[0].node in self._autocast)
        for site in sites:
            for user in list(site.weight.users):  # transposes that nothing reads any more
                if not user.users and user.op != "output":
                    self.graph.erase_node(user)

    def _rewritten(self, candidate: Candidate, error: float, group: Sequence[Candidate], form: _Form) -> Decision:
        payload, total = self.weights[candidate.site.weight], sum(c.n for c in group)
        others = [c.name for c in group if c is not candidate]
        reason = f"{self.config.fp4_format} weight {list(payload.size)}, relative error {error:.4f}, streamed packed"
        return Decision(
            _PASS,
            candidate.site.name,
            "rewritten",
            reason + (f", one product with {', '.join(others)}" if others else ""),
            "",
            {
                "bytes": payload.nbytes,
                "packed_bytes": form.bundle.nbytes * candidate.n // total,
                "layout": form.key.layout,
                "error": error,
                "fused_with": others,
            },
        )

    def _placeholders(self, group: Sequence[Candidate], form: _Form) -> tuple[fx.Node, ...]:
        members = tuple(map(self._member, group))
        if members not in self._nodes:
            name = group[0].site.weight.name
            self._nodes[members] = tuple(self._placeholder(name, form, part) for part in range(len(_PARTS)))
        return self._nodes[members]

    def _placeholder(self, name: str, form: _Form, part: int) -> fx.Node:
        _, shape, dtype = form.bundle.parts[part]
        node = add_placeholder(self.graph, f"{name}_{_PARTS[part]}")
        with self.fake_mode, torch.inference_mode(False):
            fake = torch.empty(shape, dtype=dtype, device=form.bundle.device)
        node.meta["example_value"] = self.fakes[node] = fake
        self.weights[node] = form.bundle
        self.parts[node] = part
        return node
