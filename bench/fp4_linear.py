"""The FP4 linear layer on a GPU: checks against float64, a table beside the vendor's product.

    python bench/fp4_linear.py check   signal to noise, a compiled model; the rest is in tests/test_fp4_linear.py
    python bench/fp4_linear.py table   microseconds beside bfloat16; with --rows others' results of today stay
    python bench/fp4_linear.py cpu     the same on this machine's processor, in milliseconds

Times are those of ``vbcompile tune``: medians of CUDA-graph replays that go round copies of the weight, so that none is
found in cache. The floor is the packed bytes at the bandwidth that a device-to-device copy reaches in the same run.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record

from vbcompile.device import get_target
from vbcompile.kernels import fp4_linear_fp8, fp4_linear_gpu, fp4_linear_hopper
from vbcompile.kernels import fp4_linear_triton as fp4_triton
from vbcompile.kernels.fp4 import PackedWeight
from vbcompile.kernels.fp4_layout import dequantize_weight, to_layout
from vbcompile.kernels.fp4_linear import choose, fp4_linear, make_case
from vbcompile.kernels.fp4_linear_triton import preferred_layout
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.tune import calls, copies, dense_calls, dense_copies, microseconds

SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)]
ROWS = [1, 4, 16, 64, 256, 2048]


# ---------------------------------------------------------------------------------------------------------------- check
def check_fp8() -> dict[str, float]:
    """Signal to noise in dB of Gaussian layers: exact products of FP4 weights, and products in FP8; of weights packed
    for either."""
    found = {}
    kinds = {"W4A16": fp4_linear_gpu.dequantize_product, "W4A8": fp4_linear_fp8.product_fp8}
    if get_target("cuda").arch == "sm_90":
        kinds["W4A8 fused"] = fp4_linear_hopper.product_wide_fp8
    for name, method in itertools.product(("nvfp4", "mxfp4"), ("mse", "fp8")):
        dense, x = torch.randn(4096, 4096, device="cuda"), torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)
        weight = to_layout(quantize(dense * 0.02, name, method=method), preferred_layout(get_target("cuda")))
        exact = x.double() @ (dense * 0.02).double().T
        for kind, run in kinds.items():
            got = run(x, *weight.tensors, None, 4096, name, weight.layout).double()
            found[f"{name} {method} {kind}"] = float(20 * torch.log10(exact.norm() / (got - exact).norm()))
    return found


def check_model() -> dict[str, Any]:
    """A compiled model in speed mode equals the model whose weights are the decoded ones; so do CUDA graphs."""
    from vbcompile.backend import add_listener

    reports: list[Any] = []
    add_listener(reports.append)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1024, 4096), torch.nn.SiLU(), torch.nn.Linear(4096, 1024, bias=False)]
    model = torch.nn.Sequential(*layers).to("cuda", torch.bfloat16).eval()

    decoded = copy.deepcopy(model)
    with torch.no_grad():
        for mine in (decoded[0], decoded[2]):
            packed = to_layout(quantize(mine.weight), "plain")
            mine.weight.copy_(dequantize_weight(*packed.tensors, packed.k, "nvfp4", "plain", torch.bfloat16))
        found = {}
        for inductor_mode, m in itertools.product(("default", "reduce-overhead"), (1, 16, 700)):
            torch._dynamo.reset()
            options = {"mode": "speed", "strict": True, "inductor_mode": inductor_mode}
            run = torch.compile(model, backend="vblackwell", dynamic=False, options=options)
            x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
            want = decoded(x).double()
            for _ in range(4):
                got = run(x).double()
            error = float((got - want).norm() / want.norm())
            found[f"{inductor_mode} {m}"] = error
            assert error < 6e-3, (inductor_mode, m, error)
            assert reports[-1].count("rewritten", "fp4") == 2, reports[-1].decisions
    found["implementation"] = reports[-1].decisions[0].implementation
    return found


# ---------------------------------------------------------------------------------------------------------------- table
def bandwidth() -> float:
    """Bytes a second, read and written, of a kernel that goes once over a gigabyte; a byte copy is slower than that."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (microseconds([lambda: torch.neg(source, out=target)] * 4) * 1e-6)


