"""Source text of a score function for the Hopper kernels, in Triton's language as Gluon understands it.

Functions of elements take ``score``, ``i``, ``j`` (row and column), ``fi``, ``fj`` (the same in float32), ``step`` and
``distance`` (floats; ``step + distance`` is the column less the first row of the tile or, where ``slope`` makes up for
the difference, less its first column), ``rows`` (what ``rows`` loaded), ``tile`` (a captured tensor's tile), and the
context of :mod:`vbcompile.kernels.score_triton`. Functions of rows take ``first``, the first row of the tile as a
float, instead.
"""

from collections.abc import Callable
from typing import Any, Final

from vbcompile.kernels.attention_tiles import Bound, Constraint, Interval, RangeEmitter, analyse_mask, linear_form
from vbcompile.kernels.score_function import LEAVES, ScoreFunction
from vbcompile.kernels.score_gradient import differentiate
from vbcompile.kernels.score_triton import (
    LEAD_AXES,
    CapturedPattern,
    Emitter,
    compile_source,
    constant_bits,
    define,
)

MAX_LENGTH: Final = 1 << 21  # positions, their sums and differences are exact in float32
_ELEMENT: Final = "score, i, j, fi, fj, step, distance, rows, tile, lead, q_length, k_length, captured, strides"
_ROW: Final = "i, fi, first, rows, lead, q_length, k_length, captured, strides"
_CAPTURED: Final = _ELEMENT.replace("score,", "upstream,").replace("tile, ", "") + ", gradients, gradient_strides"
_LOADED: Final = "i, i_ok, lead, captured, strides"


def split_mask(
    function: ScoreFunction, patterns: tuple[CapturedPattern, ...]
) -> tuple[list[Constraint], tuple[int, ...], bool]:
    """(constraints that together are a range of columns per row, positions of the mask's other terms, whether none of
    those is a constraint)."""
    analysis = analyse_mask(function, patterns)
    pairs = list(zip(analysis.constraints, analysis.positions, strict=True))
    exact = [c for c, _ in pairs if _is_range(c)]
    others = [p for c, p in pairs if not _is_range(c)]
    return exact, (*analysis.opaque, *others), not others


def _is_range(constraint: Constraint) -> bool:
    return isinstance(constraint, Bound) or (constraint.conjunction and all(map(_is_range, constraint.parts)))


class _HopperEmitter(Emitter):
    """Instructions for Gluon: constants without layouts, positions as floats by addition, rows loaded before."""

    def __init__(
        self, function: ScoreFunction, patterns: tuple[CapturedPattern, ...], fast: bool, loaded: list[int]
    ) -> None:
        super().__init__(function.program, patterns, precise=False)
        self._function = function
        self._fast = fast
        self._loaded = loaded

    def as_float(self, position: int) -> str:
        if self._kinds[position] == "int":
            form = linear_form(self._function, self._patterns, position)
            if form is not None and (form[0] or form[1]) and self._is_exact(form):
                row, column, constant, terms = form
                parts = [
                    (column, "fj"),
                    (row, "fi"),
                    *((c, f"tl.cast({self.value(p)}, tl.float32)") for p, c in terms.items()),
                ]
                values = [text if c == 1 else f"{text} * {c}.0" for c, text in parts if c]
                return f"({' + '.join([*values, *[f'{constant}.0'] * bool(constant)])})"
        return super().as_float(position)

    def _is_exact(self, form: tuple[int, int, int, dict[int, int]]) -> bool:
        """Whether sums of the parts are exact in float32: positions and lengths only, with small factors."""
        row, column, constant, terms = form
        known = all(self._program[p][0] in ("q_length", "k_length") for p in terms)
        return known and max(abs(row), abs(column), len(terms)) <= 2 and abs(constant) < MAX_LENGTH

    def slope(self, position: int, rows: "_HopperEmitter") -> tuple[str, str, str] | None:
        """``(part of elements, part of rows, factor)`` of a multiple of a position that is the same for a head, such as
        ALiBi's; None for anything else. The part of elements counts from the tile's first row or column, so that it
        stays small."""
        name, *arguments = self._program[position]
        if name != "mul":
            return None
        for place, factor in (arguments, arguments[::-1]):
            form = linear_form(self._function, self._patterns, self._as_integer(place))
            if form is None or not form[1] or not self._is_exact(form) or not self._is_uniform(factor):
                continue
            row, column, constant, terms = form
            own = f"({self.as_float(factor)} * {column}.0)"
            rest = [f"{c}.0 * tl.cast({rows.value(p)}, tl.float32)" for p, c in terms.items()]
            rest += [f"{constant}.0"] * bool(constant)
            rest += [f"(fi - first) * {row}.0"] if row == -column else [f"fi * {row}.0 + first * {column}.0"]
            factor_of_rows = rows.as_float(factor)
            return (
                f"tl.fma(step, {own}, distance * {own})",
                f"({' + '.join(rest)}) * {factor_of_rows}",
                f"{factor_of_rows} * {column}.0",
            )
        return None

    def _as_integer(self, position: int) -> int:
        name, *arguments = self._program[position]
        return arguments[0] if name == "to_float" else position

    def _is_uniform(self, position: int) -> bool:
        """Whether an instruction is the same for all elements of a head."""
        name, *arguments = self._program[position]
        if name == "captured":
            return not (self._patterns[arguments[0]].row or self._patterns[arguments[0]].column)
        if name in LEAVES:
            return name in ("const", "lead_index", "q_length", "k_length")
        return all(map(self._is_uniform, arguments))

    def _expression(self, position: int) -> str:
        name, *arguments = self._program[position]
        if name == "const":
            return _constant(arguments[0])
        if name == "captured":
            pattern = self._patterns[arguments[0]]
            if arguments[0] in self._loaded:
                return f"rows[{self._loaded.index(arguments[0])}]"
            if pattern.is_tile:
                return {"bool": "(tile != 0)", "float": "tl.cast(tile, tl.float32)", "int": "tile"}[pattern.kind]
            return self._load(arguments[0]).replace("mask=j_ok", "mask=j < k_length, other=0")
        return super()._expression(position)

    def _arithmetic(self, name: str, arguments: list[int], values: list[str], common: str) -> str:
        if name == "tanh" and self._fast:
            return f"math.tanh_nvidia({values[0]})"
        if name == "relu":
            return f"tl.where({values[0]} < 0, 0.0, {values[0]})"
        return super()._arithmetic(name, arguments, values, common)


