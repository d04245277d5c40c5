"""Whole models in ``vbcompile bench``: a Llama beyond its budget beside Accelerate, FLUX beside Inductor.

Weights are random; results are compared with the same model in float64 on the device. A model whose package is not
installed gives a row that says so.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import vbcompile
from vbcompile import bench_peers
from vbcompile.bench_cases import Case, compiled, error_of
from vbcompile.bench_cases import makers as operator_makers
from vbcompile.handles_model import stores_of
from vbcompile.handles_timeline import movement_of, recorded
from vbcompile.vgpu_size import parse_size

Tensor = torch.Tensor
_ENOUGH = "200GiB"  # of host memory; the models here take a few


def makers(device: torch.device, quick: bool) -> list[Callable[[], Case]]:
    """What makes each case of ``vbcompile bench``: operators, then models; those compile for long on a processor."""
    found = operator_makers(device, quick)
    if device.type != "cpu":
        found.append(partial(offloaded_case, device, *((4, "0.7GB") if quick else (16, "2.5GB"))))
    if device.type != "cpu" or not quick:
        found.append(partial(diffusion_case, device, *((2, 64, 1, 64) if device.type == "cpu" else (16, 128, 2, 1024))))
    return found


def offloaded_case(device: torch.device, layers: int, budget: str, width: int = 4096, smallest: str = "1MiB") -> Case:
    """A step of one token through a Llama of which ``budget`` does not hold all: ours, and Accelerate's dispatch.

    Args:
        layers: of Llama-3-8B's shape where ``width`` is 4096.
        budget: device memory for weights and activations.
        width: of the hidden state.
        smallest: what :func:`vbcompile.offload` takes.
    """
    name = f"{layers} Llama layers of {width}, weights beyond {budget} in host memory"
    reason = bench_peers.missing("transformers")
    if reason is not None:
        return Case(name, {}, 0.0, 0.0, absent={"transformers": reason})
    model, tokens = _llama(device, layers, width), torch.zeros(1, 1, dtype=torch.long, device=device)
    plain = model(tokens).logits.clone()
    exact = copy.deepcopy(model).double()(tokens).logits
    allowed = 2 * error_of(plain, exact)
    host = model.to("cpu")
    mine = vbcompile.offload(
        copy.deepcopy(host), device, {0: budget, "cpu": _ENOUGH}, smallest=smallest, progress=False
    )
    run, chosen = compiled(mine, {"mode": "memory", "downstream": "eager", "attention": False}, tokens)
    (store,) = stores_of(mine)
    with recorded([store]):
        for _ in range(2):  # the first one starts the stream
            run(tokens)
        movement = movement_of(store)
    wrong = lambda run: error_of(run(tokens).logits, exact)
    peers, absent = bench_peers.prepared(bench_peers.OFFLOADED, (host, device, budget), wrong, 2 * allowed)
    weights = sum(value.nbytes for value in host.parameters())
    return Case(
        name=name,
        runs={key: [partial(call, tokens)] for key, call in {"vblackwell": run, **peers}.items()},
        flops=0.0,
        nbytes=float(max(weights - parse_size("budget", budget), 0)),
        error=wrong(run),
        allowed=allowed,
        implementation=chosen,
        absent=absent,
        over_link=True,
        graphs=False,
        memory=[[*sample] for sample in movement.memory] if movement is not None else [],
    )


def diffusion_case(device: torch.device, heads: int, size: int, blocks: int, tokens: int) -> Case:
    """A denoising step of FLUX's transformer, beside Inductor and eager.

    Args:
        heads, size: of attention; their product is the hidden width.
        blocks: of either kind.
        tokens: of the image; a quarter as many of text.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    name = f"FLUX transformer, {blocks} + {blocks} blocks of {heads}x{size}, {tokens} + {tokens // 4} tokens"
    reason = bench_peers.missing("diffusers")
    if reason is not None:
        return Case(name, {}, 0.0, 0.0, absent={"diffusers": reason})
    from torch.utils.flop_counter import FlopCounterMode

    model = _flux(heads, size, blocks).to(device, dtype).eval()
    inputs = _image(device, dtype, heads * size, tokens)
    eager = lambda **inputs: model(**inputs, return_dict=False)[0]
    with FlopCounterMode(display=False) as counter:
        plain = eager(**inputs)
    double = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    exact = copy.deepcopy(model).double()(**double, return_dict=False)[0]
    run, chosen = compiled(eager, {"mode": "balanced"}, **inputs)
    inductor = torch.compile(eager, dynamic=False)
    return Case(
        name=f"{name}, {str(dtype).removeprefix('torch.')}",
        runs={
            key: [partial(call, **inputs)]
            for key, call in {"vblackwell": run, "inductor": inductor, "eager": eager}.items()
        },
        flops=float(counter.get_total_flops()),
        nbytes=float(sum(value.nbytes for value in model.parameters())),
        error=error_of(run(**inputs), exact),
        allowed=2 * error_of(plain, exact),
        implementation=chosen,
    )


def _llama(device: torch.device, layers: int, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4 * width,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 128, 1),
        num_key_value_heads=max(width // 512, 1),
        use_cache=False,
    )
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.float32 if device.type == "cpu" else torch.bfloat16).eval()


def _flux(heads: int, size: int, blocks: int) -> Any:
    from diffusers import FluxTransformer2DModel

    side = size * 7 // 32 * 2  # of the positions' three axes, as in FLUX
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=size,
        num_attention_heads=heads,
        joint_attention_dim=heads * size,
        pooled_projection_dim=heads * size,
        axes_dims_rope=(size - 2 * side, side, side),
    )


def _image(device: torch.device, dtype: torch.dtype, width: int, tokens: int) -> dict[str, Tensor]:
    random = partial(torch.randn, device=device, dtype=dtype)
    side = int(tokens**0.5)
    places = torch.stack([torch.zeros(tokens), torch.arange(tokens) // side, torch.arange(tokens) % side], 1)
    return {
        "hidden_states": random(1, tokens, 64),
        "encoder_hidden_states": random(1, tokens // 4, width),
        "pooled_projections": random(1, width),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "img_ids": places.to(device, dtype),
        "txt_ids": torch.zeros(tokens // 4, 3, device=device, dtype=dtype),
    }
