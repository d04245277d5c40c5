"""Peak memory and time of a training step in memory mode, against Inductor, checkpointing and Inductor's own budget.

    python bench/training_memory.py [--variants "inductor" "memory" "memory 6GB"] [--seconds 600] [--small]

The model, weights and tokens of ``training_step.py`` with PyTorch's fused attention: 16 layers, hidden 2048, batch
4 x 2048, bfloat16; forward, loss and backward, no optimizer. Peak memory counts the model's weights.

Each variant has a process of its own, one after the other: a plan follows from speeds that are measured as it is made.
Gradients are compared with those of the same weights in float32: memory mode's
largest relative error must not exceed twice Inductor's (exit status 1 otherwise).

Floor: weights and gradients, 2 x 2.2 GB, are alive together when the backward ends; when it begins, logits, their
gradient and the zeros that autograd passes in for the logits that the model returns take 1.6 GB beside the weights.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import training_step
from record import write
from turns import await_turn, hand_in, take_turns


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


def _memory(name: str, **options: object) -> Variant:
    return Variant(name, options={"mode": "memory", "mixed_precision": False, **options})


VARIANTS = [
    Variant("inductor", "inductor"),
    Variant("inductor checkpointing", "inductor", checkpointing=True),
    Variant("inductor budget 0.5", "inductor", share=0.5),
    Variant("inductor budget 0.2", "inductor", share=0.2),
    Variant("balanced", options={"mode": "balanced", "mixed_precision": False}),
    _memory("memory"),
    _memory("memory 6GB", budget="6GB"),
    _memory("memory 5.5GB", budget="5.5GB"),
    _memory("memory 8GB", budget="8GB"),
    _memory("memory 20GB", budget="20GB"),
    _memory("memory 6GB recompute", budget="6GB", offload=False),
    _memory("memory 10GB offload", budget="10GB", recompute=False),
]


# ------------------------------------------------------------------------------------------- one variant
def work(variant: Variant, small: bool, repeats: int, folder: Path) -> None:
    """Compile, wait for the turn, measure, and leave a row in ``folder``."""
    step = training_step.Step("eager sdpa", small)
    torch._functorch.config.activation_memory_budget = variant.share
    step.model.train()
    if variant.checkpointing:
        step.model.gradient_checkpointing_enable({"use_reentrant": False})
    step.run = torch.compile(step.model, backend=variant.backend, options=dict(variant.options) or None)
    begun = time.perf_counter()
    with training_step._Sites() as sites:
        loss = float(step())
    first_call = time.perf_counter() - begun
    step()
    await_turn(folder, variant.name)
    row = {"variant": variant.name, **_measured(step, repeats), "loss": loss, **_chosen(sites.reports)}
    row |= {"gradient_norm": round(step.gradient_norm(), 4), "first_call_s": round(first_call, 1)}
    row["gradient_error"] = _gradient_error(step.model, folder / "reference.pt")
    hand_in(folder, variant.name, row)


def _measured(step: training_step.Step, repeats: int) -> dict:
    """Median step time in ms, peaks in GB, bytes moved; the gradients of the last step stay in the model."""
    from vbcompile.runtime_activations import reset_statistics
    from vbcompile.runtime_activations import statistics as moved

    step()
    reset_statistics()
    _reset_peak()
    times = [step.milliseconds() for _ in range(repeats)]
    found = {"ms": round(statistics.median(times), 2), "fastest_ms": round(min(times), 2), "peak_gb": _gb(_peak())}
    traffic = moved(step.device)
    if traffic.offloads:
        found |= {"moved_gb_per_step": _gb(traffic.offloaded // repeats), "host_gb": _gb(traffic.host_bytes)}
    step.model.zero_grad(set_to_none=True)
    step.synchronize()
    _reset_peak()
    loss = step.run(input_ids=step.tokens, labels=step.tokens).loss
    step.synchronize()
    found |= {"forward_gb": _gb(_peak()), "between_gb": _gb(_allocated())}
    _reset_peak()
    loss.backward()
    step.synchronize()
    return {**found, "backward_gb": _gb(_peak()), "after_gb": _gb(_allocated())}


def _chosen(reports: list) -> dict:
    """Megabytes by fate, the peak and time that the plan expects, and what failed."""
    found: dict[str, float] = {}
    problems = []
    for report in reports:
        problems += [f"{name}: {reason}" for name, reason in report.failures]
        for decision in report.decisions:
            if "peak_bytes" in decision.details:
                found["planned_gb"] = _gb(decision.details["peak_bytes"])
                found["planned_ms"] = round(decision.details["step_ns"] / 1e6, 1)
            if "choice" in decision.details:
                key = f"{decision.details['choice']}_mb"
                found[key] = round(found.get(key, 0) + decision.details["bytes"] / 1e6, 1)
    return {**found, **({"problems": problems} if problems else {})}


def _gradient_error(model: torch.nn.Module, path: Path) -> float | None:
    """Largest relative error of any parameter's gradient against float32, in the Euclidean norm."""
    if not path.exists():
        return None
    worst = 0.0
    for parameter, host in zip(model.parameters(), torch.load(path, mmap=True), strict=True):
        expected = host.to(parameter.device)
        worst = max(worst, float((parameter.grad.float() - expected).norm() / expected.norm()))
    return round(worst, 6)


