"""Results leave the kernels without a copy: what a kernel allocates has the memory order that the operator promises."""

import pytest
import torch

from vbcompile.kernels import attention_gpu, attention_hopper
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
    out, lse = attention_gpu._hopper_forward(q, k, v, [], 1.0, 0.0, None, function)
    promised = empty_output(lead, 8, 16, rows_first, q)
    assert out.data_ptr() == written[0]
    assert out.stride() == promised.stride() and lse.shape == (*lead, 8)
    torch.testing.assert_close(out, q)
