"""``vbcompile bench``: what this machine reaches, beside PyTorch's own operators and beside its floor.

The floor of a case is the longer of its bytes over the bandwidth and its operations over the rate that a large copy and
a large matrix product reach in the same run. Times are medians; the runs of a case take turns, so that a neighbour on
the machine disturbs all alike. On an accelerator each round is replayed from a graph where the device has graphs.
"""

import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vbcompile import __version__
from vbcompile.bench_cases import Case, copy_case
from vbcompile.bench_models import makers
from vbcompile.device import get_device, get_target, get_unified_backend

if TYPE_CHECKING:
    from rich.table import Table

_ROUNDS = {True: 9, False: 21}
_PRODUCT = {"cpu": 1024}


@dataclass(frozen=True)
class Row:
    """One measured case.

    Times in microseconds; ``share`` is floor over ours; ``absent``: peer -> why it has none; ``memory``:
    ``[nanoseconds, bytes]`` of the device over a step that streams weights.
    """

    name: str
    times: dict[str, float]
    floor: float
    share: float
    error: float
    allowed: float
    implementation: str
    absent: dict[str, str] = field(default_factory=dict)
    memory: list[list[int]] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether the result is within its tolerance."""
        return self.error <= self.allowed

    @property
    def ours_and_peers(self) -> tuple[float, dict[str, float]]:
        """Our time, and that of each peer; 0 and nothing where the case could not run here."""
        ours, *peers = self.times.items() or [("", 0.0)]
        return ours[1], dict(peers)


@dataclass
class Result:
    """A run of the benchmark: the machine, and one row per case."""

    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return all(row.right for row in self.rows)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __rich__(self) -> "Table":
        return _table(self)


def bench(quick: bool = False, device: str | torch.device | None = None) -> Result:
    """Measure every case that this machine can run.

    Args:
        quick: fewer and smaller cases: at most three minutes on a processor.
        device: where; None: the best device here.

    Raises:
        DeviceError: a device that cannot be used.
    """
    place = get_device() if device is None else get_unified_backend(device).device
    target = get_target(place)
    result = Result(
        {
            "date": datetime.date.today().isoformat(),
            "device": target.name or target.arch,
            "torch": torch.__version__,
            "vbcompile": __version__,
            "threads": str(torch.get_num_threads()),
        }
    )
    with torch.no_grad():
        bandwidth, link, rate = _bandwidth(place), _link(place), _matrix_rate(place)
        for make in makers(place, quick):
            case = make()
            result.rows.append(_measure(case, place, link if case.over_link else bandwidth, rate, _ROUNDS[quick]))
    return result


def _measure(case: Case, device: torch.device, bandwidth: float, rate: float, rounds: int) -> Row:
    times = {name: seconds * 1e6 for name, seconds in _times(case.runs, device, rounds, case.graphs).items()}
    floor = max(case.nbytes / bandwidth, case.flops / rate) * 1e6
    share = floor / next(iter(times.values())) if times else 0.0
    return Row(case.name, times, floor, share, case.error, case.allowed, case.implementation, case.absent, case.memory)


def _times(
    runs: dict[str, Sequence[Callable[[], object]]], device: torch.device, rounds: int, graphs: bool = True
) -> dict[str, float]:
    """Median seconds of one call of each run, rounds taken in turns."""
    prepared = {name: round_of(calls, device, graphs) for name, calls in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in prepared.items():
            started = time.perf_counter()
            run()
            found[name].append((time.perf_counter() - started) / len(runs[name]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def round_of(calls: Sequence[Callable[[], object]], device: torch.device, graphs: bool = True) -> Callable[[], None]:
    """One round over all sets of inputs, ended by waiting for the device; warmed up.

    Args:
        graphs: replay it from a CUDA graph where the device has graphs.
    """

    def run() -> None:
        for call in calls:
            call()

    run()
    if device.type == "cpu":
        return run
    synchronize = torch.get_device_module(device).synchronize
    replay = _graph(run) if graphs and device.type == "cuda" else run

    def timed() -> None:
        replay()
        synchronize()

    timed()
    return timed


def _graph(run: Callable[[], None]) -> Callable[[], None]:
    """The round captured in a CUDA graph, so that the gaps between launches are not what is measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    case = copy_case(device)
    return case.nbytes / _times(case.runs, device, 5)["copy"]


def _link(device: torch.device) -> float:
    """Bytes per second from pinned host memory; a processor has no such link."""
    if device.type == "cpu":
        return _bandwidth(device)
    case = copy_case(device, to_device=True)
    return case.nbytes / _times(case.runs, device, 5)["copy"]


def _matrix_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product in the dtype that the cases use."""
    size = _PRODUCT.get(device.type, 8192)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / _times({"product": [lambda: a @ b]}, device, 5)["product"]


def _table(result: Result) -> "Table":
    from rich.table import Table

    title = ", ".join(f"{name} {value}" for name, value in result.environment.items())
    table = Table(title=title, title_justify="left", expand=True)
    for column in ("case", "time", "peers", "share of the floor", "error (allowed)", "runs as"):
        table.add_column(column, overflow="fold")
    for row in result.rows:
        ours, peers = row.ours_and_peers
        beside = [f"{name} {_microseconds(t)} ({t / ours:.2f}x)" for name, t in peers.items()]
        beside += [f"no {name}: {reason}" for name, reason in row.absent.items()]
        error = f"{row.error:.2e} ({row.allowed:.2e}){'' if row.right else ' WRONG'}" if row.allowed else ""
        cells = (
            (_microseconds(ours), "\n".join(beside), f"{row.share:.0%}") if row.times else ("", "\n".join(beside), "")
        )
        table.add_row(row.name, *cells, error, row.implementation)
    return table


def _microseconds(value: float) -> str:
    return f"{value:.1f} us" if value < 1000 else f"{value / 1000:.2f} ms"


def load(text: str) -> Result:
    """The result that :meth:`Result.to_json` wrote."""
    data: dict[str, Any] = json.loads(text)
    return Result(data["environment"], [Row(**row) for row in data["rows"]])
