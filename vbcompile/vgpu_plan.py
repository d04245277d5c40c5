"""What a streaming plan is made of: the sweep that it serves, the tiers that it draws on, copies, slots and waits.

All sizes are bytes and all times nanoseconds, as integers, so that a plan is the same on every machine. A plan says
where each weight lives, in which order the streamed ones are copied, into which bytes of one fixed ring each goes, what
a copy must wait for before it may overwrite those bytes, and what an operator must wait for before it may read them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from vbcompile.vgpu_files import BLOCK
from vbcompile.vgpu_size import size_text

DEVICE = 0
"""Level number of the device's own memory."""

ALIGNMENT = 256
"""Bytes to which each tensor's place on the device is rounded up."""


class PlanError(ValueError):
    """No plan keeps within the memory that was given.

    Attributes:
        budget: Bytes of device memory that were allowed.
        ring: Bytes that the streaming ring needs at least.
        largest_operator: Name of the operator that decides the ring.
        largest_operator_bytes: Bytes of weights that this operator reads at once.
        minimum_budget: Smallest budget in bytes with which a plan exists; None where no budget helps.
    """

    def __init__(
        self,
        message: str,
        *,
        budget: int,
        ring: int = 0,
        largest_operator: str = "",
        largest_operator_bytes: int = 0,
        minimum_budget: int | None = None,
    ) -> None:
        super().__init__(message)
        self.budget = budget
        self.ring = ring
        self.largest_operator = largest_operator
        self.largest_operator_bytes = largest_operator_bytes
        self.minimum_budget = minimum_budget


@dataclass(frozen=True)
class Weight:
    """One tensor that a step reads and does not write.

    Attributes:
        name: Its qualified name, unique in the sweep.
        nbytes: Size of the payload.
        pinned: It must stay on the device: it is written in place, or an output of the step aliases it.
        home: Level where it lives already and from where it comes unless it stays on the device; None: any level.
    """

    name: str
    nbytes: int
    pinned: bool = False
    home: int | None = None

    def __post_init__(self) -> None:
        _require_count(f"size of weight {self.name!r}", self.nbytes)


@dataclass(frozen=True)
class Operator:
    """One stretch of computation: what is launched between two points at which copies may be waited for.

    Attributes:
        name: For messages and pictures.
        nanoseconds: Its duration with all its weights on the device.
        weights: Indices of the weights that it reads.
    """

    name: str
    nanoseconds: int
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_count(f"duration of operator {self.name!r}", self.nanoseconds)


@dataclass(frozen=True)
class Sweep:
    """One step: its weights, and its operators in order of execution. The step is repeated.

    Attributes:
        reserve: Bytes of device memory that everything other than weights needs at its peak.

    Raises:
        ValueError: an operator names a weight that does not exist, two weights share a name, or a negative number.
    """

    weights: tuple[Weight, ...]
    operators: tuple[Operator, ...]
    reserve: int = 0

    def __post_init__(self) -> None:
        _require_count("reserve", self.reserve)
        if len({weight.name for weight in self.weights}) != len(self.weights):
            raise ValueError("two weights of a sweep have the same name")
        for operator in self.operators:
            wrong = [index for index in operator.weights if not 0 <= index < len(self.weights)]
            if wrong:
                raise ValueError(f"operator {operator.name!r} reads weights {wrong}; there are {len(self.weights)}")

    @cached_property
    def compute_ns(self) -> int:
        """Duration of the step if no weight had to be waited for."""
        return sum(operator.nanoseconds for operator in self.operators)

    @cached_property
    def uses(self) -> tuple[tuple[int, ...], ...]:
        """For each weight, the indices of the operators that read it, in order."""
        found: list[list[int]] = [[] for _ in self.weights]
        for index, operator in enumerate(self.operators):
            for weight in dict.fromkeys(operator.weights):
                found[weight].append(index)
        return tuple(map(tuple, found))


