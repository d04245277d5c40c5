"""Registration of operators whose host time counts: a custom operator with a short way to its function on one device.

``torch.library.custom_op`` puts Python between the dispatcher and the function twice, for autograd and for checks of
what the function returns: about 0.03 ms a call. Calls of plain tensors on a device that nobody differentiates, traces
or transforms go straight to the function here; all others go the usual way, whose results are the same.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from vbcompile.compat_calls import (
    any_requires_grad,
    autograd_kernel,
    below_autograd,
    is_autocast_on,
    is_plain_call,
    is_watched_by_dynamo,
    without_autocast,
)
from vbcompile.compat_transforms import has_tangent, is_forward_differentiated

_libraries: list[torch.library.Library] = []  # a registration lives as long as its library


def quick_operator(name: str, device: str = "CUDA") -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """``torch.library.custom_op(name, mutates_args=())`` with the short way on ``device``, a dispatch key.

    The function must not return its arguments or views of them; the usual way checks that.
    """

    def register(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        @wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            if is_forward_differentiated() and any(has_tangent(a) for a in arguments):
                raise NotImplementedError(
                    f"{name} has no rule for forward-mode differentiation: torch._dynamo.reset(), then compile "
                    "the model where tangents are carried; it keeps its own operators there"
                )
            if is_autocast_on():  # dtypes are decided where the call is made: products inside keep theirs
                with without_autocast():
                    return function(*arguments, **named)
            return function(*arguments, **named)

        defined = torch.library.custom_op(name, mutates_args=())(run)
        usual = autograd_kernel(defined)

        def call(keyset: Any, *arguments: Any, **named: Any) -> Any:
            if (
                is_plain_call(keyset)
                and not is_watched_by_dynamo()
                and not (torch.is_grad_enabled() and any_requires_grad(*arguments))
            ):
                with below_autograd():
                    return run(*arguments, **named)
            return usual(keyset, *arguments, **named)

        namespace, _, short = name.partition("::")
        library = torch.library.Library(namespace, "IMPL")
        library.impl(short, call, f"Autograd{device}", with_keyset=True)
        _libraries.append(library)
        return defined

    return register
