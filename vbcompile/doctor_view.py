"""A diagnosis as tables for the terminal."""

from collections.abc import Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vbcompile.doctor import Diagnosis, KernelReport, Problem


def view(found: Diagnosis) -> Group:
    """All parts of the diagnosis that hold something, and one line with the verdict at the end."""
    tables = [
        _table("Versions", ("", ""), [(name, version or "not installed") for name, version in found.versions.items()]),
        _table(
            "Devices",
            ("device", "what it is", "architecture", "driver", "memory", "processors"),
            [
                (d.device, _lines(d.name, " ".join(d.features)), d.arch, d.driver, _gb(d.memory_gb), d.multiprocessors)
                for d in found.devices
            ],
        ),
        _table(
            "Accelerators",
            ("device", "kind", "state", "why not, and the fix"),
            [(v.device_type, v.label, v.state, _lines(v.reason, v.fix and f"Fix: {v.fix}")) for v in found.vendors],
        ),
        _table(
            "Compilers",
            ("tool", "for", "works", ""),
            [(tool.tool, tool.purpose, _yes(tool.ok), tool.detail) for tool in found.tools],
        ),
        *kernel_tables(found.kernels),
        _table(
            "Environment",
            ("variable", "value", "problem"),
            [(variable.name, variable.value, variable.problem) for variable in found.environment],
        ),
    ]
    return Group(*(table for table in tables if table.row_count), *map(_problem, found.problems), _verdict(found))


def kernel_tables(kernels: Sequence[KernelReport]) -> list[Table]:
    """For each architecture and operator, which implementation runs there; names are never broken."""
    groups: dict[str, list[tuple]] = {}
    for k in kernels:
        row = k.implementation, _yes(not k.reason), k.reason
        groups.setdefault(f"Kernels for {k.operator} on {k.arch}", []).append(row)
    return [_table(title, ("implementation", "runs", "why not"), rows, whole=1) for title, rows in groups.items()]


def _table(title: str, columns: tuple[str, ...], rows: list[tuple], whole: int = 0) -> Table:
    """A table whose first ``whole`` columns are as wide as their longest cell."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number < whole)
    for row in rows:
        table.add_row(*(escape("" if cell is None else str(cell)) for cell in row))
    return table


def _problem(problem: Problem) -> Text:
    style = "bold red" if problem.severity == "error" else "bold yellow"
    return Text.assemble((problem.severity, style), f": {problem.what}\n  fix: {problem.fix}")


def _verdict(found: Diagnosis) -> Text:
    errors = sum(problem.severity == "error" for problem in found.problems)
    warnings = len(found.problems) - errors
    if not found.problems:
        return Text("No problems found.", style="bold green")
    return Text(f"{errors} error(s), {warnings} warning(s).", style="bold red" if errors else "bold yellow")


def _gb(size: float | None) -> str:
    return "" if size is None else f"{size:.1f} GiB"


def _lines(*texts: str) -> str:
    return "\n".join(text for text in texts if text)


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
