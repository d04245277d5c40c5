"""Weights straight from safetensors files: read one by one, or left where they are and streamed from there."""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from vbcompile.checkpoint_files import CheckpointError, Shards
from vbcompile.runtime_disk import FileTensor, safetensors_contents
from vbcompile.runtime_sources import DiskBytes

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Checkpoint:
    """The tensors of a checkpoint by the names of a model.

    Args:
        path: A safetensors file, its index, or their folder.

    Raises:
        CheckpointError: the files cannot be used.
        StorageError: a file is truncated.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        with Shards(self.path) as shards:
            files = {info.file for info in shards.tensors.values()}
            names = set(shards.tensors)
        self._tensors: dict[str, FileTensor] = {}
        for file in sorted(files):
            contents, _ = safetensors_contents(file)
            self._tensors |= {name: tensor for name, tensor in contents.items() if name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def source(self, name: str, like: Tensor) -> DiskBytes | None:
        """Where the bytes of a tensor lie in the files; None where its dtype there is another than the model's.

        Raises:
            CheckpointError: it is not there, or has another shape.
        """
        found = self._find(name, like)
        same = _DTYPES[found.dtype] == like.dtype and like.is_contiguous()
        return found.source if same else None

    def read(self, name: str, like: Tensor) -> Tensor:
        """A tensor on the CPU, in the dtype of ``like``.

        Raises:
            CheckpointError: it is not there, or has another shape.
            StorageError: its bytes cannot be read.
        """
        from vbcompile.runtime_disk import read_bytes

        found = self._find(name, like)
        return read_bytes(found.source).view(_DTYPES[found.dtype]).view(found.shape).to(like.dtype)

    def _find(self, name: str, like: Tensor) -> FileTensor:
        found = self._tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}")
        if found.shape != tuple(like.shape) or found.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {name!r} is {found.dtype} {found.shape} there, and {like.dtype} {tuple(like.shape)} in "
                "the model"
            )
        return found


def open_checkpoint(model: nn.Module, path: str | PathLike[str]) -> Checkpoint:
    """The checkpoint of a model on the meta device, every tensor of which it has.

    Raises:
        CheckpointError: tensors are missing; the message names them.
    """
    found = Checkpoint(path)
    meta = {n: v for n, v in [*model.named_parameters(), *model.named_buffers()] if v.is_meta}
    missing = [name for name in meta if name not in found]
    if missing:
        raise CheckpointError(
            f"{path}: holds no {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} ({len(missing)} of "
            f"{len(meta)} tensors are missing). Tie weights before offloading, and make buffers that are not saved "
            "with real content: under torch.device('meta') they have none"
        )
    for name, value in meta.items():
        found.source(name, value)
    return found
