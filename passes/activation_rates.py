"""Speeds that the activation plan counts with: measured once per device and process, fixed on the CPU."""

import functools
import logging

from vbcompile.passes.activation_plan import Rates

log = logging.getLogger(__name__)

_PLAIN = Rates(matmul=10**11, memory=10**10, away=5 * 10**9, back=5 * 10**9, host_bytes=2**40)
_REACHED = 0.8
_WORKSPACE = 2 * (32 << 20)  # cuBLAS on a Hopper card, for each thread that computes: forward and backward are two
_LINK_REACHED = 0.85  # a plan that fills the link to the last byte waits wherever an estimate is off


@functools.cache
def measured_rates(device_type: str) -> Rates:
    """Speeds of the current device of this type.

    A model's matrix products and copies reach less than the best of a calibration. Each direction of the link is taken
    as it is while the other is idle: the way out is used in the forward, the way back in the backward. Host memory is
    what is free now, less a fifth.
    """
    if device_type == "cpu":
        return _PLAIN
    from vbcompile.device import get_unified_backend
    from vbcompile.vgpu_calibration import calibrate

    found = calibrate(device_type)
    if found.reasons:
        log.info("not measured on %s: %s", found.device, found.reasons)
    free = get_unified_backend("cpu").mem_get_info()[0]
    return Rates(
        matmul=int(_REACHED * (found.matmul or _PLAIN.matmul)),
        memory=found.memory or _PLAIN.memory,
        away=int(_LINK_REACHED * (found.d2h or _PLAIN.away)),
        back=int(_LINK_REACHED * (found.h2d or _PLAIN.back)),
        host_bytes=free * 4 // 5,
        workspace=_WORKSPACE,
    )
