"""Score functions as Triton source: an emitter for instructions, and a compiler from source text to functions.

Emitted code runs on values that broadcast to a tile of scores: ``i`` (row indices), ``j`` (column indices), ``lead``
(four leading indices), captured tensors as pointers with strides ``(lead 0, .., lead 3, row, column)``. ``i_ok``,
``j_ok`` and ``ok`` (rows, columns, tile) say which elements exist; None where all do.
"""

import functools
import hashlib
import linecache
import struct
from dataclasses import dataclass
from typing import Any, Final

import torch

from vbcompile.kernels.score_function import Instruction

LEAD_AXES: Final = 4  # that kernels index; fewer are padded
CONTEXT: Final = "i, j, i_ok, j_ok, ok, lead, q_length, k_length, captured, strides"

_COMPARE: Final = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ARITHMETIC: Final = {"add": "+", "sub": "-", "mul": "*"}
_LOGIC: Final = {"and": "&", "or": "|", "xor": "^"}
_CALL: Final = {  # float functions of one argument
    "exp": "tl.exp",
    "log": "tl.log",
    "sqrt": "tl.sqrt",
    "rsqrt": "tl.rsqrt",
    "sin": "tl.sin",
    "cos": "tl.cos",
    "tanh": "math.tanh",
    "atan": "math.atan",
    "erf": "tl.erf",
    "sigmoid": "math.sigmoid",
}
_PRECISE: Final = {"sqrt": "tl.sqrt_rn", "tanh": "math.tanh_precise", "sigmoid": "math.sigmoid_precise"}
_SMALL_FACTOR: Final = 256  # an index times this fits 32 bits


@dataclass(frozen=True)
class CapturedPattern:
    """How a captured tensor enters a program.

    Attributes:
        kind: ``bool``, ``int`` or ``float``.
        row, column: whether it has more than one row, column.
        wide: whether the offset of a column needs 64 bits.
    """

    kind: str
    row: bool
    column: bool
    wide: bool = False

    @property
    def is_tile(self) -> bool:
        """Whether it has a number for each score of a tile."""
        return self.row and self.column

    @staticmethod
    def of(t: torch.Tensor) -> "CapturedPattern":
        kind = "bool" if t.dtype == torch.bool else "float" if t.dtype.is_floating_point else "int"
        rows, columns = t.shape[-2:]
        return CapturedPattern(kind, rows != 1, columns != 1, columns * abs(t.stride(-1)) >= 2**31)


def infer_kinds(program: tuple[Instruction, ...], patterns: tuple[CapturedPattern, ...]) -> list[str]:
    """``bool``, ``int`` or ``float`` of every instruction, by PyTorch's promotion."""
    kinds: list[str] = []
    for name, *arguments in program:
        if name in ("score", "upstream"):
            kind = "float"
        elif name == "captured":
            kind = patterns[arguments[0]].kind
        elif name == "const":
            kind = type(arguments[0]).__name__
        elif name in ("q_index", "k_index", "lead_index", "q_length", "k_length", "to_int"):
            kind = "int"
        elif name in _COMPARE or name in _LOGIC or name in ("not", "to_bool"):
            kind = "bool"
        elif name in _CALL or name in ("div", "log1p", "to_float"):
            kind = "float"
        else:
            operands = [kinds[a] for a in (arguments[1:] if name == "where" else arguments)]
            kind = max(operands, key=("bool", "int", "float").index)
        kinds.append(kind)
    return kinds


