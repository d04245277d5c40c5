"""The same attention over unusual tensors: shared, expanded, strided, of odd sizes, with gradients for some of them."""

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import INFERENCE, Draw, Sizes, cross, either, fuses, plus, refuses, tokens

INF = float("inf")


def _attend(q, k, v):
    return torch.softmax(q @ k.mT * 0.35, -1) @ v


def _of(features: int, values: int, n: int = 5):
    return lambda d: (d.normal(1, 2, n, features), d.normal(1, 2, n + 2, features), d.normal(1, 2, n + 2, values))


def _without(*places: int):
    """Queries, keys and values of which some want no gradient."""

    def draw(d: Draw) -> tuple:
        return tuple(x.detach() if n in places else x for n, x in enumerate(cross(d)))

    return draw


# ------------------------------------------------------------------------------------------------ who wants gradients
@fuses("tensors", _without(0))
def gradient_of_keys_and_values(q, k, v):
    return _attend(q, k, v)


@fuses("tensors", _without(1))
def gradient_of_queries_and_values(q, k, v):
    return _attend(q, k, v)


@fuses("tensors", _without(0, 1))
def gradient_of_values_alone(q, k, v):
    return _attend(q, k, v)


@fuses("tensors", _without(1, 2))
def gradient_of_queries_alone(q, k, v):
    return _attend(q, k, v)


@fuses("tensors", plus(_without(0, 1, 2), lambda d: d.normal(d.H, d.S, d.T)))
def gradient_of_the_bias_alone(q, k, v, bias):
    return torch.softmax(q @ k.mT * 0.35 + bias, -1) @ v


@fuses("tensors", plus(_without(0, 1, 2), lambda d: d.normal(d.H, 1, 1)))
def gradient_of_the_temperature_alone(q, k, v, temperature):
    return torch.softmax(q @ k.mT / temperature.exp(), -1) @ v


@fuses("tensors", plus(cross, lambda d: d.normal(1, 1, 1, d.T), lambda d: d.normal(d.B, 1, d.S, 1)))
def gradient_of_broadcast_biases(q, k, v, of_keys, of_rows):
    return torch.softmax(q @ k.mT * 0.35 + of_keys * of_rows, -1) @ v


@fuses("tensors", plus(cross, lambda d: d.normal(d.H, d.S, d.T)))
def bias_used_again(q, k, v, bias):
    return torch.softmax(q @ k.mT * 0.35 + bias, -1) @ v, bias.tanh().sum(-1)


@fuses("tensors", plus(cross, lambda d: d.normal(d.H, d.S, d.T)), sites=2)
def bias_of_two_layers_and_a_penalty(q, k, v, bias):
    bias = bias * 2
    out = torch.softmax(q @ k.mT * 0.35 + bias, -1) @ v
    return torch.softmax(out @ k.sin().mT * 0.35 + bias, -1) @ v.cos() + bias.square().mean()


@fuses("tensors", cross)
def result_used_three_times(q, k, v):
    out = _attend(q, k, v)
    return out + out.detach() * out, out.sum(), out[:, 0]


@fuses("tensors", cross)
def result_changed_in_place(q, k, v):
    out = _attend(q, k, v)
    out.mul_(2.0)
    out[..., 0] = 1.0
    return out


