"""The offload runtime writes: to neighbours, to the host and to tensors of the caller's, within bounded memory."""

import pytest
import torch
from runtime_cases import (
    DISK,
    HOST,
    PEER,
    planned,
    random_bytes,
    run_steps,
    small_host,
    sources_of,
    streamer_of,
    sweep_of,
)

from vbcompile import runtime_links
from vbcompile.runtime import Streamer
from vbcompile.runtime_host import HostMemory
from vbcompile.runtime_neighbours import copy_to_neighbours
from vbcompile.runtime_simulated import LinkRate, SimulatedDevice
from vbcompile.runtime_sources import DiskBytes, HostBytes, PeerBytes
from vbcompile.vgpu_planner import plan_weights

MIB = 2**20


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
        device.join(device.record())
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
