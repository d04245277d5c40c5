"""The tables of figures in README.md and docs/, made from the JSON files in ``bench/results`` and the tuned table.

python bench/readme_tables.py            rewrites the pages between their markers
python bench/readme_tables.py --check    exit status 1 if a page is not what the results say
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
RESULTS = ROOT / "bench" / "results"
TUNED = ROOT / "kernels" / "tuned" / "fp4_linear.json"


def table(name: str) -> str:
    """The Markdown table of one results file, with a line that says where it was measured."""
    path = FILES.get(name, RESULTS / f"{name}.json")
    data = json.loads(path.read_text())
    if path == TUNED:
        data = {"environment": data["sm_90"], "rows": data["sm_90"]["rows"]}
    title, columns = TABLES[name]
    shown = SUMMARIES.get(name, list)(data["rows"])
    rows = [[str(cell(row)) for _, cell in columns] for row in shown if row.get("readme", True)]
    lines = [
        f"**{title}** ({_where(data['environment'])}; `{path.relative_to(ROOT)}`)",
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


def _optional(key: str, form: str = "{}") -> Callable[[dict[str, Any]], str]:
    return lambda row: form.format(row[key]) if key in row else ""


def _gigabytes(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[key] / 1e9:.2f} GB" if key in row else ""


Columns = list[tuple[str, Callable[[dict[str, Any]], Any]]]


def _fp4_columns(bits: float) -> Columns:
    return [
        ("weight", lambda row: f"{row['n']} x {row['k']}"),
        ("rows", _column("m")),
        ("cuBLAS bfloat16", lambda row: f"{row['bf16']:.1f}"),
        ("FP4", lambda row: f"{row['fp4']:.1f}"),
        ("times faster", lambda row: f"{row['bf16'] / row['fp4']:.2f}"),
        ("TB/s", lambda row: f"{row['n'] * row['k'] * bits / 8 / row['fp4'] / 1e6:.2f}"),
        ("kernel", _column("implementation")),
        ("with FP8 activations", lambda row: f"{row['fp4_fp8']:.1f}"),
    ]


FILES = dict.fromkeys(("fp4_linear_mxfp4", "fp4_linear_widest"), RESULTS / "fp4_linear.json") | {
    "fp4_linear_narrow": TUNED
}
_NARROW = (64, 128, 256, 512, 1024)  # rows of x
TABLES: dict[str, tuple[str, Columns]] = {
    "fp4_models": (
        "What FP4 weights cost real models in quality, on English text; SmolLM2's weights were 4-bit before",
        [
            ("model", _column("model")),
            ("weights", _column("weights")),
            ("perplexity", _optional("perplexity", "{:.2f}")),
            ("increase", _optional("increase_percent", "{:.1f} %")),
            ("KL to the model", _optional("kl", "{:.3f}")),
            ("same first choice", _optional("same_first_choice", "{:.3f}")),
            ("cosine of embeddings, mean", _optional("cosine", "{:.4f}")),
            ("least", _optional("least", "{:.4f}")),
        ],
    ),
    "training_step": (
        "Training step, Llama shape with 16 layers, batch 4 x 2048, bfloat16, attention written out",
        [
            ("backend", _column("backend")),
            ("time per step", _column("ms", " ms")),
            ("peak memory", _column("peak_gb", " GB")),
            ("loss", lambda row: f"{row['loss']:.4f}"),
        ],
    ),
    "training_memory": (
        "Training step in less memory, the same model with PyTorch's attention; peak counts weights and gradients",
        [
            ("way", _column("variant")),
            ("time per step", _column("ms", " ms")),
            ("peak memory", _column("peak_gb", " GB")),
            ("made again", _optional("recompute_mb", "{} MB")),
            ("moved", _optional("offload_mb", "{} MB")),
            ("gradient error", _optional("gradient_error")),
        ],
    ),
    "fp4_linear": (
        "Linear layer with NVFP4 weights, microseconds; TB/s: packed bytes over time, one large copy reaches 4.2",
        _fp4_columns(4.5),
    ),
    "fp4_linear_widest": (
        "Linear layer of 28672 x 4096 with NVFP4 weights, microseconds; TB/s: packed bytes over time",
        _fp4_columns(4.5)[1:],
    ),
    "fp4_linear_mxfp4": (
        "Linear layer with MXFP4 weights, microseconds, in the run of the NVFP4 table",
        _fp4_columns(4.25),
    ),
    "fp4_linear_narrow": (
        "NVFP4 weights of few rows by rows of x, microseconds (in brackets cuBLAS in bfloat16)",
        [("weight", _column("weight")), *((str(m), _column(str(m))) for m in _NARROW)],
    ),
    "fp4_model": (
        "Llama-3-8B shape, batch 1, random weights: a decode step, and a prompt of 2048 tokens",
        [
            ("what", _column("what")),
            ("backend and weights", _column("name")),
            ("time", lambda row: f"{row['ms']:.2f} ms"),
            ("without CUDA graphs", _optional("ms_without_graph", "{:.2f} ms")),
        ],
    ),
    "fp4_peers": (
        "A linear layer with 4-bit weights beside other libraries, microseconds",
        [
            ("weight", lambda row: f"{row['n']} x {row['k']}"),
            ("rows", _column("m")),
            ("library", _column("way")),
            ("time", lambda row: f"{row['us']:.1f}" if "us" in row else row["absent"]),
            ("over cuBLAS bfloat16", _optional("over_bf16", "{:.2f}")),
            ("relative error", _optional("error", "{:.3f}")),
        ],
    ),
    "cpu_mlp": (
        "MLP 4096-14336-4096 on a processor, one row, mode `speed`",
        [
            ("dtype", _column("dtype")),
            ("threads", _column("threads")),
            ("eager", lambda row: f"{row['eager']:.1f} ms"),
            ("Inductor", lambda row: f"{row['inductor']:.1f} ms"),
            ("vblackwell", lambda row: f"{row['speed']:.1f} ms"),
            ("over eager", lambda row: f"{row['over_eager']:.2f}"),
        ],
    ),
    "offload_model": (
        "One decode step of a Llama-3-8B shape in bfloat16 with 6 GiB of device memory, weights in host memory",
        [
            ("what", _column("what")),
            ("time", lambda row: f"{row['ms']:.1f} ms"),
            ("predicted", _optional("predicted_ms", "{:.1f} ms")),
            ("streamed", _gigabytes("streamed_bytes")),
            ("peak memory", _gigabytes("peak_allocated_bytes")),
            # where nothing is streamed, what is planned is no bound
            (
                "share of the roofline",
                lambda row: f"{row['roofline_share']:.3f}" if row["streamed_bytes"] else "",
            ),
        ],
    ),
    "offload_model_70b": (
        "One decode step of a Llama-3-70B shape in bfloat16 with 20 GiB of device memory, weights in host memory",
        [
            ("what", _column("what")),
            ("time", lambda row: f"{row['ms']:.0f} ms"),
            ("predicted", lambda row: f"{row['predicted_ms']:.0f} ms"),
            ("streamed", lambda row: f"{row['streamed_bytes'] / 1e9:.1f} GB"),
            (
                "peak memory",
                lambda row: f"{row['peak_allocated_bytes'] / 1e9:.2f} of {row['budget_bytes'] / 1e9:.2f} GB",
            ),
            ("share of the roofline", lambda row: f"{row['roofline_share']:.3f}"),
            ("share of the link", lambda row: f"{row['link_share']:.3f}"),
        ],
    ),
    "offload_largest": (
        "Decode steps of Llama-3.1-405B's shape with FP4 weights, most of them in host memory",
        [
            ("what", _column("what")),
            ("bfloat16 size over the budget", lambda row: f"{row['times_the_budget']:.1f}"),
            ("tokens per second", lambda row: f"{row['tokens_per_s']:.3f}"),
            ("roofline", lambda row: f"{row['roofline_tokens_per_s']:.3f}"),
            ("share", lambda row: f"{row['roofline_share']:.3f}"),
            ("streamed a token", lambda row: f"{row['streamed_bytes'] / 1e9:.1f} GB"),
            (
                "peak memory",
                lambda row: f"{row['peak_allocated_bytes'] / 1e9:.2f} of {row['budget_bytes'] / 1e9:.2f} GB",
            ),
            ("error (allowed)", lambda row: f"{row['error']:.2e} ({row['allowed']:.2e})"),
        ],
    ),
    "offload_fits": (
        "A model that fits its budget: median time per step beside Inductor, steps taking turns",
        [
            ("what", _column("what")),
            ("Inductor", lambda row: f"{row['inductor_ms']:.3f} ms"),
            ("`memory`, attention pass off", lambda row: f"{row['memory_ms']:.3f} ms"),
            ("slower", lambda row: f"{100 * row['memory_slowdown']:.1f} %"),
            ("`memory`", lambda row: f"{row['memory_attention_ms']:.3f} ms"),
            ("slower", lambda row: f"{100 * row['memory_attention_slowdown']:.1f} %"),
        ],
    ),
    "offload_host": (
        "4.2 GB of linear layers streamed through 0.5 GB of device memory",
        [
            ("what", _column("what")),
            ("time", lambda row: f"{row['ms']:.1f} ms"),
            ("share of the link", lambda row: f"{row['share']:.3f}"),
        ],
    ),
    "offload_neighbour": (
        "The same idea with 8192 wide layers: overflow in host memory, or on a neighbour card",
        [
            ("what", _column("what")),
            ("time", lambda row: f"{row['ms']:.1f} ms"),
            ("predicted", lambda row: f"{row['predicted_ms']:.1f} ms"),
            ("share of the link", _optional("share", "{:.3f}")),
            ("times faster than host memory", _optional("speed_over_host", "{:.1f}")),
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
    "attention_scores": (
        "Score functions on Hopper, bfloat16: TFLOP/s forward of the tiles computed",
        [
            ("B,H,S,D", _column("shape")),
            ("case", _column("case")),
            ("ours", _column("hopper")),
            ("share of plain", _column("share")),
            ("general kernels", _column("general")),
            ("FlexAttention", _column("flex")),
        ],
    ),
    "attention_scores_backward": (
        "Score functions on Hopper, bfloat16: TFLOP/s backward of the tiles computed, ms forward and backward",
        [
            ("B,H,S,D", _column("shape")),
            ("case", _column("case")),
            ("ours", _column("hopper")),
            ("share of plain", _column("share")),
            ("general kernels", _column("general")),
            ("ours, both ways", _column("both")),
            ("FlexAttention, both ways", _column("flex_both")),
        ],
    ),
    "attention_decode": (
        "One query, 32 query and 8 key heads of size 128, microseconds",
        [
            ("batch", _column("batch")),
            ("keys", _column("keys")),
            ("in a cache of", lambda row: str(row["cache"]) if row["cache"] != row["keys"] else ""),
            ("ours", lambda row: f"{row['us']:.1f}"),
            ("general kernel", lambda row: f"{row['general_us']:.1f}"),
            ("PyTorch", lambda row: f"{row['pytorch_us']:.1f}"),
            ("share of the bandwidth of a large copy", lambda row: f"{row['share']:.2f}"),
        ],
    ),
    "aot_matrix": (
        "Every shipped Triton kernel compiled ahead of time, the most that any size and type of it needs",
        [
            ("family", _column("family")),
            ("target", _column("arch")),
            ("kernel", lambda row: f"`{row['kernel']}`"),
            ("compiled", _column("built")),
            ("registers", _column("registers")),
            ("spills", _column("spills")),
            ("shared memory", _column("shared")),
            ("instructions", _column("uses")),
            ("not", _column("reasons")),
        ],
    ),
    "distributed": (
        "A training step on two cards, Llama shape with 4 layers, batch 4 x 2048 each, bfloat16, attention written out",
        [
            ("way", _column("way")),
            ("backend", _column("backend")),
            ("time per step", _column("ms", " ms")),
            ("tokens per second", _column("tokens_per_s")),
            ("loss", lambda row: f"{row['loss']:.4f}"),
        ],
    ),
    "host_time": (
        "Host time of a call without CUDA graphs, microseconds; the operator alone, and a module of it compiled",
        [
            ("call", _column("case")),
            ("vblackwell's operator", _optional("operator")),
            ("PyTorch's", _column("pytorch")),
            ("compiled, vblackwell", _column("compiled")),
            ("compiled, Inductor", _column("inductor")),
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


def _by_target(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each family, kernel and target: the most that any of its sizes and types needs."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["arch"], row["kernel"]), []).append(row)
    summary = []
    for (family, arch, kernel), found in groups.items():
        built = [row for row in found if "registers" in row]
        most = {key: max((row[key] for row in built), default="") for key in ("registers", "spills", "shared")}
        uses = sorted({mark for row in built for mark in row["instructions"]})
        reasons = sorted({row.get("error") or row.get("refused") or "" for row in found} - {""})
        summary.append(
            {"family": family, "arch": arch, "kernel": kernel, "uses": ", ".join(uses), "reasons": "; ".join(reasons),
             "built": f"{len(built)} of {len(found)}", **most}
        )  # fmt: skip
    return summary


def _by_case(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case: shipped configurations, their share of the plain rate, the general kernels, FlexAttention."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["config"] is None:
            found.setdefault((",".join(map(str, row["shape"])), row["case"]), {})[row["kind"]] = row
    cases = []
    for (shape, case), kinds in found.items():
        plain = found[shape, "causal" if case == "alibi_causal" and (shape, "causal") in found else "plain"]["hopper"]
        cells = {
            kind: f"{kinds[kind]['tflops']:.0f}" if kind in kinds else "" for kind in ("hopper", "general", "flex")
        }
        share = kinds["hopper"]["tflops"] / plain["tflops"] if "hopper" in kinds else 0.0
        cases.append({"shape": shape, "case": case, "share": f"{share:.2f}", **cells})
    return cases


def _by_case_backward(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of the backward, and both directions together. FlexAttention comes from ``attention_scores.json`` where
    this file lacks it."""
    others = json.loads((RESULTS / "attention_scores.json").read_text())["rows"]
    peers = {(tuple(row["shape"]), row["case"]): row["ms"] for row in others if row["kind"] == "flex_both"}
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["config"] is None:
            found.setdefault((",".join(map(str, row["shape"])), row["case"]), {})[row["kind"]] = row
    cases = []
    for (shape, case), kinds in sorted(found.items()):
        plain = found.get((shape, "causal" if case == "alibi_causal" else "plain"), {}).get("hopper_backward")
        ours = kinds["hopper_backward"]["tflops"]
        cells = {"hopper": f"{ours:.0f}", "share": f"{ours / plain['tflops']:.2f}" if plain else ""}
        cells["general"] = f"{kinds['general_backward']['tflops']:.0f}" if "general_backward" in kinds else ""
        flex = kinds.get("flex_both", {}).get("ms") or peers.get((tuple(map(int, shape.split(","))), case))
        cells["flex_both"] = f"{flex:.2f}" if flex else ""
        cells["both"] = f"{kinds['hopper_both']['ms']:.2f}" if "hopper_both" in kinds else ""
        cases.append({"shape": shape, "case": case, **cells})
    return cases


