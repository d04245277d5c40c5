"""Scores that two softmaxes share, weights that two products share, and maps that nobody looks at."""

import torch
import torch.nn.functional as F

from attention_cases.case import Draw, cross, either, fuses, plus, qkv, refuses

INF = float("inf")


def _scores(q, k):
    return q @ k.mT * 0.3


def _both_sides(d: Draw) -> tuple:
    """Queries and values of one side, keys and values of the other."""
    one = (d.normal(d.B, d.H, d.S, d.D), d.normal(d.B, d.H, d.S, d.E))
    return (*one, d.normal(d.B, d.H, d.T, d.D), d.normal(d.B, d.H, d.T, d.E))


# ------------------------------------------------------------------------------------------------------- scores
@fuses("shared", _both_sides, sites=2)
def each_side_attends_to_the_other(a, a_values, b, b_values):
    """One matrix of scores, read along its rows and along its columns, as matchers of pictures do."""
    scores = torch.einsum("bhid,bhjd->bhij", a * 0.5, b)
    to_b = F.softmax(scores, dim=-1)
    to_a = F.softmax(scores.transpose(-2, -1).contiguous(), dim=-1)
    return torch.einsum("bhij,bhje->bhie", to_b, b_values), torch.einsum("bhji,bhie->bhje", to_a, a_values)


@fuses("shared", plus(_both_sides, lambda d: d.padding(d.B, d.S), lambda d: d.padding(d.B, d.T)), sites=2)
def each_side_hides_padding_of_the_other(a, a_values, b, b_values, a_real, b_real):
    scores = _scores(a, b)
    to_b = scores.masked_fill(~b_real[:, None, None], -1e32).softmax(-1)
    to_a = scores.mT.masked_fill(~a_real[:, None, None], -INF).softmax(-1)
    return to_b @ b_values, to_a @ a_values


@fuses("shared", _both_sides, sites=2)
def columns_without_a_transpose(a, a_values, b, b_values):
    scores = _scores(a, b)
    return scores.softmax(-1) @ b_values, scores.softmax(-2).mT @ a_values


@fuses("shared", cross, sites=2)
def one_matrix_of_scores_at_two_temperatures(q, k, v):
    scores = _scores(q, k)
    return (scores * 2).softmax(-1) @ v - (scores / 2).softmax(-1) @ v


@either("shared", plus(cross, lambda d: d.flags(d.B, 1, d.S, d.T)), sites=2)
def scores_masked_in_place_for_the_second_reader(q, k, v, keep):
    scores = _scores(q, k)
    everywhere = scores.softmax(-1) @ v
    scores.masked_fill_(~keep, -INF)
    return everywhere, scores.softmax(-1) @ v


@refuses(plus(qkv, lambda d: d.normal(d.B, d.H, d.S, d.D)))
def scores_shared_with_weights_of_queries(q, k, v, other):
    """The second softmax runs over the queries: its scores have to be computed, and serve the first one too."""
    scores = _scores(q, k)
    return scores.softmax(-1) @ v, scores.softmax(-2) @ other


# ------------------------------------------------------------------------------------------------------ weights
@fuses("shared", plus(cross, lambda d: d.normal(d.B, d.T, 3)), sites=2)
def one_map_for_features_and_positions(q, k, v, places):
    weights = _scores(q, k).softmax(-1)
    return weights @ v, torch.einsum("bhij,bjc->bhic", weights, places)


@fuses("shared", plus(cross, lambda d: d.flags(d.B, 1, 1, d.T), lambda d: d.normal(d.H)), sites=2)
def one_masked_map_whose_results_are_joined(q, k, v, keep, gain):
    weights = _scores(q, k).masked_fill(~keep, -INF).softmax(-1)
    return torch.cat([weights @ v, (weights * gain[:, None, None]) @ v.tanh()], dim=-1)


@refuses(cross)
def one_map_for_two_values_and_its_mean(q, k, v):
    weights = _scores(q, k).softmax(-1)
    return weights @ v, weights @ v.sin(), weights.mean(1)


@refuses(plus(qkv, lambda d: d.normal(d.B, d.S, d.S, d.E)))
def one_map_for_values_of_keys_and_of_pairs(q, k, v, pairs):
    weights = _scores(q, k).softmax(-1)
    return weights @ v, torch.einsum("bhij,bije->bhie", weights, pairs)


# --------------------------------------------------------------------------------------------------------- maps
@fuses("shared", cross, sites=2)
def maps_of_all_heads_stacked_for_nobody(q, k, v):
    """A layer that returns its maps, in a model that drops them."""
    found, maps = [], []
    for h in range(2):
        weights = F.softmax(_scores(q[:, h], k[:, h]), dim=-1)
        found.append(weights @ v[:, h])
        maps.append(weights)
    maps = torch.stack(maps, dim=2)
    return torch.stack(found, dim=2).mean(dim=2)


@fuses("shared", cross)
def strongest_keys_for_nobody(q, k, v):
    weights = _scores(q, k).softmax(-1)
    strongest = weights.topk(2, dim=-1).indices
    spread = weights.std(-1).chunk(2, dim=0)[0].argmax()
    del strongest, spread
    return weights @ v
