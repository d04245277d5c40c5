"""The attention pass on single graphs: what it finds, what it emits, how masks and sums of products are read.

The corpus and the property test cover the ways of writing attention; here are the cases around them.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_pass_run import CAUSAL, attend, check, compiled, qkv

from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.passes import attention_composites

INF = float("inf")


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


@pytest.mark.parametrize("batch", [1, 2])
def test_grouped_heads_are_read_rows_first_with_one_sequence_too(batch):
    """As Transformers writes it: a reshape that does nothing, then heads folded into features."""

    def function(q, k, v):
        k, v = (t[:, :, None].expand(batch, 2, 3, 7, 8).reshape(batch, 6, 7, 8) for t in (k, v))
        out = attend(q, k, v).reshape(batch, -1, 5, 8)
        return out.transpose(1, 2).contiguous().reshape(batch, 5, -1)

    q = torch.randn(batch, 6, 5, 8, requires_grad=True)
    run = check(function, q, *(torch.randn(batch, 2, 7, 8, requires_grad=True) for _ in range(2)))
    (call,) = run.calls()
    assert list(call.args[0].meta["example_value"].shape) == [batch, 2, 3, 5, 8]
    assert list(call.args[1].meta["example_value"].shape) == [batch, 2, 1, 7, 8]
    assert run.function().rows_first


def test_a_merge_of_heads_and_rows_is_not_read_rows_first():
    run = check(lambda q, k, v: attend(q, k, v).reshape(2, 24, 8).transpose(0, 1).contiguous(), *qkv())
    assert not run.function().rows_first


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


@pytest.mark.parametrize("narrow", [torch.int8, torch.float8_e4m3fn, torch.float16])
def test_operands_are_not_read_above_a_cast_that_rounds(narrow):
    def attend_rounded(q, k, v):
        return torch.softmax(q.to(narrow).float() @ k.to(narrow).float().mT, -1).to(v.dtype) @ v

    ours, run = compiled(attend_rounded)
    ours(*(x.bfloat16() for x in qkv(grad=False)))
    (call,) = run.calls()
    assert [n.meta["example_value"].dtype for n in call.args[:3]] == [torch.float32] * 3


def test_bits_read_as_other_numbers_are_no_view():
    q, k, v = qkv(k=6, grad=False)

    def packed(q, k, v):
        return attend(q, k.expand(-1, 4, -1, -1).view(torch.float32), v)

    def compared(q, bits, v):
        return attend(q, v, v, lambda s: s.masked_fill(bits.view(torch.int32)[:, :, :, :6] > 2**29, -3.0))

    check(packed, q, k[:, :1].contiguous().view(torch.int32), v)
    check(compared, q, torch.randn(2, 1, 6, 8), v)


def test_two_float16_masks_are_infinite_together():
    """Each alone leaves a row without a key the mean of all values; their sum is beyond float16."""

    def function(q, k, v, keep, twice):
        lowest = torch.finfo(q.dtype).min
        scores = (q @ k.mT).masked_fill(~keep, lowest)
        scores = scores + torch.zeros_like(scores).masked_fill(~(keep | ~twice), lowest)
        return torch.softmax(scores, -1) @ v

    heads = [t.half() for t in qkv(grad=False)]
    keep = torch.ones(6, 7, dtype=torch.bool)
    keep[2:4] = False
    twice = torch.arange(6)[:, None] == 3
    ours, run = compiled(function)
    result, expected = ours(*heads, keep, twice), function(*heads, keep, twice)
    assert run.sites == 1 and expected[:, :, 3].isnan().all() and not expected[:, :, 2].isnan().any()
    torch.testing.assert_close(result, expected, atol=2e-3, rtol=2e-3, equal_nan=True)


def test_arithmetic_mapped_elsewhere_is_not_looked_into(monkeypatch):
    """An associative scan maps it over slices, hundreds of times in a model with state spaces."""
    tried = []
    monkeypatch.setattr(attention_composites, "_tried", lambda composite, *_: tried.append(composite) or [])

    def function(q, k, v):
        for _ in range(3):
            v = torch.vmap(lambda x, y: x * 0.5 + y * 0.25, in_dims=1, out_dims=1)(v, v)
        return torch.vmap(lambda x: x * 2)(attend(q, k, v).tanh())

    check(function, *qkv())
    assert not tried


class _CausalByPositions(torch.nn.Module):
    """Positions looked up, arithmetic in place, a cast that export asserts to be one, a column that is cut off."""

    def forward(self, q, k, v):
        rows = torch.arange(q.shape[2], device=q.device)[None].expand(q.shape[0], -1)
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        keep = rows[batch, rows[:1, None, None, :]] <= rows[batch, rows[:1, None, :, None]]
        starts = (torch.diff(rows, prepend=rows[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        keep = keep.new_ones(()) & keep & (starts[:, None, :, None] == starts[:, None, None, :])
        scores = q @ k.swapaxes(2, 3)
        scores /= 3
        scores = scores.masked_fill(~keep, -INF)
        scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        return F.softmax(scores, dim=-1, dtype=torch.float32)[..., :-1].to(q.dtype) @ v


def test_a_column_cut_off_by_a_length_that_varies():
    def attend_beside_a_sink(q, k, v):
        scores = torch.cat([q @ k.mT, q.new_zeros(*q.shape[:-1], 1)], dim=-1)
        return scores.softmax(-1).narrow(-1, 0, k.shape[2]) @ v

    run = check(attend_beside_a_sink, *qkv(), dynamic=True)
    assert "sink" in run.decisions[0].reason


def test_exported_attention_is_read_as_the_one_before_export():
    tensors = tuple(torch.randn(2, 3, 7, 8) for _ in range(3))
    reasons = [
        check(module, *tensors).decisions[0].reason
        for module in (_CausalByPositions(), torch.export.export(_CausalByPositions(), tensors).module())
    ]
    assert reasons == ["attention, mask from positions, sink, no mask tensor"] * 2


class _MappedUnderAutocast(torch.nn.Module):
    def forward(self, q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.vmap(lambda *qkv: attend(*qkv))(q, k, v)


def test_exported_autocast_is_seen_inside_its_body():
    tensors = tuple(torch.randn(2, 3, 7, 8) for _ in range(3))
    exported = torch.export.export(_MappedUnderAutocast(), tensors).module()
    ours, run = compiled(exported)
    torch.testing.assert_close(ours(*tensors), exported(*tensors), rtol=2e-2, atol=2e-2)
    assert run.sites == 1


@pytest.mark.parametrize(
    "write", [lambda s: s.add_(s, alpha=2), lambda s: s.view(-1).mul_(0.5), lambda s: s.sub_(1).add_(2)]
)
def test_exported_arithmetic_in_place_keeps_its_meaning(write):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            scores = q @ k.mT
            before = scores.transpose(0, 1)
            write(scores)
            return torch.softmax(scores, -1) @ v, before

    tensors = tuple(torch.randn(2, 3, 7, 8) for _ in range(3))
    exported = torch.export.export(Module(), tensors).module()
    ours, _ = compiled(exported)
    torch.testing.assert_close(ours(*tensors), Module()(*tensors))
