"""Which accelerators exist, which package brings each, and whether it can be used here.

One row of :data:`PLATFORMS` per vendor holds all that differs between them; everything else in the device part reads
that table. A vendor's package is imported only when its row is first asked about, and the answer is kept.
"""

import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vbcompile.device_host import HostModule

log = logging.getLogger(__name__)

PRIORITY = ("cuda", "hpu", "npu", "xpu", "cpu")
"""Torch device types in the order in which :func:`vbcompile.get_device` tries them."""

State = Literal["ready", "missing", "broken", "no device"]


class DeviceError(RuntimeError):
    """A device that does not exist or cannot be used. The message names the valid devices or the exact repair."""


@dataclass(frozen=True)
class Platform:
    """What is particular to one vendor.

    Attributes:
        vendor: ``nvidia``, ``amd``, ``habana``, ``huawei``, ``intel`` or ``cpu``.
        device_type: PyTorch's device string; AMD cards present themselves as ``cuda``.
        label: The product line, for messages.
        build: Name in ``torch.version`` that is set when PyTorch itself was built for the vendor; empty if a
            package adds it.
        module: Module whose import adds ``torch.<device_type>``; empty if PyTorch has it.
        distribution: Name of that package for ``pip``.
        install: Fix when the build or the package is missing. ``{minor}`` stands for PyTorch's own ``X.Y``.
        repair: Fix when it is there and finds no card or fails to load.
        cards: Device nodes that show a card known to the operating system, as glob patterns.
        hidden_by: Environment variables that can hide cards from a process.
        driver: Files that hold the driver's version, each with the pattern that extracts it.
        settings: Environment variables whose value, where set, must be the one given.
        reserved_is_limit: Whether ``memory_reserved`` gives the card's size, not the allocator's pool.
    """

    vendor: str
    device_type: str
    label: str
    build: str = ""
    module: str = ""
    distribution: str = ""
    install: str = ""
    repair: str = ""
    cards: tuple[str, ...] = ()
    hidden_by: tuple[str, ...] = ()
    driver: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    reserved_is_limit: bool = False

    def card_seen(self) -> bool:
        """Whether the operating system shows a card of this vendor, usable or not."""
        return any(glob.glob(pattern) for pattern in self.cards)

    def driver_version(self) -> str | None:
        """The installed driver's version, or None where the system does not tell."""
        for pattern, expression in self.driver:
            for path in sorted(glob.glob(pattern)):
                try:
                    found = re.search(expression, Path(path).read_text(errors="replace"))
                except OSError:
                    continue
                if found:
                    return found.group(1)
        return None


