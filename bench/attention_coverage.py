"""Coverage of the attention pass: the corpus and the model families, over modes, dtypes and shapes.

    python bench/attention_coverage.py --backends vblackwell inductor
    python bench/attention_coverage.py --what corpus --dtypes float32 --modes inference --only sink mask

Writes ``bench/results/attention_coverage_<device>.json`` and prints a table. Exit status 1 if our backend gives a wrong
result, fuses what it must not, or a family differs from eager.
"""

import os

os.environ.setdefault("TORCHINDUCTOR_PATTERN_MATCH_DEBUG", "-")  # makes Inductor count its hits per pattern, exactly

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

from attention_cases.case import BOTH
from attention_corpus import CASES
from attention_trial import REFUSED_BY_PYTORCH, Backend, Result, attempt, inductor, inductor_patterns, vblackwell
from model_families import FAMILIES, FamilyResult, try_family
from parallel_trials import run_in_parallel
from record import environment, folder

console = Console(width=None if sys.stdout.isatty() else 140)


def make_backend(name: str) -> Backend:
    """``vblackwell`` (on Inductor), ``vblackwell:aot_eager`` or ``vblackwell:eager`` (without code generation),
    ``inductor``, or ``inductor:patterns`` (Inductor's rewrites without its code generation)."""
    made: dict[str, Callable[[], Backend]] = {
        "vblackwell": lambda: vblackwell("inductor"),
        "vblackwell:aot_eager": lambda: vblackwell("aot_eager"),
        "vblackwell:eager": lambda: vblackwell("eager"),
        "inductor": inductor,
        "inductor:patterns": inductor_patterns,
    }
    if name not in made:
        raise SystemExit(f"unknown backend {name!r}; valid: {', '.join(made)}")
    return made[name]()


def run_corpus(arguments: argparse.Namespace) -> list[Result]:
    """Every case of the corpus in every combination asked for."""
    cases = [c for c in CASES.values() if not arguments.only or {c.family, c.name} & set(arguments.only)]
    product = itertools.product(arguments.backends, arguments.modes, arguments.dtypes, arguments.shapes, cases)
    return run_all(run_case, [(*trial, case.name) for *trial, case in product if trial[1] in case.modes], arguments)


def run_families(arguments: argparse.Namespace) -> list[FamilyResult]:
    """Every model family in inference and training."""
    families = [f.name for f in FAMILIES if not arguments.only or f.name in arguments.only]
    return run_all(run_family, list(itertools.product(arguments.backends, arguments.modes, families)), arguments)


def run_all(run: Callable[..., Any], trials: Sequence[tuple[Any, ...]], arguments: argparse.Namespace) -> list[Any]:
    """``run(*trial, device)`` of every ``arguments.every``-th trial, in ``arguments.jobs`` processes."""
    chosen = [(*trial, arguments.device) for trial in trials][:: arguments.every]
    if arguments.jobs > 1:
        return run_in_parallel(run, chosen, arguments.jobs, arguments.seconds)
    return [run(*trial) for trial in track(chosen, run.__name__, console=console)]


def run_case(backend: str, mode: str, dtype: str, shapes: str, case: str, device: str) -> Result:
    """One case of the corpus under a backend, by their names."""
    warnings.filterwarnings("ignore")
    made, dynamic = make_backend(backend), shapes == "dynamic"
    return attempt(CASES[case], made, mode=mode, dtype=getattr(torch, dtype), dynamic=dynamic, device=device)


def run_family(backend: str, mode: str, family: str, device: str) -> FamilyResult:
    """One family under a backend, by their names."""
    warnings.filterwarnings("ignore")
    chosen = next(f for f in FAMILIES if f.name == family)
    return try_family(chosen, make_backend(backend), mode=mode, device=device)


