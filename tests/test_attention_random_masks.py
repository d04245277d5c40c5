"""What kernels conclude about whole tiles of random masks, against the masks themselves, element by element.

The emitted source runs on NumPy here, so that hundreds of masks take seconds; the kernel that calls it is tested in
``test_attention_triton``.
"""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from attention_random_masks import RandomMask
from torch import Tensor

from vbcompile.kernels.attention_intervals import IntervalEmitter
from vbcompile.kernels.attention_layout import broadcast_strides
from vbcompile.kernels.attention_problem import with_padded_lead
from vbcompile.kernels.attention_tiles import RangeEmitter, analyse_mask
from vbcompile.kernels.score_function import evaluate
from vbcompile.kernels.score_triton import CapturedPattern, Emitter

SEEDS_OF_ONE_TEST = 25


class Pointer:
    """A pointer to elements of an array."""

    def __init__(self, array: np.ndarray, offset: Any = 0) -> None:
        self.array, self.offset = array, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.array, self.offset + offset)


class Language:
    """The Triton names that emitted code uses, on NumPy."""

    int1, int32, int64, float32 = np.bool_, np.int32, np.int64, np.float32
    minimum, maximum, where, abs, min, max = np.minimum, np.maximum, np.where, np.abs, np.min, np.max
    floor_divide, remainder = np.floor_divide, np.mod

    @staticmethod
    def cast(value, dtype):
        return np.asarray(value).astype(dtype)

    @staticmethod
    def full(shape, value, dtype):
        return np.asarray(value).astype(dtype)

    @staticmethod
    def load(pointer, mask=None):
        return pointer.array[np.asarray(pointer.offset)]