def table(formats: list[str], counts: list[int]) -> list[dict[str, Any]]:
    target, speed = get_target("cuda"), bandwidth()
    fp4_triton.prepare(torch.device("cuda", torch.cuda.current_device()))
    rows: list[dict[str, Any]] = []
    for (n, k), name in itertools.product(SHAPES, formats):
        weights = copies(n, k, name)
        dense = dense_copies(n, k)
        floor = weights[0].nbytes / speed * 1e6
        for m in counts:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            row = {
                "n": n, "k": k, "m": m, "format": name, "copy_tb_s": speed / 1e12, "floor": floor,
                "bf16": microseconds(dense_calls(x, dense)),
                "implementation": _choice(target, m, n, k, name, "same"),
                "fp4": microseconds(calls(x, weights, fp4_linear)),
                "implementation_fp8": _choice(target, m, n, k, name, "fp8"),
                "fp4_fp8": microseconds(calls(x, weights, fp4_linear, activations="fp8")),
            }  # fmt: skip
            row |= {"of_floor": floor / row["fp4"], "speedup": row["bf16"] / row["fp4"]}
            rows.append(row)
            print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
        record.write("fp4_linear", _in_order(rows + _others(formats, counts)))
    return rows


def _others(formats: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """Results of other formats and counts of rows, of the same day, device and versions."""
    path = record.folder() / "fp4_linear.json"
    content = json.loads(path.read_text()) if path.exists() else {"environment": None}
    if content["environment"] != record.environment():
        return []
    return [row for row in content["rows"] if row["format"] not in formats or row["m"] not in counts]


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (SHAPES.index((row["n"], row["k"])), row["format"] != "nvfp4", row["m"]))


def _choice(target: Any, m: int, n: int, k: int, name: str, activations: str) -> str:
    case = make_case(torch.bfloat16, m, n, k, name, preferred_layout(target), activations)
    return choose(target, case).implementation.name


# ------------------------------------------------------------------------------------------------------------------ CPU
CPU_SHAPES = [(4096, 4096), (14336, 4096)]


def milliseconds(runs: dict[str, Callable[[], Any]], rounds: int = 30) -> dict[str, float]:
    """Least time of each, measured in turns: neighbours on the machine disturb all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: min(found) for name, found in times.items()}


def cpu_table() -> None:
    rows = []
    for (n, k), dtype, m in itertools.product(CPU_SHAPES, (torch.float32, torch.bfloat16), (1, 4)):
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
        scales = torch.randint(40, 70, (n, k // 16), dtype=torch.uint8)
        weight = to_layout(PackedWeight(codes, scales, torch.full((1,), 1e-3), "nvfp4", (n, k)), "plain")
        dense, x = torch.randn(n, k, dtype=dtype), torch.randn(m, k, dtype=dtype)
        found = milliseconds(
            {
                "pytorch": lambda x=x, dense=dense: F.linear(x, dense),
                "fp4": lambda x=x, w=weight: fp4_linear(x, *w.tensors, None, w.k, "nvfp4", "plain"),
            }
        )
        implementation = choose(get_target("cpu"), make_case(dtype, m, n, k, "nvfp4", "plain")).implementation.name
        rows.append({"n": n, "k": k, "m": m, "dtype": str(dtype), "threads": torch.get_num_threads(), **found})
        rows[-1] |= {"implementation": implementation, "speedup": found["pytorch"] / found["fp4"]}
        print({key: round(v, 2) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    record.write("fp4_linear_cpu", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["check", "table", "cpu"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of x, in the table")
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "mxfp4"], choices=["nvfp4", "mxfp4"])
    arguments = parser.parse_args()
    for what in arguments.what:
        started = time.time()
        if what == "check":
            print("signal to noise, dB", check_fp8(), flush=True)
            print("model", check_model())
        elif what == "cpu":
            cpu_table()
        else:
            table(arguments.formats, arguments.rows)
        print(f"{what}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
