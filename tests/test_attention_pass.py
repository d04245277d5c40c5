"""The attention pass on single graphs: what it finds, what it leaves, and that effects and layouts survive.

The corpus and the property test cover the ways of writing attention; here are the cases around them.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.passes.attention import fuse_attention
from vbcompile.report import Decision

INF = float("inf")
OP = torch.ops.vblackwell.attention.default


@dataclass
class Run:
    """What the pass did while a function was compiled."""

    decisions: list[Decision] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)

    @property
    def sites(self) -> int:
        return sum(d.action == "rewritten" for d in self.decisions)

    @property
    def reasons(self) -> list[str]:
        return [d.reason for d in self.decisions if d.action == "left"]

    def calls(self) -> list[fx.Node]:
        modules = [m for gm in self.graphs for m in gm.modules() if isinstance(m, fx.GraphModule)]
        return [n for m in modules for n in m.graph.nodes if n.target is OP]

    def function(self, place: int = 0) -> ScoreFunction:
        return ScoreFunction.loads(self.calls()[place].args[7])

    def captured(self, place: int = 0) -> list[list[int]]:
        return [list(n.meta["example_value"].shape) for n in self.calls()[place].args[3]]


def compiled(function: Any, *, capture_autograd: bool = False, **options: Any) -> tuple[Any, Run]:
    """The function under Dynamo and this pass alone; the rewritten graph runs eagerly."""
    torch._dynamo.reset()
    run = Run()

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        run.decisions += fuse_attention(gm, None)
        run.graphs.append(gm)
        again = fuse_attention(gm, None)
        assert not any(d.action == "rewritten" for d in again), "not idempotent"
        return aot_eager(gm, inputs) if capture_autograd else gm.forward

    return torch.compile(function, backend=backend, **options), run


def check(function: Any, *inputs: Any, sites: int = 1, **options: Any) -> Run:
    """Outputs and gradients equal eager's, and the number of sites is as wanted."""
    ours, run = compiled(function, **options)
    copies = [i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, torch.Tensor) else i for i in inputs]
    expected, got = function(*inputs), ours(*copies)
    expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-5, equal_nan=True)
        assert a.stride() == b.stride()
    differentiable = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
    if differentiable and expected[0].requires_grad:
        grad = torch.randn_like(expected[0])
        theirs = torch.autograd.grad(expected[0], differentiable, grad, allow_unused=True)
        mine = [c for c in copies if isinstance(c, torch.Tensor) and c.requires_grad]
        for a, b in zip(theirs, torch.autograd.grad(got[0], mine, grad, allow_unused=True), strict=True):
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert run.sites == sites, run.decisions
    return run


def qkv(batch: int = 2, heads: int = 4, q: int = 6, k: int = 7, d: int = 8, grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, n, d, requires_grad=grad) for n in (q, k, k)]


def attend(q, k, v, edit=lambda s: s):
    return F.softmax(edit(q @ k.transpose(-1, -2) * 0.3), dim=-1) @ v


# ---------------------------------------------------------------------------------------------------- what is emitted
def test_plain_attention_uses_the_operands_themselves():
    run = check(attend, *qkv())
    (call,) = run.calls()
    assert [n.op for n in call.args[:3]] == ["placeholder"] * 3
    assert call.args[3:7] == ([], 0.3, 0.0, None)
    assert run.function() == ScoreFunction()
    assert run.decisions[0].reason == "attention, no mask tensor"


def test_scale_of_operands_is_part_of_the_scale():
    def function(q, k, v):
        return F.softmax((q * 0.5) @ (k / 4.0).mT, -1) @ v

    (call,) = check(function, *qkv()).calls()
    assert call.args[4] == pytest.approx(0.125)
    assert [n.op for n in call.args[:3]] == ["placeholder"] * 3