class Trial:
    """A random mask and its values, seen by rows or, ``by_keys``, by columns."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        lead = draw.choice(((2,), (2, 3), (2, 1, 3), (2, 1, 1, 2)))
        self.rows, self.columns = draw.choice(((13, 29), (24, 16), (5, 37), (32, 32)))
        self.block_q, self.block_k = draw.choice(((8, 8), (16, 4), (4, 16)))
        mask = RandomMask(seed, lead, self.rows, self.columns)
        self.captured = [c.reshape(*(1,) * (4 - len(lead)), *c.shape) for c in mask.captured]
        self.lead = (*(1,) * (4 - len(lead)), *lead)
        self.function = with_padded_lead(mask.function, len(lead))
        self.patterns = tuple(map(CapturedPattern.of, self.captured))

    def values(self, positions: tuple[int, ...]) -> np.ndarray:
        """The conjunction of instructions, ``[*lead, rows, columns]``."""
        found = evaluate(
            self.function, positions, score=None, captured=self.captured, lead=self.lead, q_length=self.rows,
            k_length=self.columns, device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        result = torch.ones(*self.lead, self.rows, self.columns, dtype=torch.bool)
        for value in found:
            assert isinstance(value, Tensor)
            result &= value.bool()
        return result.numpy()

    def run(self, lines: list[str], results: Any, head: tuple[int, ...], **names: Any) -> list[np.ndarray]:
        """Emitted lines for one head; the values of some of their names."""
        context = {
            "tl": Language, "math": Language, "lead": tuple(map(np.int32, head)), "i_ok": None, "j_ok": None,
            "ok": None, "q_length": np.int32(self.rows), "k_length": np.int32(self.columns),
            "captured": [Pointer(c.reshape(-1).numpy()) for c in self.captured],
            "strides": [broadcast_strides(c) for c in self.captured],
        }  # fmt: skip
        namespace = {**context, **names}
        exec("\n".join(line.strip() for line in lines), namespace)
        return [np.asarray(eval(result, namespace)) for result in results]

    def tiles(self, by_keys: bool) -> Any:
        """``(head, first, last)`` of every tile of rows, or of columns."""
        length, block = (self.columns, self.block_k) if by_keys else (self.rows, self.block_q)
        for head in itertools.product(*map(range, self.lead)):
            for first in range(0, length, block):
                yield head, np.int32(first), np.int32(min(first + block, length) - 1)


def check_elements(trial: Trial) -> None:
    keep = trial.values((trial.function.mask,))
    emitter = Emitter(trial.function.program, trial.patterns, precise=False)
    name = emitter.value(trial.function.mask)
    i, j = np.arange(trial.rows, dtype=np.int32)[:, None], np.arange(trial.columns, dtype=np.int32)[None, :]
    for head in itertools.product(*map(range, trial.lead)):
        (mask,) = trial.run(emitter.lines, [name], head, i=i, j=j)
        assert (np.broadcast_to(mask, keep[head].shape) == keep[head]).all(), head


def check_ranges(trial: Trial, by_keys: bool, scattered: bool) -> None:
    analysis = analyse_mask(trial.function, trial.patterns)
    analysis = analysis.without_rows() if by_keys else analysis
    if not analysis.constraints:
        return
    keep = trial.values(analysis.positions)
    emitter = RangeEmitter(Emitter(trial.function.program, trial.patterns, precise=False), scattered)
    interval = emitter.rows(analysis.constraints) if by_keys else emitter.columns(analysis.constraints)
    limit = trial.rows if by_keys else trial.columns
    places = np.arange(limit)
    for head, first, last in trial.tiles(by_keys):
        rows = np.arange(first, last + 1, dtype=np.int32)[:, None]
        bounds = trial.run(
            emitter.lines, interval, head, i=rows, i_ok=rows >= 0, first=first, last=last, limit=np.int32(limit)
        )
        hull_first, full_first, full_last, hull_last = (int(b.reshape(-1)[0]) for b in bounds)
        tile = (keep[head].T if by_keys else keep[head])[first : last + 1]
        assert not tile[:, (places < hull_first) | (places >= hull_last)].any(), (head, first)
        assert tile[:, (places >= full_first) & (places < full_last)].all(), (head, first)


def check_bounds(trial: Trial, by_keys: bool) -> None:
    analysis = analyse_mask(trial.function, trial.patterns)
    analysis = analysis.without_rows() if by_keys else analysis
    emitter = IntervalEmitter(trial.function, trial.patterns, by_keys)
    found = emitter.conjunction(list(analysis.opaque)) if analysis.opaque else None
    if found is None:
        return
    keep = trial.values(analysis.opaque)
    own, other, limit = (
        (trial.block_k, trial.block_q, trial.rows) if by_keys else (trial.block_q, trial.block_k, trial.columns)
    )
    starts = np.arange(0, limit, other, dtype=np.int32)
    ends = np.minimum(starts + other, limit) - 1
    lanes = other // 2  # the kernel takes 32
    inside = np.arange(other, dtype=np.int32).reshape(-1, lanes).T[:, None, :]
    inside = np.minimum(starts[None, :, None] + inside, limit - 1)
    for head, first, last in trial.tiles(by_keys):
        rows = np.minimum(first + np.arange(own, dtype=np.int32), last)
        names = dict(zip(("i", "j"), (inside, rows) if by_keys else (rows, inside), strict=True))
        spans = (starts, ends, first, last) if by_keys else (first, last, starts, ends)
        names |= dict(zip(("first", "last", "column_first", "column_last"), spans, strict=True))
        some, every = (np.broadcast_to(x, starts.shape) for x in trial.run(emitter.lines, found, head, **names))
        tile = (keep[head].T if by_keys else keep[head])[first : last + 1]
        for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
            part = tile[:, start : end + 1]
            assert some[place] or not part.any(), (head, first, place)
            assert part.all() or not every[place], (head, first, place)


@pytest.mark.parametrize("start", range(0, 8 * SEEDS_OF_ONE_TEST, SEEDS_OF_ONE_TEST))
def test_random_masks(start):
    for seed in range(start, start + SEEDS_OF_ONE_TEST):
        trial = Trial(seed)
        try:
            check_elements(trial)
            for by_keys, scattered in ((False, False), (False, True), (True, False)):
                check_ranges(trial, by_keys, scattered)
            check_bounds(trial, by_keys=False)
            check_bounds(trial, by_keys=True)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {trial.function.program}, mask {trial.function.mask}") from error
