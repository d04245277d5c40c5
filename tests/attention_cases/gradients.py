"""Gradients at kinks, through sums and shifts that are cut off or learned, and of logarithms beside the result."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_cases.case import TRAINING, Draw, Sizes, fuses, plus, qkv, refuses

ONLY = (TRAINING,)


def _whole_numbers(d: Draw):
    """Queries and keys of whole numbers, so that many scores lie exactly at a kink."""
    q, k = (d.integers(-1, 2, d.B, d.H, d.S, d.D).to(d.constant(1).dtype).requires_grad_() for _ in range(2))
    return q, k, d.normal(d.B, d.H, d.S, d.D)


def _scores(q, k):
    return q @ k.mT * 0.3


def _normalised(exponentials, total):
    return exponentials / total


# -------------------------------------------------------------------------------------------------------- at kinks
@fuses("gradient", _whole_numbers, modes=ONLY)
def limits_of_clamp_hand_the_gradient_on(q, k, v):
    return (q @ k.mT).clamp(-1, 1).softmax(-1) @ v


@fuses("gradient", _whole_numbers, modes=ONLY)
def limits_of_hardtanh_end_the_gradient(q, k, v):
    return F.hardtanh(q @ k.mT).softmax(-1) @ v


@fuses("gradient", _whole_numbers, modes=ONLY)
def root_of_what_relu_leaves(q, k, v):
    return torch.sqrt(torch.relu(q @ k.mT)).softmax(-1) @ v


@fuses("gradient", _whole_numbers, modes=ONLY)
class LimitThatIsLearned(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.least = nn.Parameter(torch.zeros(sizes.heads, 1, 1))

    def forward(self, q, k, v):
        return torch.clamp(q @ k.mT, min=self.least).softmax(-1) @ v


@fuses("gradient", modes=ONLY)
class DistanceClampedFromZeroOn(nn.Module):
    """A bias that starts at its limit."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(sizes.heads))

    def forward(self, q, k, v):
        place = torch.arange(q.shape[-2], device=q.device)
        distance = (place[None] - place[:, None]).abs().to(q.dtype)
        return (_scores(q, k) - (self.gate[:, None, None] + distance - 3).clamp(min=0)).softmax(-1) @ v


@fuses("gradient", plus(qkv, lambda d: d.flags_with_an_empty_row(d.S, d.S)), modes=ONLY)
def empty_rows_clamped_to_the_minimum(q, k, v, keep):
    least = torch.finfo(q.dtype).min
    return torch.clamp(_scores(q, k) + torch.where(keep, 0.0, least).to(q.dtype), min=least).softmax(-1) @ v


@fuses("gradient", plus(qkv, lambda d: d.normal(d.H)), modes=ONLY)
def threshold_that_is_only_compared(q, k, v, least):
    """Its gradient is absent, not zero."""
    s = _scores(q, k)
    return torch.where(s > least[:, None, None], s, s * 0.5).softmax(-1) @ v


@fuses("gradient", plus(qkv, lambda d: d.normal(d.H, 1, 1)), modes=ONLY)
def learned_exponent_of_negative_scores(q, k, v, exponent):
    """A whole number for now, so that only its own gradient is NaN."""
    return _scores(q, k).pow(exponent * 0 + 2).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ sums and shifts
@refuses(modes=ONLY)
def sum_detached(q, k, v):
    e = _scores(q, k).exp()
    return _normalised(e, e.sum(-1, keepdim=True).detach()) @ v


@refuses(modes=ONLY)
def sum_detached_after_the_values(q, k, v):
    e = _scores(q, k).exp()
    return _normalised(e @ v, e.sum(-1, keepdim=True).detach())


@refuses(modes=ONLY)
def logsumexp_detached(q, k, v):
    s = _scores(q, k)
    return (s - s.logsumexp(-1, keepdim=True).detach()).exp() @ v


@refuses(modes=ONLY)
def sum_under_no_grad(q, k, v):
    e = _scores(q, k).exp()
    with torch.no_grad():
        total = e.sum(-1, keepdim=True)
    return _normalised(e, total) @ v


@refuses(modes=ONLY)
def scores_shifted_under_no_grad(q, k, v):
    s = _scores(q, k)
    with torch.no_grad():
        s = s - s.amax(-1, keepdim=True)
    return s.softmax(-1) @ v


@refuses(modes=ONLY)
def scores_converted_under_no_grad(q, k, v):
    s = _scores(q, k)
    with torch.no_grad():
        s = s.double()
    return s.softmax(-1).to(v.dtype) @ v


@refuses(modes=ONLY)
def scores_transposed_under_no_grad(q, k, v):
    """Dynamo's own values claim that such a view wants a gradient."""
    s = _scores(q, k)
    with torch.no_grad():
        t = s.mT
    return t.softmax(-2).mT @ v


@refuses(modes=ONLY)
def one_more_in_the_sum_under_no_grad(q, k, v):
    e = _scores(q, k).exp()
    total = e.sum(-1, keepdim=True)
    with torch.no_grad():
        total = total + 1
    return (e / total) @ v


@refuses(modes=ONLY)
def sum_inverted_under_no_grad(q, k, v):
    e = _scores(q, k).exp()
    total = e.sum(-1, keepdim=True)
    with torch.no_grad():
        inverse = 1.0 / total
    return (e * inverse) @ v


@refuses(plus(qkv, lambda d: d.normal(d.H, 1, 1)), modes=ONLY)
def sink_exponentiated_under_no_grad(q, k, v, sink):
    e = _scores(q, k).exp()
    with torch.no_grad():
        raised = sink.exp()
    return e / (e.sum(-1, keepdim=True) + raised) @ v + sink.mean()


