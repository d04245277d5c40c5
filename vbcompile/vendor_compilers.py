"""Which compiler a rewritten graph goes to: Inductor, or what the vendor of the device has instead."""

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from vbcompile import compat
from vbcompile.config import Config
from vbcompile.device import Target
from vbcompile.device_vendors import package_of
from vbcompile.said_once import is_first

log = logging.getLogger(__name__)

LAZY_MODE = "PT_HPU_LAZY_MODE"
_OWN_NAMESPACE = "vblackwell"


@dataclass(frozen=True)
class Compiler:
    """Where a graph goes.

    Attributes:
        name: ``inductor``, ``aot_eager``, ``eager``, or a name that ``torch.compile(backend=...)`` knows.
        reason: why it is not Inductor; empty where the user wants it or it is.
    """

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def choose_compiler(config: Config, target: Target, gm: fx.GraphModule) -> Compiler:
    """The compiler for a rewritten graph; the user's where one was named."""
    if config.downstream != "inductor" or "downstream" in config.sources:
        return Compiler(config.downstream)
    if target.vendor == "huawei":
        return _ascend(gm)
    if target.vendor == "habana":
        return _gaudi()
    if target.device_type in ("cuda", "xpu") and "triton" not in target.features:
        return Compiler(
            "aot_eager", f"Inductor needs Triton, which is not installed with a compiler for {target.vendor}"
        )
    return Compiler("inductor")


def _ascend(gm: fx.GraphModule) -> Compiler:
    if not compat.is_registered_backend("npu"):
        reason = f"{package_of('npu')} registered no compiler, and Inductor has none for Ascend"
        return Compiler("aot_eager", reason)
    if _holds_own_operators(gm):
        return Compiler("aot_eager", "torch-npu's compiler does not know the operators that the passes put in")
    return Compiler("npu", "torch-npu's own compiler")


def _gaudi() -> Compiler:
    if is_lazy_mode():
        reason = (
            f"lazy mode of {package_of('hpu')} is on, which torch.compile cannot be used with: set {LAZY_MODE}=0 in "
            "the environment before Python starts; until then the rewritten graph runs operator by operator"
        )
        return Compiler("eager", reason)
    if not compat.is_registered_backend("hpu_backend"):
        reason = f"{package_of('hpu')} registered no compiler, and Inductor has none for Gaudi"
        return Compiler("aot_eager", reason)
    return Compiler("hpu_backend", "Gaudi's own compiler")


def is_lazy_mode() -> bool:
    """Whether Gaudi's bridge collects operators lazily. Unset, the variable means what this release says it means."""
    value = os.environ.get(LAZY_MODE)
    if value is not None:
        return value != "0"
    try:
        internal = importlib.import_module("habana_frameworks.torch.utils.internal")
        return bool(internal.is_lazy())
    except (ImportError, AttributeError):
        return False


def _holds_own_operators(gm: fx.GraphModule) -> bool:
    graphs = (m.graph for m in gm.modules() if isinstance(m, fx.GraphModule))
    return any(getattr(node.target, "namespace", "") == _OWN_NAMESPACE for graph in graphs for node in graph.nodes)


def compile_by_vendor(
    compiler: Compiler,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    strict: bool,
    partition: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compile by a registered backend; where it fails, AOTAutograd and the vendor's operators one by one.

    ``partition`` then splits the joint graph. With ``strict`` the failure goes on to the caller.
    """
    try:
        return compat.registered_backend(compiler.name)(gm, list(example_inputs))
    except Exception as error:
        if strict:
            raise
        log.warning(
            "%s does not compile this graph (%s: %s); AOT eager runs it", compiler.name, type(error).__name__, error
        )
        return compat.compile_with_aot_eager(gm, example_inputs, partition)


def say_once(compiler: Compiler) -> None:
    """Log why it is not Inductor, once a reason: lazy mode as a warning, as it takes speed from the user."""
    if compiler.reason and is_first(compiler.reason):
        log.log(logging.WARNING if compiler.name == "eager" else logging.INFO, "graphs go to %s", compiler)