@pytest.mark.parametrize("repeat", ["expand", "interleave"])
def test_grouped_queries_copy_no_keys(repeat):
    def function(q, k, v):
        if repeat == "interleave":
            k, v = (t.repeat_interleave(3, dim=1) for t in (k, v))
        else:
            k, v = (t[:, :, None].expand(2, 2, 3, 7, 8).reshape(2, 6, 7, 8) for t in (k, v))
        return attend(q, k, v)

    q = torch.randn(2, 6, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, 8, requires_grad=True) for _ in range(2))
    run = check(function, q, k, v)
    (call,) = run.calls()
    assert [list(n.meta["example_value"].shape) for n in call.args[:3]] == [
        [2, 2, 3, 5, 8],
        [2, 2, 1, 7, 8],
        [2, 2, 1, 7, 8],
    ]
    assert "3 query heads per key head" in run.decisions[0].reason


def test_heads_folded_into_features_are_read_rows_first():
    def function(q, k, v):
        return attend(q, k, v).transpose(1, 2).reshape(2, 6, 32)

    run = check(function, *qkv())
    assert run.function().rows_first
    assert not any(n.target == "contiguous" for n in run.graphs[0].graph.nodes)


def test_returned_result_keeps_its_strides():
    def function(q, k, v):
        return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), -1), v)

    check(function, *(torch.randn(2, 6, 4, 8, requires_grad=True) for _ in range(3)))


def test_view_after_attention_stays_valid():
    def function(v, k, q):
        weights = torch.softmax(torch.bmm(q, k), dim=2)
        return torch.bmm(v, weights.permute(0, 2, 1)).view(2, 8, 3, 2) * 2

    check(function, torch.randn(2, 8, 6), torch.randn(2, 8, 6), torch.randn(2, 6, 8))


# ------------------------------------------------------------------------------------------------------------ masks
CAUSAL = (("score",), ("k_index",), ("q_index",), ("le", 1, 2))


def _tril(s):
    return s.masked_fill(torch.tril(torch.ones(s.shape[-2:])) == 0, -INF)


def _triu_added(s):
    return s + torch.full(s.shape[-2:], -INF).triu(1)


def _lowest(s):
    rows, columns = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    return torch.where(columns <= rows, s, torch.finfo(s.dtype).min)


def _lowest_added(s):
    allowed = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    return s + (1.0 - allowed.to(s.dtype)) * torch.finfo(s.dtype).min


@pytest.mark.parametrize("mask", [_tril, _triu_added, _lowest, _lowest_added])
def test_causal_masks_become_index_programs(mask):
    run = check(lambda q, k, v: attend(q, k, v, mask), *qkv(q=7))
    assert run.function().program == CAUSAL
    assert run.captured() == []
    assert run.decisions[0].reason == "attention, causal, no mask tensor"


@pytest.mark.parametrize("mask", [_tril, _triu_added, _lowest])
def test_causal_masks_with_dynamic_lengths(mask):
    run = check(lambda q, k, v: attend(q, k, v, mask), *qkv(q=7), dynamic=True)
    assert run.function().program == CAUSAL


def test_causal_mask_of_a_cache_is_aligned_at_the_end():
    def function(q, k, v):
        rows, columns = q.shape[-2], k.shape[-2]
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(diagonal=columns - rows)
        return attend(q, k, v, lambda s: s.masked_fill(~mask, -INF))

    assert check(function, *qkv(q=3)).captured() == []
    assert check(function, *qkv(q=3), dynamic=True).captured() == []


def test_masks_that_hide_nothing_vanish():
    def function(q, k, v):
        rows, columns = torch.arange(7)[:, None], torch.arange(7)
        return attend(q, k, v, lambda s: s.masked_fill(rows - columns > 50, -INF))

    assert check(function, *qkv(q=7)).function() == ScoreFunction()


def test_padding_stays_a_row_beside_the_causal_program():
    def function(q, k, v, padding):
        causal = torch.ones(7, 7, dtype=torch.bool).tril()
        return attend(q, k, v, lambda s: s.masked_fill(~(causal & padding[:, None, None, :]), -INF))

    padding = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    run = check(function, *qkv(q=7), padding)
    assert run.captured() == [[2, 1, 1, 7]]
    assert run.function().depends_on(run.function().mask, "k_index")


