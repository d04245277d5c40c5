"""``vbcompile.stats``: where the weights of offloaded models are, and what has been moved for them."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from vbcompile.handles_model import NOT_OFFLOADED, stores_of, why_declined
from vbcompile.handles_store import WeightStore, all_stores
from vbcompile.runtime_statistics import table
from vbcompile.vgpu_plan import DEVICE
from vbcompile.vgpu_size import size_text

__all__ = ["OffloadStatistics", "stats"]


@dataclass(frozen=True)
class OffloadStatistics:
    """One offloaded model. All sizes in bytes, times in ns.

    Attributes:
        device: Where it computes.
        budget: Device memory that it may use.
        masters: Bytes of weights by the place where their masters are: ``cpu``, ``ssd``, ``cuda:1``.
        planned: Whether a graph has been compiled; everything below is empty or 0 before.
        declined: Why nothing is streamed, where that is so.
        resident: Names of the weights that stay on the device.
        resident_bytes, ring_bytes: What the plan takes of the device.
        planned_bytes: Bytes that the plan streams in a step.
        predicted_ns: Step time that it expects.
        bottleneck: ``compute``, or the name of the busiest link.
        roofline_share: Share of the roofline that it expects.
        steps: Complete steps.
        streamed_bytes: Bytes that have reached the device since the weights were offloaded.
        step_ns: Shortest of the last steps; None before the first.
        runtime: Further counters of the runtime: hits, misses, wasted and fetched bytes, links.
    """

    device: str
    budget: int
    masters: dict[str, int]
    planned: bool = False
    declined: str = ""
    resident: tuple[str, ...] = ()
    resident_bytes: int = 0
    ring_bytes: int = 0
    planned_bytes: int = 0
    predicted_ns: int = 0
    bottleneck: str = ""
    roofline_share: float = 0.0
    steps: int = 0
    streamed_bytes: int = 0
    step_ns: int | None = None
    runtime: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        places = ", ".join(f"{place} {size_text(nbytes)}" for place, nbytes in sorted(self.masters.items()))
        lines = [f"{self.device}: budget {size_text(self.budget)}; masters: {places}"]
        if not self.planned and self.declined:
            return self.declined
        if not self.planned:
            return "\n".join([*lines, "not compiled yet: each use outside of compiled code fetches its weight"])
        if self.declined:
            lines.append(self.declined)
        measured = "not run yet" if self.step_ns is None else f"{self.step_ns / 1e6:.2f} ms measured"
        return "\n".join(
            [
                *lines,
                f"{len(self.resident)} weights resident ({size_text(self.resident_bytes)}), ring "
                f"{size_text(self.ring_bytes)}, {size_text(self.planned_bytes)} streamed per step",
                f"step {self.predicted_ns / 1e6:.2f} ms predicted, {measured}; bottleneck {self.bottleneck}, "
                f"{self.roofline_share:.1%} of the roofline",
                f"{self.steps} steps, {size_text(self.streamed_bytes)} moved to the device",
                *([table(self.runtime)] if self.runtime else []),
            ]
        )


def stats(model: nn.Module | None = None) -> list[OffloadStatistics]:
    """Where the weights of offloaded models are, and what has been moved for them.

    Args:
        model: One that :func:`vbcompile.offload` was called on, or ``torch.compile`` of it; None: all of them.

    Raises:
        ValueError: nothing of the model is offloaded.
    """
    if model is None:
        return [_of(store) for store in all_stores() if store.payloads]
    stores, reason = stores_of(model), why_declined(model)
    if not stores and reason is not None:
        device = next((str(tensor.device) for tensor in model.parameters()), "")
        return [OffloadStatistics(device, 0, {}, declined=reason)]
    if not stores:
        raise ValueError(NOT_OFFLOADED)
    return [_of(store) for store in stores]


def _of(store: WeightStore) -> OffloadStatistics:
    plan = store.plan
    counters = store.counters()
    moved: dict[str, Any] = {
        "steps": counters.get("steps", 0),
        "streamed_bytes": counters.get("streamed_bytes", 0),
        "step_ns": counters.get("step_ns"),
        "runtime": counters,
    }
    base: dict[str, Any] = {"device": str(store.device), "budget": store.budget, "masters": store.masters()}
    if plan is None:
        return OffloadStatistics(**base, **moved)
    resident = [w.name.partition(":")[2] for w, lv in zip(plan.sweep.weights, plan.levels, strict=True) if lv == DEVICE]
    return OffloadStatistics(
        **base,
        **moved,
        planned=True,
        declined=plan.summary() if plan.declined else "",
        resident=tuple(resident),
        resident_bytes=plan.resident_bytes,
        ring_bytes=plan.ring_bytes,
        planned_bytes=plan.streamed_bytes,
        predicted_ns=plan.prediction.step_ns,
        bottleneck=plan.prediction.bottleneck,
        roofline_share=plan.prediction.efficiency,
    )
