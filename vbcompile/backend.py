"""The ``torch.compile`` backend ``vblackwell``: configuration, passes, then AOTAutograd and Inductor."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.utils import counters

from vbcompile import __version__, compat, compat_lowering
from vbcompile.config import DOWNSTREAM, Config, resolve_config
from vbcompile.config_error import ConfigError
from vbcompile.device import Target, get_target
from vbcompile.kernels import compiled_calls
from vbcompile.kernels.registry import MODULES, as_text, check_option, forced_implementation
from vbcompile.passes import activation_partition, attention_inlined, pipeline, saved_operands
from vbcompile.passes.pass_context import PassContext
from vbcompile.report import GraphReport
from vbcompile.runtime_activation_budget import BudgetWatch
from vbcompile.runtime_device import AcceleratorDevice
from vbcompile.said_once import is_first
from vbcompile.vendor_compilers import choose_compiler, compile_by_vendor, say_once
from vbcompile.vendor_config import for_target
from vbcompile.vgpu_plan import PlanError
from vbcompile.vgpu_size import exact_size, size_text

log = logging.getLogger(__name__)

_numbers = itertools.count()
_listeners: list[Callable[[GraphReport], None]] = []


def vblackwell(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    target: Target | None = None,
) -> Callable[..., Any]:
    """Compile a graph captured by Dynamo. Users name it: ``torch.compile(model, backend="vblackwell")``.

    Args:
        gm: torch-level graph; rewritten in place.
        example_inputs: its inputs.
        mode: one of our four modes or one of Inductor's.
        options: fields of :class:`vbcompile.Config`, and Inductor's own options.
        target: choose kernels as for this device; None: the one that the inputs are on.

    Raises:
        ConfigError: unknown mode, option or value; an implementation that was asked for and cannot run.
    """
    config = resolve_config(mode, options)
    elsewhere, target = target is not None, target or get_target(_device_of(example_inputs))
    config = for_target(config, target)
    check_option(config.implementations, target)
    number = next(_numbers)
    training = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs)
    report = GraphReport(
        graph=compat.compile_id() or str(number),
        nodes=len(gm.graph.nodes),
        training=training,
        target=f"{target.device_type} ({target.arch})",
        mode=config.mode,
        config=config.to_dict(),
        graph_break=compat.graph_break_reason(gm),
    )
    original = pipeline.copy_graphs(gm)
    context = PassContext(config, target, training, elsewhere, list(example_inputs))
    pipeline.run_passes(gm, context, report, original)
    _warn_of_missing_passes(config, report)
    for sentence in filter(is_first, config.without_effect()):
        log.warning("%s", sentence)
    compiled = _compile(gm, context, report, original, len(example_inputs))
    # only now: where Dynamo captures a graph anew (a float that becomes symbolic), the first attempt counts for nothing
    counters["vblackwell"]["fuse_attention"] += report.count("rewritten", "attention")
    _publish(report)
    return compiled


def _device_of(example_inputs: Sequence[Any]) -> torch.device:
    """The accelerator among the inputs' devices; CPU where there is none."""
    devices = {t.device for t in example_inputs if isinstance(t, torch.Tensor) and t.device.type != "meta"}
    accelerators = sorted((d for d in devices if d.type != "cpu"), key=str)
    return accelerators[0] if accelerators else torch.device("cpu")


def _compile(
    gm: fx.GraphModule,
    context: PassContext,
    report: GraphReport,
    original: pipeline.Backup,
    original_inputs: int,
) -> Callable[..., Any]:
    """Hand the rewritten graph on; if the compiler refuses it, the original graph."""
    config = context.config
    try:
        compile_graph: Callable[..., Any] = functools.partial(_downstream, context=context, report=report)
        for around in context.around:
            compile_graph = around(compile_graph)
        compiled = compile_graph(gm, context.example_inputs)
        for wrap in context.wrappers:
            compiled = wrap(compiled)
        return compiled
    except Exception as error:
        if (
            config.strict
            or isinstance(error, (PlanError, ConfigError))
            or compat.wants_another_capture(error)
            or not report.count("rewritten")
        ):
            raise
        reason = f"the rewritten graph does not compile: {type(error).__name__}: {error}"
        log.warning("passes undone, the original graph runs: %s", reason)
        pipeline.restore_graphs(original)
        context.undo(original_inputs, 0)
        compiled = _downstream(gm, context.example_inputs, context, report)
        report.failures.append(("compile", reason))
        report.decisions.clear()
        return compiled


