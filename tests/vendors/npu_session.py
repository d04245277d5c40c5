"""What a user does on an Ascend machine, on the simulated one; prints what came of it as JSON.

python -m vendors.npu_session        (from the folder tests/)
"""

import json
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn

import vbcompile as vb
from vbcompile.device import DeviceError, get_target
from vendors import ascend
from vendors.npu_device import Npu
from vendors.packages import release

SOC = "Ascend950PR_9589"
F = nn.functional


class Block(nn.Module):
    """Attention with heads that share keys, then an MLP."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = self.q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.heads // 2, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        return x + self.mlp(x)


def devices() -> dict[str, Any]:
    """Detection, adapter, manager, VGPU stack."""
    backend, manager = vb.get_unified_backend("npu:1"), vb.get_device_manager()
    before = backend.memory_allocated()
    held = backend.to_device(torch.ones(1 << 18))
    answers = {
        "best": str(vb.get_device()),
        "arch": get_target("npu").arch,
        "info": vb.get_device_info(),
        "all": [str(d) for d in manager.get_all_devices()],
        "summary": manager.get_device_summary(),
        "held": backend.memory_allocated() - before,
        "place": str(held.device),
        "levels": [level.to_dict() for level in vb.create_vgpu_stack().levels],
        "wrong_place": vb.check_model_device(nn.Linear(2, 2), "npu"),
    }
    backend.synchronize()
    backend.empty_cache()
    vb.memory_cleanup()
    vb.set_seed(3)
    del held
    answers["released"] = backend.memory_allocated() - before
    try:
        vb.get_unified_backend("npu:2")
    except DeviceError as error:
        answers["beyond"] = str(error)
    return answers


def training() -> dict[str, Any]:
    """The contract's MLP with nothing but one line added, and its losses on the CPU without it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    x, y = torch.randn(16, 768), torch.randn(16, 768)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    expected = _losses(model, x, y)
    model.load_state_dict(state)
    vb.enable_balanced_mode()
    found = _losses(model.to("npu"), x.to("npu"), y.to("npu"))
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


def compiled(calls: list[str]) -> dict[str, Any]:
    """A block under the backend, inference and training, against the CPU."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 24, 64)
    expected = model(x)
    expected.sum().backward()
    gradient = model.q.weight.grad.clone()
    model.zero_grad()
    model.to("npu")
    with torch.no_grad():
        inference = torch.compile(model, backend="vblackwell", options={"strict": True})(x.to("npu"))
    first = list(calls)
    out = torch.compile(model, backend="vblackwell", options={"strict": True})(x.to("npu"))
    out.sum().backward()
    explanation = vb.explain(model, x.to("npu"))
    return {
        "inference": float((inference.cpu() - expected).abs().max()),
        "training": float((out.cpu() - expected).abs().max()),
        "gradient": float((model.q.weight.grad.cpu() - gradient).abs().max() / gradient.abs().max()),
        "calls": [first, calls[len(first) :]],
        "decisions": [d.implementation for d in explanation.reports[0].decisions],
    }


def four_bits(calls: list[str]) -> dict[str, Any]:
    """Speed mode with MXFP4 weights: a few rows as they are, many with activations in FP8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).bfloat16().eval()
    few, many = torch.randn(4, 256).bfloat16(), torch.randn(512, 256).bfloat16()
    expected = [model(few), model(many)]
    model.to("npu")
    before = len(calls)
    errors = []
    for x, wanted, activations in zip((few, many), expected, ("same", "fp8"), strict=True):
        options = {"fp4": True, "fp4_format": "mxfp4", "fp4_activations": activations, "strict": True}
        with torch.no_grad():
            out = torch.compile(model, backend="vblackwell", options=options)(x.to("npu"))
        errors.append(float((out.cpu() - wanted).norm() / wanted.norm()))
    return {"error": max(errors), "calls": calls[before:]}


def two_cards() -> dict[str, Any]:
    """The batch cut among both cards."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(6, 8, 64)
    expected = model(x)
    parallel = vb.DataParallel(model.to("npu:0"), device_ids=[0, 1])
    with torch.no_grad():
        out = parallel(x.to("npu:0"))
    return {"error": float((out.cpu() - expected).abs().max()), "place": str(out.device)}


def problems(answers: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    losses, expected = answers["training"]["losses"], answers["training"]["expected"]
    found, blocks = answers["devices"], answers["compiled"]
    checks = {
        "the device is not chosen": found["best"] == "npu" and found["info"]["device_count"] == 2,
        "memory of the second card is not counted": found["held"] >= 4 << 18 and found["released"] == 0,
        "levels are missing": [level["kind"] for level in found["levels"]][:3] == ["device", "peer", "host"],
        "training does not learn": losses[-1] < 0.7 * losses[0],
        "training differs": all(abs(a - b) < 0.02 * b for a, b in zip(losses, expected, strict=True)),
        "the block differs": max(blocks["inference"], blocks["training"]) < 1e-5 and blocks["gradient"] < 1e-4,
        "attention is not the vendor's": blocks["calls"][0] == ["npu_fusion_attention"],
        "FP4 is wrong": answers["four_bits"] is None or answers["four_bits"]["error"] < 0.25,
        "two cards differ": answers["two_cards"]["error"] < 1e-5,
    }
    return [problem for problem, fine in checks.items() if not fine]


def four_bits_possible() -> bool:
    return "fp4" in get_target("npu").features


def session(calls: list[str], with_four_bits: bool = True) -> dict[str, Any]:
    """All of it; ``calls`` is where the vendor's operators note theirs."""
    return {
        "devices": devices(),
        "training": training(),
        "compiled": compiled(calls),
        "four_bits": four_bits(calls) if with_four_bits else None,
        "two_cards": two_cards(),
    }


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    npu = Npu(count=2, arch=SOC)
    npu.install()
    version = "2.13.0"
    with release("torch-npu", version, npu.kernels(ascend.kernels(version)), "PrivateUse1") as package:
        print(json.dumps(session(package.calls), default=str))


if __name__ == "__main__":
    main()
