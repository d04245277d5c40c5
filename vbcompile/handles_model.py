"""``vbcompile.offload`` and ``vbcompile.materialize``: a model's weights leave the device, and come back."""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from vbcompile import compat
from vbcompile.handles import OffloadedTensor
from vbcompile.handles_checkpoint import Checkpoint, open_checkpoint
from vbcompile.handles_memory import batches, fill
from vbcompile.handles_payload import Payload
from vbcompile.handles_places import Places, find_places
from vbcompile.handles_store import WeightStore
from vbcompile.runtime_shards import Shard
from vbcompile.runtime_sources import DiskBytes, HostBytes, Source
from vbcompile.vgpu import VGPUStack
from vbcompile.vgpu_size import parse_size, size_text

log = logging.getLogger(__name__)

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_COMFORTABLE = (3, 4)  # share of the budget that weights may take before any has to leave
_TRAINING_PARTS = 3  # gradient, first and second moment
_declined: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_hooks: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


@dataclass
class _Site:
    """One tensor of a model, and everywhere it is registered."""

    name: str
    value: Tensor
    owners: list[tuple[nn.Module, str]]

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.element_size()


def offload(
    model: nn.Module,
    device: str | torch.device | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    stack: VGPUStack | None = None,
    smallest: int | str = "1MiB",
    progress: bool | None = None,
) -> nn.Module:
    """Keep a model's weights beyond the device's memory; ``torch.compile(model, backend="vblackwell")`` streams them.

    A model that fits comfortably just moves to the device, and :func:`vbcompile.stats` says so. Otherwise large
    parameters and buffers become :class:`vbcompile.OffloadedTensor`: of the device in name, with their bytes in pinned
    host memory or on disk, and small ones move to the device. Make optimizers afterwards.

    Args:
        model: On the CPU, on the device, or on the meta device with ``checkpoint``; changed in place.
        device: Where it computes; None: the best one here. ``"cpu"`` simulates a device of ``max_memory[0]`` bytes in
            host memory, to try things out.
        max_memory: Accelerate's vocabulary: ``{0: "20GiB", "cpu": "96GiB", "disk": "/nvme/vb"}``. Bytes of the device
            include activations. None: ``VB_HBM_BUDGET``, or what is free.
        checkpoint: Safetensors file or folder with the weights of a model on the meta device. Weights that host memory
            has no room for are read from there in every step if ``max_memory`` names a ``disk``, where they then take
            no room.
        stack: The tiers, instead of ``max_memory``.
        smallest: Tensors of fewer bytes stay ordinary ones on the device.
        progress: Show a bar; None: on a terminal.

    Returns:
        The model itself.

    Raises:
        ValueError: the model carries Accelerate's hooks, is compiled or offloaded already, or is on the meta device
            without a checkpoint; the message says what to do.
        ConfigError: ``max_memory`` makes no sense, or has no room for the weights.
        StorageError: the checkpoint or the disk's folder cannot be used.
    """
    _refuse(model, checkpoint)
    least = parse_size("smallest", smallest)
    places = find_places(device, max_memory, stack)
    found = open_checkpoint(model, checkpoint) if checkpoint is not None else None
    sites = _sites(model)
    large = [site for site in sites if site.nbytes >= least and _is_plain(site.value)]
    chosen = {id(site) for site in large}
    small = [site for site in sites if id(site) not in chosen]
    beside = sum(site.nbytes for site in small)
    reason = _fits(model, sites, places)
    origin = _Origin(found, places)
    stored = [origin.on_disk(site) is not None for site in large]
    on_disk = set() if reason else places.choose_disk([site.nbytes for site in large], beside, stored)
    if not (reason or large):
        reason = (
            f"declined, no tensor has {size_text(least)} or more: smallest= says from what size on one is kept "
            "elsewhere"
        )
    if reason:
        for site in sites:
            _move(site, found, places.device)
        _declined[model] = reason
        log.info("offload: %s", reason)
        return model
    tiers = places.tiers(bool(on_disk))
    for site in small:
        _move(site, found, places.device)
    store = WeightStore(places.device, places.memory_device, places.budget, tiers, places.host, places.rates, beside)
    store.stack = places.stack
    with _bar(progress, sum(site.nbytes for site in large)) as advance:
        _take_over(large, on_disk, origin, store, advance)
    for module in {id(module): module for site in large for module, _ in site.owners}.values():
        _hooks[module] = module.register_state_dict_post_hook(_plain_state)
    log.info("offload: %d tensors, %s", len(large), store.masters())
    return model


