"""Weights on disk: what files say, reads of every alignment, shards, and each way in which storage fails."""

import contextlib
import errno
import gc
import json
import os
import shutil
import threading
import weakref

import pytest
import torch
from runtime_cases import random_bytes
from safetensors import safe_open
from safetensors.torch import save_file

from vbcompile.runtime_disk import OpenFiles, StorageError, disk_bytes, read_bytes, safetensors_contents
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_read import PIECE, Destination, DiskReader
from vbcompile.runtime_shards import CHECKSUM_BYTES, Shard
from vbcompile.runtime_simulated import RaceError, SimulatedDevice
from vbcompile.vgpu_files import BLOCK
from vbcompile.vgpu_plan import staged


@pytest.fixture
def reader():
    found = DiskReader(SimulatedDevice(), threads=3)
    yield found
    found.close()


def staging(nbytes):
    (memory,) = HostMemory(torch.device("cpu")).allocate([staged(nbytes)], alignment=BLOCK)
    return memory


def read(reader, source):
    target = torch.zeros(source.nbytes, dtype=torch.uint8)
    reader.read(source, staging(source.nbytes), lambda at, piece: target[at : at + len(piece)].copy_(piece))
    return target


@pytest.fixture
def file(tmp_path):
    (data,) = random_bytes([3 * BLOCK + 77])
    path = tmp_path / "data"
    path.write_bytes(data.numpy().tobytes())
    return path, data


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("begin", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("nbytes", [1, 511, BLOCK, BLOCK + 72])
def test_reads_of_every_alignment(file, begin, nbytes, direct):
    path, data = file
    reader = DiskReader(SimulatedDevice(), direct=direct)
    assert torch.equal(read(reader, disk_bytes(path, begin, nbytes)), data[begin : begin + nbytes])
    reader.close()


def test_the_tail_of_a_file(file, reader):
    path, data = file
    assert torch.equal(read(reader, disk_bytes(path, 2 * BLOCK + 3, BLOCK + 74)), data[2 * BLOCK + 3 :])
    assert torch.equal(read_bytes(disk_bytes(path, 3 * BLOCK, 77)), data[3 * BLOCK :])


def test_reads_of_several_pieces(tmp_path, reader):
    (data,) = random_bytes([2 * PIECE + 5000])
    path = tmp_path / "data"
    path.write_bytes(data.numpy().tobytes())
    assert torch.equal(read(reader, disk_bytes(path, 4090, 2 * PIECE + 17)), data[4090 : 4090 + 2 * PIECE + 17])


def test_a_file_system_that_refuses_unbuffered_files(file, monkeypatch):
    path, data = file
    real, refused = os.open, []

    def refuse(name, flags, *rest):
        if flags & os.O_DIRECT:
            refused.append(name)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    reader = DiskReader(SimulatedDevice())
    assert torch.equal(read(reader, disk_bytes(path, 5, 9000)), data[5:9005])
    assert refused and not reader.files.is_direct(path)
    reader.close()


def test_a_file_system_that_refuses_unbuffered_reads(file, monkeypatch, caplog):
    path, data = file
    real, refused = os.preadv, []

    def refuse(descriptor, buffers, offset):
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    reader = DiskReader(SimulatedDevice())
    for _ in range(2):
        assert torch.equal(read(reader, disk_bytes(path, 5, 9000)), data[5:9005])
    assert len(refused) == 1 and caplog.text.count("refuses unbuffered reads") == 1
    reader.close()


def test_systems_without_reads_and_writes_at_a_place(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "pwrite")
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "O_DIRECT")
    shard, data = shard_of(tmp_path, (3 * BLOCK + 5, 0, 2 * PIECE + 9, 8))
    reader = DiskReader(SimulatedDevice(), threads=4)
    assert torch.equal(read(reader, shard.sources["c"]), data["c"])
    assert torch.equal(read_bytes(shard.sources["a"]), data["a"])
    reader.close()


def test_short_reads_are_continued(file, monkeypatch, reader):
    path, data = file
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:BLOCK]], offset))
    assert torch.equal(read(reader, disk_bytes(path, 5, 12000)), data[5:12005])


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_truncated_under_us(file, direct):
    path, _ = file
    reader = DiskReader(SimulatedDevice(), direct=direct)
    source = disk_bytes(path, BLOCK, 2 * BLOCK)
    read(reader, source)
    os.truncate(path, 2 * BLOCK)
    with pytest.raises(StorageError, match="truncated") as caught:
        read(reader, source)
    assert (caught.value.file, caught.value.offset, caught.value.wanted, caught.value.got) == (
        path,
        BLOCK,
        2 * BLOCK,
        BLOCK,
    )
    reader.close()


