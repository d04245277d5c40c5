"""What a SwiGLU gate and a GELU behind an FP4 product cost: done by the product, or by one more kernel.

    python bench/fp4_epilogues.py [--rows 1 16 64 256 2048]

The weight is Llama-3-8B's gate and up, 28672 x 4096, in NVFP4. Medians of CUDA-graph replays that go round copies of
the weight; the ways take turns, because the card throttles. Each is compared with float64 as well.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record

from vbcompile.device import get_target
from vbcompile.kernels.fp4_epilogue import apply_epilogue
from vbcompile.kernels.fp4_epilogue_kernels import epilogue_alone
from vbcompile.kernels.fp4_layout import LinearWeight, dequantize_weight, to_layout
from vbcompile.kernels.fp4_linear import fp4_linear
from vbcompile.kernels.fp4_linear_triton import preferred_layout
from vbcompile.kernels.fp4_quantize import quantize

N, K, TURNS = 28672, 4096, 12
WAYS = {"none": ("none", None), "apart": ("none", "gated_silu"), "gated_silu": ("gated_silu", None),
        "gelu apart": ("none", "gelu"), "gelu": ("gelu", None)}  # fmt: skip


def run(x: Tensor, w: LinearWeight, activations: str, way: str) -> Tensor:
    own, after = WAYS[way]
    y = fp4_linear(x, *w.tensors, None, w.k, w.format_name, w.layout, activations, own)
    return y if after is None else epilogue_alone(y, after)


def weights(count: int) -> list[LinearWeight]:
    """One weight, and copies that no cache holds at a time."""
    first = to_layout(quantize(torch.randn(N, K, device="cuda") * 0.02), preferred_layout(get_target("cuda")))
    more = (LinearWeight(*(t.clone() for t in first.tensors), K, "nvfp4", first.layout) for _ in range(count - 1))
    return [first, *more]


def errors(x: Tensor, w: LinearWeight, activations: str) -> dict[str, float]:
    """Relative error of each way, and of PyTorch in the dtype of x, against float64; of the first 64 rows."""
    x = x[:64]
    dense = dequantize_weight(*w.tensors, K, w.format_name, w.layout, torch.float64)
    y = x.double() @ dense.T
    plain = x @ dense.to(x.dtype).T
    found = {}
    for way, (own, after) in WAYS.items():
        want = apply_epilogue(y, after or own)
        found[way] = float((run(x, w, activations, way).double() - want).norm() / want.norm())
        found[f"{way}, PyTorch"] = float((apply_epilogue(plain, after or own).double() - want).norm() / want.norm())
    return found


def times(x: Tensor, each: list[LinearWeight], activations: str) -> dict[str, float]:
    """Microseconds of each way."""
    graphs, taken = {}, {}
    for way in WAYS:
        run(x, each[0], activations, way)
        graphs[way], taken[way] = torch.cuda.CUDAGraph(), []
        torch.cuda.synchronize()
        with torch.cuda.graph(graphs[way]):
            for w in each * 2:
                run(x, w, activations, way)
    for _ in range(TURNS):
        for way, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken[way].append(start.elapsed_time(end) * 1e3 / (2 * len(each)))
    return {way: statistics.median(values) for way, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 2048])
    torch.manual_seed(0)
    each, rows = weights(4), []
    for m in parser.parse_args().rows:
        for activations in ("same", "fp8") if m >= 256 else ("same",):
            x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
            row: dict[str, Any] = {"m": m, "activations": activations, "us": times(x, each, activations)}
            row["error"] = errors(x, each[0], activations)
            rows.append(row)
            print(m, activations, {k: round(v, 1) for k, v in row["us"].items()}, flush=True)
            print(m, activations, {k: round(v, 5) for k, v in row["error"].items()}, flush=True)
            record.write("fp4_epilogues", rows)


if __name__ == "__main__":
    main()
