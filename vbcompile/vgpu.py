"""The tier model: device memory, neighbouring cards, host memory and disk as the levels of one virtual memory.

``create_vgpu_stack()`` finds the levels of this machine; ``{"levels": [...]}`` or Accelerate's ``max_memory`` say them.
The stack describes and counts. What moves between its levels is decided by :mod:`vbcompile.vgpu_planner`.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vbcompile.cache_folder import cache_folder
from vbcompile.config_error import ConfigError
from vbcompile.vgpu_config import LevelSpec, read_levels, read_max_memory
from vbcompile.vgpu_plan import Tier
from vbcompile.vgpu_size import MIB, parse_size, size_text

if TYPE_CHECKING:
    import torch

    from vbcompile.vgpu_calibration import Calibration

log = logging.getLogger(__name__)

Kind = Literal["device", "peer", "host", "disk"]

DEFAULT_GBPS: dict[Kind, float] = {"device": 600.0, "peer": 50.0, "host": 40.0, "disk": 7.0}
"""GB/s (10**9 bytes per second) assumed until measured or told."""

DEFAULT_LATENCY_NS: dict[Kind, int] = {"device": 0, "peer": 10_000, "host": 10_000, "disk": 100_000}

_HOST_SHARE = (9, 10)  # of the memory that is available: the rest is for the program itself


@dataclass
class LevelStatistics:
    """What has happened on one level since the last reset.

    ``busy_ns`` is the time that its link took for ``timed_bytes``, ``stall_ns`` the computation's waiting. Times are
    those of recorded steps (:func:`vbcompile.write_timeline`), everything else is always counted.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    transfers_in: int = 0
    transfers_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    timed_bytes: int = 0
    busy_ns: int = 0
    stall_ns: int = 0

    @property
    def gbps(self) -> float | None:
        """GB/s over the time in which its link was busy; None where no transfer was timed."""
        return self.timed_bytes / self.busy_ns if self.busy_ns else None


@dataclass
class VGPULevel:
    """One level of the stack.

    Attributes:
        number: 0 is the device that computes; larger is farther.
        kind: ``device``, ``peer`` (another card), ``host`` or ``disk``.
        device: ``cuda:0``, ``cpu``, ``ssd``, ...
        capacity: Bytes that may be used.
        read_rate: Bytes per second towards level 0 (level 0: of its own memory; disk: into host memory).
        write_rate: Bytes per second away from level 0.
        latency_ns: Time that one transfer costs beside its bytes.
        source: Where the rates come from: ``measured``, ``given`` or ``default``.
        path: Folder of a disk level.
        statistics: Counters.
    """

    number: int
    kind: Kind
    device: str
    capacity: int
    read_rate: int
    write_rate: int
    latency_ns: int
    source: Literal["measured", "given", "default"] = "default"
    path: str | None = None
    statistics: LevelStatistics = field(default_factory=LevelStatistics)

    @property
    def capacity_mb(self) -> float:
        """Capacity in units of 2**20 bytes."""
        return self.capacity / MIB

    @property
    def speed_gbps(self) -> float:
        """Rate towards the device in units of 10**9 bytes per second."""
        return self.read_rate / 1e9

    def to_dict(self) -> dict[str, Any]:
        return {
            "level": self.number,
            "kind": self.kind,
            "device": self.device,
            "capacity_mb": self.capacity_mb,
            "speed_gbps": self.speed_gbps,
            "source": self.source,
            "path": self.path,
            "statistics": asdict(self.statistics) | {"gbps": self.statistics.gbps},
        }


