"""Options whose default depends on the vendor of the device."""

from dataclasses import replace

from vbcompile.config import Config
from vbcompile.device import Target

_FP4_FORMATS = {"huawei": "mxfp4", "habana": "mxfp4"}  # the only one that their units, or FP8, hold


def for_target(config: Config, target: Target) -> Config:
    """The configuration with the target's defaults where the user said nothing."""
    wanted = _FP4_FORMATS.get(target.vendor)
    if wanted is None or "fp4_format" in config.sources or config.fp4_format == wanted:
        return config
    sources = {**config.sources, "fp4_format": f"default on {target.arch}"}
    return replace(config, fp4_format=wanted, sources=sources)
