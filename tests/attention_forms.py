"""Score functions of every family that the attention kernels compile, with inputs, for tests and benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.dropout import dropout_keep
from vbcompile.kernels.score_function import Builder, ScoreFunction, evaluate

Step = Callable[[Builder, int], int]
Mask = Callable[[Builder], int]
Maker = Callable[[torch.Generator], Tensor]


def make_function(
    score: Step | None = None, mask: Mask | None = None, sink: Mask | None = None, **fields
) -> ScoreFunction:
    """A score function from functions that emit its parts."""
    b = Builder()
    logits = b.emit("score")
    logits = score(b, logits) if score else logits
    mask_at, sink_at = mask(b) if mask else None, sink(b) if sink else None
    return ScoreFunction(b.program, logits, mask_at, sink_at, **fields)


@dataclass(frozen=True)
class Form:
    """A score function and the shapes of its inputs.

    Attributes:
        captured: makers of captured tensors from a generator.
        q, k, v: shapes.
        transposed: k stored as ``[*lead, D, K]``, q and v with heads inside rows.
    """

    function: ScoreFunction
    captured: tuple[Maker, ...]
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    scale: float = 0.3
    dropout_p: float = 0.0
    transposed: bool = False

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """``([q, k, v], captured)``; floating captured tensors are float32."""
        g = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, generator=g).to(dtype) for shape in (self.q, self.k, self.v)]
        if self.transposed:  # rows of k strided, heads of q and v inside rows
            tensors[1] = tensors[1].mT.contiguous().mT
            for n in (0, 2):
                tensors[n] = tensors[n].transpose(-3, -2).contiguous().transpose(-3, -2)
        return tensors, [make(g) for make in self.captured]

    def case(self, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> AttentionCase:
        """What is known of a call before it runs."""
        captured = tuple((tuple(t.shape), t.dtype) for t in self.inputs(dtype)[1])
        function = self.function.dumps()
        return AttentionCase(dtype, self.q, self.k, self.v, captured, self.dropout_p > 0, function, **fields)


def floats(*shape: int, factor: float = 1.0) -> Maker:
    return lambda g: torch.randn(shape, generator=g) * factor


def bools(*shape: int) -> Maker:
    return lambda g: torch.rand(shape, generator=g) > 0.4


def documents(*shape: int) -> Maker:
    """Sorted document numbers along the last axis but one, or the last."""
    axis = -2 if shape[-1] == 1 else -1
    return lambda g: torch.randint(0, 3, shape, generator=g).sort(axis).values


def constant(b: Builder, value: float) -> int:
    return b.emit("const", value)


def causal(offset: int = 0) -> Mask:
    return lambda b: b.emit(
        "ge", b.emit("add", b.emit("q_index"), constant(b, offset)) if offset else b.emit("q_index"), b.emit("k_index")
    )


def bottom_right(b: Builder) -> int:
    """The last row sees every key."""
    shift = b.emit("sub", b.emit("k_length"), b.emit("q_length"))
    return b.emit("le", b.emit("k_index"), b.emit("add", b.emit("q_index"), shift))


def window(size: int) -> Mask:
    def emit(b: Builder) -> int:
        distance = b.emit("sub", b.emit("q_index"), b.emit("k_index"))
        return b.emit("and", causal()(b), b.emit("lt", distance, constant(b, size)))

    return emit


def both_sides(size: int) -> Mask:
    return lambda b: b.emit("le", b.emit("abs", b.emit("sub", b.emit("q_index"), b.emit("k_index"))), constant(b, size))


def prefix(size: int) -> Mask:
    return lambda b: b.emit("or", causal()(b), b.emit("lt", b.emit("k_index"), constant(b, size)))


def same_document(b: Builder) -> int:
    return b.emit("eq", b.emit("captured", 0), b.emit("captured", 1))


def captured_mask(b: Builder) -> int:
    return b.emit("captured", 0)


def up_to_position(b: Builder) -> int:
    """Keys up to a position given per row, as a static cache has it."""
    return b.emit("le", b.emit("k_index"), b.emit("captured", 0))


def shorter_than(b: Builder) -> int:
    """Keys before a length given per sequence."""
    return b.emit("lt", b.emit("k_index"), b.emit("captured", 0))


def plus(number: int) -> Step:
    return lambda b, s: b.emit("add", s, b.emit("captured", number))


def times(number: int) -> Step:
    return lambda b, s: b.emit("mul", s, b.emit("captured", number))


def softcap(limit: float) -> Step:
    return lambda b, s: b.emit("mul", b.emit("tanh", b.emit("div", s, constant(b, limit))), constant(b, limit))


def alibi(b: Builder, s: int) -> int:
    distance = b.emit("to_float", b.emit("sub", b.emit("k_index"), b.emit("q_index")))
    return b.emit("add", s, b.emit("mul", distance, b.emit("captured", 0)))


def alibi_by_head(b: Builder, s: int) -> int:
    """Slopes computed from the head's number."""
    head = b.emit("to_float", b.emit("add", b.emit("lead_index", 1), constant(b, 1)))
    slope = b.emit("pow", constant(b, 2.0), b.emit("neg", head))
    distance = b.emit("to_float", b.emit("sub", b.emit("k_index"), b.emit("q_index")))
    return b.emit("add", s, b.emit("mul", distance, slope))


