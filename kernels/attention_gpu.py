"""Our own GPU kernels as implementations of attention: the general Triton ones and Hopper's warp-specialised ones."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from vbcompile.device import Target
from vbcompile.kernels import attention_hopper, attention_hopper_gradients, attention_problem, attention_triton
from vbcompile.kernels.attention import arrange
from vbcompile.kernels.attention_case import AttentionCase, lead_shape
from vbcompile.kernels.attention_fold import fold, fold_heads, fold_inputs, unfold_gradients
from vbcompile.kernels.attention_gradients import Backward
from vbcompile.kernels.attention_hopper_call import describe_call, refuses_call
from vbcompile.kernels.attention_problem import with_padded_lead
from vbcompile.kernels.registry import Implementation, operator
from vbcompile.kernels.score_function import ScoreFunction, causal_offset

# time relative to cuDNN's; medians on an H200, see bench/results/attention*.json
_TRITON_COST = {"attention": 1.4, "attention_backward": 1.6}
_SCORED_COST = 1.0
_HOPPER_COST = {  # by head dimension and whether the mask is causal; where equally fast, below 1: cheaper for the host
    "attention": {(64, False): 0.91, (64, True): 0.94, (128, False): 0.94, (128, True): 0.94},
    "attention_backward": {(64, False): 1.03, (64, True): 0.89, (128, False): 1.05, (128, True): 0.96},
}
_LONG, _LONG_COST = 8192, 1.05  # keys from which cuDNN's causal backward is faster at head size 128, and by how much


def triton_forward(q, k, v, captured, scale, dropout_p, seed, score_function):
    function = ScoreFunction.loads(score_function)
    return attention_triton.forward(q, k, v, captured, scale, dropout_p, seed, function)


def triton_backward(grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs):
    function = ScoreFunction.loads(score_function)
    return attention_triton.backward(
        grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, function, needs
    )


def _addressable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as the tensor memory accelerator can read them: no axis broadcast by a stride of zero."""
    return tuple(t if attention_hopper.refuses_layout("", t) is None else t.contiguous() for t in tensors)


def _takes_plain(function: ScoreFunction, offset: int | None) -> bool:
    """Whether a function is nothing but a causal bound that leaves no row empty, or nothing at all."""
    alone = function.program[function.score] == ("score",) and function.mask is None and function.sink is None
    return alone or (offset is not None and offset >= 0)


def hopper_forward(q, k, v, captured, scale, dropout_p, seed, score_function):
    function = ScoreFunction.loads(score_function)
    lead = lead_shape(q, k, v, captured)
    q4, k4, v4 = _addressable(*fold_inputs(q, k, v, lead))
    offset = causal_offset(function, q.shape[-2], k.shape[-2])
    if _takes_plain(function, offset) and scale > 0:
        out, lse = attention_hopper.forward(q4, k4, v4, scale, offset, function.rows_first)
    else:
        call = describe_call(q4, k4, captured, lead, scale, function)
        out, lse = attention_hopper.forward(q4, k4, v4, scale, None, function.rows_first, call=call)
    out = arrange(out.reshape(*lead, *out.shape[-2:]), function.rows_first)
    return out, lse.reshape(*lead, q.shape[-2])


