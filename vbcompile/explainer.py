"""``vbcompile.explain``: what the backend does to a model, as objects, text and JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from vbcompile.backend import collected_reports, vblackwell
from vbcompile.device_catalog import catalog_target
from vbcompile.report import GraphReport, merge_counts

_STYLE = {"rewritten": "green", "left": "yellow"}


@dataclass(frozen=True)
class Explanation:
    """Decision records of one call of a model: one report per captured graph, in the order of capture.

    Printing it gives text; ``rich`` renders it as tables.
    """

    reports: Sequence[GraphReport]

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
        """One self-contained page: sites, reasons, implementations, memory and configuration."""
        from vbcompile.report_page import html_page

        return html_page(self.reports, title)

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
    table = Table("pass", "site", "what", "why, or what it became", "runs as", show_lines=False, expand=True)
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
    """
    target = None if as_device is None else catalog_target(as_device)
    arguments = {**(options or {}), "downstream": "eager", **({} if mode is None else {"mode": mode})}

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return vblackwell(
            gm, example_inputs, options=arguments, target=target
        )  # a new object each time: no cached graph matches it

    with collected_reports() as reports, torch._dynamo.config.patch(recompile_limit=64):
        torch.compile(model, backend=backend)(*inputs, **keyword_inputs)
    return Explanation(reports)
