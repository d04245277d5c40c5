"""The partitioner of the modes that save memory: plan, mark, let PyTorch split the graph, move what the plan moves."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from vbcompile import compat
from vbcompile.config import Config
from vbcompile.passes import activation_graph, activation_offload, activation_plan, recompute
from vbcompile.passes.activation_graph import JointGraph, node_bytes
from vbcompile.passes.activation_plan import Limits, Rates, StepPlanner
from vbcompile.passes.activation_rates import measured_rates
from vbcompile.passes.graph_ops import describe_site
from vbcompile.passes.pass_context import PassContext
from vbcompile.passes.saved_operands import guard_saved
from vbcompile.report import Decision, GraphReport
from vbcompile.said_once import is_first
from vbcompile.vgpu_activations import ActivationPlan
from vbcompile.vgpu_plan import PlanError
from vbcompile.vgpu_size import size_text

MODULES = (activation_graph, activation_offload, activation_plan, recompute)
"""What a partition depends on, for the compile cache's key."""

log = logging.getLogger(__name__)


class ActivationPartitioner:
    """Splits a joint graph; every tensor that is saved by default gets a fate of its own, and a line in the report.

    Args:
        rates: Speeds of the device that runs the graph.
        limits: Budget, or the time that may be spent.
        report: Takes the decisions.
        strict: Raise where planning fails, instead of saving what PyTorch would.
    """

    def __init__(self, rates: Rates, limits: Limits, report: GraphReport, strict: bool = False) -> None:
        self._rates, self._limits, self._report, self._strict = rates, limits, report, strict

    def __call__(
        self, joint: fx.GraphModule, inputs: Sequence[Any], *, num_fwd_outputs: int, **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward graph.

        Raises:
            PlanError: the budget is too small for this step.
        """
        options["num_fwd_outputs"] = num_fwd_outputs
        guard_saved(joint.graph, num_fwd_outputs)
        marks = {node.name: node.meta.get("recompute") for node in joint.graph.nodes}
        try:
            return self._split(joint, inputs, options)
        except PlanError:
            raise
        except Exception as error:
            if self._strict:
                raise
            reason = f"{type(error).__name__}: {error}"
            self._report.failures.append(("recompute", reason))
            log.warning("the plan for activations failed, they are saved as PyTorch does: %s", reason)
            log.debug("the plan for activations failed", exc_info=True)
        for node in joint.graph.nodes:
            node.meta["recompute"] = marks.get(node.name)
        return compat.partition(joint, inputs, **options)

    def _split(
        self, joint: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        outputs = options["num_fwd_outputs"]
        graph = JointGraph(joint.graph, outputs)
        if not graph.backward:
            return compat.partition(joint, inputs, **options)
        planner, plan = self._plan(graph)
        fates = dict(zip(planner.planned, plan.fates, strict=True))
        again = {node for node, fate in fates.items() if fate.choice == "recompute"}
        recompute.mark(graph, dict.fromkeys(node for node in planner.saved if node not in again))
        trips = {
            node.name: activation_offload.Trip(
                _name(planner.leader(fate.free_before) if fate.free_before < planner.first_backward else None),
                _name(planner.leader(fate.back_at)),
            )
            for node, fate in fates.items()
            if fate.choice == "offload"
        }
        sizes = {node.name: node_bytes(node) for node in planner.saved}
        forward, backward = compat.partition(joint, inputs, **options)
        moved = activation_offload.insert_trips(forward, backward, outputs, trips) if trips else []
        self._tell(planner, plan, fates, moved, sizes)
        return forward, backward

    def _plan(self, graph: JointGraph) -> tuple[StepPlanner, ActivationPlan]:
        """The planner with its plan. What may be made again counts as if it were made at the soonest, so that a budget
        that is too small that way may be kept by moving alone."""
        planner = StepPlanner(graph, self._rates, self._limits)
        try:
            return planner, planner.plan()
        except PlanError as error:
            if not (self._limits.recompute and self._limits.offload):
                raise
            planner = StepPlanner(graph, self._rates, replace(self._limits, recompute=False))
            try:
                return planner, planner.plan()
            except PlanError as other:
                raise min(error, other, key=lambda e: e.minimum_budget or math.inf) from None

    def _tell(
        self,
        planner: StepPlanner,
        plan: ActivationPlan,
        fates: dict[fx.Node, Any],
        moved: list[str],
        sizes: dict[str, int],
    ) -> None:
        for node, fate in fates.items():
            choice = "keep" if fate.choice == "offload" and node.name not in moved else fate.choice
            name = "activation_offload" if choice == "offload" else "recompute"
            action = "left" if choice == "keep" else "rewritten"
            details = {"tensor": node.name, "bytes": sizes[node.name], "choice": choice}
            reason = _reason(planner, node, choice)
            self._report.decisions.append(Decision(name, describe_site(node), action, reason, details=details))
        facts = {
            "saved_bytes": sum(sizes.values()),
            "peak_bytes": plan.peak_bytes,
            "peak_bytes_if_kept": plan.kept_peak_bytes,
            "step_ns": plan.step_ns,
            "step_ns_if_kept": plan.kept_step_ns,
        }
        reason = (
            f"estimated peak {size_text(plan.peak_bytes)} in {plan.step_ns / 1e6:.1f} ms, instead of "
            f"{size_text(plan.kept_peak_bytes)} in {plan.kept_step_ns / 1e6:.1f} ms if all "
            f"{size_text(sum(sizes.values()))} that the backward needs were kept"
        )
        action = "left" if plan.declined else "rewritten"
        self._report.decisions.append(Decision("activations", "the step", action, reason, details=facts))
        log.info("activations: %s", reason)


def partitioner_for(context: PassContext, report: GraphReport) -> ActivationPartitioner | None:
    """The partitioner for a graph that is trained in a mode that saves memory; None for all others.

    Nothing is gained by moving tensors from main memory to main memory: on the CPU they are only recomputed, unless
    offload is asked for by name.
    """
    config = context.config
    offload = config.offload and (context.target.device_type != "cpu" or config.sources.get("offload") == "options")
    if not context.training:
        return None
    if not (config.recompute or offload):
        if config.budget is not None:
            _tell_of_unused_budget(config, config.budget, report)
        return None
    limits = Limits(config.budget, config.slowdown, config.recompute, offload)
    return ActivationPartitioner(measured_rates(context.target.device_type), limits, report, config.strict)


def _tell_of_unused_budget(config: Config, budget: int, report: GraphReport) -> None:
    """A limit that nothing keeps is said: in the report, and in one warning where it was given to this compile."""
    why = "on the CPU activations are moved only by offload=True" if config.offload else "recompute and offload are off"
    reason = f"the budget of {size_text(budget)} is not looked at: {why}; mode 'memory' plans within it"
    if any(decision.reason == reason for decision in report.decisions):  # a graph in segments
        return
    _tell_of_no_plan(reason, report, warns=config.sources.get("budget") == "options")


def tell_that_nothing_is_planned(compiler: str, report: GraphReport) -> None:
    """A vendor's compiler splits joint graphs by itself: said in the report, and in one warning."""
    reason = f"{compiler} decides alone what is saved for the backward: downstream='aot_eager' keeps to mode and budget"
    _tell_of_no_plan(reason, report, warns=True)


def _tell_of_no_plan(reason: str, report: GraphReport, warns: bool) -> None:
    report.decisions.append(Decision("activations", "the step", "left", reason))
    if warns and is_first(reason):
        log.warning("%s", reason)


def _name(node: fx.Node | None) -> str | None:
    return None if node is None else node.name


def _reason(planner: StepPlanner, node: fx.Node, choice: str) -> str:
    mib = node_bytes(node) / 2**20
    if choice == "recompute":
        return f"{mib:.1f} MiB made again in the backward, in about {planner.recomputable[node] / 1e3:.0f} us"
    if choice == "offload":
        return f"{mib:.1f} MiB moved to host memory and back"
    return f"{mib:.1f} MiB kept for the backward"