def test_finite_fill_is_a_value_where_a_row_may_be_empty():
    def function(q, k, v, mask):
        return attend(q, k, v, lambda s: s.masked_fill(~mask, torch.finfo(s.dtype).min))

    mask = torch.rand(6, 7) > 0.3
    mask[2] = False
    run = check(function, *qkv(grad=False), mask)
    assert run.function().mask is None


def test_band_with_finite_fill_is_a_mask():
    def function(q, k, v):
        distance = (torch.arange(7)[:, None] - torch.arange(7)).abs()
        return attend(q, k, v, lambda s: s.masked_fill(distance > 2, torch.finfo(s.dtype).min))

    assert check(function, *qkv(q=7)).function().mask is not None


def test_mask_that_reads_the_score_stays_in_the_logits():
    def function(q, k, v):
        return attend(q, k, v, lambda s: torch.where(s > -0.5, s, -INF))

    assert check(function, *qkv()).function().mask is None


def test_small_finite_fill_is_never_a_mask():
    def function(q, k, v):
        return attend(q, k, v, lambda s: s.masked_fill(torch.ones(7, 7).triu(1).bool(), -4.0))

    assert check(function, *qkv(q=7)).function().mask is None


def test_one_mask_for_many_layers_is_found_in_each():
    def function(q, k, v, padding):
        mask = torch.ones(7, 7, dtype=torch.bool).tril() & padding[:, None, None, :]
        for _ in range(3):
            q = q + attend(q, k, v, lambda s: s.masked_fill(~mask, -INF))
        return q

    run = check(function, *qkv(q=7), torch.ones(2, 7, dtype=torch.bool), sites=3)
    assert run.function(0) == run.function(1) == run.function(2)


# ---------------------------------------------------------------------------------------------------------- effects
def test_in_place_scores():
    def function(q, k, v, mask):
        scores = q @ k.mT
        scores *= 0.3
        scores.masked_fill_(mask, -INF)
        scores[..., 0] += 1.0
        return F.softmax(scores, -1) @ v

    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[1, 2:] = True
    check(function, *qkv(grad=False), mask, sites=0)  # a part of the scores is written: not understood, so left


def test_mask_modified_after_the_scores_are_masked():
    def function(q, k, v, mask):
        hidden = mask | (torch.arange(7) > 5)
        scores = (q @ k.mT).masked_fill(hidden, -INF)
        hidden.fill_(False)
        return F.softmax(scores, -1) @ v

    check(function, *qkv(grad=False), torch.zeros(6, 7, dtype=torch.bool), sites=0)


def test_keys_overwritten_between_the_products():
    def function(q, k, v):
        scores = q @ k.mT
        k.zero_()
        return F.softmax(scores, -1) @ v + k

    check(function, *qkv(q=7, grad=False), sites=0)


def test_cache_written_after_keys_were_repeated():
    def function(q, cache, new, v):
        k = cache.repeat_interleave(2, dim=1)
        cache[:, :, 0] = new
        return attend(q, k, v), cache.sum()

    q, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    check(function, q, torch.randn(2, 2, 7, 8), torch.randn(2, 2, 8), v)


def test_static_cache_is_read_after_it_was_written():
    def function(q, cache, new, v, position):
        cache.index_copy_(2, position, new)
        return attend(q, cache, v, lambda s: s.masked_fill(torch.arange(7) > position, -INF))

    new, position = torch.randn(2, 4, 1, 8), torch.tensor([3])
    check(function, torch.randn(2, 4, 1, 8), torch.randn(2, 4, 7, 8), new, torch.randn(2, 4, 7, 8), position)


def test_result_modified_in_place():
    def function(q, k, v):
        out = attend(q, k, v)
        out.mul_(2.0)
        return out + 1

    check(function, *qkv(), capture_autograd=True)
    check(function, *qkv())


def test_gradient_mode_changes_inside():
    def function(q, k, v):
        with torch.no_grad():
            scores = q @ k.mT
        return F.softmax(scores, -1) @ v

    assert "gradient mode" in check(function, *qkv(), sites=0).reasons[0]


