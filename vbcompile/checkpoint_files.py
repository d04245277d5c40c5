"""The safetensors files of a checkpoint: which there are, what their headers say, one tensor at a time.

Only safetensors are read: other weight files can run code while they load.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and, where there is one, the tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: its file, dtype as safetensors spells it (``U8``, ``F8_E4M3``), and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """The tensors of a checkpoint, from a folder with an index or one file, or from a file.

    Opening reads headers alone. Tensors are read one at a time and share no memory with the files.

    Attributes:
        tensors: what the headers say of each tensor, shard by shard.
        metadata: the metadata of each file.
        folder: where the checkpoint's configuration would be.

    Raises:
        CheckpointError: nothing to read, an unsafe file type, a broken index, or a truncated or malformed file.
    """

    def __init__(self, path: str | Path) -> None:
        self._stack = ExitStack()
        self.folder = Path(path) if Path(path).is_dir() else Path(path).parent
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        try:
            for file, names in _locate(Path(path)).items():
                self._add(file, names)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Shards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _add(self, file: Path, names: list[str] | None) -> None:
        """Open ``file`` and note its tensors ``names``, or all of them."""
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            present = set(handle.keys())
            self.metadata[file] = handle.metadata() or {}
            for name in sorted(present) if names is None else names:
                if name not in present:
                    raise CheckpointError(f"{file}: tensor {name!r} is named in the index but not in the file")
                header = handle.get_slice(name)
                self.tensors[name] = TensorInfo(file, header.get_dtype(), tuple(header.get_shape()))
        except FileNotFoundError:
            wanted = f"; the index expects {names[0]!r} there" if names else ""
            raise CheckpointError(f"{file}: no such file{wanted}") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a complete safetensors file ({error})") from error
        self._open[file] = handle

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in memory of its own, so that later changes of the file do not reach it."""
        info = self.tensors[name]
        try:
            tensor: Tensor = self._open[info.file].get_tensor(name)
            return tensor.clone(memory_format=torch.contiguous_format)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read ({error})") from error


def _locate(path: Path) -> dict[Path, list[str] | None]:
    """Files of a checkpoint, each with the tensors an index places there, or None for all."""
    if path.is_file():
        _refuse_unsafe(path)
        if path.name.endswith(".index.json"):
            return _read_index(path)
        return {path: None}
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _read_index(indexes[0])
    files = sorted(path.glob("*.safetensors"))
    if not indexes and (path / "model.safetensors") in files:
        return {path / "model.safetensors": None}
    if not indexes and len(files) == 1:
        return {files[0]: None}
    if indexes or files:
        found = ", ".join(file.name for file in indexes or files)
        raise CheckpointError(f"{path}: cannot tell which files are the checkpoint ({found}); pass one of them")
    for file in sorted(path.iterdir()):
        _refuse_unsafe(file)
    raise CheckpointError(f"{path}: holds no safetensors file")


def _refuse_unsafe(file: Path) -> None:
    if file.suffix in _UNSAFE_SUFFIXES:
        raise CheckpointError(
            f"{file}: only safetensors are read, because {file.suffix} files can run code while they load. Convert it: "
            f"python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{file.name}', "
            f"weights_only=True), '{file.stem}.safetensors')\""
        )


def _read_index(index: Path) -> dict[Path, list[str] | None]:
    """Files and their tensors as an index lists them."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise CheckpointError(f"{index}: tensor {name!r} is placed in {file!r}, which is not a file of this folder")
        _refuse_unsafe(index.parent / file)
        names = files.setdefault(index.parent / file, [])
        assert names is not None
        names.append(name)
    return files


def _stays_inside(file: str) -> bool:
    """Whether a file name is relative and climbs nowhere, by the rules of every system."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    climbs = ".." in posix.parts or ".." in windows.parts
    return bool(file) and "\0" not in file and not (climbs or posix.is_absolute() or windows.anchor)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``; a key given twice is an error, because readers would differ on its value."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
            raise CheckpointError(f"{file}: the key {repeated!r} is given twice")
        return found

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content
