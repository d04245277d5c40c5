"""Our own file of packed weights: one safetensors file with a manifest in its metadata.

A packed weight ``w`` is stored as ``w.codes``, ``w.block_scales``, ``w.tensor_scale``; other tensors under their names.
Metadata key ``vbcompile_fp4`` is the manifest, JSON::

    {"version": 1,
     "weights": {w: {"format": "nvfp4", "shape": [N, K], "scale_divides": false}},
     "aliases": {tied name: name},
     "sha256": {tensor: digest of its dtype, shape and bytes}}

and ``vbcompile_fp4_sha256`` the digest of that text.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vbcompile.checkpoint_files import CheckpointError, Shards
from vbcompile.kernels.fp4 import PackedWeight, check_scales
from vbcompile.vgpu_files import synchronise

VERSION: Final = 1
MANIFEST: Final = "vbcompile_fp4"
_DIGEST: Final = "vbcompile_fp4_sha256"
_PARTS: Final = ("codes", "block_scales", "tensor_scale")


def save_state(path: Path, entries: Mapping[str, PackedWeight | Tensor]) -> None:
    """Write ``entries`` to ``path``: all of the new file or, whatever happens, the old one.

    The same object, or the same view of the same memory, under two names is stored once and comes back shared.

    Raises:
        CheckpointError: two entries need the same tensor name, an entry has no data, or the file cannot be written.
    """
    tensors, weights, aliases = _flatten(entries)
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    manifest = json.dumps({"version": VERSION, "weights": weights, "aliases": aliases, "sha256": digests})
    metadata = {"format": "pt", MANIFEST: manifest, _DIGEST: hashlib.sha256(manifest.encode()).hexdigest()}
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: no such folder: {path.parent}")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        synchronise(temporary)
        os.replace(temporary, path)
        synchronise(path.parent)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flatten(
    entries: Mapping[str, PackedWeight | Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], dict[str, str]]:
    """Tensors on the CPU, descriptions of the packed weights, and tied names."""
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    used: set[int] = set()
    for name, entry in entries.items():
        first = seen.setdefault(_identity(entry), name)
        if first != name:
            aliases[name] = first
            continue
        parts = {name: entry}
        if isinstance(entry, PackedWeight):
            weights[name] = {
                "format": entry.format_name,
                "shape": list(entry.shape),
                "scale_divides": entry.scale_divides,
            }
            parts = {f"{name}.{part}": getattr(entry, part) for part in _PARTS}
        for part, tensor in parts.items():
            if part in tensors or (part in entries and part != name):
                raise CheckpointError(f"two entries need the tensor name {part!r}")
            tensors[part] = _stored(part, tensor, used)
    return tensors, weights, aliases


def _identity(entry: PackedWeight | Tensor) -> Any:
    """Equal for entries that are one piece of memory."""
    if not isinstance(entry, Tensor) or entry.is_meta or entry.numel() == 0:
        return id(entry)
    return entry.device, entry.data_ptr(), entry.dtype, tuple(entry.shape), entry.stride()


def _stored(name: str, tensor: Any, used: set[int]) -> Tensor:
    """``tensor`` on the CPU, contiguous, and alone in its memory; ``used`` are the memories of others."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
        raise CheckpointError(f"{name!r} is not a tensor with data")
    stored = tensor.detach().cpu().contiguous()
    storage = stored.untyped_storage()
    alone = storage.nbytes() == stored.nbytes and storage.data_ptr() not in used
    used.add(storage.data_ptr())
    return stored if alone else stored.clone()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.numel():
        flat = tensor.reshape(-1).as_strided((tensor.numel(),), (1,))  # one element may have any stride
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_state(shards: Shards) -> bool:
    """Whether the checkpoint is a file of ours."""
    return any(key in metadata for metadata in shards.metadata.values() for key in (MANIFEST, _DIGEST))


def read_state(shards: Shards, device: torch.device | str) -> Iterator[tuple[str, PackedWeight | Tensor]]:
    """The entries of a file of ours, one at a time, each checked against its digest.

    Raises:
        CheckpointError: another version, a manifest or tensor that changed since it was written, or parts missing.
    """
    if len(shards.metadata) != 1:
        raise CheckpointError(f"{shards.folder}: {', '.join(map(str, shards.metadata))} are not one file of ours")
    file = next(iter(shards.metadata))
    manifest = _read_manifest(file, shards.metadata[file])
    weights, aliases, digests = manifest["weights"], manifest["aliases"], manifest["sha256"]
    if digests.keys() != shards.tensors.keys():
        name = min(digests.keys() ^ shards.tensors.keys())
        raise CheckpointError(f"{file}: tensor {name!r} is in the manifest or in the file, not in both")
    tied: dict[str, PackedWeight | Tensor] = {}
    packed_parts = {f"{name}.{part}" for name in weights for part in _PARTS}
    for name in (*weights, *(name for name in shards.tensors if name not in packed_parts)):
        if name in weights:
            entry: PackedWeight | Tensor = _read_weight(shards, file, name, weights[name], digests).to(device)
        else:
            entry = _read_checked(shards, file, name, digests).to(device)
        if name in aliases.values():
            tied[name] = entry
        yield name, entry
    for alias, name in aliases.items():
        yield alias, tied[name]


def _read_manifest(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata.get(MANIFEST, "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get(_DIGEST):
        raise CheckpointError(f"{file}: the manifest does not match its checksum; the file is damaged")
    manifest = json.loads(text)
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise CheckpointError(f"{file}: format version {version}; this release reads {VERSION}")
    _check_manifest(file, manifest)
    return manifest


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Raise where the manifest is not of the form in the module's docstring."""
    weights, aliases, digests = (manifest.get(key) for key in ("weights", "aliases", "sha256"))
    formed = (
        isinstance(weights, dict)
        and isinstance(aliases, dict)
        and isinstance(digests, dict)
        and all(isinstance(w, dict) and w.keys() == {"format", "shape", "scale_divides"} for w in weights.values())
        and all(isinstance(w["shape"], list) and all(type(n) is int for n in w["shape"]) for w in weights.values())
        and all(isinstance(w["format"], str) and type(w["scale_divides"]) is bool for w in weights.values())
        and all(target in weights or target in digests for target in map(str, aliases.values()))
    )
    if not formed:
        raise CheckpointError(f"{file}: the manifest is malformed")


def _read_weight(
    shards: Shards, file: Path, name: str, description: dict[str, Any], digests: dict[str, str]
) -> PackedWeight:
    parts = [_read_checked(shards, file, f"{name}.{part}", digests) for part in _PARTS]
    shape, divides = tuple(description["shape"]), description["scale_divides"]
    try:
        packed = PackedWeight(parts[0], parts[1], parts[2], description["format"], shape, divides)
        check_scales(packed, name)
    except ValueError as error:
        raise CheckpointError(f"{file}: tensor {name!r}: {error}") from error
    return packed


def _read_checked(shards: Shards, file: Path, name: str, digests: dict[str, str]) -> Tensor:
    if name not in shards.tensors:
        raise CheckpointError(f"{file}: tensor {name!r} is missing")
    tensor = shards.read(name)
    if tensor_digest(tensor) != digests[name]:
        raise CheckpointError(f"{file}: tensor {name!r} does not match its checksum; the file is damaged")
    return tensor
