"""A score function compiled for the attention kernels: small Triton functions that the kernels call per tile.

One :class:`TileProgram` belongs to one score function, one way in which its captured tensors broadcast, and one choice
of gradients. All its functions take the context of :mod:`vbcompile.kernels.score_triton`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from vbcompile.kernels.attention_intervals import IntervalEmitter
from vbcompile.kernels.attention_tiles import MaskAnalysis, RangeEmitter, analyse_mask
from vbcompile.kernels.score_function import LEAVES, ScoreFunction
from vbcompile.kernels.score_gradient import differentiate
from vbcompile.kernels.score_triton import (
    CONTEXT,
    LEAD_AXES,
    CapturedPattern,
    Emitter,
    compile_source,
    define,
    has_unbounded_terms,
)

_RANGE: Final = "first, last, limit, i, i_ok, lead, q_length, k_length, captured, strides"
_BOUNDS: Final = "first, last, column_first, column_last, i, j, i_ok, j_ok, lead, q_length, k_length, captured, strides"
_GRADIENTS: Final = "gradients, gradient_strides"


@dataclass(frozen=True)
class TileProgram:
    """Triton functions and facts of one score function.

    Attributes:
        logits: ``(score, *context) -> logits``; None where logits are the scaled scores.
        mask: ``(score, *context) -> keep``; None without a mask.
        opaque: the part of ``mask`` that ``key_range`` does not cover, ``query_opaque`` that ``query_range`` does not;
            None where they cover all.
        column_opaque: the terms of ``opaque`` that are the same for all rows of a head and read no score; None without
            such. column_captured: numbers of the captured tensors that they read; column_axes: leading axes of which
            they read the index.
        sink: ``(*context) -> one more logit per row``; None without.
        key_range: ``(first, last, limit, ...)``: columns ``(hull_first, full_first, full_last, hull_last)`` that rows
            ``first .. last`` need; ``scattered_key_range`` the same for any set of rows; ``query_range`` rows that
            columns need. None where the mask bounds nothing.
        tile_bounds: what ``opaque`` can be over whole tiles, see ``attention_intervals``; None where that is unknown.
            query_tile_bounds: the same of ``query_opaque``, for one tile of columns and many of rows.
        key_head, key_tail: whether ``key_range`` may begin after the first column, end before the last one;
            query_head, query_tail: ``query_range`` likewise.
        row_step, row_finish: gradients by tiles of rows, see ``_ProgramBuilder._gradients``.
        column_step, column_finish: gradients by tiles of columns.
        sink_step: gradients of the sink by tiles of rows; None where nobody wants them.
        mask_captured: numbers of the captured tensors that the mask reads; mask_axes: leading axes of which it reads
            the index;
            mask_reads_score: whether it reads the score; mask_reads_row: whether it differs between rows.
        row_sums, column_sums: how many sums ``row_step`` and ``column_step`` carry.
        unbounded: whether logits may be so large that their products with ``log2(e)`` overflow.
    """

    logits: Callable[..., Any] | None
    mask: Callable[..., Any] | None
    opaque: Callable[..., Any] | None
    query_opaque: Callable[..., Any] | None
    column_opaque: Callable[..., Any] | None
    sink: Callable[..., Any] | None
    key_range: Callable[..., Any] | None
    scattered_key_range: Callable[..., Any] | None
    query_range: Callable[..., Any] | None
    tile_bounds: Callable[..., Any] | None
    query_tile_bounds: Callable[..., Any] | None
    row_step: Callable[..., Any]
    row_finish: Callable[..., Any]
    column_step: Callable[..., Any]
    column_finish: Callable[..., Any]
    sink_step: Callable[..., Any] | None
    key_head: bool
    key_tail: bool
    query_head: bool
    query_tail: bool
    mask_captured: tuple[int, ...]
    mask_axes: frozenset[int]
    mask_reads_score: bool
    mask_reads_row: bool
    column_captured: tuple[int, ...]
    column_axes: frozenset[int]
    row_sums: int
    column_sums: int
    unbounded: bool
    source: str

    @property
    def may_be_empty(self) -> bool:
        """Whether every logit of a row, or of a tile of it, may be ``-inf``."""
        return self.mask is not None or self.logits is not None


@functools.lru_cache(maxsize=1024)
def compile_program(
    function: ScoreFunction, patterns: tuple[CapturedPattern, ...], precise: bool, wanted: tuple[int, ...] = ()
) -> TileProgram:
    """Compile a score function for captured tensors of given patterns.

    Args:
        precise: for float32 inputs; else functions with an absolute error below that of half precision are used.
        wanted: numbers of the captured tensors whose gradient is wanted.
    """
    function = function.pruned()
    builder = _ProgramBuilder(function, patterns, precise, wanted)
    analysis = analyse_mask(function, patterns)
    builder.forward(analysis)
    row_sums, column_sums = builder.backward()
    names = compile_source(builder.source)
    return TileProgram(
        **{name: names.get(name) for name in _FUNCTIONS},  # type: ignore[arg-type]
        key_head="key_head" in builder.ends,
        key_tail="key_tail" in builder.ends,
        query_head="query_head" in builder.ends,
        query_tail="query_tail" in builder.ends,
        mask_captured=tuple(function.captured(function.mask)),
        mask_axes=_lead_axes(function, function.mask),
        column_captured=tuple(function.captured(*analysis.column_opaque)),
        column_axes=frozenset().union(*(_lead_axes(function, p) for p in analysis.column_opaque)),
        mask_reads_score=function.depends_on(function.mask, "score"),
        mask_reads_row=analysis.by_row,
        row_sums=row_sums,
        column_sums=column_sums,
        unbounded=has_unbounded_terms(function.program, function.score),
        source=builder.source,
    )


_FUNCTIONS: Final = (
    *("logits", "mask", "opaque", "query_opaque", "sink", "key_range", "scattered_key_range", "query_range"),
    *("column_opaque", "tile_bounds", "query_tile_bounds"),
    *("row_step", "row_finish", "column_step", "column_finish", "sink_step"),
)


def _lead_axes(function: ScoreFunction, position: int | None) -> frozenset[int]:
    """Leading axes whose index an instruction reads, directly or not."""
    if position is None:
        return frozenset()
    name, *arguments = function.program[position]
    if name in LEAVES:
        return frozenset(arguments) if name == "lead_index" else frozenset()
    return frozenset().union(*(_lead_axes(function, a) for a in arguments))


class _ProgramBuilder:
    def __init__(
        self,
        function: ScoreFunction,
        patterns: tuple[CapturedPattern, ...],
        precise: bool,
        wanted: tuple[int, ...],
    ) -> None:
        self._function = function
        self._patterns = patterns
        self._precise = precise
        self._wanted = wanted
        self.source = ""
        self.ends: set[str] = set()  # the ends at which ranges may stop short, see TileProgram

    def _emitter(self) -> Emitter:
        return Emitter(self._function.program, self._patterns, self._precise)

    def _define(self, name: str, parameters: str, body: list[str], result: str | None) -> None:
        self.source += define(name, parameters, body, result)

    # ------------------------------------------------------------------------------------------ forward
    def forward(self, analysis: MaskAnalysis) -> None:
        function = self._function
        if function.program[function.score] != ("score",):
            emitter = self._emitter()
            result = emitter.as_float(function.score)
            if not function.depends_on(function.score, "score"):
                result = f"tl.broadcast_to({result}, score.shape)"
            self._define("logits", f"score, {CONTEXT}", emitter.lines, result)
        if analysis.constraints or analysis.opaque:
            self._conjunction("mask", [function.mask])
        if analysis.opaque:
            self._conjunction("opaque", list(analysis.opaque))
            self._tile_bounds("tile_bounds", list(analysis.opaque))
        if analysis.column_opaque:
            self._conjunction("column_opaque", list(analysis.column_opaque))
        for_columns = analysis.without_rows()
        if for_columns.opaque:
            self._conjunction("query_opaque", list(for_columns.opaque))
            self._tile_bounds("query_tile_bounds", list(for_columns.opaque), by_keys=True)
        if function.sink is not None:
            emitter = self._emitter()
            self._define("sink", CONTEXT, emitter.lines, emitter.as_float(function.sink))
        if analysis.constraints:
            self._range("key_range", analysis, rows=False)
            self._range("scattered_key_range", analysis, rows=False, scattered=True)
        if for_columns.constraints:
            self._range("query_range", for_columns, rows=True)

    def _conjunction(self, name: str, positions: list[int | None]) -> None:
        emitter = self._emitter()
        terms = [emitter.value(p) for p in positions if p is not None]
        self._define(name, f"score, {CONTEXT}", emitter.lines, " & ".join(terms))

    def _tile_bounds(self, name: str, positions: list[int], by_keys: bool = False) -> None:
        emitter = IntervalEmitter(self._function, self._patterns, by_keys)
        found = emitter.conjunction(positions)
        if found is not None:
            self._define(name, _BOUNDS, emitter.lines, f"({found[0]}, {found[1]})")

    def _range(self, name: str, analysis: MaskAnalysis, rows: bool, scattered: bool = False) -> None:
        emitter = RangeEmitter(Emitter(self._function.program, self._patterns, precise=False), scattered)
        interval = emitter.rows(analysis.constraints) if rows else emitter.columns(analysis.constraints)
        axis = "query" if rows else "key"
        self.ends |= {f"{axis}_head"} if interval.full_first != "0" else set()
        self.ends |= {f"{axis}_tail"} if interval.full_last != "limit" else set()
        self._define(name, _RANGE, emitter.lines, f"({', '.join(interval)})")

    # ----------------------------------------------------------------------------------------- backward
    def backward(self) -> tuple[int, int]:
        """Define the gradient functions; returns how many sums the row and the column functions carry."""
        by_tile, by_row, by_column = self._split_wanted()
        row_sums = self._gradients("row", by_tile, by_row)
        column_sums = self._gradients("column", [], by_column)
        if self._function.sink is not None:
            self._sink_gradients()
        return row_sums, column_sums

    def _split_wanted(self) -> tuple[list[int], list[int], list[int]]:
        found: tuple[list[int], list[int], list[int]] = ([], [], [])
        available = {number for number, _ in differentiate(self._function, self._function.score).captured}
        for number in self._wanted:
            pattern = self._patterns[number]
            if number in available:
                found[0 if pattern.is_tile else 2 if pattern.column else 1].append(number)
        return found

    def _gradients(self, axis: str, stored: list[int], summed: list[int]) -> int:
        """Define ``{axis}_step`` and ``{axis}_finish``.

        ``step(sums, score, upstream, keep, *context, gradients, strides) -> (gradient of the score, sums)`` adds the
        gradients of captured tensors with rows and columns to memory, and the others to sums along axis 1 of the tile;
        ``finish(sums, tile, *context, gradients, strides)`` adds those to memory.
        """
        gradient = differentiate(self._function, self._function.score)
        emitter = Emitter(gradient.function.program, self._patterns, self._precise)
        score = "tl.zeros_like(score)" if gradient.score is None else emitter.as_float(gradient.score)
        body = emitter.lines
        elementwise: dict[int, str] = {}
        for number, position in gradient.captured:  # one instruction per captured tensor: programs are pruned
            if number in (*stored, *summed):
                elementwise[number] = emitter.as_float(position)
        body.append(f"    result = {score}")
        names = ["result", *(f"g{n}" for n in elementwise)]
        body += [f"    g{n} = {value}" for n, value in elementwise.items()]
        body.append("    if keep is not None:")
        body += [f"        {name} = tl.where(keep, {name}, 0.0)" for name in names]
        body += [self._add(n, f"g{n}", "ok", row="i", column="j") for n in stored]
        sums = [f"sums[{place}] + tl.sum(g{n}, 1, keep_dims=True)" for place, n in enumerate(summed)]
        parameters = f"sums, score, upstream, keep, {CONTEXT}, {_GRADIENTS}"
        self._define(f"{axis}_step", parameters, body, f"result, ({', '.join(sums)}{',' * bool(sums)})")
        self._finish(axis, summed)
        return len(summed)

    def _finish(self, axis: str, summed: list[int]) -> None:
        body: list[str] = []
        for place, n in enumerate(summed):
            if self._patterns[n].row or self._patterns[n].column:
                index = {"row": "i"} if axis == "row" else {"column": "j"}
                body.append(self._add(n, f"sums[{place}]", f"{'i' if axis == 'row' else 'j'}_ok", **index))
            else:
                body.append(self._add(n, f"tl.sum(sums[{place}])", "None", row="tile"))
        self._define(f"{axis}_finish", f"sums, tile, {CONTEXT}, {_GRADIENTS}", body, None)

    def _sink_gradients(self) -> None:
        gradient = differentiate(self._function, self._function.sink or 0)
        captured = [(n, p) for n, p in gradient.captured if n in self._wanted]
        if not captured:
            return
        emitter = Emitter(gradient.function.program, self._patterns, self._precise)
        values = [(n, emitter.as_float(p)) for n, p in captured]
        body = emitter.lines
        for n, value in values:
            body.append(f"    g{n} = tl.where(i_ok, {value}, 0.0)")
            if self._patterns[n].row:
                body.append(self._add(n, f"g{n}", "i_ok", row="i"))
            else:
                body.append(self._add(n, f"tl.sum(g{n})", "None", row="tile"))
        self._define("sink_step", f"upstream, tile, {CONTEXT}, {_GRADIENTS}", body, None)

    def _add(self, number: int, value: str, exists: str, row: str = "", column: str = "") -> str:
        """A line that adds a value to the gradient buffer of a captured tensor, numbered among the wanted ones."""
        place = self._wanted.index(number)
        strides = f"gradient_strides[{place}]"
        offset = " + ".join(f"tl.cast(lead[{d}], tl.int64) * {strides}[{d}]" for d in range(LEAD_AXES))
        pointer = f"gradients[{place}] + ({offset})"
        pointer += f" + tl.cast({row}, tl.int64) * {strides}[{LEAD_AXES}]" if row else ""
        pointer += f" + {column} * {strides}[{LEAD_AXES + 1}]" if column else ""
        return f'    tl.atomic_add({pointer}, {value}, mask={exists}, sem="relaxed")'
