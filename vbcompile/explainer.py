"""``vbcompile.explain``: what the backend does to a model, as objects, text and JSON."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from vbcompile import compat
from vbcompile.backend import collected_reports, vblackwell
from vbcompile.config import resolve_config
from vbcompile.device_catalog import catalog_target
from vbcompile.handles_model import stores_of
from vbcompile.handles_store import all_stores
from vbcompile.handles_timeline import movement_of, recorded
from vbcompile.report import GraphReport, merge_counts
from vbcompile.vgpu_plan import PlanError

if TYPE_CHECKING:
    from vbcompile.report_page import Movement

_STYLE = {"rewritten": "green", "left": "yellow"}
_UNCOMPILED = (
    "Measured in the call that was explained, whose segments ran uncompiled from an empty ring; "
    "vbcompile.write_timeline draws a step of the compiled model."
)


@dataclass(frozen=True)
class Explanation:
    """Decision records of one call of a model: one report per captured graph, in the order of capture.

    Printing it gives text; ``rich`` renders it as tables.

    Attributes:
        reports: what each pass did, by graph.
        movements: where weights live and what moved them, one for each offloaded model.
        note: what to know about these, or why there are none.
    """

    reports: Sequence[GraphReport]
    movements: "Sequence[Movement]" = ()
    note: str = ""
    _planned: "Callable[[], Movement] | None" = field(default=None, repr=False, compare=False)

    @property
    def graph_breaks(self) -> list[str]:
        """Why Dynamo ended a graph before the model returned, one reason per break."""
        return [r.graph_break for r in self.reports if r.graph_break]

    def counts(self) -> dict[str, dict[str, int]]:
        """Sites per pass and action, e.g. ``{"attention": {"rewritten": 12}}``."""
        return merge_counts(self.reports)

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": [r.to_dict() for r in self.reports],
            "graph_breaks": self.graph_breaks,
            "counts": self.counts(),
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, default=str)

    def to_html(self, title: str = "vbcompile explain") -> str:
        """One self-contained page: sites, reasons, implementations, memory over a step, and configuration.

        Memory is that of the plan and of the call where weights are offloaded. For another module it is planned here,
        from shapes alone and for the best device of this machine.
        """
        from vbcompile.report_page import html_page

        movements, note = self.movements, self.note
        if self._planned is not None:
            try:
                movements = [self._planned()]
            except (ValueError, RuntimeError, TypeError) as error:
                note = f"Not planned: {error}"
        return html_page(self.reports, title, movements, note)

    def __str__(self) -> str:
        console = Console(width=120, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.reports:
            yield Text("Nothing was compiled: Dynamo captured no graph.")
        for report in self.reports:
            yield Text(report.summary(), style="bold")
            if report.decisions:
                yield _table(report)
            for name, reason in report.unavailable:
                yield Text(f"  not available, {name}: {reason}")
            for name, reason in report.failures:
                yield Text(f"  failed, {name}: {reason}", style="red")
            if report.graph_break:
                yield Text(f"  graph break: {report.graph_break}", style="yellow")


def _table(report: GraphReport) -> Table:
    table = Table(show_lines=False, expand=True)
    for column in ("pass", "site", "what", "why, or what it became", "runs as"):
        table.add_column(column, overflow="fold", no_wrap=column in ("pass", "what"))
    for decision in report.decisions:
        action = Text(decision.action, style=_STYLE.get(decision.action, ""))
        row = (decision.pass_name, decision.site, action, decision.reason, decision.implementation)
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    as_device: str | None = None,
    **keyword_inputs: Any,
) -> Explanation:
    """Capture one call of a model, run the passes on it, and tell what they did.

    Nothing is compiled: the rewritten graph runs eagerly once. Whether training or inference is explained depends on
    whether autograd records, as in a real call. A model that is in use compiled stays so.

    Args:
        model: a module or function, not compiled by ``torch.compile``.
        inputs, keyword_inputs: what it is called with.
        mode, options: as for ``torch.compile(backend="vblackwell")``.
        as_device: choose kernels as for this architecture (``"gfx942"``, ``"Ascend910B1"``); the call itself still
            runs on the device that the inputs are on.

    Raises:
        ConfigError: unknown mode, option or value.
        DeviceError: unknown architecture.
        PlanError: no plan keeps the budget.
        TypeError: the model cannot be called.
    """
    if not callable(model):
        raise TypeError(f"explain takes a torch.nn.Module or a function and its inputs, not {type(model).__name__}")
    target = None if as_device is None else catalog_target(as_device)
    arguments = {**(options or {}), "downstream": "eager", **({} if mode is None else {"mode": mode})}
    config = resolve_config(options=arguments)  # an error here is not wrapped in Dynamo's

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # a new object each time: no cached graph matches it
        return vblackwell(gm, example_inputs, options=arguments, target=target)

    stores = stores_of(model) if isinstance(model, torch.nn.Module) else []
    plans = config.recompute or config.offload or config.budget is not None
    if plans and torch.is_grad_enabled() and target is None and not stores:
        arguments["downstream"] = "aot_eager"  # what is saved for the backward is planned on autograd's graph
    with collected_reports() as reports, torch._dynamo.config.patch(recompile_limit=64), recorded(stores):
        try:
            with _plain_forwards(model):
                torch.compile(model, backend=backend)(*inputs, **keyword_inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise (error.inner_exception if isinstance(error.inner_exception, PlanError) else error) from None
        movements = [found for found in map(movement_of, stores) if found is not None]
    if movements:
        return Explanation(reports, movements, _UNCOMPILED)
    if target is not None:
        return Explanation(reports, note="Not planned: the kernels are those of a device that is not here.")
    if not isinstance(model, torch.nn.Module):
        return Explanation(reports, note="Not planned: this is a function, not a torch.nn.Module.")
    return Explanation(reports, _planned=_planner(model, inputs, keyword_inputs))


@contextmanager
def _plain_forwards(model: Any) -> Iterator[None]:
    """Undoes ``model.forward = torch.compile(model.forward)`` meanwhile: that compile would be met instead."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    compiled = {m: forward for m in modules if (forward := vars(m).get("forward")) is not None}
    try:
        for module, forward in compiled.items():
            module.forward = compat.uncompiled(forward)  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in compiled.items():
            module.forward = forward  # type: ignore[method-assign]


def explain_script(run: Callable[[], Any]) -> Explanation:
    """What was compiled while ``run`` ran, with the plans of those offloaded models that its result keeps alive."""
    with collected_reports() as reports:
        kept = run()
    movements = [found for found in map(movement_of, all_stores()) if found is not None]
    del kept
    return Explanation(reports, movements, "" if movements else "Not planned: that takes one model, as FILE.py:NAME.")


def _planner(model: torch.nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]) -> "Callable[[], Movement]":
    """Plans one step, in training if autograd records now."""
    training = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())

    def planned() -> "Movement":
        from vbcompile.estimator import estimate
        from vbcompile.report_page import Movement

        if inputs and named:
            raise ValueError("inputs were given by position and by name")
        found = estimate(model, inputs=named or inputs, training=training)
        return Movement(found.plan, found.memory)

    return planned
