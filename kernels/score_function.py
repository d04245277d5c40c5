"""Score functions: what a model does to its attention scores between the two matrix products.

One attention site is ``out = dropout(softmax(f(scale * q @ k^T))) @ v``. This module describes ``f`` as a small program
in static single assignment form, so that the same description can be evaluated in plain PyTorch, compiled into a
kernel, differentiated, and kept as a string literal in an FX graph (where it is part of the compile cache's key).

A program is a tuple of instructions; an instruction is a tuple ``(name, *arguments)``. Leaves:

=================  ==================================================================================
``("score",)``     the scaled score ``scale * <q_i, k_j>``
``("q_index",)``   row index ``i`` in ``[0, Q)``              (int)
``("k_index",)``   column index ``j`` in ``[0, K)``           (int)
``("lead_index", d)``  index in leading (batch or head) axis ``d``   (int)
``("q_length",)``, ``("k_length",)``  sizes ``Q`` and ``K``   (int)
``("captured", n)``  element of captured tensor ``n``, broadcast to ``[*lead, Q, K]``
``("const", c)``   a Python bool, int or float
``("upstream",)``  gradient with respect to the value being differentiated (gradient programs only)
=================  ==================================================================================

Every other instruction is pointwise; its arguments are the positions of earlier instructions (see ``POINTWISE``). All
floating point arithmetic is done in the accumulation type (float32; float64 for float64 inputs), whatever the source
rounded to between its steps.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

Instruction = tuple[Any, ...]

LEAVES: Final = {"score", "q_index", "k_index", "lead_index", "q_length", "k_length", "captured", "const", "upstream"}

# name -> (number of arguments, plain PyTorch meaning)
POINTWISE: Final[dict[str, tuple[int, Callable[..., Tensor]]]] = {
    "add": (2, torch.add),
    "sub": (2, torch.sub),
    "mul": (2, torch.mul),
    "div": (2, torch.true_divide),
    "floordiv": (2, torch.floor_divide),
    "mod": (2, torch.remainder),
    "pow": (2, torch.pow),
    "maximum": (2, torch.maximum),
    "minimum": (2, torch.minimum),
    "neg": (1, torch.neg),
    "abs": (1, torch.abs),
    "exp": (1, torch.exp),
    "log": (1, torch.log),
    "log1p": (1, torch.log1p),
    "sqrt": (1, torch.sqrt),
    "rsqrt": (1, torch.rsqrt),
    "sin": (1, torch.sin),
    "cos": (1, torch.cos),
    "tanh": (1, torch.tanh),
    "atan": (1, torch.atan),
    "erf": (1, torch.erf),
    "sigmoid": (1, torch.sigmoid),
    "relu": (1, torch.relu),
    "where": (3, torch.where),
    "eq": (2, torch.eq),
    "ne": (2, torch.ne),
    "lt": (2, torch.lt),
    "le": (2, torch.le),
    "gt": (2, torch.gt),
    "ge": (2, torch.ge),
    "and": (2, torch.logical_and),
    "or": (2, torch.logical_or),
    "xor": (2, torch.logical_xor),
    "not": (1, torch.logical_not),
    "to_float": (1, lambda x: x),  # to the accumulation type; evaluate() converts
    "to_int": (1, lambda x: x.to(torch.int64)),  # truncates towards zero
    "to_bool": (1, lambda x: x.ne(0)),
}


@dataclass(frozen=True)
class ScoreFunction:
    """The meaning of one attention site, except for its tensors.

    Attributes:
        program: instructions, each referring to earlier ones by position.
        score: position of the logits that enter the softmax.
        mask: position of a boolean, True where a key takes part; elsewhere the logit is ``-inf``. None: all take part.
        sink: position of one more logit per row (it depends on neither ``score`` nor ``k_index``) that takes part in
            the softmax's sum and has no value vector: attention sinks, "softmax plus one". None: no sink.
        empty_rows: what a row without any key gives: ``"nan"`` as ``softmax`` of ``-inf`` alone does, or ``"zero"``
            as ``scaled_dot_product_attention`` does.
        rows_first: memory order of the output, ``[lead[0], Q, *lead[1:], Dv]`` instead of ``[*lead, Q, Dv]``. The
            shape is the same; models that fold heads into features next read it without a copy.
    """

    program: tuple[Instruction, ...] = (("score",),)
    score: int = 0
    mask: int | None = None
    sink: int | None = None
    empty_rows: str = "nan"
    rows_first: bool = False

    def __post_init__(self) -> None:
        for position, (name, *arguments) in enumerate(self.program):
            if name in LEAVES:
                continue
            if name not in POINTWISE:
                raise ValueError(f"unknown instruction {name!r}; known: {sorted(LEAVES | POINTWISE.keys())}")
            if len(arguments) != POINTWISE[name][0] or any(not 0 <= a < position for a in arguments):
                raise ValueError(f"instruction {position} is malformed: {(name, *arguments)}")
        if any(p is not None and not 0 <= p < len(self.program) for p in (self.score, self.mask, self.sink)):
            raise ValueError(f"score {self.score}, mask {self.mask} or sink {self.sink} is outside the program")
        if self.empty_rows not in ("nan", "zero"):
            raise ValueError(f"empty_rows must be 'nan' or 'zero', not {self.empty_rows!r}")

    def dumps(self) -> str:
        """One line of JSON, equal for equal functions. Non-finite constants are written as strings."""
        program = [[name, *(_encode(a) if name == "const" else a for a in rest)] for name, *rest in self.program]
        fields = [program, self.score, self.mask, self.sink, self.empty_rows, int(self.rows_first)]
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def loads(text: str) -> "ScoreFunction":
        """Inverse of :meth:`dumps`; raises ValueError for text that is no score function."""
        return _loads(text)

    def depends_on(self, position: int | None, leaf: str) -> bool:
        """Whether instruction ``position`` reads a leaf of that name, directly or not."""
        if position is None:
            return False
        name, *arguments = self.program[position]
        if name in LEAVES:
            return name == leaf
        return any(self.depends_on(a, leaf) for a in arguments)

    def captured(self, *positions: int | None) -> list[int]:
        """Sorted numbers of the captured tensors that the instructions at ``positions`` read."""
        found: set[int] = set()
        todo = [p for p in positions if p is not None]
        while todo:
            name, *arguments = self.program[todo.pop()]
            if name == "captured":
                found.add(arguments[0])
            elif name not in LEAVES:
                todo.extend(arguments)
        return sorted(found)

    def pruned(self) -> "ScoreFunction":
        """The same function with equal instructions merged and unused ones dropped."""
        builder = Builder()
        moved: dict[int, int] = {}

        def move(position: int) -> int:
            if position not in moved:
                name, *arguments = self.program[position]
                moved[position] = builder.emit(name, *(arguments if name in LEAVES else map(move, arguments)))
            return moved[position]

        score, mask, sink = (None if p is None else move(p) for p in (self.score, self.mask, self.sink))
        assert score is not None
        return replace(self, program=builder.program, score=score, mask=mask, sink=sink)


def _encode(constant: bool | int | float) -> Any:
    is_special = isinstance(constant, float) and (constant != constant or constant in (float("inf"), -float("inf")))
    return str(constant) if is_special else constant


_LOADED: dict[str, ScoreFunction] = {}


def _loads(text: str) -> ScoreFunction:
    if text not in _LOADED:
        raw, score, mask, sink, empty_rows, rows_first = json.loads(text)
        program = tuple(
            (name, *((float(a) if isinstance(a, str) else a) if name == "const" else a for a in rest))
            for name, *rest in raw
        )
        _LOADED[text] = ScoreFunction(program, score, mask, sink, empty_rows, bool(rows_first))
    return _LOADED[text]


class Builder:
    """Builds a program; equal instructions are emitted once."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._positions: dict[Any, int] = {}

    @property
    def program(self) -> tuple[Instruction, ...]:
        return tuple(self._instructions)

    def emit(self, name: str, *arguments: Any) -> int:
        """Append ``(name, *arguments)`` unless it exists, and return its position."""
        key = (name, *((type(a), repr(a)) for a in arguments))  # 0, 0.0, -0.0 and False are different constants
        if key not in self._positions:
            self._positions[key] = len(self._instructions)
            self._instructions.append((name, *arguments))
        return self._positions[key]


