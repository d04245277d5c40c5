"""Environments of their own for vendors' compilers, which cannot be installed beside the Triton that PyTorch brings."""

import os
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(name: str, *installs: Sequence[str]) -> Path:
    """``build/vendors/NAME``, made where it is missing: a virtual environment in which packages come before this one's.

    Args:
        installs: arguments of ``pip install``, one call each.
    """
    folder = ROOT / "build" / "vendors" / name
    if (folder / "ready").exists():
        return folder
    venv.create(folder, with_pip=True, clear=True)
    for arguments in installs:
        print(f"pip install {' '.join(arguments)}", flush=True)
        subprocess.run([python(folder), "-m", "pip", "install", "--quiet", *arguments], check=True)
    (packages(folder) / "parent.pth").write_text(sysconfig.get_path("purelib"))  # PyTorch and the test's own needs
    (folder / "ready").touch()
    return folder


def python(folder: Path) -> str:
    return str(folder / "bin" / "python")


def packages(folder: Path) -> Path:
    """Where an environment's packages are."""
    return next((folder / "lib").glob("python*")) / "site-packages"


def run_inside(folder: Path, module: str, arguments: Sequence[str], **variables: str) -> int:
    """Run a module of ``tests/`` in an environment, on the kernels of this checkout; returns its exit status."""
    places = [str(ROOT / "tests"), str(ROOT)]
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ = own | {"PYTHONPATH": os.pathsep.join(places), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} | variables
    command = [python(folder), "-W", "ignore", "-m", module, *arguments]
    return subprocess.run(command, env=environ, cwd=ROOT / "tests", check=False).returncode
