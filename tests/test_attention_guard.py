"""Masks by a large negative number, where kernels can leave out hidden tiles: masks in all rows that keep a key."""

from types import SimpleNamespace

import pytest
import torch
from attention_oracle import differences, double_precision, fresh, run
from torch import fx

from vbcompile.kernels.attention_tiles import analyse_mask
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.score_triton import CapturedPattern
from vbcompile.passes.attention import fuse_attention

CPU, GPU = (SimpleNamespace(target=SimpleNamespace(device_type=name), training=True) for name in ("cpu", "cuda"))
LOWEST = torch.finfo(torch.float32).min
INF = float("inf")


def _padding(length: int) -> torch.Tensor:
    """Left padding: the first rows of the second sequence see no key."""
    return torch.arange(length) >= torch.tensor([[0], [length // 2]])


def _scores(q, k):
    return q @ k.mT * 0.3


def _causal(q, k):
    return torch.arange(k.shape[-2])[None, :] <= torch.arange(q.shape[-2])[:, None]


def added(q, k, v, padding):
    mask = torch.where(_causal(q, k) & padding[:, None, None, :], 0.0, torch.finfo(q.dtype).min)
    for _ in range(2):  # two layers share a mask
        q = torch.softmax(_scores(q, k) + mask, -1) @ v
    return q


def filled(q, k, v, padding):
    hidden = ~(_causal(q, k) & padding[:, None, None, :])
    return _scores(q, k).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


def filled_twice(q, k, v, padding):
    """Two fills that add up to -inf where both hide a key."""
    causal = torch.where(_causal(q, k), 0.0, torch.finfo(q.dtype).min)
    padded = torch.where(padding[:, None, None, :], 0.0, torch.finfo(q.dtype).min)
    return torch.softmax(_scores(q, k) + causal + padded, -1) @ v


def filled_with_both(q, k, v, padding):
    scores = _scores(q, k).masked_fill(~_causal(q, k), -INF)
    return scores.masked_fill(~padding[:, None, None, :], torch.finfo(q.dtype).min).softmax(-1) @ v


def filled_between_capped_scores(q, k, v, padding):
    scores = 5.0 * torch.tanh(_scores(q, k) / 5.0)
    return torch.where(_causal(q, k) & padding[:, None, None, :], scores, -1e32).softmax(-1) @ v


def _heads(length: int, training: bool):
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randn(2, 3, length, 8, generator=generator).requires_grad_(training) for _ in range(3))


def _rewritten(function, inputs, training: bool, dynamic: bool = False):
    graphs: list[fx.GraphModule] = []

    def backend(gm, example_inputs):
        assert any(d.action == "rewritten" for d in fuse_attention(gm, GPU))
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True), graphs


def _functions(gm: fx.GraphModule) -> list[ScoreFunction]:
    operator = torch.ops.vblackwell.attention.default
    return [ScoreFunction.loads(n.args[7]) for n in gm.graph.nodes if n.target is operator]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "function", [added, filled, filled_twice, filled_with_both, filled_between_capped_scores], ids=lambda f: f.__name__
)
def test_rows_without_a_key_keep_their_meaning(function, training, dynamic):
    compiled, graphs = _rewritten(function, None, training, dynamic)
    for length in (10, 13) if dynamic else (10,):
        inputs = (*_heads(length, training), _padding(length))
        ours = run(compiled, fresh(inputs), training=training)
        eager = run(function, fresh(inputs), training=training)
        with double_precision():
            truth = run(function, fresh(inputs, torch.float64), training=training)
        assert differences(ours, eager, truth) == []
    assert len(graphs) == 1 and all(f.mask is not None for f in _functions(graphs[0]))


def test_layers_share_the_rows_that_are_found():
    compiled, graphs = _rewritten(added, None, False)
    compiled(*_heads(10, False), _padding(10))
    assert len(_functions(graphs[0])) == 2
    assert sum(n.target == "any" for n in graphs[0].graph.nodes) == 1


def test_the_causal_part_bounds_tiles():
    compiled, graphs = _rewritten(added, None, False)
    compiled(*_heads(10, False), _padding(10))
    function = _functions(graphs[0])[0]
    empty_rows, padding = CapturedPattern("bool", True, False), CapturedPattern("bool", False, True)
    analysis = analyse_mask(function, (empty_rows, padding))
    assert len(analysis.constraints) == 1 and len(analysis.opaque) == 1


def test_a_mask_that_may_be_low_itself_is_left_as_a_number():
    def biased(q, k, v, bias):
        return torch.softmax(_scores(q, k).masked_fill(~_causal(q, k), LOWEST) + bias, -1) @ v

    compiled, graphs = _rewritten(biased, None, False)
    compiled(*_heads(10, False), torch.zeros(2, 1, 1, 10))
    assert _functions(graphs[0])[0].mask is None


class Frozen(torch.nn.Module):
    """A parameter that wants no gradient: a mask that hides keys itself, or a table of biases."""

    def __init__(self, is_mask: bool) -> None:
        super().__init__()
        self.is_mask = is_mask
        values = torch.full((16, 16), -INF).triu(1) if is_mask else torch.randn(31, 1)
        self.values = torch.nn.Parameter(values, requires_grad=False)

    def forward(self, q, k, v, padding):
        n = torch.arange(q.shape[-2])
        added = self.values[: len(n), : len(n)] if self.is_mask else self.values[n[:, None] - n + 15].squeeze(-1)
        return torch.where(padding[:, None, None, :], _scores(q, k) + added, LOWEST).softmax(-1) @ v


@pytest.mark.parametrize("is_mask", [True, False])
def test_a_frozen_parameter_may_be_a_mask(is_mask):
    module, inputs = Frozen(is_mask), (*_heads(10, False), _padding(10))
    compiled, graphs = _rewritten(module, None, False)
    torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=2e-4, atol=2e-5)
    assert (_functions(graphs[0])[0].mask is None) is is_mask


def test_cpu_kernels_read_the_fill():
    graphs = []

    def backend(gm, example_inputs):
        fuse_attention(gm, CPU)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(added, backend=backend)(*_heads(10, False), _padding(10))
    assert _functions(graphs[0])[0].mask is None
