"""The FP4 linear layer on a GPU: checks against float64, a sweep of tile shapes, a table beside the vendor's product.

    python bench/fp4_linear.py check             exhaustive decoding, odd shapes, gradients, a compiled model
    python bench/fp4_linear.py sweep [--m M ...]  tile shapes
    python bench/fp4_linear.py table             microseconds beside bfloat16
    python bench/fp4_linear.py cpu               the same on this machine's processor, in milliseconds

Times are medians of CUDA-graph replays that go round copies of the weight, so that none is found in cache. The floor is
the packed bytes at the bandwidth that a device-to-device copy reaches in the same run.
"""

import argparse
import copy
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402

from vbcompile.device import get_target  # noqa: E402
from vbcompile.kernels import fp4_linear_gpu, fp4_linear_triton  # noqa: E402
from vbcompile.kernels.fp4 import PackedWeight  # noqa: E402
from vbcompile.kernels.fp4_layout import LinearWeight, dequantize_weight, to_layout  # noqa: E402
from vbcompile.kernels.fp4_linear import choose, fp4_linear, make_case  # noqa: E402
from vbcompile.kernels.fp4_linear_triton import TileConfig, preferred_layout, product, tile_config  # noqa: E402
from vbcompile.kernels.fp4_quantize import quantize  # noqa: E402

SHAPES = [(28672, 4096), (4096, 14336)]
ROWS = [1, 4, 16, 64, 256, 2048]
_CACHE_BYTES = 200e6  # more than any second-level cache holds
_ERROR_RATIO = 2.0


