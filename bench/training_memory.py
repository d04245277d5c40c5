"""Peak memory and time of a training step in memory mode, against Inductor, checkpointing and Inductor's own budget.

    python bench/training_memory.py [--variants "inductor" "memory" "memory 6GB"] [--repeats 10] [--small]

The model, weights and tokens of ``training_step.py`` with PyTorch's fused attention: 16 layers, hidden 2048, batch
4 x 2048, bfloat16; forward, loss and backward, no optimizer. Peak memory counts the model's weights. Every variant's
loss, gradient norm and gradients are compared with the first one's (exit status 1 otherwise).

Floor: weights and gradients, 2 x 2.2 GB, are alive together when the backward ends; logits take 0.5 GB, their gradient
as much again, while half of that stays free for activations at 6 GB.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch
import training_step
from record import write


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compile the step.

    Attributes:
        name: As in the results.
        backend: Of ``torch.compile``.
        options: Of the backend.
        checkpointing: Whether the model checkpoints each layer itself.
        share: Inductor's own budget, as a share of what it saves by default.
    """

    name: str
    backend: str = "vblackwell"
    options: dict = dataclasses.field(default_factory=dict)
    checkpointing: bool = False
    share: float = 1.0


_PLAIN = {"mixed_precision": False}
VARIANTS = [
    Variant("inductor", "inductor"),
    Variant("inductor checkpointing", "inductor", checkpointing=True),
    Variant("inductor budget 0.5", "inductor", share=0.5),
    Variant("inductor budget 0.2", "inductor", share=0.2),
    Variant("balanced", options={"mode": "balanced", **_PLAIN}),
    Variant("memory", options={"mode": "memory", **_PLAIN}),
    Variant("memory 6GB", options={"mode": "memory", "budget": "6GB", **_PLAIN}),
    Variant("memory 5.6GB", options={"mode": "memory", "budget": "5.6GB", **_PLAIN}),
    Variant("memory 20GB", options={"mode": "memory", "budget": "20GB", **_PLAIN}),
    Variant("memory 8GB", options={"mode": "memory", "budget": "8GB", **_PLAIN}),
    Variant("memory 6GB recompute", options={"mode": "memory", "budget": "6GB", "offload": False, **_PLAIN}),
    Variant("memory 6GB offload", options={"mode": "memory", "budget": "6GB", "recompute": False, **_PLAIN}),
    Variant("memory 10GB offload", options={"mode": "memory", "budget": "10GB", "recompute": False, **_PLAIN}),
    Variant("memory all", options={"mode": "memory", "slowdown": 1.0, **_PLAIN}),
]


def prepare(step: training_step.Step, variant: Variant) -> None:
    """Compile the model anew."""
    torch._dynamo.reset()
    gc.collect()
    torch._functorch.config.activation_memory_budget = variant.share
    step.model.train()
    step.model.gradient_checkpointing_disable()
    if variant.checkpointing:
        step.model.gradient_checkpointing_enable({"use_reentrant": False})
    step.run = torch.compile(step.model, backend=variant.backend, options=dict(variant.options) or None)


def measure(step: training_step.Step, variant: Variant, repeats: int) -> dict:
    """Median step time in ms, peaks of forward and backward in GB, bytes moved; the gradients stay in the model."""
    prepare(step, variant)
    begun = time.perf_counter()
    with training_step._Sites() as sites:
        loss = float(step())
    first_call = time.perf_counter() - begun
    step()
    _reset_moved()
    _reset_peak()
    times = [step.milliseconds() for _ in range(repeats)]
    row = {
        "variant": variant.name,
        "ms": round(statistics.median(times), 2),
        "fastest_ms": round(min(times), 2),
        "peak_gb": _gb(_peak()),
        **_moved(step.device, repeats),
        **_peaks(step),
        "loss": loss,
        "gradient_norm": round(step.gradient_norm(), 4),
        "first_call_s": round(first_call, 1),
        **_chosen(sites.reports),
    }
    return row


def _peaks(step: training_step.Step) -> dict:
    """Peaks of the forward and of the backward, and what is alive between them."""
    step.model.zero_grad(set_to_none=True)
    step.synchronize()
    _reset_peak()
    loss = step.run(input_ids=step.tokens, labels=step.tokens).loss
    step.synchronize()
    found = {"forward_gb": _gb(_peak()), "between_gb": _gb(_allocated())}
    _reset_peak()
    loss.backward()
    step.synchronize()
    return {**found, "backward_gb": _gb(_peak()), "after_gb": _gb(_allocated())}


def _chosen(reports: list) -> dict:
    """Megabytes by fate, and what failed."""
    found: dict[str, float] = {}
    problems = []
    for report in reports:
        problems += [f"{name}: {reason}" for name, reason in report.failures]
        for decision in report.decisions:
            if "choice" in decision.details:
                key = f"{decision.details['choice']}_mb"
                found[key] = round(found.get(key, 0) + decision.details["bytes"] / 1e6, 1)
    return {**found, **({"problems": problems} if problems else {})}


def _moved(device: torch.device, steps: int) -> dict:
    from vbcompile.runtime_activations import statistics as moved

    found = moved(device)
    if not found.offloads:
        return {}
    return {"moved_gb_per_step": _gb(found.offloaded // steps), "host_gb": _gb(found.host_bytes)}


def _reset_moved() -> None:
    from vbcompile.runtime_activations import reset_statistics

    reset_statistics()


def difference(model: torch.nn.Module, reference: list[torch.Tensor]) -> float:
    """Largest relative difference of any parameter's gradient, in the Euclidean norm."""
    worst = 0.0
    for parameter, host in zip(model.parameters(), reference, strict=True):
        expected = host.to(parameter.device).float()
        scale = float(expected.norm())
        worst = max(worst, float((parameter.grad.float() - expected).norm()) / scale if scale else 0.0)
    return worst


def _gb(nbytes: int) -> float:
    return round(nbytes / 1e9, 3)


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def run(variants: list[Variant], small: bool, repeats: int) -> list[dict]:
    """Rows in order; a variant that fails leaves its reason."""
    step = training_step.Step("eager sdpa", small)
    rows: list[dict] = []
    reference: list[torch.Tensor] = []
    for variant in variants:
        try:
            row = measure(step, variant, repeats)
        except Exception as error:  # noqa: BLE001  the row says what happened, and main() exits with it
            row = {"variant": variant.name, "error": f"{type(error).__name__}: {error}"[:2000]}
        else:
            reference = reference or [p.grad.cpu() for p in step.model.parameters()]
            row["gradient_difference"] = round(difference(step.model, reference), 6)
        rows.append(row)
        print(row, flush=True)
        write(_name(small), rows)
        step.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def _name(small: bool) -> str:
    return "training_memory_small" if small else "training_memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--small", action="store_true", help="a tiny model on CPU, to try the script")
    parser.add_argument("--variants", nargs="+", default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    chosen: dict[str, Callable] = {variant.name: variant for variant in VARIANTS}
    rows = run([chosen[name] for name in arguments.variants], arguments.small, arguments.repeats)
    good = [row for row in rows if "error" not in row]
    wrong = [f"{row['variant']}: {row['error']}" for row in rows if "error" in row]
    for row in good:
        row["backend"] = row["variant"]
    if wrong := wrong + training_step.disagreements(good):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