@dataclass(frozen=True)
class Tier:
    """One place beyond the device's memory, and the link that joins it to the next faster one.

    Attributes:
        level: Its number in the stack, 1 or more.
        name: ``cuda:1``, ``cpu`` or ``ssd``.
        capacity: Bytes that weights may take there.
        read_rate: Bytes per second towards the device (from a disk: into host memory).
        write_rate: Bytes per second the other way; 0 means the same.
        latency_ns: Time that one transfer costs beside its bytes.
        via: Level whose link the bytes cross next; None: they arrive on the device.
    """

    level: int
    name: str
    capacity: int
    read_rate: int
    write_rate: int = 0
    latency_ns: int = 0
    via: int | None = None

    def __post_init__(self) -> None:
        for what, value in (("capacity", self.capacity), ("latency", self.latency_ns), ("write rate", self.write_rate)):
            _require_count(f"{what} of level {self.level} ({self.name})", value)
        if _require_count(f"read rate of level {self.level} ({self.name})", self.read_rate) == 0:
            raise ValueError(f"read rate of level {self.level} ({self.name}) is zero: nothing could ever arrive")
        if self.level < 1:
            raise ValueError(f"level {self.level} ({self.name}): level 0 is the device itself")

    def read_ns(self, nbytes: int) -> int:
        """Time of one transfer towards the device, rounded up."""
        return self.latency_ns - (-nbytes * 10**9 // self.read_rate)

    def write_ns(self, nbytes: int) -> int:
        """Time of one transfer away from the device, rounded up."""
        return self.latency_ns - (-nbytes * 10**9 // (self.write_rate or self.read_rate))


@dataclass(frozen=True)
class Copy:
    """A weight's way into its slot of the device ring, in every step.

    Attributes:
        weight: Index of the weight.
        level: Where the weight lives.
        link: Level whose link carries it; copies on one link run in the order of the plan.
        nbytes: Size of the payload.
        offset: First byte of its slot in the ring.
        first_use: Index of the operator that waits for it.
        last_use: Index of the operator after which the slot is released.
        free_after: Operator whose end frees the slot for this copy. Negative: the same operator of the step before, so
            that -1 is the last operator of the step before; nothing waits in the first step.
        read: Index into :attr:`Plan.reads` of the disk read that it takes its bytes from, or None.
    """

    weight: int
    level: int
    link: int
    nbytes: int
    offset: int
    first_use: int
    last_use: int
    free_after: int
    read: int | None = None


@dataclass(frozen=True)
class Read:
    """A weight's way from disk into the host's staging memory, in every step.

    Attributes:
        copy: Index into :attr:`Plan.copies` of the copy that takes it on.
        offset: First byte of its slot; the slot has room for a read that is widened to whole blocks.
        free_after: Index of the copy whose end frees the slot; negative as in :attr:`Copy.free_after`.
    """

    weight: int
    level: int
    nbytes: int
    offset: int
    copy: int
    free_after: int


@dataclass(frozen=True)
class Prediction:
    """What one step takes once it runs evenly.

    Attributes:
        step_ns: Time of one step.
        stall_ns: Part of it in which computation waits for a copy.
        roofline_ns: No plan for this budget can be faster.
        link_bytes: Bytes per step and link, by level number.
        bottleneck: ``compute``, or the name of the tier whose link is busiest.
    """

    step_ns: int
    stall_ns: int
    roofline_ns: int
    link_bytes: Mapping[int, int] = field(default_factory=dict)
    bottleneck: str = "compute"

    @property
    def efficiency(self) -> float:
        """Share of the roofline, at most 1."""
        return self.roofline_ns / self.step_ns if self.step_ns else 1.0


class Instruction(NamedTuple):
    """One entry of a step's program; ``target`` is a copy, or an operator where ``action`` is ``run``."""

    action: Literal["prefetch", "wait", "run", "release"]
    target: int


@dataclass(frozen=True)
class Plan:
    """Where each weight lives and how the streamed ones reach the device.

    Attributes:
        sweep: The step that is planned.
        budget: Bytes of device memory allowed, ``sweep.reserve`` included.
        tiers: The places beyond the device.
        levels: Level number of each weight; 0 is the device.
        copies: Copies of one step in order.
        reads: Disk reads of one step in order.
        ring_bytes: Size of the device arena that all copies share.
        staging_bytes: Size of the host arena that all reads share.
        prediction: Times on the simulated clock.
        alignment: Bytes to which sizes on the device are rounded.
    """

    sweep: Sweep
    budget: int
    tiers: tuple[Tier, ...]
    levels: tuple[int, ...]
    copies: tuple[Copy, ...]
    reads: tuple[Read, ...]
    ring_bytes: int
    staging_bytes: int
    prediction: Prediction
    alignment: int = ALIGNMENT

    @property
    def declined(self) -> bool:
        """Whether everything fits on the device, so that nothing is to be rewritten."""
        return not any(self.levels)

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes of the weights that stay on the device."""
        return sum(
            padded(weight.nbytes, self.alignment)
            for weight, level in zip(self.sweep.weights, self.levels, strict=True)
            if level == DEVICE
        )

    @property
    def peak_bytes(self) -> int:
        """Most device memory in use at any time: resident weights, the ring, and what is not weights."""
        return self.resident_bytes + self.ring_bytes + self.sweep.reserve

    @property
    def streamed_bytes(self) -> int:
        """Bytes that reach the device in each step."""
        return sum(copy.nbytes for copy in self.copies)

    @cached_property
    def bytes_per_level(self) -> dict[int, int]:
        """Bytes of weights that live on each level."""
        total = dict.fromkeys((DEVICE, *(tier.level for tier in self.tiers)), 0)
        for weight, level in zip(self.sweep.weights, self.levels, strict=True):
            total[level] += weight.nbytes
        return total

    @cached_property
    def waits(self) -> tuple[tuple[int, ...], ...]:
        """For each operator, the copies that it waits for."""
        return self._by_operator([copy.first_use for copy in self.copies])

    @cached_property
    def releases(self) -> tuple[tuple[int, ...], ...]:
        """For each operator, the copies whose slot is free at its end."""
        return self._by_operator([copy.last_use for copy in self.copies])

    @cached_property
    def issue_after(self) -> tuple[int, ...]:
        """For each copy, the operator after which it is handed to its link; negative: in the step before.

        A copy may be handed over once the operator that frees its slot has been launched. Copies of one link keep
        their order.
        """
        latest: dict[int, int] = {}
        found = []
        for copy in self.copies:
            latest[copy.link] = max(copy.free_after, latest.get(copy.link, copy.free_after))
            found.append(latest[copy.link])
        return tuple(found)

    @property
    def prologue(self) -> tuple[int, ...]:
        """Copies that are under way when a step begins; the first step starts with them."""
        return tuple(index for index, after in enumerate(self.issue_after) if after < 0)

    def program(self) -> Iterator[Instruction]:
        """One step as the runtime has to launch it, after :attr:`prologue` (first step) or the step before.

        A ``prefetch`` behind the point where its slot's last reader was launched may belong to the next step: its index
        is then one of :attr:`prologue`.
        """
        count = len(self.sweep.operators)
        issued = self._by_operator([after % count for after in self.issue_after]) if count else ()
        for index in range(count):
            for copy in self.waits[index]:
                yield Instruction("wait", copy)
            yield Instruction("run", index)
            for copy in self.releases[index]:
                yield Instruction("release", copy)
            for copy in issued[index]:
                yield Instruction("prefetch", copy)

    def tier(self, level: int) -> Tier:
        """The tier of a level number. Raises KeyError for level 0 and unknown numbers."""
        return {tier.level: tier for tier in self.tiers}[level]

    def to_dict(self) -> dict[str, Any]:
        """Everything in the plan, ready for JSON."""
        return asdict(self) | {
            "declined": self.declined,
            "peak_bytes": self.peak_bytes,
            "resident_bytes": self.resident_bytes,
            "streamed_bytes": self.streamed_bytes,
            "bytes_per_level": self.bytes_per_level,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def summary(self) -> str:
        """One line for the log."""
        if self.declined:
            return f"fits: {size_text(self.peak_bytes)} of {size_text(self.budget)}, nothing is streamed"
        prediction = self.prediction
        return (
            f"{size_text(self.resident_bytes)} resident, {size_text(self.streamed_bytes)} per step through a ring of "
            f"{size_text(self.ring_bytes)}; predicted step {prediction.step_ns / 1e6:.3f} ms, "
            f"{prediction.efficiency:.1%} of the roofline, bottleneck {prediction.bottleneck}"
        )

    def _by_operator(self, operator_of: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.sweep.operators]
        for copy, operator in enumerate(operator_of):
            found[operator].append(copy)
        return tuple(map(tuple, found))


def padded(nbytes: int, alignment: int) -> int:
    """Bytes rounded up to a multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


def staged(nbytes: int) -> int:
    """Bytes of staging for a disk read of a tensor that may begin and end inside a block."""
    return padded(nbytes, BLOCK) + BLOCK


def _require_count(what: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} must be an integer of at least 0, not {value!r}")
    return value