def _narrow(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """One row per narrow weight: the fastest way in 16 bits for each number of rows of x, and the unpacked product."""
    found: dict[str, dict[str, Any]] = {}
    for format_name, n, k, m, dense, times in rows:
        if format_name == "nvfp4" and n <= 6144 and k == 4096 and m in _NARROW:
            ours = min(time for name, (time, _) in times.items() if not name.endswith("fp8"))
            weight = f"{n} x {k}"
            found.setdefault(weight, {"weight": weight})[str(m)] = f"{ours:.1f} ({dense:.1f})"
    return list(found.values())


SUMMARIES: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "aot_matrix": _by_target,
    "attention_scores": _by_case,
    "attention_scores_backward": _by_case_backward,
    "fp4_linear_widest": lambda rows: [row for row in rows if row["format"] == "nvfp4" and row["n"] == 28672],
    "fp4_linear": lambda rows: [row for row in rows if row["format"] == "nvfp4"],
    "fp4_linear_narrow": _narrow,
    "fp4_linear_mxfp4": lambda rows: [row for row in rows if row["format"] == "mxfp4"],
}


def rendered(text: str) -> str:
    """A page's text with every ``<!-- table: NAME -->`` block filled from its results file."""
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
    differ = False
    for page in PAGES:
        text = page.read_text()
        wanted = rendered(text)
        differ |= wanted != text
        if not arguments.check:
            page.write_text(wanted)
    return int(differ and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
