"""What torch-npu's operators compute, on CPU tensors, from their documentation (torch_npu/_op_plugin_docs.py, 2.13.0).

Constraints that the documentation states are errors here. Results are accumulated in float64 and rounded once.
"""

import math
from typing import Any

import torch
from torch import Tensor

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = torch.cat([_E2M1, -_E2M1])
FLOAT4, E8M0 = 296, 293
_DTYPES = {15: torch.bfloat16, 5: torch.float16, 6: torch.float32}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"torch-npu (simulated): {message}")


# -------------------------------------------------------------------------------------------- attention
def _heads_first(t: Tensor, layout: str) -> Tensor:
    _check(layout in ("BNSD", "BSND"), f"layout {layout} is not simulated")
    return t.transpose(1, 2) if layout == "BSND" else t


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    _check(q.dtype == k.dtype == v.dtype, "query, key and value of different types")
    _check(q.shape[1] == heads, f"head_num {heads} is not the number of query heads {q.shape[1]}")
    _check(heads % k.shape[1] == 0 and k.shape[1] == v.shape[1], "heads of keys do not divide those of queries")
    _check(q.shape[-1] == k.shape[-1] >= v.shape[-1], "features: query and key alike, value not more")
    _check(1 <= q.shape[-1] <= 768, "features from 1 to 768")


def _hidden(mask: Tensor | None, mode: int, before: int, after: int, q_length: int, k_length: int) -> Tensor | None:
    """True where a score is hidden, broadcasting to ``[B, N, Q, K]``."""
    _check(mode in (0, 1, 2, 3, 4), f"sparse_mode {mode}")
    if mask is None:
        _check(mode == 0, f"sparse_mode {mode} without atten_mask")
        return None
    _check(mask.dtype in (torch.bool, torch.uint8), "atten_mask must be bool or uint8")
    mask = mask.bool()
    if mode in (0, 1):
        _check(tuple(mask.shape[-2:]) == (q_length, k_length), f"atten_mask of shape {tuple(mask.shape)}")
        return mask
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    _check(tuple(mask.shape[-2:]) == (2048, 2048) and bool((mask.view(2048, 2048) == triangle).all()),
           f"sparse_mode {mode} needs the upper triangle of 2048 x 2048")  # fmt: skip
    i, j = torch.arange(q_length).unsqueeze(1), torch.arange(k_length)
    corner = k_length - q_length
    if mode == 2:
        return j > i
    if mode == 3:
        _check(q_length <= k_length, "sparse_mode 3 with more queries than keys")
        return j > i + corner
    _check(-before <= after, "sparse_mode 4: the window is empty")
    return (j > i + corner + after) | (j < i + corner - before)


class _Attention:
    """Weights of one call in float64.

    Attributes:
        p: after softmax, sinks included in its sum, ``[B, N, Q, K]``; zero in rows without a key.
        largest, total: row statistics ``[B, N, Q, 1]``.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, bias: Tensor | None, bias_first: bool,
                 hidden: Tensor | None, sink: Tensor | None) -> None:  # fmt: skip
        group = q.shape[1] // k.shape[1]
        self.scores = q.double() @ k.double().repeat_interleave(group, 1).mT
        if bias is not None and bias_first:
            self.scores = self.scores + bias.double()
        self.scores = self.scores * scale
        if bias is not None and not bias_first:
            self.scores = self.scores + bias.double()
        self.hidden = None if hidden is None else hidden.expand(self.scores.shape)
        scores = self.scores if hidden is None else self.scores.masked_fill(self.hidden, -math.inf)
        largest = scores.amax(-1, keepdim=True)
        self.sink = None if sink is None else sink.double().view(1, -1, 1, 1)
        largest = largest if self.sink is None else torch.maximum(largest, self.sink)
        self.largest = largest.masked_fill(largest == -math.inf, 0.0)
        exponentials = (scores - self.largest).exp()
        total = exponentials.sum(-1, keepdim=True)
        self.total = total if self.sink is None else total + (self.sink - self.largest).exp()
        self.p = exponentials / self.total.masked_fill(self.total == 0, 1.0)


def _check_bias(bias: Tensor | None, q: Tensor, k_length: int) -> None:
    if bias is None:
        return
    _check(bias.dtype == q.dtype, "pse of another type than query")
    _check(bias.dim() == 4 and bias.shape[0] in (1, q.shape[0]) and bias.shape[1] == q.shape[1], "pse is BNSS or 1NSS")
    _check(tuple(bias.shape[2:]) == (q.shape[2], k_length) and bias.is_contiguous(), "pse has sizes Sq and Skv")
    _check(not bool(torch.isinf(bias).any()), "pse with infinities")


def _check_mask(mask: Tensor | None, mode: int, q: Tensor) -> None:
    if mask is None or mode in (2, 3, 4) or mask.dim() == 2:
        return
    shapes = {(q.shape[0], q.shape[1]), (q.shape[0], 1), (1, 1)}
    _check(mask.dim() == 4 and tuple(mask.shape[:2]) in shapes, f"atten_mask is BNSS, B1SS, 11SS or SS, not "
           f"{tuple(mask.shape)}")  # fmt: skip


def _dropped(shape: torch.Size, keep_prob: float, seed: int, offset: int) -> Tensor:
    """The operator's own numbers: anything that seed and offset fix."""
    generator = torch.Generator().manual_seed((seed + offset) % 2**63)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) < keep_prob) / keep_prob


