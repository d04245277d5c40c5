"""The README's tables of figures, made from the JSON files in ``bench/results``.

python bench/readme_tables.py            rewrites README.md between its markers
python bench/readme_tables.py --check    exit status 1 if README.md is not what the results say
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def table(name: str) -> str:
    """The Markdown table of one results file, with a line that says where it was measured."""
    data = json.loads((RESULTS / f"{name}.json").read_text())
    title, columns = TABLES[name]
    rows = [[str(cell(row)) for _, cell in columns] for row in data["rows"] if row.get("readme", True)]
    lines = [
        f"**{title}** ({_where(data['environment'])}; `bench/results/{name}.json`)",
        "",
        "| " + " | ".join(head for head, _ in columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    return "\n".join(lines)


def _where(environment: dict[str, str]) -> str:
    driver = "" if environment["driver"] == "none" else f", driver {environment['driver']}"
    return f"{environment['device']}{driver}, PyTorch {environment['torch']}, {environment['date']}"


def _column(key: str, unit: str = "") -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[key]}{unit}"


def _seconds(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[key]:.2f} s" if row[key] > 0.01 else f"{1e6 * row[key]:.1f} us"


Columns = list[tuple[str, Callable[[dict[str, Any]], Any]]]
TABLES: dict[str, tuple[str, Columns]] = {
    "training_step": (
        "Training step, Llama shape with 16 layers, batch 4 x 2048, bfloat16, attention written out",
        [
            ("backend", _column("backend")),
            ("time per step", _column("ms", " ms")),
            ("peak memory", _column("peak_gb", " GB")),
            ("loss", lambda row: f"{row['loss']:.4f}"),
        ],
    ),
    "attention_coverage_cpu": (
        "Attention sites of our corpus that are found, and wrong results",
        [
            ("backend", _column("backend")),
            ("run", lambda row: f"{row['mode']}, {row['dtype']}, {row['shapes']}"),
            ("sites fused", lambda row: f"{row['sites_fused']} of {row['sites_to_fuse']}"),
            ("left that must be left", lambda row: f"{row['left']} of {row['to_leave']}"),
            ("wrong results", _column("wrong")),
        ],
    ),
    "attention_hopper": (
        "Attention on Hopper by our kernels against cuDNN in the same run, bfloat16, TFLOP/s",
        [
            ("B,H,S,D", _column("shape")),
            ("causal", lambda row: "yes" if row["causal"] else "no"),
            ("direction", _column("direction")),
            ("ours", lambda row: f"{row['ours_tflops']}{'*' if 'note' in row else ''}"),
            ("cuDNN", _column("cudnn_tflops")),
            ("ratio", _column("ratio")),
        ],
    ),
    "compile_time_cpu": (
        "First call of a model of SmolLM2-135M's shape, and time per call where nothing can be rewritten",
        [
            ("figure", _column("figure")),
            ("vblackwell", _seconds("vblackwell_s")),
            ("Inductor", _seconds("inductor_s")),
            ("ratio", _column("ratio")),
        ],
    ),
}


def rendered(text: str) -> str:
    """README text with every ``<!-- table: NAME -->`` block filled from its results file."""
    for name in TABLES:
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            _, _, tail = rest.partition(end)
            text = f"{head}{begin}\n{table(name)}\n{end}{tail}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 on a difference")
    arguments = parser.parse_args()
    text = README.read_text()
    wanted = rendered(text)
    if arguments.check:
        return int(wanted != text)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
