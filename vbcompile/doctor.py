"""``vbcompile doctor``: what this machine has, what can run on it, and each problem with its fix."""

import difflib
import importlib
import importlib.metadata
import logging
import os
import platform
import re
from collections.abc import Callable, Sequence

from vbcompile.doctor_findings import DeviceReport, Diagnosis, KernelReport, Problem, VariableReport, VendorReport

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "safetensors")
_TORCH_VARIABLES = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "TORCH_LOGS", "TRITON_INTERPRET", "CXX", "OMP_NUM_THREADS")
_VARIABLES = (
    "VB_MODE",
    "VB_STRICT",
    "VB_HBM_BUDGET",
    "VB_IMPLEMENTATION",
    "ENABLE_VIRTUAL_BLACKWELL",
)  # all that this package reads
_REINSTALL = "reinstall PyTorch: https://pytorch.org/get-started/locally"


def diagnose() -> Diagnosis:
    """Look at versions, devices, compilers, kernels and settings; needs no accelerator and runs no kernel.

    Takes a few seconds: each compiler is tried on a program of a few lines.
    """
    found = Diagnosis(versions=_versions())
    found.problems += _requirement_problems()
    if not _torch_loads(found):
        return found
    for check in (_find_vendors, _find_devices, _try_tools, _list_kernels, _read_environment, _find_entry_point):
        _guarded(check, found)
    return found


def _guarded(check: Callable[[Diagnosis], None], found: Diagnosis) -> None:
    """A check that fails is itself a finding, and must not hide the others."""
    try:
        check(found)
    except Exception as error:
        log.debug("a check failed", exc_info=True)
        what = f"the check {check.__name__.strip('_')} failed: {type(error).__name__}: {error}"
        found.problems.append(Problem(what, "report this with the output of `vbcompile doctor --json`"))


def _versions() -> dict[str, str | None]:
    from vbcompile import __version__

    system = {"vbcompile": __version__, "python": platform.python_version(), "system": platform.platform()}
    return system | {name: _version(name) for name in _PACKAGES}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(distribution: str) -> list[str]:
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _requirement_problems() -> list[Problem]:
    """Installed packages that are older than this package's own metadata asks for."""
    problems = []
    for line in _requirements("vbcompile"):  # none where run from a checkout: the missing entry point says so
        found = re.match(r"([\w.-]+?)\s*>=\s*([\d.]+)", line)
        if found is None:
            continue
        name, least = found.groups()
        present = _version(name)
        if present is not None and _numbers(present) < _numbers(least):
            optional = "extra ==" in line
            what = f"{name} {present} is too old: vbcompile needs {least} or later"
            problems.append(Problem(what, f"pip install '{name}>={least}'", "warning" if optional else "error"))
    return problems


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``2.13.0+cpu`` is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def _torch_loads(found: Diagnosis) -> bool:
    try:
        importlib.import_module("torch")
    except Exception as error:  # noqa: BLE001 - PyTorch loads vendors' packages, which raise anything
        cause = error.__cause__ or error
        text = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
        culprit = re.search(r"backend extension: (\w+)", str(error))
        if culprit is None:
            found.problems.append(Problem(f"import torch failed: {text}", _REINSTALL))
            return False
        name = culprit.group(1)
        needs = next((line for line in _requirements(name) if re.match(r"torch\b(?!-)", line)), "no release of torch")
        pair = f"{_version(name) or 'no version known'}: it asks for {needs}, this is torch {_version('torch')}"
        fix = f"repair or uninstall {name} ({pair}), or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to start without it"
        if name == "vbcompile":  # our own start-up refuses nothing but a variable's value
            fix = "correct or unset that variable"
        found.problems.append(Problem(f"import torch failed while loading {name}: {text}", fix))
        return False
    return True


def _find_vendors(found: Diagnosis) -> None:
    """Every kind of accelerator. One that the system shows and PyTorch cannot use is an error, an absent one is not."""
    from vbcompile.device_vendors import PRIORITY, probe

    for kind in PRIORITY:
        here = probe(kind)
        if kind == "cpu":
            continue
        seen = here.platform.card_seen()
        found.vendors.append(VendorReport(kind, here.platform.label, here.state, seen, here.reason, here.fix))
        if not here.ready and (seen or here.state == "broken"):
            found.problems.append(Problem(f"{kind}: {here.reason}", here.fix))
        if here.ready:
            found.problems += _setting_problems(here.platform.settings)
    found.problems += _pair_problems()


def _setting_problems(settings: tuple[tuple[str, str], ...]) -> list[Problem]:
    return [
        Problem(f"{name}={os.environ[name]!r} keeps torch.compile from working", f"export {name}={value}")
        for name, value in settings
        if os.environ.get(name, value) != value
    ]


def _pair_problems() -> list[Problem]:
    """Packages whose release belongs to another PyTorch."""
    from vbcompile.device_vendors import PLATFORMS, fill_in, pair_problem

    problems = []
    for row in PLATFORMS:
        mismatch = pair_problem(row.distribution) if row.distribution else ""
        if mismatch:
            problems.append(Problem(mismatch, fill_in(row.install)))
    if _version("intel-extension-for-pytorch"):
        what = "intel-extension-for-pytorch is installed: its development ended, and PyTorch drives Intel GPUs itself"
        problems.append(Problem(what, "pip uninstall intel-extension-for-pytorch", "warning"))
    triton = _triton_mismatch()
    return problems + ([triton] if triton else [])


