"""``vbcompile tune``: times every way to run FP4 products of given shapes on this device, for the user's table.

Times are medians of CUDA-graph replays that go round copies of the weight, so that none is found in cache.
"""

import functools
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbcompile.device import Target, get_target
from vbcompile.kernels import (
    fp4_linear_few,
    fp4_linear_fp8,
    fp4_linear_gpu,
    fp4_linear_hopper,
    fp4_linear_triton,
    fp4_tuning,
)
from vbcompile.kernels.fp4 import PackedWeight
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import LinearWeight, to_layout
from vbcompile.kernels.fp4_linear import make_case
from vbcompile.kernels.registry import operator
from vbcompile.kernels.triton_target import multiprocessor_count

log = logging.getLogger(__name__)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_CACHE_BYTES = 200e6  # more than any second-level cache holds
_REPLAYS = 9


class TuneError(RuntimeError):
    """There is nothing to tune here; the message says why."""


def microseconds(runs: Sequence[Callable[[], Any]]) -> float:
    """Median time of one call, over replays of a CUDA graph that calls each of ``runs`` in turn."""
    for run in runs:  # all: the first product with a weight may take more
        run()
    torch.cuda.synchronize()
    with fp4_linear_triton.counters_of_passing_graphs():  # or none would be left for the hundredth candidate
        return _replays(runs)


def _replays(runs: Sequence[Callable[[], Any]]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(runs))
    return statistics.median(times)


