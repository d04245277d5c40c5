"""Custom operators whose call costs the host little: one Python function behind PyTorch's dispatcher.

``torch.library.custom_op`` runs three functions a call (autograd, a choice of the device's kernel, a check for
aliases), about 20 microseconds. Here a call that needs no gradient goes straight to the function; one that does takes
PyTorch's own way. What is true of both: a fake for ``torch.compile``, ``torch.library.opcheck``, no argument is written to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from vbcompile.compat import autograd_kernel, needs_gradient, nothing_in_between

_LIBRARY = torch.library.Library("vblackwell", "FRAGMENT")


def light_operator(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorates a function of tensors that writes to none and returns new ones: the operator ``vblackwell::name``.

    The function runs on every device. Follow with :func:`register_fake` and, where there is one,
    :func:`register_gradient`.
    """

    def define(function: Callable[..., Any]) -> OpOverload:
        _LIBRARY.define(
            name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        overload: OpOverload = getattr(torch.ops.vblackwell, name).default
        overload.__doc__ = function.__doc__
        _functions[overload] = function
        return overload

    return define


_functions: dict[OpOverload, Callable[..., Any]] = {}


def register_fake(overload: OpOverload, fake: Callable[..., Any]) -> None:
    """How the results look, for ``torch.compile``."""
    torch.library.register_fake(overload, fake, lib=_LIBRARY)


def register_gradient(
    overload: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None
) -> None:
    """The gradient, as ``torch.library.register_autograd`` takes it."""
    function, with_gradient = _functions[overload], autograd_kernel(overload, backward, setup_context)

    def kernel(keyset: Any, *args: Any, **keywords: Any) -> Any:
        if nothing_in_between(keyset) and not needs_gradient(args):
            return function(*args, **keywords)
        return with_gradient(keyset, *args, **keywords)

    _LIBRARY.impl(overload._opname, kernel, "Autograd", with_keyset=True)
