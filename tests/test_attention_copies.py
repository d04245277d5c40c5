"""Results leave the kernels without a copy: what a kernel allocates has the memory order that the operator promises."""

import pytest
import torch

from vbcompile.kernels import attention_gpu, attention_hopper
from vbcompile.kernels.attention_fold import fold_inputs
from vbcompile.kernels.attention_results import empty_output
from vbcompile.kernels.score_function import ScoreFunction


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("lead", [(3,), (2, 4), (2, 4, 3), (2, 2, 2, 3)])
def test_hopper_writes_where_the_result_is_promised(monkeypatch, lead, rows_first):
    written = []

    def kernel(q, k, v, scale, causal_offset, rows_first):
        out = attention_hopper.allocate(q, rows_first)
        written.append(out.data_ptr())
        return out.copy_(q), q.new_zeros(q.shape[:3], dtype=torch.float32)

    monkeypatch.setattr(attention_hopper, "forward", kernel)
    q = torch.randn(*lead, 8, 16)
    shared = (*lead[:-1], 1) if len(lead) == 3 else lead  # grouped queries
    k, v = torch.randn(*shared, 8, 16), torch.randn(*shared, 8, 16)
    function = ScoreFunction([["score"]], 0, None, None, "nan", rows_first).dumps()
    out, lse = attention_gpu.hopper_forward(q, k, v, [], 1.0, 0.0, None, function)
    promised = empty_output(lead, 8, 16, rows_first, q)
    assert out.data_ptr() == written[0]
    assert out.stride() == promised.stride() and lse.shape == (*lead, 8)
    torch.testing.assert_close(out, q)


@pytest.mark.parametrize("lead", [(2, 4), (1, 2, 4), (3, 2, 4)])
def test_grouped_keys_and_values_are_not_copied(lead):
    """Slices of one fused projection, as a model hands them over; without a batch the groups are the last axis too."""
    fused = torch.randn(*lead[:-2], 8, 2 * lead[-2], 16)  # [.., rows, key heads then value heads, features]
    k, v = (part.transpose(-3, -2).unsqueeze(-3) for part in fused.split(lead[-2], -2))
    q = torch.randn(*lead, 8, 16)
    q4, k4, v4 = fold_inputs(q, k, v, lead)
    assert (k4.data_ptr(), v4.data_ptr()) == (k.data_ptr(), v.data_ptr())
    assert q4.shape[0] == k4.shape[0] and q4.shape[1] == lead[-1] * k4.shape[1]
    for head in range(q4.shape[0] * q4.shape[1]):
        batch, own = divmod(head, q4.shape[1])
        shared = own // lead[-1]
        assert torch.equal(k4[batch, shared], k.expand(*lead, 8, 16).reshape(-1, 8, 16)[head])
