"""What users write about tiers, checked: the explicit level list, and Accelerate's ``max_memory``."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vbcompile.config_error import ConfigError
from vbcompile.vgpu_size import MIB, parse_size

_KEYS = ("device", "capacity_mb", "speed_gbps", "latency_us", "path")
_DISK_NAMES = ("ssd", "disk", "nvme")


@dataclass(frozen=True)
class LevelSpec:
    """One level as it was asked for: ``capacity`` in bytes; None means that a default or a measurement decides."""

    device: str
    capacity: int
    speed_gbps: float | None = None
    latency_ns: int | None = None
    path: str | None = None


@dataclass(frozen=True)
class MemoryLimits:
    """``max_memory`` in bytes: cards by index, host memory, and the disk's size or folder."""

    cards: Mapping[int, int] = field(default_factory=dict)
    host: int | None = None
    disk: int | None = None
    disk_path: str | None = None


def read_levels(config: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[LevelSpec]:
    """Levels of an explicit configuration, nearest first.

    Raises:
        ConfigError: anything that is not a level; the message names the entry and what is valid.
    """
    levels = config
    if isinstance(config, Mapping):
        if set(config) != {"levels"}:
            raise ConfigError(f"a stack's configuration has the one key 'levels', not {sorted(map(str, config))}")
        levels = config["levels"]
    if not isinstance(levels, Sequence) or isinstance(levels, (str, bytes)) or not levels:
        raise ConfigError(f"'levels' must be a list of at least one level, not {levels!r}")
    return [_read_level(number, level) for number, level in enumerate(levels)]


def _read_level(number: int, level: Any) -> LevelSpec:
    where = f"level {number}"
    if not isinstance(level, Mapping):
        raise ConfigError(f"{where} must be a dictionary with the keys {', '.join(_KEYS)}, not {level!r}")
    for key in level:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown key {key!r}; valid: {', '.join(_KEYS)}{hint}")
    for key in ("device", "capacity_mb"):
        if key not in level:
            raise ConfigError(f"{where}: the key {key!r} is missing")
    path = level.get("path")
    latency = level.get("latency_us")
    return LevelSpec(
        device=_device_name(where, level["device"]),
        capacity=max(int(_positive(f"{where}: capacity_mb", level["capacity_mb"]) * MIB), 1),
        speed_gbps=None if level.get("speed_gbps") is None else _rate(f"{where}: speed_gbps", level["speed_gbps"]),
        latency_ns=None if latency is None else round(_positive(f"{where}: latency_us", latency, zero=True) * 1000),
        path=None if path is None else str(path),
    )


def _device_name(where: str, device: Any) -> str:
    from vbcompile.device import DeviceError, parse_device

    if str(device) in _DISK_NAMES:
        return "ssd"
    try:
        kind, index = parse_device(device)
    except DeviceError as error:
        raise ConfigError(f"{where}: {error}; a disk level is called 'ssd'") from error
    return "cpu" if kind == "cpu" else f"{kind}:{index or 0}"


def _positive(what: str, value: Any, zero: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{what} must be a positive number, not {value!r}")
    return value


def _rate(what: str, value: Any) -> float:
    rate = _positive(what, value)
    if rate * 1e9 < 1:
        raise ConfigError(f"{what} is less than one byte per second: {value!r}")
    return rate


def read_max_memory(max_memory: Mapping[int | str, int | str]) -> MemoryLimits:
    """Accelerate's dictionary: card indices, ``cpu`` and ``disk``; ``disk`` takes a size or a folder.

    Raises:
        ConfigError: another key, or a value that is not a size.
    """
    if not isinstance(max_memory, Mapping):
        raise ConfigError(f"max_memory must be a dictionary such as {{0: '20GiB', 'cpu': '96GiB'}}, not {max_memory!r}")
    cards: dict[int, int] = {}
    host = disk = None
    disk_path = None
    for key, value in max_memory.items():
        what = f"max_memory[{key!r}]"
        if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
            cards[key] = parse_size(what, value)
        elif key == "cpu":
            host = parse_size(what, value)
        elif key == "disk" and isinstance(value, str) and not value.strip()[:1].isdigit():
            disk_path = value
        elif key == "disk":
            disk = parse_size(what, value)
        else:
            raise ConfigError(f"max_memory has the unknown key {key!r}; valid: card indices from 0, 'cpu', 'disk'")
    return MemoryLimits(cards, host, disk, disk_path)
