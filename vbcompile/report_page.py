"""``explain --html``: what is known about a compile as one self-contained page, without scripts or network."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from vbcompile import __version__
from vbcompile.report import Decision, GraphReport, merge_counts
from vbcompile.report_charts import memory_chart, timeline_chart
from vbcompile.vgpu_plan import Plan
from vbcompile.vgpu_simulator import Event, timeline
from vbcompile.vgpu_size import size_text

_STYLE = """
:root{color-scheme:light dark;--edge:#8884;--soft:#8881;--good:#2f8f5b;--left:#b07d10;--bad:#b3261e}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1080px;padding:1rem}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:1.6rem 0 .5rem}p{margin:.3rem 0}
code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
.cards{display:flex;flex-wrap:wrap;gap:.6rem}.card{border:1px solid var(--edge);border-radius:8px;padding:.5rem .9rem}
.card b{display:block;font-size:1.3rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .5rem;border-bottom:1px solid var(--edge)}
td:nth-child(n+4){overflow-wrap:anywhere}
.rewritten{color:var(--good)}.left{color:var(--left)}.bad{color:var(--bad)}
details{border:1px solid var(--edge);border-radius:8px;padding:.4rem .8rem;margin:.5rem 0}summary{cursor:pointer}
svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:currentColor}
.axis{stroke:currentColor}.grid{stroke:var(--edge)}
@media(max-width:640px){table.sites thead{display:none}table.sites td{display:block;border:0;padding:.1rem .3rem}
table.sites tr{display:block;border-bottom:1px solid var(--edge);padding:.4rem 0}
table.sites td::before{content:attr(data-label) ": ";font-weight:600}svg{min-width:640px}.wide{overflow-x:auto}}
"""


@dataclass(frozen=True)
class Movement:
    """What moved weights during a step, by plan and as measured.

    Attributes:
        plan: the plan.
        expected: ``(nanoseconds, bytes)`` of device memory over a step, by the plan.
        measured: events of one measured step; empty where none was recorded.
        memory: ``(nanoseconds, bytes)`` of device memory in the same step.
        statistics: counters by name, as the runtime gives them.
    """

    plan: Plan
    expected: Sequence[tuple[int, int]] = ()
    measured: Sequence[Event] = ()
    memory: Sequence[tuple[int, int]] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)


def html_page(reports: Sequence[GraphReport], title: str, movements: Sequence[Movement] = (), note: str = "") -> str:
    """The page as text.

    Args:
        reports: one for each captured graph, in order.
        title: what was explained.
        movements: where weights live and how they move, one for each model.
        note: what to know about these, or why there are none.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>vbcompile {__version__}, {datetime.date.today().isoformat()}{_devices(reports)}</p>",
        _cards(reports),
        *(_graph(report) for report in reports),
        "" if reports or movements else "<p>Nothing was compiled: Dynamo captured no graph.</p>",
        "<h2>Memory</h2>",
        f"<p>{escape(note)}</p>" if note else "",
        *(_movement(movement) for movement in movements),
        _configuration(reports),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _devices(reports: Sequence[GraphReport]) -> str:
    return "".join(f", {escape(text)}" for text in dict.fromkeys(f"{r.target}, mode {r.mode}" for r in reports))


def _cards(reports: Sequence[GraphReport]) -> str:
    cards = [("graphs", len(reports)), ("nodes", sum(r.nodes for r in reports))]
    for name, counts in merge_counts(reports).items():
        cards += [(f"{name} {action}", number) for action, number in counts.items()]
    cards += [("graph breaks", sum(bool(r.graph_break) for r in reports))]
    return (
        '<div class="cards">' + "".join(f'<div class="card"><b>{n}</b>{escape(t)}</div>' for t, n in cards) + "</div>"
    )


def _graph(report: GraphReport) -> str:
    kind = "training" if report.training else "inference"
    notes = [f'<p class="left">not available, {escape(n)}: {escape(why)}</p>' for n, why in report.unavailable]
    notes += [f'<p class="bad">failed, {escape(n)}: {escape(why)}</p>' for n, why in report.failures]
    if report.graph_break:
        notes.append(f'<p class="left">graph break: {escape(report.graph_break)}</p>')
    return f"<h2>Graph {escape(report.graph)}: {report.nodes} nodes, {kind}</h2>{_sites(report)}{''.join(notes)}"


def _sites(report: GraphReport) -> str:
    if not report.decisions:
        return "<p>No pass found a site here.</p>"
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(_site(decision) for decision in report.decisions)
    return f'<table class="sites"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


_COLUMNS = ("pass", "site", "what", "why, or what it became", "runs as")


def _site(decision: Decision) -> str:
    cells = (decision.pass_name, decision.site, decision.action, decision.reason, decision.implementation)
    marked = [f"<code>{escape(c)}</code>" if i == 1 else escape(c) for i, c in enumerate(cells)]
    marked[2] = f'<span class="{escape(decision.action)}">{marked[2]}</span>'
    return "<tr>" + "".join(f'<td data-label="{n}">{c}</td>' for n, c in zip(_COLUMNS, marked, strict=True)) + "</tr>"


def _movement(movement: Movement) -> str:
    plan = movement.plan
    facts = [
        ("budget", size_text(plan.budget)),
        ("peak by plan", size_text(plan.peak_bytes)),
        ("resident weights", size_text(plan.resident_bytes)),
        ("ring", size_text(plan.ring_bytes)),
        ("streamed per step", size_text(plan.streamed_bytes)),
        ("predicted step", f"{plan.prediction.step_ns / 1e6:.3f} ms"),
        ("share of the roofline", f"{plan.prediction.efficiency:.1%}"),
        ("bottleneck", plan.prediction.bottleneck),
        *(_counter(name, value) for name, value in movement.statistics.items()),
    ]
    return (
        f"<p>{escape(plan.summary())}</p>{_pairs(facts)}"
        + _chart("Plan: one step on the simulated clock", "" if plan.declined else timeline_chart(timeline(plan)))
        + _chart("Plan: device memory", memory_chart(movement.expected, plan.budget))
        + _chart("Measured: one step", timeline_chart(movement.measured))
        + _chart("Measured: device memory", memory_chart(movement.memory, plan.budget))
    )


def _counter(name: str, value: Any) -> tuple[str, str]:
    """A counter of the runtime in words and units."""
    words = name.replace("_", " ")
    if name == "gbps":
        return "GB/s", ", ".join(f"{link} {rate:.1f}" for link, rate in value.items())
    if name.endswith("_ns"):
        return words.removesuffix(" ns"), "none yet" if value is None else f"{value / 1e6:.3f} ms"
    return words, size_text(value) if name.endswith("_bytes") else str(value)


def _chart(title: str, svg: str) -> str:
    return f'<h3>{escape(title)}</h3><div class="wide">{svg}</div>' if svg else ""


def _configuration(reports: Sequence[GraphReport]) -> str:
    if not reports:
        return ""
    rows = [(name, f"{entry['value']} ({entry['source']})") for name, entry in reports[0].config.items()]
    return (
        f"<h2>Configuration</h2><details><summary>every option and where it came from</summary>{_pairs(rows)}</details>"
    )


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in rows) + "</table>"
