"""Load a checkpoint with FP4 weights into a model, so that a compile with the option ``fp4`` runs exactly its codes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vbcompile.checkpoint import CheckpointError, load_checkpoint
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.passes.fp4_weights import adopt

Entries = dict[str, PackedWeight | Tensor]


def load_packed(
    model: nn.Module, path: str | Path, *, device: torch.device | str | None = None, keep: bool = True
) -> list[str]:
    """Give a model the weights of an FP4 checkpoint: all of them or, where an error is raised, none.

    Args:
        model: may be on the ``meta`` device; its parameter names are the checkpoint's.
        path: what :func:`vbcompile.checkpoint.read_checkpoint` takes.
        device: for parameters on ``meta``; the default is the CPU. Others stay where they are.
        keep: also decode the weights into the parameters, in their dtype. Without, they read as NaN and take no memory:
            the model then runs only compiled with the option ``fp4``.

    Returns:
        Names of the parameters that are packed.

    Raises:
        CheckpointError: the files are at fault, or names or shapes do not fit the model; the message names the tensor.
    """
    place = torch.device(device or "cpu")
    entries = load_checkpoint(path)
    known = _tensors(model)
    transposed = _check(model, known, entries, path)
    made: dict[int, Tensor] = {}
    packed = []
    with torch.no_grad():
        for name, entry in entries.items():
            old = known[name]
            if id(old) in made:
                continue  # tied to one that is loaded
            if isinstance(entry, PackedWeight):
                packed.append(name)
            made[id(old)] = _filled(old, entry, transposed[name], place, keep)
    _put(model, made)
    return packed


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers by every name that they have."""
    return dict(model.state_dict(keep_vars=True))


def _check(model: nn.Module, known: dict[str, Tensor], entries: Entries, path: str | Path) -> dict[str, bool]:
    """For each entry whether the parameter is its transpose, or an error."""
    transposed = {}
    for name, entry in entries.items():
        if name not in known:
            raise CheckpointError(f"{path}: {name!r} is not in the model")
        try:
            orientation = _orientation(model, name, known, entries)
        except _Ambiguous:
            reason = "a stack of square matrices, and nothing says whether the model holds them transposed"
            raise CheckpointError(f"{path}: {name!r} is {reason}: set is_transposed on its module") from None
        if orientation is None:
            shapes = f"{list(entry.shape)}, in the model {list(known[name].shape)}"
            raise CheckpointError(f"{path}: {name!r} has shape {shapes}")
        transposed[name] = orientation
        if isinstance(entry, PackedWeight) and not known[name].is_floating_point():
            raise CheckpointError(f"{path}: {name!r} is packed, in the model it is {known[name].dtype}")
    loaded = {id(known[name]) for name in entries}
    for name, tensor in known.items():
        if id(tensor) not in loaded:
            raise CheckpointError(f"{path}: has no {name!r}, which the model needs")
    return transposed


class _Ambiguous(Exception):
    """A stack of square matrices that may be transposed or not."""


def _orientation(model: nn.Module, name: str, known: dict[str, Tensor], entries: Entries) -> bool | None:
    """Whether the parameter is the entry transposed, as stacks of experts can be; None where their shapes differ.

    Square stacks are as their module says (``is_transposed`` of Transformers) or as the other stacks of their module.

    Raises:
        _Ambiguous: neither says.
    """
    tensor, entry = known[name], entries[name]
    shape, is_stack = tuple(entry.shape), isinstance(entry, PackedWeight) and len(entry.shape) == 3
    same, swapped = tuple(tensor.shape) == shape, is_stack and tuple(tensor.mT.shape) == shape
    if not (same and swapped):
        return False if same else True if swapped else None
    owner = name.rpartition(".")[0]
    said = getattr(model.get_submodule(owner), "is_transposed", None)
    if isinstance(said, bool):
        return said
    for other, packed in entries.items():
        stack = isinstance(packed, PackedWeight) and len(packed.shape) == 3 and other.rpartition(".")[0] == owner
        if stack and other in known and packed.shape[1] != packed.shape[2]:
            return tuple(known[other].shape) != tuple(packed.shape)
    raise _Ambiguous


def _filled(old: Tensor, entry: PackedWeight | Tensor, transposed: bool, place: torch.device, keep: bool) -> Tensor:
    """The parameter with the entry's values: itself, or a new one where it was on ``meta``."""
    device = place if old.is_meta else old.device
    if isinstance(entry, Tensor):
        return _with_values(old, entry.to(device, old.dtype))
    if not keep:
        hollow = torch.empty((), dtype=old.dtype, device=device).expand(old.shape)
        new = _with_values(old, hollow, copy=False)
        adopt(new, entry, transposed, hollow=True)
        return new
    values = dequantize(entry.to(device), old.dtype)
    new = _with_values(old, values.mT.contiguous() if transposed else values)
    adopt(new, entry, transposed)
    return new


def _with_values(old: Tensor, values: Tensor, copy: bool = True) -> Tensor:
    if old.is_meta:
        return nn.Parameter(values, requires_grad=False) if isinstance(old, nn.Parameter) else values
    if copy:
        old.copy_(values)
    return old


def _put(model: nn.Module, made: dict[int, Tensor]) -> None:
    """Put new tensors in the places of those on ``meta``, tied ones in all their places."""
    for module in model.modules():
        own = (*module.named_parameters(recurse=False, remove_duplicate=False), *module.named_buffers(recurse=False))
        for name, old in own:
            new = made.get(id(old), old)
            if new is not old:
                setattr(module, name, new)