class VGPUStack:
    """The levels, nearest first, with their counters.

    Raises:
        ConfigError: no level; a device twice; level 0 is a disk; a disk of an accelerator without host memory before
            it, through which its bytes would pass.
    """

    def __init__(self, levels: Sequence[VGPULevel]) -> None:
        self.levels = tuple(levels)
        self.calibration: Calibration | None = None
        self._lock = threading.Lock()
        _require_consistent(self.levels)

    def __repr__(self) -> str:
        parts = (f"{lv.device} {lv.capacity_mb:.0f} MB {lv.speed_gbps:g} GB/s" for lv in self.levels)
        return f"VGPUStack({'; '.join(parts)})"

    @property
    def device(self) -> str:
        """The device that computes."""
        return self.levels[0].device

    @property
    def budget(self) -> int:
        """Bytes of device memory that may be used."""
        return self.levels[0].capacity

    def tiers(self) -> tuple[Tier, ...]:
        """The levels beyond the device as the planner takes them. A disk's bytes pass through host memory."""
        host = next((level.number for level in self.levels[1:] if level.kind == "host"), None)
        return tuple(
            Tier(
                level=level.number,
                name=level.device,
                capacity=level.capacity,
                read_rate=level.read_rate,
                write_rate=level.write_rate,
                latency_ns=level.latency_ns,
                via=host if level.kind == "disk" else None,
            )
            for level in self.levels[1:]
        )

    def calibrate(self) -> "Calibration":
        """Measure the links of this machine (under a second beside the disk) and take the results over.

        Rates that were given stay as given.

        Raises:
            DeviceError: the computing device is not here.
        """
        from vbcompile.vgpu_calibration import calibrate

        path = next((level.path for level in self.levels if level.kind == "disk"), None)
        peers = [level.device for level in self.levels if level.kind == "peer"]
        found = calibrate(self.device, path=path, peers=peers)
        for level in self.levels:
            measured = found.rates(level.kind, level.device)
            if level.source != "given" and measured is not None:
                level.read_rate, level.write_rate, latency = measured
                level.latency_ns = level.latency_ns if latency is None else latency
                level.source = "measured"
        self.calibration = found
        return found

    def record_use(self, level: int, hits: int = 0, misses: int = 0) -> None:
        """Count uses of tensors that were found on a level, or were looked for there and were not."""
        with self._lock:
            self.levels[level].statistics.hits += hits
            self.levels[level].statistics.misses += misses

    def record_transfer(self, source: int, target: int, nbytes: int, count: int = 1) -> None:
        """Count transfers between two levels."""
        with self._lock:
            origin, goal = self.levels[source].statistics, self.levels[target].statistics
            origin.transfers_out += count
            origin.bytes_out += nbytes
            goal.transfers_in += count
            goal.bytes_in += nbytes

    def record_time(self, level: int, nbytes: int, busy_ns: int, stall_ns: int = 0) -> None:
        """Count the time that a level's link took for bytes, and the computation's wait, which is level 0's."""
        with self._lock:
            link = self.levels[level].statistics
            link.timed_bytes += nbytes
            link.busy_ns += busy_ns
            self.levels[0].statistics.stall_ns += stall_ns

    def record_eviction(self, level: int, count: int = 1) -> None:
        """Count tensors whose place on a level was given to others."""
        with self._lock:
            self.levels[level].statistics.evictions += count

    def statistics(self) -> list[dict[str, Any]]:
        """Levels and their counters, ready for JSON."""
        with self._lock:
            return [level.to_dict() for level in self.levels]

    def reset_statistics(self) -> None:
        with self._lock:
            for level in self.levels:
                level.statistics = LevelStatistics()

    def to_config(self) -> dict[str, Any]:
        """The explicit configuration from which :func:`create_vgpu_stack` builds the same stack."""
        return {"levels": [_config_of(level) for level in self.levels]}

    def to_json(self) -> str:
        return json.dumps({"levels": self.statistics()})

    def with_budget(self, budget: int) -> "VGPUStack":
        """The same levels with another capacity of level 0, and fresh counters."""
        levels = [replace(level, statistics=LevelStatistics()) for level in self.levels]
        levels[0].capacity = budget
        stack = VGPUStack(levels)
        stack.calibration = self.calibration
        return stack


