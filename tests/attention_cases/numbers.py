"""Masks and scores whose meaning hangs on dtypes: thresholds in 16 bits, bytes that wrap, rounded divisions."""

import math

import torch
import torch.nn.functional as F

from attention_cases.case import INFERENCE, Draw, cross, either, fuses, plus, qkv

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.35


def _positions(q, k):
    return torch.arange(q.shape[-2], device=q.device)[:, None], torch.arange(k.shape[-2], device=k.device)[None, :]


def _mask_of_numbers(d: Draw):
    """0 and -10000 in the run's dtype (-9984 in bfloat16)."""
    return torch.where(d.flags(d.B, 1, d.S, d.T), 0.0, -10000.0).to(d.constant(1))


def _mask_of_tenths(d: Draw):
    """Tenths as the run's dtype rounds them."""
    return (d.integers(0, 10, d.B, 1, d.S, d.T) / 10).to(d.constant(1))


def _bytes(d: Draw):
    return d.flags(d.B, 1, d.S, d.T).to(torch.uint8)


# ---------------------------------------------------------------------------------------- thresholds in few bits
@fuses("numbers", plus(cross, _mask_of_numbers))
def mask_equal_to_minus_ten_thousand(q, k, v, mask):
    return _scores(q, k).masked_fill(mask == -10000.0, -INF).softmax(-1) @ v


@fuses("numbers", plus(cross, _mask_of_numbers))
def mask_above_minus_ten_thousand(q, k, v, mask):
    return torch.where(mask > -10000.0, _scores(q, k), -INF).softmax(-1) @ v


@fuses("numbers", plus(cross, _mask_of_tenths))
def mask_at_most_three_tenths(q, k, v, mask):
    hidden = (mask > 0.3).index_fill(-1, torch.tensor([0], device=q.device), False)
    return _scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v


@fuses("numbers", plus(cross, _mask_of_tenths))
def mask_at_least_seven_tenths_added(q, k, v, mask):
    return (_scores(q, k) + (mask >= 0.7).to(q.dtype) * -3.0).softmax(-1) @ v


@fuses("numbers", plus(cross, _mask_of_tenths))
def tenths_added_before_they_are_compared(q, k, v, mask):
    """0.1 + 0.2 is not 0.3."""
    return (_scores(q, k) + torch.where(mask + 0.2 <= 0.3, 2.0, 0.0).to(q.dtype)).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.constant(d.B, d.S), lambda d: d.constant(d.B, d.T)))
def neighbours_by_rounded_distance(q, k, v, x, y):
    gap = (x[:, :, None] - y[:, None, :]).abs()
    return (_scores(q, k) - (gap < 0.75)[:, None].to(q.dtype) * 4.0).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.constant(d.S, d.T).double()))
def threshold_on_doubles(q, k, v, x):
    near = (x * 1e-9 + 1.0) < 1.0
    return (_scores(q, k) + torch.where(near, 2.0, 0.0).to(q.dtype)).softmax(-1) @ v


# -------------------------------------------------------------------------------------------- integers that wrap
@fuses("numbers", plus(cross, _bytes))
def bytes_less_one(q, k, v, mask):
    """0 - 1 is 255."""
    return (_scores(q, k) - (mask - 1).to(q.dtype) * 0.01).softmax(-1) @ v


@fuses("numbers", plus(cross, _bytes))
def one_less_bytes(q, k, v, mask):
    return (_scores(q, k) + (1 - mask).to(q.dtype) * -100.0).softmax(-1) @ v


@fuses("numbers", plus(cross, _bytes))
def bytes_negated(q, k, v, mask):
    return (_scores(q, k) + (-mask).to(q.dtype) * 0.01).softmax(-1) @ v


@fuses("numbers", plus(cross, _bytes))
def bytes_inverted(q, k, v, mask):
    """254 and 255 are both true."""
    return (_scores(q, k) + (~mask).to(q.dtype) * 0.01).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.integers(0, 5, d.B, 1, 1, d.T).to(torch.uint8)))
