"""``vbcompile.write_timeline``: one step of an offloaded model as a page, by plan and as measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vbcompile.handles_model import offloaded_tensors
from vbcompile.handles_store import WeightStore
from vbcompile.report_page import Movement, html_page
from vbcompile.vgpu_simulator import Event

__all__ = ["write_timeline"]

_STEPS = 3  # the first one starts the stream; the last one is what is drawn
_SHOWN = ("steps", "streamed_bytes", "hits", "misses", "evictions", "wasted_bytes", "stall_ns", "gbps")


def write_timeline(model: Callable[..., Any], path: str | Path, *inputs: Any, **keyword_inputs: Any) -> Path:
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
    store = _store_of(model)
    before = store.record
    store.stop()
    store.record = True
    try:
        for _ in range(_STEPS):
            model(*inputs, **keyword_inputs)
        if store.plan is None or store.plan.declined:
            raise ValueError(
                "no graph of this model streams weights: compile it in mode 'memory' with a smaller budget"
            )
        streamer = store.start()
        spans = [Event(s.lane, s.name, s.start_ns, s.end_ns) for s in streamer.timeline()]
        memory = [(sample.time_ns, sample.nbytes) for sample in streamer.memory_timeline()]
        counters = {name: value for name, value in streamer.statistics().items() if name in _SHOWN}
        page = html_page([], f"one step on {store.device}", Movement(store.plan, spans, memory, counters))
    finally:
        store.record = before
        store.stop()
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target


def _store_of(model: Any) -> WeightStore:
    stores = {id(h.payload.residence): h.payload.residence for h in offloaded_tensors(model).values()}
    found = [store for store in stores.values() if isinstance(store, WeightStore)]
    if len(found) != 1:
        raise ValueError(f"a timeline is drawn for a model with one offload; this one has {len(found)}")
    return found[0]
