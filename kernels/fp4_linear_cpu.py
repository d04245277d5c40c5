"""The FP4 linear layer on CPUs: C++ with vector instructions, compiled at the first use and kept in a cache folder.

The compiler runs once a source, PyTorch release, set of flags and user; its result lives under
``$XDG_CACHE_HOME/vbcompile`` (``~/.cache/vbcompile``). Without a compiler the reference runs and the refusal says why.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vbcompile.cache_folder import cache_folder
from vbcompile.device import Target
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_linear import Fp4LinearCase
from vbcompile.kernels.registry import Implementation, operator

log = logging.getLogger(__name__)
MOST_ROWS = 64  # of x; beyond, decoding once and PyTorch's product is faster
_SOURCES = ("fp4_linear_cpu.cpp", "fp4_linear_cpu_avx512.h")
_THREADS = ("-fopenmp",)  # without it PyTorch's parallel loops run on one thread
_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # their numbers in the C++ source


class Unavailable(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def compile_flags() -> tuple[str, ...]:
    """Compiler flags for this processor."""
    return ("-O3", "-std=c++20", *_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))


def _no_compiler() -> str | None:
    compiler = os.environ.get("CXX", "c++")
    found = shutil.which(compiler) and shutil.which("ninja")
    return None if found else f"needs a C++ compiler ({compiler!r} or what CXX names) and ninja"


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        Unavailable: no compiler, no build tool, or the compiler failed.
    """
    sources = {name: (resources.files("vbcompile.kernels") / name).read_text() for name in _SOURCES}
    if reason := _no_compiler():
        raise Unavailable(reason)
    compiler = os.environ.get("CXX", "c++")
    flags = compile_flags()
    parts = (*sources.values(), torch.__version__, compiler, *flags, *_THREADS)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache_folder() / f"fp4_linear_cpu_{key}"
    try:
        path = _build(sources, folder, key, flags)
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, RuntimeError) as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise Unavailable(f"compiling it in {folder} failed: {last}") from error


def _build(sources: dict[str, str], folder: Path, key: str, flags: tuple[str, ...]) -> Path:
    name = f"vblackwell_fp4_{key}"
    path = folder / f"{name}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"build_{os.getpid()}"
    own.mkdir(exist_ok=True)
    try:
        for file, text in sources.items():
            (own / file).write_text(text)
        log.info("compiling the FP4 kernels for this CPU into %s", folder)
        try:
            built = _compile(name, own, flags, _THREADS)
        except RuntimeError as error:  # Apple's compiler has no OpenMP
            log.info("not with OpenMP, so on one thread: %s", str(error).strip().splitlines()[-1:])
            built = _compile(name, own, flags, ())
        os.replace(built, path)  # in one step: other processes see all of it or nothing
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return path


def _compile(name: str, folder: Path, flags: tuple[str, ...], threads: tuple[str, ...]) -> Path:
    from torch.utils.cpp_extension import load

    built = load(
        name, [str(folder / _SOURCES[0])], extra_cflags=[*flags, *threads], extra_ldflags=[*threads],
        build_directory=str(folder), is_python_module=False,
    )  # fmt: skip
    return Path(built) if isinstance(built, str) else folder / f"{name}.so"


