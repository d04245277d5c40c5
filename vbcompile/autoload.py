"""Called at the end of ``import torch`` (entry point group ``torch.backends``): the switch by environment variable."""

import os


def autoload() -> None:
    """Turn the process-wide switch on if ``ENABLE_VIRTUAL_BLACKWELL`` asks for it; costs nothing otherwise.

    Raises:
        ConfigError: the variable, ``VB_MODE`` or ``VB_STRICT`` has a value that does not exist.
    """
    text = os.environ.get("ENABLE_VIRTUAL_BLACKWELL", "")
    if text in ("", "0"):
        return
    from vbcompile.config import parse_flag

    if parse_flag("ENABLE_VIRTUAL_BLACKWELL", text):
        from vbcompile.global_switch import enable

        enable(verbose=False)