def causal_offset(function: ScoreFunction, q_length: int, k_length: int) -> int | None:
    """``c`` where the mask is exactly ``j <= i + c`` and nothing else happens to the score; None otherwise."""
    if function.sink is not None or function.mask is None or function.program[function.score] != ("score",):
        return None
    name, *arguments = function.program[function.mask]
    if name not in ("ge", "le"):
        return None
    row, column = arguments if name == "ge" else reversed(arguments)
    offsets = [affine(function, position, q_length, k_length) for position in (row, column)]
    if offsets[0] is None or offsets[1] is None:
        return None
    (row_q, row_k, row_c), (column_q, column_k, column_c) = offsets[0], offsets[1]
    return row_c - column_c if (row_q - column_q, row_k - column_k) == (1, -1) else None


def affine(function: ScoreFunction, position: int, q_length: int, k_length: int) -> tuple[int, int, int] | None:
    """``(a, b, c)`` where the integer instruction equals ``a * i + b * j + c``."""
    name, *arguments = function.program[position]
    leaves = {"q_index": (1, 0, 0), "k_index": (0, 1, 0), "q_length": (0, 0, q_length), "k_length": (0, 0, k_length)}
    if name in leaves:
        return leaves[name]
    if name == "const" and type(arguments[0]) is int:
        return 0, 0, arguments[0]
    if name not in ("add", "sub"):
        return None
    left, right = (affine(function, a, q_length, k_length) for a in arguments)
    if left is None or right is None:
        return None
    sign = 1 if name == "add" else -1
    return left[0] + sign * right[0], left[1] + sign * right[1], left[2] + sign * right[2]


