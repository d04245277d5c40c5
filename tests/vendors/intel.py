"""PyTorch's flash attention of its XPU build, on CPU tensors: other builds have the operator but no kernel."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vendors.packages import release


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"flash attention for XPU (simulated): {message}")


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    _check(q.dtype in (torch.float16, torch.bfloat16), f"type {q.dtype}")
    _check(q.shape[-1] in (64, 96, 128, 192), f"{q.shape[-1]} features")
    _check(q.shape[:2] == k.shape[:2], "heads of queries and keys differ")
    _check(not is_causal or q.shape[-2] == k.shape[-2], "is_causal with different lengths")
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf) if is_causal else scores


def _forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    _check(dropout_p == 0, "dropout is not simulated")
    scores = _scores(q, k, is_causal, scale)
    none = torch.empty(0, dtype=torch.int64)
    out = (scores.softmax(-1) @ v.double()).to(q.dtype)
    return out, scores.logsumexp(-1).float(), none, none, q.shape[2], k.shape[2], none, none, none


def _backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None):
    _check((max_q, max_k) == (q.shape[2], k.shape[2]), "lengths")
    weights = (_scores(q, k, is_causal, scale) - lse.double().unsqueeze(-1)).exp()
    dy = grad.double()
    ds = weights * (dy @ v.double().mT - (dy * out.double()).sum(-1, keepdim=True))
    ds = ds * (q.shape[-1] ** -0.5 if scale is None else scale)
    grads = ds @ k.double(), ds.mT @ q.double(), weights.mT @ dy
    return tuple(g.to(q.dtype) for g in grads)


KERNELS = {
    "_scaled_dot_product_flash_attention": _forward,
    "_scaled_dot_product_flash_attention_backward": _backward,
}


@contextmanager
def kernels_of(version: str) -> Iterator[dict[str, Any]]:
    """The kernels behind the schemas of a release of PyTorch, which hold each call before it runs."""
    with release("torch", version, KERNELS, namespace="recorded_torch") as opened:
        yield {name: getattr(getattr(torch.ops, opened.namespace), name) for name in KERNELS}


@contextmanager
def flash_kernels(
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    keys: Sequence[str] = ("CPU", "XPU"),
    kernels: Mapping[str, Callable[..., Any]] = KERNELS,
) -> Iterator[list[str]]:
    """The operators have kernels until the block ends; gives the list of their calls.

    Args:
        adapt: makes kernels for CPU tensors into ones for the device's.
        keys: dispatch keys of the tensors that they run on; XPU so that the operator counts as present there.
        kernels: for CPU tensors, by operator.
    """
    library, calls = torch.library.Library("aten", "IMPL"), []
    for name, kernel in adapt(dict(kernels)).items():

        def run(*args: Any, _name: str = name, _kernel: Callable[..., Any] = kernel, **kwargs: Any) -> Any:
            calls.append(_name)
            return _kernel(*args, **kwargs)

        for key in keys:
            library.impl(name, run, key)
    try:
        yield calls
    finally:
        library._destroy()
