"""Packed copies of live weights: each made once, shared by all graphs, and made again when the weight changes.

A weight is known by identity. What tells that it was written to, at every call of a compiled graph:

- its version counter and its address: in-place operations, ``load_state_dict``, optimizers, new memory;
- steps of any ``torch.optim`` optimizer that holds it, however it writes;
- on CPUs a few sampled elements, which show almost every write through ``weight.data`` or NumPy;
- by the option ``fp4_watch="contents"`` a checksum of the whole weight, which shows them on every device.

For writes that none of these sees there is :func:`requantize`.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from vbcompile.kernels.fp4 import PackedWeight, concat_rows, row_ranges, row_scales, take_rows
from vbcompile.kernels.fp4_epilogue import turns
from vbcompile.kernels.fp4_grouped import to_grouped_layout
from vbcompile.kernels.fp4_layout import LinearWeight, refuses_layout, to_layout
from vbcompile.kernels.fp4_linear_fp8 import multiplies_fp8
from vbcompile.kernels.fp4_linear_triton import preferred_layout
from vbcompile.kernels.fp4_native import native_layout
from vbcompile.kernels.fp4_quantize import quantize, relative_error
from vbcompile.kernels.registry import as_text
from vbcompile.passes.pass_context import PassContext

_SAMPLED = 4  # rows, and columns, of a weight that are looked at


@dataclass(frozen=True)
class PackKey:
    """How weights are packed.

    Attributes:
        layout: the layout to use where it can hold the weights, else ``plain``.
        transposed: the parameter is ``[K, N]``.
        method: of rounding weights that were not packed before, see :mod:`vbcompile.kernels.fp4_quantize`.
        gate: which half of the rows is a gate's, ``first`` or ``second``, to be packed in turns with the other half
            (:mod:`vbcompile.kernels.fp4_epilogue`); empty for rows as they are.
        implementations: the option of that name, as text.
    """

    format_name: str
    layout: str
    transposed: bool
    method: str = "mse"
    gate: str = ""
    implementations: str = ""


def pack_key(
    context: PassContext, format_name: str, transposed: bool, dtype: torch.dtype, rows: int | None, linear: bool = True
) -> PackKey:
    """How a weight is packed for the products that it will get under the options.

    Args:
        context: what a pass may know.
        dtype, rows: of the activation; None for rows that are not known.
        linear: whether the weight is of a linear layer, not a stack of experts.
    """
    target, activations = context.target, context.config.fp4_activations
    # tiles, but for hardware that reads FP4 as it is; gradients are made from tiles
    native = linear and not context.training
    layout = native_layout(target, format_name, activations, dtype, rows) if native else None
    in_fp8 = linear and activations == "fp8" and multiplies_fp8(target)
    asked, method = as_text(context.implementations), "fp8" if in_fp8 else "mse"
    return PackKey(format_name, layout or preferred_layout(target), transposed, method, implementations=asked)


@dataclass(eq=False)
class WeightState:
    """What is known of one live weight.

    Attributes:
        weight: weak reference to it.
        contents: number that changes when the weight's values do.
        version, address: of the weight when it was last looked at.
        sample, checksum: of its values then; None where they were not looked at.
        canonical: packed forms that stand for the weight's values, by format, orientation and the quantiser's method
            (empty: loaded so): those that it was loaded in, or was given up for; with their relative error.
        master: the values in host memory, where they were moved there.
        dropped: whether the weight's own memory was given up.
    """

    weight: weakref.ref[Tensor]
    contents: int
    version: int
    address: int
    sample: list[object] | None = None
    checksum: int | None = None
    canonical: dict[tuple[str, bool, str], tuple[PackedWeight, float]] = field(default_factory=dict)
    master: Tensor | None = None
    dropped: bool = False

    def look(self, weight: Tensor, watch: str) -> int:
        """Compare the weight with what was last seen of it, and return the number of its contents."""
        if not self.is_as_seen(weight):
            self.changed(weight)
        elif not self.dropped and looks_inside(weight, watch):
            self._look_inside(weight, watch)
        return self.contents

    def is_as_seen(self, weight: Tensor) -> bool:
        """Whether this is the weight, with the version and address that it had."""
        return self.weight() is weight and weight._version == self.version and weight.data_ptr() == self.address

    def _look_inside(self, weight: Tensor, watch: str) -> None:
        if weight.device.type == "cpu":
            sample = _sample(weight)
            if self.sample not in (None, sample):
                self.changed(weight)
            self.sample = sample
        if watch == "contents":
            checksum = _checksum(weight)
            if self.checksum not in (None, checksum):
                self.changed(weight)
            self.checksum = checksum

    def changed(self, weight: Tensor) -> None:
        """The weight has, or may have, other values than before."""
        self.contents += 1
        self.seen(weight)
        self.canonical, self.master, self.dropped = {}, None, False

    def seen(self, weight: Tensor) -> None:
        """What the weight is now is what is known of it."""
        self.version, self.address = weight._version, weight.data_ptr()
        self.sample = self.checksum = None


def looks_inside(weight: Tensor, watch: str) -> bool:
    """Whether values of a weight are looked at, besides its version and address."""
    return weight.device.type == "cpu" or watch == "contents"


@dataclass(eq=False)
class Packed:
    """The packed copy of one weight, or of several below one another.

    Attributes:
        states: of the weights, with the number of the contents that each was packed from.
        linear: tensors for the operator; their memory stays the same when the weights are packed again.
        errors: relative error ``|W - Q| / |W|`` of each weight.
    """

    states: list[tuple[WeightState, int]]
    linear: LinearWeight
    errors: list[float]

    def is_current(self, weights: Sequence[Tensor], watch: str) -> bool:
        """Whether these are the weights that were packed, unchanged since."""
        return all(
            state.weight() is weight and state.look(weight, watch) == contents
            for (state, contents), weight in zip(self.states, weights, strict=True)
        )


_states: dict[int, WeightState] = {}
_packed: dict[tuple[tuple[int, ...], PackKey], Packed] = {}
_lock = threading.RLock()
_hooked: list[object] = []


def state_of(weight: Tensor) -> WeightState:
    """The state of a live weight; begins to watch it where it is new."""
    with _lock:
        state = _states.get(id(weight))
        if state is not None and state.weight() is weight:
            return state
        _watch_optimizers()
        identity = id(weight)
        reference = weakref.ref(weight, lambda gone: _forget_identity(identity, gone))
        state = _states[identity] = WeightState(reference, 0, weight._version, weight.data_ptr())
        return state


def _forget_identity(identity: int, reference: weakref.ref[Tensor] | None) -> None:
    with _lock:
        if reference is not None and identity in _states and _states[identity].weight is not reference:
            return  # another weight has the identity by now
        _states.pop(identity, None)
        for key in [key for key in _packed if identity in key[0]]:
            del _packed[key]


def _watch_optimizers() -> None:
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Optimizer, args: object, keywords: object) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = _states.get(id(weight))
            live = None if state is None else state.weight()
            if state is not None and live is not None and live is weight:
                state.changed(live)


# -------------------------------------------------------------------------------------------------------------- packing
def pack(
    weights: Sequence[Tensor], key: PackKey, names: Sequence[str], watch: str = "samples", keep: bool = False
) -> Packed:
    """The current packed copy of ``weights``, one below the other; quantizes those that are new or have changed.

    With ``keep`` the packed form of each also stays in host memory, for :func:`give_up`.

    Raises:
        ValueError: a weight cannot be packed, for the reasons of :func:`vbcompile.kernels.fp4_quantize.quantize`.
    """
    with _lock:
        identity = (tuple(id(weight) for weight in weights), key)
        states = [state_of(weight) for weight in weights]
        seen = [state.look(weight, watch) for state, weight in zip(states, weights, strict=True)]
        old = _packed.get(identity)
        if old is not None and old.is_current(weights, watch):
            return old
        new = _pack(weights, states, seen, key, names, keep)
        if old is not None and old.linear.layout == new.linear.layout:
            for mine, fresh in zip(old.linear.tensors, new.linear.tensors, strict=True):
                mine.copy_(fresh)  # compiled graphs and CUDA graphs hold these addresses
            old.states, old.errors = new.states, new.errors
            return old
        _packed[identity] = new
        return new


def _pack(
    weights: Sequence[Tensor],
    states: list[WeightState],
    seen: list[int],
    key: PackKey,
    names: Sequence[str],
    keep: bool,
) -> Packed:
    parts, errors = [], []
    with torch.inference_mode(False), torch.no_grad():
        for weight, state, name in zip(weights, states, names, strict=True):
            part, error = canonical_form(weight, state, key, name)
            parts.append(part)
            errors.append(error)
            if keep:
                state.canonical[key.format_name, key.transposed, key.method] = (part.to("cpu"), error)
        packed = concat_rows(parts) if len(parts) > 1 else parts[0]
        if key.gate:
            packed = take_rows(packed, turns(packed.shape[0], key.gate == "first", packed.device))
        return Packed(list(zip(states, seen, strict=True)), _in_layout(packed, key.layout), errors)


def _in_layout(packed: PackedWeight, wanted: str) -> LinearWeight:
    """A matrix, or a stack of them, in the wanted layout or, where that cannot hold it, the plain one."""
    if len(packed.shape) == 2:
        return to_layout(packed, "plain" if refuses_layout(packed, wanted) else wanted)
    rows = (packed.shape[0] * packed.shape[1], packed.shape[2])
    flat = PackedWeight(
        packed.codes.flatten(0, 1), packed.block_scales.flatten(0, 1), row_scales(packed).flatten(), packed.format_name,
        rows,
    )  # fmt: skip
    return to_grouped_layout(packed, "plain" if refuses_layout(flat, wanted) else wanted)


def canonical_form(weight: Tensor, state: WeightState, key: PackKey, name: str) -> tuple[PackedWeight, float]:
    """The weight packed as checkpoints hold it, on its device, and its relative error.

    Raises:
        ValueError: it cannot be packed.
    """
    for (format_name, transposed, method), (form, error) in state.canonical.items():
        final = not method or (state.dropped and state.master is None)  # there is nothing to pack another way from
        if (format_name, transposed) == (key.format_name, key.transposed) and (final or method == key.method):
            return form.to(weight.device), error
    source = weight.detach()
    if state.dropped:
        if state.master is None:
            raise ValueError(f"{name}: its high-precision values were dropped, so it cannot be packed another way")
        source = state.master.to(weight.device)
    source = source.transpose(-2, -1) if key.transposed else source
    packed = quantize(source, key.format_name, method=key.method, name=name, implementations=key.implementations)
    return packed, relative_error(source, packed)


def adopt(weight: Tensor, packed: PackedWeight, transposed: bool = False, hollow: bool = False) -> None:
    """Have ``packed`` stand for the values of ``weight`` until it is written to: nothing is rounded a second time.

    ``transposed`` where the parameter is ``[..., K, N]``; with ``hollow`` it keeps no values of its own.
    """
    with _lock:
        state = state_of(weight)
        if hollow:
            make_hollow(weight)
        state.changed(weight)
        state.canonical[packed.format_name, transposed, ""] = (packed, 0.0)
        state.dropped = hollow


def adopted_format(weight: Tensor) -> str | None:
    """The format of the packed form that stands for the weight's values, if there is one."""
    state = _states.get(id(weight))
    if state is None or state.weight() is not weight:
        return None
    return next((name for name, *_ in state.canonical), None)


