"""What a linear layer costs the host, in microseconds: FP4 beside PyTorch's own, without CUDA graphs.

    python bench/fp4_host.py [--layers 16] [--rows 1 16 256]

A call is timed until it returns, with the device idle at its start and not waited for. ``operator``: ``fp4_linear``
called from Python; ``compiled``: a layer of a stack of them under ``torch.compile``, what surrounds the graph included.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402

from vbcompile.kernels.fp4_layout import LinearWeight  # noqa: E402
from vbcompile.kernels.fp4_linear import fp4_linear  # noqa: E402
from vbcompile.passes import fp4  # noqa: E402
from vbcompile.tune import copies  # noqa: E402

SIZE = 4096
_CALLS = 40  # in a row: the driver queues about a thousand launches


def host_microseconds(call: Callable[[], Any], times: int = _CALLS) -> float:
    """Median over rounds of the time of a call until it returns."""
    for _ in range(5):
        call()
    found = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        found.append((time.perf_counter() - begin) / times * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found)


def product(x: Tensor, w: LinearWeight, bias: Tensor | None, activations: str) -> Callable[[], Tensor]:
    return lambda: fp4_linear(x, *w.tensors, bias, w.k, w.format_name, w.layout, activations)


def stack(layers: int) -> nn.Module:
    """Linear layers one after the other, each with a ReLU so that none is merged with the next."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(SIZE, SIZE, bias=False), nn.ReLU()]
    return nn.Sequential(*parts).to(device="cuda", dtype=torch.bfloat16).requires_grad_(False)


def compiled(layers: int, rows: int) -> dict[str, float]:
    """Microseconds of a layer by backend."""
    model, x, found = stack(layers), torch.randn(rows, SIZE, device="cuda", dtype=torch.bfloat16), {}
    options = {"mode": "speed", "strict": True}
    for name, how in (("inductor", {"backend": "inductor"}), ("vblackwell", {"options": options})):
        torch._dynamo.reset()
        run = torch.compile(model, dynamic=False, **{"backend": "vblackwell", **how})
        with torch.no_grad():
            found[name] = host_microseconds(lambda run=run: run(x), 8) / layers
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    options = parser.parse_args()
    torch.manual_seed(0)
    fp4.SLOWEST_BESIDE_ITS_MASTER = math.inf  # layers that would be left unpacked are packed too
    (w,) = copies(SIZE, SIZE, "nvfp4", 1)
    dense = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(SIZE, device="cuda", dtype=torch.bfloat16)
    results = []
    for m in options.rows:
        x = torch.randn(m, SIZE, device="cuda", dtype=torch.bfloat16)
        row: dict[str, Any] = {"shape": f"{SIZE}x{SIZE}", "rows": m}
        with torch.no_grad():
            row["linear"] = host_microseconds(lambda x=x: nn.functional.linear(x, dense))
            row["operator"] = host_microseconds(product(x, w, None, "same"))
            row["operator_bias"] = host_microseconds(product(x, w, bias, "same"))
            row["operator_fp8"] = host_microseconds(product(x, w, None, "fp8"))
        row |= {f"compiled_{name}": us for name, us in compiled(options.layers, m).items()}
        results.append(row)
        print(row, flush=True)
        record.write("fp4_host", results)


if __name__ == "__main__":
    main()
