"""What the doctor finds, as records, JSON, and tables for the terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Problem:
    """Something that is wrong here. An ``error`` keeps the backend from working; a ``warning`` limits it."""

    what: str
    fix: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class DeviceReport:
    """One usable device. ``memory_gb`` in units of 2**30 bytes; ``driver`` None where the system does not tell."""

    device: str
    vendor: str
    arch: str
    name: str
    driver: str | None
    memory_gb: float | None
    multiprocessors: int | None
    features: tuple[str, ...]


@dataclass(frozen=True)
class VendorReport:
    """Whether one kind of accelerator can be used: ``ready``, ``missing``, ``broken`` or ``no device``."""

    device_type: str
    label: str
    state: str
    card_seen: bool
    reason: str
    fix: str


@dataclass(frozen=True)
class KernelReport:
    """One implementation of an operator on one architecture; ``reason`` is why it cannot run, empty if it can."""

    arch: str
    operator: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class VariableReport:
    """An environment variable in force; ``problem`` is empty if its value is valid."""

    name: str
    value: str
    problem: str = ""


@dataclass(frozen=True)
class ToolCheck:
    """Whether one compiler works.

    Attributes:
        tool: ``triton`` or ``c++``.
        purpose: What needs it here.
        ok: Whether it compiled a small program.
        detail: What was compiled, or why it failed.
        fix: What to do; empty if ok.
    """

    tool: str
    purpose: str
    ok: bool
    detail: str
    fix: str = ""


@dataclass
class Diagnosis:
    """Everything that :func:`diagnose` found.

    Attributes:
        versions: Package or system name -> version, None where it is not installed.
        devices: Usable devices, in order of priority.
        vendors: Every kind of accelerator, usable or not.
        tools: Compilers, each tried on a small program.
        kernels: Which implementation of each operator can run on which architecture.
        environment: Variables in force.
        backend_visible: Whether ``torch.compile(backend="vblackwell")`` finds the backend without an import.
        problems: What is wrong, each with its fix.
    """

    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[DeviceReport] = field(default_factory=list)
    vendors: list[VendorReport] = field(default_factory=list)
    tools: list[ToolCheck] = field(default_factory=list)
    kernels: list[KernelReport] = field(default_factory=list)
    environment: list[VariableReport] = field(default_factory=list)
    backend_visible: bool = False
    problems: list[Problem] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """For the shell: 1 if there is an error, else 0; warnings do not count."""
        return int(any(problem.severity == "error" for problem in self.problems))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"exit_status": self.exit_status}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def render(self, console: Console | None = None) -> None:
        """Print as tables on a rich console; None: on standard output."""
        (console or Console()).print(self)

    def __rich__(self) -> Group:
        return _view(self)


def _view(found: Diagnosis) -> Group:
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
