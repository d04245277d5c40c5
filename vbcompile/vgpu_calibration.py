"""Measured bandwidths of the links between the tiers, and of the device itself, in about a second.

Copies are queued and timed with ``torch.Stream`` and ``torch.Event``, which every vendor's device has.
What cannot be measured stays None, with the reason in ``reasons``.
"""

import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vbcompile.device import get_unified_backend
from vbcompile.vgpu_files import open_unbuffered
from vbcompile.vgpu_size import MIB

log = logging.getLogger(__name__)

_REPEATS = 3
_IN_A_ROW = 8  # copies or products between two looks at the clock, which itself takes as long as a short one
_SMALL_COPIES = 64
_DISK_CHUNK = 8 * MIB
_DISK_THREADS = 8


@dataclass
class Calibration:
    """Rates in bytes per second (``matmul``: floating-point operations per second), each the best of a few tries.

    Attributes:
        device: What was measured.
        memory: The device's own memory, reading and writing counted.
        matmul: Matrix products, bfloat16 on accelerators and float32 on the CPU.
        h2d: Pinned host memory to the device; ``d2h`` back.
        latency_ns: Time between the ends of small copies that follow one another.
        peers: From each other card to the device.
        host: One host buffer to another.
        disk: Sequential read, unbuffered where ``disk_direct``.
        reasons: Why a figure is None.
        seconds: What the measurement took.
    """

    device: str
    memory: int | None = None
    matmul: int | None = None
    h2d: int | None = None
    d2h: int | None = None
    latency_ns: int | None = None
    peers: dict[str, int] = field(default_factory=dict)
    host: int | None = None
    disk: int | None = None
    disk_direct: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def rates(self, kind: str, device: str) -> tuple[int, int, int | None] | None:
        """(towards the device, away from it, latency in ns or None) of a level, or None where it was not measured."""
        read: int | None
        match kind:
            case "device":
                read, write = self.memory, self.memory
            case "peer":
                read = write = self.peers.get(device)
            case "host":
                read, write = self.h2d, self.d2h
            case _:
                read = write = self.disk
        latency = self.latency_ns if kind in ("peer", "host") else None
        return None if read is None or write is None else (read, write, latency)


def calibrate(
    device: str | torch.device | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    peers: Sequence[str] = (),
    nbytes: int = 64 * MIB,
    disk_bytes: int = 256 * MIB,
) -> Calibration:
    """Measure the links of this machine.

    Args:
        device: The device that computes; None: the best one here.
        path: Folder whose disk is measured with a temporary file; it is created if need be. None: no disk.
        peers: Other cards whose link to the device is measured.
        nbytes: Size of each copy.
        disk_bytes: Size of the temporary file.

    Raises:
        DeviceError: the device is not here.
    """
    begun = time.perf_counter()
    backend = get_unified_backend(device)
    target = backend.device
    if target.type != "cpu" and target.index is None:
        target = torch.device(target.type, backend.current_index())
    found = Calibration(str(target))
    wait = (lambda: None) if target.type == "cpu" else (lambda: backend.synchronize(target.index))
    _measure(found, "host", lambda: _host_rate(nbytes))
    _measure(found, "memory", lambda: _memory_rate(target, nbytes, wait))
    _measure(found, "matmul", lambda: _matmul_rate(target, wait))
    if target.type == "cpu":
        found.reasons |= dict.fromkeys(("h2d", "d2h"), "there is no accelerator")
    else:
        _measure_link(found, target, nbytes, wait)
        for peer in peers:
            _measure_peer(found, target, peer, nbytes, wait)
    if path is None:
        found.reasons["disk"] = "no folder was named"
    else:
        _measure_disk(found, Path(path), disk_bytes)
    found.seconds = time.perf_counter() - begun
    return found


