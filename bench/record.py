"""Results on disk: one JSON file per benchmark, with the machine, the versions and the date of every row."""

import datetime
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Device, driver, versions and date of a measurement."""
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "vbcompile")}
    return {"date": datetime.date.today().isoformat(), "device": _device(), "driver": _driver(), **versions}


def folder() -> Path:
    """Where results go: ``$BENCH_RESULTS`` where that is set, else ``bench/results``."""
    path = Path(os.environ.get("BENCH_RESULTS") or RESULTS)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``rows`` and the environment to ``<name>.json``."""
    path = folder() / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        import vbcompile

        return vbcompile.__version__ if distribution == "vbcompile" else "absent"


def _device() -> str:
    from vbcompile.device import get_device, get_target

    return get_target(get_device()).name


def _driver() -> str:
    if not torch.cuda.is_available():
        return "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
