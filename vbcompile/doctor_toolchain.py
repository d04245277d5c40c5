"""Whether the compilers behind the generated code work: Triton for a device, a C++ compiler for the CPU."""

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from vbcompile.device import Target
from vbcompile.doctor_findings import ToolCheck

log = logging.getLogger(__name__)

_CPP_PROGRAM = '#include <Python.h>\n#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'
_COMPILE_SECONDS = 120
_MESSAGE_LINES = 3  # the assembler's own complaint comes third in Triton's message
_INSTALL_CXX = "install a C++ compiler (Debian: apt-get install g++; Fedora: dnf install gcc-c++) or let CXX name one"
_INSTALL_HEADERS = "install Python's headers (Debian: apt-get install python3-dev; Fedora: dnf install python3-devel)"
_INSTALL_TRITON = {
    "nvidia": "pip install triton (in the version that `pip show torch` requires)",
    "amd": "reinstall PyTorch's ROCm build, which brings its Triton",
    "intel": "pip install pytorch-triton-xpu --index-url https://download.pytorch.org/whl/xpu",
}


def check_triton(target: Target) -> ToolCheck | None:
    """Compile a kernel of two lines for the target, without running it; None where Triton is not used.

    Args:
        target: A card of this machine, or one described by hand: NVIDIA and AMD need no card to compile for.
    """
    if target.vendor not in _INSTALL_TRITON:
        return None
    purpose = f"kernels for {target.name or target.arch}"
    if "triton" not in target.features:
        reason = f"Triton with a compiler for {target.vendor} is not installed"
        return ToolCheck("triton", purpose, False, reason, _INSTALL_TRITON[target.vendor])
    from vbcompile import triton_trial

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the failing assembly there
            size = triton_trial.compile_trial(target)
    except Exception as error:
        log.debug("trial compilation failed", exc_info=True)
        return ToolCheck("triton", purpose, False, _short(error), _INSTALL_TRITON[target.vendor])
    return ToolCheck("triton", purpose, True, f"compiled {size} bytes for {target.arch}")


def check_triton_launcher(target: Target) -> ToolCheck | None:
    """Let Triton build and load its launcher for the card that is present; it needs a C compiler and Python's headers.

    None where Triton is not used.
    """
    if target.vendor not in _INSTALL_TRITON or "triton" not in target.features:
        return None
    from vbcompile import triton_trial

    try:
        found = triton_trial.current_target()
    except Exception as error:
        log.debug("Triton found no driver", exc_info=True)
        fix = f"{_INSTALL_CXX}; {_INSTALL_HEADERS}"
        return ToolCheck("triton", "launching kernels", False, _short(error), fix)
    return ToolCheck("triton", "launching kernels", True, f"driver for {found}")


def check_cpp_compiler() -> ToolCheck:
    """Build a shared library with OpenMP and Python's headers, as Inductor does for CPU graphs."""
    purpose = "Inductor on the CPU"
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "cl" if os.name == "nt" else "g++")
    path = shutil.which(name)
    if path is None:
        return ToolCheck("c++", purpose, False, f"{name} is not on PATH", _INSTALL_CXX)
    if not sys.platform.startswith("linux"):
        return ToolCheck("c++", purpose, True, path)
    with tempfile.TemporaryDirectory() as folder:
        failure = _build_library(path, Path(folder))
    if failure is None:
        return ToolCheck("c++", purpose, True, path)
    return ToolCheck("c++", purpose, False, failure, _INSTALL_HEADERS if "Python.h" in failure else _INSTALL_CXX)


def _build_library(compiler: str, folder: Path) -> str | None:
    """Why the compiler fails, or None."""
    source = folder / "trial.cpp"
    source.write_text(_CPP_PROGRAM)
    include = f"-I{sysconfig.get_path('include')}"
    command = [compiler, "-shared", "-fPIC", "-fopenmp", include, str(source), "-o", str(folder / "trial.so")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _short(error)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return (errors or done.stderr.splitlines() or [f"{compiler} ended with {done.returncode}"])[0]


def _short(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =")]
    return f"{type(error).__name__}: {' | '.join(lines[:_MESSAGE_LINES])}" if lines else type(error).__name__