def create_vgpu_stack(
    config: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    device: "str | torch.device | None" = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    budget: int | str | None = None,
    path: str | os.PathLike[str] | None = None,
    measure: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> VGPUStack:
    """The levels of this machine, or of the one that is described.

    Args:
        config: ``{"levels": [{"device": "cuda:0", "capacity_mb": 20000, "speed_gbps": 3350}, {"device": "cpu", ...},
            {"device": "ssd", "path": ..., ...}]}``, nearest first. ``speed_gbps`` counts 10**9 bytes per second towards
            the device, ``capacity_mb`` 2**20 bytes. The devices need not be here.
        device: The device that computes; None: the best one here.
        max_memory: Accelerate's vocabulary: ``{0: "20GiB", 1: "40GiB", "cpu": "96GiB", "disk": "/nvme/vb"}``. Cards
            that it leaves out are not used; ``cpu`` left out means what is free; ``disk`` takes a folder or a size.
        budget: Bytes of device memory, as a number or ``"20GiB"``; None: environment ``VB_HBM_BUDGET``, else what is
            free now.
        path: Folder for the disk level; None: ``$XDG_CACHE_HOME/vbcompile/offload``. It is not created here.
        measure: Calibrate the links now (:meth:`VGPUStack.calibrate`).

    Cards beside the computing one become levels only where this process has the machine to itself: under a launcher
    (``WORLD_SIZE`` above 1) they belong to other processes.

    Raises:
        ConfigError: a size, key, device or order that makes no sense; the message lists what is valid.
        DeviceError: ``device`` is not here.
    """
    if config is not None:
        if max_memory is not None:
            raise ConfigError("pass config or max_memory, not both: each names all levels")
        specs = read_levels(config)
    else:
        specs = _detect(device, max_memory, path, environ)
    stack = VGPUStack([_level(number, spec, path) for number, spec in enumerate(specs)])
    allowed = _budget(budget, environ)
    if allowed is not None:
        _apply_budget(stack.levels[0], allowed)
    if measure:
        stack.calibrate()
    return stack


def _budget(budget: int | str | None, environ: Mapping[str, str]) -> int | None:
    if budget is not None:
        return parse_size("budget", budget)
    text = environ.get("VB_HBM_BUDGET")
    return parse_size("environment variable VB_HBM_BUDGET", text) if text else None


def _apply_budget(level: VGPULevel, budget: int) -> None:
    if budget > level.capacity:
        has = size_text(level.capacity)
        log.warning("the budget of %s is more than %s has: using %s", size_text(budget), level.device, has)
    level.capacity = min(budget, level.capacity)


def _detect(
    device: "str | torch.device | None",
    max_memory: Mapping[int | str, int | str] | None,
    path: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
) -> list[LevelSpec]:
    from vbcompile.device import get_unified_backend

    limits = read_max_memory(max_memory) if max_memory is not None else None
    first = min(limits.cards, default=None) if limits is not None and device is None else None
    backend = get_unified_backend(device)
    if backend.device_type == "cpu":
        if limits is not None and limits.cards:
            raise ConfigError(f"max_memory names cards {sorted(limits.cards)}, and there is no accelerator here")
        own = LevelSpec("cpu", _host_capacity(limits.host if limits else None))
        return [own, *_disk(limits, path, environ)]
    index = backend.current_index() if backend.device.index is None else backend.device.index
    index = index if first is None else first
    specs = [_card(backend, index, limits.cards if limits is not None else None)]
    others = range(backend.device_count()) if limits is None else sorted(limits.cards)
    launched = environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    if not launched or limits is not None:
        specs += [_card(backend, other, limits.cards if limits else None) for other in others if other != index]
    return [*specs, LevelSpec("cpu", _host_capacity(limits.host if limits else None)), *_disk(limits, path, environ)]


def _card(backend: Any, index: int, limits: Mapping[int, int] | None) -> LevelSpec:
    if index >= backend.device_count():
        raise ConfigError(f"max_memory names card {index}; there are {backend.device_count()} of {backend.device_type}")
    name = f"{backend.device_type}:{index}"
    free = _free_memory(backend, index)
    asked = (limits or {}).get(index)
    if asked is not None and asked > free:
        log.warning("max_memory allows %s on %s, and %s are free: using these", size_text(asked), name, size_text(free))
    return LevelSpec(name, free if asked is None else min(asked, free))


def _free_memory(backend: Any, index: int) -> int:
    """Bytes that are free now; the whole card where its driver does not tell."""
    from vbcompile.device import DeviceError

    try:
        return int(backend.mem_get_info(index)[0])
    except DeviceError:
        total = backend.total_memory(index)
        if total is None:
            raise
        log.warning("%s:%d does not tell its free memory: assuming all of it", backend.device_type, index)
        return int(total)


def _host_capacity(asked: int | None) -> int:
    from vbcompile.device import DeviceBackend

    available, _ = DeviceBackend("cpu").mem_get_info()
    usable = available * _HOST_SHARE[0] // _HOST_SHARE[1]
    if asked is not None and asked > available:
        allowed, found = size_text(asked), size_text(available)
        log.warning("max_memory allows %s of host memory, and %s are available", allowed, found)
    return usable if asked is None else min(asked, available)


def _disk(limits: Any, path: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> list[LevelSpec]:
    """The disk level; with ``max_memory`` only where that names it."""
    if limits is not None and limits.disk_path is None and limits.disk is None and path is None:
        return []
    named = path or (limits.disk_path if limits is not None and limits.disk_path else cache_folder(environ) / "offload")
    folder = Path(named).expanduser().absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise ConfigError(f"the disk level's folder {str(folder)!r} lies under {str(existing)!r}, which is a file")
    free = shutil.disk_usage(existing).free
    asked = limits.disk if limits is not None else None
    capacity = free if asked is None else min(asked, free)
    return [LevelSpec("ssd", capacity, path=str(folder))] if capacity else []


def _level(number: int, spec: LevelSpec, path: str | os.PathLike[str] | None) -> VGPULevel:
    kind = _kind(number, spec.device)
    default = DEFAULT_GBPS["host" if spec.device == "cpu" else kind]  # also where the CPU is what computes
    rate = int((default if spec.speed_gbps is None else spec.speed_gbps) * 10**9)
    return VGPULevel(
        number=number,
        kind=kind,
        device=spec.device,
        capacity=spec.capacity,
        read_rate=rate,
        write_rate=rate,
        latency_ns=DEFAULT_LATENCY_NS[kind] if spec.latency_ns is None else spec.latency_ns,
        source="default" if spec.speed_gbps is None else "given",
        path=(spec.path or (str(path) if path is not None else None)) if kind == "disk" else None,
    )


def _kind(number: int, device: str) -> Kind:
    if device == "ssd":
        return "disk"
    if number == 0:
        return "device"
    return "host" if device == "cpu" else "peer"


def _require_consistent(levels: Sequence[VGPULevel]) -> None:
    names = [level.device for level in levels]
    if not levels:
        raise ConfigError("a stack needs at least one level: the device that computes")
    if len(set(names)) != len(names):
        raise ConfigError(f"each device may be one level only: {', '.join(names)}")
    if levels[0].kind == "disk":
        raise ConfigError("level 0 is the device that computes; a disk cannot be it")
    if "ssd" in names and "cpu" not in names[: names.index("ssd")]:
        raise ConfigError("a disk level needs host memory before it, through which its bytes pass: add a 'cpu' level")
    if levels[0].device == "cpu" and any(level.kind == "peer" for level in levels):
        raise ConfigError(f"no accelerator can be a level of memory for the CPU: {', '.join(names)}")


def _config_of(level: VGPULevel) -> dict[str, Any]:
    config: dict[str, Any] = {
        "device": level.device,
        "capacity_mb": level.capacity_mb,
        "speed_gbps": level.speed_gbps,
        "latency_us": level.latency_ns / 1000,
    }
    return config | ({"path": level.path} if level.path is not None else {})
