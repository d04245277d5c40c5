"""Devices ``hpu`` and ``xpu`` of two cards: Python's operators over a guard of some lines of C++, built once."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vendors.python_device import PythonDevice, attention_by_parts


class GuardedDevice(PythonDevice):
    """A device whose name PyTorch has built in. The first use takes a C++ compiler and half a minute."""

    def __init__(self, vendor: str, count: int = 2, arch: str = "") -> None:
        key = {"habana": "HPU", "intel": "XPU"}[vendor]
        super().__init__(vendor, key, count, arch)

    @functools.cached_property
    def extension(self) -> Any:
        from torch.utils.cpp_extension import load

        source = Path(__file__).parent / "guard.cpp"
        return load(f"vbcompile_test_guard_{self.name}", [str(source)], extra_cflags=[f"-DKIND={self.key}", "-O0"])

    def make(self, size: list[int], strides: list[int], dtype: torch.dtype, index: int, nbytes: int) -> Tensor:
        return self.extension.make(size, strides, dtype, index, nbytes)

    def register(self, module: Any) -> None:
        _ = self.extension  # the guard must be there before autograd starts its threads
        if self.name == "xpu":  # PyTorch's own module, as a build with XPU would have it
            torch.version.xpu = "20250000"
            for name, function in vars(module).items():
                setattr(torch.xpu, name, function)
        else:
            super().register(module)

    def install(self) -> None:
        super().install()
        attention = torch.library.Library("aten", "IMPL")
        self.libraries.append(attention)
        for key in (self.key, f"Autograd{self.key}"):
            attention.impl("scaled_dot_product_attention", attention_by_parts, key)

    def install_autocast(self) -> None:
        if self.name != "xpu":  # PyTorch has Intel's built in
            super().install_autocast()
