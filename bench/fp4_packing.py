"""How fast bfloat16 weights are packed to FP4 on a device, in GB of bfloat16 a second (wanted on accelerators: 2).

``quantize_ms`` is by the implementation of ``fp4_quantize`` that is chosen there, ``reference_ms`` by plain PyTorch.

python bench/fp4_packing.py              writes bench/results/fp4_packing.json
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record

from vbcompile.device import get_device, get_target
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_linear_triton import preferred_layout
from vbcompile.kernels.fp4_quantize import Fp4QuantizeCase, choose, quantize, relative_error
from vbcompile.kernels.registry import force

SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336)]


def seconds(work: Any, device: torch.device) -> float:
    """Best of three, after one run."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def measure(shape: tuple[int, int], format_name: str, transposed: bool, device: torch.device) -> dict[str, Any]:
    """One weight: rounding it, measuring the error, ordering it for the kernels."""
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16)
    weight = weight.t().contiguous().t() if transposed else weight
    layout = preferred_layout(get_target(device))
    packed = quantize(weight, format_name)
    with force(fp4_quantize="reference"):
        reference = seconds(lambda: quantize(weight, format_name), device)
    case = Fp4QuantizeCase(weight.dtype, shape[1], format_name, "mse", False)
    steps = {
        "quantize": seconds(lambda: quantize(weight, format_name), device),
        "error": seconds(lambda: relative_error(weight, packed), device),
        "layout": seconds(lambda: to_layout(packed, layout), device),
    }
    total = sum(steps.values())
    return {
        "shape": f"{shape[0]} x {shape[1]}{', transposed' if transposed else ''}",
        "format": format_name,
        "layout": layout,
        "implementation": choose(get_target(device), case).implementation.name,
        "reference_ms": round(1e3 * reference, 2),
        **{f"{name}_ms": round(1e3 * value, 2) for name, value in steps.items()},
        "gb_per_s": round(weight.nbytes / total / 1e9, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=None, help="default: the accelerator, or the CPU")
    device = torch.device(parser.parse_args().device or get_device())
    shapes = SHAPES if device.type != "cpu" else SHAPES[:1]
    cases = [(shape, name, False) for shape in shapes for name in ("nvfp4", "mxfp4")] + [(shapes[0], "nvfp4", True)]
    rows = [measure(*case, device) for case in cases]
    for row in rows:
        print(row)
    name = "fp4_packing" if device.type != "cpu" else "fp4_packing_cpu"
    print(record.write(name, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
