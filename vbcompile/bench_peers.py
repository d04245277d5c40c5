"""Other libraries' kernels, measured beside ours where they are installed (``pip install 'vbcompile[peers]'``).

A peer is a name, the package that it needs, and a function that prepares it. What a peer cannot do is reported as the
reason why it has no figure, never left out silently.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor
Layer = Callable[[Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One other way to compute a case.

    Attributes:
        package: the module that must be installed; empty for PyTorch's own.
        prepare: for a linear layer ``(weight [N, K]) -> (x -> x @ weight.T)``, packed by the library's own quantiser;
            for attention ``(causal) -> (q, k, v -> out)`` over ``[batch, heads, length, size]``;
            for a model ``(model on the CPU, device, budget) -> (tokens -> output)``.
    """

    package: str
    prepare: Callable[[Any], Any]

    def missing(self) -> str | None:
        """Why it cannot be used here, or None."""
        return missing(self.package) if self.package else None


def missing(package: str) -> str | None:
    """That a package is not installed, or None."""
    return None if importlib.util.find_spec(package) is not None else f"{package} is not installed"


def _gemlite(weight: Tensor) -> Layer:
    """MXFP4 weights, 16-bit activations: its NVFP4 kernels do not compile for Hopper with Triton 3.6."""
    from gemlite.helper import A16W4_MXFP

    packer = A16W4_MXFP(device=str(weight.device), dtype=weight.dtype)
    return packer.from_linear(_linear(weight), del_orig=False)


def _torchao(weight: Tensor) -> Layer:
    """Integer weights in groups of 64, by PyTorch's own product for them."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = _linear(weight)
    quantize_(layer, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))
    return layer


def _bitsandbytes(weight: Tensor) -> Layer:
    """Its own 4-bit floating point, blocks of 64."""
    from bitsandbytes.nn import LinearFP4

    n, k = weight.shape
    layer = LinearFP4(k, n, bias=False, compute_dtype=weight.dtype, compress_statistics=False)
    layer.load_state_dict({"weight": weight.cpu()})
    return layer.to(weight.device)


def _linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _cudnn(causal: bool) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(causal: bool) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _compiled_flex()(q, k, v, block_mask=mask(q.shape[-2], q.device) if causal else None)

    @cache
    def mask(length: int, device: torch.device) -> Any:
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(device))

    return run


def _flash_attention_3(causal: bool) -> Attention:
    from flash_attn_interface import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _accelerate(argument: tuple[Any, torch.device, str]) -> Any:
    """Its own map of the model under the same budget; on a processor, which has none, every layer is brought in."""
    from accelerate import cpu_offload, dispatch_model, infer_auto_device_map

    model, device, budget = argument
    if device.type == "cpu":
        return cpu_offload(model, execution_device=device)
    whole = list(model._no_split_modules)
    places = infer_auto_device_map(model, {device.index or 0: budget, "cpu": "200GiB"}, no_split_module_classes=whole)
    return dispatch_model(model, places)


LINEAR = {
    "gemlite": Peer("gemlite", _gemlite),
    "torchao": Peer("torchao", _torchao),
    "bitsandbytes": Peer("bitsandbytes", _bitsandbytes),
}
OFFLOADED = {"accelerate": Peer("accelerate", _accelerate)}
ATTENTION = {
    "cudnn": Peer("", _cudnn),
    "flex": Peer("", _flex),
    "flash_attention_3": Peer("flash_attn_interface", _flash_attention_3),
}


def prepared(
    peers: dict[str, Peer], argument: Any, try_out: Callable[[Any], float], allowed: float
) -> tuple[dict, dict]:
    """The peers that work, and the reasons of the others.

    Args:
        argument: what :attr:`Peer.prepare` takes.
        try_out: runs a prepared peer and gives the relative error of its result.
        allowed: the largest error with which a peer counts as right.

    Returns:
        name -> what its ``prepare`` returned; name -> why there is none.
    """
    working: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, peer in peers.items():
        reason = peer.missing()
        if reason is None:
            try:
                run = peer.prepare(argument)
                error = try_out(run)
                reason = None if error <= allowed else f"its relative error is {error:.3g}"
            except Exception as failure:  # noqa: BLE001 whatever a library raises is its reason
                reason = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:160]
        if reason is None:
            working[name] = run
        else:
            absent[name] = reason
    return working, absent
