"""Softmaxes that are no attention, products that look like one, and attention that is told from them by little."""

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import INFERENCE, Draw, Sizes, cross, either, fuses, plus, qkv, refuses, tokens

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.3


def _pair(d: Draw) -> tuple:
    return d.normal(d.B * d.S, d.D), d.normal(d.B * d.S, d.D)


# ------------------------------------------------------------------------------------------------ other softmaxes
@refuses(tokens)
class ExpertsMixedByRouting(nn.Module):
    """Every expert runs; the router's softmax weighs their results."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.router, self.experts = nn.Linear(width, 4), nn.Parameter(torch.randn(4, width, width) * 0.1)

    def forward(self, x):
        gates = torch.softmax(self.router(x), dim=-1)
        results = torch.einsum("bsw,ewv->bsev", x, self.experts)
        return torch.matmul(gates.unsqueeze(-2), results).squeeze(-2)


@refuses(tokens)
class ExpertsOfTheLargestTwo(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.router, self.experts = nn.Linear(width, 4, bias=False), nn.Parameter(torch.randn(4, width) * 0.1)

    def forward(self, x):
        top = torch.topk(torch.softmax(self.router(x), dim=-1), 2, dim=-1)
        return (top.values / top.values.sum(-1, keepdim=True)).unsqueeze(-2) @ self.experts[top.indices]


@refuses(tokens)
class SoftMixtureOfExperts(nn.Module):
    """Dispatch over tokens and combination over slots of one product, with an expert between."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.heads * sizes.features
        self.slots, self.expert = nn.Parameter(torch.randn(width, 5)), nn.Linear(width, width)

    def forward(self, x):
        logits = x @ self.slots * 0.1
        dispatch, combine = logits.softmax(dim=1), logits.softmax(dim=2)
        return combine @ self.expert(dispatch.transpose(1, 2) @ x)


@refuses(_pair)
def contrastive_loss_of_clip(image, text):
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = image @ text.t() * 3.0
    labels = torch.arange(logits.shape[0])
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


@refuses(_pair)
def contrastive_loss_by_hand(a, b):
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT / 0.5
    return -(torch.softmax(logits, dim=-1).diagonal() + 1e-6).log().mean()


@refuses(_pair)
def soft_labels_of_distillation(a, b):
    """A divergence of two softmaxes of products."""
    teacher = torch.softmax(a @ b.t() / 4.0, dim=-1)
    student = torch.log_softmax(b @ a.t(), dim=-1)
    return (teacher * (teacher.log() - student)).sum(-1).mean()


@refuses(_pair)
def assignment_of_sinkhorn(a, b):
    p = torch.exp(a @ b.t() * 0.3)
    for _ in range(2):
        p = p / p.sum(0, keepdim=True)
        p = p / p.sum(1, keepdim=True)
    return p @ b


@refuses(lambda d: (d.normal(d.B, d.S, 5), d.normal(5, 5)))
def forward_scores_of_a_crf(emissions, transitions):
    alpha = emissions[:, 0]
    for i in range(1, 4):
        alpha = torch.logsumexp(alpha.unsqueeze(2) + transitions, dim=1) + emissions[:, i]
    return torch.logsumexp(alpha, dim=1)


@refuses(lambda d: (d.normal(d.B, d.H, d.D), d.normal(d.B, d.S, d.D)))
def soft_argmax_of_heat_maps(keypoints, pixels):
    """The values are coordinates that no model computes: still a weighted mean, but of no keys' values."""
    heat = torch.softmax((keypoints @ pixels.mT).cumsum(-1), dim=-1)
    return (heat * torch.arange(pixels.shape[1], dtype=heat.dtype)).sum(-1)


@fuses("lookalikes", lambda d: (d.normal(d.B, d.H, d.D), d.normal(d.B, d.S, d.D), d.normal(d.B, d.S, 2)))
def soft_correspondence_of_points(source, target, points):
    """Features of two point clouds matched, the other's points averaged: attention by another name."""
    return torch.softmax(source @ target.mT / 0.7 - target.square().sum(-1).unsqueeze(1), dim=-1) @ points


@fuses("lookalikes", lambda d: (d.normal(d.S, d.D), d.normal(d.T, d.D), d.normal(d.T, 3)))
def nearest_neighbours_softened(x, bank, labels):
    """A softmax over a memory bank, as in soft nearest neighbours."""
    similarity = F.normalize(x, dim=-1) @ F.normalize(bank, dim=-1).T
    return (similarity / 0.2).softmax(dim=-1) @ labels


@fuses("lookalikes", lambda d: (d.normal(d.S, d.D), d.normal(d.T, d.D), d.constant(3, d.T)))
def kernel_regression_of_nadaraya_and_watson(x, samples, targets):
    distances = (x[:, None] - samples[None]).pow(2).sum(-1) * 0.0
    weights = torch.softmax(x @ samples.T - distances, dim=1)
    return weights @ targets.T


@fuses("lookalikes", lambda d: (d.normal(d.B, d.D, 4, 3), d.normal(d.B, d.D, 4, 3), d.normal(d.B, d.E, 4, 3)))
def non_local_block(q, k, v):
    """Every pixel attends to every pixel; channels first throughout."""
    theta, phi, g = q.flatten(2).permute(0, 2, 1), k.flatten(2), v.flatten(2).permute(0, 2, 1)
    return torch.matmul(F.softmax(torch.matmul(theta, phi), dim=-1), g).permute(0, 2, 1).reshape(*v.shape[:2], 4, 3)


