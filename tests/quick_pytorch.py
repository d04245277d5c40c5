"""What the tests leave out of PyTorch: most of the time of compiling a small graph."""

import gc
import logging
import os
import types

import torch
import torch._dynamo.guards
import torch._inductor.config


def leave_out(cpp_kernels: bool) -> None:
    """Leave out what PyTorch does beside compiling.

    Args:
        cpp_kernels: let Inductor write C++ kernels where there is no card. Otherwise it passes, schedules and runs the
            same graphs, each operation by its ATen kernel: two thirds of a compilation are spent in the C++ compiler.
    """
    # pytest gives its handlers to loggers that do not propagate, and this one formats every graph for whoever listens.
    logging.getLogger("torch.__trace").propagate = True
    # Dynamo times the guards of every graph, and flushes the processor's caches to do so.
    torch._dynamo.guards.profile_guard_manager = lambda *arguments: 0.0
    if os.environ.get("TRITON_INTERPRET") == "1":
        from interpreter_patches import quicken

        quicken()
    if torch.cuda.is_available() or torch.xpu.is_available():
        # On a card several test processes share few cores, and each would start compiler processes and threads.
        torch._inductor.config.compile_threads = 1
        torch.set_num_threads(2)
    else:
        torch._inductor.config.fallback_by_default = not cpp_kernels
        # Every seed is kept for cards that may come, each with a formatted stack.
        for vendor in (torch.cuda, torch.xpu, torch.mtia):
            vendor.traceback = types.SimpleNamespace(format_stack=list)


def forget_imports() -> None:
    """Keep the garbage collector from what has been imported: a million objects that stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
