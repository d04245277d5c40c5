"""The tier model: what it detects, what users may write, what it counts, what it measures."""

import errno
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from fake_devices import make_bare, plug_in
from hypothesis import given
from hypothesis import strategies as st

from vbcompile import vgpu_calibration
from vbcompile.config_error import ConfigError
from vbcompile.device import GIB, DeviceError, forget_devices
from vbcompile.vgpu import VGPUStack, create_vgpu_stack
from vbcompile.vgpu_calibration import calibrate
from vbcompile.vgpu_config import read_max_memory
from vbcompile.vgpu_size import MIB, parse_size

LEVELS = {
    "levels": [
        {"capacity_mb": 20_000, "device": "cuda:0", "speed_gbps": 3350},
        {"capacity_mb": 40_000, "device": "cuda:1", "speed_gbps": 370, "latency_us": 12},
        {"capacity_mb": 96_000, "device": "cpu", "speed_gbps": 55},
        {"capacity_mb": 1_000_000, "device": "ssd"},
    ]
}


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    make_bare(monkeypatch)
    for name in ("VB_HBM_BUDGET", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    forget_devices()


# Explicit levels


def test_an_explicit_stack_describes_any_machine():
    stack = create_vgpu_stack(LEVELS)
    assert [(lv.number, lv.kind, lv.device, lv.source) for lv in stack.levels] == [
        (0, "device", "cuda:0", "given"),
        (1, "peer", "cuda:1", "given"),
        (2, "host", "cpu", "given"),
        (3, "disk", "ssd", "default"),
    ]
    assert stack.budget == 20_000 * MIB and stack.levels[2].capacity_mb == 96_000
    peer, host, disk = stack.tiers()
    assert (peer.read_rate, peer.latency_ns, peer.via) == (370 * 10**9, 12_000, None)
    assert (host.read_rate, host.via) == (55 * 10**9, None)
    assert (disk.read_rate, disk.via) == (7 * 10**9, 2)
    assert "cuda:1 40000 MB 370 GB/s" in repr(stack)


def test_a_stack_can_be_written_down_and_built_again():
    stack = create_vgpu_stack(LEVELS, path="/nvme/vb")
    again = create_vgpu_stack(json.loads(json.dumps(stack.to_config())))
    assert again.tiers() == stack.tiers() and again.budget == stack.budget
    assert again.levels[3].path == "/nvme/vb"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "one key 'levels'"),
        ({"levels": []}, "at least one level"),
        ({"levels": "cuda"}, "at least one level"),
        ({"level": []}, "one key 'levels'"),
        ([3], "level 0 must be a dictionary"),
        ([{"device": "cuda:0"}], "'capacity_mb' is missing"),
        ([{"capacity_mb": 5}], "'device' is missing"),
        ([{"device": "cuda:0", "capacity_mb": 5, "speed_gbs": 1}], "did you mean 'speed_gbps'"),
        ([{"device": "tpu:0", "capacity_mb": 5}], "a disk level is called 'ssd'"),
        ([{"device": "cuda:x", "capacity_mb": 5}], "malformed device"),
        ([{"device": "cuda:0", "capacity_mb": 0}], "capacity_mb must be a positive number"),
        ([{"device": "cuda:0", "capacity_mb": float("nan")}], "capacity_mb must be a positive number"),
        ([{"device": "cuda:0", "capacity_mb": True}], "capacity_mb must be a positive number"),
        ([{"device": "cuda:0", "capacity_mb": "20GiB"}], "capacity_mb must be a positive number"),
        ([{"device": "cuda:0", "capacity_mb": 1, "speed_gbps": -3}], "speed_gbps must be a positive number"),
        ([{"device": "cuda:0", "capacity_mb": 1, "speed_gbps": 1e-12}], "less than one byte per second"),
        ([{"device": "cuda:0", "capacity_mb": 1, "latency_us": -1}], "latency_us"),
        ([{"device": "cuda:0", "capacity_mb": 1}, {"device": "cuda", "capacity_mb": 1}], "one level only"),
        ([{"device": "ssd", "capacity_mb": 1}], "level 0 is the device"),
        ([{"device": "cuda:0", "capacity_mb": 1}, {"device": "nvme", "capacity_mb": 1}], "add a 'cpu' level"),
        ([{"device": "cpu", "capacity_mb": 1}, {"device": "cuda:0", "capacity_mb": 1}], "for the CPU"),
    ],
)
def test_levels_that_make_no_sense_are_refused(config, says):
    with pytest.raises(ConfigError, match=says):
        create_vgpu_stack(config)


