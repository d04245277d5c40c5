"""The offload runtime, on the simulated device and on a card: every byte, whatever the order, and after errors."""

import ast
import gc
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from runtime_cases import (
    DISK,
    HOST,
    PEER,
    check_seen,
    planned,
    random_bytes,
    random_case,
    run_step,
    sources_of,
    sweep_of,
)

from vbcompile import compat, runtime, runtime_links, runtime_read, runtime_shards
from vbcompile.device import DeviceError
from vbcompile.runtime import Streamer
from vbcompile.runtime_device import AcceleratorDevice
from vbcompile.runtime_disk import StorageError
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_neighbours import copy_to_neighbours
from vbcompile.runtime_simulated import LinkRate, SimulatedDevice
from vbcompile.runtime_sources import DiskBytes, HostBytes, PeerBytes
from vbcompile.runtime_statistics import combined, table
from vbcompile.vgpu import create_vgpu_stack
from vbcompile.vgpu_plan import Tier
from vbcompile.vgpu_planner import plan_weights

MIB = 2**20


@pytest.fixture(params=["simulated", pytest.param("card", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "card":
        yield AcceleratorDevice(torch.accelerator.current_accelerator())
    else:
        found = SimulatedDevice(None, {"h2d": LinkRate(20e9, 2e-5), "disk": LinkRate(20e9)})
        yield found
        found.close()


@pytest.fixture
def unit(device):
    """Bytes that sizes below are made of."""
    return 16 * 1024 if isinstance(device, SimulatedDevice) else MIB


def streamer_of(device, sizes, budget, tiers=(HOST,), folder=None, **options):
    plan = planned(sweep_of(sizes), budget, tiers)
    assert bool(plan.reads) == (DISK in tiers)
    data = random_bytes(sizes)
    return Streamer(plan, sources_of(plan, data, device.device, folder), device, **options), data


def small_host(nbytes):
    return Tier(1, "cpu", nbytes, HOST.read_rate)


def settle(device):
    device.join(device.record())


def run_steps(streamer, data, steps=3):
    seen = []
    for _ in range(steps):
        run_step(streamer, data, seen=seen)
    check_seen(streamer, data, seen)


@pytest.mark.parametrize("seed", range(12))
def test_random_plans_bring_every_byte(device, seed):
    sweep, budget = random_case(seed)
    plan = planned(sweep, budget)
    data = random_bytes([weight.nbytes for weight in sweep.weights], seed)
    with Streamer(plan, sources_of(plan, data, device.device), device) as streamer:
        run_steps(streamer, data, 4)
        settle(device)
        found = streamer.statistics()
    assert (found["misses"], found["wasted_bytes"], found["detour_bytes"]) == (0, 0, 0)
    assert found["streamed_bytes_per_step"] == plan.streamed_bytes
    assert found["steps"] == 4 and found["step_ns"] > 0


@pytest.mark.parametrize("seed", range(6))
def test_random_plans_over_three_tiers(device, seed, tmp_path):
    sweep, budget = random_case(seed + 100)
    total = sum(weight.nbytes for weight in sweep.weights)
    plan = planned(sweep, budget, (small_host(total // 4 + 300_000), DISK))
    data = random_bytes([weight.nbytes for weight in sweep.weights], seed)
    with Streamer(plan, sources_of(plan, data, device.device, tmp_path), device) as streamer:
        run_steps(streamer, data, 4)
        assert streamer.statistics()["misses"] == 0


def test_a_plan_that_declines_keeps_everything(device):
    sizes = [5000, 0, 7]
    plan = plan_weights(sweep_of(sizes), 10**6, (HOST,))
    data = random_bytes(sizes)
    with Streamer(plan, [HostBytes(part) for part in data], device) as streamer:
        run_step(streamer, data)
        assert streamer.statistics()["streamed_bytes_per_step"] == 0
        with pytest.raises(IndexError, match="resident"):
            streamer.prefetch(0)


def test_large_copies_run_beside_a_busy_computation(device, unit):
    streamer, data = streamer_of(device, [4 * unit] * 24, 22 * unit)
    side = 2048 if unit == MIB else 32
    with streamer:
        seen, busy = [], torch.randn(side, side, device=device.device)
        for _ in range(3):
            for _ in range(10):
                busy = busy @ busy * 1e-3
            run_step(streamer, data, seen=seen)
        check_seen(streamer, data, seen)


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_order_does_not_matter(device, unit, seed, disk, tmp_path):
    """Copies are prefetched and waited for at random, some several at once: bytes may be wasted, none are wrong."""
    tiers = (small_host(10 * unit), DISK) if disk else (HOST,)
    streamer, data = streamer_of(device, [unit + 512 * index for index in range(16)], 7 * unit, tiers, tmp_path)
    rng, held, found = random.Random(seed), [], []
    with streamer:
        copies = streamer.plan.copies
        for _ in range(150):
            copy = rng.randrange(len(copies))
            if rng.random() < 0.4:
                streamer.prefetch(copy)
            elif held and rng.random() < 0.6:
                streamer.release(held.pop(rng.randrange(len(held))))
            elif copy not in held:
                held.append(copy)
                found.append((copies[copy].weight, streamer.wait(copy).clone()))
                found.append((copies[copy].weight, streamer.view(copies[copy].weight).clone()))
        for weight, got in found:
            assert torch.equal(got.cpu(), data[weight])
        assert streamer.statistics()["detour_bytes"] > 0
        run_steps(streamer, data)


def test_a_wait_twice_and_a_release_twice(device, unit):
    streamer, data = streamer_of(device, [unit] * 8, 5 * unit)
    with streamer:
        one, two = streamer.wait(0), streamer.wait(0)
        assert one.data_ptr() == two.data_ptr()
        streamer.release(0)
        streamer.release(0)
        with pytest.raises(KeyError, match="weight"):
            streamer.view(streamer.plan.copies[0].weight)
        run_steps(streamer, data)


def test_two_copies_of_one_weight_in_use_at_once(device, unit):
    sweep = sweep_of([unit] * 8, [(index,) for index in (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3)])
    plan = planned(sweep, 4 * unit)
    data = random_bytes([unit] * 8)
    weight = next(c.weight for c in plan.copies if [d.weight for d in plan.copies].count(c.weight) == 2)
    first, second = (index for index, copy in enumerate(plan.copies) if copy.weight == weight)
    with Streamer(plan, sources_of(plan, data, device.device), device) as streamer:
        for release in ((first, second), (second, first)):
            streamer.wait(first)
            streamer.wait(second)
            streamer.release(release[0])
            assert torch.equal(streamer.view(weight).cpu(), data[weight])
            streamer.release(release[1])
            with pytest.raises(KeyError):
                streamer.view(weight)
        run_steps(streamer, data)


def test_fetch_brings_any_weight_at_any_time(device, unit):
    streamer, data = streamer_of(device, [unit] * 8, 5 * unit)
    with streamer:
        for weight in (7, 0, 3, 3):
            assert torch.equal(streamer.fetch(weight).cpu(), data[weight])
        assert streamer.statistics()["fetched_bytes"] > 0
        run_steps(streamer, data)


def test_fetch_from_disk(device, unit, tmp_path):
    streamer, data = streamer_of(device, [9 * unit] * 8, 30 * unit, (small_host(40 * unit), DISK), tmp_path)
    on_disk = [weight for weight, source in enumerate(streamer.sources) if isinstance(source, DiskBytes)]
    with streamer:
        for weight in on_disk:
            assert torch.equal(streamer.fetch(weight).cpu(), data[weight])


def test_from_disk_with_pieces(device, tmp_path):
    """Weights of more than one read each, that begin inside of a block."""
    streamer, data = streamer_of(device, [9 * MIB + 8] * 6, 20 * MIB, (small_host(30 * MIB), DISK), tmp_path)
    with streamer:
        run_steps(streamer, data)


def test_a_resident_weight_is_loaded_from_disk(device, unit, tmp_path):
    from safetensors.torch import save_file

    from vbcompile.runtime_disk import safetensors_contents

    sizes = [33 * MIB if unit == MIB else 5 * unit, unit]
    data = random_bytes(sizes)
    save_file({str(index): tensor for index, tensor in enumerate(data)}, tmp_path / "w.safetensors")
    contents, _ = safetensors_contents(tmp_path / "w.safetensors")
    plan = plan_weights(sweep_of(sizes), 10**9, (HOST,))
    with Streamer(plan, [contents[str(index)].source for index in range(2)], device) as streamer:
        run_step(streamer, data)


def test_from_a_neighbour(device, unit):
    other = "cpu"
    if device.device.type != "cpu":
        if torch.accelerator.device_count() < 2:
            pytest.skip("needs two cards")
        other = f"{device.device.type}:{1 - device.device.index}"
    sizes = [3 * unit] * 16
    plan = planned(sweep_of(sizes), 12 * unit, (PEER,))
    data = random_bytes(sizes)
    with Streamer(plan, sources_of(plan, data, device.device, peer=other), device) as streamer:
        run_steps(streamer, data, 4)
        changed = random_bytes([sizes[0]], 9)[0]
        weight = plan.copies[0].weight
        streamer.store(weight, changed.to(device.device))
        assert torch.equal(streamer.fetch(weight).cpu(), changed)


def test_weights_move_to_a_neighbour_and_stores_reach_both(device, unit):
    sizes = [3 * unit] * 16
    plan = planned(sweep_of(sizes), 12 * unit, (PEER,))
    data = random_bytes(sizes)
    hosts = [HostBytes(part.clone()) for part in data]
    sources = copy_to_neighbours(plan, hosts, lambda name, nbytes: device.allocate(nbytes))
    moved = [index for index, source in enumerate(sources) if isinstance(source, PeerBytes)]
    assert moved == [index for index, level in enumerate(plan.levels) if level]
    with Streamer(plan, sources, device) as streamer:
        run_steps(streamer, data)
        changed = random_bytes([sizes[0]], 9)[0]
        streamer.store(moved[0], changed.to(device.device))
        streamer.finish_stores()
        assert torch.equal(hosts[moved[0]].memory, changed)
        assert torch.equal(sources[moved[0]].memory.cpu(), changed)
        data[moved[0]] = changed
        run_steps(streamer, data)


def test_a_neighbour_without_memory_leaves_the_weights_with_the_host(device, unit, caplog):
    def refuse(name, nbytes):
        raise torch.OutOfMemoryError("out of memory")

    sizes = [3 * unit] * 8
    plan = planned(sweep_of(sizes), 12 * unit, (PEER,))
    data = random_bytes(sizes)
    sources = copy_to_neighbours(plan, [HostBytes(part) for part in data], refuse)
    assert all(isinstance(source, HostBytes) for source in sources)
    assert "neighbour has not the" in caplog.text and len(caplog.records) == 1
    with Streamer(plan, sources, device) as streamer:
        run_steps(streamer, data)


def test_stores_reach_the_host_and_later_copies(device, unit):
    sizes = [2 * unit] * 12
    streamer, data = streamer_of(device, sizes, 9 * unit)
    with streamer:
        for round_ in range(3):
            data = random_bytes(sizes, round_ + 5)
            for weight, tensor in enumerate(data):
                streamer.store(weight, tensor.to(device.device))
            run_steps(streamer, data, 1)
        streamer.finish_stores()
        for source, tensor in zip(streamer.sources, data, strict=True):
            assert isinstance(source, HostBytes) and torch.equal(source.memory, tensor)


@pytest.mark.parametrize("nbytes", [4096, 3 * MIB])
def test_a_resident_weight_that_is_written_in_place_is_stored_as_it_was(device, nbytes):
    plan = plan_weights(sweep_of([nbytes, 100]), 10**9, (HOST,))
    data = random_bytes([nbytes, 100])
    with Streamer(plan, sources_of(plan, data, device.device), device) as streamer:
        view = streamer.view(0)
        for value in range(5):
            view.fill_(value)
            streamer.store(0, view)
        view.fill_(99)
        streamer.finish_stores()
        assert bool((streamer.sources[0].memory == 4).all()) and bool((streamer.view(0) == 99).all())


def test_stores_that_make_no_sense(device, unit, tmp_path):
    streamer, _ = streamer_of(device, [9 * unit] * 8, 30 * unit, (small_host(40 * unit), DISK), tmp_path)
    on_disk = next(weight for weight, source in enumerate(streamer.sources) if isinstance(source, DiskBytes))
    with streamer:
        with pytest.raises(ValueError, match="lives on disk"):
            streamer.store(on_disk, torch.empty(9 * unit, dtype=torch.uint8, device=device.device))
        with pytest.raises(ValueError, match="bytes, not"):
            streamer.store(0, torch.empty(8, dtype=torch.uint8, device=device.device))


def test_saves_many_tensors_within_bounded_memory(device):
    part = 32 * MIB if device.device.type != "cpu" else 8 * MIB
    streamer, _ = streamer_of(device, [1000] * 8, 5000)
    targets = HostMemory(device.device).allocate([part] * 16)
    with streamer:
        settle(device)
        before = device.allocated_bytes()
        for number, target in enumerate(targets):
            value = device.allocate(part)
            value.fill_(number)
            streamer.save(value, target)
            del value
            assert device.allocated_bytes() - before <= 128 * MIB
        streamer.finish_stores()
        for number, target in enumerate(targets):
            assert bool((target == number).all())


def test_peak_stays_within_the_plan(device, unit):
    streamer, _ = streamer_of(device, [8 * unit] * 16, 40 * unit)
    if device.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    before = device.allocated_bytes()
    with streamer:
        for _ in range(3):
            with streamer.step():
                for action, target in streamer.plan.program():
                    if action != "run":
                        getattr(streamer, action)(target)
        settle(device)
        assert device.peak_bytes() - before <= streamer.plan.budget


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


def test_calls_from_several_threads(device, unit):
    streamer, data = streamer_of(device, [unit] * 10, 6 * unit)
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(30):
            weight = rng.randrange(10)
            if not torch.equal(streamer.fetch(weight).cpu(), data[weight]):
                wrong.append(weight)

    with streamer:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        run_steps(streamer, data, 5)
        for thread in threads:
            thread.join()
    assert not wrong


def test_started_inside_inference_mode_and_used_outside(device, unit):
    streamer, data = streamer_of(device, [unit] * 8, 5 * unit)
    with torch.inference_mode():
        streamer.start()
        run_steps(streamer, data, 1)
    run_steps(streamer, data, 1)
    streamer.close()


def test_recorded_timeline(device, unit):
    streamer, data = streamer_of(device, [4 * unit] * 12, 18 * unit, record=True)
    with streamer:
        with pytest.raises(ValueError, match="complete"):
            streamer.timeline()
        run_steps(streamer, data)
        spans, memory = streamer.timeline(), streamer.memory_timeline()
        found = streamer.statistics()
    lanes = {span.lane for span in spans}
    assert {"h2d", "compute", "stall"} <= lanes
    assert all(span.start_ns <= span.end_ns for span in spans)
    assert sum(span.nbytes for span in spans) == streamer.plan.streamed_bytes
    assert sum(span.lane == "compute" for span in spans) == 12
    assert found["gbps"]["h2d"] > 0 and found["stall_ns"] >= 0
    assert memory and all(sample.nbytes > 0 for sample in memory)


def test_the_counters_of_the_stack_and_the_table(device, unit, tmp_path):
    stack = create_vgpu_stack(
        {
            "levels": [
                {"device": "cuda:0", "capacity_mb": 64},
                {"device": "cpu", "capacity_mb": 64},
                {"device": "ssd", "capacity_mb": 64, "path": str(tmp_path)},
            ]
        }
    )
    streamer, data = streamer_of(
        device, [2 * unit] * 16, 9 * unit, (small_host(20 * unit), DISK), tmp_path, stack=stack, record=True
    )
    with streamer:
        run_steps(streamer, data)
        streamer.save(device.allocate(100), torch.empty(100, dtype=torch.uint8))
        run_steps(streamer, data, 1)
        found = streamer.statistics()
    top, host, disk = (level.statistics for level in stack.levels)
    assert host.bytes_out == found["links"]["h2d"]["bytes"] and disk.bytes_out == found["links"]["disk"]["bytes"]
    assert host.transfers_in == 1 and host.bytes_in == 100 and host.bytes_out + disk.bytes_out == top.bytes_in
    assert (top.hits, top.misses, top.evictions) == (found["hits"], 0, found["evictions"])
    assert top.hits == 4 * len(streamer.plan.copies)
    text = table(found)
    assert "h2d" in text and "disk" in text and "4 steps" in text and "predicted" in text
    twice = combined([found, found])
    assert twice["links"]["h2d"] == {"copies": 2 * found["links"]["h2d"]["copies"], "bytes": 2 * host.bytes_out}
    assert (twice["steps"], twice["step_ns"]) == (8, found["step_ns"]) and combined([]) == {}


def test_nothing_is_recorded_unless_asked(device, unit):
    streamer, data = streamer_of(device, [unit] * 8, 5 * unit)
    with streamer:
        run_step(streamer, data)
        with pytest.raises(ValueError, match="record=True"):
            streamer.timeline()
        with pytest.raises(ValueError, match="record=True"):
            streamer.memory_timeline()
        assert "gbps" not in streamer.statistics()


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
        settle(device)
        file.write_bytes(whole)
        os.utime(file, ns=(identity.st_atime_ns, identity.st_mtime_ns))
        run_steps(streamer, data)  # what failed is tried again


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


def test_the_runtime_names_no_vendor_and_waits_for_no_whole_device():
    for path in Path(runtime.__file__).parent.glob("runtime*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"cuda", "xpu", "npu", "hpu", "record_stream"}, path.name
        if "activation" not in path.name:
            text = path.read_text()
            assert "accelerator.synchronize" not in text and "backend.synchronize" not in text, path.name


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


def test_copies_that_leave_slowly_keep_little_memory_alive(monkeypatch):
    monkeypatch.setattr(runtime_links, "_MOST_LEAVING", 250_000)
    device = SimulatedDevice(None, {"d2h": LinkRate(20e6)})
    plan = plan_weights(sweep_of([100]), 10**9, (HOST,))
    targets = [torch.empty(100_000, dtype=torch.uint8) for _ in range(10)]
    with Streamer(plan, [HostBytes(random_bytes([100])[0])], device) as streamer:
        for number, target in enumerate(targets):
            value = device.allocate(100_000)
            value.fill_(number)
            streamer.save(value, target)
            del value
            assert device.allocated_bytes() < 500_000
        streamer.finish_stores()
        assert all(bool((target == number).all()) for number, target in enumerate(targets))
        with pytest.raises(ValueError, match="the target has 3 bytes"):
            streamer.save(device.allocate(4), torch.empty(3, dtype=torch.uint8))
    device.close()
