"""Compiles recorded Triton launches for architectures that are not here, and reads the compiler's resource report."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITCallable
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
SHARED_BYTES = {  # that one program can have
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}


@dataclass(frozen=True)
class Launch:
    """Arguments of one kernel launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs. ``spills`` in bytes (NVIDIA) or registers (AMD)."""

    registers: int
    spills: int
    shared: int
    assembly: dict[str, Any]


def gpu_target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)  # RDNA's waves have 32 lanes


class _Signature:
    """Types, constants and divisibility of arguments as Triton's launcher would specialise them."""

    def __init__(self) -> None:
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}

    def of(self, value: Any, path: tuple[int, ...], general: bool = False) -> Any:
        """``general``: without what holds for this value alone."""
        if general and type(value) is int:
            return "i32"
        if isinstance(value, tuple):
            return tuple(self.of(v, (*path, n)) for n, v in enumerate(value))
        if value is None or isinstance(value, (JITCallable, bool, str)) or (type(value) is int and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            self.attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        if isinstance(value, GluonDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            self.attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(launch: Launch, arch: str) -> Report:
    """Compile for ``sm_NN`` or ``gfxNNN``."""
    kernel = launch.kernel
    compile_options = {
        k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages", "maxnreg", "launch_pdl")
    }
    named = {k: v for k, v in launch.options.items() if k not in compile_options}
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | named
    signature, types = _Signature(), {}
    for n, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature.constants[(n,)] = value
            types[parameter.name] = "constexpr"
        else:
            types[parameter.name] = signature.of(value, (n,), parameter.do_not_specialize)
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = language(kernel, types, signature.constants, signature.attributes)
    compiled = triton.compile(source, target=gpu_target(arch), options=compile_options)
    return _report(compiled)


def _report(compiled: Any) -> Report:
    assembly = compiled.asm
    if "amdgcn" in assembly:
        text = assembly["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
        spills = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[-1])
    else:
        usage = _resource_usage(assembly["cubin"])
        registers, spills = int(re.findall(r"REG:(\d+)", usage)[-1]), int(re.findall(r"STACK:(\d+)", usage)[-1])
    return Report(registers, spills, compiled.metadata.shared, assembly)


def _resource_usage(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
