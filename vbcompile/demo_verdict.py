"""What the demo measured, whether the numbers agree, and the tables that show it."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

COSINE_FLOOR = 0.9999
PERPLEXITY_TOLERANCE = 0.005  # relative


@dataclass(frozen=True)
class Agreement:
    """How far a greedy continuation follows eager's.

    Attributes:
        agreed: tokens before the first difference.
        total: tokens that were generated.
        margin: difference of eager's two largest logits at the first token that differs; None where all agree.
    """

    agreed: int
    total: int
    margin: float | None = None


@dataclass(frozen=True)
class Column:
    """One way of running one model: a column of the table.

    Attributes:
        backend: ``"eager"``, ``"inductor"``, ``"vblackwell"``.
        first_call_s: seconds of the first call, compilation included, compile caches empty.
        step_s: median seconds of one step after that.
        peak_bytes: largest memory during a step, weights included.
        difference: largest absolute difference of an output to eager's.
        sites: attention sites rewritten; None where nothing rewrites.
        cosine: smallest cosine of an embedding to eager's; None for a language model.
        perplexity: on English text; None for an encoder.
        agreement: of the greedy continuation with eager's; None for an encoder.
    """

    backend: str
    first_call_s: float
    step_s: float
    peak_bytes: int
    difference: float
    sites: int | None = None
    cosine: float | None = None
    perplexity: float | None = None
    agreement: Agreement | None = None


@dataclass(frozen=True)
class ModelResult:
    """One model's table and its verdict.

    Attributes:
        name: of the model.
        step: what one step is, for the table's title.
        columns: eager first, the backend under test last, references such as Inductor between them.
        bound: largest difference of an output to eager's that rounding explains.
        problems: why the backend under test fails; empty where its numbers agree.
        notes: the same complaints about a reference column; they fail nothing.
        sample: something the backend under test said, for people.
    """

    name: str
    step: str
    columns: tuple[Column, ...]
    bound: float
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    sample: str


@dataclass(frozen=True)
class DemoResult:
    """The whole demo.

    Attributes:
        device: that it ran on, by name.
        memory_source: where the peak memory comes from.
        models: one result for each model.
    """

    device: str
    memory_source: str
    models: tuple[ModelResult, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(f"{model.name}: {problem}" for model in self.models for problem in model.problems)

    @property
    def exit_code(self) -> int:
        """0 where all numbers agree, else 1."""
        return 1 if self.problems or not self.models else 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, ``problems`` and ``exit_code``."""
        return asdict(self) | {"problems": self.problems, "exit_code": self.exit_code}


def judge(name: str, step: str, columns: Sequence[Column], bound: float, sample: str = "") -> ModelResult:
    """Compare each column with the first, which is eager; the last is the backend under test."""
    eager, *references, tested = columns
    complaints = disagreements(tested, eager, bound)
    if not tested.sites:
        complaints.append(f"{tested.backend} rewrote no attention site")
    notes = [complaint for reference in references for complaint in disagreements(reference, eager, bound)]
    return ModelResult(name, step, tuple(columns), bound, tuple(complaints), tuple(notes), sample)


def disagreements(column: Column, eager: Column, bound: float) -> list[str]:
    """Every number of ``column`` that differs from eager's by more than rounding explains, in words. NaN differs."""
    found = []
    if not column.difference <= bound:
        found.append(f"outputs differ from eager by {column.difference:.2e}, more than {bound:.2e}")
    if column.cosine is not None and not column.cosine >= COSINE_FLOOR:
        found.append(f"smallest cosine with eager's embeddings is {column.cosine:.6f}, below {COSINE_FLOOR}")
    if column.perplexity is not None and eager.perplexity is not None:
        off = abs(column.perplexity / eager.perplexity - 1)
        if not off <= PERPLEXITY_TOLERANCE:
            found.append(f"perplexity {column.perplexity:.4f} is off eager's {eager.perplexity:.4f} by {off:.2%}")
    if column.agreement is not None and not _agrees(column.agreement, bound):
        at, margin = column.agreement.agreed + 1, column.agreement.margin
        found.append(f"greedy token {at} differs where eager's two best logits are {margin:.2e} apart: not a tie")
    return [f"{column.backend}: {complaint}" for complaint in found]


def _agrees(agreement: Agreement, bound: float) -> bool:
    """All tokens agree, or the first that differs was a tie: each of the two logits may be off by ``bound``."""
    return agreement.margin is None or agreement.margin <= 2 * bound


def difference_bound(eager_error: float, largest: float, epsilon: float) -> float:
    """The largest difference between eager and a compiled model that rounding explains.

    The house rule allows a compiled model twice eager's error against float64; between the two lies at most the sum,
    three times eager's error. Where eager happens to be exact, four units in the last place of the largest output.
    """
    return max(3 * eager_error, 4 * epsilon * largest)


def render(result: DemoResult, console: Console) -> None:
    """One table for each model, samples, and the verdict."""
    say = functools.partial(console.print, highlight=False, markup=False)
    for model in result.models:
        console.print(_table(model))
        say(model.sample, style="dim")
        for note in model.notes:
            say(f"note: {note}", style="yellow")
        say()
    say(f"Device: {result.device}. Peak memory: {result.memory_source}.", style="dim")
    for problem in result.problems:
        say(f"FAILED {problem}", style="red")
    if result.exit_code == 0:
        say("OK: all numbers agree with eager", style="green")


def _table(model: ModelResult) -> Table:
    table = Table(title=f"{model.name}: {model.step}", title_justify="left", caption_justify="left")
    table.add_column("")
    for column in model.columns:
        table.add_column(column.backend, justify="right")
    for label, cell in _ROWS:
        cells = [cell(column) for column in model.columns]
        if any(cells):
            table.add_row(label, *(text or "-" for text in cells))
    table.caption = f"difference that rounding explains: {model.bound:.1e}"
    return table


def _optional(value: Any, template: str) -> str:
    return "" if value is None else template.format(value)


def _agreement(column: Column) -> str:
    return "" if column.agreement is None else f"{column.agreement.agreed} of {column.agreement.total}"


_ROWS: tuple[tuple[str, Callable[[Column], str]], ...] = (
    ("time per step, median", lambda c: _duration(c.step_s)),
    ("first call", lambda c: _duration(c.first_call_s)),
    ("peak memory", lambda c: f"{c.peak_bytes / 2**20:,.0f} MiB"),
    ("largest difference to eager", lambda c: f"{c.difference:.1e}"),
    ("smallest cosine with eager", lambda c: _optional(c.cosine, "{:.7f}")),
    ("greedy tokens as eager", _agreement),
    ("perplexity", lambda c: _optional(c.perplexity, "{:.4f}")),
    ("attention sites rewritten", lambda c: _optional(c.sites, "{}")),
)


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "nan"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
