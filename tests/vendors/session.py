"""What a user does on a vendor's machine, on the simulated one; prints what came of it as JSON.

python -m vendors.session        (from the folder tests/; Ascend, in Python alone)
"""

import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vbcompile as vb
from vbcompile.config import FP4_ACTIVATIONS
from vbcompile.device import DeviceError, get_target
from vendors import ascend
from vendors.npu_device import Npu
from vendors.packages import release

SOC = "Ascend950PR_9589"
F = nn.functional


@dataclass(frozen=True)
class Machine:
    """What differs between the vendors' machines.

    Attributes:
        attention: the vendor's operator for attention's forward.
        dtype: that the vendor's attention takes.
        shared_keys: whether it takes heads that share keys.
        four_bits: whether MXFP4 weights have a kernel.
        autograd: on how many cards autograd works.
        training: the implementation that a training graph's report names.
    """

    attention: str
    dtype: torch.dtype = torch.float32
    shared_keys: bool = True
    four_bits: bool = True
    autograd: int = 2
    training: str = ""


MACHINES = {
    "npu": Machine("npu_fusion_attention", autograd=1),
    "hpu": Machine("sdpa_recomp_fwd", training="hpu_fused_sdpa"),
    "xpu": Machine("_scaled_dot_product_flash_attention", torch.bfloat16, False, False),
}


class Block(nn.Module):
    """Attention, with heads that share keys if wanted, then an MLP."""

    def __init__(self, shared_keys: bool = True, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.norm = heads, heads // 2 if shared_keys else heads, nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width * self.kv_heads // heads)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = self.q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        return x + self.mlp(x)


def devices(kind: str) -> dict[str, Any]:
    """Detection, adapter, manager, VGPU stack."""
    backend, manager = vb.get_unified_backend(f"{kind}:1"), vb.get_device_manager()
    before = backend.memory_allocated()
    held = backend.to_device(torch.ones(1 << 18))
    answers = {
        "best": str(vb.get_device()),
        "arch": get_target(kind).arch,
        "info": vb.get_device_info(),
        "all": [str(d) for d in manager.get_all_devices()],
        "summary": manager.get_device_summary(),
        "held": backend.memory_allocated() - before,
        "place": str(held.device),
        "levels": [level.to_dict() for level in vb.create_vgpu_stack().levels],
        "wrong_place": vb.check_model_device(nn.Linear(2, 2), kind),
    }
    backend.synchronize()
    backend.empty_cache()
    vb.memory_cleanup()
    vb.set_seed(3)
    del held
    answers["released"] = backend.memory_allocated() - before
    try:
        vb.get_unified_backend(f"{kind}:2")
    except DeviceError as error:
        answers["beyond"] = str(error)
    return answers


def training(kind: str) -> dict[str, Any]:
    """The contract's MLP with nothing but one line added, and its losses on the CPU without it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    x, y = torch.randn(16, 768), torch.randn(16, 768)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    expected = _losses(model, x, y)
    model.load_state_dict(state)
    vb.enable_balanced_mode()
    found = _losses(model.to(kind), x.to(kind), y.to(kind))
    vb.disable()
    return {"losses": found, "expected": expected}


def _losses(model: nn.Module, x: Tensor, y: Tensor, steps: int = 4) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def compiled(kind: str, calls: list[str]) -> dict[str, Any]:
    """A block under the backend, inference and training, against the CPU; errors relative to the largest value."""
    machine = MACHINES[kind]
    torch.manual_seed(0)
    model, x = Block(machine.shared_keys).to(machine.dtype), torch.randn(2, 24, 256).to(machine.dtype)
    expected = model(x)
    expected.sum().backward()
    gradient = model.q.weight.grad.clone()
    model.zero_grad()
    model.to(kind)
    before = len(calls)
    with torch.no_grad():
        inference = torch.compile(model, backend="vblackwell", options={"strict": True})(x.to(kind))
    between = len(calls)
    out = torch.compile(model, backend="vblackwell", options={"strict": True})(x.to(kind))
    out.sum().backward()
    explanation = vb.explain(model, x.to(kind))
    return {
        "inference": _error(inference, expected),
        "training": _error(out, expected),
        "gradient": _error(model.q.weight.grad, gradient),
        "calls": [calls[before:between], calls[between:]],
        "decisions": [d.implementation for d in explanation.reports[0].decisions],
    }


def _error(value: Tensor, expected: Tensor) -> float:
    return float((value.detach().cpu().float() - expected.float()).abs().max() / expected.abs().max())


def four_bits(kind: str, calls: list[str]) -> dict[str, Any]:
    """Speed mode with MXFP4 weights: a few rows as they are, many with activations in FP8 and, where known, FP4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).bfloat16().eval()
    few, many = torch.randn(4, 256).bfloat16(), torch.randn(512, 256).bfloat16()
    runs = [(few, "same", model(few)), *((many, kept, model(many)) for kept in FP4_ACTIVATIONS if kept != "same")]
    model.to(kind)
    before = len(calls)
    errors = []
    for x, activations, wanted in runs:
        options = {"fp4": True, "fp4_format": "mxfp4", "fp4_activations": activations, "strict": True}
        with torch.no_grad():
            out = torch.compile(model, backend="vblackwell", options=options)(x.to(kind))
        errors.append(float((out.cpu() - wanted).norm() / wanted.norm()))
    return {"error": max(errors), "calls": calls[before:]}