# Sizes, budgets and max_memory


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("20GiB", 20 * GIB), ("1.5 GiB", 3 * GIB // 2), ("512MB", 512 * 10**6), ("7", 7), (" 3KiB ", 3072), (9, 9),
     ("0.001TB", 10**9), ("64B", 64)],
)  # fmt: skip
def test_sizes_are_read_as_accelerate_reads_them(text, nbytes):
    assert parse_size("x", text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "20gb", "20 Gb", "-1GiB", "0", 0, -5, True, 1.5, None, "1e9", "20GiBs", "٣"]
)
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"budget=.*is not an amount of memory"):
        parse_size("budget", text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text):
    try:
        assert parse_size("x", text) > 0
    except ConfigError as error:
        assert "GiB" in str(error)


def test_the_budget_comes_from_the_argument_then_the_environment(caplog):
    assert create_vgpu_stack(LEVELS, environ={}).budget == 20_000 * MIB
    environ = {"VB_HBM_BUDGET": "8GiB"}
    assert create_vgpu_stack(LEVELS, environ=environ).budget == 8 * GIB
    assert create_vgpu_stack(LEVELS, budget="6GiB", environ=environ).budget == 6 * GIB
    assert create_vgpu_stack(LEVELS, budget=123, environ=environ).budget == 123
    assert not caplog.records
    assert create_vgpu_stack(LEVELS, budget="1TiB").budget == 20_000 * MIB
    assert "more than cuda:0 has" in caplog.text
    with pytest.raises(ConfigError, match="VB_HBM_BUDGET='plenty'"):
        create_vgpu_stack(LEVELS, environ={"VB_HBM_BUDGET": "plenty"})


def test_max_memory_speaks_accelerates_language(monkeypatch, tmp_path):
    plug_in(monkeypatch, "nvidia", count=3)
    limits = {0: "20GiB", 2: "40GiB", "cpu": "1MiB", "disk": str(tmp_path / "vb")}
    stack = create_vgpu_stack(max_memory=limits)
    assert [(lv.device, lv.capacity) for lv in stack.levels[:3]] == [
        ("cuda:0", 20 * GIB),
        ("cuda:2", 40 * GIB),
        ("cpu", MIB),
    ]
    assert stack.levels[3].path == str(tmp_path / "vb") and not (tmp_path / "vb").exists()
    assert [lv.device for lv in create_vgpu_stack(max_memory={1: "1GiB"}).levels] == ["cuda:1", "cpu"]
    assert create_vgpu_stack(max_memory={0: "1GiB", "disk": "3MiB"}).levels[-1].capacity == 3 * MIB


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"gpu": "1GiB"}, "unknown key 'gpu'"),
        ({-1: "1GiB"}, "unknown key -1"),
        ({True: "1GiB"}, "unknown key True"),
        ({0: "lots"}, r"max_memory\[0\]='lots'"),
        ({"cpu": None}, r"max_memory\['cpu'\]=None"),
        ([1], "must be a dictionary"),
    ],
)
def test_max_memory_that_makes_no_sense_is_refused(limits, says):
    with pytest.raises(ConfigError, match=says):
        read_max_memory(limits)


