"""The offload runtime, on the simulated device and on a card: every byte, whatever the order, and what it counts."""

import ast
import random
import threading
from pathlib import Path

import pytest
import torch
from runtime_cases import (
    DISK,
    HOST,
    check_seen,
    planned,
    random_bytes,
    random_case,
    run_step,
    run_steps,
    small_host,
    sources_of,
    streamer_of,
    sweep_of,
)

from vbcompile import runtime
from vbcompile.runtime import Streamer
from vbcompile.runtime_sources import DiskBytes, HostBytes
from vbcompile.runtime_statistics import combined, table
from vbcompile.vgpu import create_vgpu_stack
from vbcompile.vgpu_planner import plan_weights

MIB = 2**20


@pytest.mark.parametrize("seed", range(12))
def test_random_plans_bring_every_byte(device, seed):
    sweep, budget = random_case(seed)
    plan = planned(sweep, budget)
    data = random_bytes([weight.nbytes for weight in sweep.weights], seed)
    with Streamer(plan, sources_of(plan, data, device.device), device) as streamer:
        run_steps(streamer, data, 4)
        device.join(device.record())
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


def test_a_copy_into_one_place_is_no_write_to_another(device, unit):
    """Autograd compares the version of what it was given, and copies arrive at any moment."""
    plan = planned(sweep_of([unit] * 8, [(0, 1), (2, 3), (4, 5), (6, 7)]), 4 * unit)
    with Streamer(plan, sources_of(plan, random_bytes([unit] * 8), device.device), device) as streamer:
        held = streamer.wait(0)
        version = held._version
        for copy in range(1, len(plan.copies)):
            streamer.wait(copy)
            streamer.release(copy)
        assert held._version == version and streamer.statistics()["evictions"]


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
        device.join(device.record())
        assert device.peak_bytes() - before <= streamer.plan.budget


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
    assert host.gbps == pytest.approx(found["gbps"]["h2d"]) and disk.timed_bytes > 0  # those of the last step
    assert top.stall_ns == found["stall_ns"]
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


def test_the_runtime_names_no_vendor_and_waits_for_no_whole_device():
    for path in Path(runtime.__file__).parent.glob("runtime*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"cuda", "xpu", "npu", "hpu", "record_stream"}, path.name
        if "activation" not in path.name:
            text = path.read_text()
            assert "accelerator.synchronize" not in text and "backend.synchronize" not in text, path.name
