"""Our own packed files: bit for bit back, every changed byte noticed, a failed save leaves the old file."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from fp4_checkpoint_files import compressed_nvfp4, under, write
from safetensors.torch import save_file

from vbcompile.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from vbcompile.kernels.fp4 import PackedWeight
from vbcompile.kernels.fp4_quantize import quantize


def own_entries() -> dict:
    embedding = torch.randn(10, 8).bfloat16()
    shared = quantize(torch.randn(5, 40))
    return {
        "a.weight": shared,
        "b.weight": quantize(torch.randn(2, 7, 65), "mxfp4"),
        "c.weight": quantize(torch.randn(6, 32), per_row=True),
        "tied.weight": shared,
        "embedding": embedding,
        "head": embedding,
        "view": embedding[2:5, ::2],
        "flat": embedding.view(-1),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }


def test_own_files_come_back_bit_for_bit(tmp_path):
    compressed = load_checkpoint(write(tmp_path / "in", under("d", compressed_nvfp4()[0])))
    entries = own_entries() | compressed
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, entries)
    loaded = load_checkpoint(tmp_path / "packed.safetensors")
    assert loaded.keys() == entries.keys()
    for name, entry in entries.items():
        if isinstance(entry, PackedWeight):
            for part in ("codes", "block_scales", "tensor_scale"):
                assert torch.equal(getattr(loaded[name], part), getattr(entry, part))
            for part in ("format_name", "shape", "scale_divides"):
                assert getattr(loaded[name], part) == getattr(entry, part)
        else:
            assert loaded[name].dtype == entry.dtype and torch.equal(loaded[name], entry)
    assert loaded["tied.weight"] is loaded["a.weight"] and loaded["head"] is loaded["embedding"]
    assert list(tmp_path.glob(".*")) == [] and sum(f.is_file() for f in tmp_path.iterdir()) == 1


def test_any_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, {"a.weight": quantize(torch.randn(4, 32)), "b": torch.randn(3)})
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    for position in range(8, len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x04
        path.write_bytes(changed)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:  # bytes of the metadata's format entry, which is for other readers
            assert loaded.keys() == {"a.weight", "b"} and position < 8 + size
    path.write_bytes(whole)
    assert load_checkpoint(path).keys() == {"a.weight", "b"}


def rewrite_manifest(path: Path, change) -> None:
    """Change a manifest and give it a right checksum: what a hostile file could hold."""
    import hashlib

    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["vbcompile_fp4"])
    text = json.dumps(change(manifest))
    header["__metadata__"] |= {"vbcompile_fp4": text, "vbcompile_fp4_sha256": hashlib.sha256(text.encode()).hexdigest()}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + whole[8 + size :])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m | {"version": 2}, "format version 2; this release reads 1"),
        (lambda m: [], "format version None"),
        (lambda m: m | {"weights": []}, "malformed"),
        (lambda m: m | {"weights": {"a.weight": {"format": "nvfp4"}}}, "malformed"),
        (lambda m: m | {"aliases": {"x": "nothing"}}, "malformed"),
        (lambda m: m | {"sha256": {}}, "in the manifest or in the file, not in both"),
        (lambda m: m | {"sha256": dict.fromkeys(m["sha256"], "0")}, "does not match its checksum"),
        (lambda m: m | {"weights": {"z": m["weights"]["a.weight"]}}, "tensor 'z.codes' is missing"),
        (lambda m: m | {"weights": {"a.weight": m["weights"]["a.weight"] | {"format": "int4"}}}, "unknown FP4 format"),
        (lambda m: m | {"weights": {"a.weight": m["weights"]["a.weight"] | {"shape": [4, -32]}}}, "is not \\[N, K\\]"),
        (lambda m: m | {"weights": {"a.weight": m["weights"]["a.weight"] | {"shape": [2, 64]}}}, "codes must be"),
    ],
)
def test_hostile_manifests(change, reason, tmp_path):
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, {"a.weight": quantize(torch.randn(4, 32)), "b": torch.randn(3)})
    rewrite_manifest(path, change)
    with pytest.raises(CheckpointError, match=f"packed.safetensors: .*{reason}"):
        load_checkpoint(path)


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "vbcompile.checkpoint_state.save_file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_failed_save_leaves_the_old_file(failing, error, tmp_path, monkeypatch):
    path = tmp_path / "packed.safetensors"
    save_checkpoint(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(failing, fail)
    with pytest.raises(KeyboardInterrupt if not error.args else CheckpointError, match=r"cannot be written|^$"):
        save_checkpoint(path, {"a": torch.ones(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"a": quantize(torch.ones(2, 32)), "a.codes": torch.ones(1)}, "two entries need the tensor name 'a.codes'"),
        ({"a.codes": torch.ones(1), "a": quantize(torch.ones(2, 32))}, "two entries need the tensor name 'a.codes'"),
        ({"a": torch.ones(1, device="meta")}, "'a' is not a tensor with data"),
        ({"a": 3}, "'a' is not a tensor with data"),
    ],
)
def test_entries_that_cannot_be_saved(entries, reason, tmp_path):
    with pytest.raises(CheckpointError, match=reason):
        save_checkpoint(tmp_path / "x.safetensors", entries)
    assert os.listdir(tmp_path) == []


def test_other_file_names_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        save_checkpoint(tmp_path / "x.bin", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"no such folder: .*no folder"):
        save_checkpoint(tmp_path / "no folder" / "x.safetensors", {"a": torch.ones(1)})


def test_own_file_among_other_shards(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    save_file({"b": torch.ones(1)}, tmp_path / "y.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not one file of ours"):
        load_checkpoint(tmp_path)
