"""Tile shapes of the attention kernels: tables shipped per architecture, so that nothing is tuned at the first call.

``tuned/attention.json`` holds, per architecture and kernel, rows of ``[element bytes, largest padded head size, block
of queries, block of keys, warps, stages, descriptors]``; the first row that fits is taken.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from vbcompile.kernels import replay

_SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut into tiles.

    Attributes:
        block_q, block_k: rows and columns of a tile of scores.
        warps: warps per program; stages: depth of the software pipeline.
        tma: load tiles by descriptors where layouts allow it.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False

    def smaller(self) -> "TileConfig | None":
        """Tiles that need less of a device: fewer stages, else half the larger block; None for the smallest."""
        if self.stages > 1:
            return replace(self, stages=self.stages - 1)
        if max(self.block_q, self.block_k) == _SMALLEST_BLOCK:
            return None
        if self.block_q > self.block_k:
            return replace(self, block_q=self.block_q // 2)
        return replace(self, block_k=self.block_k // 2)


_forced: dict[str, TileConfig] = {}


@contextlib.contextmanager
def forced_tiles(**tiles: TileConfig) -> Iterator[None]:
    """Within it, the kernels named take these tiles instead of the table's; for tuning."""
    before = dict(_forced)
    _forced.update(tiles)
    replay.forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        replay.forget()


KERNELS = ("forward", "rows", "grad_q", "grad_kv", "decode")


def tile_config(arch: str, kernel: str, element_size: int, padded: int, light: bool = True) -> TileConfig:
    """Tiles for a kernel.

    Args:
        arch: as in ``Target.arch``; architectures without a table take that of the nearest relative.
        kernel: one of ``KERNELS``.
        element_size: bytes of an element of q.
        padded: larger head size of q and v, rounded up to a power of two.
        light: whether the score function needs few registers; if not, a row under ``{kernel}_heavy`` goes first.
    """
    if kernel in _forced:
        return _forced[kernel]
    table = _tables()[_relative(arch)]
    rows = ([] if light else table.get(f"{kernel}_heavy", [])) + table[kernel]
    for size, largest, block_q, block_k, warps, stages, tma in rows:
        if size == element_size and padded <= largest:
            return TileConfig(block_q, block_k, warps, stages, bool(tma))
    raise ValueError(f"no tiles of {kernel} on {arch} for elements of {element_size} bytes and head size {padded}")


def refuses_tiles(arch: str, kernels: Sequence[str], element_size: int, padded: int) -> str | None:
    """Why the table has no tiles for a size: none that its registers hold, or None where each kernel has some."""
    table = _tables()[_relative(arch)]
    lacking = [k for k in kernels if not any(size == element_size and padded <= most for size, most, *_ in table[k])]
    if not lacking:
        return None
    return (
        f"no tiles of {' and '.join(lacking)} fit the registers of {arch} at head size {padded}, {element_size} bytes"
    )


@functools.cache
def _tables() -> dict[str, Any]:
    return json.loads(resources.files("vbcompile.kernels").joinpath("tuned/attention.json").read_text())


@functools.cache
def _relative(arch: str) -> str:
    """The architecture whose table ``arch`` takes."""
    tables = _tables()
    if arch in tables:
        return arch
    if found := re.match(r"sm_(\d+)", arch):
        known = sorted((int(name[3:]), name) for name in tables if name.startswith("sm_"))
        return max(((n, name) for n, name in known if n <= int(found.group(1))), default=known[0])[1]
    if arch.startswith(("gfx10", "gfx11", "gfx12")):
        return "gfx1100"
    if arch.startswith("gfx"):
        return "gfx950" if arch.startswith("gfx95") else "gfx942"
    return "xpu"