PLATFORMS = (
    Platform(
        "nvidia",
        "cuda",
        "NVIDIA GPU",
        build="cuda",
        install="pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
        repair="install or update the NVIDIA driver until `nvidia-smi` lists the card (in a container: start it with "
        "--gpus all)",
        cards=("/dev/nvidia[0-9]*",),
        hidden_by=("CUDA_VISIBLE_DEVICES",),
        driver=(("/proc/driver/nvidia/version", r"NVRM.*?\s(\d+\.[\d.]+)\s"),),
    ),
    Platform(
        "amd",
        "cuda",
        "AMD GPU (ROCm)",
        build="hip",
        install="install PyTorch's ROCm build: choose ROCm on https://pytorch.org/get-started/locally",
        repair="install the amdgpu driver until `rocminfo` lists the card, and add the user to the groups `render` and "
        "`video` (in a container: --device /dev/kfd --device /dev/dri)",
        cards=("/dev/kfd",),
        hidden_by=("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        driver=(("/sys/module/amdgpu/version", r"(\S+)"),),
    ),
    Platform(
        "habana",
        "hpu",
        "Intel Gaudi",
        module="habana_frameworks.torch",
        distribution="habana-torch-plugin",
        install="install habana-torch-plugin with Intel Gaudi's installer (habanalabs-installer.sh install --type "
        "pytorch): it is not on PyPI, and brings the PyTorch build that it belongs to",
        repair="use the habana-torch-plugin, PyTorch and driver of one Gaudi release, and check that `hl-smi` lists "
        "the card",
        cards=("/dev/accel/accel_controlD[0-9]*", "/dev/hl[0-9]*"),
        hidden_by=("HABANA_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES"),
        driver=(
            ("/sys/class/accel/accel*/device/driver_ver", r"(\S+)"),
            ("/sys/class/habanalabs/hl*/driver_ver", r"(\S+)"),
        ),
        settings=(("PT_HPU_LAZY_MODE", "0"),),
        reserved_is_limit=True,
    ),
    Platform(
        "huawei",
        "npu",
        "Huawei Ascend",
        module="torch_npu",
        distribution="torch-npu",
        install="pip install 'torch-npu=={minor}.*' (the release of the installed PyTorch), with the CANN toolkit and "
        "driver",
        repair="install the CANN toolkit, run `source /usr/local/Ascend/ascend-toolkit/set_env.sh`, keep torch-npu at "
        "{minor}.* and check that `npu-smi info` lists the card",
        cards=("/dev/davinci[0-9]*",),
        hidden_by=("ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES"),
        driver=(("/usr/local/Ascend/driver/version.info", r"(?m)^[Vv]ersion\s*=\s*(\S+)"),),
    ),
    Platform(
        "intel",
        "xpu",
        "Intel GPU",
        build="xpu",
        install="pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/xpu",
        repair="install Intel's GPU driver with the Level Zero loader, and add the user to the group `render`",
        hidden_by=("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR"),
    ),
    Platform("cpu", "cpu", "CPU"),
)


@dataclass(frozen=True)
class Availability:
    """Whether one device type can be used, and if not, why and what repairs it.

    Attributes:
        platform: The vendor's row.
        state: ``ready``; ``missing`` (package or build absent); ``broken`` (package fails to load); ``no device``.
        module: The module with the vendor's functions (``torch.cuda``, ``torch.npu``, ...); None if absent.
        count: Number of usable cards.
        reason: Why it is not ready; empty if it is.
        fix: What to do about it; empty if ready.
    """

    platform: Platform
    state: State
    module: Any = None
    count: int = 0
    reason: str = ""
    fix: str = ""

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def refusal(self) -> str:
        """Reason and fix in one sentence each; empty if ready."""
        return "" if self.ready else f"{self.platform.device_type}: {self.reason}. Fix: {self.fix}"


@functools.cache
def probe(device_type: str) -> Availability:
    """Say whether the device type can be used; the answer is kept until :func:`forget_devices`.

    Args:
        device_type: One of :data:`PRIORITY`.
    """
    platform = platform_of(device_type)
    if device_type == "cpu":
        return Availability(platform, "ready", HostModule(), 1)
    return _load_problem(platform) or _count_cards(platform)


def forget_devices() -> None:
    """Drop what is known about devices, so that the next question probes again (after a driver was repaired)."""
    probe.cache_clear()


def platform_of(device_type: str) -> Platform:
    """The vendor row behind a device type; for ``cuda``, AMD's in a ROCm build or if only its card is seen."""
    rows = [row for row in PLATFORMS if row.device_type == device_type]
    built = [row for row in rows if row.build and _built_for(row)]
    seen = [row for row in rows if row.card_seen()] if len(rows) > 1 else []
    return (built or seen or rows)[0]


def fill_in(fix: str) -> str:
    """Put the installed PyTorch's ``X.Y`` into a fix."""
    return fix.replace("{minor}", ".".join(torch.__version__.split(".")[:2]))


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_version(device_type: str) -> str | None:
    """Release of the package that brings a device type; read from its module where it is not a distribution."""
    platform = platform_of(device_type)
    return installed_version(platform.distribution) or getattr(sys.modules.get(platform.module), "__version__", None)


def package_of(device_type: str) -> str:
    """The package that brings a device type, with the release found: ``torch-npu 2.13.0``; PyTorch for its own."""
    package = platform_of(device_type).distribution
    if not package:
        return f"torch {torch.__version__}"
    return f"{package} {package_version(device_type) or '(no version known)'}"


def pair_problem(distribution: str) -> str:
    """Why an installed package does not belong to the installed PyTorch, by its own requirement; empty if it does."""
    try:
        requirements = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    pins = [found.group(1) for line in requirements if (found := re.match(r"torch\s*\(?==\s*([\d.]*\d)", line))]
    wrong = [pin for pin in pins if torch.__version__.split("+")[0].split(".")[: pin.count(".") + 1] != pin.split(".")]
    if not wrong:
        return ""
    return f"{distribution} {installed_version(distribution)} needs torch {wrong[0]}, this is torch {torch.__version__}"


def first_line(error: BaseException) -> str:
    """``Type: first line of the message``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _built_for(platform: Platform) -> bool:
    return bool(getattr(torch.version, platform.build, None))


def _load_problem(platform: Platform) -> Availability | None:
    """Make ``torch.<device_type>`` exist, or say why it cannot."""
    if platform.build:
        if _built_for(platform):
            return None
        rows = [row for row in PLATFORMS if row.device_type == platform.device_type]
        names = " or ".join(row.label for row in rows)
        fixes = rows if not platform.card_seen() else [platform]
        fix = "; ".join(f"for {row.label}: {fill_in(row.install)}" for row in fixes)
        reason = f"this PyTorch ({torch.__version__}) is built without support for {names}"
        return Availability(platform, "missing", reason=reason, fix=fix)
    if hasattr(torch, platform.device_type):  # loaded by PyTorch's own start-up, or by the user
        _warn_of_pair(platform)
        return None
    if not is_installed(platform.module):
        reason = f"the package {platform.distribution} is not installed"
        return Availability(platform, "missing", reason=reason, fix=fill_in(platform.install))
    try:
        importlib.import_module(platform.module)
    except Exception as error:  # noqa: BLE001 - vendors' packages raise anything at import; it is reported, not dropped
        if mismatch := pair_problem(platform.distribution):
            return Availability(platform, "broken", reason=mismatch, fix=fill_in(platform.install))
        found, why = package_of(platform.device_type), first_line(error)
        reason = f"{found} is installed, and importing {platform.module} failed with {why}"
        return Availability(platform, "broken", reason=reason, fix=fill_in(platform.repair))
    if not hasattr(torch, platform.device_type):
        found = package_of(platform.device_type)
        reason = f"{platform.module} of {found} was imported but added no torch.{platform.device_type}"
        return Availability(platform, "broken", reason=reason, fix=fill_in(platform.repair))
    _warn_of_pair(platform)
    return None


def _warn_of_pair(platform: Platform) -> None:
    """Say that a package which loads belongs to another PyTorch: what goes wrong later would not name it."""
    if problem := pair_problem(platform.distribution):
        log.warning("%s; it was loaded all the same. Fix: %s", problem, fill_in(platform.install))


def is_installed(module: str) -> bool:
    """Whether a module's top-level package can be found, without importing it."""
    package = module.partition(".")[0]
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _count_cards(platform: Platform) -> Availability:
    module = getattr(torch, platform.device_type)
    try:
        count = int(module.device_count()) if module.is_available() else 0
    except Exception as error:  # noqa: BLE001 - a driver's failure is a finding, whatever its type
        reason = f"{package_of(platform.device_type)} failed to count its cards with {first_line(error)}"
        return Availability(platform, "broken", module, reason=reason, fix=fill_in(platform.repair))
    if count > 0:
        return Availability(platform, "ready", module, count)
    return Availability(platform, "no device", module, 0, _why_no_card(platform, module), _how_to_show(platform))


def _why_no_card(platform: Platform, module: Any) -> str:
    hiding = _hiding_variables(platform)
    if hiding:
        return f"{package_of(platform.device_type)} sees no {platform.label} while {hiding}"
    try:
        module.init()  # says what the driver complains about, which is_available() keeps to itself
    except Exception as error:  # noqa: BLE001 - its message is the answer
        return f"{package_of(platform.device_type)} can use no {platform.label} ({first_line(error)})"
    return f"{package_of(platform.device_type)} found no {platform.label}"


def _how_to_show(platform: Platform) -> str:
    hiding = _hiding_variables(platform)
    return f"unset it or let it name the card ({hiding})" if hiding else fill_in(platform.repair)


def _hiding_variables(platform: Platform) -> str:
    return ", ".join(f"{name}={os.environ[name]!r}" for name in platform.hidden_by if name in os.environ)