def summarise(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row per backend, mode, dtype and shapes.

    ``fused`` and ``left`` count cases that came out as they should; ``wrong`` counts results worse than eager's.
    """
    rows = []
    key = lambda r: (r.backend, r.mode, r.dtype, r.dynamic)
    for (backend, mode, dtype, dynamic), group in itertools.groupby(sorted(results, key=key), key):
        trials = [r for r in group if r.verdict != REFUSED_BY_PYTORCH]
        wanted = [r for r in trials if 0 not in r.expected]
        refused = [r for r in trials if r.expected == (0,)]
        fused_sites = sum(min(r.sites, max(r.expected)) for r in wanted)
        wanted_sites = sum(min(r.expected) for r in wanted)
        rows.append(
            {
                "backend": backend,
                "mode": mode,
                "dtype": dtype,
                "shapes": "dynamic" if dynamic else "static",
                "cases_fused": sum(r.verdict == "fused" for r in wanted),
                "cases_to_fuse": len(wanted),
                "sites_fused": fused_sites,
                "sites_to_fuse": wanted_sites,
                "share": fused_sites / max(1, wanted_sites),
                "left": sum(r.verdict == "left" for r in refused),
                "to_leave": len(refused),
                "wrongly_fused": sum(r.verdict == "wrongly fused" for r in trials),
                "wrong": sum(bool(r.problems) for r in trials),
            }
        )
    return rows


def show_corpus(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Attention corpus")
    for name in ("backend", "mode", "dtype", "shapes"):
        table.add_column(name)
    for name in ("sites fused", "share", "cases fused", "left alone", "wrongly fused", "wrong results"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(row[name] for name in ("backend", "mode", "dtype", "shapes")),
            f"{row['sites_fused']}/{row['sites_to_fuse']}",
            f"{row['share']:.1%}",
            f"{row['cases_fused']}/{row['cases_to_fuse']}",
            f"{row['left']}/{row['to_leave']}",
            str(row["wrongly_fused"]),
            str(row["wrong"]),
        )
    console.print(table)


def show_families(results: Sequence[FamilyResult]) -> None:
    table = Table(title="Model families (sites fused; * differs from eager, ! does not compile)")
    columns = sorted({(r.backend, r.mode) for r in results})
    table.add_column("family")
    for backend, mode in columns:
        table.add_column(f"{backend}\n{mode}", justify="right")
    for name in sorted({r.family for r in results}):
        cells = {(r.backend, r.mode): r for r in results if r.family == name}
        table.add_row(name, *(_cell(cells.get(column)) for column in columns))
    console.print(table)
    for backend, mode in columns:
        group = [r for r in results if (r.backend, r.mode) == (backend, mode)]
        console.print(f"{backend}, {mode}: {sum(r.ok for r in group)} of {len(group)} families as eager")


def _cell(result: FamilyResult | None) -> str:
    if result is None:
        return ""
    mark = "!" if result.failed else "*" if result.problems else ""
    return f"{result.sites}{mark}"


def write(path: Path, corpus: Sequence[Result], families: Sequence[FamilyResult]) -> None:
    """The summary and every trial that is not as it should be, with the device, versions and date they hold for."""
    document = {
        "environment": environment(),
        "rows": summarise(corpus),
        "corpus_trials": len(corpus),
        "corpus_not_as_expected": [asdict(r) for r in corpus if not r.ok],
        "families_trials": len(families),
        "families": [asdict(r) for r in families],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"written: {path}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["vblackwell"])
    parser.add_argument("--what", choices=("all", "corpus", "families"), default="all")
    parser.add_argument("--modes", nargs="+", choices=BOTH, default=list(BOTH))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--shapes", nargs="+", choices=("static", "dynamic"), default=["static", "dynamic"])
    parser.add_argument("--only", nargs="+", default=[], help="families or names of cases; names of model families")
    parser.add_argument("--every", type=int, default=1, help="run every n-th trial only")
    parser.add_argument("--jobs", type=int, default=1, help="processes to run the trials in")
    parser.add_argument("--seconds", type=float, default=0.0, help="with --jobs: stop waiting for trials after this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--failures", action="store_true", help="list every trial that is not as it should be")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    warnings.filterwarnings("ignore")
    corpus = run_corpus(arguments) if arguments.what != "families" else []
    families = run_families(arguments) if arguments.what != "corpus" else []
    rows = summarise(corpus)
    if corpus:
        show_corpus(rows)
    if families:
        show_families(families)
    if arguments.failures:
        for result in (*corpus, *families):
            if not result.ok:
                console.print(asdict(result))
    output = arguments.output or folder() / f"attention_coverage_{arguments.device.split(':')[0]}.json"
    write(output, corpus, families)
    ours = [row for row in rows if row["backend"].startswith("vblackwell")]
    bad = any(row["wrong"] or row["wrongly_fused"] for row in ours)
    return int(bad or any(not r.ok for r in families if r.backend.startswith("vblackwell")))


if __name__ == "__main__":
    raise SystemExit(main())
