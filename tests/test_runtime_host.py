"""Pinned host memory: cut to size, degraded with one warning, and given back in the right order."""

import gc
import logging

import pytest
import torch

from vbcompile import compat, runtime_host
from vbcompile.runtime_host import HostMemory, describe_limits

MIB = 2**20
CUDA = torch.device("cuda", 0)


class Driver:
    """Stands in for the driver that pins pages; refuses beyond a limit."""

    def __init__(self, monkeypatch, most=None, largest=None):
        self.regions, self.released, self.most, self.largest = {}, [], most, largest
        monkeypatch.setattr(compat, "register_host_memory", self.register)
        monkeypatch.setattr(compat, "unregister_host_memory", self.unregister)

    def register(self, device, address, nbytes):
        assert address % 4096 == 0 and nbytes % 4096 == 0, "whole pages"
        total = sum(self.regions.values()) + nbytes
        if (self.most is not None and total > self.most) or (self.largest is not None and nbytes > self.largest):
            return "CUDA error: out of memory"
        self.regions[address] = nbytes
        return ""

    def unregister(self, address):
        nbytes = self.regions.pop(address)
        (torch.frombuffer((ctypes_bytes(address, nbytes)), dtype=torch.uint8)[::4096]).sum()  # still mapped
        self.released.append(nbytes)


def ctypes_bytes(address, nbytes):
    import ctypes

    return (ctypes.c_ubyte * nbytes).from_address(address)


@pytest.mark.parametrize("alignment", [256, 4096])
def test_parts_are_aligned_apart_and_of_their_size(monkeypatch, alignment):
    driver = Driver(monkeypatch)
    sizes = [1, 255, 256, 257, 10_000, 0, 3 * MIB + 1]
    parts = HostMemory(CUDA).allocate(sizes, alignment=alignment)
    assert [part.numel() for part in parts] == sizes
    assert all(part.data_ptr() % alignment == 0 for part in parts if part.numel())
    for value, part in enumerate(parts):
        part.fill_(value)
    assert all(bool((part == value).all()) for value, part in enumerate(parts))
    assert len(driver.regions) == 1


def test_pinned_bytes_are_those_of_the_contents(monkeypatch):
    driver = Driver(monkeypatch)
    memory = HostMemory(CUDA, slab_bytes=16 * MIB)
    parts = memory.allocate([3 * MIB + 100] * 20)
    assert len(parts) == 20 and len(driver.regions) == 4
    assert memory.use.payload == 20 * (3 * MIB + 100) and memory.use.pageable == 0
    assert memory.use.pinned == sum(driver.regions.values()) <= 1.03 * memory.use.payload


def test_a_tensor_larger_than_a_slab_has_one_of_its_own(monkeypatch):
    driver = Driver(monkeypatch)
    HostMemory(CUDA, slab_bytes=MIB).allocate([4 * MIB, 100])
    assert sorted(driver.released + list(driver.regions.values())) == [4096, 4 * MIB]


def test_a_slab_is_unregistered_before_it_is_unmapped_and_not_while_a_part_lives(monkeypatch):
    driver = Driver(monkeypatch)
    parts = HostMemory(CUDA).allocate([MIB, MIB])
    last = parts[1][5:9]
    del parts
    gc.collect()
    assert driver.regions and not driver.released
    last.fill_(1)
    del last
    gc.collect()
    assert not driver.regions and driver.released == [2 * MIB]


def test_smaller_slabs_are_tried(monkeypatch, caplog):
    driver = Driver(monkeypatch, largest=20 * MIB)
    memory = HostMemory(CUDA, slab_bytes=64 * MIB)
    parts = memory.allocate([MIB] * 64)
    assert len(driver.regions) == 4 and memory.use.pageable == 0 and not caplog.records
    assert len(parts) == 64


def test_what_cannot_be_pinned_is_pageable_with_one_warning(monkeypatch, caplog):
    driver = Driver(monkeypatch, most=40 * MIB)
    memory = HostMemory(CUDA, slab_bytes=16 * MIB)
    with caplog.at_level(logging.WARNING):
        parts = memory.allocate([MIB] * 64) + memory.allocate([MIB] * 8)
    assert len(parts) == 72 and all(part.fill_(3).sum() == 3 * MIB for part in parts)
    assert memory.use.pinned == sum(driver.regions.values()) and memory.use.pageable >= 32 * MIB
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("HOST memory") and "of 64.00 MiB" in text and "RLIMIT_MEMLOCK" in text
    assert "available" in text and "out of memory" in text


def test_more_than_the_machine_has(monkeypatch):
    Driver(monkeypatch)
    with pytest.raises(MemoryError, match="HOST memory"):
        HostMemory(CUDA).allocate([2**55])


def test_no_more_is_pinned_than_is_available(monkeypatch):
    driver = Driver(monkeypatch)
    memory = HostMemory(CUDA, slab_bytes=16 * MIB)
    memory.allocate([16 * MIB])
    with pytest.raises(MemoryError, match="HOST memory"):
        monkeypatch.setattr(runtime_host, "available_memory", lambda: 10 * MIB)
        memory.allocate([16 * MIB])
    assert len(driver.released) + len(driver.regions) == 1


def test_vendors_without_registration_lose_little_to_powers_of_two(monkeypatch):
    asked = []

    def pinned(nbytes, dtype, pin_memory):
        asked.append(nbytes)
        return real(nbytes, dtype=dtype)

    real = torch.empty
    monkeypatch.setattr(runtime_host.torch, "empty", pinned)
    memory = HostMemory(torch.device("xpu", 0), slab_bytes=64 * MIB)
    parts = memory.allocate([MIB + 70_000] * 100)
    assert len(parts) == 100 and all(size & (size - 1) == 0 for size in asked)
    assert memory.use.pinned == sum(asked) <= 1.06 * memory.use.payload


def test_vendors_that_refuse(caplog):
    memory = HostMemory(torch.device("xpu", 0))  # not here: PyTorch cannot pin for it
    with caplog.at_level(logging.WARNING):
        (part,) = memory.allocate([1000])
    assert part.numel() == 1000 and memory.use.pageable and "HOST memory" in caplog.text


def test_the_cpu_needs_no_pinning(caplog):
    memory = HostMemory(torch.device("cpu"))
    assert [part.numel() for part in memory.allocate([5, 6])] == [5, 6]
    assert not caplog.records and memory.use.pageable == 0


def test_limits_are_named():
    text = describe_limits()
    assert "container" in text and "RLIMIT_MEMLOCK" in text
