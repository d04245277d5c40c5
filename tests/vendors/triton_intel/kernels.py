"""What the opt-in job compiles and runs: attention, FP4 linear layers and packing, by the product's own launches."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from attention_forms import make_forms
from torch import Tensor

from vbcompile.device import Target
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import (
    attention_problem,
    attention_triton,
    fp4_grouped,
    fp4_linear_gpu,
    fp4_linear_triton,
    fp4_quantize_triton,
)
from vbcompile.kernels.attention_tuning import refuses_tiles
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.fp4_rounding import quantize_reference
from vbcompile.kernels.score_function import ScoreFunction
from vendors.triton_intel.opencl import LOCAL_BYTES, CompilingDriver, OpenClDriver, without_card

ATTENTION = [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float32"), (128, "float32")]
ROWS = (1, 16, 64, 256)
FORMATS = ("nvfp4", "mxfp4")
# a mask by bounds, a mask tensor, a bias, a score function, shared keys
FORMS = ("causal", "bool_mask", "bias", "softcap", "grouped")


@contextmanager
def intel_gpu(driver: CompilingDriver, arch: str = "pvc") -> Iterator[Target]:
    """CPU tensors are on an Intel GPU, as far as our launches ask."""
    without_card()
    target = catalog_target(arch)
    triton.runtime.driver.set_active(driver)
    with ExitStack() as stack:
        stack.enter_context(patch.object(attention_problem, "arch_of", lambda t: arch))
        for module in (attention_triton, fp4_linear_triton, fp4_grouped):
            stack.enter_context(patch.object(module, "get_target", lambda device=None: target))
        yield target


# ------------------------------------------------------------------------------------------------------------ compiling
def compile_all(arch: str, driver: CompilingDriver) -> list[str]:
    """Compile every kernel with the tiles that ship for ``arch``; prints a row each, returns what is wrong."""
    wrong = []
    with intel_gpu(driver, arch) as target:
        for name, run in _jobs(target):
            start, before = time.perf_counter(), len(driver.launched)
            try:
                refused = run()
            except Exception as error:  # noqa: BLE001 - a row of the table
                wrong.append(f"{arch} {name}: {type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}")
                print(wrong[-1], flush=True)
                continue
            if refused:
                print(f"{arch} {name}: refused: {refused}", flush=True)
            for k in driver.launched[before:]:
                units = "matrix units" if k.matrix_units else "no matrix units"
                what = f"{k.name} {k.local_bytes} bytes of local memory, {k.sub_groups} x {k.lanes} lanes, {units}"
                print(f"{arch} {name}: {what}", flush=True)
                if k.local_bytes > LOCAL_BYTES:
                    wrong.append(f"{arch} {name}: {k.name} takes {k.local_bytes} bytes of local memory")
            print(f"{arch} {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return wrong


def _jobs(target: Target) -> Iterator[tuple[str, Callable[[], str | None]]]:
    for size, dtype in ATTENTION:
        yield f"attention {size} {dtype}", lambda size=size, dtype=dtype: _attention(target, size, dtype)
    for kind in FORMATS:
        for rows in ROWS:
            yield f"fp4_linear {kind} {rows} rows", lambda kind=kind, rows=rows: _product(target, kind, rows)
        yield f"fp4_linear {kind} decoding", lambda kind=kind: _decoding(target, kind)
        yield f"fp4_grouped_linear {kind}", lambda kind=kind: _grouped(target, kind)
        yield f"fp4_quantize {kind}", lambda kind=kind: _packing(kind)


def _attention(target: Target, size: int, dtype: str) -> str | None:
    kind: torch.dtype = getattr(torch, dtype)
    directions = (attention_triton.FORWARD_KERNELS, attention_triton.BACKWARD_KERNELS)
    refused = [refuses_tiles(target.arch, kernels, kind.itemsize, size) for kernels in directions]
    if refused[0]:
        return refused[0]
    q, k, v = (torch.empty(1, 2, 512, size, dtype=kind) for _ in range(3))
    arguments = (0.1, 0.0, None, make_forms(512, 512, size, size)["causal"].function)
    out, lse = attention_triton.forward(q, k, v, [], *arguments)
    attention_triton.forward(q[:, :, :1], k, v, [], *arguments)  # decoding
    if refused[1] is None:
        attention_triton.backward(out, None, q, k, v, [], out, lse, *arguments, [True] * 3)
    return refused[1]


def _weight(target: Target, kind: str, n: int = 256, k: int = 512, seed: int = 0) -> tuple[PackedWeight, tuple]:
    packed = quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), kind)
    linear = to_layout(packed, fp4_linear_triton.preferred_layout(target))
    return packed, (*linear.tensors, linear.k, linear.format_name, linear.layout)


def _product(target: Target, kind: str, rows: int) -> None:
    _, (*tensors, k, name, layout) = _weight(target, kind)
    fp4_linear_triton.product(torch.empty(rows, k, dtype=torch.bfloat16), *tensors, None, k, name, layout)


def _decoding(target: Target, kind: str) -> None:
    _, (*tensors, k, name, layout) = _weight(target, kind)
    fp4_linear_triton.dequantize(*tensors, k, name, layout, torch.bfloat16)


def _grouped(target: Target, kind: str) -> None:
    stack = quantize(torch.randn(4, 128, 256), kind)
    weight = fp4_grouped.to_grouped_layout(stack, fp4_linear_triton.preferred_layout(target))
    x, ends = torch.empty(40, 256, dtype=torch.bfloat16), torch.tensor([10, 20, 30, 40], dtype=torch.int32)
    fp4_grouped.grouped_product(x, *weight.tensors, ends, weight.k, weight.format_name, weight.layout)


def _packing(kind: str) -> None:
    for method in fp4_quantize_triton.METHODS:
        fp4_quantize_triton.quantize(torch.ones(2, 4096, dtype=torch.bfloat16), kind, method, True)


# -------------------------------------------------------------------------------------------------------------- running
def run_all(forms: tuple[str, ...]) -> list[str]:
    """Run kernels on the processor and compare with plain PyTorch by the 2x rule; returns what is wrong."""
    wrong = []
    with intel_gpu(OpenClDriver()) as target:
        for number, name in enumerate(forms):
            wrong += _compare_attention(name, torch.float32)
            if not number:  # in bfloat16 the runtime compiles for minutes: processors have no instructions for it
                wrong += _compare_attention(name, torch.float16)
        for kind in FORMATS:
            for rows in (1, 40):
                wrong += _compare_product(target, kind, rows)
            for method in ("mse", "nearest"):
                wrong += _compare_packing(kind, method)
    return wrong


def _compare_attention(name: str, dtype: torch.dtype) -> list[str]:
    from vendors.trial import results

    start = time.perf_counter()
    rows = results(make_forms(21, 37, 16, 16)[name], dtype, all_gradients=False, call=_Triton.apply_form)
    return _judge(f"attention {name} {dtype}", rows, start)


class _Triton(torch.autograd.Function):
    """Our kernels, both directions."""

    @staticmethod
    def apply_form(q, k, v, captured, scale, dropout_p, seed, function):
        return _Triton.apply(q, k, v, scale, function, *captured)

    @staticmethod
    def forward(ctx, q, k, v, scale, function, *captured):
        ctx.rest = captured, scale, ScoreFunction.loads(function)
        out, lse = attention_triton.forward(q, k, v, captured, scale, 0.0, None, ctx.rest[2])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, out, lse = ctx.saved_tensors
        captured, scale, function = ctx.rest
        needs = [True] * 3 + [False] * len(captured)
        found = attention_triton.backward(
            grad, None, q, k, v, captured, out, lse, scale, 0.0, None, function, needs
        )  # fmt: skip
        return *found[:3], None, None, *[None] * len(captured)


def _compare_product(target: Target, kind: str, rows: int) -> list[str]:
    start = time.perf_counter()
    packed, (*tensors, k, name, layout) = _weight(target, kind, n=130, k=256)
    x, bias = torch.randn(rows, k).half(), torch.randn(130).half()
    exact = F.linear(x.double(), dequantize(packed, torch.float64), bias.double())
    plain = F.linear(x, dequantize(packed, torch.float16), bias)

    def row(what: str, out: Tensor) -> tuple[str, float, float]:
        return what, float((out - exact).norm()), 2 * float((plain - exact).norm())

    ours = [row("product", fp4_linear_triton.product(x, *tensors, bias, k, name, layout))]
    if rows > 1:
        ours.append(row("decoding", fp4_linear_gpu.dequantize_product(x, *tensors, bias, k, name, layout)))
    return _judge(f"fp4_linear {kind} {rows} rows", ours, start)


def _compare_packing(kind: str, method: str) -> list[str]:
    start, weight = time.perf_counter(), torch.randn(8, 200)

    def error(tensors: tuple[Tensor, Tensor, Tensor]) -> float:
        return float((dequantize(PackedWeight(*tensors, kind, (8, 200))) - weight).norm())

    ours = fp4_quantize_triton.quantize(weight, kind, method, True)
    plain = quantize_reference(weight, kind, method, True)
    other = float(sum((a != b).sum() for a, b in zip(ours, plain, strict=True)))
    rows = [("error", error(ours), 1.0001 * error(plain)), ("bytes that differ", other, 0.01 * plain[0].numel())]
    return _judge(f"fp4_quantize {kind} {method}", rows, start)


def _judge(what: str, rows: list[tuple[str, float, float]], start: float) -> list[str]:
    worst = max(error / allowed if allowed else 0.0 for _, error, allowed in rows)
    print(f"{what}: {worst:.2f} of the error allowed, {time.perf_counter() - start:.0f} s", flush=True)
    return [f"{what}: {name} {error:.3g} > {allowed:.3g}" for name, error, allowed in rows if not error <= allowed]
