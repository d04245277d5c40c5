"""The session of an Ascend user on the real torch-npu wheel, without hardware.

    python -m vendors.software_ascend [--site FOLDER] [--soc Ascend910B1]        (from the folder tests/)

``--site`` is a folder that the wheel for the installed PyTorch is unpacked in; without it pip fetches the wheel (45 MB,
without its dependencies) into a temporary folder. Needs gcc and nm; takes about a minute.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from vendors.software_ascend import build

_INSIDE = "VB_SOFT_NPU_INSIDE"


def fetch() -> Path:
    """The unpacked wheel for this PyTorch."""
    release = torch.__version__.partition("+")[0]
    folder = Path(tempfile.gettempdir()) / f"torch_npu_{release}"
    site = folder / "site"
    if not site.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
        subprocess.run([*command, f"torch-npu=={release}"], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(site)
    return site


def inside() -> list[str]:
    """In the process that the stand-ins are loaded into."""
    import torch_npu

    from vendors import ascend
    from vendors.session import problems, session
    from vendors.software_ascend.device import SoftNpu

    npu = SoftNpu()
    npu.install()
    calls = npu.override(ascend.kernels(torch_npu.__version__))
    answers = session("npu", calls)
    found = problems("npu", answers) + forms()
    package = f"torch-npu {torch_npu.__version__} as {torch.npu.get_device_name(0)}"
    accepted = ", ".join(f"{name} {count}" for name, count in sorted(npu.checked.items()))
    print(json.dumps(answers, default=str) if found else f"{package}: all right; calls that it accepted: {accepted}")
    return found


def forms() -> list[str]:
    """Every form of attention through the vendor's dispatcher and shape functions, by the 2x rule."""
    from attention_forms import make_forms

    from vendors.trial import results

    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        for queries in (11, 37):
            for name, form in make_forms(queries, 53, 16, 16).items():
                if form.dropout_p:
                    continue  # the device's own numbers
                rows = results(form, dtype, all_gradients=False, device="npu")
                wrong += [f"{name} {dtype}: {row}" for row in rows if not row[1] <= row[2]]
    return wrong


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--soc", default="Ascend950PR_9589")
    options = parser.parse_args(arguments)
    if os.environ.get(_INSIDE):
        found = inside()
        print("\n".join(found))
        return 1 if found else 0
    site = (options.site or fetch()).resolve()
    stubs = build(
        site, Path(torch.__file__).parent / "lib", Path(tempfile.gettempdir()) / f"soft_cann_{site.parent.name}"
    )
    tests = Path(__file__).parents[2]
    environment = os.environ | {
        _INSIDE: "1",
        "LD_LIBRARY_PATH": str(stubs),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # the package is imported below, after our own arguments are read
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), str(site)]),
        "VB_SOFT_NPU_SOC": options.soc,
        "VB_SOFT_NPU_COUNT": "2",
    }
    return subprocess.run([sys.executable, "-m", "vendors.software_ascend"], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
