"""The process-wide switch: with it on, an unchanged script's models run through the backend.

``torch.nn.Module.__call__`` looks at ``_compiled_call_impl`` before it runs ``forward``; that is how
``module.compile()`` works. The switch puts a descriptor there that answers for the outermost module of a call, so
nothing is wrapped or replaced, and switching off restores the attribute. A model compiled by other means keeps that.
"""

import collections
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from vbcompile import compat
from vbcompile.backend import add_listener, remove_listener, vblackwell
from vbcompile.config import Config, resolve_config
from vbcompile.device import get_device, get_target
from vbcompile.kernels.registry import check_names
from vbcompile.report import GraphReport, merge_counts


class _CompiledCall:
    """Answers ``module._compiled_call_impl``: the compiled call for an outermost module, None for all others."""

    is_switch = True

    def __init__(self, options: dict[str, Any]) -> None:
        self._compile = functools.partial(torch.compile, backend=vblackwell, options=options or None)
        # Dynamo does not trace `_call_impl` itself: it starts at the model's own forward, and hooks run around it
        self._around_forward: Callable[..., Any] = self._compile(torch.nn.Module._call_impl)
        self._whole_calls: weakref.WeakKeyDictionary[torch.nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()

    def __get__(self, module: torch.nn.Module | None, owner: type) -> Callable[..., Any] | None:
        if module is None or torch.compiler.is_compiling() or not _is_outermost_model(module):
            return None
        return functools.partial(self._compiled(module), module)

    def _compiled(self, module: torch.nn.Module) -> Callable[..., Any]:
        if not compat.is_skipped_by_dynamo(type(module).forward):
            return self._around_forward
        if module not in self._whole_calls:  # PyTorch's own containers and layers
            own_code = types.FunctionType(_call.__code__.replace(), globals())  # Dynamo keeps its cache per code object
            self._whole_calls[module] = self._compile(own_code)
        return self._whole_calls[module]


def _call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return torch.nn.Module._call_impl(module, *args, **kwargs)


def _is_outermost_model(module: torch.nn.Module) -> bool:
    if compat.inside_compiled_code() or compat.is_tracing() or torch.utils.data.get_worker_info() is not None:
        return False
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)) or compat.is_compiled_module(module):
        return False
    return next(module.parameters(), None) is not None  # losses and transforms are not worth a compile


class _Switch:
    """The state of the switch and what was compiled while it was on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.config: Config | None = None
        self.reports: collections.deque[GraphReport] = collections.deque(maxlen=1000)
        self.graphs = 0

    def record(self, report: GraphReport) -> None:
        self.graphs += 1
        self.reports.append(report)


_switch = _Switch()


def enable(mode: str | None = None, *, verbose: bool = True, **options: Any) -> None:
    """Run every model of this process through the backend from its next call on.

    Calling it again changes mode and options. Modules without parameters, scripted modules, modules that are compiled
    already, and calls in data loader workers are left alone.

    Args:
        mode: ``balanced``, ``memory``, ``speed``, ``full``; default is ``VB_MODE`` or ``balanced``.
        verbose: print a summary of device and passes.
        options: fields of :class:`vbcompile.Config` and options of Inductor.

    Raises:
        ConfigError: unknown mode, option or value.
    """
    arguments = {**options, **({} if mode is None else {"mode": mode})}
    config = resolve_config(options=arguments)
    check_names(config.implementations)
    with _switch.lock:
        torch.nn.Module._compiled_call_impl = _CompiledCall(arguments)  # type: ignore[assignment]
        if _switch.config is None:
            add_listener(_switch.record)
        _switch.config = config
    if verbose:
        _print(_describe(config))


def disable() -> None:
    """Undo :func:`enable`; models run as they did before. Harmless when not enabled."""
    with _switch.lock:
        if is_enabled():
            torch.nn.Module._compiled_call_impl = None
        if _switch.config is not None:
            remove_listener(_switch.record)
            _switch.config = None


def is_enabled() -> bool:
    """Whether the switch is on."""
    return getattr(torch.nn.Module.__dict__["_compiled_call_impl"], "is_switch", False)


def enable_balanced_mode(**options: Any) -> None:
    """:func:`enable` with mode ``balanced``."""
    enable("balanced", **options)


def enable_memory_mode(**options: Any) -> None:
    """:func:`enable` with mode ``memory``."""
    enable("memory", **options)


def enable_speed_mode(**options: Any) -> None:
    """:func:`enable` with mode ``speed``."""
    enable("speed", **options)


def enable_full_optimization(**options: Any) -> None:
    """:func:`enable` with mode ``full``."""
    enable("full", **options)


def print_stats() -> None:
    """Print what was compiled since the switch was first turned on: graphs, rewritten sites, failures."""
    _print(_describe(_switch.config) if _switch.config else "vblackwell: off")
    lines = [f"  graphs compiled: {_switch.graphs}"]
    for name, actions in merge_counts(_switch.reports).items():
        lines.append(f"  {name}: " + ", ".join(f"{count} {action}" for action, count in sorted(actions.items())))
    reasons = collections.Counter(
        f"{d.pass_name}: {d.reason}" for r in _switch.reports for d in r.decisions if d.action == "left"
    )
    lines += [f"  left alone ({count}): {reason}" for reason, count in reasons.most_common()]
    lines += [f"  failed: {name}: {reason}" for r in _switch.reports for name, reason in r.failures]
    _print("\n".join(lines))


def _describe(config: Config) -> str:
    target = get_target(get_device())
    passes = [name for name in ("attention", "fp4", "recompute", "offload") if getattr(config, name)]
    if config.wants_mixed_precision(target.device_type):
        passes.append("mixed precision (bfloat16 products; mixed_precision=False turns it off)")
    return f"vblackwell: on, mode {config.mode}, {target.name or target.arch} ({target.device_type}), passes: " + (
        ", ".join(passes) or "none"
    )


def _print(text: str) -> None:
    print(text, flush=True)  # the contract: enable() and print_stats() print
