"""A linear layer with 4-bit weights on a GPU: ours beside GemLite, torchao, bitsandbytes and cuBLAS, in one run.

    python bench/fp4_peers.py [--rows 1 16 64 256] [--peers gemlite torchao bitsandbytes]

Every way packs the same Gaussian weight with its own quantiser, and its result must be within 4-bit error of the
unpacked product. Times are medians of CUDA-graph replays that go round as many copies of the weight as no cache holds,
after each library's own tuning. A library that is not installed, or that fails, is reported with its reason.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record

from vbcompile.bench_peers import LINEAR
from vbcompile.device import get_target
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_linear import fp4_linear
from vbcompile.kernels.fp4_linear_triton import preferred_layout
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.tune import microseconds

SHAPES = [(28672, 4096), (4096, 14336)]
_LARGEST_ERROR = 0.2  # relative to the product with the unpacked weight: 4-bit weights are at 0.08 to 0.15
_COPIES = 4
Tensor = torch.Tensor
Layer = Callable[[Tensor], Tensor]


def ours(weight: Tensor) -> Layer:
    packed = to_layout(quantize(weight, "nvfp4"), preferred_layout(get_target("cuda")))
    return lambda x: fp4_linear(x, *packed.tensors, None, packed.k, "nvfp4", packed.layout)


def cublas(weight: Tensor) -> Layer:
    mine = weight.clone()
    return lambda x: F.linear(x, mine)


WAYS = {"vbcompile": ours, "cublas_bf16": cublas} | {name: peer.prepare for name, peer in LINEAR.items()}


def measure(way: str, weight: Tensor, rows: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows and the time in microseconds with the relative error, or the reason why there is none, one by one."""
    try:
        layers = [WAYS[way](weight) for _ in range(_COPIES)]
    except Exception as error:  # noqa: BLE001 whatever a library raises is its reason
        yield from ((m, {"absent": f"{type(error).__name__}: {error}"[:200]}) for m in rows)
        return
    for m in rows:
        x = torch.randn(m, weight.shape[1], device="cuda", dtype=torch.bfloat16)
        exact = x.double() @ weight.double().T
        try:
            error = float((layers[0](x).double() - exact).norm() / exact.norm())
            us = microseconds([lambda layer=layer, x=x: layer(x) for layer in layers * 2])
        except Exception as failure:  # noqa: BLE001
            yield m, {"absent": f"{type(failure).__name__}: {failure}"[:200]}
            continue
        right = error < _LARGEST_ERROR
        yield m, {"us": us, "error": error} if right else {"absent": f"wrong result: relative error {error:.3g}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--peers", nargs="*", default=list(LINEAR), choices=list(LINEAR))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    plain: dict[tuple[int, int], float] = {}
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for n, k in SHAPES]
    for way in ("cublas_bf16", "vbcompile", *arguments.peers):  # a library that hangs comes last
        for weight in weights:
            n, k = weight.shape
            with torch.no_grad():
                for m, found in measure(way, weight, arguments.rows):
                    row = {"n": n, "k": k, "m": m, "way": way, **found}
                    if way == "cublas_bf16" and "us" in row:
                        plain[n, m] = row["us"]
                    if "us" in row and (n, m) in plain:
                        row["over_bf16"] = plain[n, m] / row["us"]
                    rows.append(row)
                    print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                    record.write("fp4_peers", sorted(rows, key=lambda row: (row["k"], row["m"])))


if __name__ == "__main__":
    main()
