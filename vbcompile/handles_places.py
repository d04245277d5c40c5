"""Where the weights of an offloaded model may go: the device's budget, and the levels beyond it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vbcompile.config_error import ConfigError
from vbcompile.device import get_device, get_unified_backend
from vbcompile.runtime_device import AcceleratorDevice, MemoryDevice
from vbcompile.runtime_host import HostMemory
from vbcompile.vgpu import DEFAULT_GBPS, DEFAULT_LATENCY_NS, VGPULevel, VGPUStack, create_vgpu_stack
from vbcompile.vgpu_config import read_max_memory
from vbcompile.vgpu_plan import Tier
from vbcompile.vgpu_rates import Rates
from vbcompile.vgpu_size import size_text

MaxMemory = Mapping[int | str, int | str]


class Places:
    """The levels of one offloaded model.

    Attributes:
        device: Where it computes.
        stack: The levels; level 0 is the device.
        host: Allocates host memory.
    """

    def __init__(self, device: torch.device, stack: VGPUStack) -> None:
        self.device, self.stack = device, stack
        self.host = HostMemory(device)

    @property
    def budget(self) -> int:
        """Bytes of device memory that may be used in all."""
        return self.stack.budget

    @property
    def simulated(self) -> bool:
        """Whether the device is made of host memory."""
        return self.device.type == "cpu"

    def memory_device(self) -> MemoryDevice:
        """The device as the runtime takes it."""
        if not self.simulated:
            return AcceleratorDevice(self.device)
        from vbcompile.runtime_simulated import SimulatedDevice

        return SimulatedDevice(self.budget)

    @property
    def rates(self) -> Rates:
        """Speeds of the device, as far as they are known."""
        found = self.stack.calibration
        return Rates(self.stack.levels[0].read_rate, found.matmul if found is not None else None)

    def tiers(self, used: bool) -> tuple[Tier, ...]:
        """The levels beyond the device, their links measured; the disk only where it is ``used``."""
        if not used:
            stack = VGPUStack([level for level in self.stack.levels if level.kind != "disk"])
            stack.calibration = self.stack.calibration
            self.stack = stack
        if not self.simulated and self.stack.calibration is None:
            self.stack.calibrate()
        return self.stack.tiers()

    def choose_disk(self, sizes: Sequence[int], beside: int, stored: Sequence[bool]) -> set[int]:
        """Indices of the tensors that host memory has no room for, spread evenly.

        Args:
            beside: Bytes of tensors that stay on the device in any case.
            stored: Whether each tensor can be read from a file that is there already, and takes no room.

        Raises:
            ConfigError: there is not enough room with the disk either, or no disk level.
        """
        room = sum(level.capacity for level in self.stack.levels if level.kind == "host")
        beyond = sum(sizes) - room
        disks = [level for level in self.stack.levels if level.kind == "disk"]
        if beside > self.budget:
            raise ConfigError(
                f"{size_text(beside)} of small tensors stay on {self.device}, and its budget is "
                f"{size_text(self.budget)}: raise "
                "max_memory[0], or make smallest= smaller"
            )
        if beyond <= 0:
            return set()
        if not disks:
            raise ConfigError(
                f"the weights take {size_text(sum(sizes))}, and host memory has room for {size_text(room)}: raise "
                "max_memory['cpu'] or give max_memory['disk'] a folder with free space"
            )
        chosen, passed, given = set[int](), 0, 0
        for index, size in enumerate(sizes):
            passed += size
            if given * sum(sizes) < beyond * passed:
                chosen.add(index)
                given += size
        written, disk = sum(sizes[index] for index in chosen if not stored[index]), disks[0]
        if written > disk.capacity:
            raise ConfigError(
                f"the weights take {size_text(sum(sizes))}, and host memory has room for {size_text(room)}; "
                f"{size_text(written)} would go to {disk.path}, which has room for {size_text(disk.capacity)}: raise "
                "max_memory['cpu'] or name another 'disk'"
            )
        return chosen

    @property
    def folder(self) -> Path:
        """The disk level's folder."""
        return Path(next(level.path for level in self.stack.levels if level.kind == "disk" and level.path is not None))


def find_places(device: str | torch.device | None, max_memory: MaxMemory | None, stack: VGPUStack | None) -> Places:
    """The places that the arguments of :func:`vbcompile.offload` describe.

    Raises:
        ConfigError: they make no sense together.
        DeviceError: the device is not here.
    """
    if stack is not None:
        if max_memory is not None:
            raise ConfigError("pass max_memory or stack, not both")
        return Places(torch.device(stack.device if device is None else device), stack)
    goal = get_device() if device is None else get_unified_backend(device).device
    if goal.type == "cpu":
        return Places(goal, _simulated_stack(max_memory))
    found = create_vgpu_stack(device=goal, max_memory=max_memory)
    return Places(torch.device(found.device), found)


def _simulated_stack(max_memory: MaxMemory | None) -> VGPUStack:
    limits = read_max_memory(max_memory) if max_memory is not None else None
    if limits is None or 0 not in limits.cards:
        raise ConfigError(
            "on a CPU nothing has to leave a device. To try streaming out, say how large the simulated device is: "
            "max_memory={0: '1GiB'}"
        )
    own = create_vgpu_stack(
        device="cpu", max_memory={key: value for key, value in (max_memory or {}).items() if key != 0}
    )
    memory, link = (int(DEFAULT_GBPS[kind] * 10**9) for kind in ("device", "host"))
    levels = [
        VGPULevel(0, "device", "sim:0", limits.cards[0], memory, memory, 0, "given"),
        VGPULevel(1, "host", "cpu", own.budget, link, link, DEFAULT_LATENCY_NS["host"]),
    ]
    for level in own.levels[1:]:
        levels.append(
            VGPULevel(
                2, "disk", "ssd", level.capacity, level.read_rate, level.write_rate, level.latency_ns, path=level.path
            )
        )
    return VGPUStack(levels)


__all__ = ["MaxMemory", "Places", "find_places"]
