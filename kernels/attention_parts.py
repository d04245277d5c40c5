"""Parts of attention over some of the keys each, between the kernel that makes them and the one that merges them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vbcompile.kernels import attention_problem as problems
from vbcompile.kernels.attention_layout import pad_lead, tile_strides
from vbcompile.kernels.attention_problem import Problem

_DEPENDENT_LAUNCH = ("sm_90", "sm_100", "sm_120")  # where a kernel may be launched before the one it waits for ends
_MERGE_WARPS = 4
_MOST_SPLITS = 128


def split_count(slots: int, programs: int, tiles: int) -> int:
    """Parts that the keys of each program are split into so that all together fill ``slots``, none without a tile."""
    return max(1, min(slots // programs, tiles, _MOST_SPLITS))


@dataclass(frozen=True)
class Parts:
    """``splits`` parts of a call's results.

    Attributes:
        out: float32 ``[splits, total_rows, Dv]``, sums of values; rows: float32 ``[2, splits, total_rows]``, the
            largest logits that weights are relative to, and sums of weights. None where there is one part.
        total_rows: of ``[*lead, Q]``.
        early: whether the merging kernel may be launched while the parts are made.
    """

    problem: Problem
    splits: int
    out: Tensor | None
    rows: Tensor | None

    @staticmethod
    def of(problem: Problem, like: Tensor, splits: int) -> "Parts":
        if splits == 1:
            return Parts(problem, splits, None, None)
        total_rows = problem.heads * problem.q_length
        out = like.new_empty([splits, total_rows, problem.dv], dtype=torch.float32)
        return Parts(problem, splits, out, like.new_empty([2, splits, total_rows], dtype=torch.float32))

    @property
    def total_rows(self) -> int:
        return self.problem.heads * self.problem.q_length

    @property
    def early(self) -> bool:
        return self.splits > 1 and self.problem.arch in _DEPENDENT_LAUNCH

    def merge(self, out: Tensor, lse: Tensor) -> None:
        """Write the results; there is nothing to do for one part."""
        if self.splits == 1:
            return
        from vbcompile.kernels.attention_decode import attention_merge_kernel

        problem = self.problem
        problems.launch(
            attention_merge_kernel, (self.total_rows,),
            self.out, self.rows, out, lse, pad_lead(problem.lead), tile_strides(out), problem.q_length, self.splits,
            self.total_rows, EMPTY_IS_ZERO=problem.empty_is_zero, SPLITS_PADDED=problems.power_of_two(self.splits),
            DV=problem.dv, DV_PADDED=problems.padded(problem.dv), EARLY=self.early, num_warps=_MERGE_WARPS,
            **({"launch_pdl": True} if self.early else {}),
        )  # fmt: skip
