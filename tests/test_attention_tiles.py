"""Ranges of tiles against the masks themselves, element by element."""

import numpy as np
import pytest
import torch
from attention_forms import make_forms, make_function

from vbcompile.device_catalog import catalog_target
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.attention_tiles import RangeEmitter, analyse_mask
from vbcompile.kernels.attention_triton import BACKWARD_KERNELS, FORWARD_KERNELS, refuses
from vbcompile.kernels.score_function import evaluate
from vbcompile.kernels.score_triton import Emitter

ROWS, COLUMNS, BLOCK = 45, 61, 8
FORMS = make_forms(ROWS, COLUMNS, 8, 8)
BOUNDED = ["causal", "causal_offset", "causal_bottom_right", "causal_empty_rows", "window", "both_sides", "prefix"]


class Language:
    """The few Triton names that ranges use, on numpy."""

    int32, int64 = np.int32, np.int64
    minimum, maximum, where, min, max = np.minimum, np.maximum, np.where, np.min, np.max

    @staticmethod
    def cast(value, dtype):
        return value

    @staticmethod
    def full(shape, value, dtype):
        return value


def mask_of(name: str) -> np.ndarray:
    function = FORMS[name].function
    (keep,) = evaluate(
        function, [function.mask], score=None, captured=[], lead=(1,), q_length=ROWS, k_length=COLUMNS,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    return keep[0].expand(ROWS, COLUMNS).numpy()


def interval(name: str, first: int, last: int, rows: bool, scattered: bool = False) -> list[int]:
    function = FORMS[name].function
    emitter = RangeEmitter(Emitter(function.program, (), precise=False), scattered)
    constraints = analyse_mask(function, ()).constraints
    found = emitter.rows(constraints) if rows else emitter.columns(constraints)
    names = {
        "tl": Language, "first": first, "last": last, "limit": ROWS if rows else COLUMNS,
        "i": np.arange(first, last + 1),
        "i_ok": np.ones(last + 1 - first, bool), "q_length": ROWS, "k_length": COLUMNS,
    }  # fmt: skip
    exec("\n".join(line.strip() for line in emitter.lines), names)
    return [int(eval(bound, names)) for bound in found]


def check(keep: np.ndarray, bounds: list[int], first: int, last: int) -> None:
    """``keep``: mask with the ranged axis second."""
    hull_first, full_first, full_last, hull_last = bounds
    tile = keep[first : last + 1]
    places = np.arange(keep.shape[1])
    assert not tile[:, (places < hull_first) | (places >= hull_last)].any()
    assert tile[:, (places >= full_first) & (places < full_last)].all()


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("scattered", [False, True])
def test_columns_of_rows(name, scattered):
    keep = mask_of(name)
    for first in range(0, ROWS, BLOCK):
        last = min(first + BLOCK, ROWS) - 1
        check(keep, interval(name, first, last, rows=False, scattered=scattered), first, last)


@pytest.mark.parametrize("name", BOUNDED)
def test_rows_of_columns(name):
    keep = mask_of(name).T
    for first in range(0, COLUMNS, BLOCK):
        last = min(first + BLOCK, COLUMNS) - 1
        check(keep, interval(name, first, last, rows=True), first, last)


@pytest.mark.parametrize("name", ["causal", "window", "both_sides"])
def test_ranges_are_tight(name):
    keep = mask_of(name)
    for first in range(0, ROWS, BLOCK):
        last = min(first + BLOCK, ROWS) - 1
        hull_first, full_first, full_last, hull_last = interval(name, first, last, rows=False)
        needed = np.flatnonzero(keep[first : last + 1].any(0))
        every = np.flatnonzero(keep[first : last + 1].all(0))
        assert max(hull_first, 0) == needed[0] and min(hull_last, COLUMNS) == needed[-1] + 1
        assert len(every) == max(0, min(full_last, COLUMNS) - max(full_first, 0))


def test_opaque_terms_stay():
    analysis = analyse_mask(FORMS["plain"].function, ())
    assert not analysis.constraints and not analysis.opaque


def test_sizes_that_no_registers_hold_are_refused_with_the_reason():
    case = lambda size: AttentionCase(torch.bfloat16, *((1, 2, 64, size),) * 3, (), False, make_function().dumps())
    rdna = catalog_target("gfx1100")
    assert refuses(FORWARD_KERNELS, rdna, case(128)) is None and refuses(BACKWARD_KERNELS, rdna, case(64)) is None
    assert "grad_kv fit the registers of gfx1100 at head size 256" in refuses(BACKWARD_KERNELS, rdna, case(200))
    for arch in ("sm_80", "sm_90", "sm_120", "gfx90a", "gfx950", "pvc"):
        assert refuses(BACKWARD_KERNELS, catalog_target(arch), case(256)) is None
