"""The picture of the README, ``docs/figures.png``, from the JSON files in ``bench/results``.

python bench/readme_picture.py            draws it
python bench/readme_picture.py --check    exit status 1 if it was drawn from other figures
"""

import argparse
import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "figures.png"
OURS, PEER = "#3566c4", "#b9bec9"
Bar = tuple[str, float, str]  # label, length, colour


def panels() -> list[tuple[str, str, list[Bar]]]:
    """Title, unit and bars of each panel."""
    return [_attention(), _fp4(), _training(), _offload()]


def _attention() -> tuple[str, str, list[Bar]]:
    bars: list[Bar] = []
    for row in _rows("attention_hopper"):
        if row["shape"] == "4,16,4096,128":
            label = f"{row['direction']}{', causal' if row['causal'] else ''}"
            bars += [(f"vbcompile {label}", row["ours_tflops"], OURS), (f"cuDNN {label}", row["cudnn_tflops"], PEER)]
    return "Attention, head size 128, length 4096", "TFLOP/s, more is better", bars


def _fp4() -> tuple[str, str, list[Bar]]:
    bars: list[Bar] = []
    for row in _rows("fp4_linear"):
        if row["format"] == "nvfp4" and row["n"] == 28672 and row["m"] <= 256:
            rows = f"{row['m']} row{'s' if row['m'] > 1 else ''}"
            bars += [(f"FP4, {rows}", row["fp4"], OURS), (f"cuBLAS bfloat16, {rows}", row["bf16"], PEER)]
    return "Linear layer 28672 x 4096", "microseconds, less is better", bars


def _training() -> tuple[str, str, list[Bar]]:
    bars = [
        (f"{row['backend']}, {row['ms']:.0f} ms", row["peak_gb"], OURS if row["backend"] == "vblackwell" else PEER)
        for row in _rows("training_step")
    ]
    return "Training step, attention written out", "GB at the peak, less is better", bars


def _offload() -> tuple[str, str, list[Bar]]:
    bars = [
        (row["what"].split(",")[0], 100 * row["share"], OURS if row["what"].startswith("vbcompile") else PEER)
        for row in _rows("offload_host")
    ]
    return "4.2 GB of weights through 0.5 GB", "% of the link to host memory, more is better", bars


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["rows"]


def digest() -> str:
    """Identifies the figures that the picture shows."""
    return hashlib.sha256(json.dumps(panels()).encode()).hexdigest()


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.6), layout="constrained")
    for axes, (title, unit, bars) in zip(figure.subplots(2, 2).flat, panels(), strict=True):
        axes.barh(range(len(bars)), [length for _, length, _ in bars], color=[colour for *_, colour in bars])
        axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel(unit, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        for place, (_, length, _) in enumerate(bars):
            axes.annotate(f"{length:.3g}", (length, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Description": digest()})


def drawn_from(path: Path) -> str:
    """The digest that a picture carries, read from the text chunks of its PNG file."""
    data, place = path.read_bytes(), 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        name, _, value = data[place + 8 : place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and name == b"Description":
            return value.decode("latin-1")
        place += length + 12
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw nothing; exit status 1 on a difference")
    if parser.parse_args().check:
        return int(drawn_from(PICTURE) != digest())
    draw(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
