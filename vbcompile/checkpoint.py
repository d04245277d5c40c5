"""FP4 checkpoints in and out, safetensors only.

Reads compressed-tensors ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``, NVIDIA ModelOpt NVFP4, gpt-oss MXFP4 and
our own files, without decoding: codes and scales arrive bit for bit. FP8 layers beside FP4 ones become bfloat16.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vbcompile.checkpoint_config import check_declarations
from vbcompile.checkpoint_files import CheckpointError, Shards
from vbcompile.checkpoint_layouts import find_packed, read_fp8, read_packed
from vbcompile.checkpoint_state import is_state, read_state, save_state
from vbcompile.kernels.fp4 import PackedWeight

__all__ = ["CheckpointError", "load_checkpoint", "read_checkpoint", "save_checkpoint"]

_log = logging.getLogger(__name__)


def read_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, PackedWeight | Tensor]]:
    """``(parameter name, value)`` of a checkpoint, shard by shard, one in memory at a time.

    Packed weights come under the name of the parameter they replace: ``layers.0.q_proj.weight``; gpt-oss experts under
    ``experts.gate_up_proj``, as ``[E, N, K]`` with N outputs, while Transformers' own parameter is ``[E, K, N]``. FP8
    weights beside them come as bfloat16, other tensors as they are. Scales of activations and key-value caches beside
    quantized weights are left out.

    Args:
        path: folder with a ``*.safetensors.index.json`` or one safetensors file, an index, or a file.
        device: where the values are put.

    Raises:
        CheckpointError: before anything is yielded where the files, headers or configuration are at fault, naming file
            and tensor; while reading, where data are: a scale that is NaN, or a checksum.
    """
    with Shards(path) as shards:
        if is_state(shards):
            yield from read_state(shards, device)
            return
        check_declarations(shards.folder)
        contents = find_packed(shards)
        if contents.activation_scales:
            count, first = len(contents.activation_scales), contents.activation_scales[0]
            _log.info("%s: %d activation scales left out, %s the first", path, count, first)
        packed = {parts.codes: parts for parts in contents.packed}
        fp8 = {parts.name: parts for parts in contents.fp8}
        wanted = packed.keys() | fp8.keys() | set(contents.plain)
        for name in (name for name in shards.tensors if name in wanted):
            if name in packed:
                yield packed[name].name, read_packed(shards, packed[name], device)
            elif name in fp8:
                yield name, read_fp8(shards, fp8[name], device)
            else:
                yield name, shards.read(name).to(device)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, PackedWeight | Tensor]:
    """All of a checkpoint by parameter name, or an error and nothing; see :func:`read_checkpoint`."""
    return dict(read_checkpoint(path, device))


def save_checkpoint(path: str | Path, entries: Mapping[str, PackedWeight | Tensor]) -> None:
    """Write packed weights and other tensors to one safetensors file, for :func:`read_checkpoint`.

    The file appears whole or not at all, also when the process is killed; each tensor has a checksum.

    Raises:
        CheckpointError: ``path`` is no ``.safetensors`` name, entries collide or have no data, or writing fails.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: the name must end in .safetensors")
    save_state(path, entries)