def test_a_file_that_ends_during_the_read(file, monkeypatch, reader):
    path, _ = file
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0 if offset else real(fd, buffers, offset))
    with pytest.raises(StorageError, match="ends too early"):
        read(reader, disk_bytes(path, BLOCK, BLOCK))


def test_a_file_changed_under_us(file, reader):
    path, _ = file
    source = disk_bytes(path, 0, BLOCK)
    with path.open("r+b") as stream:
        stream.write(b"other")
    os.utime(path, ns=(1, 1))
    with pytest.raises(StorageError, match="has been changed"):
        read(reader, source)


def test_a_file_that_is_missing(tmp_path, reader, file):
    with pytest.raises(StorageError, match="No such file") as caught:
        disk_bytes(tmp_path / "absent", 0, 5)
    assert caught.value.file == tmp_path / "absent"
    with pytest.raises(StorageError, match="too short"):
        disk_bytes(file[0], 0, 10**9)
    source = disk_bytes(file[0], 0, 5)
    file[0].unlink()
    with pytest.raises(StorageError, match="No such file"):
        read(reader, source)


def test_a_device_that_reports_an_error(file, monkeypatch, reader):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        read(reader, disk_bytes(file[0], 0, 100))


def test_a_staging_buffer_that_is_too_small(file, reader):
    with pytest.raises(ValueError, match="staging"):
        reader.submit(disk_bytes(file[0], 0, 100), torch.empty(100, dtype=torch.uint8), lambda: None)


def test_a_read_waits_until_its_staging_bytes_are_free(file, reader):
    path, data = file
    free, order, target = threading.Event(), [], torch.zeros(5000, dtype=torch.uint8)
    request = reader.submit(disk_bytes(path, 9, 5000), staging(5000), lambda: (free.wait(), order.append("free")))
    assert not request.done
    request.attach(
        Destination(lambda at, piece: target[at : at + len(piece)].copy_(piece), lambda: order.append("finish"))
    )
    assert not order
    free.set()
    request.join()
    assert order == ["free", "finish"] and torch.equal(target, data[9:5009])


def test_an_error_while_waiting_for_room_is_raised_by_join(file, reader):
    def refuse():
        raise RaceError("not this time")

    request = reader.submit(disk_bytes(file[0], 0, 100), staging(100), refuse)
    with pytest.raises(RaceError):
        request.join()


def test_an_error_does_not_keep_what_its_frames_held(file, reader):
    """Else memory of the device would stay in use until the garbage collector comes by."""

    class Held:
        pass

    def fail():
        held = Held()
        kept.append(weakref.ref(held))
        read(reader, source)

    source, kept = disk_bytes(file[0], 0, 100), []
    file[0].unlink()
    gc.disable()
    try:
        with contextlib.suppress(StorageError):
            fail()
        assert kept[0]() is None
    finally:
        gc.enable()


def test_headers_of_safetensors_files(tmp_path):
    tensors = {"one": torch.randn(3, 5), "two": torch.arange(7, dtype=torch.int16)}
    save_file(tensors, tmp_path / "w.safetensors", {"who": "us"})
    contents, metadata = safetensors_contents(tmp_path / "w.safetensors")
    assert metadata == {"who": "us"} and contents["one"].dtype == "F32" and contents["two"].shape == (7,)
    for name, tensor in tensors.items():
        got = read_bytes(contents[name].source).view(tensor.dtype).view(tensor.shape)
        assert torch.equal(got, tensor)


