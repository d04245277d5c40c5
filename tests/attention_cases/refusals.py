"""What looks like attention and is not, and forms where a careless rewrite is wrong."""

import torch
import torch.nn.functional as F
from torch import nn

from attention_cases.case import INFERENCE, Sizes, cross, either, plus, qkv, refuses, tokens

INF = float("inf")


def _scores(q, k):
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


@refuses()
def softmax_over_queries(q, k, v):
    return F.softmax(_scores(q, k), dim=-2) @ v


@refuses()
def softmax_over_heads(q, k, v):
    return F.softmax(_scores(q, k), dim=1) @ v


@refuses()
def softmax_over_batch(q, k, v):
    return F.softmax(_scores(q, k), dim=0) @ v


@refuses()
def weights_transposed_before_values(q, k, v):
    return F.softmax(_scores(q, k), dim=-1).transpose(-1, -2) @ v


@refuses()
def weights_transposed_by_einsum(q, k, v):
    return torch.einsum("bhqk,bhqd->bhkd", F.softmax(_scores(q, k), dim=-1), v)


@refuses(cross)
def weights_returned(q, k, v):
    weights = F.softmax(_scores(q, k), dim=-1)
    return weights @ v, weights


@refuses(cross)
def weights_averaged_and_returned(q, k, v):
    weights = F.softmax(_scores(q, k), dim=-1)
    return weights @ v, weights.mean(dim=1)


@refuses(cross)
def weights_summed_over_queries(q, k, v):
    """Key importance, as cache eviction policies collect it."""
    weights = F.softmax(_scores(q, k), dim=-1)
    return weights @ v, weights.sum(dim=-2)


@refuses(cross)
def weights_entropy_returned(q, k, v):
    weights = F.softmax(_scores(q, k), dim=-1)
    return weights @ v, -(weights * (weights + 1e-9).log()).sum(-1).mean()


@refuses(cross)
def raw_scores_returned(q, k, v):
    scores = _scores(q, k)
    return F.softmax(scores, dim=-1) @ v, scores


@refuses(cross)
def masked_scores_returned(q, k, v):
    scores = torch.tanh(_scores(q, k))
    return F.softmax(scores * 2.0, dim=-1) @ v, scores.amax(-1)


@refuses(plus(cross, lambda d: d.normal(d.H, d.H)))
def talking_heads_before_softmax(q, k, v, mix):
    scores = torch.einsum("bhqk,gh->bgqk", _scores(q, k), mix)
    return F.softmax(scores, dim=-1) @ v


@refuses(plus(cross, lambda d: d.normal(d.H, d.H)))
def talking_heads_after_softmax(q, k, v, mix):
    weights = torch.einsum("bhqk,gh->bgqk", F.softmax(_scores(q, k), dim=-1), mix)
    return weights @ v


