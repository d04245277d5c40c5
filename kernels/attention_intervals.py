"""What a mask's terms can be over whole tiles: interval arithmetic on values that only the tensors know.

For terms that compare positions, lengths and captured integers which belong to rows or to columns (documents, padding,
blocks), the least and the greatest value per tile bound the term without a look at its elements: ``some`` is False
where no element can take part, ``every`` is True where all do. Floats are left out, since NaN has no bounds.
"""

from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.score_triton import CapturedPattern, Emitter, infer_kinds

Pair = tuple[str, str]  # names of least and greatest value, or of ``some`` and ``every``


class IntervalEmitter:
    """Writes bounds of instructions as Triton source.

    The code runs on ``i`` (row numbers of one tile, all existing), ``j`` (all existing, ``[32, tiles, n]``: n times 32
    neighbours out of each tile), ``first``, ``last`` (first and last row), ``column_first``, ``column_last`` (of each
    tile), and the context of
    :mod:`vbcompile.kernels.score_triton`. ``by_keys``: on the columns of one tile and the rows of many.
    """

    def __init__(self, function: ScoreFunction, patterns: tuple[CapturedPattern, ...], by_keys: bool = False) -> None:
        self._by_keys = by_keys
        self._program = function.program
        self._patterns = patterns
        self._kinds = infer_kinds(function.program, patterns)
        self._emitter = Emitter(function.program, patterns, precise=False)
        self._found: dict[int, Pair | None] = {}
        self.lines = self._emitter.lines

    def conjunction(self, positions: list[int]) -> Pair | None:
        """``(some, every)`` of all terms together; None where one has no bounds."""
        pairs = [self.bounds(p) for p in positions]
        known = [p for p in pairs if p is not None]
        if len(known) < len(pairs):
            return None
        return tuple(" & ".join(pair[n] for pair in known) for n in (0, 1))  # type: ignore[return-value]

    def bounds(self, position: int) -> Pair | None:
        """Bounds of an instruction, or None where they are unknown."""
        if position not in self._found:
            expressions = self._expressions(position)
            self._found[position] = None if expressions is None else self._name(position, expressions)
        return self._found[position]

    def _name(self, position: int, expressions: Pair) -> Pair:
        names = f"low{position}", f"high{position}"
        self.lines += [f"    {name} = {e}" for name, e in zip(names, expressions, strict=True)]
        return names

    def _expressions(self, position: int) -> Pair | None:
        name, *arguments = self._program[position]
        if self._kinds[position] == "float":
            return None
        match name:
            case "q_index":
                return "first", "last"
            case "k_index":
                return "column_first", "column_last"
            case "const" | "q_length" | "k_length" | "lead_index":
                value = self._emitter.value(position)
                return value, value
            case "captured":
                return self._captured(position, self._patterns[arguments[0]])
        pairs = [self.bounds(a) for a in arguments]
        if any(pair is None for pair in pairs):
            return None
        if name in ("mul", "floordiv"):
            return self._scaled(name, arguments, pairs[0] or ("", ""))
        kinds = [self._kinds[a] for a in arguments]
        return self._pointwise(name, [p for p in pairs if p is not None], kinds)

    def _captured(self, position: int, pattern: CapturedPattern) -> Pair | None:
        if pattern.is_tile:
            return None
        value = self._emitter.value(position)
        if not pattern.row and not pattern.column:
            return value, value
        of_tiles = pattern.column != self._by_keys  # else of the one tile that is looked at
        least, greatest = (
            f"tl.{name}(tl.{name}({{0}}, 2), 0)" if of_tiles else f"tl.{name}({{0}}, 0)" for name in ("min", "max")
        )
        if pattern.kind == "bool":
            whole = f"tl.cast({value}, tl.int32)"
            return f"{greatest.format(whole)} != 0", f"{least.format(whole)} != 0"
        return least.format(value), greatest.format(value)

    def _scaled(self, name: str, arguments: list[int], pair: Pair) -> Pair | None:
        """By a positive constant on the right, which keeps the order of integers."""
        other, *constant = self._program[arguments[1]]
        if other != "const" or type(constant[0]) is not int or constant[0] <= 0 or self._kinds[arguments[0]] != "int":
            return None
        factor = self._emitter.value(arguments[1])
        if name == "floordiv":
            return f"math.floor_divide({pair[0]}, {factor})", f"math.floor_divide({pair[1]}, {factor})"
        return f"tl.cast({pair[0]}, tl.int64) * {factor}", f"tl.cast({pair[1]}, tl.int64) * {factor}"

    def _pointwise(self, name: str, pairs: list[Pair], kinds: list[str]) -> Pair | None:
        (low, high), (other_low, other_high) = pairs[0], pairs[-1]
        if name in ("and", "or") and kinds == ["bool", "bool"]:
            sign = "&" if name == "and" else "|"
            return f"{low} {sign} {other_low}", f"{high} {sign} {other_high}"
        if name == "not" and kinds == ["bool"]:
            return f"{high} == 0", f"{low} == 0"
        if set(kinds) != {"int"}:
            return None
        match name:
            case "add":
                return f"{low} + {other_low}", f"{high} + {other_high}"
            case "sub":
                return f"{low} - {other_high}", f"{high} - {other_low}"
            case "neg":
                return f"-{high}", f"-{low}"
            case "maximum" | "minimum":
                return f"tl.{name}({low}, {other_low})", f"tl.{name}({high}, {other_high})"
            case "abs":
                least = f"tl.where(({low} <= 0) & ({high} >= 0), 0, tl.minimum(tl.abs({low}), tl.abs({high})))"
                return least, f"tl.maximum(tl.abs({low}), tl.abs({high}))"
            case "lt":
                return f"{low} < {other_high}", f"{high} < {other_low}"
            case "le":
                return f"{low} <= {other_high}", f"{high} <= {other_low}"
            case "gt":
                return f"{high} > {other_low}", f"{low} > {other_high}"
            case "ge":
                return f"{high} >= {other_low}", f"{low} >= {other_high}"
        touch = f"({low} <= {other_high}) & ({other_low} <= {high})"
        one = f"({low} == {high}) & ({other_low} == {other_high}) & ({low} == {other_low})"
        if name == "eq":
            return touch, one
        return (f"({one}) == 0", f"({touch}) == 0") if name == "ne" else None