def test_function_transforms_around_attention():
    def function(q, k, v):
        return torch.func.vmap(attend)(q, k, v)

    run = check(function, *qkv(grad=False), sites=0)
    assert "function transform" in run.reasons[0]


def test_activation_in_place_by_position():
    def function(q, k, v):
        scores = q @ k.mT
        shifted = scores + 0.5
        F.relu(scores, True)
        return F.softmax(shifted + scores, -1) @ v

    check(function, *qkv(grad=False), sites=0)


def test_detached_operands_get_no_gradient():
    def function(q, k, v, bias):
        return attend(q, k.detach(), v, lambda s: s + bias.detach() + torch.arange(7) * bias)

    check(function, *qkv(), torch.randn(4, 6, 7, requires_grad=True))


def test_autocast():
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v)

    ours, run = compiled(function)
    inputs = qkv(grad=False)
    out, expected = ours(*inputs), function(*inputs)
    assert run.sites == 1 and out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert all(n.meta["example_value"].dtype == torch.bfloat16 for n in run.calls()[0].args[:3])


def test_upcast_scores_keep_the_operands_precision():
    def function(q, k, v):
        weights = F.softmax(q.float() @ k.float().mT, -1)
        return weights.to(v.dtype) @ v

    ours, run = compiled(function)
    inputs = [t.to(torch.bfloat16) for t in qkv(grad=False)]
    torch.testing.assert_close(ours(*inputs), function(*inputs), rtol=2e-2, atol=2e-2)
    assert run.decisions[0].details["dtype"] == "bfloat16"


def test_float64():
    check(attend, *(t.detach().double().requires_grad_() for t in qkv()))


def test_checkpointed_attention_with_a_mask_from_outside():
    def function(q, k, v):
        mask = torch.full((7, 7), -INF).triu(1)
        return checkpoint(lambda q, k, v: attend(q, k, v, lambda s: s + mask), q, k, v, use_reentrant=False)

    run = check(function, *qkv(q=7), capture_autograd=True)
    assert run.function().program == CAUSAL


def test_dropout_has_a_seed_from_the_graph():
    def function(q, k, v):
        return F.dropout(F.softmax(q @ k.mT, -1), 0.25) @ v

    ours, run = compiled(function)
    inputs = qkv()
    ours(*inputs).sum().backward()
    (call,) = run.calls()
    assert call.args[5] == 0.25 and call.args[6].target is torch.randint


def test_dropout_must_repeat_eagers_random_numbers():
    import torch._inductor.config as inductor

    def function(q, k, v):
        return F.dropout(F.softmax(q @ k.mT, -1), 0.25) @ v

    ours, run = compiled(function)
    with inductor.patch(fallback_random=True):
        ours(*qkv())
    assert run.sites == 0 and "fallback_random" in run.reasons[0]


# ------------------------------------------------------------------------------------------------- what is left alone
def _refusals() -> dict[str, tuple[Any, str]]:
    def weights_returned(q, k, v):
        weights = F.softmax(q @ k.mT, -1)
        return weights @ v, weights

    def other_axis(q, k, v):
        return F.softmax(q @ k.mT, -2) @ v

    def no_values(q, k, v):
        return F.softmax(q @ k.mT, -1).sum() + v

    def sorted_scores(q, k, v):
        return F.softmax((q @ k.mT).sort(-1).values, -1) @ v

    def part_of_the_weights(q, k, v):
        return F.softmax(q @ k.mT, -1)[..., 1:] @ v[..., 1:, :]

    def masked_weights(q, k, v):
        weights = F.softmax(q @ k.mT, -1)
        return weights.masked_fill(torch.arange(7) > 3, 0.0) @ v

    return {
        "weights_returned": (weights_returned, "weights are returned"),
        "other_axis": (other_axis, "another axis"),
        "no_values": (no_values, "no matrix product"),
        "sorted_scores": (sorted_scores, "between the first matrix product and the softmax"),
        "part_of_the_weights": (part_of_the_weights, "a part of the attention weights"),
        "masked_weights": (masked_weights, "masked where the softmax is not"),
    }