@fuses("gradient", plus(qkv, lambda d: d.normal(d.H)), modes=ONLY)
def temperature_viewed_under_no_grad(q, k, v, temperature):
    with torch.no_grad():
        viewed = temperature[:, None, None]
    return (_scores(q, k) * viewed).softmax(-1) @ v + temperature.mean()


@fuses("gradient", modes=ONLY)
def maximum_under_no_grad(q, k, v):
    s = _scores(q, k)
    with torch.no_grad():
        largest = s.amax(-1, keepdim=True)
    e = (s - largest).exp()
    return _normalised(e, e.sum(-1, keepdim=True)) @ v


@fuses("gradient", modes=ONLY)
class ShiftOfEachHeadLearned(nn.Module):
    """The softmax does not see it, and its gradient is zero, not absent."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(sizes.heads, 1, 1))

    def forward(self, q, k, v):
        return (_scores(q, k) - self.shift).softmax(-1) @ v


@fuses("gradient", plus(qkv, lambda d: d.normal(d.B, d.H, d.S, 1)), modes=ONLY)
def shift_of_each_row_by_hand(q, k, v, shift):
    s = _scores(q, k) - shift
    e = (s - s.amax(-1, keepdim=True)).exp()
    return _normalised(e, e.sum(-1, keepdim=True)) @ v


@refuses(plus(qkv, lambda d: d.normal(d.B, d.H, d.S, 1)), modes=ONLY)
def shift_that_may_leave_no_power(q, k, v, shift):
    e = (_scores(q, k) - shift).exp()
    return _normalised(e, e.sum(-1, keepdim=True)) @ v


@fuses("gradient", plus(qkv, lambda d: d.flags_with_an_empty_row(d.S, d.S)))
def sink_of_zeros_like_the_scores(q, k, v, keep):
    s = _scores(q, k).masked_fill(~keep, -torch.inf)
    return torch.cat([torch.zeros_like(s[..., :1]), s], -1).softmax(-1)[..., 1:] @ v


# -------------------------------------------------------------------------------------- equal values, other gradients
class _Slopes(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.randn(sizes.heads))

    def attend(self, q, k, v):
        place = torch.arange(q.shape[-2], device=q.device)
        return (_scores(q, k) - self.slopes.exp()[:, None, None] * (place[:, None] - place).abs()).softmax(-1) @ v


@fuses("gradient", sites=2, modes=ONLY)
class TeacherAheadOfItsStudent(_Slopes):
    """The same bias is computed twice, at first without gradient."""

    def forward(self, q, k, v):
        with torch.no_grad():
            teacher = self.attend(q, k, v)
        return teacher + self.attend(q, k, v)


@refuses(modes=ONLY)
class BiasThatIsNeverChosen(nn.Module):
    """Its gradient is zero, not absent."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(sizes.heads, 1, 1))

    def forward(self, q, k, v):
        beyond = torch.arange(k.shape[-2], device=q.device) >= k.shape[-2]
        return torch.where(beyond, self.bias, _scores(q, k)).softmax(-1) @ v


# ------------------------------------------------------------------------------------- the logarithm of the row's sum
@fuses("gradient")
def logsumexp_after_the_result(q, k, v):
    s = _scores(q, k)
    return s.softmax(-1) @ v, torch.logsumexp(s, -1).square().mean()


@fuses("gradient")
def logsumexp_in_float32_after_the_result(q, k, v):
    s = _scores(q, k)
    return s.softmax(-1) @ v, s.float().logsumexp(-1, keepdim=True)


@fuses("gradient", modes=ONLY)
def logsumexp_of_a_detached_result(q, k, v):
    s = _scores(q, k)
    return (s.softmax(-1) @ v).detach(), s.logsumexp(-1)


@fuses("gradient", plus(qkv, lambda d: d.normal(d.B, d.H, d.S, 1)))
def logsumexp_ahead_of_a_gate(q, k, v, gate):
    s = _scores(q, k)
    log_sum = s.logsumexp(-1)
    gate = (gate * 2).sigmoid()
    return (s.softmax(-1) * gate) @ v, log_sum


@fuses("gradient")
def logsumexp_subtracted_and_returned(q, k, v):
    s = _scores(q, k)
    log_sum = s.logsumexp(-1, keepdim=True)
    return (s - log_sum).exp() @ v, log_sum


@fuses("gradient", modes=ONLY)
def logsumexp_logged_under_no_grad(q, k, v):
    s = _scores(q, k)
    out = s.softmax(-1) @ v
    with torch.no_grad():
        log_sum = s.logsumexp(-1)
    return out, log_sum


def _frozen_scores(d: Draw):
    q, k, v = qkv(d)
    return q.detach(), k.detach(), v


@refuses(_frozen_scores, modes=ONLY)
def logsumexp_under_no_grad_ahead_of_the_result(q, k, v):
    s = _scores(q, k)
    with torch.no_grad():
        log_sum = s.logsumexp(-1)
    return s.softmax(-1) @ v, log_sum


# ------------------------------------------------------------------------------------------------------ recomputation
@fuses("gradient", modes=ONLY)
class LearnedBiasAndTemperatureRecomputed(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bias = nn.Embedding(63, sizes.heads)
        self.temperature = nn.Parameter(torch.full((sizes.heads, 1, 1), 2.0))

    def forward(self, q, k, v):
        return checkpoint(self.attend, q, k, v, use_reentrant=False)

    def attend(self, q, k, v):
        place = torch.arange(q.shape[-2], device=q.device)
        bias = self.bias(place[:, None] - place + 31).permute(2, 0, 1)
        return (_scores(q, k) * self.temperature.clamp(max=2.0).exp() + bias).softmax(-1) @ v
