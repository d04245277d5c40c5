"""Reads under way: threads that bring weights from disk into host memory piece by piece, and hand each piece on."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vbcompile.runtime_device import CopyQueue, MemoryDevice
from vbcompile.runtime_disk import OpenFiles, StorageError, verify_checksums
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_sources import DiskBytes
from vbcompile.vgpu_files import BLOCK
from vbcompile.vgpu_plan import padded, staged
from vbcompile.vgpu_size import MIB

PIECE = 8 * MIB
"""Bytes of one read."""

_THREADS = 8
_BOUNCE = 32 * MIB  # bytes of each of two buffers through which weights are loaded outside of a plan


class Destination(NamedTuple):
    """Where the bytes of a read go: ``deliver(first byte, bytes)`` for each piece, then ``finish()`` -> event."""

    deliver: Callable[[int, Tensor], None]
    finish: Callable[[], Any]


class ReadRequest:
    """One weight on its way from a file into host memory, and on to the device once there is room.

    Args:
        source: What to read.
        staging: Host bytes for it, ``staged(source.nbytes)`` of them.
        prepare: Called once before the first byte is written; blocks until the staging bytes are free.
        verify: Called with the payload once all is there and before any of it is handed on, or None.

    Attributes:
        after_copy: Event behind the last copy out of the staging bytes; None where there was none.
    """

    def __init__(
        self,
        source: DiskBytes,
        staging: Tensor,
        prepare: Callable[[], None],
        verify: Callable[[Tensor], None] | None,
    ) -> None:
        self.source, self.staging = source, staging
        self.after_copy: Any = None
        self.pieces = list(_pieces(source))
        head = source.offset % BLOCK
        self.payload = staging[head : head + source.nbytes]
        self._prepare: Callable[[], None] | None = prepare
        self._verify = verify
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._arrived: list[tuple[int, int]] = []
        self._destination: Destination | None = None
        self._delivered = self._cancelled = False
        self._left = len(self.pieces)
        self._error: BaseException | None = None
        self._read_over, self._done = threading.Event(), threading.Event()

    @property
    def done(self) -> bool:
        """Whether all bytes have been read and handed on, or that has failed."""
        return self._done.is_set()

    @property
    def failed(self) -> bool:
        """Whether it is over, and the bytes could not be read."""
        return self.done and self._error is not None

    def attach(self, destination: Destination) -> None:
        """Say where the bytes go."""
        with self._lock:
            self._destination = destination
            self._hand_on()

    def cancel(self) -> None:
        """Give up a request that has no destination; returns when its threads have left the staging bytes."""
        self._cancelled = True
        self._read_over.wait()
        self._done.set()

    def settle(self) -> None:
        """Block until all bytes have been handed on, or that has failed."""
        self._done.wait()

    def join(self) -> None:
        """Block until all bytes have been handed on.

        Raises:
            StorageError: they could not be read.
        """
        self._done.wait()
        error = self._error
        if error is not None:
            self._error = RuntimeError(str(error))  # with it here, it and its frames' device memory would stay alive
            try:
                raise error
            finally:
                del error

    def read_piece(self, begin: int, end: int, read: Callable[[int, Tensor, int], None]) -> None:
        """Bring bytes ``begin`` to ``end`` of the file into the staging bytes; runs in a reader's thread."""
        try:
            self._make_room()
            if not self._cancelled and self._error is None:
                self._bring(begin, end, read)
        except BaseException as problem:  # noqa: BLE001 -- join() raises it
            with self._lock:
                self._error = self._error or problem
        finally:
            self._leave()

    def _make_room(self) -> None:
        with self._preparing:
            prepare, self._prepare = self._prepare, None
            try:
                if prepare is not None:
                    prepare()
            except BaseException as problem:
                self._error = problem  # before the next thread comes past
                raise

    def _bring(self, begin: int, end: int, read: Callable[[int, Tensor, int], None]) -> None:
        first = self.source.offset - self.source.offset % BLOCK
        last = min(end, self.source.offset + self.source.nbytes)
        read(begin, self.staging[begin - first : end - first], last - begin)
        with self._lock:
            self._arrived.append((max(begin, self.source.offset) - self.source.offset, last - self.source.offset))
            if self._verify is None:
                self._hand_on()

    def _leave(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
            self._read_over.set()
            try:
                if self._verify is not None and self._error is None and not self._cancelled:
                    self._verify(self.payload)
                self._verify = None
            except StorageError as problem:
                self._error = problem
            self._hand_on()

    def _hand_on(self) -> None:
        """Hand on what has arrived, and conclude behind the last piece. Under the lock."""
        over = not self._left
        try:
            if self._destination is not None and self._error is None and self._verify is None:
                for begin, end in self._arrived:
                    self._delivered = True
                    self._destination.deliver(begin, self.payload[begin:end])
                self._arrived.clear()
        except BaseException as problem:  # noqa: BLE001 -- join() raises it
            self._error = problem
        if over and not self.done and (self._destination is not None or self._error is not None):
            if self._destination is not None and self._delivered:
                self.after_copy = self._destination.finish()
            self._done.set()


class DiskReader:
    """Threads that read.

    Args:
        device: Asked before host memory is written to.
        threads: Number of reads under way at once.
        direct: False: never past the page cache.
    """

    def __init__(self, device: MemoryDevice, *, threads: int = _THREADS, direct: bool = True) -> None:
        self.files = OpenFiles(direct=direct)
        self._device = device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vbcompile disk")
        self._verified: set[tuple[Path, int]] = set()

    def submit(self, source: DiskBytes, staging: Tensor, prepare: Callable[[], None]) -> ReadRequest:
        """Begin to read; the request is served behind those submitted before it."""
        if staging.numel() < staged(source.nbytes):
            raise ValueError(f"{staging.numel()} bytes of staging for a read that needs {staged(source.nbytes)}")
        verify = None
        if source.checksums and (source.file, source.offset) not in self._verified:
            verify = lambda payload: self._check(source, payload)
        request = ReadRequest(source, staging, prepare, verify)
        for begin, end in request.pieces:
            self._pool.submit(request.read_piece, begin, end, lambda *what: self._read(source, *what))
        return request

    def read(self, source: DiskBytes, staging: Tensor, deliver: Callable[[int, Tensor], None]) -> None:
        """Read all of it and hand it on, while the caller waits.

        Raises:
            StorageError: it could not be read, or is not what was written.
        """
        request = self.submit(source, staging, lambda: None)
        request.attach(Destination(deliver, lambda: None))
        request.join()

    def close(self) -> None:
        """Finish what is under way and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=False)
        self.files.close()

    def _read(self, source: DiskBytes, begin: int, memory: Tensor, wanted: int) -> None:
        self._device.host_writes(memory)
        self.files.read(source, begin, memory, wanted)

    def _check(self, source: DiskBytes, payload: Tensor) -> None:
        verify_checksums(source, payload)
        self._verified.add((source.file, source.offset))


def _pieces(source: DiskBytes) -> Iterator[tuple[int, int]]:
    """Stretches of the file, on whole blocks, that cover the source."""
    begin = source.offset - source.offset % BLOCK
    end = padded(source.offset + source.nbytes, BLOCK)
    for first in range(begin, max(end, begin + 1), PIECE):
        yield first, min(first + PIECE, end)


def load_from_disk(
    reader: DiskReader, host: HostMemory, device: MemoryDevice, queue: CopyQueue, source: DiskBytes, target: Tensor
) -> None:
    """Fill device memory from a file through two small buffers; returns when all copies are queued.

    Raises:
        StorageError: it could not be read, or is not what was written.
    """
    step = source.checksum_bytes * max(_BOUNCE // source.checksum_bytes, 1) if source.checksum_bytes else _BOUNCE
    buffers = host.allocate([staged(min(step, source.nbytes))] * 2, alignment=BLOCK)
    events: list[Any] = [None, None]
    for number, first in enumerate(range(0, source.nbytes, step)):
        part, turn = _part(source, first, min(step, source.nbytes - first)), number % 2
        if events[turn] is not None:
            device.join(events[turn])
        goal = target[first : first + part.nbytes]
        reader.read(
            part,
            buffers[turn],
            lambda begin, piece, goal=goal: device.copy(queue, goal[begin : begin + piece.numel()], piece),  # type: ignore[misc]
        )
        events[turn] = device.record(queue)
    for event in events:
        if event is not None:
            device.join(event)


def _part(source: DiskBytes, first: int, nbytes: int) -> DiskBytes:
    """A stretch of a source; it begins on a multiple of the length that its checksums cover."""
    checksums: tuple[int, ...] = ()
    if source.checksum_bytes:
        begin = first // source.checksum_bytes
        checksums = source.checksums[begin : begin + -(-nbytes // source.checksum_bytes)]
    return replace(source, offset=source.offset + first, nbytes=nbytes, checksums=checksums)