@pytest.mark.parametrize("name", _refusals())
def test_refusals_say_why(name):
    function, reason = _refusals()[name]
    run = check(function, *qkv(), sites=0)
    assert any(reason in r for r in run.reasons), run.reasons


def test_classifier_is_no_attention():
    module = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Softmax(-1), nn.Linear(5, 8, bias=False))
    assert check(module, torch.randn(2, 6, 8), sites=0).reasons


def test_weights_of_multihead_attention_that_are_read():
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    run = check(lambda x: module(x, x, x), torch.randn(2, 6, 16), sites=0)
    assert run.reasons == ["the attention weights are returned"]


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_multihead_attention_with_extra_keys_is_left(extra):
    module = nn.MultiheadAttention(16, 2, batch_first=True, **extra)
    check(lambda x: module(x, x, x)[0], torch.randn(2, 6, 16), sites=0)


@pytest.mark.parametrize("batched", [True, False])
def test_multihead_attention(batched):
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    x = torch.randn(*([2] if batched else []), 6, 16, requires_grad=True)
    run = check(lambda x: module(x, x, x, attn_mask=mask)[0], x)
    assert not any(n.target is F.multi_head_attention_forward for n in run.graphs[0].graph.nodes)


def test_log_sum_before_the_values_exist():
    def function(q, k, w):
        scores = q @ k.mT
        v = w * torch.logsumexp(scores, -1).sum()
        return F.softmax(scores, -1) @ v

    assert "before the values" in check(function, *qkv(), sites=0).reasons[0]


def test_report_names_the_module():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Inner()

        def forward(self, q, k, v):
            return self.attention(q, k, v)

    class Inner(nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    run = check(Block(), *qkv())
    assert run.decisions[0].site.startswith("attention (test_attention_pass.py:")


def test_other_nodes_are_untouched():
    def function(q, k, v):
        q.add_(1)
        return attend(q, k, v) + operator.neg(q)[..., :8]

    run = check(function, *qkv(grad=False))
    assert any(n.target == "add_" for n in run.graphs[0].graph.nodes)


# --------------------------------------------------------------------------------------------- sums of two products
def test_two_products_of_latent_attention_are_one():
    """The second part's keys are shared by the heads; no tensor of the size of the scores is captured."""
    q, k, v = qkv()
    q_rope, k_rope = torch.randn(2, 4, 6, 4, requires_grad=True), torch.randn(2, 1, 7, 4, requires_grad=True)
    run = check(lambda q, k, v, a, b: torch.softmax((q @ k.mT + a @ b.mT) * 0.3, -1) @ v, q, k, v, q_rope, k_rope)
    assert run.captured() == []
    assert [run.calls()[0].args[n].meta["example_value"].shape[-1] for n in range(3)] == [12, 12, 8]


def test_second_product_that_is_scaled_or_masked_by_itself_stays_a_bias():
    q, k, v = qkv()
    q_rope, k_rope = torch.randn(2, 4, 6, 4), torch.randn(2, 4, 7, 4)
    for edit in (lambda s: s * 0.5, lambda s: s.tanh(), lambda s: s.tril()):

        def both(q, k, v, a, b, edit=edit):
            return torch.softmax(q @ k.mT + edit(a @ b.mT), -1) @ v

        assert check(both, q, k, v, q_rope, k_rope).captured() == [[2, 4, 6, 7]]


def test_second_product_of_overwritten_queries_stays_a_bias():
    def both(q, k, v, a, b):
        a = a * 1.0
        second = a @ b.mT
        a.zero_()
        return torch.softmax(q @ k.mT + second, -1) @ v + a.sum()

    q, k, v = qkv(grad=False)
    run = check(both, q, k, v, torch.randn(2, 4, 6, 4), torch.randn(2, 4, 7, 4))
    assert run.captured() == [[2, 4, 6, 7]]
