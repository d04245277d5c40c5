"""Attention of one query a head over many keys, beside PyTorch's own: whole caches, and caches that are partly filled.

    python bench/attention_decode.py

32 query and 8 key heads of size 128, bfloat16. Times are medians of CUDA-graph replays that go round buffers which no
second-level cache holds. A static cache comes with a mask of all its places, as Hugging Face's `generate` gives it.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import record

HEADS, GROUP, DIM = 8, 4, 128
SHAPES = [(batch, keys, keys) for batch in (1, 8, 32) for keys in (512, 2048, 8192, 32768)]
CACHES = [(1, 32768, 1000), (1, 32768, 8192), (1, 32768, 32767), (8, 8192, 2000), (8, 8192, 8191), (32, 2048, 500)]
MOST_BYTES = 9 * 2**30
CALLS, REPLAYS = 8, 11


def microseconds(run: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]]) -> float:
    """Median time of one of the calls that a graph makes with one set of tensors after the other."""
    for inputs in sets[:2]:
        run(*inputs)
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), max(CALLS, len(sets))
    with torch.cuda.graph(graph):
        kept = [run(*sets[n % len(sets)]) for n in range(count)]
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    del kept
    return sorted(times)[REPLAYS // 2]


def copy_bandwidth() -> float:
    """GB/s of a large copy, read and written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 8 * source.numel() / microseconds(lambda x: torch.neg(x, out=target), [(source,)]) / 1e3


def pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries of a group as rows, as Transformers hands them over."""
    rows, k, v = q[..., 0, :], k.squeeze(2), v.squeeze(2)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=None if mask is None else mask[:, 0])


def measure(batch: int, keys: int, filled: int, pool: Tensor, peak: float) -> dict[str, Any]:
    from attention_forms import captured_mask, make_function

    from vbcompile.kernels import attention_hopper_few, attention_triton

    size = batch * HEADS * keys * DIM
    count = max(1, min(32, pool.numel() // (2 * size), 300_000_000 // (4 * size) + 1))
    buffers = pool[: 2 * count * size].view(count, 2, batch, HEADS, 1, keys, DIM)
    q = torch.randn(batch, HEADS, GROUP, 1, DIM, device="cuda").to(pool.dtype)
    sets: list[tuple[Tensor, ...]] = [(q, *pair) for pair in buffers]
    function = make_function()
    if filled < keys:
        mask = (torch.arange(keys, device="cuda") < filled).expand(batch, 1, 1, 1, keys).contiguous()
        sets = [(*tensors, mask) for tensors in sets]
        function = make_function(mask=captured_mask, empty_rows="zero")

    def ours(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Any:
        return attention_triton.forward(q, k, v, mask, DIM**-0.5, 0.0, None, function)

    row: dict[str, Any] = {"batch": batch, "keys": filled, "cache": keys, "us": microseconds(ours, sets)}
    with patch.object(attention_hopper_few, "operands", lambda *call: "the general kernel's turn"):
        row["general_us"] = microseconds(ours, sets)
    row["pytorch_us"] = microseconds(pytorch, sets)
    needed = 4 * batch * HEADS * filled * DIM
    return row | {"GB/s": needed / row["us"] / 1e3, "share": needed / row["us"] / 1e3 / peak}


def main() -> None:
    peak = copy_bandwidth()
    print(f"copy: {peak:.0f} GB/s")
    pool = torch.randn(MOST_BYTES // 2, device="cuda", dtype=torch.bfloat16)
    rows = []
    for shape in [*SHAPES, *CACHES]:
        rows.append(measure(*shape, pool, peak))
        print({name: round(value, 3) for name, value in rows[-1].items()}, flush=True)
    record.write("attention_decode", rows)


if __name__ == "__main__":
    main()
