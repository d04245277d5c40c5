"""``vbcompile bench report``: a Markdown table and plots from a result that ``vbcompile bench --out`` wrote."""

from pathlib import Path
from typing import Any

from vbcompile.bench import Result, load


def report(path: Path, folder: Path) -> list[Path]:
    """Write ``bench.md``, ``speedup.png``, ``roofline.png``, and ``memory.png`` where a row streamed weights.

    Args:
        path: a file of ``vbcompile bench --out``.
        folder: where the files go; made if it does not exist.

    Raises:
        OSError: the file cannot be read or the folder not written.
        ValueError: the file is no result of ``vbcompile bench``.
        ImportError: matplotlib is not installed.
    """
    try:
        result = load(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of `vbcompile bench --out`: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "bench.md"
    table.write_text(markdown(result), encoding="utf-8")
    written = [table, _speedup(result, folder / "speedup.png"), _roofline(result, folder / "roofline.png")]
    return [*written, *_memory(result, folder / "memory.png")]


def markdown(result: Result) -> str:
    """The rows as a Markdown table under one line that names the machine."""
    where = ", ".join(f"{name} {value}" for name, value in result.environment.items())
    lines = [f"**vbcompile bench** ({where})", "", "| case | time | floor | share | peers | error | allowed |"]
    lines.append("|" + " --- |" * 7)
    for row in result.rows:
        ours, peers = row.ours_and_peers
        beside = ", ".join(f"{name} {t / ours:.2f}x" for name, t in peers.items())
        if not row.times:
            beside = "; ".join(row.absent.values())
        cells = (row.name, f"{ours:.1f} us", f"{row.floor:.1f} us", f"{row.share:.0%}", beside)
        lines.append("| " + " | ".join((*cells, f"{row.error:.2e}", f"{row.allowed:.2e}")) + " |")
    return "\n".join(lines) + "\n"


def _speedup(result: Result, path: Path) -> Path:
    """Bars: how many times faster than each peer; 1 is as fast."""
    bars = [
        (f"{row.name}\nover {name}", t / row.ours_and_peers[0])
        for row in result.rows
        for name, t in row.ours_and_peers[1].items()
    ]
    figure, axes = _figure(len(bars))
    axes.barh([label for label, _ in bars], [value for _, value in bars], color="#3566c4")
    axes.axvline(1.0, color="#b3261e", linewidth=1)
    axes.set_xlabel("times faster")
    axes.invert_yaxis()
    return _save(figure, axes, path)


def _roofline(result: Result, path: Path) -> Path:
    """Bars: share of the floor that the device itself reaches in a copy or a matrix product."""
    figure, axes = _figure(len(result.rows))
    axes.barh([row.name for row in result.rows], [100 * row.share for row in result.rows], color="#2f8f5b")
    axes.axvline(100.0, color="#b3261e", linewidth=1)
    axes.set_xlabel("% of the floor")
    axes.invert_yaxis()
    return _save(figure, axes, path)


def _memory(result: Result, path: Path) -> list[Path]:
    """Lines: device memory over one step of each row that streams weights."""
    rows = [row for row in result.rows if row.memory]
    if not rows:
        return []
    figure, axes = _figure(4)
    for row in rows:
        times, sizes = zip(*row.memory, strict=True)
        axes.step([t / 1e6 for t in times], [size / 1e9 for size in sizes], where="post", label=row.name)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="ms", ylabel="GB of device memory")
    axes.legend(fontsize=8)
    return [_save(figure, axes, path)]


def _figure(bars: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.55 * bars), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=120)
    return path
