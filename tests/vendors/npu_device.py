"""An ``npu`` device of two cards in Python alone: PyTorch's PrivateUse1 key under that name, over host memory.

Tensors are real (storage, strides, device index); they come out of DLPack capsules that own a block of host memory.
PyTorch's guard for such devices knows one card only, so autograd does not work on the second.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from vendors.python_device import PythonDevice

_EXTENSION = 12  # DLPack's number for devices that it does not list
_ALIGNMENT = 64
_CODES = {  # DLPack's (code, bits, lanes)
    torch.bool: (6, 8, 1),
    torch.uint8: (1, 8, 1),
    torch.int8: (0, 8, 1),
    torch.int16: (0, 16, 1),
    torch.int32: (0, 32, 1),
    torch.int64: (0, 64, 1),
    torch.float16: (2, 16, 1),
    torch.bfloat16: (4, 16, 1),
    torch.float32: (2, 32, 1),
    torch.float64: (2, 64, 1),
    torch.float8_e4m3fn: (10, 8, 1),
}


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Npu(PythonDevice):
    """The device ``npu``."""

    def __init__(self, count: int = 2, arch: str = "") -> None:
        super().__init__("huawei", "PrivateUse1", count, arch)

    def register(self, module: Any) -> None:
        _setup_privateuseone_for_python_backend(self.name, backend_module=module)

    def make(self, size: list[int], strides: list[int], dtype: torch.dtype, index: int, nbytes: int) -> Tensor:
        return torch._C._from_dlpack(self._block(size, strides, dtype, index, nbytes))

    def _block(self, size: list[int], strides: list[int], dtype: torch.dtype, index: int, nbytes: int) -> Any:
        """A capsule over one block of memory: description, sizes and strides, then the elements."""
        rank, header = len(size), ctypes.sizeof(_Managed)
        block = _libc.malloc(header + 16 * rank + nbytes + _ALIGNMENT)
        numbers = (ctypes.c_int64 * (2 * rank)).from_address(block + header)
        numbers[:] = size + strides
        managed = _Managed.from_address(block)
        managed.data = -(-(block + header + 16 * rank) // _ALIGNMENT) * _ALIGNMENT
        managed.device, managed.dtype = _Device(_EXTENSION, index), _Type(*_CODES[dtype])
        managed.ndim, managed.byte_offset, managed.context = rank, 0, None
        managed.shape, managed.strides = block + header, block + header + 8 * rank
        managed.deleter = _FREE  # the description is the head of the block
        return _capsule(block, b"dltensor", None)