def copies(n: int, k: int, format_name: str, count: int | None = None) -> list[LinearWeight]:
    """Weights with random codes in memory of their own; as many as no cache holds, unless ``count`` is given."""
    fmt = fp4_format(format_name)
    layout = fp4_linear_triton.preferred_layout(get_target("cuda"))
    blocks = -(-k // fmt.block_size)
    codes = torch.randint(0, 256, (n, blocks * fmt.block_size // 2), dtype=torch.uint8, device="cuda")
    low, high = (40, 70) if fmt.has_tensor_scale else (118, 127)
    scales = torch.randint(low, high, (n, blocks), dtype=torch.uint8, device="cuda")
    packed = PackedWeight(codes, scales, torch.full((1,), 1e-3, device="cuda"), format_name, (n, k))
    first = to_layout(packed, layout)
    count = count or max(2, int(_CACHE_BYTES // first.nbytes))
    rest = ([t.clone() for t in first.tensors] for _ in range(count - 1))
    return [first, *(LinearWeight(c, b, r, k, format_name, layout) for c, b, r in rest)]


def calls(x: Tensor, weights: list[LinearWeight], run: Callable[..., Any], **extra: Any) -> list[Callable[[], Any]]:
    """At least eight calls that go round the weights."""
    order = (weights * 8)[: max(len(weights), 8)]
    return [functools.partial(run, x, *w.tensors, None, w.k, w.format_name, w.layout, **extra) for w in order]


def dense_copies(n: int, k: int) -> list[Tensor]:
    """Unpacked weights, as many as no cache holds."""
    count = max(2, int(_CACHE_BYTES // (2 * n * k)) + 1)
    return [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def dense_calls(x: Tensor, weights: list[Tensor]) -> list[Callable[[], Any]]:
    """At least eight of the vendor's products that go round the weights."""
    return [functools.partial(F.linear, x, w) for w in (weights * 8)[: max(len(weights), 8)]]


def candidates(target: Target, m: int, n: int, k: int) -> Iterator[tuple[str, Callable[..., Tensor], Any]]:
    """``(implementation, function, configuration or None)`` of every way worth timing."""
    for few in _diagonal_candidates(m, n, k, multiprocessor_count(target)):
        yield "triton_diagonal", fp4_linear_few.product_diagonal, few
    for stream in _STREAM:
        if fp4_linear_few.MOST_DIAGONAL_ROWS < m <= fp4_linear_few.MOST_ROWS:
            yield "triton_stream", fp4_linear_few.product_stream, fp4_linear_few.StreamConfig(*stream)
    for few in _few_candidates(m):
        yield "triton_few", fp4_linear_few.product_few, few
    if m >= 16:
        for wide in fp4_linear_hopper.wide_candidates(m, False):
            if m > 16 or (wide.block_m == 16 and not wide.lag):  # each takes seconds to compile
                yield "hopper", fp4_linear_hopper.product_wide, wide
    if m > 16:
        for wide in fp4_linear_hopper.wide_candidates(m, True):
            yield "hopper_fp8", fp4_linear_hopper.product_wide_fp8, wide
    for shape in _tile_candidates(target, m, n, k):
        yield "triton", fp4_linear_triton.product, shape
    yield "triton_dequantize", fp4_linear_gpu.dequantize_product, None
    yield "triton_fp8", fp4_linear_fp8.product_fp8, None


_DIAGONAL = (  # strips, warps, unroll, registers
    (2, 2, 2, 128), (2, 2, 1, 80), (1, 8, 2, 96), (1, 8, 4, 128), (1, 8, 1, 64), (1, 4, 2, 96), (1, 4, 4, 128),
    (2, 8, 1, 80), (2, 8, 2, 128), (2, 4, 2, 128), (1, 16, 1, 64), (1, 16, 2, 96),
)  # fmt: skip


def _diagonal_candidates(m: int, n: int, k: int, multiprocessors: int) -> Iterator[fp4_linear_few.FewConfig]:
    """Those that divide the columns and keep 5 to 34 warps a multiprocessor busy."""
    if m > fp4_linear_few.MOST_DIAGONAL_ROWS:
        return
    for strips, warps, unroll, registers in _DIAGONAL:
        busy = n / (16 * strips) * warps / multiprocessors
        if k % (fp4_linear_few.CHUNK * warps * unroll) == 0 and 5 <= busy <= 34:
            yield fp4_linear_few.FewConfig(strips, warps, unroll, registers if m == 1 else 128)


_STREAM = (  # strips, warps, blocks, registers, tiles
    (2, 4, 4, 128), (2, 8, 2, 128), (1, 4, 4, 96), (1, 8, 2, 80), (1, 4, 4, 128, 4), (1, 8, 2, 128),
)  # fmt: skip
_TILES = ((16, 2), (16, 4), (32, 4))  # block_m, columns


def _tile_candidates(target: Target, m: int, n: int, k: int) -> Iterator[fp4_linear_triton.TileConfig]:
    yield fp4_linear_triton.tile_config(target, m, n, k)
    for (block_m, columns), splits in itertools.product(_TILES, (1, 4, 8)):
        if block_m <= max(16, m) <= 64 and k % (64 * columns) == 0:
            yield fp4_linear_triton.TileConfig(block_m, 1, columns, splits, 4, 4)


_FEW = (  # strips, warps, unroll, registers
    (1, 4, 4, 128), (1, 8, 4, 128), (1, 8, 2, 128), (2, 4, 2, 128), (2, 8, 2, 128), (2, 4, 4, 128), (4, 4, 1, 128),
    (4, 4, 2, 168), (1, 8, 4, 80), (1, 16, 4, 80), (1, 16, 2, 128), (1, 4, 2, None), (1, 8, 4, None), (2, 4, 2, None),
)  # fmt: skip


_FEW_MORE = (  # for more than 16 rows: others run out of registers
    (1, 8, 2, 128), (1, 16, 2, 128), (2, 4, 2, 128), (2, 8, 2, 128), (4, 4, 1, 168), (4, 4, 2, 168),
)  # fmt: skip


def _few_candidates(m: int) -> Iterator[fp4_linear_few.FewConfig]:
    if m <= fp4_linear_few.MOST_ROWS:
        yield from (fp4_linear_few.FewConfig(*shape) for shape in (_FEW if m <= 16 else _FEW_MORE))


def measure(target: Target, format_name: str, n: int, k: int, rows: Sequence[int]) -> Iterator[list[Any]]:
    """Rows of the table of :mod:`vbcompile.kernels.fp4_tuning`, one a count of rows of x."""
    weights = copies(n, k, format_name)
    dense = dense_copies(n, k)
    implementations = {i.name: i for i in operator("fp4_linear").implementations}
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        case = make_case(x.dtype, m, n, k, format_name, weights[0].layout, "fp8")
        times: dict[str, list[Any]] = {}
        for name, run, config in candidates(target, m, n, k):
            if implementations[name].refuses(target, None) or implementations[name].refuses(target, case):
                continue
            extra = {} if config is None else {"config": config}
            try:
                time = microseconds(calls(x, weights, run, **extra))
            except Exception as error:  # noqa: BLE001 - too much shared memory, say; logged, the others go on
                log.warning("%s %s does not run with %d rows: %s", name, config, m, error)
                times.setdefault(name, [math.inf, None])
                continue
            if name not in times or time < times[name][0]:
                times[name] = [round(time, 2), None if config is None else astuple(config)]
        for name, implementation in implementations.items():
            if name not in times and not implementation.refuses(target, case):
                times[name] = [math.inf, None]  # not worth timing: no estimate may put it before what was timed
        vendor = microseconds(dense_calls(x, dense))
        yield [format_name, n, k, m, round(vendor, 2), times]


def shapes_of(model: nn.Module) -> list[tuple[int, int]]:
    """``(N, K)`` of the linear layers of a model, each once."""
    found = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear)}
    return sorted(found)


def check_device() -> Target:
    """The device to tune for. Raises TuneError where none of our Triton kernels can run."""
    if not torch.cuda.is_available():
        raise TuneError("needs an NVIDIA or AMD GPU: there is none that PyTorch can use here (vbcompile doctor)")
    target = get_target("cuda")
    if fp4_linear_triton.preferred_layout(target) == "plain":
        reason = operator("fp4_linear").choose(target, make_case(torch.bfloat16, 1, 64, 64, "nvfp4", "plain"))
        raise TuneError(f"no Triton kernel for FP4 runs on {target.name}: {reason.explain()}")
    return target


def tune(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int] = ROWS, format_name: str = "nvfp4"
) -> Iterator[list[Any]]:
    """Measure, and write the user's table shape by shape; yields its rows.

    Raises:
        TuneError: no device to tune for.
        ValueError: unknown format.
    """
    target = check_device()
    fp4_format(format_name)
    fp4_linear_triton.prepare(torch.device("cuda", torch.cuda.current_device()))
    operator("fp4_linear").load()
    for n, k in shapes:
        found = []
        for row in measure(target, format_name, n, k, rows):
            found.append(row)
            yield row
        fp4_tuning.write_user_table(target.arch, target.name, found)
