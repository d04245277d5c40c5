"""The 4-D view ``[batch, heads, S, D]`` of attention's canonical space, for kernels that know no other layout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vbcompile.kernels.attention_layout import with_contiguous_rows
from vbcompile.kernels.attention_results import sum_to


def shares_heads(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> bool:
    """Whether the last leading axis of k and v is shared by a group of query heads; all by their shapes."""
    return len(q) >= 4 and k[-3] == v[-3] == 1 and q[-3] > 1


def fold(t: Tensor, lead: Sequence[int], heads: int) -> Tensor:
    """``[*lead, S, D] -> [batch, heads, S, D]``: the last axes of ``lead`` become the heads, the others the batch.

    Rows come out contiguous, which all of PyTorch's kernels take for granted.
    """
    t = with_contiguous_rows(t).expand(*lead, *t.shape[-2:])
    return t.reshape(-1, heads, *t.shape[-2:])


def fold_heads(lead: Sequence[int]) -> int:
    """Heads of the 4-D view: all leading axes after the first (a single one counts as the batch)."""
    heads = 1
    for size in lead[1:]:
        heads *= size
    return heads


def fold_inputs(q: Tensor, k: Tensor, v: Tensor, lead: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """4-D views; grouped keys and values keep their own number of heads, which both kernels understand."""
    heads = fold_heads(lead)
    if shares_heads(q.shape, k.shape, v.shape):
        shared = (*lead[:-1], 1)
        kv_heads = heads // lead[-1]
        return fold(q, lead, heads), fold(k, shared, kv_heads), fold(v, shared, kv_heads)
    return fold(q, lead, heads), fold(k, lead, heads), fold(v, lead, heads)


def unfold_gradients(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], lead: Sequence[int], captured: Sequence[Tensor]
) -> list:
    """Gradients of the 4-D views, as gradients of the operator's inputs."""
    result: list[Tensor | None] = []
    for gradient, t in zip(grads, inputs, strict=True):
        full = gradient.numel() == t.shape[-2] * t.shape[-1] * torch.Size(lead).numel()
        gradient = gradient.reshape(*(lead if full else (*lead[:-1], 1)), *t.shape[-2:])
        result.append(sum_to(gradient, t.shape))
    return [*result, *(None for _ in captured)]