def hopper_backward(grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs):
    function = ScoreFunction.loads(score_function)
    lead = lead_shape(q, k, v, captured)
    heads = fold_heads(lead)
    q4, k4, v4 = _addressable(*fold_inputs(q, k, v, lead))
    out4, grad4 = fold(out, lead, heads), fold(grad_out, lead, heads)
    lse3 = lse.reshape(-1, heads, lse.shape[-1])
    offset = causal_offset(function, q.shape[-2], k.shape[-2])
    if _takes_plain(function, offset) and scale > 0:
        grad3 = None if grad_lse is None else grad_lse.reshape(lse3.shape)
        grads = attention_hopper_gradients.backward(grad4, grad3, q4, k4, v4, out4, lse3, scale, offset)
        return unfold_gradients(grads, (q, k, v), lead, captured)
    wanted = tuple(n for n, c in enumerate(captured) if needs[3 + n] and c.is_floating_point())
    problem = attention_problem.describe(q, k, v, captured, scale, dropout_p, function, wanted)
    rows = Backward(problem, q, k, v, captured, wanted, grad_out, lse, scale, dropout_p, seed, function)
    with attention_problem.on_device(q):
        rows.rows(grad_lse, out)
    call = describe_call(q4, k4, captured, lead, scale, function, wanted)
    grads = attention_hopper_gradients.backward_scored(grad4, q4, k4, v4, lse3, scale, call, rows)
    found = unfold_gradients(grads, (q, k, v), lead, ())
    return [*found, *rows.captured_gradients()]


def _is_plain(case: AttentionCase) -> bool:
    """Whether the kernels take the case without a compiled score function."""
    in_range = case.form != "causal" or 0 <= (case.causal_offset or 0) <= attention_hopper.MAX_ROWS
    return case.form in ("plain", "causal") and in_range and case.positive_scale


def _refuses_hopper_scores(case: AttentionCase) -> str | None:
    if not case.usable_scale:
        return "the scale of the scores is zero or not finite"
    if _is_plain(case):
        return None
    function = with_padded_lead(case.score_function, len(case.q) - 2)
    wanted = tuple(n for n, needed in enumerate(case.needs[3:]) if needed and case.captured[n][1].is_floating_point)
    return refuses_call(case.captured, case.q_length, case.k_length, function, wanted if case.needs else None)


def refuses_hopper(target: Target, case: AttentionCase | None) -> str | None:
    if target.vendor != "nvidia" or target.arch != "sm_90":
        return "uses the instructions of Hopper (sm_90)"
    if reason := attention_hopper.refuses_triton():
        return reason
    if case is None:
        return None
    if case.dropout:
        return "knows no dropout"
    if reason := _refuses_hopper_scores(case):
        return reason
    if case.q[-1] not in attention_hopper.HEAD_DIMS or case.q[-1] != case.v[-1]:
        return f"head dimensions {case.q[-1]} and {case.v[-1]}: needs 64 or 128 for both"
    if case.dtype not in attention_hopper.DTYPES:
        return f"takes float16 and bfloat16, not {case.dtype}"
    if not (case.contiguous_rows and case.aligned):
        return "a tensor's rows are not contiguous or not aligned to 16 bytes"
    if 0 in (*case.q, *case.k, *case.v):
        return "a tensor is empty"
    if case.q_length < 64:
        return "fewer than 64 queries do not fill its tiles"
    if case.deterministic and case.needs:
        return "sums the gradient of q in no fixed order"
    return None


def _hopper_cost(name: str) -> Callable[[Target, AttentionCase], float]:
    def cost(target: Target, case: AttentionCase) -> float:
        if not _is_plain(case):
            return _SCORED_COST
        dim, causal = case.q[-1], case.form == "causal"
        if name == "attention_backward" and dim == 128 and case.k_length >= _LONG:
            return _LONG_COST
        return _HOPPER_COST[name][dim, causal]

    return cost


def _triton_cost(name: str) -> Callable[[Target, AttentionCase], float]:
    return lambda target, case: _TRITON_COST[name]


for _name, _hopper, _triton, _kernels in (
    ("attention", hopper_forward, triton_forward, attention_triton.FORWARD_KERNELS),
    ("attention_backward", hopper_backward, triton_backward, attention_triton.BACKWARD_KERNELS),
):
    _refuses_triton = partial(attention_triton.refuses, _kernels)
    for _kind, _run, _refuses, _cost in (
        ("hopper", _hopper, refuses_hopper, _hopper_cost(_name)),
        ("triton", _triton, _refuses_triton, _triton_cost(_name)),
    ):
        operator(_name).register(Implementation(_kind, _run, _refuses, _cost, replays=True))