def _declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kernels.vblackwell_fp4_product.argtypes = [pointer] * 7 + [size] * 6
    kernels.vblackwell_fp4_product.restype = None
    kernels.vblackwell_fp4_dequantize.argtypes = [pointer] * 5 + [size] * 5
    kernels.vblackwell_fp4_dequantize.restype = None
    return kernels


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run here; compiles them. A compilation that fails is said in one warning."""
    try:
        library()
    except Unavailable as error:
        if error.__cause__ is not None:
            log.warning("FP4 weights keep their precision on this processor: %s", error)
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------------------- launches
@functools.cache
def _scale_values(format_name: str) -> Tensor:
    return torch.tensor(fp4_format(format_name).scale_values, dtype=torch.float32)


def product(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """``x [..., k] @ weight.T + bias`` for a few rows, summed in float32; the weight in the plain layout."""
    rows, n = x.reshape(-1, k).contiguous(), row_scale.shape[0]
    out = torch.empty(rows.shape[0], n, dtype=x.dtype)
    added = None if bias is None else bias.to(x.dtype).contiguous()
    codes, block_scales, row_scale = codes.contiguous(), block_scales.contiguous(), row_scale.contiguous()
    library().vblackwell_fp4_product(
        rows.data_ptr(), codes.data_ptr(), block_scales.data_ptr(), row_scale.data_ptr(),
        _scale_values(format_name).data_ptr(), None if added is None else added.data_ptr(), out.data_ptr(),
        _DTYPES.index(x.dtype), rows.shape[0], n, k, codes.shape[1] * 2, fp4_format(format_name).block_size,
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def dequantize(
    codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, dtype: torch.dtype
) -> Tensor:
    """The weight ``[n, k]`` from the plain layout: float32 correctly rounded, 16-bit types that rounded again."""
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    out = torch.empty(row_scale.shape[0], k, dtype=stored)
    codes, block_scales, row_scale = codes.contiguous(), block_scales.contiguous(), row_scale.contiguous()
    library().vblackwell_fp4_dequantize(
        codes.data_ptr(), block_scales.data_ptr(), row_scale.data_ptr(), _scale_values(format_name).data_ptr(),
        out.data_ptr(), row_scale.shape[0], k, codes.shape[1] * 2, fp4_format(format_name).block_size,
        stored == torch.bfloat16,
    )  # fmt: skip
    return out.to(dtype)


def dequantize_product(
    x: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, format_name: str,
    layout: str,
) -> Tensor:  # fmt: skip
    """Decode the weight once, then PyTorch's product."""
    weight = dequantize(codes, block_scales, row_scale, k, format_name, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def dequantize_backward(
    grad: Tensor, codes: Tensor, block_scales: Tensor, row_scale: Tensor, k: int, format_name: str, layout: str
) -> Tensor:
    """Decode the weight once, then ``grad @ weight``."""
    return grad @ dequantize(codes, block_scales, row_scale, k, format_name, grad.dtype)


# ------------------------------------------------------------------------------------------------------ implementations
# Milliseconds for 4096 x 4096 on one core with AVX-512 (and AMX, which PyTorch uses for bfloat16); costs are in units
# of PyTorch's product of the same shape, so only the ratios matter.
_WEIGHT, _ROW = 0.5, 0.45  # our product: decoding, and each row of x
_DECODE = {torch.bfloat16: 40.0, torch.float32: 80.0, torch.float16: 100.0}
_DENSE = {torch.bfloat16: (2.7, 0.1), torch.float32: (6.5, 1.6), torch.float16: (6.5, 1.6)}  # floor, and one row


def _dense(case: Fp4LinearCase) -> float:
    floor, row = _DENSE[case.dtype]
    return max(floor, row * case.m)


def _product_cost(target: Target, case: Fp4LinearCase) -> float:
    return (_WEIGHT + _ROW * case.m) / _dense(case)


def _dequantize_cost(target: Target, case: Fp4LinearCase) -> float:
    return (_DECODE[case.dtype] + _dense(case)) / _dense(case)


def _refuses(target: Target, case: Fp4LinearCase | None) -> str | None:
    if target.vendor != "cpu":
        return "runs on CPUs"
    if case is None:
        return _no_compiler()
    if case.layout != "plain":
        return f"takes the plain layout, not {case.layout}"
    if case.dtype not in _DTYPES:
        return f"no kernel for {case.dtype}"
    return unavailable()


def _refuses_product(target: Target, case: Fp4LinearCase | None) -> str | None:
    if case is not None and not 0 < case.m <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} rows, not {case.m}"
    return _refuses(target, case)


operator("fp4_linear").register(Implementation("cpu", product, _refuses_product, _product_cost))
operator("fp4_linear").register(Implementation("cpu_dequantize", dequantize_product, _refuses, _dequantize_cost))
operator("fp4_linear_backward").register(
    Implementation("cpu_dequantize", dequantize_backward, _refuses, _dequantize_cost)
)