def bytes_multiplied(q, k, v, ids):
    return (_scores(q, k) + (ids * 100).to(q.dtype) * 0.01).softmax(-1) @ v


@fuses("numbers", cross)
def positions_as_bytes(q, k, v):
    i, j = _positions(q, k)
    return (_scores(q, k) + (i * 50 + j).to(torch.uint8).to(q.dtype) * 0.01).softmax(-1) @ v


@fuses("numbers", cross)
def positions_as_signed_bytes(q, k, v):
    i, j = _positions(q, k)
    keep = ((i * 40).to(torch.int8) >= 0) | (j < 2)
    return torch.where(keep, _scores(q, k), -INF).softmax(-1) @ v


@fuses("numbers", cross)
def positions_in_few_bits(q, k, v):
    """int32 arithmetic overflows by design."""
    i, j = _positions(q, k)
    mixed = (i.int() * 715827883 + j.int() * 1431655765) % 7
    return _scores(q, k).masked_fill((mixed < 3) & (j > 0), -INF).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def flags_added_and_compared(q, k, v, mask):
    """True + True is True."""
    i, j = _positions(q, k)
    both = mask + (j <= i)
    bias = (both == 1) * 1.5 + (both.long() * 2 - 1) * 0.25
    return (_scores(q, k) + bias.to(q.dtype)).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.integers(0, 4, d.B, 1, d.S, d.T)))
def integers_and_a_bit(q, k, v, bits):
    return _scores(q, k).masked_fill((bits & 1) == 1, -30.0).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.integers(0, 4, d.B, 1, d.S, d.T)))
def integers_shifted(q, k, v, bits):
    return (_scores(q, k) + ((bits >> 1) ^ 1).to(q.dtype)).softmax(-1) @ v


# ------------------------------------------------------------------------------------- divisions, roots, floors
@fuses("numbers", cross)
def blocks_by_true_division(q, k, v):
    i, j = _positions(q, k)
    keep = (i / 3).long() >= (j / 3).long()
    return torch.where(keep, _scores(q, k), -INF).softmax(-1) @ v


