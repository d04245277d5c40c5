"""Measured times of the FP4 product: a table shipped per architecture, and the user's own, which goes first.

Nothing is measured when a model runs. ``tuned/fp4_linear.json`` holds, per architecture, the device that was measured
and rows of ``[format, N, K, rows of x, microseconds of the bfloat16 product, {implementation: [microseconds,
configuration or null]}]``, without those that are slower than others; the user's table, written by ``vbcompile tune``,
has the same form, with all, infinite for one that does not run or is not worth timing. Shapes that are in neither are
cut up by formula. A user's table knows nothing of implementations that are newer than it: those keep what the shipped
table says of the shape, or their estimate.
"""

import functools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from vbcompile.cache_folder import cache_folder
from vbcompile.device import Target
from vbcompile.kernels.registry import forget_choices

log = logging.getLogger(__name__)
_SHIPPED = "tuned/fp4_linear.json"
_OTHER = {"nvfp4": "mxfp4", "mxfp4": "nvfp4"}


@dataclass(frozen=True)
class Measured:
    """Times of one shape, in microseconds.

    Attributes:
        dense: of the vendor's bfloat16 product with an unpacked weight.
        times: of each implementation.
        configs: how each implementation cuts it up, as the arguments of its configuration; None where it has none.
        whole: what is not among ``times`` is known to be slower than the fastest there.
    """

    dense: float
    times: dict[str, float]
    configs: dict[str, tuple[Any, ...] | None]
    whole: bool = False


def user_table() -> Path:
    """Where ``vbcompile tune`` writes: ``$XDG_CACHE_HOME/vbcompile/fp4_linear.json`` (``~/.cache/vbcompile``)."""
    return cache_folder() / "fp4_linear.json"


def lookup(arch: str, format_name: str, n: int, k: int, m: int) -> Measured | None:
    """What was measured for m rows of x and a weight ``[n, k]``, in the other format if not in this one.

    A count of rows that was not measured stands for the next larger that was, if that is less than eight times as many.
    """
    table = _tables().get(arch, {})
    rows = table.get((format_name, n, k)) or table.get((_OTHER[format_name], n, k))
    if not rows:
        return None
    return rows.get(min((have for have in rows if m <= have < 8 * m), default=-1))


def tuned_config(target: Target, implementation: str, n: int, k: int, m: int) -> tuple[Any, ...] | None:
    """How an implementation is to cut up a shape; the format makes no difference."""
    measured = lookup(target.arch, "nvfp4", n, k, m)
    return None if measured is None else measured.configs.get(implementation)


def relative_cost(target: Target, implementation: str, format_name: str, n: int, k: int, m: int) -> float | None:
    """Measured time in units of the bfloat16 product's, infinite for what is known to be slower than others; None where
    this implementation was not measured."""
    measured = lookup(target.arch, format_name, n, k, m)
    if measured is None or (implementation not in measured.times and not measured.whole):
        return None
    return measured.times.get(implementation, math.inf) / measured.dense


def write_user_table(arch: str, device: str, rows: list[list[Any]]) -> Path:
    """Put rows into the user's table, in place of those of the same shape; other architectures' stay.

    Raises:
        ValueError: there is a file of that name that is no table.
    """
    path = user_table()
    content = _read(path.read_text()) if path.exists() else {}
    new = {tuple(row[:4]) for row in rows}
    kept = [row for row in content.get(arch, {}).get("rows", []) if tuple(row[:4]) not in new]
    content[arch] = {"device": device, "rows": sorted(kept + rows, key=lambda row: row[:4])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    forget()
    return path


def forget() -> None:
    """Read the tables anew at the next question, and make every choice anew that follows from them."""
    _tables.cache_clear()
    for clear in _choices:
        clear()
    forget_choices()


_choices: list[Callable[[], None]] = []
F = TypeVar("F", bound=Callable[..., Any])


def from_tables(function: F) -> F:
    """Remembers what a function of hashable arguments chooses, until the tables change."""
    remembering = functools.lru_cache(maxsize=1024)(function)
    _choices.append(remembering.cache_clear)
    return cast(F, remembering)


@functools.cache
def _tables() -> dict[str, dict[tuple[str, int, int], dict[int, Measured]]]:
    """Architecture -> (format, N, K) -> rows of x -> times."""
    tables: dict[str, dict[tuple[str, int, int], dict[int, Measured]]] = {}
    _merge(tables, _read(resources.files("vbcompile.kernels").joinpath(_SHIPPED).read_text()), True)
    path = user_table()
    try:
        _merge(tables, _read(path.read_text()), False)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s is not read: %s; `vbcompile tune` writes it anew once it is deleted", path, error)
    return tables


def _read(text: str) -> dict[str, Any]:
    """The content of a table. Raises ValueError where it is none."""
    content = json.loads(text)
    try:
        for table in content.values():
            for format_name, n, k, m, dense, times in table["rows"]:
                if format_name not in ("nvfp4", "mxfp4") or min(n, k, m, dense) <= 0:
                    raise ValueError(f"no such shape: {format_name} {n} {k} {m}")
                [float(time) for time, _ in times.values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no table of times: {error!r}") from error
    return content


def _merge(
    tables: dict[str, dict[tuple[str, int, int], dict[int, Measured]]], content: dict[str, Any], whole: bool
) -> None:
    for arch, table in content.items():
        for format_name, n, k, m, dense, times in table["rows"]:
            rows = tables.setdefault(arch, {}).setdefault((format_name, n, k), {})
            before = rows.get(m, Measured(dense, {}, {}, whole))
            known = {name: time * dense / before.dense for name, time in before.times.items()}
            rows[m] = Measured(
                dense,
                known | {name: time for name, (time, _) in times.items()},
                before.configs | {name: None if c is None else tuple(c) for name, (_, c) in times.items()},
                before.whole,
            )
