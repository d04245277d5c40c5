"""Where autocast is on in a torch-level graph."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx


def ambient_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of an autocast around the whole graph; None where there is none."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def under_autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to a dtype, or switched off where that is None."""
    if dtype == ambient_dtype(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype, dtype is not None)


def operand_dtype(own: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    """What a product reads an operand as, under autocast to ``cast`` (None: off); it leaves float64 alone."""
    return own if cast is None or own == torch.float64 else cast


def autocast_dtypes(graph: fx.Graph, device_type: str, callers: Sequence[fx.Node] = ()) -> dict[fx.Node, torch.dtype]:
    """The dtype that autocast gives the products, for nodes where it is on.

    Args:
        callers: for an inner graph, the nodes of the graph around it that run it.

    Raises:
        LookupError: the callers run it under different settings.
    """
    enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    around = {_inside(caller, device_type) for caller in callers}
    around = around or {ambient_dtype(device_type)}
    if len(around) > 1:
        raise LookupError("a graph that runs both with and without autocast")
    stack: list[tuple[Any, torch.dtype | None]] = [(None, around.pop())]
    found = {}
    for node in graph.nodes:
        if node.target is enter:
            kind, dtype, enabled, *_ = (*node.args, None, True)[:3] if len(node.args) < 3 else node.args
            state = stack[-1][1]
            if kind == device_type:
                state = (dtype or torch.get_autocast_dtype(device_type)) if enabled else None
            stack.append((node, state))
        elif node.target is leave:
            stack = [entry for entry in stack if entry[0] is not node.args[0]]
        elif stack[-1][1] is not None:
            found[node] = stack[-1][1]
    return found


def _inside(caller: fx.Node, device_type: str) -> torch.dtype | None:
    """The dtype of autocast in the graph that a node runs; an exported ``with torch.autocast`` is such a node."""
    if getattr(caller.target, "__name__", "") == "wrap_with_autocast" and caller.args[0] == device_type:
        _, dtype, enabled, *_ = caller.args
        return (dtype or torch.get_autocast_dtype(device_type)) if enabled else None  # type: ignore[return-value]
    return autocast_dtypes(caller.graph, device_type).get(caller)


def autocast_at(node: fx.Node, device_type: str, callers: Sequence[fx.Node] | None) -> torch.dtype | None:
    """The dtype that autocast gives products at the node, None where it is off.

    Args:
        callers: as for :func:`autocast_dtypes`; None where they are not known.

    Raises:
        LookupError: it is not known whether autocast is on.
    """
    if callers is None:
        raise LookupError("it is not known whether autocast is on")
    return autocast_dtypes(node.graph, device_type, callers).get(node)
