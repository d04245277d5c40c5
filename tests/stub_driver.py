"""NVIDIA's driver as a stub, so that Triton's own launchers run without a device and what they pass on can be read.

Kernels are compiled for sm_90 as always; a launch writes its grid, stream and parameters to a log and runs nothing.
Pointers of CPU tensors pass as the device's.
"""

import contextlib
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from vbcompile.kernels import launches, replay

_SOURCE = r"""
#include <cuda.h>
#include <string.h>
#include <stdlib.h>
#define DONE { return CUDA_SUCCESS; }
static int sizes[256], count, launches; static unsigned char log_[1 << 20]; static long used;
static void note(const void *p, long n) { if (used + n <= (1 << 20)) { memcpy(log_ + used, p, n); used += n; } }
void stub_sizes(const int *given, int n) { memcpy(sizes, given, n * sizeof(int)); count = n; }
int stub_launches(void) { return launches; }
long stub_take(unsigned char *out) { long n = used; if (out) { memcpy(out, log_, n); used = 0; } return n; }
CUresult cuInit(unsigned f) DONE
CUresult cuDeviceGet(CUdevice *d, int n) { *d = n; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)8; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)8; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) DONE
CUresult cuCtxSetLimit(CUlimit l, size_t v) DONE
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *i) { *m = (CUmodule)16; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) {
  static size_t next = 32; *f = (CUfunction)next; next += 8; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) DONE
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) DONE
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "stub"; return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
  *(CUdeviceptr *)v = p; return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(CUtensorMap *m, CUtensorMapDataType t, cuuint32_t rank, void *address,
    const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
    CUtensorMapInterleave i, CUtensorMapSwizzle s, CUtensorMapL2promotion l, CUtensorMapFloatOOBfill f) {
  unsigned char *p = (unsigned char *)m; int head[4] = {(int)t, (int)rank, (int)s, (int)f};
  memset(m, 0, sizeof *m); memcpy(p, head, 16); memcpy(p + 16, &address, 8);
  memcpy(p + 24, shape, 8 * rank); memcpy(p + 64, strides, 8 * (rank - 1)); memcpy(p + 100, box, 4 * rank);
  return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **extra) {
  launches++;
  if (!count) return CUDA_SUCCESS;
  note(&f, 8); note(&c->gridDimX, 28); note(&c->hStream, 8); note(&c->numAttrs, 4);
  for (int n = 0; n < count; n++) note(p[n], sizes[n]);
  return CUDA_SUCCESS; }
"""
_loaded: list["Stub"] = []  # the first that a process loads stays
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "nvTmaDesc": 128}


class Stub:
    """The stub, loaded."""

    def __init__(self) -> None:
        from triton.backends.nvidia import driver

        self._folder = tempfile.TemporaryDirectory()
        self.folder = folder = Path(self._folder.name)
        source, library = folder / "stub.c", folder / "libcuda.so.1"
        source.write_text(_SOURCE)
        include = os.path.join(os.path.dirname(driver.__file__), "include")
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", library, source],
            check=True,
        )
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_take.restype = ctypes.c_long

    @property
    def launches(self) -> int:
        """How many kernels were launched."""
        return self._library.stub_launches()

    def read_parameters(self, signature: dict[str, object]) -> None:
        """From now on note parameters of a kernel of this signature."""
        sizes = [size for kind in signature.values() for size in _sizes(kind)]
        self._library.stub_sizes((ctypes.c_int * len(sizes))(*sizes), len(sizes))

    def ignore_parameters(self) -> None:
        self._library.stub_sizes(None, 0)

    def taken(self) -> bytes:
        """What was noted since the last time."""
        buffer = ctypes.create_string_buffer(1 << 20)
        return buffer.raw[: self._library.stub_take(buffer)]


def _sizes(kind: object) -> list[int]:
    if isinstance(kind, tuple):
        return [size for part in kind for size in _sizes(part)]
    if kind == "constexpr":
        return []
    assert isinstance(kind, str)
    if kind.startswith("tensordesc"):
        rank = kind.split("[")[1].split("]")[0].count(",") + 1
        return [128, *[4] * rank, *[8] * rank]
    return [8 if kind.startswith("*") else _BYTES[kind]]


@contextlib.contextmanager
def stub_driver(monkeypatch) -> Iterator[Stub]:
    """Within it Triton compiles for sm_90 and launches into the stub, and launches of CPU tensors are repeated."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    if not _loaded:
        _loaded.append(Stub())
    (stub,) = _loaded
    monkeypatch.setattr(knobs.nvidia, "libcuda_path", str(stub.folder))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(stub.folder / "cache"))  # launchers that are linked with the stub

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    monkeypatch.setattr(replay, "takes", lambda device: True)
    replay.forget()
    before = driver._active
    driver.set_active(Driver())
    try:
        yield stub
    finally:
        driver._active = before
        replay.forget()


def compare_repeats(stub: Stub, monkeypatch) -> list[int]:
    """Every repeated launch is done in both ways; the one number of the result counts them."""
    count = [0]
    by_launcher, by_code = launches.Repeated.run, launches.Repeated.written

    def begin(self):
        stub.read_parameters(self._compiled.compiled.src.signature)

    def end(self, tensors, addresses, stream):
        direct = stub.taken()
        with monkeypatch.context() as patch:
            patch.setattr(self, "_compiled", None)
            by_launcher(self, tensors, addresses, stream)
        assert direct == stub.taken() != b""
        stub.ignore_parameters()
        count[0] += 1

    def run(self, tensors, addresses, stream):
        begin(self)
        by_launcher(self, tensors, addresses, stream)
        end(self, tensors, addresses, stream)

    def written(self, constant):
        roots = {place.root for place in self.places}
        tensors, addresses = (f"{{{', '.join(f'{n}: {kind}{n}' for n in roots)}}}" for kind in "ta")
        before, after = f"{constant(begin)}({constant(self)})", f"{constant(end)}({constant(self)}"
        return f"{before}; {by_code(self, constant)}; {after}, {tensors}, {addresses}, stream)"

    monkeypatch.setattr(launches.Repeated, "run", run)
    monkeypatch.setattr(launches.Repeated, "written", written)
    monkeypatch.setattr(replay, "together", lambda steps, results: steps)  # for Triton's own, which wants tensors
    return count
