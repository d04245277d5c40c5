"""Derivatives of score functions, as programs of the same kind: reverse-mode differentiation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from vbcompile.kernels.score_function import LEAVES, Builder, Instruction, ScoreFunction


@dataclass(frozen=True)
class ScoreGradient:
    """Gradient program of one output of a score function, with the leaf ``("upstream",)`` as incoming gradient.

    Attributes:
        function: holds the instructions; its own ``score`` and ``mask`` have no meaning here.
        score: position of the gradient with respect to the scaled score; None where it is zero.
        captured: ``(number of the captured tensor, position of its elementwise gradient)``; the tensor's gradient is
            the sum over the axes that it broadcasts along.
    """

    function: ScoreFunction
    score: int | None
    captured: tuple[tuple[int, int], ...]


@lru_cache(maxsize=1024)
def differentiate(function: ScoreFunction, output: int) -> ScoreGradient:
    """Gradient of instruction ``output``. Subgradients are those of PyTorch (ties of ``maximum`` share)."""
    builder = Builder()
    position = [builder.emit(name, *arguments) for name, *arguments in _merged(function)]
    emit = builder.emit
    adjoint: dict[int, int] = {position[output]: emit("upstream")}

    def accumulate(target: int, contribution: int) -> None:
        adjoint[target] = emit("add", adjoint[target], contribution) if target in adjoint else contribution

    for p in sorted(set(position[: output + 1]), reverse=True):
        name, *arguments = builder.program[p]
        if p not in adjoint or name in LEAVES:
            continue
        for target, contribution in _contributions(builder, name, arguments, p, adjoint[p]):
            accumulate(target, contribution)

    score, captured = None, []
    for p, gradient in sorted(adjoint.items()):
        name, *arguments = builder.program[p]
        if name == "score":
            score = gradient
        elif name == "captured":
            captured.append((arguments[0], gradient))
    return ScoreGradient(ScoreFunction(builder.program, 0), score, tuple(captured))


def learns_from(function: ScoreFunction) -> set[int]:
    """Numbers of the captured tensors that a gradient reaches; what is only compared gets none."""
    outputs = [position for position in (function.score, function.sink) if position is not None]
    return {number for position in outputs for number, _ in differentiate(function, position).captured}


def _merged(function: ScoreFunction) -> tuple[Instruction, ...]:
    """The program itself, if no two instructions are equal (positions must keep their meaning)."""
    builder = Builder()
    for name, *arguments in function.program:
        builder.emit(name, *arguments)
    if builder.program != function.program:
        raise ValueError("differentiate() needs a pruned score function: call .pruned() first")
    return function.program


def _contributions(
    builder: Builder, name: str, arguments: list[int], value: int, upstream: int
) -> list[tuple[int, int]]:
    """``(argument, gradient)`` pairs of one instruction; instructions that are flat almost everywhere give none."""
    emit = builder.emit
    const, mul, sub = partial(emit, "const"), partial(emit, "mul"), partial(emit, "sub")
    x = arguments[0]
    y = arguments[1] if len(arguments) > 1 else x
    match name:
        case "add":
            return [(x, upstream), (y, upstream)]
        case "sub":
            return [(x, upstream), (y, emit("neg", upstream))]
        case "mul":
            return [(x, mul(upstream, y)), (y, mul(upstream, x))]
        case "div":
            return [(x, emit("div", upstream, y)), (y, emit("neg", emit("div", mul(upstream, value), y)))]
        case "mod":
            return [(x, upstream), (y, emit("neg", mul(upstream, emit("floordiv", x, y))))]
        case "pow":
            slope = mul(y, emit("pow", x, sub(y, const(1.0))))
            zero_exponent = emit("eq", y, const(0.0))
            is_flat = emit("and", emit("eq", x, const(0.0)), emit("ge", y, const(0.0)))
            safe_log = emit("log", emit("where", is_flat, const(1.0), x))
            return [
                (x, mul(upstream, emit("where", zero_exponent, const(0.0), slope))),
                (y, mul(upstream, mul(value, safe_log))),
            ]
        case "maximum" | "minimum":
            order = ("gt", "lt") if name == "maximum" else ("lt", "gt")
            half, tie = mul(upstream, const(0.5)), emit("eq", x, y)
            parts = [emit("where", emit(sense, x, y), upstream, const(0.0)) for sense in order]
            return [(to, emit("where", tie, half, part)) for to, part in zip((x, y), parts, strict=True)]
        case "where":
            zero = const(0.0)
            return [
                (arguments[1], emit("where", x, upstream, zero)),
                (arguments[2], emit("where", x, zero, upstream)),
            ]
        case "to_float":
            return [(x, upstream)]
    unary = {
        "neg": lambda: emit("neg", upstream),
        "abs": lambda: mul(upstream, sub(_step(emit, x, "gt"), _step(emit, x, "lt"))),
        "exp": lambda: mul(upstream, value),
        "log": lambda: emit("div", upstream, x),
        "log1p": lambda: emit("div", upstream, emit("add", x, const(1.0))),
        "sqrt": lambda: emit("div", upstream, mul(value, const(2.0))),
        "rsqrt": lambda: mul(mul(upstream, const(-0.5)), emit("div", value, x)),
        "sin": lambda: mul(upstream, emit("cos", x)),
        "cos": lambda: emit("neg", mul(upstream, emit("sin", x))),
        "tanh": lambda: mul(upstream, sub(const(1.0), mul(value, value))),
        "sigmoid": lambda: mul(upstream, mul(value, sub(const(1.0), value))),
        "atan": lambda: emit("div", upstream, emit("add", mul(x, x), const(1.0))),
        "erf": lambda: mul(upstream, mul(emit("exp", emit("neg", mul(x, x))), const(2.0 / math.sqrt(math.pi)))),
        "relu": lambda: emit("where", emit("gt", x, const(0.0)), upstream, const(0.0)),  # zero beside infinity, too
    }
    return [(x, unary[name]())] if name in unary else []


def _step(emit: Callable[..., int], x: int, comparison: str) -> int:
    """1.0 where ``x`` compares so with zero, else 0.0."""
    return emit("where", emit(comparison, x, emit("const", 0.0)), emit("const", 1.0), emit("const", 0.0))
