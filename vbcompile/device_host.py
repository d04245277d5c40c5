"""The CPU behind the same functions that ``torch.cuda`` and the vendors' modules offer."""

import functools
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_CGROUP = (  # limit, use and reclaimable cache of this control group, versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


@dataclass(frozen=True)
class HostProperties:
    """The CPU as a device: ``total_memory`` in bytes, ``multi_processor_count`` in cores."""

    name: str
    total_memory: int
    multi_processor_count: int


class HostModule:
    """CPU counterpart of ``torch.cuda``. There is one device, and its memory is this process's."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_name(self, index: int = 0) -> str:
        return cpu_name()

    def get_device_properties(self, index: int = 0) -> HostProperties:
        import psutil

        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        return HostProperties(cpu_name(), self.mem_get_info()[1], cores)

    def memory_allocated(self, index: int = 0) -> int:
        """Resident memory of this process in bytes."""
        import psutil

        return psutil.Process().memory_info().rss

    memory_reserved = memory_allocated  # the C allocator keeps no pool of its own that could be asked for

    def max_memory_allocated(self, index: int = 0) -> int:
        """Largest resident memory of this process so far, in bytes."""
        if sys.platform == "win32":
            import psutil

            return psutil.Process().memory_info().peak_wset
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(peak * (1 if sys.platform == "darwin" else 1024), self.memory_allocated())

    def mem_get_info(self, index: int = 0) -> tuple[int, int]:
        """(available, total) bytes of main memory, within the limit of this process's container."""
        import psutil

        memory = psutil.virtual_memory()
        limit = _container_memory()
        if limit is None:
            return memory.available, memory.total
        return min(memory.available, limit[0]), min(memory.total, limit[1])

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def synchronize(self, index: int = 0) -> None:
        """Nothing to wait for: operators on the CPU have finished when they return."""


@functools.cache
def cpu_name() -> str:
    """The processor's product name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return (names and names[0]) or platform.processor() or platform.machine() or "CPU"


def _container_memory() -> tuple[int, int] | None:
    """(available, limit) bytes of the control group, or None without a limit."""
    for limit_file, used_file, stat_file in _CGROUP:
        try:
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
            stat = dict(line.split() for line in Path(stat_file).read_text().splitlines())
        except (OSError, ValueError):  # absent, or the word "max": no limit
            continue
        cache = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
        return max(limit - used + cache, 0), limit
    return None
