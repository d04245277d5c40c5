"""What surrounds attention: transforms, graph breaks, gradient modes, and masks and numbers of every unusual kind."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_cases.case import (
    INFERENCE,
    TRAINING,
    Draw,
    Sizes,
    cross,
    either,
    fuses,
    grouped,
    plus,
    qkv,
    refuses,
    tokens,
)

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.3


def _attend(q, k, v):
    return _scores(q, k).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ around the call
@either("circumstances", cross, fullgraph=False)
def graph_break_between_scores_and_softmax(q, k, v):
    s = _scores(q, k)
    torch._dynamo.graph_break()
    return s.softmax(-1) @ v


@fuses("circumstances", cross, sites=2, fullgraph=False)
def graph_break_between_two_layers(q, k, v):
    x = _attend(q, k, v)
    torch._dynamo.graph_break()
    return _attend(q, k, v + x.sum())


@either("circumstances", cross, sites=2, fullgraph=False)
def number_read_between_two_layers(q, k, v):
    x = _attend(q, k, v)
    rate = 1.0 if float(x.detach().sum()) > 0 else 2.0
    return _attend(q * rate, k, v)


@fuses("circumstances", cross, sites=3)
def loop_over_layers(q, k, v):
    for scale in (0.2, 0.3, 0.4):
        q = q + torch.softmax(q @ k.mT * scale, -1) @ k
    return q + v.sum()


@fuses("circumstances", cross, sites=2)
def heads_in_a_list(q, k, v):
    """One head after the other, then concatenated."""
    parts = [_attend(q[:, h], k[:, h], v[:, h]) for h in (0, 1)]
    return torch.cat(parts, dim=-1)


@fuses("circumstances", cross, sites=2)
def chunks_of_queries(q, k, v):
    """Sliced attention, which saves memory."""
    return torch.cat([_attend(part, k, v) for part in q.chunk(2, dim=-2)], dim=-2)


@either("circumstances", cross, sites=2)
def keys_in_two_chunks_with_running_maximum(q, k, v):
    """Memory-efficient attention by hand: sums of exponentials merged by their maxima."""
    total, weight, top = 0.0, 0.0, None
    for kc, vc in zip(k.chunk(2, dim=-2), v.chunk(2, dim=-2), strict=True):
        s = _scores(q, kc)
        m = s.amax(-1, keepdim=True).detach()
        new = m if top is None else torch.maximum(top, m)
        fade = 1.0 if top is None else torch.exp(top - new)
        p = torch.exp(s - new)
        total, weight, top = total * fade + p @ vc, weight * fade + p.sum(-1, keepdim=True), new
    return total / weight


@fuses("circumstances", cross, modes=(INFERENCE,))
def under_no_grad_inside(q, k, v):
    with torch.no_grad():
        return _attend(q, k, v)


@fuses("circumstances", cross)
def with_gradients_switched_on(q, k, v):
    with torch.enable_grad():
        return _attend(q, k, v)


@either("circumstances", cross)
def keys_without_gradient_in_the_middle(q, k, v):
    with torch.no_grad():
        kd = k * 2.0
    return torch.softmax(q @ kd.mT * 0.3, -1) @ v


@fuses("circumstances", cross, sites=2)
def target_network_beside_the_student(q, k, v):
    with torch.no_grad():
        target = _attend(q, k, v)
    return (_attend(q, k, v) - target.detach()).square() + target


@either("circumstances", tokens)
class AutocastWithLinearLayers(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            q, k, v = self.q(x), self.k(x), self.v(x)
            weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 7.0, dim=-1)
            return torch.bmm(weights, v).float()


@fuses("checkpoint", cross, sites=2)
def checkpoint_of_two_layers(q, k, v):
    def two(q, k, v):
        return _attend(_attend(q, k, v[..., : q.shape[-1]]), k, v)

    return checkpoint(two, q, k, v, use_reentrant=False)


@fuses("checkpoint", plus(cross, lambda d: d.flags(d.B, 1, 1, d.T)), sites=1)
def checkpoint_with_a_mask_from_outside(q, k, v, keep):
    bias = torch.where(keep, 0.0, -INF).to(q.dtype)

    def inner(q, k, v):
        return torch.softmax(_scores(q, k) + bias, -1) @ v

    return checkpoint(inner, q, k, v, use_reentrant=False)


@fuses("circumstances", tokens)
class WeightsNormalisedByParametrization(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.project = torch.nn.utils.parametrizations.weight_norm(nn.Linear(width, 3 * width))

    def forward(self, x):
        return _attend(*self.project(x).chunk(3, dim=-1))


@fuses("circumstances", plus(tokens, lambda d: d.normal(3, d.H * d.D, d.H * d.D, scale=0.2)))
def weights_passed_as_arguments(x, w):
    """Functional style: parameters come with the inputs."""
    params = dict(zip("qkv", w, strict=True))
    q, k, v = (F.linear(x, params[name]) for name in "qkv")
    return _attend(q, k, v)


@fuses("circumstances", cross)
def vmap_over_the_batch(q, k, v):
    return torch.vmap(torch.vmap(_attend))(q, k, v)


@either("circumstances", cross, modes=(INFERENCE,), sites=2)
def gradient_and_result(q, k, v):
    gradient, value = torch.func.grad_and_value(lambda x: _attend(x, k, v).sum())(q)
    return gradient + value, _attend(q, k, v)


@either("circumstances", cross, modes=(INFERENCE,))
def transposed_derivative(q, k, v):
    out, pull = torch.func.vjp(lambda a, b: _attend(a, b, v), q, k)
    return pull(out)


@fuses("circumstances", cross)
def result_detached_and_straight_through(q, k, v):
    out = _attend(q, k, v)
    return out + (out.round() - out).detach()


# ------------------------------------------------------------------------------------------------ masks
def _mask(*sizes: str, kind=torch.bool):
    def draw(d: Draw):
        shape = [{"B": d.B, "H": d.H, "S": d.S, "T": d.T}.get(s, 1) for s in sizes]
        flags = d.flags(*shape)
        return (flags | (torch.arange(shape[-1]) == 0) if shape[-1] > 1 else torch.ones_like(flags)).to(kind)

    return draw


@fuses("circumstances", plus(cross, _mask("S", "T", kind=torch.uint8)))
def mask_of_bytes(q, k, v, mask):
    return _scores(q, k).masked_fill(mask == 0, -INF).softmax(-1) @ v


@fuses("circumstances", plus(cross, _mask("B", "1", "1", "T", kind=torch.int32)))
def mask_of_int32_inverted_by_subtraction(q, k, v, mask):
    return torch.softmax(_scores(q, k) + (1 - mask).to(q.dtype) * torch.finfo(q.dtype).min, -1) @ v


@fuses("circumstances", plus(cross, _mask("H", "1", "T")))
def mask_per_head_and_key(q, k, v, mask):
    return _scores(q, k).masked_fill(mask.logical_not(), -INF).softmax(-1) @ v


@fuses("circumstances", plus(cross, _mask("B", "H", "S", "1")))
def mask_of_rows_only(q, k, v, mask):
    return _scores(q, k).masked_fill(~mask, -1e4).softmax(-1) @ v


@fuses("circumstances", plus(cross, _mask("B", "T"), _mask("B", "S")))
def mask_of_keys_and_rows_multiplied(q, k, v, of_keys, of_rows):
    mask = of_rows[:, None, :, None].float() * of_keys[:, None, None, :].float()
    return torch.softmax(_scores(q, k) - (1.0 - mask.to(q.dtype)) * 1e4, -1) @ v


@fuses("circumstances", plus(cross, _mask("B", "T")))
def mask_by_einsum(q, k, v, keep):
    pairs = torch.einsum("bi,bj->bij", torch.ones(q.shape[0], q.shape[2], dtype=q.dtype), keep.to(q.dtype))
    return _scores(q, k).masked_fill(pairs.unsqueeze(1) < 0.5, -INF).softmax(-1) @ v


@fuses("circumstances", plus(cross, lambda d: d.integers(1, d.T, d.B)))
def lengths_compared_by_arange(q, k, v, lengths):
    keep = torch.arange(k.shape[2])[None].expand(q.shape[0], -1) < lengths.unsqueeze(1)
    return torch.where(keep[:, None, None], _scores(q, k), -INF).softmax(-1) @ v


@fuses("circumstances", plus(cross, lambda d: d.flags(d.B, d.S, d.T)))
def mask_log_with_a_clamp(q, k, v, keep):
    return torch.softmax(_scores(q, k) + keep.to(q.dtype).clamp(min=1e-6).log().unsqueeze(1), -1) @ v


@fuses("circumstances", plus(cross, lambda d: d.flags_with_an_empty_row(d.S, d.T)))
def empty_rows_then_multiplied(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1)
    return (p * keep) @ v


@fuses("circumstances", plus(cross, lambda d: d.flags_with_an_empty_row(d.S, d.T)))
def empty_rows_where_any(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, -INF).softmax(-1)
    return torch.where(keep.any(-1, keepdim=True), p, 0.0) @ v


@fuses("circumstances", plus(cross, lambda d: d.flags_with_an_empty_row(d.S, d.T)))
def empty_rows_filled_unless_any(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1)
    return p.masked_fill(~keep.any(-1).unsqueeze(-1), 0.0) @ v


@refuses(plus(cross, lambda d: d.flags_with_an_empty_row(d.S, d.T), lambda d: d.flags_with_an_empty_row(d.S, d.T)))
def rows_zeroed_by_another_mask(q, k, v, keep, other):
    p = _scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1)
    return torch.where(other.any(-1, keepdim=True), p, 0.0) @ v


@fuses("circumstances", plus(cross, lambda d: torch.zeros(d.S, d.T, dtype=torch.bool)))
def nothing_may_be_seen(q, k, v, keep):
    return _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


@fuses("circumstances", plus(cross, lambda d: torch.zeros(d.S, d.T, dtype=torch.bool)))
def nothing_may_be_seen_finite(q, k, v, keep):
    return _scores(q, k).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v


@fuses("circumstances", plus(qkv, lambda d: d.integers(1, 3, 1)))
def causal_of_a_shift_in_a_tensor(q, k, v, shift):
    rows = torch.arange(q.shape[2])
    keep = rows[None, :] <= rows[:, None] + shift
    return _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


@fuses("circumstances", qkv)
def causal_by_cumulative_sum(q, k, v):
    keep = torch.eye(q.shape[2]).cumsum(0).bool().T
    return _scores(q, k).masked_fill(~keep.mT, -INF).softmax(-1) @ v


@fuses("circumstances", qkv)
def causal_by_tril_indices(q, k, v):
    n = q.shape[2]
    keep = torch.zeros(n, n, dtype=torch.bool)
    rows, columns = torch.tril_indices(n, n)
    keep[rows, columns] = True
    return _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


@fuses("circumstances", qkv)
def causal_by_comparing_broadcast_lists(q, k, v):
    n = q.shape[2]
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return torch.softmax(_scores(q, k) + torch.where(j > i, -INF, 0.0).to(q.dtype), -1) @ v


@fuses("circumstances", qkv)
def strictly_causal_with_a_first_row(q, k, v):
    """No token sees itself; the first one sees everything."""
    n = q.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool).tril(-1)
    keep = keep | (torch.arange(n) == 0)[:, None]
    return _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ numbers
@fuses("circumstances", lambda d: tuple(x.detach().mul(40).requires_grad_() for x in cross(d)), modes=(INFERENCE,))
def very_large_scores(q, k, v):
    """Rows of one key; what their gradients cancel to is another rounding in kernels that take it from the result."""
    return torch.softmax(q @ k.mT, -1) @ v


@fuses("circumstances", lambda d: tuple(x.detach().mul(1e-4).requires_grad_() for x in cross(d)))
def very_small_scores(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


@fuses("circumstances", cross)
def scale_of_zero(q, k, v):
    return torch.softmax(q @ k.mT * 0.0, -1) @ v


@fuses("circumstances", plus(cross, lambda d: d.normal(d.B, d.H, d.S, d.T, scale=100.0)))
def bias_much_larger_than_scores(q, k, v, bias):
    return torch.softmax(_scores(q, k) + bias, -1) @ v


@fuses("circumstances", cross)
def offset_that_cancels(q, k, v):
    return torch.softmax(_scores(q, k) + 1000.0 - 1000.0, -1) @ v


@either("circumstances", lambda d: (*cross(d)[:2], d.constant(d.B, d.H, d.T, d.E).fill_(INF).requires_grad_()))
def infinite_values(q, k, v):
    return _attend(q, k, v)


def _one_bad(place: int, value: float):
    def draw(d: Draw):
        inputs = [x.detach() for x in cross(d)]
        inputs[place][0, 1, 3, 2] = value
        return tuple(inputs)

    return draw


@fuses("circumstances", _one_bad(0, float("nan")), modes=(INFERENCE,))
def nan_in_the_queries(q, k, v):
    return _attend(q, k, v)


@fuses("circumstances", _one_bad(1, float("nan")), modes=(INFERENCE,))
def nan_in_the_keys(q, k, v):
    return _attend(q, k, v)


@fuses("circumstances", _one_bad(1, INF), modes=(INFERENCE,))
def infinity_in_the_keys(q, k, v):
    return _attend(q, k, v)


@fuses("circumstances", _one_bad(0, -INF), modes=(INFERENCE,))
def infinity_in_the_queries_and_causal(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return _scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ grouped and views
@fuses("circumstances", grouped)
def groups_by_index_select(q, k, v):
    index = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    return _attend(q, k.index_select(1, index), v.index_select(1, index))


@fuses("circumstances", grouped)
def groups_by_stack_and_flatten(q, k, v):
    rate = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x] * rate, dim=2).flatten(1, 2) for x in (k, v))
    return _attend(q, k, v)


@fuses("circumstances", grouped)
def groups_by_advanced_indexing(q, k, v):
    index = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    return _attend(q, k[:, index], v[:, index])


@fuses("circumstances", grouped)
def groups_of_queries_in_the_last_rows(q, k, v):
    """Grouped queries unfolded, grouped rows attended, folded back."""
    b, h, s, f = q.shape
    out = _attend(q.view(b, k.shape[1], -1, f), k, v)
    return out.view(b, h, s, -1)


@fuses("circumstances", grouped, modes=(TRAINING,))
def groups_by_kronecker(q, k, v):
    rate = q.shape[1] // k.shape[1]
    k, v = (x.unsqueeze(2).tile(1, 1, rate, 1, 1).flatten(1, 2) for x in (k, v))
    return _attend(q, k, v)


@refuses(grouped)
def groups_summed_after_the_softmax(q, k, v):
    """Weights of a group's queries are averaged before they meet the values."""
    b, _, s, f = q.shape
    p = (q.view(b, k.shape[1], -1, s, f) @ k.unsqueeze(2).mT).softmax(-1).mean(2)
    return p @ v


@fuses("circumstances", cross)
def scores_by_broadcast_multiplication(q, k, v):
    """No product operator at all for the scores."""
    return torch.softmax((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / math.sqrt(q.shape[-1]), -1) @ v


@fuses("circumstances", cross)
def values_by_broadcast_multiplication(q, k, v):
    p = _scores(q, k).softmax(-1)
    return (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


@fuses("circumstances", cross)
def views_by_unfold_free_reshapes(q, k, v):
    b, h = q.shape[:2]
    q, k, v = (x.reshape(b * h, *x.shape[2:]).unsqueeze(0) for x in (q, k, v))
    return _attend(q, k, v).squeeze(0).unflatten(0, (b, h))