# ---------------------------------------------------------------------------------------------------- shared operands
@fuses("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D),))
def one_tensor_for_all(x):
    return _attend(x, x, x)


@fuses("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, d.D)))
def keys_are_values(q, x):
    return _attend(q, x, x)


@fuses("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, 2 * d.D)))
def keys_and_values_overlap(q, x):
    return _attend(q, x[..., :8], x[..., 4:])


@fuses("tensors", lambda d: (d.normal(d.S, 24),))
def tokens_without_a_batch(x):
    return torch.softmax(x @ x.t() / 24**0.5, dim=-1) @ x


@fuses("tensors", lambda d: (d.normal(d.B, 9, 9),))
def square_of_everything(x):
    return torch.bmm(torch.softmax(torch.bmm(x, x), -1), x)


@fuses("tensors", lambda d: (d.normal(d.B, 9, 9),))
def square_transposed(x):
    return torch.bmm(torch.softmax(torch.bmm(x.mT, x), -1), x.mT).mT


# -------------------------------------------------------------------------------------------------- strides and sizes
@either("tensors", lambda d: (d.normal(1, d.H, d.S, d.D), d.normal(d.B, 1, d.T, d.D), d.normal(1, 1, d.T, d.D)))
def operands_broadcast_each_otherwise(q, k, v):
    return _attend(q, k, v)


@either("tensors", lambda d: (d.normal(d.S, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.H, d.T, d.D)))
def operands_of_different_ranks(q, k, v):
    return _attend(q, k, v)


@fuses("tensors", lambda d: (d.normal(d.B, 1, 1, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.D)))
def queries_expanded(q, k, v):
    return _attend(q.expand(-1, k.shape[1], 4, -1), k, v)


@fuses("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, 1, d.D), d.normal(d.B, d.H, d.T, d.D)))
def keys_expanded(q, k, v):
    """All keys of a head are one: the weights are equal."""
    return _attend(q, k.expand(-1, -1, v.shape[-2], -1), v)


@fuses("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, 1, d.D)))
def values_expanded(q, k, v):
    """All values of a head are one: so is the result."""
    return _attend(q, k, v.expand(-1, -1, k.shape[-2], -1))


@fuses("tensors", lambda d: (d.normal(d.B, d.H, d.S, 1), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, 1)))
def features_expanded(q, k, v):
    return _attend(q.expand(-1, -1, -1, k.shape[-1]), k, v.expand(-1, -1, -1, 5))


@either("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, 1, d.D)))
def values_broadcast_by_einsum(q, k, v):
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.35, -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@either("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, 1), d.normal(d.B, d.H, d.T, d.D)))
def features_broadcast_by_einsum(q, k, v):
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.35, -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@fuses("tensors", lambda d: (d.normal(d.B, d.H, 1, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.D)),
       sites=2)  # fmt: skip
def queries_repeated(q, k, v):
    return _attend(q.repeat(1, 1, 4, 1), k, v), _attend(
        q.repeat_interleave(3, dim=-2), k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)
    )


@either(
    "tensors", lambda d: (d.normal(d.B, d.H, 1, d.D), d.normal(d.B, d.H, 1, d.D), d.normal(d.B, d.H, 1, d.D)), sites=3
)
def operands_of_sdpa_expanded(q, k, v):
    """A row, a key and a value, each repeated."""
    many = q.expand(-1, -1, 4, -1), k.expand(-1, -1, 5, -1), v.expand(-1, -1, 5, -1)
    a = F.scaled_dot_product_attention(*many)
    b = F.scaled_dot_product_attention(many[0].float(), many[1].float(), many[2].float())
    return a, b, F.scaled_dot_product_attention(q, k.expand(-1, -1, 5, -1), v.expand(-1, -1, 5, -1), is_causal=True)


@fuses("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, 1)))
def values_of_one_feature(q, k, v):
    return _attend(q, k, v).squeeze(-1)


@fuses("tensors", lambda d: (d.normal(d.B, d.H, d.S, 1), d.normal(d.B, d.H, d.T, 1), d.normal(d.B, d.H, d.T, d.D)))
def keys_of_one_feature(q, k, v):
    return _attend(q, k, v)


@fuses("tensors", lambda d: (d.normal(d.B, d.H, 2 * d.S, d.D), *(d.normal(d.B, d.H, 3 * d.T, 2 * d.D) for _ in "kv")))
def every_second_element(q, k, v):
    return _attend(q[:, :, ::2], k[:, :, ::3, ::2], v[:, :, 1::3, 1::2])


@fuses("tensors", cross, sites=2)
def reversed_along_keys(q, k, v):
    return _attend(q.flip(-1), k.flip(-1), v) + _attend(q, k.flip(-2), v.flip(-2)) * 0


for _features, _values in ((20, 20), (72, 72), (80, 80), (96, 64), (112, 112), (160, 32), (3, 7)):

    def _odd(q, k, v):
        i = torch.arange(q.shape[-2], device=q.device)
        keep = torch.arange(k.shape[-2], device=q.device)[None, :] <= i[:, None]
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -INF).softmax(-1) @ v

    _odd.__name__ = f"head_size_{_features}_{_values}"
    fuses("tensors", _of(_features, _values))(_odd)


@either("tensors", lambda d: (d.normal(d.B, d.H, 0, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.D)),
        static_only=True)  # fmt: skip
def no_queries(q, k, v):
    return _attend(q, k, v)


@either("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, 0, d.D), d.normal(d.B, d.H, 0, d.D)),
        static_only=True)  # fmt: skip
def no_keys(q, k, v):
    return _attend(q, k, v)


@either("tensors", lambda d: tuple(d.normal(0, d.H, d.S, d.D) for _ in "qkv"), static_only=True)
def no_batch(q, k, v):
    return _attend(q, k, v)


@either("tensors", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, 1, d.D), d.normal(d.B, d.H, 1, d.D)))
def one_key(q, k, v):
    return _attend(q, k, v)


@either("tensors", lambda d: tuple(d.normal(1, 1, 1, d.D) for _ in "qkv"))
def one_of_everything(q, k, v):
    return _attend(q, k, v)


@fuses(
    "tensors", lambda d: (d.normal(2, 3, 2, 2, d.S, d.D), d.normal(2, 3, 2, 2, d.T, d.D), d.normal(2, 3, 2, 2, d.T, 5))
)
def six_dimensions(q, k, v):
    return _attend(q, k, v)


@either(
    "tensors",
    lambda d: (d.normal(2, 3, 1, 2, 2, d.S, d.D), d.normal(1, 3, 2, 1, 2, d.T, d.D), d.normal(2, 1, 2, 2, 2, d.T, 5)),
)
def five_leading_axes_broadcast(q, k, v):
    return _attend(q, k, v)


# ----------------------------------------------------------------------------------------------- modes around the call
@fuses("tensors", cross)
def no_gradient_around_all(q, k, v):
    with torch.no_grad():
        out = _attend(q, k, v)
    return out + q.sum()


@fuses("tensors", cross, modes=(INFERENCE,))
def inference_mode_outside(q, k, v):
    return _attend(q, k, v)


@either("tensors", cross)
def gradient_stopped_at_the_scores(q, k, v):
    with torch.no_grad():
        scores = q @ k.mT * 0.35
    return scores.softmax(-1) @ v


@either("tensors", cross)
def gradient_stopped_at_the_maximum_only(q, k, v):
    s = q @ k.mT * 0.35
    with torch.no_grad():
        top = s.amax(-1, keepdim=True)
    p = (s - top).exp()
    return (p @ v) / p.sum(-1, keepdim=True)


@fuses("tensors", tokens)
class AutocastAroundProjections(nn.Module):
    """Projections in bfloat16, softmax in float32, as autocast wants it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.projection, self.heads = nn.Linear(width, 3 * width), sizes.heads

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            q, k, v = self.projection(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            out = F.softmax(q @ k.mT * 0.35, dim=-1) @ v
        return out.float()


@either("tensors", cross)
def autocast_switched_off_for_scores(q, k, v):
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        with torch.autocast(q.device.type, enabled=False):
            scores = q.float() @ k.float().mT * 0.35
        return (scores.softmax(-1) @ v).float()


@fuses("tensors", cross)
def vectorised_over_heads(q, k, v):
    return torch.func.vmap(_attend, in_dims=1, out_dims=1)(q, k, v)


@either("tensors", cross, modes=(INFERENCE,))
def gradient_inside(q, k, v):
    return torch.func.grad(lambda x: _attend(x, k, v).square().sum())(q)


@either("tensors", cross, modes=(INFERENCE,), fullgraph=False)
def derivative_along_a_direction(q, k, v):
    return torch.func.jvp(lambda x: _attend(x, k, v), (q,), (q.cos(),))


@fuses("tensors", cross)
def values_in_another_type(q, k, v):
    return (torch.softmax(q @ k.mT * 0.35, -1).double() @ v.double()).to(q.dtype)


@fuses("tensors", cross)
def queries_in_another_type(q, k, v):
    return torch.softmax(q.double() @ k.double().mT * 0.35, -1).to(v.dtype) @ v


@fuses("tensors", cross)
def softmax_in_a_wider_type(q, k, v):
    return torch.softmax(q @ k.mT * 0.35, -1, dtype=torch.float64).to(v.dtype) @ v


@either("tensors", cross)
def weights_in_a_narrower_type(q, k, v):
    return torch.softmax(q @ k.mT * 0.35, -1).to(torch.bfloat16).to(v.dtype) @ v


@either("tensors", cross)
def scores_in_a_narrower_type(q, k, v):
    """Nothing but rounding happens to the scores on purpose."""
    return torch.softmax((q @ k.mT * 0.35).to(torch.bfloat16).float(), -1).to(v.dtype) @ v


@either("tensors", cross)
def scores_as_integers(q, k, v):
    return torch.softmax((q @ k.mT * 3).long().to(q.dtype), -1) @ v


@refuses(cross)
def scores_rounded(q, k, v):
    return torch.softmax((q @ k.mT * 3).round(), -1) @ v
