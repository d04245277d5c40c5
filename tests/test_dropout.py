"""The counter-based dropout mask."""

import pytest
import torch

from vbcompile.kernels.dropout import dropout_keep, uniform

SEED = torch.tensor([0x0123_4567_89AB_CDEF], dtype=torch.int64)


def test_share_of_kept_elements():
    keep = dropout_keep(SEED, (64, 64, 64), 0.3, "cpu")
    assert keep.dtype == torch.bool
    assert abs(keep.double().mean().item() - 0.7) < 5e-3  # five standard deviations


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_extremes(p):
    assert dropout_keep(SEED, (1000,), p, "cpu").double().mean().item() > 0.99 - p


def test_seeds_and_offsets_matter():
    offsets = torch.arange(1000)
    low = uniform(SEED, offsets)
    assert not torch.equal(low, uniform(SEED + 2**32, offsets))
    assert not torch.equal(low, uniform(SEED + 1, offsets))
    assert not torch.equal(low, uniform(SEED, offsets + 2**32))


def test_same_numbers_as_triton():
    """Random123's known answers for Philox 4x32-10 with a zero key and counter, first word."""
    word = 0x6627E8D5
    assert uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).item() == pytest.approx(
        word * 4.6566127342e-10, rel=1e-6
    )
