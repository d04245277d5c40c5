"""An MLP 4096-14336-4096 on the processor, one row: ``speed`` mode beside eager and Inductor.

    python bench/cpu_mlp.py [--threads N]

Least time of rounds taken in turns, since a neighbour on the machine only ever adds. Floor: the packed bytes over the
bandwidth that a large copy reaches in the same run, read only.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from record import write
from torch import nn

HIDDEN, WIDE = 4096, 14336
_ROUNDS = 25


def mlp(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(HIDDEN, WIDE), nn.SiLU(), nn.Linear(WIDE, HIDDEN)).to(dtype).requires_grad_(False)


def least(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each run."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: min(found) for name, found in times.items()}


def bandwidth() -> float:
    """Bytes per second that a large copy reads."""
    source = torch.empty(2**26, dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    return source.nbytes / (least({"copy": lambda: target.copy_(source)})["copy"] / 1e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    rows = []
    with torch.no_grad():
        packed_bytes = 2 * HIDDEN * WIDE * 4.5 / 8
        floor = 1e3 * packed_bytes / bandwidth()
        for dtype in (torch.float32, torch.bfloat16):
            model, x = mlp(dtype), torch.randn(1, HIDDEN, dtype=dtype)
            runs = {
                "speed": torch.compile(model, backend="vblackwell", mode="speed"),
                "inductor": torch.compile(model),
                "eager": model,
            }
            results = {name: run(x) for name, run in runs.items()}
            error = float((results["speed"] - results["eager"]).norm() / results["eager"].norm())
            assert 0 < error < 0.15, error
            times = least({name: lambda run=run, x=x: run(x) for name, run in runs.items()})
            row = {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(), **times}
            row |= {f"over_{name}": times[name] / times["speed"] for name in ("eager", "inductor")}
            rows.append(row | {"floor": floor, "share_of_floor": floor / times["speed"], "error": error})
            print(rows[-1], flush=True)
    print(write("cpu_mlp", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
