"""Compiles the launches of causal attention, forward, backward and decode: ``attention_aot.py SIZE DTYPE ARCH ...``.

Prints one line of JSON per kernel and architecture.
"""

import json
import sys

import torch
from attention_forms import causal, make_function
from triton_aot import Launch, compile_launch

from vbcompile.kernels import attention_problem, attention_triton

MARKS = ("wgmma", "cp.async.bulk.tensor", "tcgen05", "mma.sync", "v_mfma")
FUNCTION = make_function(mask=causal())


def record_launches(arch: str, head_size: int, dtype: torch.dtype, backward: bool = True) -> list[Launch]:
    """What one forward, its backward if wanted, and one decoding step launch on ``arch``."""
    launches: list[Launch] = []
    attention_problem.launch = lambda kernel, grid, *a, **options: launches.append(Launch(kernel, a, options))
    attention_problem.arch_of = lambda t: arch
    q, k, v = (torch.empty(1, 2, 512, head_size, dtype=dtype) for _ in range(3))
    arguments = (0.1, 0.0, None, FUNCTION)
    out, lse = attention_triton.forward(q, k, v, [], *arguments)
    if backward:
        attention_triton.backward(out, None, q, k, v, [], out, lse, *arguments, [True] * 3)
    attention_triton.forward(q[:, :, :1], k, v, [], *arguments)
    return launches


def main(head_size: str, dtype: str, *architectures: str) -> None:
    for arch in architectures:
        for launch in record_launches(arch, int(head_size), getattr(torch, dtype)):
            report = compile_launch(launch, arch)
            text = report.assembly.get("ptx") or report.assembly["amdgcn"]
            row = {
                "arch": arch,
                "kernel": launch.kernel.__name__.removeprefix("attention_").removesuffix("_kernel"),
                "registers": report.registers,
                "spills": report.spills,
                "shared": report.shared,
                "instructions": [m for m in MARKS if m in text],
            }
            sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
