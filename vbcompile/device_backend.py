"""One class for every device (:class:`DeviceBackend`), and one that knows them all (:class:`UnifiedDeviceManager`)."""

import difflib
import functools
import gc
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vbcompile.device_vendors import PRIORITY, Availability, DeviceError, probe
from vbcompile.vgpu_size import GIB

log = logging.getLogger(__name__)

_OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda"} | {
    "gaudi": "hpu",
    "habana": "hpu",
    "ascend": "npu",
    "huawei": "npu",
    "intel": "xpu",
}


class DeviceBackend:
    """Names, memory and synchronisation of one kind of device, under the same calls for every vendor.

    A backend for a device that cannot be used here can be built and asked ``is_available()``; every other call on it
    raises :class:`DeviceError` with the reason and the repair. AMD cards have the device type ``cuda``, as in PyTorch;
    ``vendor`` tells them apart.

    Args:
        device: ``"cuda"``, ``"cuda:1"``, ``"hpu"``, ``"npu"``, ``"xpu"``, ``"cpu"`` or a ``torch.device``.

    Raises:
        DeviceError: unknown device, or an index beyond the cards that are present.

    Every ``index`` below selects a card; None means the card that the backend was built for, which is card 0 where
    the device named none.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device_type, self._index = parse_device(device)
        if self._index is not None and self.is_available():
            self._checked(self._index)

    def __repr__(self) -> str:
        return f"DeviceBackend({self._name(self._index)!r})"

    @property
    def _availability(self) -> Availability:
        return probe(self.device_type)

    @property
    def device(self) -> torch.device:
        """The device as PyTorch names it."""
        self._module()
        return torch.device(self._name(self._index) if self.device_type != "cpu" else "cpu")

    @property
    def vendor(self) -> str:
        """``nvidia``, ``amd``, ``habana``, ``huawei``, ``intel`` or ``cpu``."""
        return self._availability.platform.vendor

    def is_available(self) -> bool:
        """Whether a card of this type can be used."""
        return self._availability.ready

    def device_count(self) -> int:
        """Number of usable cards of this type; 1 for the CPU, 0 where the type cannot be used."""
        return self._availability.count

    def current_index(self) -> int:
        """Index of the card that PyTorch would use now (``torch.cuda.set_device`` and its like decide)."""
        return int(self._module().current_device())

    def get_device_name(self, index: int | None = None) -> str:
        """What the vendor calls the card."""
        return str(self._module().get_device_name(self._checked(index)))

    def get_device_properties(self, index: int | None = None) -> Any:
        """The vendor's own properties object; what it holds beyond ``name`` differs between vendors.

        :func:`vbcompile.device.get_target` gives the same facts for all vendors.
        """
        return self._module().get_device_properties(self._checked(index))

    def memory_allocated(self, index: int | None = None) -> int:
        """Bytes in live tensors; on the CPU, resident bytes of this process."""
        return self._memory_counter("memory_allocated", index)

    def memory_reserved(self, index: int | None = None) -> int:
        """Bytes held by the caching allocator, in use or not.

        Gaudi's own counter gives the size of the card instead, so there, as on the CPU, the allocated bytes are given.
        """
        if self._availability.platform.reserved_is_limit:
            return self.memory_allocated(index)
        return self._memory_counter("memory_reserved", index)

    def max_memory_allocated(self, index: int | None = None) -> int:
        """Largest ``memory_allocated`` so far, in bytes."""
        return self._memory_counter("max_memory_allocated", index)

    def mem_get_info(self, index: int | None = None) -> tuple[int, int]:
        """(free, total) bytes of the card, all processes counted; on the CPU, within the container's limit.

        Raises:
            DeviceError: also where the driver does not tell, as for some Intel cards.
        """
        card = self._checked(index)
        try:
            free, total = self._module().mem_get_info(card)
        except (RuntimeError, AttributeError) as error:
            raise DeviceError(f"{self._name(card)}: the driver does not tell the free memory: {error}") from error
        return int(free), int(total)

    def total_memory(self, index: int | None = None) -> int | None:
        """Size of the card's memory in bytes, or None where neither its properties nor the driver tell."""
        total = getattr(self.get_device_properties(index), "total_memory", None)
        if total is not None:
            return int(total)
        return _or_none(lambda: self.mem_get_info(index)[1])

    def empty_cache(self) -> None:
        """Give the allocator's unused memory back to the driver, where the vendor has such a call (Gaudi has none)."""
        release = getattr(self._module(), "empty_cache", None)
        if release is not None:
            release()

    def to_device(self, tensor: Any) -> Any:
        """The tensor (or module) on this device; the same object if it is there already."""
        return tensor.to(self.device)

    def synchronize(self, index: int | None = None) -> None:
        """Wait until all work queued on the card is done."""
        self._module().synchronize(self._checked(index))

    def get_memory_summary(self) -> dict[str, Any]:
        """Memory of every card of this type.

        Returns:
            ``{"device_type", "vendor", "device_count", "devices": [{"index", "name", "allocated_gb", "reserved_gb",
            "max_allocated_gb", "free_gb", "total_gb"}]}``; one gb is 2**30 bytes. No cards: an empty list. A figure
            that the vendor does not tell is None.
        """
        cards = [self._card_memory(index) for index in range(self.device_count())]
        return {
            "device_type": self.device_type,
            "vendor": self.vendor,
            "device_count": len(cards),
            "devices": cards,
        }

    def memory_use(self, index: int | None = None) -> dict[str, float | None]:
        """``{"allocated_gb", "reserved_gb", "max_allocated_gb"}`` of one card; one gb is 2**30 bytes.

        A figure that the vendor does not tell is None.
        """
        card = self._checked(index)
        return {
            "allocated_gb": _gb(lambda: self.memory_allocated(card)),
            "reserved_gb": _gb(lambda: self.memory_reserved(card)),
            "max_allocated_gb": _gb(lambda: self.max_memory_allocated(card)),
        }

    def _card_memory(self, index: int) -> dict[str, Any]:
        sizes = {
            "free_gb": _gb(lambda: self.mem_get_info(index)[0]),
            "total_gb": _gb(lambda: self.total_memory(index)),
        }
        return {"index": index, "name": self.get_device_name(index)} | self.memory_use(index) | sizes

    def _name(self, index: int | None) -> str:
        return self.device_type if index is None else f"{self.device_type}:{index}"

    def _module(self) -> Any:
        if not self.is_available():
            raise DeviceError(f"{self._availability.refusal}. Devices that can be used: {', '.join(valid_devices())}")
        return self._availability.module

    def _checked(self, index: int | None) -> int:
        """The card's index, proved to exist."""
        self._module()
        index = (self._index or 0) if index is None else index
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.device_count():
            raise DeviceError(f"no device {self.device_type}:{index}; valid devices: {', '.join(valid_devices())}")
        return index

    def _memory_counter(self, counter: str, index: int | None) -> int:
        """Ask the vendor's module, then ``torch.accelerator``: some vendors lack one, some the other."""
        card = self._checked(index)
        sources = [self._module()]
        current = torch.accelerator.current_accelerator()
        if current is not None and current.type == self.device_type:
            sources.append(torch.accelerator)
        failures = []
        for source in sources:
            try:
                return int(getattr(source, counter)(card))
            except (AttributeError, RuntimeError) as error:
                failures.append(str(error).strip().partition("\n")[0])
        raise DeviceError(f"{self._name(card)}: {counter} is not known: {'; '.join(failures)}")