class Emitter:
    """Writes the instructions that some outputs need as lines of Triton, each once."""

    def __init__(
        self, program: tuple[Instruction, ...], patterns: tuple[CapturedPattern, ...], precise: bool, indent: int = 4
    ) -> None:
        self._program = program
        self._patterns = patterns
        self._precise = precise
        self._kinds = infer_kinds(program, patterns)
        self._names: dict[int, str] = {}
        self._prefix = " " * indent
        self.lines: list[str] = []

    def value(self, position: int) -> str:
        """Name of the variable that holds instruction ``position``."""
        if position not in self._names:
            expression = self._expression(position)
            self._names[position] = f"v{position}"
            self.lines.append(f"{self._prefix}v{position} = {expression}")
        return self._names[position]

    def as_float(self, position: int) -> str:
        name = self.value(position)
        return name if self._kinds[position] == "float" else f"tl.cast({name}, tl.float32)"

    def _expression(self, position: int) -> str:
        name, *arguments = self._program[position]
        if name in ("score", "upstream", "q_length", "k_length"):
            return name
        if name in ("q_index", "k_index"):
            return "i" if name == "q_index" else "j"
        if name == "lead_index":
            return f"lead[{arguments[0]}]"
        if name == "const":
            return _constant(arguments[0])
        if name == "captured":
            return self._load(arguments[0])
        return self._pointwise(name, arguments, self._kinds[position])

    def _load(self, number: int) -> str:
        pattern = self._patterns[number]
        offset = " + ".join(f"tl.cast(lead[{d}], tl.int64) * strides[{number}][{d}]" for d in range(LEAD_AXES))
        pointer = f"captured[{number}] + ({offset})"
        if pattern.row:
            pointer += f" + tl.cast(i, tl.int64) * strides[{number}][{LEAD_AXES}]"
        if pattern.column:
            pointer += f" + {'tl.cast(j, tl.int64)' if pattern.wide else 'j'} * strides[{number}][{LEAD_AXES + 1}]"
        exists = {(True, True): "ok", (True, False): "i_ok", (False, True): "j_ok", (False, False): "None"}
        load = f"tl.load({pointer}, mask={exists[pattern.row, pattern.column]})"
        return load + {"bool": " != 0", "float": ".to(tl.float32)", "int": ""}[pattern.kind]

    def _number(self, position: int, kind: str) -> str:
        """An argument converted to the kind in which an operation takes place."""
        name, own = self.value(position), self._kinds[position]
        if kind == "float":
            return self.as_float(position)
        return f"tl.cast({name}, tl.int32)" if own == "bool" else name

    def _pointwise(self, name: str, arguments: list[int], kind: str) -> str:
        kinds = [self._kinds[a] for a in arguments]
        common = "float" if "float" in kinds or kind == "float" else "int"
        if name in _COMPARE:
            x, y = (self._number(a, common) for a in arguments)
            return f"{x} {_COMPARE[name]} {y}"
        if name in _LOGIC or name in ("not", "to_bool"):
            truths = [
                self.value(a) if k == "bool" else f"({self.value(a)} != 0)"
                for a, k in zip(arguments, kinds, strict=True)
            ]
            if name in _LOGIC:
                return f"{truths[0]} {_LOGIC[name]} {truths[1]}"
            return f"{truths[0]} == 0" if name == "not" else truths[0]
        if name == "where":
            condition = self.value(arguments[0]) if kinds[0] == "bool" else f"({self.value(arguments[0])} != 0)"
            x, y = (self._number(a, kind) for a in arguments[1:])
            return f"tl.where({condition}, {x}, {y})" + (" != 0" if kind == "bool" else "")
        if name == "to_int":
            return f"tl.cast({self.value(arguments[0])}, tl.int64)"
        values = [self._number(a, common) for a in arguments]
        result = self._arithmetic(name, arguments, values, common)
        return f"({result}) != 0" if kind == "bool" else result

    def _arithmetic(self, name: str, arguments: list[int], values: list[str], common: str) -> str:
        x, y = values[0], values[-1]
        match name:
            case "mul" if common == "int" and not any(self._is_small(a) for a in arguments):
                return f"tl.cast({x}, tl.int64) * {y}"
            case "add" | "sub" | "mul":
                return f"{x} {_ARITHMETIC[name]} {y}"
            case "div":
                return self._divide(x, y, arguments[1])
            case "floordiv":
                return f"math.floor_divide{'_float' if common == 'float' else ''}({x}, {y})"
            case "mod":
                return f"math.remainder{'_float' if common == 'float' else ''}({x}, {y})"
            case "maximum" | "minimum":
                return f"math.{name}({x}, {y})" if common == "float" else f"tl.{name}({x}, {y})"
            case "pow":
                return self._power(x, y, arguments[1], common)
            case "neg":
                return f"-{x}"
            case "abs":
                return f"tl.abs({x})"
            case "relu":
                return f"tl.where({x} < 0, tl.zeros_like({x}), {x})"
            case "log1p":
                return f"math.log1p({x})"
            case "to_float":
                return x
        return f"{_PRECISE.get(name, _CALL[name]) if self._precise else _CALL[name]}({x})"

    def _divide(self, x: str, y: str, divisor: int) -> str:
        name, *arguments = self._program[divisor]
        if self._precise:
            return f"tl.div_rn({x}, {y})"
        if name == "const" and 1e-30 < abs(arguments[0]) < 1e30:
            return f"{x} * {_to_float32(1 / arguments[0])!r}"
        return f"{x} / {y}"

    def _power(self, x: str, y: str, exponent: int, common: str) -> str:
        name, *arguments = self._program[exponent]
        if name == "const" and arguments[0] in (1, 2, 3, 4):
            wide = f"tl.cast({x}, tl.int64)" if common == "int" else x
            return " * ".join([f"({wide})"] * int(arguments[0]))
        if common == "int":
            return f"tl.cast(tl.floor(math.power(tl.cast({x}, tl.float32), tl.cast({y}, tl.float32)) + 0.5), tl.int64)"
        return f"math.power({x}, {y})"

    def _is_small(self, position: int) -> bool:
        name, *arguments = self._program[position]
        return name == "const" and abs(arguments[0]) <= _SMALL_FACTOR