def two_cards(kind: str) -> dict[str, Any]:
    """The batch cut among both cards."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(6, 8, 256)
    expected = model(x)
    expected.square().mean().backward()
    gradient = model.q.weight.grad.clone()
    model.zero_grad()
    parallel = vb.DataParallel(model.to(f"{kind}:0"), device_ids=[0, 1])
    learns = MACHINES[kind].autograd > 1
    with torch.set_grad_enabled(learns):
        out = parallel(x.to(f"{kind}:0"))
    answers = {"error": _error(out, expected), "place": str(out.device), "gradient": None}
    if learns:
        out.square().mean().backward()
        answers["gradient"] = _error(model.q.weight.grad, gradient)
    return answers


def problems(kind: str, answers: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    machine, losses, expected = MACHINES[kind], answers["training"]["losses"], answers["training"]["expected"]
    found, blocks, cards = answers["devices"], answers["compiled"], answers["two_cards"]
    rounding = 1e-5 if machine.dtype == torch.float32 else 0.05
    checks = {
        "the device is not chosen": found["best"] == kind and found["info"]["device_count"] == 2,
        "memory of the second card is not counted": found["held"] >= 4 << 18 and found["released"] == 0,
        "levels are missing": [level["kind"] for level in found["levels"]][:3] == ["device", "peer", "host"],
        "training does not learn": losses[-1] < 0.7 * losses[0],
        "training differs": all(abs(a - b) < 0.02 * b for a, b in zip(losses, expected, strict=True)),
        "the block differs": max(blocks["inference"], blocks["training"]) < rounding,
        "its gradient differs": blocks["gradient"] < 10 * rounding,
        "attention is not the vendor's": blocks["calls"][0] == [machine.attention],
        "training is not the vendor's": blocks["decisions"][0].startswith(machine.training),
        "FP4 is wrong": answers["four_bits"] is None or answers["four_bits"]["error"] < 0.3,
        "two cards differ": cards["error"] < 1e-5 and (cards["gradient"] is None or cards["gradient"] < 1e-4),
    }
    return [problem for problem, fine in checks.items() if not fine]


def session(kind: str, calls: list[str]) -> dict[str, Any]:
    """All of it; ``calls`` is where the vendor's operators note theirs."""
    four = MACHINES[kind].four_bits and (kind != "npu" or "fp4" in get_target(kind).features)
    return {
        "devices": devices(kind),
        "training": training(kind),
        "compiled": compiled(kind, calls),
        "four_bits": four_bits(kind, calls) if four else None,
        "two_cards": two_cards(kind),
    }


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    npu = Npu(count=2, arch=SOC)
    npu.install()
    version = "2.13.0"
    with release("torch-npu", version, npu.kernels(ascend.kernels(version)), "PrivateUse1") as package:
        print(json.dumps(session("npu", package.calls), default=str))


if __name__ == "__main__":
    main()