# ---------------------------------------------------------------------------------------------------------------- check
def check_decoding(dtype: torch.dtype) -> None:
    """Every code with every scale comes out exact: rows hold one scale each, columns the codes."""
    layout = preferred_layout(get_target("cuda"))
    for name, scales, block in (("nvfp4", range(127), 16), ("mxfp4", range(118, 137), 32)):
        codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
        blocks = torch.tensor(scales, dtype=torch.uint8)[:, None].repeat(1, 512 // block)
        packed = PackedWeight(codes, blocks, torch.ones(1), name, (len(scales), 512))
        weight = to_layout(packed.to("cuda"), layout)
        got = fp4_linear_triton.dequantize(*weight.tensors, 512, name, layout, dtype)
        want = dequantize_weight(*weight.tensors, 512, name, layout, torch.float32).to(dtype)
        assert torch.equal(got, want), f"{name} {dtype}: {(got != want).sum()} values differ"
        # the product with the identity passes the tensor cores: sums with one term
        eye = torch.eye(512, device="cuda", dtype=dtype)
        got = product(eye, *weight.tensors, None, 512, name, layout)
        assert torch.equal(got, want.t()), f"{name} {dtype}: {(got != want.t()).sum()} products differ"


def check_products() -> float:
    """Worst ratio of our error to plain PyTorch's over shapes, types and configurations."""
    layout, worst = preferred_layout(get_target("cuda")), 0.0
    for dtype, name, m, (n, k), biased in itertools.product(
        (torch.bfloat16, torch.float16), ("nvfp4", "mxfp4"), (1, 5, 16, 33, 100, 300), ((1000, 2880), (70, 100)), (0, 1)
    ):
        weight = to_layout(quantize(torch.randn(n, k, device="cuda") * 0.02, name), layout)
        x = torch.randn(m, k + 8, device="cuda", dtype=dtype)[:, :k]
        bias = torch.randn(n, device="cuda", dtype=dtype) if biased else None
        dense = dequantize_weight(*weight.tensors, k, name, layout, torch.float64)
        exact = x.double() @ dense.T + (0 if bias is None else bias.double())
        plain = F.linear(x, dense.to(dtype), bias)
        for run in (product, fp4_linear_gpu.dequantize_product):
            got = run(x, *weight.tensors, bias, k, name, layout)
            ratio = float((got.double() - exact).norm() / (plain.double() - exact).norm())
            worst = max(worst, ratio)
            assert ratio <= _ERROR_RATIO, f"{run.__name__} {dtype} {name} {m} {n} {k}: {ratio}"
        again = product(x, *weight.tensors, bias, k, name, layout)
        assert torch.equal(again, product(x, *weight.tensors, bias, k, name, layout)), "two runs differ"
    return worst


def check_gradient() -> None:
    layout = preferred_layout(get_target("cuda"))
    weight = to_layout(quantize(torch.randn(512, 384, device="cuda") * 0.02), layout)
    x = torch.randn(7, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(7, 512, device="cuda", dtype=torch.bfloat16)
    fp4_linear(x, *weight.tensors, None, 384, "nvfp4", layout).backward(grad)
    dense = dequantize_weight(*weight.tensors, 384, "nvfp4", layout, torch.bfloat16)
    torch.testing.assert_close(x.grad, grad @ dense)


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


# ----------------------------------------------------------------------------------------------------------------- time
def microseconds(runs: Sequence[Callable[[], Any]]) -> float:
    """Median time of one call, over replays of a CUDA graph that calls each of ``runs`` in turn."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(runs))
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (microseconds([lambda: target.copy_(source)] * 4) * 1e-6)


def copies(n: int, k: int, name: str, count: int) -> list[LinearWeight]:
    """Weights with random codes, in memory of their own."""
    block = 16 if name == "nvfp4" else 32
    layout = preferred_layout(get_target("cuda"))
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    low, high = (40, 70) if name == "nvfp4" else (118, 127)
    scales = torch.randint(low, high, (n, k // block), dtype=torch.uint8, device="cuda")
    first = to_layout(PackedWeight(codes, scales, torch.full((1,), 1e-3, device="cuda"), name, (n, k)), layout)
    rest = [
        LinearWeight(first.codes.clone(), first.block_scales.clone(), first.row_scale.clone(), k, name, layout)
        for _ in range(count - 1)
    ]
    return [first, *rest]


def calls(
    x: torch.Tensor, weights: list[LinearWeight], run: Callable[..., Any], **extra: Any
) -> list[Callable[[], Any]]:
    order = (weights * 8)[: max(len(weights), 8)]
    return [lambda w=w: run(x, *w.tensors, None, w.k, w.format_name, w.layout, **extra) for w in order]


# ---------------------------------------------------------------------------------------------------------------- sweep
CANDIDATES = {  # rows of x: (block_m, rows, columns, warps, stages)
    16: [(16, 2, 4, 4, 3), (16, 2, 4, 4, 4), (16, 2, 2, 4, 4), (16, 2, 2, 4, 6), (16, 1, 4, 4, 4), (16, 4, 2, 8, 4)],
    64: [(64, 2, 2, 4, 4), (64, 2, 2, 4, 3), (64, 4, 2, 8, 4), (64, 2, 4, 4, 3), (64, 2, 4, 8, 3)],
    256: [(256, 2, 2, 8, 3), (128, 2, 2, 8, 3), (128, 4, 2, 8, 3), (256, 2, 1, 8, 4), (128, 2, 2, 4, 3)],
}
SPLITS = (1, 2, 3, 4, 6, 8)


def _warm(job: tuple[int, tuple[int, ...], bool]) -> None:
    """Compile one kernel into Triton's cache."""
    m, (block_m, rows, columns, warps, stages), split = job
    weights = copies(512, 2048, "nvfp4", 1)
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    config = TileConfig(block_m, rows, columns, 2 if split else 1, warps, stages)
    product(x, *weights[0].tensors, None, 2048, "nvfp4", weights[0].layout, config=config)


def warm(rows: list[int]) -> None:
    jobs = [(m, c, split) for m in rows for c in CANDIDATES[m] for split in (False, True)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(12, mp_context=context) as pool:
        for job, failure in zip(jobs, pool.map(_failure, jobs), strict=True):
            if failure:
                print("does not run:", job, failure)


def _failure(job: tuple[int, tuple[int, ...], bool]) -> str:
    try:
        _warm(job)
    except Exception as error:  # noqa: BLE001 - printed, the other candidates go on
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def sweep(rows: list[int]) -> None:
    warm(rows)
    for (n, k), m in itertools.product(SHAPES, rows):
        weights = copies(n, k, "nvfp4", max(2, int(_CACHE_BYTES // (n * k * 0.5625))))
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        found = []
        for candidate, splits in itertools.product(CANDIDATES[m], SPLITS):
            config = TileConfig(*candidate[:3], splits, *candidate[3:])
            try:
                found.append((microseconds(calls(x, weights, product, config=config)), config))
            except Exception as error:  # noqa: BLE001 - too much shared memory, say: printed
                print("fails", config, str(error)[:100])
        found.sort(key=lambda pair: pair[0])
        shipped = tile_config(get_target("cuda"), m, n, k)
        print(f"N={n} K={k} M={m} shipped {shipped}")
        for time_us, config in found[:10]:
            print(f"   {time_us:8.2f}  {tuple(asdict(config).values())}")


# ---------------------------------------------------------------------------------------------------------------- table
def table() -> list[dict[str, Any]]:
    target, speed = get_target("cuda"), bandwidth()
    rows: list[dict[str, Any]] = []
    for (n, k), name in itertools.product(SHAPES, ("nvfp4", "mxfp4")):
        weights = copies(n, k, name, max(2, int(_CACHE_BYTES // (n * k * 0.5625))))
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        floor = weights[0].nbytes / speed * 1e6
        for m in ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            case = make_case(x.dtype, m, n, k, name, weights[0].layout)
            row = {
                "n": n, "k": k, "m": m, "format": name, "floor": floor,
                "bf16": microseconds([lambda w=w, x=x: F.linear(x, w) for w in dense * 3]),
                "implementation": choose(target, case).implementation.name,
                "triton_dequantize": microseconds(calls(x, weights, fp4_linear_gpu.dequantize_product)),
            }  # fmt: skip
            if m <= fp4_linear_triton.MOST_ROWS:
                row["triton"] = microseconds(calls(x, weights, product))
            row["fp4"] = row[row["implementation"]]
            rows.append(row)
            print({key: round(v, 1) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    record.write("fp4_linear", rows)
    return rows


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
    parser.add_argument("what", nargs="+", choices=["check", "sweep", "table", "cpu"])
    parser.add_argument("--m", type=int, nargs="+", default=[16, 64, 256])
    arguments = parser.parse_args()
    for what in arguments.what:
        started = time.time()
        if what == "check":
            for dtype in (torch.bfloat16, torch.float16):
                check_decoding(dtype)
            print("decoding exact; worst error ratio", check_products())
            check_gradient()
            print("gradient; model", check_model())
        elif what == "sweep":
            sweep(arguments.m)
        elif what == "cpu":
            cpu_table()
        else:
            table()
        print(f"{what}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