def header(entries):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        (10**9).to_bytes(8, "little") + b"{}",
        header(b"{no json"),
        header([1, 2]),
        header({"a": 5}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),  # no data behind it
    ],
)
def test_files_that_are_no_safetensors(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(StorageError) as caught:
        safetensors_contents(tmp_path / "w.safetensors")
    assert caught.value.file == tmp_path / "w.safetensors"


def test_a_missing_safetensors_file(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        safetensors_contents(tmp_path / "absent.safetensors")


# --------------------------------------------------------------------------------------------------------------- shards
def shard_of(folder, sizes=(5000, 0, CHECKSUM_BYTES + 3, 8)):
    data = dict(zip("abcd", random_bytes(sizes), strict=True))
    return Shard(folder, {name: tensor.numel() for name, tensor in data.items()}, data.__getitem__), data


def test_a_shard_holds_what_was_written(tmp_path, reader):
    shard, data = shard_of(tmp_path / "new" / "folder")
    sources = shard.sources
    for name, tensor in data.items():
        if tensor.numel():
            assert torch.equal(read(reader, sources[name]), tensor)
        assert torch.equal(read_bytes(sources[name]), tensor)
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert sources["a"].offset % BLOCK == 0 and file.suffix == ".safetensors"
    with safe_open(file, "pt") as opened:  # others can read it
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in data.items())


def damage(file, offset):
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a failing disk would: nobody wrote


def test_a_flipped_bit_is_found_at_the_first_read(tmp_path, reader):
    shard, data = shard_of(tmp_path)
    source = shard.sources["c"]
    damage(source.file, source.offset + CHECKSUM_BYTES + 1)
    with pytest.raises(StorageError, match="checksum mismatch") as caught:
        read(reader, source)
    assert caught.value.offset == source.offset + CHECKSUM_BYTES and caught.value.wanted != caught.value.got
    with pytest.raises(StorageError, match="checksum mismatch"):
        read_bytes(source)
    assert torch.equal(read(reader, shard.sources["a"]), data["a"])


def test_checksums_are_verified_once(tmp_path, reader, monkeypatch):
    shard, _ = shard_of(tmp_path)
    calls = []
    monkeypatch.setattr("vbcompile.runtime_read.verify_checksums", lambda *what: calls.append(what))
    for _ in range(3):
        read(reader, shard.sources["a"])
    assert len(calls) == 1


def test_a_full_disk_is_found_before_any_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        Shard(tmp_path, {"a": 10}, lambda _: pytest.fail("work was begun"))
    assert not list(tmp_path.iterdir())
    much = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(StorageError, match="no room") as caught:
        Shard(tmp_path, {"a": much}, lambda _: pytest.fail("work was begun"))
    assert caught.value.wanted > much > caught.value.got and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"exists|directory"):
        Shard(tmp_path / "file", {"a": 1}, lambda _: torch.zeros(1, dtype=torch.uint8))

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        Shard(tmp_path, {"a": 1}, lambda _: torch.zeros(1, dtype=torch.uint8))


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def load(name):
        if name == "b":
            raise KeyboardInterrupt
        return torch.zeros(10, dtype=torch.uint8)

    with pytest.raises(KeyboardInterrupt):
        Shard(tmp_path, {"a": 10, "b": 10}, load)
    with pytest.raises(ValueError, match="announced"):
        Shard(tmp_path, {"a": 11}, load)
    assert not list(tmp_path.iterdir())


def in_a_child(work):
    """Exit code of a forked process that runs ``work`` and then what Python runs at exit."""
    child = os.fork()
    if child == 0:
        weakref.finalize._registry.clear()  # the parent's own
        try:
            work()
            weakref.finalize._exitfunc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path):
    assert in_a_child(lambda: Shard(tmp_path, {"a": 10}, lambda _: os._exit(9))) == 9
    assert [file.suffix for file in tmp_path.iterdir()] == [".partial"]
    shard, _ = shard_of(tmp_path)
    assert list(tmp_path.iterdir()) == [shard.sources["a"].file]


def test_a_run_removes_its_shards_at_its_end(tmp_path):
    seen = []
    in_a_child(lambda: seen.append(shard_of(tmp_path)))  # alive until the end
    assert not list(tmp_path.iterdir())
    shard, data = shard_of(tmp_path)
    in_a_child(shard._finalizer)  # a forked child ends: the file is still its parent's
    assert torch.equal(read_bytes(shard.sources["a"]), data["a"])
    del shard
    assert not list(tmp_path.iterdir())


def test_live_processes_keep_their_shards(tmp_path):
    first, data = shard_of(tmp_path)
    second, _ = shard_of(tmp_path)
    assert first.sources["a"].file != second.sources["a"].file
    assert torch.equal(read_bytes(first.sources["a"]), data["a"])


def test_open_files_are_closed(file):
    files = OpenFiles()
    source = disk_bytes(file[0], 0, 10)
    before = len(os.listdir("/proc/self/fd"))
    files.read(source, 0, torch.empty(10, dtype=torch.uint8), 10)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before