@refuses(cross)
class TalkingHeadsByConvolution(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.mix = nn.Conv2d(sizes.heads, sizes.heads, kernel_size=1)

    def forward(self, q, k, v):
        return F.softmax(self.mix(_scores(q, k)), dim=-1) @ v


@refuses(cross)
def top_k_scores_only(q, k, v):
    scores = _scores(q, k)
    least = scores.topk(3, dim=-1).values[..., -1:]
    return F.softmax(scores.masked_fill(scores < least, -INF), dim=-1) @ v


@refuses(cross)
def largest_score_removed(q, k, v):
    scores = _scores(q, k)
    return F.softmax(scores.scatter(-1, scores.argmax(-1, keepdim=True), -INF), dim=-1) @ v


@refuses(cross)
def scores_layer_normed(q, k, v):
    scores = _scores(q, k)
    return F.softmax(F.layer_norm(scores, scores.shape[-1:]), dim=-1) @ v


@refuses(cross)
def scores_standardised(q, k, v):
    scores = _scores(q, k)
    return F.softmax((scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True), dim=-1) @ v


@refuses(cross)
def scores_accumulated_over_keys(q, k, v):
    return F.softmax(_scores(q, k).cumsum(-1), dim=-1) @ v


@refuses(cross)
def scores_shifted_along_keys(q, k, v):
    return F.softmax(_scores(q, k).roll(1, dims=-1), dim=-1) @ v


@refuses(qkv)
def scores_plus_their_transpose(q, k, v):
    scores = _scores(q, k)
    return F.softmax(scores + scores.transpose(-1, -2), dim=-1) @ v


@refuses(cross)
def scores_sorted(q, k, v):
    return F.softmax(_scores(q, k).sort(dim=-1).values, dim=-1) @ v


@refuses(cross)
def softmax_over_two_axes(q, k, v):
    scores = _scores(q, k)
    return F.softmax(scores.flatten(-2), dim=-1).view_as(scores) @ v


@refuses(plus(cross, lambda d: d.normal(d.S, d.T)), random=True)
def gumbel_softmax(q, k, v, bias):
    return F.gumbel_softmax(_scores(q, k) + bias, tau=1.0, dim=-1) @ v


@refuses(cross, random=True)
def noise_added_to_scores(q, k, v):
    scores = _scores(q, k)
    return F.softmax(scores + 0.1 * torch.randn_like(scores), dim=-1) @ v


@refuses(cross)
def softmax_and_argmax_rows(q, k, v):
    weights = F.softmax(_scores(q, k), dim=-1)
    return torch.where(weights == weights.amax(-1, keepdim=True), weights, 0.0) @ v


@refuses(cross)
def weights_squared(q, k, v):
    return F.softmax(_scores(q, k), dim=-1) ** 2 @ v


@refuses(cross)
def weights_renormalised_after_threshold(q, k, v):
    weights = F.softmax(_scores(q, k), dim=-1)
    weights = torch.where(weights > 0.1, weights, torch.zeros_like(weights))
    return (weights / (weights.sum(-1, keepdim=True) + 1e-9)) @ v


@refuses(cross, fullgraph=False)
def scores_decide_the_branch(q, k, v):
    scores = _scores(q, k)
    if scores.max() > 0:
        scores = scores * 0.5
    return F.softmax(scores, dim=-1) @ v


@refuses(qkv)
def linear_attention(q, k, v):
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-2, -1) @ v)


