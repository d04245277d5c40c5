"""Score functions of every family that the attention kernels compile, with inputs, for tests and benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vbcompile.kernels.score_function import Builder, ScoreFunction

Step = Callable[[Builder, int], int]
Mask = Callable[[Builder], int]


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
    captured: tuple[Callable[[torch.Generator], Tensor], ...] = ()
    q: tuple[int, ...] = (2, 2, 37, 16)
    k: tuple[int, ...] = (2, 2, 45, 16)
    v: tuple[int, ...] = (2, 2, 45, 16)
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


def floats(*shape: int, factor: float = 1.0) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(shape, generator=g) * factor


def bools(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g) > 0.4


def documents(*shape: int) -> Callable[[torch.Generator], Tensor]:
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


FP32_MIN = torch.finfo(torch.float32).min


def additive_padding(g: torch.Generator) -> Tensor:
    """``finfo.min`` on random keys; one row of it in full, as left padding gives."""
    bias = torch.where(torch.rand(2, 1, 37, 45, generator=g) > 0.5, 0.0, FP32_MIN)
    bias[0, 0, 3] = FP32_MIN
    bias[1, 0, 5] = -1e9
    return bias


GROUPED = {"q": (2, 2, 3, 21, 16), "k": (2, 2, 1, 33, 16), "v": (2, 2, 1, 33, 16)}

FORMS: dict[str, Form] = {
    "plain": Form(make_function()),
    "negative_scale": Form(make_function(), scale=-0.3),
    "causal": Form(make_function(mask=causal())),
    "causal_offset": Form(make_function(mask=causal(9))),
    "causal_bottom_right": Form(make_function(mask=bottom_right)),
    "causal_empty_rows": Form(make_function(mask=causal(-4))),
    "causal_empty_rows_zero": Form(make_function(mask=causal(-4), empty_rows="zero")),
    "window": Form(make_function(mask=window(7)), q=(1, 2, 70, 16), k=(1, 2, 70, 16), v=(1, 2, 70, 16)),
    "both_sides": Form(make_function(mask=both_sides(5))),
    "prefix": Form(make_function(mask=prefix(11))),
    "document": Form(make_function(mask=same_document), (documents(2, 1, 37, 1), documents(2, 1, 1, 45))),
    "document_causal": Form(
        make_function(mask=lambda b: b.emit("and", causal()(b), same_document(b))),
        (documents(2, 1, 37, 1), documents(2, 1, 1, 45)),
    ),
    "bool_mask": Form(make_function(mask=captured_mask), (bools(2, 1, 37, 45),)),
    "key_padding": Form(make_function(mask=captured_mask, empty_rows="zero"), (bools(2, 1, 1, 45),)),
    "static_cache": Form(make_function(mask=up_to_position), (lambda g: torch.arange(4, 41).view(1, 1, 37, 1),)),
    "lengths": Form(make_function(mask=shorter_than), (lambda g: torch.tensor([9, 31]).view(2, 1, 1, 1),)),
    "bias": Form(make_function(plus(0)), (floats(1, 2, 37, 45),)),
    "bias_batch": Form(make_function(plus(0)), (floats(2, 1, 37, 45),)),
    "bias_rows": Form(make_function(plus(0), mask=causal()), (floats(1, 2, 37, 1),)),
    "bias_columns": Form(make_function(plus(0)), (floats(2, 1, 1, 45),)),
    "additive_min": Form(make_function(plus(0)), (additive_padding,)),
    "additive_inf": Form(
        make_function(plus(0), empty_rows="zero"),
        (lambda g: torch.where(torch.rand(1, 2, 37, 45, generator=g) > 0.5, 0.0, -torch.inf),),
    ),
    "softcap": Form(make_function(softcap(2.0), mask=causal())),
    "alibi": Form(make_function(alibi, mask=causal()), (floats(1, 2, 1, 1, factor=0.1),)),
    "alibi_by_head": Form(make_function(alibi_by_head)),
    "temperature": Form(make_function(times(0)), (floats(1, 1, 1, 1),)),
    "oddities": Form(make_function(oddities), (floats(1, 2, 1, 1), floats(2, 1, 37, 1))),
    "sink": Form(make_function(mask=causal(-3), sink=first_sink), (floats(1, 2, 1, 1),)),
    "sink_per_row": Form(make_function(softcap(3.0), sink=first_sink), (floats(1, 2, 37, 1),)),
    "softmax_plus_one": Form(make_function(sink=lambda b: constant(b, 0.0))),
    "rows_first": Form(make_function(mask=causal(), rows_first=True), transposed=True),
    "odd_sizes": Form(make_function(), q=(3, 37, 20), k=(3, 45, 20), v=(3, 45, 33)),
    "grouped": Form(make_function(mask=causal()), **GROUPED),
    "grouped_bias": Form(make_function(plus(0)), (floats(1, 2, 3, 21, 33),), **GROUPED),
    "one_kv_head": Form(make_function(), q=(2, 3, 21, 16), k=(2, 1, 33, 16), v=(2, 1, 33, 16)),
    "shared_keys": Form(make_function(), q=(2, 3, 21, 16), k=(2, 1, 33, 16), v=(2, 3, 33, 16)),
    "shared_queries": Form(make_function(), q=(1, 3, 21, 16), k=(2, 3, 33, 16), v=(2, 3, 33, 16)),
    "four_axes": Form(
        make_function(mask=causal(12)), q=(2, 1, 2, 1, 21, 16), k=(1, 2, 2, 1, 33, 16), v=(2, 2, 1, 1, 33, 16)
    ),
    "dropout": Form(make_function(mask=causal()), dropout_p=0.3),
}
