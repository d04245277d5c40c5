"""Attention on Intel GPUs by the flash kernel that PyTorch's XPU build brings (``aten``, forward and backward).

PyTorch's other fused operator there, oneDNN's, takes a mask but gives no logarithm of the softmax's sum and has no
backward, so masked attention stays with our Triton kernel.
"""

import torch

from vbcompile.compat import has_kernel
from vbcompile.device import Target
from vbcompile.kernels import vendor_operators
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.attention_fold import shares_heads
from vbcompile.kernels.attention_sdpa import fused_backward, fused_forward, refuses_common, refuses_structure
from vbcompile.kernels.registry import Implementation, always, operator

NAME = "xpu_flash"
_FEATURES = (64, 96, 128, 192)
_LARGEST_FEATURES = (256, (2, 14))  # and the release of PyTorch that it came with
_OPERATORS = ("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_backward")


def _refuses(target: Target, case: AttentionCase | None) -> str | None:
    if target.vendor != "intel":
        return "runs on Intel GPUs"
    if vendor_operators.is_present("xpu") and not all(has_kernel(name, "XPU") for name in _OPERATORS):
        found = f"PyTorch's flash attention for XPU needs torch 2.11 or later (found {torch.__version__})"
        return f"{found}; {vendor_operators.FALLBACK}"
    if case is None:
        return None
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {case.dtype}"
    if shares_heads(case.q, case.k, case.v):
        return "does not document shared heads of keys"
    return refuses_structure(case) or refuses_common(case) or _refuses_features(case.q[-1])


def _refuses_features(features: int) -> str | None:
    largest, since = _LARGEST_FEATURES
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    allowed = (*_FEATURES, largest) if release >= since else _FEATURES
    return None if features in allowed else f"{features} features per head: takes {', '.join(map(str, allowed))}"


operator("attention").register(Implementation(NAME, fused_forward("flash"), _refuses, always(1.0)))
operator("attention_backward").register(Implementation(NAME, fused_backward("flash"), _refuses, always(1.0)))