# ------------------------------------------------------------------------------------------------ linear attention
@refuses(cross)
def softmax_of_features_and_of_keys(q, k, v):
    """Efficient attention: two softmaxes, of queries over features and of keys over tokens."""
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v)


@refuses(plus(cross, lambda d: d.constant(d.D, d.D)))
def random_features_of_performer(q, k, v, projection):
    feature = lambda x: torch.exp(x @ projection * 0.3 - (x * x).sum(-1, keepdim=True) * 0.05)
    q, k = feature(q), feature(k)
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1))


@refuses(plus(cross, lambda d: d.constant(d.D, d.D)))
def random_features_multiplied_in_the_other_order(q, k, v, projection):
    """Rows of a product that sum to one, without a softmax."""
    q, k = (torch.exp(x @ projection * 0.3) for x in (q, k))
    weights = q @ k.mT
    return weights / weights.sum(-1, keepdim=True) @ v


@fuses("lookalikes", plus(cross, lambda d: d.normal(3, d.T)))
def keys_projected_after_the_softmax(q, k, v, mix):
    return _scores(q, k).softmax(-1) @ mix.mT @ (mix @ v)


@fuses("lookalikes", plus(cross, lambda d: d.normal(3, d.T), lambda d: d.normal(3, d.T)))
def linformer(q, k, v, e, f):
    """Keys and values shortened by a matrix before attention."""
    k, v = (torch.einsum("bhnd,kn->bhkd", x, w) for x, w in ((k, e), (v, f)))
    return torch.einsum("bhnk,bhkd->bhnd", (torch.einsum("bhnd,bhkd->bhnk", q, k) * 0.3).softmax(dim=-1), v)


@either("lookalikes", cross, sites=1)
def nystrom_three_softmaxes(q, k, v):
    """The first one meets values; the middle one is inverted, the last one squared."""
    ql, kl = q[:, :, :6].unflatten(2, (2, -1)).mean(3), k[:, :, :6].unflatten(2, (2, -1)).mean(3)
    first, middle, last = (torch.softmax(_scores(a, b), -1) for a, b in ((q, kl), (ql, kl), (ql, k)))
    inverse = torch.linalg.inv(middle.float() + torch.eye(2)).to(q.dtype)
    return first @ inverse @ last.square() @ v


@refuses(cross, modes=(INFERENCE,))
def hard_attention_one_hot(q, k, v):
    return F.one_hot(_scores(q, k).argmax(-1), k.shape[-2]).to(v.dtype) @ v


@refuses(cross)
def softmax_without_its_own_sum(q, k, v):
    """Divided by the sum of the row before."""
    p = torch.exp(_scores(q, k))
    return p / p.sum(-1, keepdim=True).roll(1, -2) @ v


@refuses(cross)
def exponentials_of_a_softmax(q, k, v):
    p = _scores(q, k).softmax(-1).exp()
    return p @ v


@refuses(qkv)
def softmax_reversed_along_keys(q, k, v):
    return _scores(q, k).softmax(-1).flip(-1) @ v


@refuses(qkv)
def softmax_rolled_along_rows(q, k, v):
    return _scores(q, k).softmax(-1).roll(1, -1) @ v


@refuses(qkv)
def softmax_transposed_to_average_queries(q, k, v):
    """Each key collects the values of the queries that look at it."""
    return torch.einsum("bhqk,bhqd->bhkd", _scores(q, k).softmax(-1), v)


@refuses(qkv)
def two_softmaxes_multiplied(q, k, v):
    s = _scores(q, k)
    return (s.softmax(-1) * s.softmax(-2)) @ v


@refuses(qkv)
def sparse_by_the_mean(q, k, v):
    """Rows lose the weights below the row's mean, and are not normalised again."""
    p = _scores(q, k).softmax(-1)
    return torch.where(p > p.mean(-1, keepdim=True), p, 0.0) @ v


@refuses(qkv)
def scores_standardised_per_row(q, k, v):
    s = _scores(q, k)
    return torch.softmax((s - s.mean(-1, keepdim=True)) / (s.std(-1, keepdim=True) + 1e-5), -1) @ v


@either("lookalikes", qkv)
def scores_of_the_middle_removed(q, k, v):
    """Shifted by the row's mean only, which no softmax sees."""
    s = _scores(q, k)
    return torch.softmax(s - s.mean(-1, keepdim=True), -1) @ v


@refuses(qkv)
def scores_averaged_over_heads(q, k, v):
    return torch.softmax(_scores(q, k).mean(1, keepdim=True), -1) @ v


@refuses(qkv)
def scores_convolved(q, k, v):
    return torch.softmax(F.avg_pool2d(_scores(q, k), 3, 1, 1), -1) @ v


@either("lookalikes", qkv, sites=1)
def residual_attention_of_the_layer_before(q, k, v):
    """RealFormer: the scores go on to the next layer, which may take them as a bias."""
    first = _scores(q, k)
    x = first.softmax(-1) @ v
    second = _scores(x, k) + first
    return second.softmax(-1) @ v


@refuses(qkv)
def cosine_of_weights(q, k, v):
    return F.normalize(_scores(q, k).softmax(-1), dim=-1) @ v


@refuses(qkv)
def memory_with_two_reads(q, k, v):
    """The second read is of the weights themselves."""
    p = _scores(q, k).softmax(-1)
    return p @ (p.mT @ v)


@either("lookalikes", qkv)
def gradient_reversed(q, k, v):
    p = _scores(q, k).softmax(-1)
    return (p + (p.detach() - p)) @ v
