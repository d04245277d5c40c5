"""Which targets our Triton kernels run on."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from vbcompile.device import Target

_TYPICAL_MULTIPROCESSORS = 132  # of an H100
_OLDEST_NVIDIA = (8, 0)  # asynchronous copies and bfloat16 products
_NOT_ASCEND = (  # tests/vendors/triton_ascend asks the compilers
    "Ascend's Triton (triton-ascend 3.2.0) compiles none of our kernels: it knows no tuples of arguments, which "
    "attention's take, and FP4's fail in its compiler or do not fit the on-chip memory"
)


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``), as tests without an accelerator do."""
    if "triton" not in sys.modules and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return False  # spares the import
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def multiprocessor_count(target: Target) -> int:
    """How many there are to share work among; of a device that does not tell, a typical number."""
    return target.multiprocessors or _TYPICAL_MULTIPROCESSORS


def refuses_triton(target: Target) -> str | None:
    """Why no Triton kernel of ours runs on a target, or None."""
    if target.vendor == "cpu" and interpreted():
        return None
    if target.vendor == "huawei":
        return _NOT_ASCEND
    if target.vendor not in ("nvidia", "amd", "intel"):
        return f"no Triton for {target.vendor}"
    if "triton" not in target.features:
        return "Triton is not installed with a compiler for this device"
    capability = target.compute_capability
    if capability is not None and capability < _OLDEST_NVIDIA:
        return f"needs sm_80 or later, this is {target.arch}"
    return None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one, on which Triton launches kernels, where it is not."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu" and device.index != torch.xpu.current_device():
        return torch.xpu.device(device)
    return nullcontext()
