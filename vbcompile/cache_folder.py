"""Where files are kept from one run to the next."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_CACHE_HOME/vbcompile`` (``~/.cache/vbcompile``). It is not created here."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vbcompile"
