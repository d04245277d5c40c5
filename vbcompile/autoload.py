"""Called at the end of ``import torch`` (entry point group ``torch.backends``): the switch by environment variable."""

import os
from typing import Any


def autoload() -> None:
    """Turn the process-wide switch on if ``ENABLE_VIRTUAL_BLACKWELL`` asks for it; costs nothing otherwise.

    The rest of the package is imported at the first call of a model: whoever imports PyTorch, be it this package
    itself, is still in the middle of that.

    Raises:
        ConfigError: the variable, ``VB_MODE`` or ``VB_STRICT`` has a value that does not exist.
    """
    text = os.environ.get("ENABLE_VIRTUAL_BLACKWELL", "")
    if text in ("", "0"):
        return
    from vbcompile.config import parse_flag, resolve_config

    if parse_flag("ENABLE_VIRTUAL_BLACKWELL", text):
        resolve_config()
        from torch.nn import Module

        Module._compiled_call_impl = EnableAtFirstCall()  # type: ignore[assignment]


class EnableAtFirstCall:
    """Stands where the switch will be, until a model is called."""

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return None
        from vbcompile.global_switch import enable

        enable(verbose=False)
        return module._compiled_call_impl
