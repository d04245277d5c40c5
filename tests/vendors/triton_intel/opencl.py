"""Triton drivers without an Intel GPU: one that compiles for a card, one whose device is the CPU.

Kernels launch as they would on a card (``kernel[grid](...)``), on CPU tensors. The second driver builds the SPIR-V with
Intel's OpenCL runtime for processors and runs it; only the matrix units and the two-dimensional block loads of Intel's
GPUs are left out of the code then, which processors do not have.
"""

import ctypes
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyopencl as cl
import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

_MATRIX_UNITS = (
    "has_subgroup_matrix_multiply_accumulate",
    "has_subgroup_matrix_multiply_accumulate_tensor_float32",
    "has_subgroup_2d_block_io",
    "has_bfloat16_conversions",
)
_MATRIX_PRODUCT = b"_matrix_mad_k"  # in the name of the function that multiplies with them
LOCAL_BYTES = 128 << 10  # local memory of a work group on Data Center GPU Max and on Arc B
_SCALARS = {
    "i1": np.int8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "u8": np.uint8, "u32": np.uint32,
    "u64": np.uint64, "fp16": np.float32, "bf16": np.float32, "fp32": np.float32, "fp64": np.float64,
}  # fmt: skip

# SPIR-V: opcodes, and what Intel's kernel attributes bring, which the processor's runtime refuses and does not need
_CAPABILITY, _EXTENSION, _EXECUTION_MODE = 17, 10, 16
_KERNEL_ATTRIBUTES = 5892
_ATTRIBUTE_MODES = (5893, 5894, 5895, 5896, 5903)


def architecture(name: str, matrix_units: bool = True) -> dict[str, Any]:
    """What PyTorch says about an Intel GPU, as far as the compiler reads it."""
    return {
        "name": name,
        "vendor": "Intel",
        "max_work_group_size": 1024,
        "max_num_sub_groups": 64,
        "sub_group_sizes": [16, 32],
        "has_fp64": True,
        "architecture": 0,
    } | dict.fromkeys(_MATRIX_UNITS, matrix_units)


def without_card() -> None:
    """The compiler asks a small library about the card, which is built against SYCL's headers; here it is told."""
    compiler = backends["intel"].compiler
    compiler.__init__.__globals__["compile_module_from_src"] = lambda *a, **k: types.SimpleNamespace(
        parse_device_arch=lambda number: None
    )


@dataclass(frozen=True)
class Kernel:
    """A kernel that was launched: what it needs, and whether it uses the matrix units."""

    name: str
    local_bytes: int
    sub_groups: int
    lanes: int
    matrix_units: bool


class CompilingDriver(DriverBase):
    """Compiles for a card with matrix units and launches nothing.

    Attributes:
        launched: the kernels, in order.
    """

    matrix_units = True

    def __init__(self) -> None:
        self.launched: list[Kernel] = []
        limits = {"max_shared_mem": LOCAL_BYTES}
        self.utils = types.SimpleNamespace(load_binary=self._load, get_device_properties=lambda number: limits)
        self.launcher_cls = self._launcher

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("xpu", _Hashable(architecture("Intel GPU", self.matrix_units)), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return triton.testing.do_bench

    def _load(self, name: str, binary: bytes, shared: int, flags: str, device: int) -> tuple[Any, Any, int, int]:
        return binary, _MATRIX_PRODUCT in binary, 0, 0

    def _launcher(self, source: Any, metadata: Any) -> Any:
        kinds = _flat(tuple(source.signature.values()))

        def launch(x, y, z, stream, kernel, packed, launch_metadata, enter, leave, *arguments):
            given = zip(kinds, _flat(arguments), strict=True)
            values = [(kind, value) for kind, value in given if kind != "constexpr"]
            lanes = metadata.threads_per_warp
            self.launched.append(Kernel(metadata.name, metadata.shared, metadata.num_warps, lanes, kernel is True))
            self.run(kernel, (x, y, z), metadata.num_warps * lanes, values, metadata.shared)

        return launch

    def run(
        self, kernel: Any, grid: tuple[int, int, int], group: int, values: list[tuple[str, Any]], local_bytes: int
    ) -> None:
        """Nothing: there is no card."""


class OpenClDriver(CompilingDriver):
    """Makes the processor Triton's device."""

    matrix_units = False

    def __init__(self) -> None:
        super().__init__()
        device = next(d for p in cl.get_platforms() for d in p.get_devices() if d.type & cl.device_type.CPU)
        self.context = cl.Context([device])
        self.queue = cl.CommandQueue(self.context)

    def _load(self, name: str, binary: bytes, shared: int, flags: str, device: int) -> tuple[Any, Any, int, int]:
        program = cl.Program(self.context, _for_processor(binary)).build(options=["-cl-std=CL3.0"])
        return program, cl.Kernel(program, name), 0, 0

    def run(
        self, kernel: Any, grid: tuple[int, int, int], group: int, values: list[tuple[str, Any]], local_bytes: int
    ) -> None:
        local = [cl.LocalMemory(local_bytes)] if local_bytes else []
        kernel.set_args(*(_value(kind, value) for kind, value in values), *local)
        cl.enqueue_nd_range_kernel(self.queue, kernel, (grid[0] * group, *grid[1:]), (group, 1, 1))
        self.queue.finish()


class _Hashable(dict):
    """An architecture that the compiler's caches can have as a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(map(str, self.items())))


def _flat(values: tuple[Any, ...]) -> list[Any]:
    """Tuples of arguments are arguments one by one for the device."""
    return [v for value in values for v in (_flat(value) if isinstance(value, tuple) else [value])]


def _value(kind: str, value: Any) -> Any:
    if not kind.startswith("*"):
        return _SCALARS[kind](value)
    memory = (ctypes.c_uint8 * max(1, value.untyped_storage().nbytes())).from_address(value.data_ptr())
    return cl.SVM(np.ctypeslib.as_array(memory))


def _for_processor(binary: bytes) -> bytes:
    words = np.frombuffer(binary, np.uint32)
    kept, at = list(words[:5]), 5
    while at < len(words):
        count, code = int(words[at]) >> 16, int(words[at]) & 0xFFFF
        instruction = words[at : at + count]
        at += count
        if code == _CAPABILITY and instruction[1] == _KERNEL_ATTRIBUTES:
            continue
        if code == _EXECUTION_MODE and instruction[2] in _ATTRIBUTE_MODES:
            continue
        if code == _EXTENSION and b"kernel_attributes" in instruction[1:].tobytes():
            continue
        kept += list(instruction)
    return np.array(kept, np.uint32).tobytes()