@dataclass(frozen=True)
class DeviceChoice:
    """A chosen device, with the reason for each device that was asked for or comes before it and was passed over."""

    device: torch.device
    passed_over: tuple[str, ...] = ()


@dataclass
class UnifiedDeviceManager:
    """All devices of this machine. ``last_choice`` keeps what the last :meth:`get_best_device` decided, and why."""

    last_choice: DeviceChoice | None = None
    _warned: set[str] = field(default_factory=set)

    def get_all_devices(self) -> list[torch.device]:
        """Every usable card in order of priority, then the CPU."""
        return [torch.device(name) for name in valid_devices()]

    def get_best_device(
        self,
        prefer_npu: bool = False,
        prefer_hpu: bool = False,
        prefer_xpu: bool = False,
        force_cpu: bool = False,
    ) -> torch.device:
        """The device to use: the CPU if forced, else the first usable of the preferred ones, else of the priority list.

        A preference that cannot be met is logged as a warning with its reason, its repair and what is used instead. So
        is passing over a card that the system shows, or a vendor's package that is installed and finds none. Several
        preferences are tried in order of priority: Gaudi, Ascend, Intel GPU.
        """
        wanted = [name for name, flag in (("hpu", prefer_hpu), ("npu", prefer_npu), ("xpu", prefer_xpu)) if flag]
        self.last_choice = DeviceChoice(torch.device("cpu")) if force_cpu else self.choose(*wanted)
        return self.last_choice.device

    def choose(self, *wanted: str) -> DeviceChoice:
        """The first usable of the device types ``wanted``, then of the priority list, without recording it."""
        kinds = [*dict.fromkeys((*wanted, *PRIORITY))]
        passed_over = [*itertools.takewhile(lambda found: not found.ready, map(probe, kinds))]
        chosen = kinds[len(passed_over)]  # the CPU is always usable
        for found in passed_over:
            expected = found.platform.card_seen() or (found.platform.distribution and found.state != "missing")
            if found.platform.device_type in wanted or expected:
                self._warn_once(f"{found.refusal}. Instead {chosen} is used")
        return DeviceChoice(torch.device(chosen), tuple(found.refusal for found in passed_over))

    def get_backend(self, device: str | torch.device | None = None) -> DeviceBackend:
        """The backend of a usable device; None: of the best one.

        Raises:
            DeviceError: unknown or unusable device; the message names the package to install or the repair.
        """
        backend = DeviceBackend(self.choose().device if device is None else device)
        backend._module()
        return backend

    def get_device_summary(self) -> dict[str, Any]:
        """What is here, ready for JSON.

        Returns:
            ``{"total_devices", "cuda_devices", "hpu_devices", "npu_devices", "xpu_devices", "cpu_devices", "devices"}``
            where each of ``devices`` is ``{"device", "device_type", "vendor", "index", "name", "total_gb"}`` and one
            gb is 2**30 bytes. The CPU counts as one device.
        """
        backends = [self.get_backend(device) for device in valid_devices()]
        counts = {f"{kind}_devices": probe(kind).count for kind in PRIORITY}
        return {"total_devices": len(backends)} | counts | {"devices": [_describe(backend) for backend in backends]}

    def cleanup_all(self) -> None:
        """Collect garbage, then give unused device memory back on every device type that is present."""
        gc.collect()
        for kind in PRIORITY:
            if probe(kind).ready:
                DeviceBackend(kind).empty_cache()

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("passing over %s", message)


