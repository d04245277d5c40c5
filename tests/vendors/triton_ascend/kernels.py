"""How far each of our Triton kernels comes through Ascend's compilers without CANN, which only the last step needs."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from attention_forms import make_forms
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compiler as triton_compiler
from triton.runtime.jit import JITFunction

from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import attention_problem, attention_triton, fp4_grouped, fp4_linear_triton
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_quantize import quantize

_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int32: "*i32"}
_LAYOUT = "fragments2"  # the one that is decoded without inline assembly
_OPTIONS = (
    "--enable-auto-multi-buffer=true",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
_WITHOUT_CANN = "External hivmc run fails"  # the last step, which turns the finished module into machine code


@dataclass(frozen=True)
class Outcome:
    """How far a kernel came: ``language``, ``linalg``, ``compiler``, ``memory`` or ``all``; and what stopped it."""

    kernel: str
    stage: str
    detail: str = ""


@triton.jit
def row_softmax_kernel(x, y, BLOCK: triton.language.constexpr):
    """A tile ``[BLOCK, BLOCK]`` of float32, softmax of its rows: shows what the check of memory accepts and refuses."""
    rows, columns = triton.language.arange(0, BLOCK), triton.language.arange(0, BLOCK)
    at = rows[:, None] * BLOCK + columns[None, :]
    tile = triton.language.load(x + at)
    tile = triton.language.exp(tile - triton.language.max(tile, 1)[:, None])
    triton.language.store(y + at, tile / triton.language.sum(tile, 1)[:, None])


def outcomes(soc: str) -> list[Outcome]:
    """One for each kernel of ours, and two for the check itself; prints each."""
    _stop_at_linalg()
    found = []
    for kernel, arguments, options in _launches():
        outcome = _try(kernel, arguments, options, soc)
        print(f"{soc} {outcome.kernel}: {outcome.stage} {outcome.detail}", flush=True)
        found.append(outcome)
    return found


def _launches() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The product's own launches, recorded, on CPU tensors."""
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorded.append((self, arguments, options))

    JITFunction.run = record
    target = catalog_target("pvc")  # its tiles: nobody has tuned Ascend's
    attention_problem.arch_of = lambda t: target.arch
    for module in (attention_triton, fp4_linear_triton, fp4_grouped):
        module.get_target = lambda device=None: target
    for block in (64, 512):
        x = torch.randn(block, block)
        row_softmax_kernel[(1,)](x, x, BLOCK=block)
    for kind in ("nvfp4", "mxfp4"):
        linear = to_layout(quantize(torch.randn(256, 512), kind), _LAYOUT)
        rest = linear.k, kind, _LAYOUT
        fp4_linear_triton.product(torch.randn(16, 512).bfloat16(), *linear.tensors, None, *rest)
        fp4_linear_triton.dequantize(*linear.tensors, *rest, torch.bfloat16)
        stack = fp4_grouped.to_grouped_layout(quantize(torch.randn(4, 128, 256), kind), _LAYOUT)
        x, ends = torch.randn(40, 256).bfloat16(), torch.tensor([10, 20, 30, 40], dtype=torch.int32)
        fp4_grouped.grouped_product(x, *stack.tensors, ends, stack.k, kind, _LAYOUT)
    q = torch.randn(1, 2, 64, 64).bfloat16()
    arguments = (0.1, 0.0, None, make_forms(64, 64, 64, 64)["causal"].function)
    out, lse = attention_triton.forward(q, q, q, [], *arguments)
    attention_triton.forward(q[:, :, :1], q, q, [], *arguments)
    attention_triton.backward(out, None, q, q, q, [], out, lse, *arguments, [True] * 3)
    yield from recorded


def _stop_at_linalg() -> None:
    """The compiler of triton-ascend without its last stage, which wants CANN's tools and a card."""
    backend = backends["ascend"].compiler
    add_stages, initialise = backend.add_stages, backend.__init__

    def stages_without_binary(self: Any, stages: dict[str, Any], options: Any) -> None:
        add_stages(self, stages, options)
        stages.pop("npubin", None)

    def initialise_for_linalg(self: Any, target: Any) -> None:
        initialise(self, target)
        self.binary_ext = "ttadapter"

    def keep_files(self: Any, source: Any, files: dict[str, str], key: str) -> None:
        self.linalg = next(Path(path).read_text() for name, path in files.items() if name.endswith(".ttadapter"))

    backend.add_stages, backend.__init__ = stages_without_binary, initialise_for_linalg
    triton_compiler.CompiledKernel.__init__ = keep_files


def _try(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], soc: str) -> Outcome:
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    name = f"{kernel.__name__}({values['BLOCK']})" if kernel.__name__.startswith("row_") else kernel.__name__
    constants, signature = {}, {}
    for parameter in kernel.params:
        value = values[parameter.name]
        if isinstance(value, tuple):
            return Outcome(name, "language", "Triton 3.2 knows no tuples of arguments")
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    try:
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("npu", soc, 0), options={})
    except Exception as error:  # noqa: BLE001 - an outcome
        text = getattr(error, "stderr", b"").decode() or str(error)
        return Outcome(name, "linalg", _reason(text))
    return _into_memory(name, compiled.linalg, soc)


def _into_memory(name: str, linalg: str, soc: str) -> Outcome:
    """The vendor's compiler up to machine code: it plans the on-chip memory and says what does not fit."""
    tool = Path(triton.__file__).parents[1] / "ascendnpuir/bin/bishengir-compile"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.mlir"
        path.write_text(linalg)
        command = [str(tool), str(path), f"--target={soc}", *_OPTIONS, "-o", str(Path(folder) / "kernel.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode < 0 or "LLVM ERROR" in text:
        return Outcome(name, "compiler", _reason(text))
    overflow = re.findall(r"\w+ overflow, requires \d+ bits while \d+ bits available", text)
    if overflow:
        return Outcome(name, "memory", overflow[-1])
    if done.returncode and _WITHOUT_CANN not in text:
        return Outcome(name, "compiler", _reason(text))
    return Outcome(name, "all")


def _reason(text: str) -> str:
    """The first error that a compiler's output names."""
    found = re.search(r"(?:error|LLVM ERROR): (.*)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (found[1] if found else lines[-1] if lines else "")[:200]
