"""Amounts of memory as people write them."""

import re

from vbcompile.config_error import ConfigError

MIB = 2**20
GIB = 2**30

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def parse_size(what: str, value: int | str) -> int:
    """Bytes of a positive number, or of a text such as ``20GiB``, ``512MB`` or ``1.5 TiB``.

    ``KiB``, ``MiB``, ``GiB``, ``TiB`` count powers of 1024, ``KB``, ``MB``, ``GB``, ``TB`` powers of 1000, as in
    Accelerate's ``max_memory``.

    Args:
        what: Name of the setting, for the message.

    Raises:
        ConfigError: not a size, or not positive.
    """
    size = None
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]+)(?:\.([0-9]{1,9}))?\s*([A-Za-z]*)\s*", value)
        if found and found.group(3) in _UNITS:
            whole, part = found.group(1), found.group(2) or ""
            size = int(whole + part) * _UNITS[found.group(3)] // 10 ** len(part)
    if size is None or size <= 0:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ConfigError(
            f"{what}={value!r} is not an amount of memory; write a number of bytes or one with a unit of "
            f"{units}, for example '20GiB'"
        )
    return size


def size_text(nbytes: float) -> str:
    """Bytes in the largest fitting unit of 2**10 steps: ``4.20 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def exact_size(nbytes: int) -> str:
    """A number of bytes that is meant to be copied, and what it amounts to: ``17152 bytes (16.75 KiB)``."""
    return f"{nbytes} bytes ({size_text(nbytes)})"
