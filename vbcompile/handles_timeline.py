"""``vbcompile.write_timeline``: one step of an offloaded model as a page, by plan and as measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vbcompile.handles_model import NOT_OFFLOADED, stores_of, why_declined
from vbcompile.handles_store import WeightStore
from vbcompile.report_page import Movement, html_page
from vbcompile.vgpu_simulator import Event

__all__ = ["movement_of", "recorded", "write_timeline"]

_STEPS = 3  # the first one starts the stream; the last one is what is drawn
_SHOWN = ("steps", "streamed_bytes", "hits", "misses", "evictions", "wasted_bytes", "stall_ns", "gbps")


def write_timeline(model: nn.Module, path: str | Path, *inputs: Any, **keyword_inputs: Any) -> Path:
    """Run a compiled model whose weights are offloaded a few times, and draw its last step.

    The page is self-contained: budget, ring and placement, the plan's transfer timeline beside the measured one, and
    device memory over the step. Recording costs a few events per copy and ends with this call.

    Args:
        model: ``torch.compile`` of a model that :func:`vbcompile.offload` was called on.
        path: HTML file to write.
        inputs, keyword_inputs: what the model is called with.

    Raises:
        ValueError: nothing of the model is offloaded, or no graph of it streams weights.
        OSError: the file cannot be written.
    """
    stores = stores_of(model)
    if not stores:
        raise ValueError(why_declined(model) or NOT_OFFLOADED)
    if len(stores) > 1:
        raise ValueError(f"a timeline is drawn for a model with one offload; this one has {len(stores)}")
    with recorded(stores):
        for _ in range(_STEPS):
            model(*inputs, **keyword_inputs)
        movement = movement_of(stores[0])
    if movement is None or movement.plan.declined:
        raise ValueError("no graph of this model streams weights: compile it in mode 'memory' with a smaller budget")
    target = Path(path)
    target.write_text(html_page([], f"one step on {stores[0].device}", [movement]), encoding="utf-8")
    return target


@contextmanager
def recorded(stores: Sequence[WeightStore]) -> Iterator[None]:
    """Steps in here keep a timeline; streams begin anew before and after."""
    before = [store.record for store in stores]
    for store in stores:
        store.stop()
        store.record = True
    try:
        yield
    finally:
        for store, record in zip(stores, before, strict=True):
            store.record = record
            store.stop()


def movement_of(store: WeightStore) -> Movement | None:
    """The plan, the counters, and the last step where one was recorded to its end; None before the first graph."""
    if store.plan is None:
        return None
    streamer = store.start() if store.record and not store.plan.declined else None
    found = store.counters() if streamer is None else streamer.statistics()
    counters = {"measured_step_ns": found.get("step_ns")} | {name: found[name] for name in _SHOWN if name in found}
    if streamer is None or not found["steps"]:
        return Movement(store.plan, statistics=counters)
    return Movement(
        store.plan,
        measured=[Event(s.lane, s.name, s.start_ns, s.end_ns) for s in streamer.timeline()],
        memory=[(sample.time_ns, sample.nbytes) for sample in streamer.memory_timeline()],
        statistics=counters,
    )
