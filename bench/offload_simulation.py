"""The planner against other policies on the simulated clock: Llama 3 shapes on an H100's figures. Needs no device.

    python bench/offload_simulation.py [--markdown]

Assumed: device memory 2.68 TB/s and 593 TFLOPS (80 % and 60 % of the data sheet), 55 GB/s from pinned host memory,
10 GB/s from pageable memory, 370 GB/s from a neighbouring card, 7 GB/s from disk, 15 microseconds per copy. Weights:
all matrices of the layers in the given bits, the head in 16. ``--markdown`` prints the tables of docs/offload.md.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from vgpu_reference import llama_sweep

from vbcompile.vgpu_check import check_plan
from vbcompile.vgpu_plan import Operator, Sweep, Tier, Weight
from vbcompile.vgpu_planner import plan_weights
from vbcompile.vgpu_simulator import resident_prefix, simulate_lru, simulate_on_demand

_GB = 10**9
_RAM = Tier(2, "cpu", 10**15, 55 * _GB, latency_ns=15_000)
_PAGEABLE = replace(_RAM, read_rate=10 * _GB)
_PEER = Tier(1, "cuda:1", 40 * _GB, 370 * _GB, latency_ns=15_000)
_SSD = Tier(3, "ssd", 10**15, 7 * _GB, latency_ns=15_000, via=2)

_CASES = (
    ("decode", "8B", 16, 1, 20, False),
    ("decode", "8B", 16, 1, 6, False),
    ("decode", "8B", 4.5, 1, 3, False),
    ("decode", "70B", 16, 1, 20, False),
    ("decode", "70B", 4.5, 1, 20, False),
    ("prefill 8192 tokens", "70B", 16, 8192, 20, False),
    ("prefill 2048 tokens", "70B", 4.5, 2048, 20, False),
    ("training 4096 tokens", "8B", 16, 4096, 6, True),
)
_TIERS = (
    ("host", (_RAM,)),
    ("neighbour 40 GB, host", (_PEER, _RAM)),
    ("host 64 GB, disk", (replace(_RAM, capacity=64 * _GB), _SSD)),
    ("neighbour 40 GB, host 32 GB, disk", (_PEER, replace(_RAM, capacity=32 * _GB), _SSD)),
)


def policies() -> list[dict[str, Any]]:
    """One row per case: milliseconds per step under each policy."""
    rows = []
    for what, model, bits, tokens, budget, training in _CASES:
        sweep = llama_sweep(model, bits, tokens, training=training)
        nbytes = budget * _GB
        start = time.perf_counter()
        plan = plan_weights(sweep, nbytes, (_RAM,))
        seconds = time.perf_counter() - start
        check_plan(plan)
        largest = max(weight.nbytes for weight in sweep.weights)
        prefix = resident_prefix(sweep, nbytes - largest)
        rows.append(
            {
                "case": f"{model}, {bits} bits, {what}, {budget} GB",
                "roofline_ms": _ms(plan.prediction.roofline_ns),
                "prefix_pageable_on_demand_ms": _ms(simulate_on_demand(sweep, prefix, _PAGEABLE).step_ns),
                "prefix_pinned_on_demand_ms": _ms(simulate_on_demand(sweep, prefix, _RAM).step_ns),
                "lru_ms": _ms(simulate_lru(sweep, nbytes, _RAM).step_ns),
                "lru_prefetch_ms": _ms(simulate_lru(sweep, nbytes, _RAM, lookahead=2).step_ns),
                "plan_ms": _ms(plan.prediction.step_ns),
                "plan_share_of_roofline": round(plan.prediction.efficiency, 4),
                "lru_bytes": simulate_lru(sweep, nbytes, _RAM).streamed_bytes,
                "plan_bytes": plan.streamed_bytes,
                "ring_bytes": plan.ring_bytes,
                "declined": plan.declined,
                "planning_s": round(seconds, 3),
            }
        )
    return rows


def tiers() -> list[dict[str, Any]]:
    """Llama-3-70B in 16 bits, one token, 20 GB on the device: what each set of tiers gives."""
    sweep = llama_sweep("70B", 16, 1)
    rows = []
    for name, places in _TIERS:
        plan = plan_weights(sweep, 20 * _GB, places)
        check_plan(plan)
        rows.append(
            {
                "tiers": name,
                "roofline_ms": _ms(plan.prediction.roofline_ns),
                "plan_ms": _ms(plan.prediction.step_ns),
                "plan_share_of_roofline": round(plan.prediction.efficiency, 4),
                "bottleneck": plan.prediction.bottleneck,
                "bytes_per_level": {str(level): nbytes for level, nbytes in plan.bytes_per_level.items()},
            }
        )
    return rows


def cyclic() -> list[dict[str, Any]]:
    """80 equal weights, room for 20: copies per step, in a sweep and there and back."""
    weights = tuple(Weight(f"w{i}", 1000) for i in range(80))
    link = Tier(1, "cpu", 10**9, 10**9)
    rows = []
    for name, order in (
        ("sweep (inference)", [*range(80)]),
        ("there and back (training)", [*range(80), *range(79, -1, -1)]),
    ):
        sweep = Sweep(weights, tuple(Operator(f"o{n}", 500, (i,)) for n, i in enumerate(order)))
        plan = plan_weights(sweep, 20_000, (link,), alignment=1)
        rows.append(
            {
                "order": name,
                "uses": len(order),
                "lru": simulate_lru(sweep, 20_000, link).misses,
                "plan": len(plan.copies),
            }
        )
    return rows


def markdown(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The tables as docs/offload.md shows them."""
    lines = [
        "| step | least possible | split, pageable | split, pinned | LRU | LRU, prefetch | plan | share of least |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows["policies"]:
        times = [
            row["prefix_pageable_on_demand_ms"],
            row["prefix_pinned_on_demand_ms"],
            row["lru_ms"],
            row["lru_prefetch_ms"],
        ]
        cells = ["fits"] * 4 if row["declined"] else [f"{time:.1f}" for time in times]
        lines.append(
            f"| {row['case']} | {row['roofline_ms']:.1f} | {' | '.join(cells)} | **{row['plan_ms']:.1f}** | "
            f"{row['plan_share_of_roofline']:.1%} |"
        )
    lines += ["", "| order of use | uses | copies, LRU | copies, plan |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {row['order']} | {row['uses']} | {row['lru']} | {row['plan']} |" for row in rows["cyclic"]]
    lines += ["", "| tiers | least possible | plan | of least | bottleneck |", "| --- | ---: | ---: | ---: | --- |"]
    lines += [
        f"| {row['tiers']} | {row['roofline_ms']:.0f} | {row['plan_ms']:.0f} | {row['plan_share_of_roofline']:.1%} | "
        f"{row['bottleneck']} |"
        for row in rows["tiers"]
    ]
    return "\n".join(lines)


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/offload.md")
    arguments = parser.parse_args()
    rows = {"policies": policies(), "cyclic": cyclic(), "tiers": tiers()}
    if arguments.markdown:
        print(markdown(rows))
    else:
        print(write("offload_simulation", [{"table": name, **row} for name, part in rows.items() for row in part]))


if __name__ == "__main__":
    main()