# -------------------------------------------------------------------------------------------------------------- masters
def give_up(weight: Tensor, key: PackKey, name: str, to_host: bool) -> None:
    """Free the memory of the weight itself: it keeps its shape and dtype and reads as NaN.

    Its packed form stays in host memory, and with ``to_host`` its values do too.
    """
    with _lock:
        state = state_of(weight)
        if state.dropped:
            return
        packed, error = canonical_form(weight, state, key, name)
        state.canonical[key.format_name, key.transposed, key.method] = (packed.to("cpu"), error)
        if to_host:
            state.master = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.device.type == "cuda")
            state.master.copy_(weight.detach())
        make_hollow(weight)
        state.seen(weight)
        state.dropped = True


def is_hollow(weight: Tensor) -> bool:
    """Whether the weight's values were given up and it still reads as NaN."""
    state = _states.get(id(weight))
    if state is None or state.weight() is not weight:
        return False
    state.look(weight, "samples")
    return state.dropped


def make_hollow(weight: Tensor) -> None:
    """Leave of a weight its shape, dtype and device; it reads as NaN."""
    weight.data = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def restore_weights(module: nn.Module) -> int:
    """Give weights that ``fp4_master="host"`` moved to host memory their own memory back; returns how many.

    For saving the model or training on: a call of a graph that was compiled with that option moves them again.

    Raises:
        ValueError: weights were dropped, not moved: their values are gone. None is restored then.
    """
    with _lock:
        hollow = [(name, w, s) for name, w, s in _watched(module) if s.dropped]
        lost = [name for name, _, state in hollow if state.master is None]
        if lost:
            raise ValueError(f"{lost[0]} and {len(lost) - 1} more were dropped; load the model's checkpoint again")
        for _, weight, state in hollow:
            assert state.master is not None
            weight.data = state.master.to(weight.device)
            state.seen(weight)
            state.master, state.dropped, state.canonical = None, False, {}
        return len(hollow)