def arcs(b: Builder, s: int) -> int:
    """Functions that no Hopper kernel computes."""
    return b.emit("add", b.emit("mul", s, b.emit("erf", s)), b.emit("atan", b.emit("mul", s, constant(b, 3.0))))


def oddities(b: Builder, s: int) -> int:
    """Integer division, remainders, roots and comparisons in one function."""
    distance = b.emit("sub", b.emit("q_index"), b.emit("k_index"))
    bucket = b.emit("add", b.emit("floordiv", distance, constant(b, 4)), b.emit("mod", distance, constant(b, 3)))
    spread = b.emit("log1p", b.emit("sqrt", b.emit("abs", b.emit("to_float", bucket))))
    gate = b.emit("sigmoid", b.emit("mul", s, b.emit("captured", 0)))
    bent = b.emit("where", b.emit("gt", s, constant(b, 0.2)), b.emit("mul", s, gate), b.emit("minimum", s, spread))
    return b.emit("sub", bent, b.emit("maximum", b.emit("mul", spread, constant(b, 0.1)), b.emit("captured", 1)))


def first_sink(b: Builder) -> int:
    return b.emit("captured", 0)


FLOAT32_MIN = torch.finfo(torch.float32).min


def additive_padding(q_length: int, k_length: int) -> Maker:
    """``finfo.min`` on random keys; two rows of huge values in full, as left padding gives."""

    def make(g: torch.Generator) -> Tensor:
        bias = torch.where(torch.rand(2, 1, q_length, k_length, generator=g) > 0.5, 0.0, FLOAT32_MIN)
        bias[0, 0, 3] = FLOAT32_MIN
        bias[1, 0, 5] = -1e9
        return bias

    return make


def every_third(b: Builder) -> int:
    """Keys whose distance is a multiple of three: no bounds, no tensor."""
    distance = b.emit("sub", b.emit("q_index"), b.emit("k_index"))
    return b.emit("eq", b.emit("mod", distance, b.emit("const", 3)), b.emit("const", 0))


def same_chunk(size: int) -> Callable[[Builder], int]:
    """Rows see the keys of their own chunk."""

    def mask(b: Builder) -> int:
        chunks = (b.emit("floordiv", b.emit(index), b.emit("const", size)) for index in ("q_index", "k_index"))
        return b.emit("eq", *chunks)

    return mask