@refuses(tokens)
class ClassifierOverEmbeddings(nn.Module):
    """Soft tokens: a distribution over classes, then the mean of their embeddings."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.classify = nn.Linear(sizes.heads * sizes.features, 11)
        self.embeddings = nn.Parameter(torch.randn(11, 5))

    def forward(self, x):
        return F.softmax(self.classify(x), dim=-1) @ self.embeddings


@refuses(tokens)
class MixtureOfExpertsGate(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.heads * sizes.features, 3)
        self.experts = nn.ModuleList([nn.Linear(sizes.heads * sizes.features, 4) for _ in range(3)])

    def forward(self, x):
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (F.softmax(self.gate(x), dim=-1).unsqueeze(-2) @ outputs).squeeze(-2)


@refuses(cross)
def sigmoid_attention(q, k, v):
    return torch.sigmoid(_scores(q, k)) @ v


@refuses(cross)
def relu_attention(q, k, v):
    return (torch.relu(_scores(q, k)) / k.shape[-2]) @ v


@refuses(cross)
def exp_divided_by_sum_over_queries(q, k, v):
    weights = torch.exp(_scores(q, k))
    return (weights / weights.sum(dim=-2, keepdim=True)) @ v


@refuses(cross)
def exp_divided_by_sum_of_others(q, k, v):
    """The sum is over other numbers than those that it divides."""
    scores = _scores(q, k)
    return (torch.exp(scores) / torch.exp(0.5 * scores).sum(-1, keepdim=True)) @ v


# right only if done with care; leaving them alone is fine


@either("trap", plus(cross, lambda d: d.constant(d.B, 1, d.S, d.T)), mutates=True)
def mask_overwritten_after_use(q, k, v, mask):
    scores = _scores(q, k) + mask
    mask.zero_()
    return F.softmax(scores, dim=-1) @ v


@either(
    "trap",
    lambda d: (d.constant(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.D)),
    mutates=True,
    modes=(INFERENCE,),
)
def queries_overwritten_after_scores(q, k, v):
    scores = q @ k.mT * 0.35
    q.fill_(1.0)
    return F.softmax(scores, dim=-1) @ v + q.mean()


@either(
    "trap",
    lambda d: (d.normal(d.B, d.H, d.S, d.D), d.constant(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.S, d.D)),
    mutates=True,
    modes=(INFERENCE,),
)
def cache_shifted_between_scores_and_values(q, cache, v):
    weights = F.softmax(q @ cache.mT * 0.35, dim=-1)
    cache.copy_(cache.roll(1, dims=-2))
    return weights @ (v + cache)


@either("trap", cross)
def scores_detached(q, k, v):
    return F.softmax(_scores(q, k).detach(), dim=-1) @ v


@either("trap", cross)
def weights_without_gradient(q, k, v):
    with torch.no_grad():
        weights = F.softmax(_scores(q, k), dim=-1)
    return weights @ v


@either("trap", cross)
def keys_detached(q, k, v):
    return F.softmax(_scores(q, k.detach()), dim=-1) @ v


@either("trap", cross)
def weights_detached_for_values(q, k, v):
    weights = F.softmax(_scores(q, k), dim=-1)
    return weights.detach() @ v + 0.0 * q.sum()


@either("trap", plus(cross, lambda d: d.normal(d.B, d.H, d.T, 3)), sites=2)
def weights_used_for_two_values(q, k, v, coordinates):
    weights = F.softmax(_scores(q, k), dim=-1)
    return weights @ v, weights @ coordinates


@either("trap", plus(cross, lambda d: d.normal(d.B, d.H, d.S, d.T)))
def weights_times_a_gate(q, k, v, gate):
    return (F.softmax(_scores(q, k), dim=-1) * torch.sigmoid(gate)) @ v


@either("trap", cross)
def heads_summed_by_the_values(q, k, v):
    return torch.einsum("bhqk,bhkd->bqd", F.softmax(_scores(q, k), dim=-1), v)


@either("trap", cross)
def first_keys_only(q, k, v):
    return F.softmax(_scores(q, k)[..., :4], dim=-1) @ v[..., :4, :]


@either("trap", cross)
def weights_of_first_keys_only(q, k, v):
    return F.softmax(_scores(q, k), dim=-1)[..., :4] @ v[..., :4, :]


@either("trap", cross)
def last_query_only(q, k, v):
    return F.softmax(_scores(q, k), dim=-1)[..., -1:, :] @ v


@either("trap", cross)
def score_depends_on_the_values(q, k, v):
    return F.softmax(_scores(q, k) + v.mean(-1)[..., None, :], dim=-1) @ v


@either("trap", cross, sites=2)
def scores_used_twice(q, k, v):
    scores = _scores(q, k)
    return F.softmax(scores, dim=-1) @ v + F.softmax(2.0 * scores, dim=-1) @ v


@either("trap", lambda d: (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.S, d.D)))
def queries_are_keys_and_values(x, y):
    return F.softmax(x @ x.mT * 0.35, dim=-1) @ x + y


@either("trap", cross)
def scores_as_elementwise_product(q, k, v):
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
    return F.softmax(scores * 0.35, dim=-1) @ v


@either("trap", cross)
def weights_nan_to_one(q, k, v):
    mask = torch.arange(q.shape[-2], device=q.device)[:, None] == 2
    weights = F.softmax(_scores(q, k).masked_fill(mask, -INF), dim=-1)
    return torch.nan_to_num(weights, nan=1.0) @ v


@either("trap", cross)
def scores_divided_by_zero(q, k, v):
    """``0 * inf`` and infinities among the scores: NaN where eager has NaN."""
    columns = torch.arange(k.shape[-2], device=q.device, dtype=q.dtype)
    return F.softmax(_scores(q, k) / columns, dim=-1) @ v


@refuses(plus(cross, lambda d: d.flags_with_an_empty_row(d.S, d.T), lambda d: d.normal(1, 1)))
def talking_heads_of_one_masked_head(q, k, v, keep, mix):
    """The second product would have masked scores for keys."""
    scores = (_scores(q, k)[:, :1]).masked_fill(~keep, float("-inf"))
    return torch.einsum("ahqk,hg->agqk", scores, mix).softmax(-1) @ v[:, :1]