@functools.cache
def get_device_manager() -> UnifiedDeviceManager:
    """The manager of this process, always the same object."""
    return UnifiedDeviceManager()


def valid_devices() -> list[str]:
    """Names of all usable devices, e.g. ``["cuda:0", "cuda:1", "cpu"]``."""
    cards = [f"{kind}:{index}" for kind in PRIORITY if kind != "cpu" for index in range(probe(kind).count)]
    return [*cards, "cpu"]


def parse_device(device: str | torch.device) -> tuple[str, int | None]:
    """Split a device into type and index, without asking whether it is present.

    Raises:
        DeviceError: not one of the device types that this package knows, or a malformed index.
    """
    if not isinstance(device, (str, torch.device)):
        raise DeviceError(f"a device is a string or torch.device, not {device!r}; valid: {', '.join(valid_devices())}")
    kind, colon, index = str(device).partition(":")
    if kind not in PRIORITY:
        near = _OTHER_NAMES.get(kind.lower()) or next(iter(difflib.get_close_matches(kind.lower(), PRIORITY, 1)), None)
        hint = f"; did you mean {near!r}?" if near else ""
        raise DeviceError(f"unknown device {str(device)!r}; valid devices: {', '.join(valid_devices())}{hint}")
    if colon and not (index.isascii() and index.isdecimal()):
        raise DeviceError(f"malformed device {str(device)!r}; valid devices: {', '.join(valid_devices())}")
    return kind, int(index) if colon else None


def _describe(backend: DeviceBackend) -> dict[str, Any]:
    return {
        "device": str(backend.device),
        "device_type": backend.device_type,
        "vendor": backend.vendor,
        "index": backend._checked(None),
        "name": backend.get_device_name(),
        "total_gb": _gb(backend.total_memory),
    }


def _or_none(ask: Callable[[], int | None]) -> int | None:
    try:
        return ask()
    except DeviceError as error:
        log.debug("%s", error)
        return None


def _gb(ask: Callable[[], int | None]) -> float | None:
    size = _or_none(ask)
    return None if size is None else size / GIB