@fuses("numbers", cross)
def blocks_of_negative_distances(q, k, v):
    """Floored and truncated quotients of what is below zero, remainders of either sign."""
    i, j = _positions(q, k)
    gap = j - i
    bias = (gap // 3) + torch.div(gap, 3, rounding_mode="trunc") + gap % 3 + torch.fmod(gap, 3) + gap % -4
    return (_scores(q, k) + (bias * 0.2).to(q.dtype)).softmax(-1) @ v


@fuses("numbers", cross)
def blocks_of_negative_floats(q, k, v):
    i, j = _positions(q, k)
    gap = (j - i).float() + 0.5
    bias = (gap // 3) + gap % 3 + torch.fmod(gap, 3.0) + gap.trunc() + gap.round() + gap.ceil()
    return (_scores(q, k) + (bias * 0.2).to(q.dtype)).softmax(-1) @ v


@fuses("numbers", cross)
def arange_of_fractions(q, k, v):
    n, m = q.shape[-2], k.shape[-2]
    i = torch.arange(0, 1, 1 / n, device=q.device)[:n]
    j = torch.linspace(0, 1, m, device=q.device)
    return torch.where(j[None, :] <= i[:, None] + 0.1, _scores(q, k), -INF).softmax(-1) @ v


@fuses("numbers", cross)
def arange_backwards(q, k, v):
    n, m = q.shape[-2], k.shape[-2]
    i, j = torch.arange(n - 1, -1, -1, device=q.device), torch.arange(m, device=q.device).flip(0)
    bias = torch.where(j[None, :] + i[:, None] > 4, 1.0, -1.0)
    return (_scores(q, k) + bias.to(q.dtype)).softmax(-1) @ v


@fuses("numbers", cross)
def triangular_numbers(q, k, v):
    i, j = _positions(q, k)
    return torch.where((j * j <= i * 4) | (j == 0), _scores(q, k), -INF).softmax(-1) @ v


@fuses("numbers", cross)
def powers_of_positions(q, k, v):
    i, j = _positions(q, k)
    bias = torch.pow(0.9, (i - j).abs()) + (j - i) ** 3 * 0.001 + 2 ** (j % 3) * 0.1
    return (_scores(q, k) + bias.to(q.dtype)).softmax(-1) @ v


@fuses("numbers", cross)
def logarithmic_distance_bucket(q, k, v):
    i, j = _positions(q, k)
    bucket = torch.log2((i - j).abs().clamp(min=1)).long()
    return torch.where(bucket <= 2, _scores(q, k), -INF).softmax(-1) @ v


@fuses("numbers", cross)
def window_without_end(q, k, v):
    i, j = _positions(q, k)
    window = 2**31 - 1
    keep = (j <= i) & (i - j < window) & (j > i - window)
    return torch.where(keep, _scores(q, k), -INF).softmax(-1) @ v


# ------------------------------------------------------------------------------------------- fills and infinities
@fuses("numbers", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def fill_by_a_tensor_of_the_dtype(q, k, v, keep):
    fill = torch.tensor(-10000.0, dtype=q.dtype, device=q.device)
    return torch.where(keep, _scores(q, k), fill).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def fill_by_a_moderate_number(q, k, v, keep):
    """Hidden keys keep a little weight."""
    return _scores(q, k).masked_fill(~keep, -4.0).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def fill_scaled_away(q, k, v, keep):
    """The lowest number, multiplied by something small afterwards."""
    scores = (q @ k.mT).masked_fill(~keep, -1e30 if q.dtype != torch.float16 else -6e4)
    return (scores * 1e-29).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def fill_capped(q, k, v, keep):
    scores = _scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (3.0 * torch.tanh(scores / 3.0)).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def fill_clamped(q, k, v, keep):
    return _scores(q, k).masked_fill(~keep, -INF).clamp(min=-2.0).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def fill_in_the_wrong_places_first(q, k, v, keep):
    """Filled, then the fill is replaced: nothing is hidden."""
    scores = _scores(q, k).masked_fill(~keep, -INF)
    return torch.where(scores == -INF, 0.5, scores).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T), lambda d: d.flags(d.B, 1, d.S, d.T, share=0.5)))
def fill_low_then_raised(q, k, v, keep, raised):
    """A bias so high that it brings hidden keys back."""
    scores = _scores(q, k) + torch.where(keep, 0.0, -1e3).to(q.dtype)
    return (scores + torch.where(raised, 1e3, 0.0).to(q.dtype)).softmax(-1) @ v


@either("numbers", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def fill_of_plus_infinity(q, k, v, keep):
    return _scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@either("numbers", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def fill_of_nan(q, k, v, keep):
    return _scores(q, k).masked_fill(~keep, math.nan).softmax(-1) @ v


@either("numbers", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def zero_times_infinity(q, k, v, keep):
    return (_scores(q, k) + (~keep).to(q.dtype) * -INF).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def mask_as_a_logarithm(q, k, v, keep):
    return (_scores(q, k) + keep.to(q.dtype).log()).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)))
def mask_as_a_logarithm_with_a_guard(q, k, v, keep):
    return (_scores(q, k) + torch.log(keep.to(q.dtype) + 1e-3)).softmax(-1) @ v


@fuses("numbers", plus(cross, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.T)))
def rows_without_keys_given_all(q, k, v, keep):
    keep = keep | ~keep.any(dim=-1, keepdim=True)
    return _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


@fuses("numbers", plus(qkv, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.S)))
def diagonal_always_kept(q, k, v, keep):
    keep = keep.clone()
    keep = keep | torch.eye(q.shape[-2], dtype=torch.bool, device=q.device)
    return _scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v