def _constant(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return f"tl.full((), {value}, tl.int1)"
    if isinstance(value, int):
        return f"tl.full((), {value}, tl.int{constant_bits(value)})"
    if value != value or abs(value) == float("inf"):
        return f'tl.full((), float("{value}"), tl.float32)'
    return f"tl.full((), {_to_float32(value)!r}, tl.float32)"


def constant_bits(value: int) -> int:
    """32, or 64 where a position added to the constant may be beyond 32 bits."""
    return 32 if abs(value) < 2**30 else 64


def _to_float32(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return float("inf") if value > 0 else -float("inf")


def has_unbounded_terms(program: tuple[Instruction, ...], position: int) -> bool:
    """Whether a value may be so large that a product with ``log2(e)`` overflows, or is rounded by whole units: fills,
    captured floats (additive masks).

    Of two equal such numbers a fused multiplication and subtraction leaves the rounding of one product: 2**30 for 1e10.
    """
    name, *arguments = program[position]
    if name == "captured":
        return True
    if name == "const":
        return abs(arguments[0]) > 1e5
    if name in ("score", "upstream", "q_index", "k_index", "lead_index", "q_length", "k_length"):
        return False
    return any(has_unbounded_terms(program, a) for a in arguments)


@functools.lru_cache(maxsize=4096)
def compile_source(source: str) -> dict[str, Any]:
    """Run Triton source text (functions under ``@triton.jit``) and return its names.

    Triton reads a function's text through :mod:`linecache`, so the text is entered there under a name made of its hash.
    """
    import triton
    import triton.language as tl

    from vbcompile.kernels import score_math

    name = f"<score function {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "math": score_math, "__name__": __name__}
    exec(compile(source, name, "exec"), namespace)
    return namespace


def define(name: str, parameters: str, body: list[str], result: str | None) -> str:
    """Source of one function; ``result`` None returns nothing."""
    end = ["    pass"] if result is None else [f"    return {result}"]
    return "\n".join(["@triton.jit", f"def {name}({parameters}):", *body, *end, "", ""])
