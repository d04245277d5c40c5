"""Variants of a benchmark that compile at the same time, each in a process of its own, and are measured one by one.

Compiling takes most of a run. A worker says when it is ready and waits for its turn; while one measures, those that
still compile are stopped. Every row is handed on as it comes, so that a run cut short has results. A host's speed may
change by a factor of two within a minute, so what it takes is measured in several turns, with those of others between.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_EACH = 5.0  # seconds that a variant may need to be measured


def take_turns(
    command: Sequence[str],
    names: Sequence[str],
    seconds: float,
    folder: Path,
    found: Callable[[list[dict]], object],
) -> list[dict]:
    """Rows of the variants that were done in time, in the order of ``names``.

    Args:
        command: of a worker; a variant's name is appended.
        seconds: for everything.
        folder: where workers and this process leave each other files.
        found: called with all rows so far after each one.
    """
    end = time.monotonic() + seconds
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("COMPILE_THREADS", "4")}
    workers = {name: subprocess.Popen([*command, name], env=environment, start_new_session=True) for name in names}
    rows: dict[str, dict] = {}
    turns = dict.fromkeys(names, 0)

    def waiting() -> list[str]:
        return [n for n in names if n not in rows and workers[n].poll() is None]

    def ready() -> list[str]:
        return [n for n in waiting() if _file(folder, n, "ready").exists()]

    try:
        while waiting() and time.monotonic() < end:
            hurry = time.monotonic() > end - _EACH * len(waiting())
            if not ready() or (len(ready()) < len(waiting()) and not hurry):
                time.sleep(0.1)
                continue
            name = min(ready(), key=turns.__getitem__)
            turns[name] += 1
            others = [workers[n] for n in waiting() if n not in ready()]
            for process in others:
                os.killpg(process.pid, signal.SIGSTOP)
            done, turn = _file(folder, name, "json"), _file(folder, name, "turn")
            turn.touch()
            while workers[name].poll() is None and turn.exists() and not done.exists() and time.monotonic() < end:
                time.sleep(0.02)
            for process in others:
                os.killpg(process.pid, signal.SIGCONT)
            if done.exists():
                rows[name] = json.loads(done.read_text())
                print(rows[name], flush=True)
                found([rows[n] for n in names if n in rows])
    finally:
        for process in workers.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [rows[name] for name in names if name in rows]


def host_speed() -> float:
    """Microseconds that a loop of 20000 additions takes now: what times of the host are to be seen beside."""
    found = []
    for _ in range(5):
        begin, total = time.perf_counter(), 0
        for n in range(20000):
            total += n & 7
        found.append(1e6 * (time.perf_counter() - begin))
    return min(found)


def await_turn(folder: Path, name: str) -> None:
    """In a worker: everything is compiled; returns when it may measure."""
    _file(folder, name, "ready").touch()
    while not _file(folder, name, "turn").exists():
        time.sleep(0.02)


def give_turn_back(folder: Path, name: str) -> None:
    """In a worker: it has more to measure, which :func:`await_turn` waits for."""
    _file(folder, name, "turn").unlink()


def hand_in(folder: Path, name: str, row: dict) -> None:
    """In a worker: its row."""
    temporary = _file(folder, name, "part")
    temporary.write_text(json.dumps(row))
    temporary.rename(_file(folder, name, "json"))


def _file(folder: Path, name: str, suffix: str) -> Path:
    return folder / f"{name.replace(' ', '_').replace(',', '')}.{suffix}"
