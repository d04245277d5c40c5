"""What a stretch of computation takes, from what it reads, computes and launches."""

from typing import NamedTuple

LAUNCH_NS = 4_000  # what the host takes for a launch


class Rates(NamedTuple):
    """Bytes per second of the device's memory, and operations per second of its matrix units (None: no limit)."""

    memory: int
    flops: int | None

    def nanoseconds(self, nbytes: int, flops: int, launches: int = 1) -> int:
        """Time of operators that move ``nbytes`` and compute ``flops``, whichever takes longer, and of launching."""
        work = -(-flops * 10**9 // self.flops) if self.flops else 0
        return max(-(-nbytes * 10**9 // self.memory), work) + launches * LAUNCH_NS