def _downstream(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    context: PassContext,
    report: GraphReport,
    cudagraphs: bool = True,
) -> Callable[..., Any]:
    config = context.config
    compiler = choose_compiler(config, context.target, gm)
    say_once(compiler)
    report.compiler = str(compiler)
    if compiler.name == "eager":
        return gm.forward
    partitioner = activation_partition.partitioner_for(context, report)
    guard = saved_operands.partition_for(gm, context.training)
    if compiler.name not in DOWNSTREAM:
        if partitioner is not None:
            activation_partition.tell_that_nothing_is_planned(compiler.name, report)
        return compile_by_vendor(compiler, gm, example_inputs, config.strict, partitioner or guard)
    budget = None if partitioner is None else config.budget
    if compiler.name == "aot_eager":
        return _watched(compat.compile_with_aot_eager(gm, example_inputs, partitioner or guard), budget, report)
    key = _cache_key(config)
    options = {**compat.inductor_mode_options(config.inductor_mode), **config.inductor_options}
    if partitioner is not None:
        options = {**compat.partitioner_options(partitioner, key), **options}
    elif guard is not None:
        options.setdefault("custom_partitioner_fn", compat.Partitioner(guard, key))
    if config.fp4 and config.fp4_master != "keep":
        options.setdefault("size_asserts", False)  # weights that are given up are not read, and have other strides
    if not cudagraphs:
        options["triton.cudagraphs"] = False
    compiled_calls.use_in_compiled_code()
    rewrite = None if context.training else attention_inlined.inline_attention
    return _watched(compat.compile_with_inductor(gm, example_inputs, options, key, rewrite), budget, report)


def _watched(compiled: Callable[..., Any], budget: int | None, report: GraphReport) -> Callable[..., Any]:
    """The same; that a training step takes more memory than its budget is said once."""
    if budget is None:
        return compiled

    def tell(taken: int) -> None:
        reason = (
            f"a training step took {size_text(taken)} of device memory, {size_text(taken - budget)} more than the "
            f"budget of {size_text(budget)}: name one of {exact_size(max(2 * budget - taken, 0))} to stay within it"
        )
        report.failures.append(("budget", reason))
        log.warning("graph %s: %s", report.graph, reason)

    return BudgetWatch(budget, AcceleratorDevice, tell).wrap(compiled)


@functools.cache
def _sources_hash() -> str:
    from vbcompile.kernels import attention, attention_results, attention_sdpa, fp4_linear, fp4_straight_through

    inlined = attention_inlined, attention_sdpa, compat_lowering
    operators = attention, attention_results, fp4_linear, fp4_straight_through
    return compat.source_hash(pipeline, *operators, *inlined, *activation_partition.MODULES, saved_operands)


def _cache_key(config: Config) -> str:
    """What an artifact depends on beyond its graph: the version, the operators' fakes and gradient formulas, and what
    becomes of them in the graph."""
    memory = f"{config.recompute}:{config.offload}:{config.budget}:{config.slowdown}"
    forced = {name: forced for name in MODULES if (forced := forced_implementation(name))}
    return f"{__version__}:{_sources_hash()}:{config.mode}:{memory}:{as_text(config.implementations)}:{as_text(forced)}"


def _warn_of_missing_passes(config: Config, report: GraphReport) -> None:
    """Once per mode and process: a mode never pretends."""
    key = f"{config.mode} {report.target}"
    if report.unavailable and is_first(key):
        log.warning(
            "mode %s asks for what this version does not have: %s",
            config.mode,
            "; ".join(reason for _, reason in report.unavailable),
        )


def _publish(report: GraphReport) -> None:
    log.info("%s", report.summary())
    for decision in report.decisions:
        log.debug("%s %s at %s: %s", decision.pass_name, decision.action, decision.site, decision.reason)
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "vblackwell_report", "encoding": "json"},
        payload_fn=lambda: report.to_json(),
    )
    for listener in tuple(_listeners):
        listener(report)


def add_listener(listener: Callable[[GraphReport], None]) -> None:
    """Call ``listener`` with the report of every graph compiled from now on, in any thread."""
    _listeners.append(listener)


def remove_listener(listener: Callable[[GraphReport], None]) -> None:
    """Undo :func:`add_listener`."""
    _listeners.remove(listener)


@contextmanager
def collected_reports() -> Iterator[list[GraphReport]]:
    """The reports of the graphs that are compiled within it, in any thread."""
    reports: list[GraphReport] = []
    add_listener(reports.append)
    try:
        yield reports
    finally:
        remove_listener(reports.append)


def _reset() -> None:
    """Called by ``torch._dynamo.reset``."""
    compat.reset_cudagraphs()


vblackwell.reset = _reset  # type: ignore[attr-defined]