def make_forms(nq: int, nk: int, d: int, dv: int) -> dict[str, Form]:
    """Every family, for ``nq`` queries of size ``d`` and ``nk`` keys with values of size ``dv``."""

    def form(function: ScoreFunction, captured: tuple[Maker, ...] = (), **fields) -> Form:
        return Form(function, captured, (2, 2, nq, d), (2, 2, nk, d), (2, 2, nk, dv), **fields)

    def shaped(function: ScoreFunction, lead_q, lead_k, lead_v, captured: tuple[Maker, ...] = ()) -> Form:
        return Form(function, captured, (*lead_q, nq, d), (*lead_k, nk, d), (*lead_v, nk, dv))

    offset = nk - nq + 2
    return {
        "plain": form(make_function()),
        "negative_scale": form(make_function(), scale=-0.3),
        "causal": form(make_function(mask=causal())),
        "causal_offset": form(make_function(mask=causal(9))),
        "causal_bottom_right": form(make_function(mask=bottom_right)),
        "causal_empty_rows": form(make_function(mask=causal(-4))),
        "causal_empty_rows_zero": form(make_function(mask=causal(-4), empty_rows="zero")),
        "window": form(make_function(mask=window(nq // 5))),
        "both_sides": form(make_function(mask=both_sides(nq // 7))),
        "prefix": form(make_function(mask=prefix(nk // 3))),
        "every_third": form(make_function(mask=every_third)),
        "chunks": form(make_function(mask=same_chunk(nq // 3))),
        "document": form(make_function(mask=same_document), (documents(2, 1, nq, 1), documents(2, 1, 1, nk))),
        "document_causal": form(
            make_function(mask=lambda b: b.emit("and", causal()(b), same_document(b))),
            (documents(2, 1, nq, 1), documents(2, 1, 1, nk)),
        ),
        "document_prefix": form(
            make_function(mask=lambda b: b.emit("and", prefix(nk // 3)(b), same_document(b))),
            (documents(2, 1, nq, 1), documents(2, 1, 1, nk)),
        ),
        "bool_mask": form(make_function(mask=captured_mask), (bools(2, 1, nq, nk),)),
        "key_padding": form(make_function(mask=captured_mask, empty_rows="zero"), (bools(2, 1, 1, nk),)),
        "static_cache": form(
            make_function(mask=up_to_position), (lambda g: torch.arange(offset, offset + nq).view(1, 1, nq, 1),)
        ),
        "lengths": form(make_function(mask=shorter_than), (lambda g: torch.tensor([9, nk - 5]).view(2, 1, 1, 1),)),
        "bias": form(make_function(plus(0)), (floats(1, 2, nq, nk),)),
        "bias_batch": form(make_function(plus(0)), (floats(2, 1, nq, nk),)),
        "bias_rows": form(make_function(plus(0), mask=causal()), (floats(1, 2, nq, 1),)),
        "bias_columns": form(make_function(plus(0)), (floats(2, 1, 1, nk),)),
        "additive_min": form(make_function(plus(0)), (additive_padding(nq, nk),)),
        "additive_inf": form(
            make_function(plus(0), empty_rows="zero"),
            (lambda g: torch.where(torch.rand(1, 2, nq, nk, generator=g) > 0.5, 0.0, -torch.inf),),
        ),
        "softcap": form(make_function(softcap(2.0), mask=causal())),
        "alibi": form(make_function(alibi, mask=causal()), (floats(1, 2, 1, 1, factor=0.1),)),
        "alibi_by_head": form(make_function(alibi_by_head)),
        "temperature": form(make_function(times(0)), (floats(1, 1, 1, 1),)),
        "oddities": form(make_function(oddities), (floats(1, 2, 1, 1), floats(2, 1, nq, 1))),
        "arcs": form(make_function(arcs)),
        "sink": form(make_function(mask=causal(-3), sink=first_sink), (floats(1, 2, 1, 1),)),
        "sink_per_row": form(make_function(softcap(3.0), sink=first_sink), (floats(1, 2, nq, 1),)),
        "softmax_plus_one": form(make_function(sink=lambda b: constant(b, 0.0))),
        "rows_first": form(make_function(mask=causal(), rows_first=True), transposed=True),
        "one_axis": shaped(make_function(), (3,), (3,), (3,)),
        "grouped": shaped(make_function(mask=causal()), (2, 2, 3), (2, 2, 1), (2, 2, 1)),
        "grouped_bias": shaped(make_function(plus(0)), (2, 2, 3), (2, 2, 1), (2, 2, 1), (floats(1, 2, 3, nq, nk),)),
        "grouped_document": shaped(
            make_function(mask=lambda b: b.emit("and", window(nq // 3)(b), same_document(b))),
            (2, 2, 3),
            (2, 2, 1),
            (2, 2, 1),
            (documents(2, 1, 3, nq, 1), documents(2, 1, 3, 1, nk)),
        ),
        "one_kv_head": shaped(make_function(), (2, 3), (2, 1), (2, 1)),
        "shared_keys": shaped(make_function(), (2, 3), (2, 1), (2, 3)),
        "shared_queries": shaped(make_function(), (1, 3), (2, 3), (2, 3)),
        "four_axes": shaped(make_function(mask=causal(12)), (2, 1, 2, 1), (1, 2, 2, 1), (2, 2, 1, 1)),
        "dropout": form(make_function(mask=causal()), dropout_p=0.3),
    }


def eager(form: Form, q: Tensor, k: Tensor, v: Tensor, captured: list[Tensor], seed: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of attention as a model writes it: every step rounds to the dtype of q, lse is float32."""
    function, dtype = form.function, q.dtype
    score = (q @ k.mT) * form.scale
    logits, keep, sink = evaluate(
        function, (function.score, function.mask, function.sink), score=score.float(), captured=captured,
        lead=score.shape[:-2], q_length=score.shape[-2], k_length=score.shape[-1], device=q.device, dtype=torch.float32,
    )  # fmt: skip
    row = logits.expand(score.shape).to(dtype)
    row = row if keep is None else row.masked_fill(~keep, -torch.inf)
    row = row if sink is None else torch.cat([row, sink.to(dtype).expand(*score.shape[:-1], 1)], -1)
    weights = torch.softmax(row, -1)[..., : score.shape[-1]]
    if function.empty_rows == "zero":
        weights = torch.where((row == -torch.inf).all(-1, keepdim=True), 0.0, weights)
    if form.dropout_p:
        weights = weights * dropout_keep(seed, weights.shape, form.dropout_p, q.device) / (1 - form.dropout_p)
    return weights.to(dtype) @ v, row.float().logsumexp(-1)
