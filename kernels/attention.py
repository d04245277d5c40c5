"""The logical operator ``vblackwell::attention``: its meaning, its case description, fake and autograd.

    s      = scale * q @ k^T                      accumulated in float32 (float64 for float64)
    logits = score_function(s, captured, indices)  -inf where its mask is False
    p      = dropout(softmax(logits))              the sink takes part in the softmax's sum only
    out    = p @ v,   lse = logsumexp(logits and sink)

Shapes: ``q [*lead, Q, D]``, ``k [*lead, K, D]``, ``v [*lead, K, Dv]``, captured tensors ``[*lead, Q, K]``; all of one
rank, with one to four leading axes that broadcast as in PyTorch. Grouped-query attention is ``q [B, Hkv, G, Q, D]``
with ``k, v [B, Hkv, 1, K, D]``. Results: ``out [*lead, Q, Dv]`` in the dtype of q, ``lse [*lead, Q]`` in the
accumulation type, natural logarithm.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vbcompile.compat import is_fake
from vbcompile.compat_calls import storage_identity
from vbcompile.device import get_target
from vbcompile.kernels.attention_case import AttentionCase, check, lead_shape, make_case, rounds_to_tf32
from vbcompile.kernels.attention_results import arrange, empty_output, sum_to
from vbcompile.kernels.compiled_calls import OPERATORS, RepeatedOperator
from vbcompile.kernels.dropout import dropout_keep
from vbcompile.kernels.quick_operator import quick_operator
from vbcompile.kernels.registry import (
    Implementation,
    following,
    forced_implementation,
    last_resort,
    never_refuses,
    operator,
    to_be_run,
)
from vbcompile.kernels.score_function import (
    ScoreFunction,
    accumulation_dtype,
    evaluate,
)
from vbcompile.kernels.score_gradient import differentiate

_SUMMED = 5 * 10**6  # multiplications


# ------------------------------------------------------------------------------------------- reference
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    score_function: str,
) -> tuple[Tensor, Tensor]:
    """The meaning of the operator in plain PyTorch; every implementation is tested against it."""
    function = ScoreFunction.loads(score_function)
    q = q.expand(*lead_shape(q, k, v, captured), *q.shape[-2:])
    p, lse = _probabilities(q, k, captured, scale, function)
    if dropout_p > 0:
        p = p * _keep(p, dropout_p, seed)
    out = _product(p, v.to(p.dtype)).to(q.dtype)
    return arrange(out, function.rows_first), lse


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; the smallest as sums where a graph is made: a compiler puts them together with what is around."""
    sizes = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *a.shape[-2:], b.shape[-1])
    if is_fake(a) and all(type(n) is int for n in sizes) and math.prod(sizes) <= _SUMMED:
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    return a @ b


def _keep(p: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        raise ValueError("attention with dropout needs a seed tensor")
    if dropout_p == 1.0:
        return torch.zeros_like(p)
    return dropout_keep(seed, p.shape, dropout_p, p.device).to(p.dtype) / (1.0 - dropout_p)


def _probabilities(
    q: Tensor, k: Tensor, captured: Sequence[Tensor], scale: float, function: ScoreFunction
) -> tuple[Tensor, Tensor]:
    """``softmax`` and ``logsumexp`` of the logits, in the accumulation type."""
    logits, keep, sink = _logits(q, k, captured, scale, function)
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    row = logits if sink is None else torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], -1)
    lse = torch.logsumexp(row, -1)
    p = torch.softmax(row, -1)[..., : logits.shape[-1]]
    if function.empty_rows == "zero":
        p = p.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return p, lse


