"""What ``vbcompile bench`` measures: the backend's operators beside PyTorch's own, each with its floor and a check.

Each case has several sets of inputs, so that a round does not find the last one's data in a cache, and compares its
result with float64 before anything is timed. Graphs are rewritten by the backend and then run without a compiler, so
that the operators are what is measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vbcompile import bench_peers
from vbcompile.backend import collected_reports
from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_quantize import quantize, relative_error

Tensor = torch.Tensor
_SETS = 4
_GAUSSIAN_ERROR = 0.0835  # relative error of NVFP4 on Gaussian weights, with room for a small sample
_LARGEST_FOUR_BIT_ERROR = 0.2  # of a product with 4-bit weights, whatever their format: 0.08 to 0.15
_COPY_BYTES = {"cpu": 2**26}
_OPTIONS = {"downstream": "eager"}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is measured, with its sizes.
        runs: name -> one callable per set of inputs; ours first, then peers.
        flops, nbytes: the work that no implementation can avoid.
        error, allowed: relative error of ours, and its limit: twice that of plain PyTorch in the same dtype, or the
            format's own.
        implementation: what the registry chose, and why.
        absent: peer -> why it has no run here.
        over_link: whether ``nbytes`` cross the link from host memory, and are not the device's own.
        graphs: whether a round may be captured in a CUDA graph.
        memory: ``[nanoseconds, bytes]`` of device memory over a step that streams weights.
    """

    name: str
    runs: dict[str, Sequence[Callable[[], object]]]
    flops: float
    nbytes: float
    error: float = 0.0
    allowed: float = 0.0
    implementation: str = ""
    absent: dict[str, str] = field(default_factory=dict)
    over_link: bool = False
    graphs: bool = True
    memory: list[list[int]] = field(default_factory=list)


def makers(device: torch.device, quick: bool) -> list[Callable[[], Case]]:
    """What makes each case of a device, its data included; ``quick`` leaves out the large ones."""
    host = device.type == "cpu"
    dtype = torch.float32 if host else torch.bfloat16
    length = 512 if host else 4096
    width = 2048 if host and quick else 4096  # packing four weights of a case takes a processor seconds
    shapes = [((1, 4, length, 64), False), ((1, 4, length, 64), True)]
    if not quick:
        shapes.append(((2, 8, length, 128), True))
    found: list[Callable[[], Case]] = [partial(attention_case, device, dtype, *shape) for shape in shapes]
    found += [partial(linear_case, device, dtype, m, width, width) for m in ((1, 16) if quick else (1, 16, 256))]
    found += [partial(quantize_case, device, width // 8, width), partial(copy_case, device)]
    if not host:
        found += [partial(copy_case, device, to_device=True), partial(copy_case, device, to_device=False)]
    return found


def attention_case(device: torch.device, dtype: torch.dtype, shape: Sequence[int], causal: bool) -> Case:
    """Attention written out, through the backend; beside it ``scaled_dot_product_attention``, and the same in eager.

    Args:
        shape: batch, heads, length, head dimension.
    """
    b, h, s, d = shape
    sets = [tuple(torch.randn(b, h, s, d, device=device, dtype=dtype) for _ in range(3)) for _ in range(_SETS)]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones(s, s, device=q.device, dtype=torch.bool).triu(1), -math.inf)
        return torch.softmax(scores, -1) @ v

    ours, implementation = compiled(formula, _OPTIONS | {"mode": "balanced"}, *sets[0])
    sdpa = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    exact = formula(*(t.double() for t in sets[0]))
    allowed = 2 * error_of(formula(*sets[0]), exact)
    known = bench_peers.ATTENTION if device.type == "cuda" else {}
    peers, absent = bench_peers.prepared(known, causal, lambda run: error_of(run(*sets[0]), exact), 2 * allowed)
    return Case(
        name=f"attention {b}x{h}x{s}x{d}{' causal' if causal else ''}, {_name(dtype)}",
        runs={k: _each(run, sets) for k, run in {"vblackwell": ours, "sdpa": sdpa, "eager": formula, **peers}.items()},
        flops=4.0 * b * h * s * s * d * (0.5 if causal else 1.0),
        nbytes=4.0 * b * h * s * d * dtype.itemsize,
        error=error_of(ours(*sets[0]), exact),
        allowed=allowed,
        implementation=implementation,
        absent=absent,
    )


def linear_case(device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int) -> Case:
    """A frozen linear layer in ``speed`` mode (NVFP4 weights), beside the same layer as PyTorch runs it."""
    layers = [nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False) for _ in range(_SETS)]
    inputs = [torch.randn(rows, k, device=device, dtype=dtype) for _ in range(_SETS)]
    ours, implementation = zip(
        *(compiled(layer, _OPTIONS | {"mode": "speed"}, x) for layer, x in zip(layers, inputs, strict=True)),
        strict=True,
    )
    packed = quantize(layers[0].weight, "nvfp4")
    exact = inputs[0].double() @ dequantize(packed, torch.float64).T
    plain = F.linear(inputs[0], dequantize(packed, dtype))
    pairs = list(zip(ours, layers, inputs, strict=True))
    dense = inputs[0].double() @ layers[0].weight.double().T
    known = bench_peers.LINEAR if device.type == "cuda" else {}
    works = lambda run: error_of(run(inputs[0]), dense)
    peers, absent = bench_peers.prepared(known, layers[0].weight.detach(), works, _LARGEST_FOUR_BIT_ERROR)
    sets = {k: [run, *(known[k].prepare(layer.weight.detach()) for layer in layers[1:])] for k, run in peers.items()}
    return Case(
        name=f"FP4 linear, {rows} rows, weight {n}x{k}, {_name(dtype)}",
        runs={
            "vblackwell": [partial(run, x) for run, _, x in pairs],
            "eager": [partial(layer, x) for _, layer, x in pairs],
            **{k: [partial(run, x) for run, x in zip(each, inputs, strict=True)] for k, each in sets.items()},
        },
        flops=2.0 * rows * n * k,
        nbytes=float(packed.nbytes + rows * (n + k) * dtype.itemsize),
        error=error_of(ours[0](inputs[0]), exact),
        allowed=2 * error_of(plain, exact),
        implementation=implementation[0],
        absent=absent,
    )