def additive_bias(function: ScoreFunction) -> tuple[ScoreFunction, int | None] | None:
    """Split ``logits = score + bias``: the function extended by the bias, and the bias's position (None: no bias).

    None where the logits are anything else, or where bias or mask read the score.
    """
    builder = Builder()
    for name, *arguments in function.program:
        builder.emit(name, *arguments)
    if builder.program != function.program:
        return additive_bias(function.pruned())

    def split(position: int) -> tuple[bool, int | None] | None:
        """(contains +score, position of the other addends)"""
        if not function.depends_on(position, "score"):
            return False, position
        name, *arguments = function.program[position]
        if name == "score":
            return True, None
        if name not in ("add", "sub") or (name == "sub" and function.depends_on(arguments[1], "score")):
            return None
        left, right = split(arguments[0]), split(arguments[1])
        if left is None or right is None or left[0] == right[0]:
            return None
        if left[1] is None or right[1] is None:
            rest = left[1] if right[1] is None else right[1]
            return True, builder.emit("neg", rest) if name == "sub" and rest is not None else rest
        return True, builder.emit(name, left[1], right[1])

    parts = split(function.score)
    if parts is None or not parts[0] or function.depends_on(function.mask, "score"):
        return None
    return replace(function, program=builder.program), parts[1]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def evaluate(
    function: ScoreFunction,
    positions: Sequence[int | None],
    *,
    score: Tensor | None,
    captured: Sequence[Tensor],
    lead: Sequence[int],
    q_length: int,
    k_length: int,
    device: torch.device,
    dtype: torch.dtype,
    upstream: Tensor | None = None,
) -> list[Tensor | None]:
    """Evaluate instructions in plain PyTorch, on tensors that broadcast to ``[*lead, Q, K]``.

    Args:
        positions: instructions wanted; None gives None.
        score: scaled scores ``[*lead, Q, K]`` in ``dtype``, or None where no wanted instruction reads them.
        captured: the captured tensors, each of rank ``len(lead) + 2``.
        lead: leading sizes of the canonical space.
        dtype: accumulation type.
        upstream: value of the ``upstream`` leaf of a gradient program.
    """
    rank = len(lead) + 2

    def axis_index(axis: int, size: int) -> Tensor:
        shape = [1] * rank
        shape[axis] = size
        return torch.arange(size, device=device).view(shape)

    def constant(value: bool | int | float) -> Tensor:
        return torch.full((), value, dtype=dtype if isinstance(value, float) else None, device=device)

    leaves: dict[str, Callable[..., Any]] = {
        "score": lambda: score,
        "q_index": lambda: axis_index(rank - 2, q_length),
        "k_index": lambda: axis_index(rank - 1, k_length),
        "lead_index": lambda d: axis_index(d, lead[d]),
        "q_length": lambda: torch.full((), q_length, device=device),
        "k_length": lambda: torch.full((), k_length, device=device),
        "captured": lambda n: captured[n].to(dtype) if captured[n].is_floating_point() else captured[n],
        "const": constant,
        "upstream": lambda: upstream,
    }
    values: dict[int, Tensor] = {}

    def value(position: int) -> Tensor:
        if position not in values:
            name, *arguments = function.program[position]
            if name in LEAVES:
                values[position] = leaves[name](*arguments)
            elif name == "to_float":
                values[position] = value(arguments[0]).to(dtype)
            else:
                values[position] = _promote(name, POINTWISE[name][1], [value(a) for a in arguments], dtype)
        return values[position]

    return [None if p is None else value(p) for p in positions]


def _promote(name: str, meaning: Callable[..., Tensor], arguments: list[Tensor], dtype: torch.dtype) -> Tensor:
    if name == "div" or any(a.is_floating_point() for a in arguments):
        arguments = [a if a.dtype == torch.bool and name in ("where", "not") else a.to(dtype) for a in arguments]
    return meaning(*arguments)