def _measure(found: Calibration, name: str, work: Callable[[], int]) -> None:
    """Set one figure; a device that refuses the work (out of memory, operator missing) leaves the reason instead."""
    try:
        setattr(found, name, work())
    except (RuntimeError, NotImplementedError, OSError) as error:
        found.reasons[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        log.warning("%s of %s was not measured: %s", name, found.device, found.reasons[name])


def _best_seconds(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Shortest of a few runs after one to warm up."""
    times = []
    for _ in range(_REPEATS + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _rate(amount: int, work: Callable[[], Any], wait: Callable[[], None], device: torch.device) -> int:
    """``amount`` per second, queued several times in a row where the device works beside the host."""
    count = 1 if device.type == "cpu" else _IN_A_ROW

    def run() -> None:
        for _ in range(count):
            work()

    return int(amount * count / _best_seconds(run, wait))


def _host_rate(nbytes: int) -> int:
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
    return int(nbytes / _best_seconds(lambda: target.copy_(source), lambda: None))


def _memory_rate(device: torch.device, nbytes: int, wait: Callable[[], None]) -> int:
    source = torch.ones(4 * nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rate(2 * source.nbytes, lambda: target.copy_(source), wait, device)


def _matmul_rate(device: torch.device, wait: Callable[[], None]) -> int:
    size, dtype = (512, torch.float32) if device.type == "cpu" else (4096, torch.bfloat16)
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones_like(left)
    return _rate(2 * size**3, lambda: left @ right, wait, device)


def _measure_link(found: Calibration, device: torch.device, nbytes: int, wait: Callable[[], None]) -> None:
    try:
        host = torch.ones(nbytes, dtype=torch.uint8).pin_memory()
        card = torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (RuntimeError, NotImplementedError) as error:
        found.reasons["h2d"] = found.reasons["d2h"] = f"no pinned buffers: {error}"
        log.warning("the link of %s was not measured: %s", device, error)
        return

    def there() -> None:
        card.copy_(host, non_blocking=True)

    def back() -> None:
        host.copy_(card, non_blocking=True)

    def small() -> None:
        for _ in range(_SMALL_COPIES):
            card[:4096].copy_(host[:4096], non_blocking=True)

    _measure(found, "h2d", lambda: _rate(nbytes, there, wait, device))
    _measure(found, "d2h", lambda: _rate(nbytes, back, wait, device))
    _measure(found, "latency_ns", lambda: int(_best_seconds(small, wait) / _SMALL_COPIES * 1e9))


def _measure_peer(found: Calibration, device: torch.device, peer: str, nbytes: int, wait: Callable[[], None]) -> None:
    nbytes *= 4  # the fastest link: its copies have to be long beside what starting them takes
    try:
        source = torch.ones(nbytes, dtype=torch.uint8, device=peer)
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        found.peers[peer] = _rate(nbytes, lambda: target.copy_(source, non_blocking=True), wait, device)
    except RuntimeError as error:
        found.reasons[peer] = str(error).strip().partition("\n")[0]
        log.warning("the link from %s was not measured: %s", peer, found.reasons[peer])


def _measure_disk(found: Calibration, folder: Path, nbytes: int) -> None:
    if not hasattr(os, "preadv"):
        found.reasons["disk"] = "this system has no preadv"
        return
    nbytes = max(nbytes // _DISK_CHUNK, 1) * _DISK_CHUNK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="calibration-") as file:
            _fill(file, nbytes)
            found.disk, found.disk_direct = _disk_rate(file.name, nbytes)
    except OSError as error:
        found.reasons["disk"] = f"{folder}: {error.strerror or error}"
        log.warning("the disk was not measured: %s", found.reasons["disk"])


def _fill(file: Any, nbytes: int) -> None:
    """Random bytes, which no file system can compress; space is reserved first, so that a full disk says so at once."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
    block = os.urandom(_DISK_CHUNK)
    for _ in range(nbytes // _DISK_CHUNK):
        file.write(block)
    file.flush()
    os.fsync(file.fileno())


def _disk_rate(name: str, nbytes: int) -> tuple[int, bool]:
    """(bytes per second, whether the page cache was passed by)."""
    descriptor, direct = open_unbuffered(name)
    try:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffers = [mmap.mmap(-1, _DISK_CHUNK) for _ in range(_DISK_THREADS)]
        with ThreadPoolExecutor(_DISK_THREADS) as pool:
            start = time.perf_counter()
            list(pool.map(lambda part: _read_share(descriptor, buffers[part], part, nbytes), range(_DISK_THREADS)))
            seconds = time.perf_counter() - start
        return int(nbytes / seconds), direct
    finally:
        os.close(descriptor)


def _read_share(descriptor: int, buffer: mmap.mmap, part: int, nbytes: int) -> None:
    for offset in range(part * _DISK_CHUNK, nbytes, _DISK_THREADS * _DISK_CHUNK):
        got = os.preadv(descriptor, [buffer], offset)
        if got != _DISK_CHUNK:
            raise OSError(f"read {got} of {_DISK_CHUNK} bytes at {offset}")