def quantize_case(device: torch.device, n: int, k: int) -> Case:
    """Packing bfloat16 weights to NVFP4 with the scale search."""
    weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(2)]
    packed = quantize(weights[0], "nvfp4")
    return Case(
        name=f"quantise {n}x{k} bfloat16 to NVFP4",
        runs={"vblackwell": [partial(quantize, w, "nvfp4") for w in weights]},
        flops=0.0,
        nbytes=float(weights[0].nbytes + packed.nbytes),
        error=relative_error(weights[0], packed),
        allowed=_GAUSSIAN_ERROR,
    )


def copy_case(device: torch.device, to_device: bool | None = None) -> Case:
    """A copy within the device, or between it and pinned host memory in the direction asked for."""
    size = _COPY_BYTES.get(device.type, 2**29)
    here = torch.empty(size, dtype=torch.uint8, device=device).random_()
    if to_device is None:
        name, nbytes, source, target = "copy on the device", 2.0 * size, here, torch.empty_like(here)
    else:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        name, nbytes = f"copy {'from' if to_device else 'to'} pinned host memory", float(size)
        source, target = (host, here) if to_device else (here, host)
    return Case(name, {"copy": [lambda: target.copy_(source, non_blocking=True)]}, 0.0, nbytes)


def compiled(
    function: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any
) -> tuple[Callable[..., Any], str]:
    """The function through the backend, and what its first rewritten site runs as."""
    with collected_reports() as reports, torch.no_grad():
        run = torch.compile(function, backend="vblackwell", dynamic=False, options=options)
        run(*args, **kwargs)
    found = [d for report in reports for d in report.decisions if d.pass_name in ("attention", "fp4", "offload")]
    chosen = [d.implementation or d.reason for d in found if d.action == "rewritten"]
    return run, chosen[0] if chosen else f"not rewritten: {'; '.join(d.reason for d in found) or 'no site'}"


def _each(run: Callable[..., object], sets: Sequence[Sequence[Tensor]]) -> list[Callable[[], object]]:
    return [partial(run, *inputs) for inputs in sets]


def error_of(result: Tensor, exact: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((result.double() - exact).norm() / exact.norm())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