@fuses("numbers", qkv)
def diagonal_excluded(q, k, v):
    """One key never sees itself; a sequence of one would see nothing."""
    eye = torch.eye(q.shape[-2], dtype=torch.bool, device=q.device)
    return _scores(q, k).masked_fill(eye, -5e4).softmax(-1) @ v


@fuses("numbers", qkv)
def temperature_below_zero(q, k, v):
    return F.softmax(q @ k.mT / -2.5, dim=-1) @ v


@fuses("numbers", plus(qkv, lambda d: d.constant(d.H, 1, 1)))
def temperature_of_either_sign(q, k, v, temperature):
    i = torch.arange(q.shape[-2], device=q.device)
    scores = (q @ k.mT) * -temperature
    return scores.masked_fill(i[None, :] > i[:, None], -INF).softmax(-1) @ v


# ------------------------------------------------------------------------------ types wider and narrower than scores
def _seconds(d: Draw):
    """``[B, S]`` times of events, further from zero than float32 counts."""
    return 1_700_000_000 + d.integers(1, 5, d.B, d.S).cumsum(-1)


@fuses("numbers", plus(qkv, _seconds))
def time_between_events_in_float64(q, k, v, time):
    time = time.double() / 4
    between = (time[:, None, :, None] - time[:, None, None, :]).abs()
    return (_scores(q, k) - (between * 0.1).to(q.dtype)).softmax(-1) @ v


@fuses("numbers", plus(qkv, _seconds))
def events_near_in_float64(q, k, v, time):
    between = time.double()[:, None, :, None] - time.double()[:, None, None, :]
    return _scores(q, k).masked_fill(between.abs() > 4.5, -INF).softmax(-1) @ v


@either("numbers", qkv)
def operands_through_bytes(q, k, v):
    q, k = ((x * 3).to(torch.int8).float() for x in (q, k))
    return (q @ k.mT * 0.1).softmax(-1).to(v.dtype) @ v


@either("numbers", qkv)
def operands_through_eight_bit_floats(q, k, v):
    q, k = (x.to(torch.float8_e4m3fn).float() for x in (q, k))
    return (q @ k.mT * 0.1).softmax(-1).to(v.dtype) @ v


@fuses("numbers", plus(qkv, lambda d: d.constant(d.S, d.S)))
def bias_through_eight_bit_floats(q, k, v, bias):
    return (_scores(q, k) + bias.to(torch.float8_e5m2).to(q.dtype)).softmax(-1) @ v


@either("numbers", qkv)
def scores_through_eight_bit_floats(q, k, v):
    return _scores(q, k).to(torch.float8_e5m2).to(v.dtype).softmax(-1) @ v


@either("numbers", qkv)
def weights_through_eight_bit_floats(q, k, v):
    return _scores(q, k).softmax(-1).to(torch.float8_e4m3fn).to(v.dtype) @ v


@fuses("numbers", qkv)
def positions_from_a_half(q, k, v):
    """In integers, that is from zero."""
    i, j = torch.arange(0.5, q.shape[-2], dtype=torch.int64, device=q.device), _positions(q, k)[1]
    return _scores(q, k).masked_fill(2 * j >= 2 * i[:, None] + 1, -9.0).softmax(-1) @ v


@either("numbers", qkv, modes=(INFERENCE,))
def scores_squared_in_place(q, k, v):
    s = _scores(q, k)
    s **= 2
    return s.softmax(-1) @ v


@either("numbers", plus(qkv, lambda d: d.flags_with_an_empty_row(d.B, 1, d.S, d.S)))
def logsumexp_of_low_fills(q, k, v, keep):
    """Weights of rows without a key are zero, but the logarithm of their sum is what the fill says."""
    s = _scores(q, k).masked_fill(~keep, -1e9)
    return s.softmax(-1) * keep @ v, s.logsumexp(-1)
