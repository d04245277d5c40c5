"""Main memory within a container's limit."""

import psutil
import pytest

from vbcompile import device_host
from vbcompile.device_host import HostModule, cpu_name


def _cgroup(monkeypatch, folder, limit: str, used: int, stat: str) -> None:
    for name, text in (("max", limit), ("current", str(used)), ("stat", stat)):
        (folder / name).write_text(text)
    files = tuple(str(folder / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(device_host, "_CGROUP", (files,))


@pytest.mark.parametrize("stat", ["anon 5\ninactive_file 1000\n", "cache 5\ntotal_inactive_file 1000\n"])
def test_a_containers_limit_bounds_the_memory(monkeypatch, tmp_path, stat):
    _cgroup(monkeypatch, tmp_path, "1000000\n", 400_000, stat)
    assert HostModule().mem_get_info() == (601_000, 1_000_000)


def test_a_full_container_has_nothing_left(monkeypatch, tmp_path):
    _cgroup(monkeypatch, tmp_path, "1000", 5000, "inactive_file 0")
    assert HostModule().mem_get_info() == (0, 1000)


@pytest.mark.parametrize("limit", ["max\n", str(2**63 - 4096)])
def test_without_a_limit_the_machine_counts(monkeypatch, tmp_path, limit):
    _cgroup(monkeypatch, tmp_path, limit, 10, "inactive_file 0")
    assert HostModule().mem_get_info()[1] == psutil.virtual_memory().total


def test_the_processor_has_a_name():
    assert cpu_name() == HostModule().get_device_name() != ""