def materialize(model: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """Undo :func:`offload`: every offloaded tensor becomes an ordinary one.

    Args:
        model: Changed in place; compiled graphs of it are compiled anew.
        device: None: the device that it computes on.

    Returns:
        The model itself.

    Raises:
        torch.OutOfMemoryError: it does not fit there.
    """
    plain: dict[int, Tensor] = {}
    stores: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in list(table.items()):
                if not isinstance(value, OffloadedTensor):
                    continue
                stores[id(value.payload.residence)] = value.payload.residence
                if id(value) not in plain:
                    plain[id(value)] = _ordinary(value, device)
                table[name] = plain[id(value)]  # type: ignore[assignment]
        hook = _hooks.pop(module, None)
        if hook is not None:
            hook.remove()
    for store in stores.values():
        if store is not None:
            store.stop()
    return model


def _ordinary(value: OffloadedTensor, device: str | torch.device | None) -> Tensor:
    goal = value.device if device is None else torch.device(device)
    tensor = value.payload.on_host().to(goal, copy=True)
    return nn.Parameter(tensor, value.requires_grad) if isinstance(value, nn.Parameter) else tensor


def offloaded_tensors(model: nn.Module) -> dict[str, OffloadedTensor]:
    """The offloaded parameters and buffers of a model by name, each once."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value for name, value in named.items() if isinstance(value, OffloadedTensor)}


NOT_OFFLOADED = "nothing of this model is offloaded: call vbcompile.offload(model, ...) first"


def stores_of(model: nn.Module) -> list[WeightStore]:
    """The stores of a model's offloaded weights."""
    stores = {id(h.payload.residence): h.payload.residence for h in offloaded_tensors(model).values()}
    return [store for store in stores.values() if isinstance(store, WeightStore)]


def _refuse(model: nn.Module, checkpoint: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"offload takes a torch.nn.Module, not {type(model).__name__}")
    if compat.is_compiled_module(model):
        raise ValueError("offload the model before torch.compile: pass the module that was compiled (model._orig_mod)")
    hooked = next((name for name, module in model.named_modules() if hasattr(module, "_hf_hook")), None)
    if hooked is not None:
        raise ValueError(
            f"the model carries Accelerate's hooks (first at {hooked!r}), which move weights on their own. Load it "
            "without device_map, or call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any(isinstance(value, OffloadedTensor) for value in state.values()):
        raise ValueError("the model is offloaded already: call vbcompile.materialize(model) first")
    on_meta = next((name for name, value in state.items() if value.is_meta), None)
    if on_meta is not None and checkpoint is None:
        raise ValueError(
            f"{on_meta!r} is on the meta device and has no content: pass checkpoint='folder with safetensors files', "
            "or load the model first"
        )


def _sites(model: nn.Module) -> list[_Site]:
    found: dict[int, _Site] = {}
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    found.setdefault(id(value), _Site(full, value, [])).owners.append((module, name))
    return list(found.values())


def _fits(model: nn.Module, sites: list[_Site], places: Places) -> str:
    """Why nothing has to leave the device; empty where the weights, or what training adds to them, are too large.

    Between this and what really fits, the compiled graph's own plan decides.
    """
    weights = sum(site.nbytes for site in sites)
    trained = sum(site.nbytes for site in sites if model.training and site.value.requires_grad)
    needed = weights + _TRAINING_PARTS * trained
    if needed * _COMFORTABLE[1] > places.budget * _COMFORTABLE[0]:
        return ""
    return (
        f"declined, the model fits: {size_text(weights)} of weights ({size_text(needed)} with what training adds), and "
        f"{size_text(places.budget)} of {places.device} are allowed"
    )


def why_declined(model: nn.Module) -> str | None:
    """Why :func:`offload` left a model on the device; None where it did not."""
    return _declined.get(getattr(model, "_orig_mod", model))


def _is_plain(value: Tensor) -> bool:
    return type(value) in _PLAIN and value.layout is torch.strided and not value.is_quantized


def _move(site: _Site, checkpoint: Checkpoint | None, device: torch.device) -> None:
    """A tensor that stays an ordinary one."""
    if site.value.is_meta:
        assert checkpoint is not None
        value = checkpoint.read(site.name, site.value).to(device)
        if isinstance(site.value, nn.Parameter):
            value = nn.Parameter(value, site.value.requires_grad)
        for module, name in site.owners:
            table = module._parameters if name in module._parameters else module._buffers
            table[name] = value  # type: ignore[assignment]
    elif site.value.device != device:
        with torch.no_grad():
            site.value.data = site.value.data.to(device)


@dataclass(frozen=True)
class _Origin:
    """Where content comes from, and where it may go."""

    checkpoint: Checkpoint | None
    places: Places

    def value(self, site: _Site) -> Tensor:
        if not site.value.is_meta:
            return site.value
        assert self.checkpoint is not None
        return self.checkpoint.read(site.name, site.value)

    def on_disk(self, site: _Site) -> DiskBytes | None:
        """The checkpoint's own bytes, where they can be used as they are."""
        if self.checkpoint is None or not site.value.is_meta:
            return None
        return self.checkpoint.source(site.name, site.value)


def _take_over(
    sites: list[_Site], on_disk: set[int], origin: _Origin, store: WeightStore, advance: Callable[[int], Any]
) -> None:
    sources: dict[int, Source | None] = {index: origin.on_disk(sites[index]) for index in on_disk}
    unsaved = [sites[index] for index, source in sources.items() if source is None]
    if unsaved:
        store.file = _shard(unsaved, origin)
        sources |= {index: store.file.sources[sites[index].name] for index in on_disk if sources[index] is None}
    for chosen in batches([site.value for site in sites]):
        kept = [index for index in chosen if index not in on_disk]
        memory = dict(zip(kept, store.host.allocate([sites[index].nbytes for index in kept]), strict=True))
        for index in chosen:
            site = sites[index]
            source = sources.get(index)
            if source is None:
                fill(memory[index], origin.value(site))
                source = HostBytes(memory[index])
            nbytes = site.nbytes
            _replace(site, Payload(site.name, site.value, store.device, source), store)
            advance(nbytes)


def _shard(sites: list[_Site], origin: _Origin) -> Shard:
    """A file of weights that are in no checkpoint."""
    by_name = {site.name: site for site in sites}

    def load(name: str) -> Tensor:
        memory = torch.empty(by_name[name].nbytes, dtype=torch.uint8)
        fill(memory, origin.value(by_name[name]))
        return memory

    return Shard(origin.places.folder, {name: site.nbytes for name, site in by_name.items()}, load)


def _replace(site: _Site, payload: Payload, store: WeightStore) -> None:
    store.add(payload)
    handle: Tensor = OffloadedTensor.of(payload)
    if isinstance(site.value, nn.Parameter):
        handle = nn.Parameter(handle, requires_grad=site.value.requires_grad)
    for module, name in site.owners:
        table = module._parameters if name in module._parameters else module._buffers
        table[name] = handle  # type: ignore[assignment]
    site.value = torch.empty(0)  # the old memory goes as soon as nobody else holds it


def _plain_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Files and other programs get ordinary tensors on the CPU; tied ones share their memory."""
    for table in (module._parameters, module._buffers):
        for name, value in table.items():
            if isinstance(value, OffloadedTensor) and isinstance(state.get(prefix + name), OffloadedTensor):
                state[prefix + name] = value.payload.on_host()


@contextmanager
def _bar(wanted: bool | None, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar in bytes."""
    from tqdm import tqdm

    disabled = None if wanted is None else not wanted
    with tqdm(total=total, unit="B", unit_scale=True, desc="offload", disable=disabled) as bar:
        yield bar.update