def _triton_mismatch() -> Problem | None:
    """The installed Triton, if PyTorch's metadata asks for another."""
    for line in _requirements("torch"):
        found = re.match(r"((?:pytorch-)?triton[\w-]*)\s*==\s*([\w.+]+)", line)
        if found is None:
            continue
        name, wanted = found.groups()
        present = _version(name)
        if present is not None and present.partition("+")[0] != wanted.partition("+")[0]:
            what = f"{name} {present} is installed, this PyTorch was released with {wanted}"
            return Problem(what, f"pip install {name}=={wanted}", "warning")
    return None


def _find_devices(found: Diagnosis) -> None:
    from vbcompile.device import GIB, get_target, valid_devices
    from vbcompile.device_vendors import platform_of

    for name in valid_devices():
        target = get_target(name)
        driver = _driver_of(name) or platform_of(target.device_type).driver_version()
        size = None if target.memory is None else target.memory / GIB
        facts = (target.vendor, target.arch, target.name, driver, size, target.multiprocessors)
        found.devices.append(DeviceReport(name, *facts, tuple(sorted(target.features))))


def _driver_of(device: str) -> str | None:
    """The driver's version where the card's own properties hold it (Intel)."""
    from vbcompile.device import DeviceBackend

    return getattr(DeviceBackend(device).get_device_properties(), "driver_version", None)


def _try_tools(found: Diagnosis) -> None:
    from vbcompile.device import get_target
    from vbcompile.doctor_toolchain import check_cpp_compiler, check_triton, check_triton_launcher

    best = get_target()
    checks = [check for check in (check_triton(best), check_triton_launcher(best)) if check is not None]
    found.tools = [*checks, check_cpp_compiler()]
    for tool in found.tools:
        if not tool.ok:
            limits_only = tool.tool == "c++" and best.vendor != "cpu"
            what = f"{tool.tool} ({tool.purpose}): {tool.detail}"
            found.problems.append(Problem(what, tool.fix, "warning" if limits_only else "error"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        what = "TRITON_INTERPRET=1: kernels run in Triton's interpreter, thousands of times slower"
        found.problems.append(Problem(what, "unset TRITON_INTERPRET", "warning"))


def _list_kernels(found: Diagnosis) -> None:
    found.kernels += list_kernels([report.device for report in found.devices])


def list_kernels(devices: Sequence[str] = ()) -> list[KernelReport]:
    """Which implementation of each operator can run where, once per architecture.

    Args:
        devices: devices of this machine (``cuda:0``) or architectures that it does not have (``gfx942``); none: all
            devices here.

    Raises:
        DeviceError: a name that is neither.
    """
    from vbcompile.device import get_target, valid_devices
    from vbcompile.device_catalog import catalog_target
    from vbcompile.kernels import registry

    here = valid_devices()
    names = devices or here
    targets = [get_target(n) if n in here or n.partition(":")[0] in here else catalog_target(n) for n in names]
    rows = {target.arch: registry.describe(target) for target in targets}
    return [KernelReport(arch, *row) for arch, found in rows.items() for row in found]


def _find_entry_point(found: Diagnosis) -> None:
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="vblackwell")
    found.backend_visible = bool(tuple(entries))
    if not found.backend_visible:
        what = 'torch.compile(backend="vblackwell") does not find the backend: vbcompile is not installed'
        found.problems.append(Problem(what, "pip install . in the checkout (or pip install -e .)"))


def _read_environment(found: Diagnosis) -> None:
    """Variables in force; ours are checked by the code that reads them, so that both always agree."""
    from vbcompile.device_vendors import PLATFORMS

    vendors = {name for row in PLATFORMS for name in (*row.hidden_by, *(key for key, _ in row.settings))}
    ours = {name for name in os.environ if name.startswith("VB_") or name in _VARIABLES}
    wrong = _invalid_variables(sorted(ours))
    for name in sorted(os.environ.keys() & (ours | vendors | set(_TORCH_VARIABLES))):
        found.environment.append(VariableReport(name, os.environ[name], wrong.get(name, "")))
    found.problems += [Problem(f"{name}={os.environ[name]!r}: {why}", f"unset {name}") for name, why in wrong.items()]


def _invalid_variables(names: list[str]) -> dict[str, str]:
    """Variable -> what is wrong with it; the configuration itself judges the values that it reads."""
    from vbcompile.config import parse_flag, resolve_config
    from vbcompile.config_error import ConfigError
    from vbcompile.kernels.registry import parse_forced

    wrong = {}
    for name in names:
        if name not in _VARIABLES:
            near = difflib.get_close_matches(name, _VARIABLES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            wrong[name] = f"no such setting; valid: {', '.join(_VARIABLES)}{hint}"
        try:
            resolve_config(environ={name: os.environ[name]})
            if name == "ENABLE_VIRTUAL_BLACKWELL" and os.environ[name]:
                parse_flag(name, os.environ[name])
            if name == "VB_IMPLEMENTATION":
                parse_forced(os.environ)
        except ConfigError as error:
            wrong[name] = str(error).removeprefix(f"environment variable {name}: ")
    return wrong
