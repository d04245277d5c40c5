"""The life of the offload runtime: begin, end, interruption; missing or damaged files, devices that are too small."""

import gc
import os
import threading

import pytest
import torch
from runtime_cases import (
    DISK,
    HOST,
    planned,
    random_bytes,
    run_step,
    run_steps,
    small_host,
    streamer_of,
    sweep_of,
)

from vbcompile import compat, runtime_read, runtime_shards
from vbcompile.device import DeviceError
from vbcompile.runtime import Streamer
from vbcompile.runtime_device import AcceleratorDevice
from vbcompile.runtime_disk import StorageError
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_simulated import SimulatedDevice
from vbcompile.runtime_sources import DiskBytes, HostBytes
from vbcompile.vgpu_planner import plan_weights

MIB = 2**20


def test_a_step_abandoned_midway_leaves_a_clean_state(device, unit, tmp_path):
    streamer, data = streamer_of(device, [2 * unit] * 16, 9 * unit, (small_host(20 * unit), DISK), tmp_path)
    with streamer:
        run_steps(streamer, data, 1)
        for stop in range(1, 30, 3):
            with pytest.raises(KeyboardInterrupt), streamer.step():
                for number, (action, target) in enumerate(streamer.plan.program()):
                    if number == stop:
                        raise KeyboardInterrupt
                    if action != "run":
                        getattr(streamer, action)(target)
            run_steps(streamer, data, 1)
        streamer.step_begin()  # left open, as by code that does not use the context manager
        streamer.wait(0)
        run_steps(streamer, data, 1)
        assert streamer.statistics()["abandoned"] == 11


def test_started_inside_inference_mode_and_used_outside(device, unit):
    streamer, data = streamer_of(device, [unit] * 8, 5 * unit)
    with torch.inference_mode():
        streamer.start()
        run_steps(streamer, data, 1)
    run_steps(streamer, data, 1)
    streamer.close()


def test_life_in_the_wrong_order(device, unit):
    streamer, _ = streamer_of(device, [unit] * 8, 5 * unit)
    with pytest.raises(RuntimeError, match="not been started"):
        streamer.prefetch(0)
    streamer.start()
    with pytest.raises(RuntimeError, match="make a new one"):
        streamer.start()
    streamer.close()
    streamer.close()
    with pytest.raises(RuntimeError, match="closed"):
        streamer.wait(0)


def test_a_device_that_is_too_small_gives_everything_back():
    sizes = [3000] * 8
    plan = planned(sweep_of(sizes), 12_000)
    for capacity in range(0, plan.peak_bytes, 2000):
        device = SimulatedDevice(capacity)
        streamer = Streamer(plan, [HostBytes(part) for part in random_bytes(sizes)], device)
        with pytest.raises(torch.OutOfMemoryError):
            streamer.start()
        del streamer
        gc.collect()
        assert device.allocated_bytes() == 0
        device.close()


def test_a_file_that_is_missing_at_the_start(device, unit, tmp_path):
    streamer, _ = streamer_of(device, [9 * unit] * 10, 40 * unit, (small_host(40 * unit), DISK), tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(StorageError, match="No such file"):
        streamer.start()
        for copy in range(len(streamer.plan.copies)):
            streamer.wait(copy)
            streamer.release(copy)
    streamer.close()


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_streamer_that_is_dropped_finishes_what_is_under_way(device, unit, in_a_thread):
    streamer, data = streamer_of(device, [unit] * 8, 5 * unit)
    streamer.start()
    run_step(streamer, data)
    before = device.allocated_bytes()
    if not in_a_thread:
        del streamer
    else:
        kept = [streamer]
        del streamer
        other = threading.Thread(target=kept.clear)
        other.start()
        other.join()
        for thread in threading.enumerate():
            if thread.name == "vbcompile close":
                thread.join(10)
    gc.collect()
    assert device.allocated_bytes() < before


def test_sources_must_match_the_plan(device, unit, tmp_path):
    plan = planned(sweep_of([unit] * 8), 5 * unit)
    data = [HostBytes(part) for part in random_bytes([unit] * 8)]
    with pytest.raises(ValueError, match="7 sources for 8 weights"):
        Streamer(plan, data[:7], device)
    with pytest.raises(ValueError, match="its source 3"):
        Streamer(plan, [HostBytes(torch.zeros(3, dtype=torch.uint8)), *data[1:]], device)
    file = DiskBytes(tmp_path / "w", 0, unit, (unit, 0))
    with pytest.raises(ValueError, match="planned on cpu, and its bytes are on disk"):
        Streamer(plan, [file] * 8, device)
    with pytest.raises(ValueError, match="uint8"):
        HostBytes(torch.zeros(3))


def test_a_damaged_file_is_reported_and_the_device_stays_usable(device, unit, tmp_path):
    streamer, data = streamer_of(device, [9 * unit] * 10, 40 * unit, (small_host(40 * unit), DISK), tmp_path)
    with streamer:
        run_step(streamer, data)
        file = tmp_path / "weights.safetensors"
        whole, identity = file.read_bytes(), file.stat()
        file.write_bytes(whole[: 9 * unit])
        with pytest.raises(StorageError) as caught:
            for _ in range(3):
                run_step(streamer, data)
        assert caught.value.file == file and caught.value.wanted != caught.value.got
        device.join(device.record())
        file.write_bytes(whole)
        os.utime(file, ns=(identity.st_atime_ns, identity.st_mtime_ns))
        run_steps(streamer, data)  # what failed is tried again


def test_resident_weights_come_through_small_buffers_and_are_verified(device, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_shards, "CHECKSUM_BYTES", 4096)
    monkeypatch.setattr(runtime_read, "_BOUNCE", 9000)
    sizes = [50_001, 4096, 1]
    data = random_bytes(sizes)
    shard = runtime_shards.Shard(tmp_path, {str(i): n for i, n in enumerate(sizes)}, lambda name: data[int(name)])
    sources = [shard.sources[str(index)] for index in range(3)]
    plan = plan_weights(sweep_of(sizes), 10**9, (HOST,))
    with Streamer(plan, sources, device) as streamer:
        run_step(streamer, data)
    file, status = sources[0].file, sources[0].file.stat()
    content = bytearray(file.read_bytes())
    content[sources[0].offset + 5 * 4096 + 7] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StorageError, match="checksum") as caught:
        Streamer(plan, sources, device).start()
    assert caught.value.offset == sources[0].offset + 5 * 4096


@pytest.mark.gpu
def test_slabs_are_pinned_and_as_large_as_their_contents():
    device = torch.device(torch.accelerator.current_accelerator())
    memory = HostMemory(device)
    parts = memory.allocate([3 * MIB + 100] * 40)
    assert all(part.is_pinned() for part in parts) and memory.use.pageable == 0
    assert memory.use.pinned <= 1.03 * memory.use.payload
    assert all(part.data_ptr() % 256 == 0 for part in parts)


@pytest.mark.gpu
def test_a_refused_registration_leaves_no_error_behind():
    device = torch.device(torch.accelerator.current_accelerator())
    if device.type != "cuda":
        pytest.skip("registration is CUDA's and ROCm's")
    assert compat.register_host_memory(device, 4096, 4096)  # nobody's page
    torch.ones(8, device=device).sum().item()


def test_the_cpu_is_no_card():
    with pytest.raises(DeviceError, match="SimulatedDevice"):
        AcceleratorDevice("cpu")
