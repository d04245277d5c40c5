"""Called at the end of ``import torch`` (entry point group ``torch.backends``): the switch by environment variable."""

import os
from typing import Any


def autoload() -> None:
    """Turn the process-wide switch on if ``ENABLE_VIRTUAL_BLACKWELL`` asks for it; costs nothing otherwise.

    The rest of the package is imported at the first call of a model: whoever imports PyTorch, be it this package
    itself, is still in the middle of that.

    Raises:
        SystemExit: the variable, ``VB_MODE`` or another of ours has a value that does not exist. PyTorch would wrap an
            error into one that blames the package.
    """
    text = os.environ.get("ENABLE_VIRTUAL_BLACKWELL", "")
    if text in ("", "0"):
        return
    from vbcompile.config import parse_flag, resolve_config
    from vbcompile.config_error import ConfigError

    try:
        wanted = parse_flag("ENABLE_VIRTUAL_BLACKWELL", text)
        if wanted:
            resolve_config()
    except ConfigError as error:
        raise SystemExit(f"vbcompile: {error}") from error
    if wanted:
        from torch.nn import Module

        Module._compiled_call_impl = EnableAtFirstCall()  # type: ignore[assignment]


class EnableAtFirstCall:
    """Stands where the switch will be, until a model is called."""

    is_switch = True  # as the switch itself says

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return None
        from vbcompile.global_switch import enable

        enable(verbose=False)
        return module._compiled_call_impl