def _logits(
    q: Tensor, k: Tensor, captured: Sequence[Tensor], scale: float, function: ScoreFunction
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = accumulation_dtype(q.dtype)
    score = _product(q.to(dtype), k.to(dtype).mT) * scale
    logits, keep, sink = _evaluate(function, (function.score, function.mask, function.sink), score, captured)
    assert logits is not None
    return logits.to(dtype).expand(score.shape), keep, None if sink is None else sink.to(dtype)


def _evaluate(
    function: ScoreFunction,
    positions: Sequence[int | None],
    score: Tensor,
    captured: Sequence[Tensor],
    upstream: Tensor | None = None,
) -> list[Tensor | None]:
    *lead, q_length, k_length = score.shape
    return evaluate(
        function,
        positions,
        score=score,
        captured=captured,
        lead=lead,
        q_length=q_length,
        k_length=k_length,
        device=score.device,
        dtype=score.dtype,
        upstream=upstream,
    )


def attention_backward_reference(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    score_function: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``(q, k, v, *captured)`` in plain PyTorch; None where not needed."""
    function = ScoreFunction.loads(score_function)
    dtype = accumulation_dtype(q.dtype)
    inputs = [q, k, v, *captured]
    q = q.expand(*lead_shape(q, k, v, captured), *q.shape[-2:])
    p, lse = _probabilities(q, k, captured, scale, function)
    keep = _keep(p, dropout_p, seed) if dropout_p > 0 else None
    grad = grad_out.to(dtype)
    dp = grad @ v.to(dtype).mT
    weights = p if keep is None else p * keep
    dv = weights.mT @ grad
    delta = (weights * dp).sum(-1, keepdim=True)  # not of ``out``: rows that cancel need the very same weights
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype).unsqueeze(-1)
    d_logits = p * ((dp if keep is None else dp * keep) - delta)
    d_score, d_captured = _score_gradients(q, k, captured, scale, function, d_logits, delta, lse)
    d_score = d_score * scale
    grads = [d_score @ k.to(dtype), d_score.mT @ q.to(dtype), dv, *d_captured]
    return [
        sum_to(g, t.shape, t.dtype) if need and g is not None else None
        for g, t, need in zip(grads, inputs, needs, strict=True)
    ]


def _score_gradients(
    q: Tensor,
    k: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    function: ScoreFunction,
    d_logits: Tensor,
    delta: Tensor,
    lse: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the scaled score ``[*lead, Q, K]`` and, summed to their shapes, of the captured tensors."""
    function = function.pruned()
    score = (q.to(d_logits.dtype) @ k.to(d_logits.dtype).mT) * scale
    (keep,) = _evaluate(function, (function.mask,), score, captured)
    if keep is not None:
        d_logits = torch.where(keep, d_logits, 0.0)  # also in rows without a key, as masked_fill's gradient does
    d_captured: list[Tensor | None] = [None] * len(captured)

    def add(output: int, upstream: Tensor) -> Tensor | None:
        gradient = differentiate(function, output)
        positions = [gradient.score, *(position for _, position in gradient.captured)]
        d_score, *others = _evaluate(gradient.function, positions, score, captured, upstream)
        for (number, _), value in zip(gradient.captured, others, strict=True):
            if captured[number].is_floating_point() and value is not None:
                value = sum_to(value.to(score.dtype).expand(upstream.shape), captured[number].shape)
                previous = d_captured[number]
                d_captured[number] = value if previous is None else previous + value
        return d_score

    d_score = add(function.score, d_logits)
    if function.sink is not None:
        (_, _, sink) = _logits(q, k, captured, scale, function)
        assert sink is not None
        add(function.sink, -torch.exp(sink - lse.unsqueeze(-1)) * delta)
    zero = torch.zeros_like(score)
    return (zero if d_score is None else d_score.to(score.dtype).expand(score.shape)), d_captured


# -------------------------------------------------------------------------------------------- operator
@quick_operator("vblackwell::attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    score_function: str,
    *,
    implementations: str = "",
) -> tuple[Tensor, Tensor]:
    """Run the cheapest implementation that takes this case; see the module's docstring for the meaning.

    Args:
        implementations: the option of that name, for the gradient too; see :mod:`vbcompile.kernels.registry`.

    Raises:
        ValueError: ranks, devices, dtypes or shapes that do not fit together.
    """

    def run() -> tuple[Tensor, Tensor]:
        check(q, k, v, captured, dropout_p, seed)
        case = make_case(q, k, v, captured, scale, dropout_p, score_function)
        with following(implementations):
            return _chosen("attention", q, case).run(q, k, v, captured, scale, dropout_p, seed, score_function)

    given = q, k, v, captured, scale, dropout_p, seed, score_function, implementations
    return OPERATORS["attention"].remembered(run, *given)


def _chosen(name: str, q: Tensor, case: AttentionCase) -> Implementation:
    return to_be_run(operator(name).choose(get_target(q.device), case))


def _settings(name: str, q: Tensor) -> tuple[Any, ...]:
    """What calls depend on besides their arguments; of ``q`` the dtype and the device count."""
    return forced_implementation(name), torch.are_deterministic_algorithms_enabled(), rounds_to_tf32(q)


OPERATORS["attention"] = RepeatedOperator("attention", attention, partial(_settings, "attention"))


@attention.register_fake
def _(q, k, v, captured, scale, dropout_p, seed, score_function, *, implementations=""):
    lead = lead_shape(q, k, v, captured)
    out = empty_output(lead, q.shape[-2], v.shape[-1], ScoreFunction.loads(score_function).rows_first, q)
    return out, q.new_empty([*lead, q.shape[-2]], dtype=accumulation_dtype(q.dtype))


@quick_operator("vblackwell::attention_backward")
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    score_function: str,
    needs: Sequence[bool],
    *,
    implementations: str = "",
) -> list[Tensor]:
    """Gradients of ``(q, k, v, *captured)``; an empty tensor where ``needs`` is False."""
    inputs = (q, k, v, *captured)

    def run() -> list[Tensor]:
        case = make_case(q, k, v, captured, scale, dropout_p, score_function, needs, grad_lse is not None)
        with following(implementations):
            grads = _chosen("attention_backward", q, case).run(
                grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, list(needs)
            )
        found = [_like(g, t) if need else t.new_empty(0) for g, t, need in zip(grads, inputs, needs, strict=True)]
        return _apart(found)

    given = grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs
    return OPERATORS["attention_backward"].remembered(run, *given, implementations)


# the gradient of the result has its dtype, which is that of q
OPERATORS["attention_backward"] = RepeatedOperator(
    "attention_backward", attention_backward, partial(_settings, "attention_backward")
)


def _apart(gradients: list[Tensor]) -> list[Tensor]:
    """Each in memory of its own: biases that are added to each other have one gradient."""
    taken: set[int] = set()
    result = []
    for gradient in gradients:
        place = storage_identity(gradient)
        result.append(gradient.clone() if place in taken else gradient)
        taken.add(place)
    return result


def _like(gradient: Tensor | None, t: Tensor) -> Tensor:
    """The gradient with the strides that the fake promised, where they matter."""
    promised = torch.empty_like(t)
    if gradient is None:
        return promised.zero_()
    found, wanted = (
        [stride for size, stride in zip(t.shape, strides, strict=True) if size > 1]
        for strides in (gradient.stride(), promised.stride())
    )
    return gradient if found == wanted and gradient.dtype == t.dtype else promised.copy_(gradient)


@attention_backward.register_fake
def _(
    grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs, *,
    implementations="",
):  # fmt: skip
    return [
        torch.empty_like(t) if need else t.new_empty(0) for t, need in zip((q, k, v, *captured), needs, strict=True)
    ]


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    q, k, v, captured, ctx.scale, ctx.dropout_p, seed, ctx.score_function = inputs
    ctx.implementations = keyword_only_inputs["implementations"]
    ctx.captured_count = len(captured)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *captured, *output, *([] if seed is None else [seed]))


