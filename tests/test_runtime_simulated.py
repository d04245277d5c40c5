"""The simulated device finds what a card would only show now and then; and the ring's ledger."""

import random
import time

import pytest
import torch
from runtime_cases import DISK, HOST, planned, random_bytes, run_step, sources_of, sweep_of

from vbcompile.runtime import Streamer
from vbcompile.runtime_ledger import Ledger
from vbcompile.runtime_simulated import LinkRate, RaceError, SimulatedDevice
from vbcompile.vgpu_plan import Tier


@pytest.fixture
def device():
    found = SimulatedDevice(10_000)
    yield found
    found.close()


@pytest.fixture
def source():
    return torch.arange(100, dtype=torch.uint8)


def test_a_copy_that_is_waited_for(device, source):
    queue, target = device.queue("h2d"), device.allocate(100)
    device.copy(queue, target, source)
    ready = device.record(queue)
    device.wait(None, ready)
    device.begin_use(target)
    assert torch.equal(target, source) and device.is_over(ready) and device.copied == {"h2d": 100}
    device.end_use(target)


def test_a_read_before_its_copy_is_done(device, source):
    queue, target = device.queue("h2d"), device.allocate(100)
    early = device.record(queue)
    device.copy(queue, target, source)
    device.wait(None, early)  # an event, but the wrong one
    with pytest.raises(RaceError, match="read by compute is not ordered after a write by h2d"):
        device.begin_use(target)


def test_an_overwrite_of_bytes_in_use(device, source):
    queue, target = device.queue("h2d"), device.allocate(100)
    device.begin_use(target[:50])
    device.wait(queue, device.record())
    device.copy(queue, target[50:], source[50:])
    with pytest.raises(RaceError, match="not over"):
        device.copy(queue, target[40:60], source[:20])
    device.end_use(target[:50])
    with pytest.raises(RaceError, match="write by h2d is not ordered after a read by compute"):
        device.copy(queue, target[40:60], source[:20])
    device.wait(queue, device.record())
    device.copy(queue, target[40:60], source[:20])


def test_two_queues_that_write_the_same_bytes(device, source):
    one, two, target = device.queue("h2d"), device.queue("disk"), device.allocate(100)
    device.copy(one, target, source)
    with pytest.raises(RaceError, match="write by disk"):
        device.copy(two, target, source)
    device.wait(two, device.record(one))
    device.copy(two, target, source)


def test_a_host_buffer_that_is_still_being_read(device, source):
    queue, target = device.queue("h2d"), device.allocate(100)
    device.copy(queue, target, source)
    with pytest.raises(RaceError, match="write by host"):
        device.host_writes(source[10:20])
    device.join(device.record(queue))
    device.host_writes(source[10:20])


def test_bytes_are_poisoned_until_the_copy_is_done(source):
    device = SimulatedDevice(None, {"slow": LinkRate(1e9, 0.05)})
    queue, target = device.queue("slow"), device.allocate(100)
    begun = time.perf_counter()
    device.copy(queue, target, source)
    ready = device.record(queue, timing=True)
    assert bool((target == 0xFF).all()) and not device.is_over(ready)
    device.wait(None, ready)
    assert torch.equal(target, source) and time.perf_counter() - begun >= 0.05
    assert device.elapsed_ns(ready, device.record(timing=True)) >= 0
    device.close()


def test_capacity(device):
    first = device.allocate(9_000)
    with pytest.raises(torch.OutOfMemoryError, match="9000 of 10000"):
        device.allocate(2_000)
    del first
    device.allocate(2_000)
    assert device.peak_bytes() == 9_000 and device.allocated_bytes() == 0


def test_copies_of_other_sizes(device, source):
    with pytest.raises(ValueError, match="100 bytes into 50"):
        device.copy(device.queue("h2d"), device.allocate(50), source)


class Forgetful(SimulatedDevice):
    """Leaves out some of the waits that the runtime asks for, and never happens to find a copy over, which would excuse
    a wait that is left out."""

    def __init__(self, forget):
        super().__init__()
        self.forget = forget

    def wait(self, queue, event):
        if not self.forget("compute" if queue is None else queue.name):
            super().wait(queue, event)

    def join(self, event):
        if not self.forget("host"):
            super().join(event)

    def is_over(self, event):
        return False


def forgetful_run(forget, tiers, folder):
    device = Forgetful(lambda _: False)
    sizes = [20_000] * 16
    plan = planned(sweep_of(sizes), 90_000, tiers)
    data = random_bytes(sizes)
    streamer = Streamer(plan, sources_of(plan, data, device.device, folder), device)
    streamer.start()
    device.forget = forget
    try:
        for _ in range(3):
            run_step(streamer, data, seen=[])
    finally:
        device.forget = lambda _: False
        streamer.abandon()
        streamer.close()
        device.close()


WITH_DISK = (Tier(1, "cpu", 160_000, HOST.read_rate), DISK)


# without a disk where the threads that read it would have waited for what the computation and the link leave out
@pytest.mark.parametrize(
    ("who", "tiers"), [("compute", (HOST,)), ("h2d", (HOST,)), ("disk", WITH_DISK), ("host", WITH_DISK)]
)
def test_no_wait_of_the_runtime_is_there_for_nothing(who, tiers, tmp_path):
    forgetful_run(lambda _: False, tiers, tmp_path)
    with pytest.raises(RaceError):
        forgetful_run(lambda name: name == who, tiers, tmp_path)


def test_the_ledger_against_single_bytes():
    rng = random.Random(0)
    for _ in range(200):
        ledger, bytes_ = Ledger(), [None] * 60
        for owner in range(25):
            begin = rng.randrange(60)
            end = min(begin + rng.randrange(20), 60)
            wanted = list(dict.fromkeys(value for value in bytes_[begin:end] if value is not None))
            assert list(dict.fromkeys(ledger.owners(begin, end))) == wanted
            ledger.claim(begin, end, owner)
            bytes_[begin:end] = [owner] * (end - begin)
