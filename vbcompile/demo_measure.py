"""Clocks and memory meters of the demo."""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def warm_up(backends: Sequence[str | Callable[..., Any]], device: torch.device) -> None:
    """Pay once for imports and compiler start-up, which would otherwise count against the first column."""
    from torch._inductor.utils import fresh_cache

    for backend in backends:
        with fresh_cache(), torch.no_grad():
            torch.compile(lambda x: (x.sin() + 1).sum(), backend=backend)(torch.ones(64, 64, device=device))
    torch._dynamo.reset()


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def memory_source(device: torch.device) -> str:
    if device.type == "cpu":
        return "weights, plus the peak of PyTorch's CPU allocator within one step"
    return "peak of the device's allocator within one step, weights included"


def peak_bytes(step: Callable[[], Any], model: nn.Module) -> int:
    """Largest memory in one step, weights included."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.reset_peak_memory_stats(device)
        seconds(step, device)
        return int(module.max_memory_allocated(device))
    weights = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(weights.values()) + _cpu_peak_bytes(step)


def _cpu_peak_bytes(step: Callable[[], Any]) -> int:
    """Peak of the bytes allocated and not yet freed since the step began, from the profiler's record.

    Resident memory would also hold what the compiler left behind, and never sinks.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what is freed within the step must have been allocated within it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    live = peak = 0
    for _, _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
