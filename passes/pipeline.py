"""The passes, in their order, and how they run: one at a time, each undone if it fails."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch.fx as fx

from vbcompile.compat import copy_graph
from vbcompile.compat_transforms import is_forward_differentiated
from vbcompile.config import Config
from vbcompile.config_error import ConfigError
from vbcompile.device import Target
from vbcompile.kernels.registry import describe, option
from vbcompile.passes.attention import fuse_attention
from vbcompile.passes.attention_training import use_training_kernels
from vbcompile.passes.fp4 import quantize_weights
from vbcompile.passes.graph_ops import module_graphs
from vbcompile.passes.implementation_choice import explain_choices, name_implementations
from vbcompile.passes.offload import stream_weights
from vbcompile.passes.pass_context import PassContext
from vbcompile.passes.precision import use_mixed_precision
from vbcompile.passes.shared_values import compute_once
from vbcompile.report import Decision, GraphReport
from vbcompile.vgpu_plan import PlanError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One rewrite of the torch-level graph, before autograd.

    Attributes:
        name: as in reports and options.
        run: rewrites the graph in place and returns a decision for every site that it looked at.
        wanted: whether the configuration asks for it.
        refuses: why it makes no sense on a target, or None.
    """

    name: str
    run: Callable[[fx.GraphModule, PassContext], list[Decision]]
    wanted: Callable[[Config], bool]
    refuses: Callable[[Target], str | None] = lambda target: None


# vendor -> how the names of the implementations begin that could run on its devices
_OWN_KERNELS = {
    "nvidia": ("cudnn", "flash", "hopper", "triton"),
    "amd": ("triton",),
    "intel": ("xpu", "triton"),
    "habana": ("hpu",),
    "huawei": ("npu",),
    "cpu": ("cpu", "triton"),
}


def _missing_kernels(target: Target, operator: str) -> str | None:
    """Why no kernel for an operator runs on a target, from the implementations made for it; None where one does."""
    rows = [(how, reason) for name, how, reason in describe(target) if name == operator]
    rows = [row for row in rows if not row[0].startswith("reference")]
    if any(not reason for _, reason in rows):
        return None
    own = _OWN_KERNELS[target.vendor]
    return "; ".join(dict.fromkeys(f"{how}: {reason}" for how, reason in rows if how.startswith(own))) or "none exists"


def _no_attention_kernel(target: Target) -> str | None:
    """The reference alone would be slower than what the vendor's PyTorch does with an unrewritten model."""
    if (reasons := _missing_kernels(target, "attention")) is None:
        return None
    return f"no fused attention kernel for {target.vendor} {target.arch}, the model's own operators run ({reasons})"


def _no_fp4_kernel(target: Target) -> str | None:
    """Decoding whole weights in plain PyTorch at every call would be slower than what the model does."""
    if (reasons := _missing_kernels(target, "fp4_linear")) is None:
        return None
    return f"no FP4 kernel for {target.vendor} {target.arch}, weights keep their precision ({reasons})"


PASSES = (
    Pass("attention", fuse_attention, lambda config: config.attention, _no_attention_kernel),
    Pass("mixed_precision", use_mixed_precision, Config.wants_mixed_precision),
    # after mixed precision: the layers that it runs in bfloat16 take bfloat16 activations
    Pass("fp4", quantize_weights, lambda config: config.fp4, _no_fp4_kernel),
    Pass("shared_values", compute_once, lambda config: config.fp4),
    # last: it plans what the others have left, and in every mode, since weights that are elsewhere have to arrive
    Pass("offload", stream_weights, lambda config: True),
)


_WITHOUT_TANGENTS = ("attention", "fp4")  # their operators would drop them in silence
_BEFORE_CHOICE = ("attention", "mixed_precision")  # these decide what attention is called with


def run_passes(gm: fx.GraphModule, context: PassContext, report: GraphReport, original: "Backup") -> None:
    """Run every wanted pass on ``gm`` in place, recording decisions and failures in ``report``.

    A pass that raises is undone: the graph before it is kept, with one warning that names the pass and the reason.
    With ``strict`` the exception goes on to the caller. ``original`` is a backup of ``gm`` as it comes in.
    """
    backup: Backup | None = original  # None: out of date
    for pass_ in PASSES:
        if not pass_.wanted(context.config):
            continue
        refusal = pass_.refuses(context.target)
        if refusal:
            report.unavailable.append((pass_.name, refusal))
            continue
        if pass_.name in _WITHOUT_TANGENTS and is_forward_differentiated():
            reason = "forward-mode differentiation, for which the operator has no rule"
            report.decisions.append(Decision(pass_.name, "the graph", "left", reason))
            continue
        saved = backup = backup or copy_graphs(gm)
        added = len(context.example_inputs), len(context.wrappers)
        try:
            with option(context.followed):
                found = [*report.decisions, *pass_.run(gm, context)]
                if pass_.name in _BEFORE_CHOICE:
                    found = explain_choices(gm, context.target, context.training, found)
            for module in module_graphs(gm):
                name_implementations(module.graph, context.implementations)
            if any(d.action == "rewritten" for d in found[len(report.decisions) :]):
                backup = None
            report.decisions = found
        except (PlanError, ConfigError):
            raise  # without a plan the model would not fit, and what was asked for is not replaced in silence
        except Exception as error:
            restore_graphs(saved)
            backup = None
            if saved is original:
                original[:] = copy_graphs(gm)  # the first copies are in use now
            context.undo(*added)
            if context.config.strict:
                raise
            reason = f"{type(error).__name__}: {error}"
            report.failures.append((pass_.name, reason))
            log.warning("pass %s failed, the graph runs without it: %s", pass_.name, reason)
            log.debug("pass %s failed", pass_.name, exc_info=True)
    if context.training and not context.elsewhere:
        use_training_kernels(gm, context.target)


Backup = list[tuple[fx.GraphModule, fx.Graph]]


def copy_graphs(gm: fx.GraphModule) -> Backup:
    """Copies of the graph and of those of its sub-modules; node metadata is shared, not copied deeply."""
    return [(m, copy_graph(m.graph)) for m in gm.modules() if isinstance(m, fx.GraphModule)]


def restore_graphs(backup: Backup) -> None:
    """Put the graphs back in place; the backup itself stays as it is."""
    for module, graph in backup:
        module.graph = copy_graph(graph)
