"""What one attention site is, in terms of graph nodes and axes."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from vbcompile.passes.attention_expression import Algebra, Expression
from vbcompile.passes.attention_masks import Logits
from vbcompile.passes.attention_weights import Gate
from vbcompile.passes.graph_axes import Dim, Dims, Space


class Detail(Enum):
    """How closely masks and biases are looked at, in the order of trying.

    ``FULL``; ``WHOLE``: no axis is cut for their sake; ``LOADED``: nor do run-time sizes become part of a formula;
    ``SPREAD``: as ``FULL``, and what covers a part of the queries' or keys' axis only is copied out over all of it.
    """

    FULL = 0
    WHOLE = 1
    LOADED = 2
    SPREAD = 3


class Retry(Exception):
    """The site cannot be planned in this detail."""


@dataclass
class Operand:
    """A tensor of the site and its dimensions."""

    node: fx.Node
    dims: Dims


@dataclass
class Site:
    """Everything that a fused call needs, in terms of graph nodes and axes.

    Attributes:
        out: the node that the fused result replaces, ``out_dims`` its dimensions.
        rows, keys, features, values: axes of queries, keys, the summed and the value features.
        logits: scale, logits and mask as expressions.
        sink: one more logit per row.
        factors: ``(operator, operand, dims)`` applied to whole rows of the result, first applied first.
        gates: factors of the weights that differ from key to key, for the values.
        region: nodes that the fused call makes superfluous.
        score_dtype, logits_dtype: of the first product, and of what the softmax is taken of.
        log_sums: ``logsumexp`` nodes over the same logits, with their dimensions, in order.
        insert_before: where the fused call goes: at the result, or at a ``logsumexp`` of the same logits before it.
        terms: more parts of the features of queries and keys: ``(queries, keys, axis of the features)``.
        spread: whether captured tensors may be copied out over the whole of a merged axis.
        residual: ``(node, dims, factor)`` added to ``alpha`` times the result, as ``baddbmm`` does.
    """

    space: Space
    algebra: Algebra
    q: Operand
    k: Operand
    v: Operand
    out: fx.Node
    out_dims: Dims
    rows: Dim
    keys: Dim
    features: Dim
    values: Dim
    logits: Logits
    sink: Expression | None = None
    dropout: Any = 0.0
    empty_rows: str = "nan"
    factors: list[tuple[str, Any, Dims]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    region: set[fx.Node] = field(default_factory=set)
    log_sums: list[tuple[fx.Node, Dims]] = field(default_factory=list)
    score_dtype: torch.dtype = torch.float32
    logits_dtype: torch.dtype = torch.float32
    residual: tuple[Any, Dims, Any] | None = None
    alpha: Any = 1
    first: int = 0
    spread: bool = False
    terms: list[tuple[Operand, Operand, Dim]] = field(default_factory=list)
    insert_before: fx.Node = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.insert_before = self.out