def _constant(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return f"tl.cast({int(value)}, tl.int1)"
    if isinstance(value, int):
        return f"tl.cast({value}, tl.int{constant_bits(value)})"
    return f'tl.cast(float("{value!r}"), tl.float32)'


class _RowBounds(RangeEmitter):
    """Ranges of columns of single rows, not of whole tiles of them."""

    def _columns(self, constraint: Constraint) -> Interval:
        if not isinstance(constraint, Bound):
            return self._combine(constraint, [self._columns(p) for p in constraint.parts])
        slope = {0: "i * 0 + ", 1: "i + ", -1: "-i + "}[constraint.slope]
        limit = self._name(f"{slope}{self._offset(constraint)}")
        if constraint.upper:
            end = self._name(f"{limit} + 1")
            return Interval("0", "0", end, end)
        return Interval(limit, limit, "limit", "limit")


class SourceWriter:
    """Collects the functions of one score function.

    Attributes:
        source: their text.
    """

    def __init__(self, function: ScoreFunction, patterns: tuple[CapturedPattern, ...], fast: bool) -> None:
        used = function.captured(function.score, function.mask, function.sink)
        self._function, self._patterns, self._fast = function, patterns, fast
        self._loaded = [n for n in used if not patterns[n].column]
        self.source = ""

    def compiled(self) -> dict[str, Any]:
        """The functions by name, ``rows`` included where it loads anything."""
        if self._loaded:
            emitter = Emitter(self._function.program, self._patterns, precise=False)
            loads = [emitter._load(n).replace("mask=i_ok", "mask=i_ok, other=0") for n in self._loaded]
            self.source += define("rows", _LOADED, [], f"({''.join(f'{load}, ' for load in loads)})")
        return compile_source(self.source) if self.source else {}

    def logits(self, is_bounded: Callable[[int], bool]) -> None:
        """Define ``logits`` and, for addends that are the same for a whole row, ``offset`` and ``slope``."""
        elements, rows = self._emitter(), self._emitter()
        per_element: list[str] = []
        per_row: list[str] = []
        slopes: list[str] = []
        for sign, position in self._addends(self._function.score, "+"):
            if found := elements.slope(position, rows):
                per_element.append(f"{sign} {found[0]}")
                per_row.append(f"{sign} {found[1]}")
                slopes.append(f"{sign} {found[2]}")
            elif self._varies(position) or not is_bounded(position):
                per_element.append(f"{sign} {elements.as_float(position)}")
            else:
                per_row.append(f"{sign} {rows.as_float(position)}")
        self.source += define("logits", _ELEMENT, elements.lines, _sum(per_element))
        if per_row:
            self.source += define("offset", _ROW, rows.lines, f"fi * 0.0 {' '.join(per_row)}")
        if slopes:
            self.source += define("slope", _ROW, rows.lines, f"fi * 0.0 {' '.join(slopes)}")

    def gradient(self) -> None:
        """Define ``gradient``, unless the logits change as the score does; what ``logits`` gave comes in as ``value``,
        -inf where masked. (Where a part of them is left to ``offset`` they are a sum, whose gradient does not read it.)
        """
        found = differentiate(self._function, self._function.score)
        assert found.score is not None
        if found.function.program[found.score] == ("upstream",):
            return
        emitter = _HopperEmitter(found.function, self._patterns, self._fast, self._loaded)
        emitter._names[self._function.score] = "value"
        value = emitter.as_float(found.score)
        parameters = _ELEMENT.replace("score,", "score, value, upstream,", 1)
        self.source += define("gradient", parameters, emitter.lines, value)

    def captured_gradients(self, wanted: tuple[int, ...]) -> None:
        """Define ``captured_gradients``, which adds to the gradients of the captured tensors ``wanted``, if any, but
        for one with rows and columns; the gradient of the logits comes in."""
        found = differentiate(self._function, self._function.score)
        emitter = _HopperEmitter(found.function, self._patterns, self._fast, self._loaded)
        values = [
            (n, emitter.as_float(position))
            for n, position in found.captured
            if n in wanted and not self._patterns[n].is_tile
        ]
        if values:
            body = [*emitter.lines, *(line for n, g in values for line in self._add(n, wanted.index(n), g))]
            self.source += define("captured_gradients", _CAPTURED, body, None)

    def _add(self, number: int, place: int, value: str) -> list[str]:
        """Lines that add a tile's elements to the gradient of a captured tensor, summed where it is broadcast."""
        pattern, strides = self._patterns[number], f"gradient_strides[{place}]"
        offset = " + ".join(f"tl.cast(lead[{d}], tl.int64) * {strides}[{d}]" for d in range(LEAD_AXES))
        pointer = f"gradients[{place}] + ({offset})"
        pointer += f" + tl.cast(i, tl.int64) * {strides}[{LEAD_AXES}]" if pattern.row else ""
        pointer += f" + j * {strides}[{LEAD_AXES + 1}]" if pattern.column else ""
        exists = "(i < q_length)" if pattern.row else "(j < k_length)" if pattern.column else "None"
        if pattern.row:
            value = f"tl.sum({value}, 0, keep_dims=True)"
        else:
            kept = ", keep_dims=True" * pattern.column
            for axis in (3, 2, 1) if pattern.column else (3, 2, 1, 0):
                value = f"tl.sum({value}, {axis}{kept})"
        return [f'    tl.atomic_add({pointer}, {value}, mask={exists}, sem="relaxed")']

    def bounds(self, constraints: list[Constraint]) -> None:
        """Define ``bounds``."""
        emitter = _RowBounds(self._emitter())
        found = emitter.columns(constraints)
        lines = ["    limit = i * 0 + k_length", *emitter.lines]
        self.source += define("bounds", _ROW, lines, f"(i * 0 + {found.hull_first}, {found.hull_last})")

    def conjunction(self, name: str, positions: tuple[int, ...]) -> None:
        """Define a mask that is True where all of the instructions are."""
        emitter = self._emitter()
        terms = [emitter.value(p) for p in positions]
        self.source += define(name, _ELEMENT, emitter.lines, " & ".join(terms))

    def sink(self, position: int) -> None:
        """Define ``sink``."""
        emitter = self._emitter()
        value = emitter.as_float(position)
        self.source += define("sink", _ROW, emitter.lines, f"fi * 0.0 + {value}")

    def _emitter(self) -> "_HopperEmitter":
        return _HopperEmitter(self._function, self._patterns, self._fast, self._loaded)

    def _addends(self, position: int, sign: str) -> list[tuple[str, int]]:
        name, *arguments = self._function.program[position]
        if name not in ("add", "sub"):
            return [(sign, position)]
        other = sign if name == "add" else "-" if sign == "+" else "+"
        return [*self._addends(arguments[0], sign), *self._addends(arguments[1], other)]

    def _varies(self, position: int) -> bool:
        """Whether an instruction differs between the elements of a row."""
        name, *arguments = self._function.program[position]
        if name in LEAVES:
            return name in ("score", "k_index") or (name == "captured" and self._patterns[arguments[0]].column)
        return any(map(self._varies, arguments))


def _sum(terms: list[str]) -> str:
    """Signed terms as one expression, the score's own last: its scaling and an addition make one instruction."""
    ordered = sorted(terms, key=lambda term: not term.startswith("+"))
    return " ".join(ordered).removeprefix("+ ")