def test_cards_that_are_not_here_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="no accelerator here"):
        create_vgpu_stack(max_memory={0: "1GiB"})
    with pytest.raises(DeviceError, match="cuda"):
        create_vgpu_stack(device="cuda")
    plug_in(monkeypatch, "nvidia", count=2)
    with pytest.raises(ConfigError, match="names card 5; there are 2"):
        create_vgpu_stack(max_memory={0: "1GiB", 5: "1GiB"})
    with pytest.raises(ConfigError, match="not both"):
        create_vgpu_stack(LEVELS, max_memory={0: "1GiB"})


# Detection


@pytest.mark.parametrize(("vendor", "kind"), [("nvidia", "cuda"), ("amd", "cuda"), ("intel", "xpu"), ("habana", "hpu")])
def test_every_vendors_cards_become_levels(monkeypatch, vendor, kind):
    cards = plug_in(monkeypatch, vendor, count=2)
    cards.allocated[0] = 3 * GIB
    stack = create_vgpu_stack()
    assert [level.device for level in stack.levels] == [f"{kind}:0", f"{kind}:1", "cpu", "ssd"]
    free, _ = getattr(torch, kind).mem_get_info(0)
    assert stack.budget == free
    assert [level.source for level in stack.levels] == ["default"] * 4


def test_neighbours_belong_to_other_processes_under_a_launcher(monkeypatch):
    plug_in(monkeypatch, "nvidia", count=4)
    assert len(create_vgpu_stack(environ={"WORLD_SIZE": "1"}).levels) == 6
    alone = create_vgpu_stack(device="cuda:2", environ={"WORLD_SIZE": "4"})
    assert [level.device for level in alone.levels] == ["cuda:2", "cpu", "ssd"]
    named = create_vgpu_stack(max_memory={2: "1GiB", 3: "1GiB"}, environ={"WORLD_SIZE": "4"})
    assert [level.device for level in named.levels] == ["cuda:2", "cuda:3", "cpu"]


def test_a_driver_that_does_not_tell_free_memory(monkeypatch, caplog):
    plug_in(monkeypatch, "intel", count=1)
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda index: (_ for _ in ()).throw(RuntimeError("unsupported")))
    assert create_vgpu_stack().budget == 12 * GIB
    assert "does not tell its free memory" in caplog.text


def test_without_a_card_host_memory_computes_and_the_disk_is_behind_it(tmp_path):
    stack = create_vgpu_stack()
    assert [(lv.kind, lv.device, lv.speed_gbps) for lv in stack.levels] == [("device", "cpu", 40), ("disk", "ssd", 7)]
    (disk,) = stack.tiers()
    assert disk.via is None and stack.levels[1].path == str(tmp_path / "vbcompile" / "offload")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="which is a file"):
        create_vgpu_stack(path=tmp_path / "file" / "below")


def test_the_tier_model_leaves_torch_cuda_alone():
    for path in Path(vgpu_calibration.__file__).parent.glob("vgpu*.py"):
        text = path.read_text()
        assert "torch.cuda" not in text and "torch.xpu" not in text, path.name
    assert "import torch\n" not in Path(vgpu_calibration.__file__).with_name("vgpu_planner.py").read_text()


# Statistics


def test_statistics_count_per_level():
    stack = create_vgpu_stack(LEVELS)
    stack.record_use(0, hits=3, misses=2)
    stack.record_transfer(2, 0, 1000)
    stack.record_transfer(0, 3, 500)
    stack.record_time(2, 1000, 20, stall_ns=7)
    stack.record_eviction(0)
    device, _, host, disk = stack.statistics()
    assert device["statistics"] | {"gbps": None} == {
        "hits": 3,
        "misses": 2,
        "evictions": 1,
        "transfers_in": 1,
        "transfers_out": 1,
        "bytes_in": 1000,
        "bytes_out": 500,
        "timed_bytes": 0,
        "busy_ns": 0,
        "stall_ns": 7,
        "gbps": None,
    }
    assert host["statistics"]["gbps"] == 50.0 and disk["statistics"]["gbps"] is None
    assert disk["statistics"]["bytes_in"] == 500
    assert json.loads(stack.to_json())["levels"][2]["statistics"]["bytes_out"] == 1000
    assert stack.with_budget(5).statistics()[0]["statistics"]["hits"] == 0
    stack.reset_statistics()
    assert not any(v for level in stack.statistics() for v in level["statistics"].values())


