"""Pictures of a step as SVG text: memory over time, and what each link and the computation did when."""

from collections.abc import Sequence
from html import escape

from vbcompile.vgpu_simulator import Event
from vbcompile.vgpu_size import size_text

_WIDTH, _LEFT, _RIGHT, _LANE, _HEIGHT = 960, 96, 12, 30, 220
_COLOURS = ("#3566c4", "#2f8f5b", "#b3541e", "#7d4fb3", "#98790a", "#4b7c8f")


def timeline_chart(events: Sequence[Event]) -> str:
    """One lane for each link and for the computation, with a title on every bar. Empty where nothing was recorded."""
    if not events:
        return ""
    first, last = min(e.start_ns for e in events), max(e.end_ns for e in events)
    scale = _Scale(first, max(last, first + 1))
    lanes = {name: row for row, name in enumerate(sorted({e.lane for e in events}, key=lambda n: (n != "compute", n)))}
    height = len(lanes) * _LANE + 34
    parts = [
        f'<text x="{_LEFT - 8}" y="{row * _LANE + 19}" text-anchor="end">{escape(name)}</text>'
        for name, row in lanes.items()
    ]
    for event in events:
        row, width = lanes[event.lane], max(scale.x(event.end_ns) - scale.x(event.start_ns), 0.6)
        parts.append(
            f'<rect x="{scale.x(event.start_ns):.1f}" y="{row * _LANE + 4}" width="{width:.1f}" height="{_LANE - 8}" '
            f'fill="{_COLOURS[row % len(_COLOURS)]}"><title>{escape(event.name)}: '
            f"{(event.end_ns - event.start_ns) / 1e6:.3f} ms</title></rect>"
        )
    return _svg("transfer timeline of one step", [*parts, *scale.axis(len(lanes) * _LANE)], height)


def memory_chart(points: Sequence[tuple[int, int]], budget: int | None = None) -> str:
    """Bytes in use as a stepped line, with the budget as a dashed one. Empty where nothing was recorded.

    Args:
        points: ``(nanoseconds, bytes)`` in order of time; each value holds until the next.
        budget: bytes that must not be exceeded; drawn where memory comes within a fifth of them.
    """
    if not points:
        return ""
    scale = _Scale(points[0][0], max(points[-1][0], points[0][0] + 1))
    most = max(nbytes for _, nbytes in points)
    budget = budget if budget and budget <= 5 * most else None
    top = max(most, budget or 0, 1) * 1.08
    y = lambda nbytes: _HEIGHT - 30 - (_HEIGHT - 44) * nbytes / top
    path = [f"M{scale.x(points[0][0]):.1f} {y(points[0][1]):.1f}"]
    for time, nbytes in points[1:]:
        path.append(f"H{scale.x(time):.1f}V{y(nbytes):.1f}")
    parts = [f'<path d="{"".join(path)}" fill="none" stroke="{_COLOURS[0]}" stroke-width="1.6"/>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_grid_line(y(top * share), size_text(round(top * share))))
    if budget:
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(budget):.1f}" y2="{y(budget):.1f}" '
            f'stroke="#b3261e" stroke-dasharray="5 4"/><text x="{_WIDTH - _RIGHT}" y="{y(budget) - 4:.1f}" '
            f'text-anchor="end">budget {size_text(budget)}</text>'
        )
    return _svg("device memory over one step", [*parts, *scale.axis(_HEIGHT - 30)], _HEIGHT)


class _Scale:
    """Time to pixels."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def x(self, time: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (time - self.first) / (self.last - self.first)

    def axis(self, y: float) -> list[str]:
        parts = [f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="axis"/>']
        for tick in range(5):
            time = self.first + (self.last - self.first) * tick // 4
            anchor = ("start", "middle", "middle", "middle", "end")[tick]
            text = f"{(time - self.first) / 1e6:.4g} ms"
            parts.append(f'<text x="{self.x(time):.1f}" y="{y + 17:.1f}" text-anchor="{anchor}">{text}</text>')
        return parts


def _grid_line(y: float, text: str) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
