"""The demo: two real models through eager, Inductor and vblackwell, side by side, with a verdict.

all-MiniLM-L6-v2 embeds English sentences, SmolLM2-135M continues a prompt and is scored on English text. Both run in
float32 with ``attn_implementation="eager"``, so that there is attention to find and every difference is rounding.
Compile caches are empty for every column, so that first calls compare.
"""

import argparse
import copy
import functools
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from vbcompile.demo_measure import memory_source, peak_bytes, seconds, warm_up
from vbcompile.demo_models import (
    MissingPackageError,
    english_paragraphs,
    english_sentences,
    load_minilm,
    load_smollm2,
)
from vbcompile.demo_tasks import (
    ON_ACCELERATOR,
    ON_CPU,
    QUICK,
    Backend,
    ContinuationTask,
    EmbeddingTask,
    Outcome,
    Scale,
    Task,
)
from vbcompile.demo_verdict import Agreement, Column, DemoResult, ModelResult, difference_bound, judge, render

Say = Callable[[str], None]

INDUCTOR_DEVICES = ("cpu", "cuda", "xpu")
PROMPT = "Once upon a time, there was a little girl who"


def run_demo(
    device: str | torch.device | None = None,
    quick: bool = False,
    console: Console | None = None,
    backend: Backend = "vblackwell",
) -> DemoResult:
    """Run both models and compare.

    Args:
        device: None: the best one found.
        quick: smaller inputs, and the language model compiled layer by layer; about a minute on two cores.
        console: shows progress and the tables; None: silent.
        backend: what is compared with eager and Inductor.

    Raises:
        MissingPackageError: a model's package is not installed.
        vbcompile.device.DeviceError: the device cannot be used here.
    """
    from vbcompile.device import get_unified_backend

    target = get_unified_backend(device)
    place = target.device
    scale = QUICK if quick else ON_CPU if place.type == "cpu" else ON_ACCELERATOR
    say = functools.partial(console.print, style="dim", highlight=False, markup=False) if console else _silent
    baseline: tuple[Backend, ...] = ("inductor",) if place.type in INDUCTOR_DEVICES else ()
    say(f"on {target.get_device_name()} ({place}), PyTorch {torch.__version__}")
    warm_up((backend, *baseline), place)
    results = []
    for load in (_embedding_task, _continuation_task):
        say("loading the next model")
        results.append(compare(load(place, scale), (*baseline, backend), scale.repeats, say))
    result = DemoResult(f"{target.get_device_name()} ({place})", memory_source(place), tuple(results))
    if console:
        render(result, console)
    return result


def _silent(text: str) -> None:
    """Progress that nobody reads."""


def _embedding_task(device: torch.device, scale: Scale) -> Task:
    return EmbeddingTask(load_minilm(device), english_sentences(scale.sentences), scale.sentence_tokens)


def _continuation_task(device: torch.device, scale: Scale) -> Task:
    return ContinuationTask(load_smollm2(device), "\n\n".join(english_paragraphs()), PROMPT, scale)


def compare(task: Task, backends: Sequence[Backend], repeats: int, say: Say = _silent) -> ModelResult:
    """Measure the model in eager mode and through each backend; the last backend is the one under test."""
    with torch.no_grad():
        measured = []
        for backend in (None, *backends):
            say(f"{task.name}: {backend_name(backend)}")
            measured.append(_measure(task, backend, repeats))
        eager = measured[0][1]
        bound = _bound(task, eager)
    columns = [_with_quality(column, outcome, eager) for column, outcome in measured]
    return judge(task.name, task.description, columns, bound, measured[-1][1].sample)


def backend_name(backend: Backend | None) -> str:
    """``"eager"`` for None; a backend given as a function goes by its name."""
    if backend is None:
        return "eager"
    return backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)


def _measure(task: Task, backend: Backend | None, repeats: int) -> tuple[Column, Outcome]:
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    name = backend_name(backend)
    counted = "inductor" if backend == "inductor" else "vblackwell"  # Inductor counts its own pass's sites
    counters[counted]["fuse_attention"] = 0
    with fresh_cache():
        model = task.model if backend is None else task.compiled(backend)
        step = functools.partial(task.step, model)
        device = task.model.device
        first_call_s = seconds(step, device)
        step()
        step_s = statistics.median(seconds(step, device) for _ in range(repeats))
        peak = peak_bytes(step, task.model)
        outcome = task.outcome(model)
    sites = None if backend is None else counters[counted]["fuse_attention"]
    torch._dynamo.reset()
    return Column(name, first_call_s, step_s, peak, float("nan"), sites), outcome


def _with_quality(column: Column, outcome: Outcome, eager: Outcome) -> Column:
    quality: dict[str, Any] = {"difference": (outcome.output - eager.output).abs().max().item()}
    if outcome.embeddings is not None and eager.embeddings is not None:
        quality["cosine"] = (outcome.embeddings * eager.embeddings).sum(-1).min().item()
    if outcome.tokens:
        quality["agreement"] = _agreement(outcome, eager)
    return replace(column, perplexity=outcome.perplexity, **quality)


def _agreement(outcome: Outcome, eager: Outcome) -> Agreement:
    total = len(eager.tokens)
    for index, (ours, theirs) in enumerate(zip(outcome.tokens, eager.tokens, strict=True)):
        if ours != theirs:
            return Agreement(index, total, eager.margins[index])
    return Agreement(total, total)


def _bound(task: Task, eager: Outcome) -> float:
    """Bound on differences, from eager's error against the same model in float64 on the CPU."""
    exact = task.output(copy.deepcopy(task.model).to("cpu", torch.float64))
    error = (eager.output - exact).abs().max().item()
    return difference_bound(error, exact.abs().max().item(), torch.finfo(task.model.dtype).eps)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's command-line options."""
    parser.add_argument("--quick", action="store_true", help="smaller inputs; about a minute on two cores")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, hpu, npu, xpu; default: the best one found")
    parser.add_argument("--backend", default="vblackwell", help="backend to compare (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")


def run_arguments(arguments: argparse.Namespace) -> int:
    """Run with parsed options. Returns 0: all numbers agree; 1: they do not; 2: it could not run."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes its own start and stop to stderr
    from torch._dynamo.exc import InvalidBackend

    from vbcompile.device import DeviceError

    console = Console()
    try:
        result = run_demo(arguments.device, arguments.quick, None if arguments.json else console, arguments.backend)
    except (MissingPackageError, DeviceError, InvalidBackend) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    if arguments.json:
        console.print_json(json.dumps(result.to_dict()))
    return result.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """``vbcompile demo``; see :func:`run_arguments` for what it returns."""
    parser = argparse.ArgumentParser(prog="vbcompile demo", description=__doc__.partition("\n")[0])
    add_arguments(parser)
    return run_arguments(parser.parse_args(argv))
