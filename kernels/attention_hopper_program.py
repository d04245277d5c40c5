"""A score function compiled for the Hopper kernels: functions that they call on tiles of scores.

Constant factors around the score move out of the function: those inside into the scale of the products, those outside
into the base of the exponentials. What the function reads per head or row is loaded once per tile of queries; one
captured tensor with rows and columns comes as tiles, by the copy engine.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from vbcompile.kernels.attention_hopper_source import SourceWriter, split_mask
from vbcompile.kernels.score_function import LEAVES, Instruction, ScoreFunction
from vbcompile.kernels.score_gradient import differentiate
from vbcompile.kernels.score_triton import CapturedPattern, has_unbounded_terms

_WEIGHTS: Final = {  # instructions of the machine, roughly
    **dict.fromkeys(("exp", "log", "sqrt", "rsqrt", "tanh", "to_int"), 2),
    **dict.fromkeys(("sigmoid", "div", "floordiv", "mod"), 4),
    **dict.fromkeys(("log1p", "sin", "cos", "pow"), 12),
    **dict.fromkeys(("atan", "erf"), 25),
}
_PARTIAL: Final = ("div", "floordiv", "mod", "pow", "log", "log1p", "sqrt", "rsqrt")  # not defined everywhere
_MOST_WEIGHT: Final = 24
_LOWEST, _MOST_CAP = 92, 50.0


@dataclass(frozen=True)
class HopperProgram:
    """Functions and facts of one score function.

    Attributes:
        inner, outer: factors of the score, of the logits.
        logits: ``(score, *context) -> logits / outer``, less ``offset``; None where those are the scores.
        offset: ``(*row context) -> what is the same for a whole row``; None for nothing. slope: ``(*row context) ->
            factor of a tile's first column less its first row``: what elements lack that count from that column.
        bounds: ``(*row context) -> first and end of the keys that a row sees``; None for all.
        mask: ``(score, *context) -> keep``, the part of the mask that ``bounds`` does not cover; None for all.
        gradient: ``(score, value, upstream, *context) -> upstream * derivative of logits / outer``, for the backward;
            None where the derivative is 1.
        captured_gradients: ``(upstream, *context, gradients, their strides)`` adds to those of captured tensors, for
            the backward; None where none is wanted.
        rows: loads what belongs to rows or heads; None where nothing does. sink: ``(*row context) -> logit``, or None.
        tile: number of the captured tensor with rows and columns, or None; tiled: 1 where the logits read it, 2 where
            the mask alone does, else 0.
        exact: whether ``bounds`` covers all of the mask but terms without any bounds of columns.
        cap: where the logits are ``tanh`` of the score alone and bounded weights will do: how much less than the
            largest magnitude of a row its reference is, in powers of two; else None.
        unbounded: whether products of logits with ``log2(e)`` may overflow.
    """

    inner: float
    outer: float
    logits: Callable[..., Any] | None
    offset: Callable[..., Any] | None
    slope: Callable[..., Any] | None
    bounds: Callable[..., Any] | None
    mask: Callable[..., Any] | None
    gradient: Callable[..., Any] | None
    captured_gradients: Callable[..., Any] | None
    rows: Callable[..., Any] | None
    sink: Callable[..., Any] | None
    tile: int | None
    tiled: int
    exact: bool
    cap: float | None
    unbounded: bool
    source: str


def refuses(function: ScoreFunction, patterns: tuple[CapturedPattern, ...]) -> str | None:
    """Why a score function cannot be compiled for these kernels, or None."""
    if not function.depends_on(function.score, "score"):
        return "the logits do not depend on the scores"
    if len(_tiles(function, patterns)) > 1:
        return "more than one captured tensor has rows and columns"
    if any(patterns[n].column for n in function.captured(function.sink)):
        return "the sink reads a tensor with columns"
    weight = sum(_WEIGHTS.get(function.program[p][0], 1) for p in _per_element(function, patterns))
    if weight > _MOST_WEIGHT:
        return "the score function takes more registers than its threads have"
    if any(pattern.wide for pattern in patterns):
        return "a captured tensor needs 64-bit offsets of columns"
    return None


def refuses_gradients(
    function: ScoreFunction, patterns: tuple[CapturedPattern, ...], wanted: tuple[int, ...]
) -> str | None:
    """Why these kernels cannot give the gradients of the captured tensors ``wanted``, or None."""
    function = peel(function)[0]
    for number in set(wanted) - set(function.captured(function.score)):
        if patterns[number].is_tile:
            return f"captured tensor {number} has rows and columns and takes part in no logits: its gradient is zero"
    if not set(wanted) & set(function.captured(function.score)):
        return None
    found = differentiate(function, function.score)
    if found.score is None or found.function.program[found.score] != ("upstream",):
        return "gradients of captured tensors need logits that are the score and an addend"
    for number, position in found.captured:
        if number not in wanted:
            continue
        if patterns[number].is_tile and found.function.program[position] != ("upstream",):
            return f"the gradient of captured tensor {number} is not that of the logits"
        if any(patterns[n].is_tile for n in found.function.captured(position)):
            return f"the gradient of captured tensor {number} reads a tensor with rows and columns"
    return None


def refuses_backward(function: ScoreFunction, patterns: tuple[CapturedPattern, ...]) -> str | None:
    """Why the backward would meet numbers past the ends of rows and columns that are no numbers, or None.

    There positions go on and captured tensors read as zero; what the kernel adds up must be finite all the same.
    """
    varies: list[bool] = []
    for name, *arguments in function.program:
        if name in LEAVES:
            pattern = patterns[arguments[0]] if name == "captured" else None
            varies.append(name in ("q_index", "k_index") or bool(pattern and (pattern.row or pattern.column)))
            continue
        partial = arguments[1:] if name in ("div", "floordiv", "mod") else arguments
        if name in _PARTIAL and any(varies[a] for a in partial):
            return f"{name} of what depends on the position may be undefined past the ends of a sequence"
        varies.append(any(varies[a] for a in arguments))
    return None


def _per_element(function: ScoreFunction, patterns: tuple[CapturedPattern, ...]) -> set[int]:
    """Instructions of the logits that are computed for every element."""
    found: set[int] = set()

    def visit(position: int) -> bool:
        name, *arguments = function.program[position]
        if name in LEAVES:
            return name in ("score", "k_index") or (name == "captured" and patterns[arguments[0]].column)
        varies = sum(map(visit, arguments)) > 0
        if varies:
            found.add(position)
        return varies

    visit(function.score)
    return found


def _tiles(function: ScoreFunction, patterns: tuple[CapturedPattern, ...]) -> list[int]:
    used = function.captured(function.score, function.mask, function.sink)
    return [n for n in used if patterns[n].is_tile]


# ------------------------------------------------------------------------------------------------- constant factors
def peel(function: ScoreFunction) -> tuple[ScoreFunction, float, float]:
    """``(function', inner, outer)``: logits are ``outer * function'(inner * score)``; ``outer`` is positive."""
    function, inner, outer = function.pruned(), 1.0, 1.0
    while (found := _factor(function.program, function.score)) and found[1] > 0:
        function = replace(function, score=found[0]).pruned()
        outer *= found[1]
    while (user := _only_user(function)) is not None:
        factor = _factor(function.program, user)
        assert factor is not None
        program = list(function.program)
        program[user] = ("score",)
        function = replace(function, program=tuple(program)).pruned()
        inner *= factor[1]
    return function, inner, outer


def _factor(program: tuple[Instruction, ...], position: int) -> tuple[int, float] | None:
    """``(x, c)`` where an instruction is ``c * x`` with an ordinary constant."""
    name, *arguments = program[position]
    if name not in ("mul", "div"):
        return None
    for x, other in (arguments, arguments[::-1]):
        kind, *value = program[other]
        if kind == "const" and type(value[0]) is not bool and 1e-6 < abs(value[0]) < 1e6:
            if name == "mul":
                return x, float(value[0])
            if other == arguments[1]:
                return x, 1.0 / value[0]
    return None


def _only_user(function: ScoreFunction) -> int | None:
    """The instruction that scales the score, where nothing else reads it."""
    scores = [p for p, instruction in enumerate(function.program) if instruction == ("score",)]
    if len(scores) != 1 or scores[0] in (function.score, function.mask, function.sink):
        return None
    users = [
        p
        for p, (name, *arguments) in enumerate(function.program)
        if name not in ("captured", "const", "lead_index") and scores[0] in arguments
    ]
    if len(users) != 1:
        return None
    found = _factor(function.program, users[0])
    return users[0] if found and found[0] == scores[0] else None


def _unbounded(program: tuple[Instruction, ...], patterns: tuple[CapturedPattern, ...], position: int) -> bool:
    """As ``has_unbounded_terms``, but a factor that belongs to a head, such as a slope, is no mask."""
    name, *arguments = program[position]
    if name in LEAVES:
        return has_unbounded_terms(program, position)
    if name == "mul":
        arguments = [a for a in arguments if not _is_head_factor(program[a], patterns)]
    return any(_unbounded(program, patterns, a) for a in arguments)


def _is_head_factor(instruction: Instruction, patterns: tuple[CapturedPattern, ...]) -> bool:
    name, *arguments = instruction
    return name == "captured" and not (patterns[arguments[0]].row or patterns[arguments[0]].column)


def _cap(function: ScoreFunction, outer: float) -> float | None:
    """``HopperProgram.cap`` of a peeled function: weights of a row lie in a range of ``2 * outer * log2(e)`` powers of
    two, of which no more than ``_LOWEST`` may be below one."""
    name, *arguments = function.program[function.score]
    if name != "tanh" or function.program[arguments[0]] != ("score",) or function.sink is not None:
        return None
    return max(0.0, 2 * outer * math.log2(math.e) - _LOWEST) if outer <= _MOST_CAP else None


@functools.lru_cache(maxsize=1024)
def compile_hopper(
    function: ScoreFunction,
    patterns: tuple[CapturedPattern, ...],
    fast: bool,
    masked: bool,
    scaled: bool,
    wanted: tuple[int, ...] | None = None,
) -> HopperProgram:
    """Compile a score function that ``refuses`` takes.

    Args:
        fast: tanh at the precision of bfloat16's products of queries and keys.
        masked: compile the mask; else the kernel's own causal bound covers it.
        scaled: logits are wanted scaled even where they are the scores alone.
        wanted: for the backward: numbers of the captured tensors whose gradients are wanted.
    """
    function = function if masked else replace(function, mask=None)
    function, inner, outer = peel(function)
    exact, opaque, is_exact = split_mask(function, patterns)
    score_mask = any(function.depends_on(p, "score") for p in opaque)
    plain = function.program[function.score] == ("score",)
    scaled = scaled or score_mask or not plain
    writer = SourceWriter(function, patterns, fast)
    if scaled:
        writer.logits(lambda position: not _unbounded(function.program, patterns, position))
    if wanted is not None and scaled:
        writer.gradient()
    if wanted:
        writer.captured_gradients(wanted)
    if exact:
        writer.bounds(exact)
    if opaque:
        writer.conjunction("mask", opaque)
    if function.sink is not None:
        writer.sink(function.sink)
    names = writer.compiled()
    tiles = _tiles(function, patterns)
    return HopperProgram(
        inner=inner if scaled else 1.0,
        outer=outer if scaled else outer * inner,
        **{
            name: names.get(name)
            for name in (
                "logits",
                "offset",
                "slope",
                "bounds",
                "mask",
                "gradient",
                "captured_gradients",
                "rows",
                "sink",
            )
        },
        tile=tiles[0] if tiles else None,
        tiled=0 if not tiles else 1 if tiles[0] in function.captured(function.score) else 2,
        exact=is_exact,
        cap=_cap(function, outer) if fast and not opaque else None,
        unbounded=_unbounded(function.program, patterns, function.score),
        source=writer.source,
    )