# ------------------------------------------------------------------------------------------- all of them
def write_reference(path: Path, small: bool) -> None:
    """Gradients of the same weights and tokens in float32, each layer checkpointed so that they fit."""
    step = training_step.Step("eager sdpa", small)
    step.model.float().train()
    step.model.gradient_checkpointing_enable({"use_reentrant": False})
    step()
    temporary = path.with_suffix(".part")
    torch.save([p.grad.cpu() for p in step.model.parameters()], temporary)
    temporary.rename(path)


def run(names: list[str], small: bool, repeats: int, seconds: float, folder: Path) -> list[dict]:
    """Rows of the variants that were done in time, in the order asked for."""
    arguments = ["--folder", str(folder), "--repeats", str(repeats), *(["--small"] if small else [])]
    command = [sys.executable, __file__, *arguments, "--worker"]
    end = time.monotonic() + seconds
    subprocess.run([*command, "reference"], timeout=seconds, check=True)
    rows: list[dict] = []
    for name in names:
        before = list(rows)
        left = end - time.monotonic()
        rows += take_turns(command, [name], left, folder, lambda new, before=before: _write([*before, *new], small))
    return rows


def _write(rows: list[dict], small: bool) -> Path:
    return write("training_memory_small" if small else "training_memory", rows)


def _gb(nbytes: int) -> float:
    return round(nbytes / 1e9, 3)


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def wrong(rows: list[dict]) -> list[str]:
    """Gradients with more than twice Inductor's error, and plans that failed."""
    found = [f"{row['variant']}: {row['problems']}" for row in rows if row.get("problems")]
    errors = {row["variant"]: row["gradient_error"] for row in rows}
    allowed = errors.get("inductor") or errors.get("inductor checkpointing")
    if allowed:
        found += [f"{n}: gradient error {e}, Inductor {allowed}" for n, e in errors.items() if not e <= 2 * allowed]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--small", action="store_true", help="a tiny model on CPU, to try the script")
    usual = ["inductor", "memory 6GB"]
    parser.add_argument("--variants", nargs="+", default=usual, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=900, help="time for everything")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    small, repeats = arguments.small, arguments.repeats
    if arguments.worker == "reference":
        return write_reference(arguments.folder / "reference.pt", small)
    if arguments.worker:
        variant = next(v for v in VARIANTS if v.name == arguments.worker)
        return work(variant, small, repeats, arguments.folder)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.variants, small, repeats, arguments.seconds, Path(folder))
    print(_write(rows, small))
    if problems := wrong(rows) + (
        [] if len(rows) == len(arguments.variants) else ["not all variants were done in time"]
    ):
        sys.exit("\n".join(problems))
    return None


if __name__ == "__main__":
    main()