def _backward(ctx, grad_out, grad_lse):
    q, k, v, *rest = ctx.saved_tensors
    captured, (out, lse, *seed) = rest[: ctx.captured_count], rest[ctx.captured_count :]
    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3]]
    needs[2] = needs[2] and grad_out is not None  # the logarithm of the sum does not depend on the values
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = attention_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        captured,
        out,
        lse,
        ctx.scale,
        ctx.dropout_p,
        seed[0] if seed else None,
        ctx.score_function,
        needs,
        implementations=ctx.implementations,
    )
    grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return *grads[:3], grads[3:], None, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)


def _setup_second(ctx, inputs, keyword_only_inputs, output):
    grad_out, grad_lse, q, k, v, captured, out, lse, scale, dropout_p, seed, score_function, needs = inputs
    ctx.options = scale, dropout_p, seed, score_function, needs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_out, grad_lse, q, k, v, out, lse, *captured)


def _second_backward(ctx, upstream):
    """Second derivatives in plain PyTorch: the backward as a function of all but ``out`` and ``lse``, made again."""
    grad_out, grad_lse, q, k, v, out, lse, *captured = ctx.saved_tensors
    given = [grad_out, grad_lse, q, k, v, *captured]
    again, grads = torch.is_grad_enabled(), dict.fromkeys(range(len(given)))
    with torch.enable_grad():
        apart = [t if t is None or not t.requires_grad else t.view_as(t) for t in given]  # one may come from another
        results = apart[5:], out.detach(), lse.detach()
        first = attention_backward_reference(*apart[:5], *results, *ctx.options)  # type: ignore[call-arg]
    pairs = [
        (g, u) for g, u in zip(first, upstream, strict=True) if g is not None and u is not None and g.requires_grad
    ]
    wanted = [n for n, t in enumerate(apart) if pairs and t is not None and t.requires_grad]
    if wanted:
        outputs, above = zip(*pairs, strict=True)
        inputs = [apart[n] for n in wanted]
        found = torch.autograd.grad(outputs, inputs, above, create_graph=again, allow_unused=True)
        grads |= dict(zip(wanted, found, strict=True))
    return *(grads[n] for n in range(5)), [grads[n] for n in range(5, len(given))], *[None] * 7


attention_backward.register_autograd(_second_backward, setup_context=_setup_second)


# ------------------------------------------------------------------------------------- implementations
operator("attention").register(
    Implementation("reference", attention_reference, never_refuses, last_resort, inlines=True),
)
operator("attention_backward").register(
    Implementation("reference", attention_backward_reference, never_refuses, last_resort),
)
