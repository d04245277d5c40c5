"""Which tiles of scores a mask needs: interval arithmetic on the mask's instructions.

A mask is a conjunction. Its terms ``j <= A * i + U`` and ``j >= A * i + U`` (``A`` in -1, 0, 1; ``U`` the same for a
whole tile of rows and columns) bound the columns of a tile of rows, and the rows of a tile of columns: causal masks
with any offset, sliding windows, prefixes, lengths per sequence. From them follow, per tile, the range outside which
every element is masked (``hull``) and the range inside which none of them masks (``full``). The other terms are opaque.

Terms whose ``U`` differs between rows (a captured position per row) still bound the columns, by its extremes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vbcompile.kernels.score_function import LEAVES, ScoreFunction
from vbcompile.kernels.score_triton import CapturedPattern, Emitter, infer_kinds


@dataclass(frozen=True)
class Bound:
    """``j <= A * i + U`` (``upper``) or ``j >= A * i + U``, with ``U = constant + sum of sign * term``.

    Attributes:
        terms: ``(sign, position of an integer instruction that reads neither score nor column)``.
        per_row: whether a term differs between rows otherwise than by ``A * i``.
    """

    upper: bool
    slope: int
    constant: int
    terms: tuple[tuple[int, int], ...]
    per_row: bool


@dataclass(frozen=True)
class Combination:
    """Conjunction or disjunction of constraints."""

    conjunction: bool
    parts: tuple["Bound | Combination", ...]


Constraint = Bound | Combination


@dataclass(frozen=True)
class MaskAnalysis:
    """A mask split into constraints on tiles and opaque terms.

    Attributes:
        constraints: all of them must hold.
        positions: the instructions that they stand for.
        opaque: positions of the mask's other terms.
        column_opaque: those of them that read neither row nor score.
        by_row: whether the mask differs between rows.
    """

    constraints: tuple[Constraint, ...] = ()
    positions: tuple[int, ...] = ()
    opaque: tuple[int, ...] = ()
    column_opaque: tuple[int, ...] = ()
    by_row: bool = False

    def without_rows(self) -> "MaskAnalysis":
        """The same with constraints as opaque that do not bound the rows of a tile of columns."""
        pairs = list(zip(self.constraints, self.positions, strict=True))
        usable = [(c, p) for c, p in pairs if not _any_per_row(c)]
        others = [p for c, p in pairs if _any_per_row(c)]
        return MaskAnalysis(tuple(c for c, _ in usable), tuple(p for _, p in usable), (*self.opaque, *others))


def _any_per_row(constraint: Constraint) -> bool:
    return constraint.per_row if isinstance(constraint, Bound) else any(map(_any_per_row, constraint.parts))


@dataclass
class _Linear:
    """``row * i + column * j + constant + sum of coefficient * term``."""

    row: int = 0
    column: int = 0
    constant: int = 0
    terms: dict[int, int] = field(default_factory=dict)

    def plus(self, other: "_Linear", sign: int) -> "_Linear":
        terms = dict(self.terms)
        for position, coefficient in other.terms.items():
            terms[position] = terms.get(position, 0) + sign * coefficient
        return _Linear(
            self.row + sign * other.row,
            self.column + sign * other.column,
            self.constant + sign * other.constant,
            {p: c for p, c in terms.items() if c},
        )


class _Analyser:
    def __init__(self, function: ScoreFunction, patterns: tuple[CapturedPattern, ...]) -> None:
        self._function = function
        self._program = function.program
        self._patterns = patterns
        self._kinds = infer_kinds(function.program, patterns)

    def analyse(self) -> MaskAnalysis:
        constraints: list[Constraint] = []
        positions: list[int] = []
        opaque: list[int] = []
        for term in self._conjuncts(self._function.mask):
            found = self._constraint(term)
            if found is None:
                opaque.append(term)
            else:
                constraints.append(found)
                positions.append(term)
        same = [p for p in opaque if not self._varies(p, row=True) and not self._function.depends_on(p, "score")]
        by_row = any(self._varies(p, row=True) for p in (*positions, *opaque))
        return MaskAnalysis(tuple(constraints), tuple(positions), tuple(opaque), tuple(same), by_row)

    def _conjuncts(self, position: int | None) -> list[int]:
        if position is None:
            return []
        name, *arguments = self._program[position]
        if name == "const" and arguments[0] is True:
            return []
        if name == "and":
            return [term for a in arguments for term in self._conjuncts(a)]
        return [position]

    def _constraint(self, position: int) -> Constraint | None:
        name, *arguments = self._program[position]
        if name in ("and", "or"):
            parts = [self._constraint(a) for a in arguments]
            if None in parts:
                return None
            return Combination(name == "and", tuple(p for p in parts if p is not None))
        if name not in ("lt", "le", "gt", "ge", "eq"):
            return None
        x, y = arguments
        match name:
            case "lt" | "le":
                return self._at_most(x, y, int(name == "lt"))
            case "gt" | "ge":
                return self._at_most(y, x, int(name == "gt"))
        both = (self._at_most(x, y, 0), self._at_most(y, x, 0))
        return None if None in both else Combination(True, both)  # type: ignore[arg-type]

    def _at_most(self, x: int, y: int, strict: int) -> Constraint | None:
        """The constraint ``x + strict <= y``; ``abs(z) <= y`` gives two."""
        right = self._linear(y)
        name, *arguments = self._program[x]
        if name == "abs" and self._kinds[x] == "int":
            inner = self._linear(arguments[0])
            if inner is None or right is None:
                return None
            both = [self._bound(_Linear().plus(inner, sign).plus(right, -1), strict) for sign in (1, -1)]
            return None if None in both else Combination(True, tuple(b for b in both if b is not None))
        left = self._linear(x)
        return None if left is None or right is None else self._bound(left.plus(right, -1), strict)

    def _bound(self, linear: _Linear, strict: int) -> Bound | None:
        """The constraint ``linear + strict <= 0``."""
        if abs(linear.column) != 1 or abs(linear.row) > 1 or any(abs(c) != 1 for c in linear.terms.values()):
            return None
        upper = linear.column == 1
        sign = -1 if upper else 1
        terms = tuple((sign * c, p) for p, c in sorted(linear.terms.items()))
        per_row = any(self._varies(p, row=True) for _, p in terms)
        return Bound(upper, sign * linear.row, sign * (linear.constant + strict), terms, per_row)

    def _linear(self, position: int) -> _Linear | None:
        name, *arguments = self._program[position]
        if self._kinds[position] != "int":
            return None
        if name == "q_index":
            return _Linear(row=1)
        if name == "k_index":
            return _Linear(column=1)
        if name == "const":
            return _Linear(constant=arguments[0])
        if name in ("add", "sub", "neg") and all(self._kinds[a] == "int" for a in arguments):
            parts = [self._linear(a) for a in arguments]
            if None not in parts:
                first = _Linear() if name == "neg" else parts[0]
                return first.plus(parts[-1], -1 if name != "add" else 1)  # type: ignore[union-attr, arg-type]
        if self._varies(position, row=False):
            return None
        return _Linear(terms={position: 1})

    def _varies(self, position: int, row: bool) -> bool:
        """Whether an instruction reads the score or differs between columns (or, asked so, between rows)."""
        name, *arguments = self._program[position]
        if name == "captured":
            pattern = self._patterns[arguments[0]]
            return pattern.row if row else pattern.column
        if name in LEAVES:
            return name in (("q_index",) if row else ("k_index", "score", "upstream"))
        return any(self._varies(a, row) for a in arguments)


def analyse_mask(function: ScoreFunction, patterns: tuple[CapturedPattern, ...]) -> MaskAnalysis:
    """Split the mask of a score function; both lists are empty where there is none."""
    return _Analyser(function, patterns).analyse()


def linear_form(
    function: ScoreFunction, patterns: tuple[CapturedPattern, ...], position: int
) -> tuple[int, int, int, dict[int, int]] | None:
    """``(a, b, c, {term: coefficient})`` where an integer instruction equals ``a * i + b * j + c`` plus terms that read
    neither score nor column; None for any other."""
    found = _Analyser(function, patterns)._linear(position)
    return None if found is None else (found.row, found.column, found.constant, found.terms)


@dataclass(frozen=True)
class Interval:
    """Triton expressions of the bounds ``[hull_first, hull_last)`` and ``[full_first, full_last)``."""

    hull_first: str
    full_first: str
    full_last: str
    hull_last: str

    def __iter__(self):
        return iter((self.hull_first, self.full_first, self.full_last, self.hull_last))


_EVERYTHING = Interval("0", "0", "limit", "limit")


class RangeEmitter:
    """Writes the ranges that constraints give, as Triton source behind the lines of ``emitter``.

    ``scattered`` is for tiles whose rows are not consecutive or belong to several leading indices.
    """

    def __init__(self, emitter: Emitter, scattered: bool = False) -> None:
        self._scattered = scattered
        self._emitter = emitter
        self._count = 0
        self.lines = emitter.lines

    def columns(self, constraints: Sequence[Constraint]) -> Interval:
        """Ranges of columns for rows ``first <= i <= last`` (``i`` where ``i_ok``); ``limit`` is their number."""
        return self._all([self._columns(c) for c in constraints])

    def rows(self, constraints: Sequence[Constraint]) -> Interval:
        """Ranges of rows for columns ``first <= j <= last``; ``limit`` is the number of rows."""
        return self._all([self._rows(c) for c in constraints])

    def _columns(self, constraint: Constraint) -> Interval:
        if isinstance(constraint, Combination):
            return self._combine(constraint, [self._columns(p) for p in constraint.parts])
        offset = self._offset(constraint)
        if constraint.per_row or self._scattered:
            least, most = self._extremes(constraint, offset)
        elif constraint.slope == 0:
            least = most = offset
        else:
            ends = [f"first + {offset}", f"last + {offset}"] if constraint.slope > 0 else []
            ends = ends or [f"{offset} - last", f"{offset} - first"]
            least, most = (self._name(e) for e in ends)
        if constraint.upper:
            return Interval("0", "0", self._name(f"{least} + 1"), self._name(f"{most} + 1"))
        return Interval(least, most, "limit", "limit")

    def _extremes(self, bound: Bound, offset: str) -> tuple[str, str]:
        """Least and greatest ``A * i + U`` over the rows that exist."""
        slope = {0: "", 1: "i + ", -1: "-i + "}[bound.slope]
        value = self._name(f"{slope}{offset} + i * 0")
        big = 2**30
        return (
            self._name(f"tl.min(tl.where(i_ok, {value}, {big}))"),
            self._name(f"tl.max(tl.where(i_ok, {value}, {-big}))"),
        )

    def _rows(self, constraint: Constraint) -> Interval:
        if isinstance(constraint, Combination):
            return self._combine(constraint, [self._rows(p) for p in constraint.parts])
        u, upper = self._offset(constraint), constraint.upper
        near, far = ("first", "last") if upper else ("last", "first")  # the columns that satisfy it most, least easily
        if constraint.slope == 0:
            sign = "<=" if upper else ">="
            some, every = (self._name(f"tl.where({end} {sign} {u}, limit, 0)") for end in (near, far))
            return Interval("0", "0", every, some)
        hull, full = ((f"{end} - {u}" if constraint.slope > 0 else f"{u} - {end}") for end in (near, far))
        if upper == (constraint.slope > 0):  # rows are bounded below
            return Interval(self._name(hull), self._name(full), "limit", "limit")
        return Interval("0", "0", self._name(f"{full} + 1"), self._name(f"{hull} + 1"))

    def _offset(self, bound: Bound) -> str:
        """Name of ``U``, clamped so that no later step overflows 32 bits."""
        total = str(bound.constant)
        for sign, position in bound.terms:
            total += f" {'+' if sign > 0 else '-'} tl.cast({self._emitter.value(position)}, tl.int64)"
        if not bound.terms:
            return f"({max(-(2**30), min(2**30, bound.constant))})"
        return self._name(f"tl.cast(tl.minimum(tl.maximum({total}, {-(2**30)}), {2**30}), tl.int32)")

    def _combine(self, combination: Combination, parts: list[Interval]) -> Interval:
        if combination.conjunction:
            return self._all(parts)
        result = parts[0]
        for part in parts[1:]:
            longer = self._name(f"{part.full_last} - {part.full_first} > {result.full_last} - {result.full_first}")
            result = Interval(
                self._name(f"tl.minimum({result.hull_first}, {part.hull_first})"),
                self._name(f"tl.where({longer}, {part.full_first}, {result.full_first})"),
                self._name(f"tl.where({longer}, {part.full_last}, {result.full_last})"),
                self._name(f"tl.maximum({result.hull_last}, {part.hull_last})"),
            )
        return result

    def _all(self, parts: list[Interval]) -> Interval:
        result = _EVERYTHING
        for part in parts:
            result = Interval(
                self._join("tl.maximum", result.hull_first, part.hull_first, "0"),
                self._join("tl.maximum", result.full_first, part.full_first, "0"),
                self._join("tl.minimum", result.full_last, part.full_last, "limit"),
                self._join("tl.minimum", result.hull_last, part.hull_last, "limit"),
            )
        return result

    def _join(self, function: str, x: str, y: str, neutral: str) -> str:
        return x if y == neutral else self._name(f"{function}({x}, {y})")

    def _name(self, expression: str) -> str:
        self._count += 1
        self.lines.append(f"    t{self._count} = {expression}")
        return f"t{self._count}"