def _fusion(q, k, v, heads, layout, bias, bias_first, mask, scale, keep_prob, before, after, mode, sink, seed, offset):
    q, k, v = (_heads_first(t, layout) for t in (q, k, v))
    _check_tensors(q, k, v, heads)
    _check(q.dtype in (torch.float16, torch.bfloat16, torch.float32), f"type {q.dtype}")
    _check(0 < keep_prob <= 1, f"keep_prob {keep_prob}")
    _check(
        sink is None or (tuple(sink.shape) == (heads,) and sink.dtype == torch.float32), "sink is float32 [head_num]"
    )
    _check_bias(bias, q, k.shape[2])
    _check_mask(mask, mode, q)
    hidden = _hidden(mask, mode, before, after, q.shape[2], k.shape[2])
    attention = _Attention(q, k, scale, bias, bias_first, hidden, sink)
    keep = None if keep_prob == 1 else _dropped(attention.p.shape, keep_prob, seed, offset)
    return attention, keep, (q, k, v)


def _training_forward(q, k, v, heads, layout, *arguments: Any):
    attention, keep, (q4, _, v4) = _fusion(q, k, v, heads, layout, *arguments)
    p = attention.p if keep is None else attention.p * keep
    out = (p @ v4.double().repeat_interleave(heads // v4.shape[1], 1)).to(q.dtype)
    statistics = [t.float().expand(*t.shape[:3], 8).contiguous() for t in (attention.largest, attention.total)]
    seed, offset = arguments[-2:]
    numbers = (seed, offset, attention.p.numel()) if keep is not None else (0, 0, 0)
    return _heads_first(out, layout).contiguous(), *statistics, q4.new_empty(0), *numbers


def npu_fusion_attention(query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None,
                         scale=1.0, keep_prob=1.0, pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0,
                         prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0,
                         gen_mask_parallel=True, sync=False, softmax_layout="", sink=None, dropout_mask=None, seed=0,
                         offset=0):  # fmt: skip
    """The formula of the documentation: a bias is added before the scale."""
    _check(padding_mask is None and dropout_mask is None, "padding_mask and dropout_mask are not simulated")
    return _training_forward(query, key, value, head_num, input_layout, pse, True, atten_mask, scale, keep_prob,
                             pre_tockens, next_tockens, sparse_mode, sink, seed, offset)  # fmt: skip


def npu_fusion_attention_v2(query, key, value, head_num, input_layout, *, pse=None, padding_mask=None, atten_mask=None,
                            query_rope=None, key_rope=None, scale=1.0, keep_prob=1.0, pre_tokens=2147483647,
                            next_tokens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None,
                            actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, pse_type=1,
                            q_start_idx=None, kv_start_idx=None, softmax_layout="", sink=None, dropout_mask=None,
                            seed=0, offset=0):  # fmt: skip
    _check(pse_type in (0, 1), f"pse_type {pse_type} is not simulated")
    return _training_forward(query, key, value, head_num, input_layout, pse, pse_type == 1, atten_mask, scale,
                             keep_prob, pre_tokens, next_tokens, sparse_mode, sink, seed, offset)  # fmt: skip


def _training_backward(q, k, v, dy, heads, layout, largest, total, attention_in, numels, *arguments: Any):
    attention, keep, (q4, k4, v4) = _fusion(q, k, v, heads, layout, *arguments)
    scale = arguments[3]
    grad, out = (_heads_first(t, layout).double() for t in (dy, attention_in))
    group = heads // k4.shape[1]
    wide = tuple(attention.p.shape[:3])
    for name, t in (("softmax_max", largest), ("softmax_sum", total)):
        _check(t is not None and t.dtype == torch.float32 and tuple(t.shape) == (*wide, 8), f"{name} is [B, N, S, 8]")
    _check(keep is None or numels == attention.p.numel(), "numels is not the forward's")
    scores = attention.scores.masked_fill(attention.hidden, -math.inf) if attention.hidden is not None else (
        attention.scores)  # fmt: skip
    p = (scores - largest.double()[..., :1]).exp() / total.double()[..., :1]
    dropped = p if keep is None else p * keep
    dv = dropped.mT @ grad
    dp = grad @ v4.double().repeat_interleave(group, 1).mT
    dp = dp if keep is None else dp * keep
    delta = (grad * out).sum(-1, keepdim=True)
    ds = p * (dp - delta) * scale
    dq = ds @ k4.double().repeat_interleave(group, 1)
    dk = ds.mT @ q4.double()
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
    sink = attention.sink
    dsink = q.new_empty(0, dtype=torch.float32)
    if sink is not None:
        weight = (sink - largest.double()[..., :1]).exp() / total.double()[..., :1]
        dsink = -(weight * delta).sum((0, 2, 3)).float()
    grads = [_heads_first(t.to(q.dtype), layout).contiguous() for t in (dq, dk, dv)]
    return grads, dsink


def npu_fusion_attention_grad(query, key, value, dy, head_num, input_layout, *, pse=None, padding_mask=None,
                              atten_mask=None, softmax_max=None, softmax_sum=None, softmax_in=None, attention_in=None,
                              scale_value=1.0, keep_prob=1.0, pre_tockens=2147483647, next_tockens=2147483647,
                              inner_precise=0, seed=0, offset=0, numels=0, prefix=None, actual_seq_qlen=None,
                              actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False,
                              softmax_layout="", sink=None):  # fmt: skip
    """As releases from 2.7.1 return it: the last result is the sink's gradient."""
    grads, dsink = _training_backward(query, key, value, dy, head_num, input_layout, softmax_max, softmax_sum,
                                      attention_in, numels, pse, True, atten_mask, scale_value, keep_prob, pre_tockens,
                                      next_tockens, sparse_mode, sink, seed, offset)  # fmt: skip
    return *grads, query.new_empty(0), dsink


def npu_fusion_attention_grad_v2(query, key, value, dy, head_num, input_layout, *, pse=None, padding_mask=None,
                                 atten_mask=None, softmax_max=None, softmax_sum=None, softmax_in=None,
                                 attention_in=None, query_rope=None, key_rope=None, scale_value=1.0, keep_prob=1.0,
                                 pre_tokens=2147483647, next_tokens=2147483647, inner_precise=0, seed=0, offset=0,
                                 numels=0, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0,
                                 gen_mask_parallel=True, sync=False, pse_type=1, q_start_idx=None, kv_start_idx=None,
                                 softmax_layout="", sink=None):  # fmt: skip
    grads, dsink = _training_backward(query, key, value, dy, head_num, input_layout, softmax_max, softmax_sum,
                                      attention_in, numels, pse, pse_type == 1, atten_mask, scale_value, keep_prob,
                                      pre_tokens, next_tokens, sparse_mode, sink, seed, offset)  # fmt: skip
    nothing = query.new_empty(0)
    return *grads, nothing, nothing, nothing, dsink


def _without_sink_gradient(kernel):
    """As releases before 2.7.1 return it."""
    return lambda *args, **kwargs: kernel(*args, **kwargs)[:-1]


def _infer(q, k, v, pse, mask, heads, kv_heads, scale, before, after, layout, mode, wants_lse):
    _check(layout == "BNSD", f"layout {layout} is not simulated")
    _check(all(t.is_contiguous() for t in (q, k, v)), "tensors must be contiguous")
    _check_tensors(q, k, v, heads)
    _check(kv_heads in (0, k.shape[1]), "num_key_value_heads is not the number of key heads")
    _check(q.dtype in (torch.float16, torch.bfloat16), f"type {q.dtype}")
    _check(q.shape[2] == 1 or q.shape[-1] % 16 == 0, "features must be a multiple of 16")
    _check_bias(pse, q, k.shape[2])
    if mask is not None and mode == 0:
        batch = mask.shape[0]
        _check(mask.dim() == 4 and mask.shape[1] == 1 and batch in (1, q.shape[0]), "one mask for all heads")
        _check(mask.is_contiguous(), "atten_mask must be contiguous")
    _check(q.shape[2] > 1 or mode == 0, "sparse_mode has no effect on one query")
    hidden = _hidden(mask, mode, before, after, q.shape[2], k.shape[2])
    attention = _Attention(q, k, scale, pse, False, hidden, None)
    out = attention.p @ v.double().repeat_interleave(heads // v.shape[1], 1)
    lse = (attention.largest + attention.total.log()).float() if wants_lse else torch.zeros(1)
    return out.to(q.dtype), lse


def npu_fused_infer_attention_score(query, key, value, *, pse_shift=None, atten_mask=None, num_heads=1, scale=1.0,
                                    pre_tokens=2147483647, next_tokens=2147483647, input_layout="BSH",
                                    num_key_value_heads=0, sparse_mode=0, inner_precise=0, softmax_lse_flag=False,
                                    **unused):  # fmt: skip
    return _infer(query, key, value, pse_shift, atten_mask, num_heads, num_key_value_heads, scale, pre_tokens,
                  next_tokens, input_layout, sparse_mode, softmax_lse_flag)  # fmt: skip


def npu_fused_infer_attention_score_v2(query, key, value, *, pse_shift=None, atten_mask=None, num_query_heads=1,
                                       softmax_scale=1.0, pre_tokens=2147483647, next_tokens=2147483647,
                                       input_layout="BSH", num_key_value_heads=0, sparse_mode=0, inner_precise=0,
                                       return_softmax_lse=False, **unused):  # fmt: skip
    return _infer(query, key, value, pse_shift, atten_mask, num_query_heads, num_key_value_heads, softmax_scale,
                  pre_tokens, next_tokens, input_layout, sparse_mode, return_softmax_lse)  # fmt: skip


# -------------------------------------------------------------------------------------------- FP4, FP8
def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """Values ``[K, N]`` of E2M1 codes packed along the contiguous axis, and E8M0 scales ``[ceil(K / 32), N]``."""
    along_n = codes.stride(-1) == 1
    packed = codes if along_n else codes.mT
    values = _E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()].double()
    values = values if along_n else values.mT
    return values * _powers(scales.t()).t()[: values.shape[0]]


def _powers(scales: Tensor) -> Tensor:
    """E8M0 scales of blocks of 32 columns, one a column; 255 is NaN."""
    return torch.exp2(scales.double() - 127).masked_fill(scales == 255, math.nan).repeat_interleave(32, 1)


def npu_weight_quant_batchmatmul(x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None,
                                 bias=None, antiquant_group_size=0, inner_precise=0, weight_dtype=None):  # fmt: skip
    """The MXFP4 case of Ascend 950."""
    _check(weight_dtype == FLOAT4 and weight.dtype == torch.uint8, "only float4_e2m1 weights are simulated")
    _check(antiquant_group_size == 32 and antiquant_offset is None, "MXFP4: groups of 32, no offset")
    _check(antiquant_scale.dtype == torch.uint8, "MXFP4: scales are E8M0, as bytes")
    _check(x.dim() == 2 and x.dtype in (torch.float16, torch.bfloat16), "x is [M, K] in a 16-bit type")
    _check(bias is None or (bias.dtype == x.dtype and bias.is_contiguous()), "bias has the type of x")
    values = _decoded(weight, antiquant_scale)
    _check(tuple(antiquant_scale.shape) == (-(-values.shape[0] // 32), values.shape[1]), "scale is [ceil(K / 32), N]")
    _check(x.shape[1] == values.shape[0], f"K: {x.shape[1]} and {values.shape[0]}")
    _check(x.shape[0] > 0 and max(values.shape) <= 65535, "sizes")
    out = x.double() @ values
    return (out if bias is None else out + bias.double()).to(x.dtype)


def npu_dynamic_mx_quant(input, *, axis=-1, round_mode="rint", dst_type=296, block_size=32, scale_alg=0, **unused):
    _check(axis in (-1, input.dim() - 1) and block_size == 32 and round_mode == "rint", "only the default is simulated")
    _check(dst_type in (292, FLOAT4), "only float8_e4m3fn and float4_e2m1 are simulated")
    _check(input.shape[-1] % 64 == 0, "scales come in pairs")
    blocks = input.double().unflatten(-1, (-1, 32))
    broken = ~blocks.isfinite().all(-1)
    blocks = blocks.nan_to_num(0, 0, 0)
    largest = blocks.abs().amax(-1, keepdim=True)
    top = 2 if dst_type == FLOAT4 else 8  # the exponent of the type's largest number
    exponent = torch.floor(torch.log2(largest.clamp_min(2.0**-120))) - top
    scales = torch.where(largest == 0, 0, exponent + 127).flatten(-2).to(torch.uint8)
    scales = scales.masked_fill(broken, 255).unflatten(-1, (-1, 2))
    values = (blocks / torch.exp2(exponent)).flatten(-2)
    if dst_type == FLOAT4:
        return _packed(values), scales
    return values.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def _packed(values: Tensor) -> Tensor:
    """E2M1 codes of ``[..., K]``, rounded to nearest, ties to even, the first of two in the low half of a byte."""
    steps = values.abs().clamp_max(6.0).unsqueeze(-1)
    distance = (steps - _E2M1[:8].double()).abs() + torch.arange(8) % 2 * 1e-9  # an odd code loses a tie
    codes = distance.argmin(-1).to(torch.uint8) | (values < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4


def npu_quant_matmul(
    x1,
    x2,
    scale,
    *,
    offset=None,
    pertoken_scale=None,
    bias=None,
    output_dtype=None,
    x1_dtype=None,
    x2_dtype=None,
    pertoken_scale_dtype=None,
    scale_dtype=None,
    group_sizes=None,
    y_scale=None,
):
    """The case of float8_e4m3fn or float4_e2m1 activations and float4_e2m1 weights with E8M0 scales on both."""
    four = x1.dtype == torch.uint8 and x1_dtype == FLOAT4
    _check(x2_dtype == FLOAT4, "only W4 is simulated")
    _check(four or (x1.dtype == torch.float8_e4m3fn and x1_dtype is None), "only A8 and A4 are simulated")
    _check(scale_dtype == E8M0 and pertoken_scale_dtype == E8M0, "scales are float8_e8m0fnu")
    _check(list(group_sizes) == ([1, 1, 32] if four else [0, 0, 32]), f"group_sizes {group_sizes}")
    k = 2 * x2.shape[0]
    _check(x2.stride(-2) == 1 and x1.shape[1] * (2 if four else 1) == k, "x2 is transposed, packed along K")
    _check(tuple(scale.shape) == (k // 64, x2.shape[1], 2), f"scale of shape {tuple(scale.shape)}")
    _check(tuple(pertoken_scale.shape) == (x1.shape[0], k // 64, 2), "pertoken_scale is [M, K / 64, 2]")
    scales = pertoken_scale.flatten(1)
    left = _decoded(x1.t(), scales.t()).t() if four else x1.double() * _powers(scales)
    out = left @ _decoded(x2, scale.transpose(0, 1).flatten(1).t())
    return out.to(_DTYPES[output_dtype])


KERNELS = {
    f.__name__: f
    for f in (
        npu_fusion_attention,
        npu_fusion_attention_v2,
        npu_fusion_attention_grad,
        npu_fusion_attention_grad_v2,
        npu_fused_infer_attention_score,
        npu_fused_infer_attention_score_v2,
        npu_weight_quant_batchmatmul,
        npu_dynamic_mx_quant,
        npu_quant_matmul,
    )
}


def kernels(version: str) -> dict[str, Any]:
    """The kernels of a release."""
    if version.startswith("2.5"):
        older = {name: _without_sink_gradient(KERNELS[name]) for name in KERNELS if "grad" in name}
        return KERNELS | older
    return dict(KERNELS)