def test_statistics_lose_nothing_between_threads():
    stack = create_vgpu_stack(LEVELS)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: [stack.record_transfer(2, 0, 3) for _ in range(500)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert stack.levels[0].statistics.bytes_in == 6000 and stack.levels[2].statistics.transfers_out == 2000


# Calibration


def test_the_cpu_and_its_disk_are_measured_in_a_short_time(tmp_path):
    found = calibrate("cpu", path=tmp_path / "new", nbytes=4 * MIB, disk_bytes=16 * MIB)
    assert found.device == "cpu" and found.seconds < 20
    for rate in (found.memory, found.matmul, found.host, found.disk):
        assert rate is not None and 10**6 < rate < 10**15
    assert found.h2d is None and found.reasons["h2d"] == "there is no accelerator"
    assert list((tmp_path / "new").iterdir()) == []


def test_measured_rates_replace_defaults_but_not_what_was_given(tmp_path):
    stack = create_vgpu_stack(
        [{"device": "cpu", "capacity_mb": 64}, {"device": "ssd", "capacity_mb": 64}], path=tmp_path
    )
    found = stack.calibrate()
    assert [level.source for level in stack.levels] == ["measured", "measured"]
    assert stack.levels[1].read_rate == found.disk and stack.calibration is found
    given = create_vgpu_stack([{"device": "cpu", "capacity_mb": 64, "speed_gbps": 3}], measure=True)
    assert given.levels[0].read_rate == 3 * 10**9 and given.levels[0].source == "given"


def test_a_file_system_without_unbuffered_reads_is_read_through_the_cache(tmp_path, monkeypatch):
    opened = os.open

    def refuse(name, flags, *rest):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(name, flags, *rest)

    monkeypatch.setattr(vgpu_calibration.os, "open", refuse)
    found = calibrate("cpu", path=tmp_path, nbytes=MIB, disk_bytes=8 * MIB)
    assert found.disk and not found.disk_direct


def test_a_full_or_closed_disk_leaves_the_reason(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(vgpu_calibration.os, "posix_fallocate", full)
    found = calibrate("cpu", path=tmp_path, nbytes=MIB, disk_bytes=8 * MIB)
    assert found.disk is None and "No space left" in found.reasons["disk"] and "disk was not measured" in caplog.text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "file" in calibrate("cpu", path=tmp_path / "file", nbytes=MIB).reasons["disk"]
    assert calibrate("cpu", nbytes=MIB).reasons["disk"] == "no folder was named"


def test_a_short_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(vgpu_calibration.os, "preadv", lambda *_: 4096)
    found = calibrate("cpu", path=tmp_path, nbytes=MIB, disk_bytes=8 * MIB)
    assert found.disk is None and "read 4096 of" in found.reasons["disk"]


@pytest.mark.gpu
def test_a_real_cards_links_are_measured(monkeypatch, tmp_path):
    monkeypatch.undo()
    forget_devices()
    stack = create_vgpu_stack(path=tmp_path)
    found = stack.calibrate()
    assert found.h2d and found.d2h and found.latency_ns
    assert 10**9 < found.h2d < 10**12 and found.memory > found.h2d
    assert found.latency_ns < 100_000 and found.matmul > 10**12
    assert set(found.peers) == {level.device for level in stack.levels if level.kind == "peer"}
    assert all(level.source == "measured" for level in stack.levels)


def test_a_stack_needs_levels():
    with pytest.raises(ConfigError, match="at least one level"):
        VGPUStack([])