def requantize(module: nn.Module | None = None) -> int:
    """Have the weights of a module, or all, packed again before they are used next; returns how many.

    Needed after writes that leave no trace: through ``weight.data`` on an accelerator, DLPack, or C++ code. Weights
    whose high-precision values were given up are what their packed form says, and stay.
    """
    with _lock:
        if module is None:
            found = [(s.weight(), s) for s in _states.values()]
        else:
            found = [(w, s) for _, w, s in _watched(module)]
        stale = [(weight, state) for weight, state in found if weight is not None and not state.dropped]
        for weight, state in stale:
            state.changed(weight)
        return len(stale)


def _watched(module: nn.Module) -> Iterator[tuple[str, Tensor, WeightState]]:
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        state = _states.get(id(weight))
        if state is not None and state.weight() is weight:
            yield name, weight, state


def forget(weight: Tensor | None = None) -> None:
    """Forget the packed copies of one weight, or of all, so that the next compile packs them again.

    Compiled graphs keep the copies that they hold until ``torch._dynamo.reset()``.
    """
    with _lock:
        if weight is not None:
            _forget_identity(id(weight), None)
        else:
            _states.clear()
            _packed.clear()


# ------------------------------------------------------------------------------------------------------------- watching
def _sample(weight: Tensor) -> list[object]:
    steps = [max(1, size // _SAMPLED) for size in weight.shape[-2:]]
    values: list[object] = weight.detach()[..., :: steps[0], :: steps[1]].tolist()
    return values


def _checksum(weight: Tensor) -> int:
    """Depends on every bit of the weight and on its place; waits for the device."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    rows = weight.detach().flatten(0, -2)
    columns = torch.arange(rows.shape[1], device=weight.device) * 0x9E3779B1 + 1
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, stop in row_ranges(rows.shape[0], rows.shape[1], weight.device):
        bits = rows[start:stop].contiguous().view(kind).long()
        places = torch.arange(start, stop, device=weight.device) * 0x85EBCA77 + 1
        total += ((bits * columns).sum(1) * places).sum()
    return int(total)
