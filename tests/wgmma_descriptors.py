"""Matrix descriptors of Hopper's products, in PTX and in the machine code that the assembler makes of it.

A descriptor is a place in shared memory (bits 0 to 13) under a constant that says how the matrix lies there: its high
half holds stride and swizzle. ptxas 12.8 goes wrong where one place gets two such halves: it adds their difference to a
register that it has never set.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import triton

_DEEPEST = 12  # definitions that are followed
_REGISTERS = 256  # more than there are; a function that is called may write to any
_WRITER = re.compile(r"U(?!TMA|BLKCP|STS|CGABAR|.*SETP)|R2UR|S2UR|VOTEU|C?REDUX|LDCU")
_LINE = re.compile(r"(\.L_x_\d+):|\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*);")
_JUMPS = ("BRA", "BRX", "BREAK", "JMP")


def places_with_two_halves(ptx: str) -> dict[str, set[int]]:
    """Shared addresses, as expressions, that descriptors of different high halves are made of."""
    definitions = defaultdict(list)
    for name, register, operands in re.findall(r"^\s+([a-z][\w.:]+)\s+(%rd?\d+),\s*([^;{]+);", ptx, re.MULTILINE):
        definitions[register].append((name, [o.strip() for o in operands.split(",")]))

    def expression(operand: str, depth: int = 0) -> str:
        found = definitions.get(operand, ())
        if len(found) != 1 or depth > _DEEPEST:
            return operand
        name, operands = found[0]
        return f"{name}({', '.join(expression(o, depth + 1) for o in operands)})"

    halves = defaultdict(set)
    for name, (place, *rest) in (definition for found in definitions.values() for definition in found):
        if name in ("or.b64", "add.s64") and len(rest) == 1 and re.fullmatch(r"-?\d+", rest[0]):
            half = int(rest[0]) >> 32 & 0xFFFFFFFF
            text = expression(place)
            if "bfe.u32(" in text and half not in (0, 0xFFFFFFFF):
                halves[text].add(half)
    return {place: found for place, found in halves.items() if len(found) > 1}


def unset_registers(cubin: bytes) -> list[str]:
    """Instructions that read a uniform register which no instruction on any way there writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.run([tool, "-c", "-ndf", path], capture_output=True, text=True, check=True).stdout
    matches = map(_LINE.match, text.splitlines())
    lines = [tuple(part or "" for part in found.groups()) for found in matches if found]
    labels = {label: n for n, (label, *_) in enumerate(lines) if label}
    written: dict[int, frozenset[int]] = {}  # by any instruction ahead
    todo = [(0, frozenset[int]())]
    while todo:
        n, ahead = todo.pop()
        if n in written and ahead <= written[n]:
            continue
        written[n] = ahead | written.get(n, frozenset())
        after = written[n] | set(range(_REGISTERS) if lines[n][2].startswith("CALL") else _written(*lines[n][2:]))
        todo += [(place, after) for place in _next(n, lines, labels)]
    reading = {n: _read(*lines[n][2:]) for n in sorted(written)}
    return [f"{lines[n][2]} {lines[n][3]}" for n, read in reading.items() if not read <= written[n]]


def _next(n: int, lines: list[tuple[str, ...]], labels: dict[str, int]) -> list[int]:
    _, guard, name, operands = lines[n]
    following = [n + 1] if n + 1 < len(lines) else []
    if name.startswith("BRX"):
        return [*labels.values()]
    if name.startswith("EXIT") and not guard:
        return []
    if not name.startswith(_JUMPS):
        return following
    targets = [labels[label] for label in re.findall(r"\.L_x_\d+", operands) if label in labels]
    always = name.startswith("BRA") and not guard and not re.search(r"P\d", operands.split("`")[0])
    return targets if always and targets else [*targets, *following]


def _written(name: str, operands: str) -> range:
    found = re.match(r"(?:U?P[T\d], )*UR(\d+)(?=,|$)", operands.strip()) if _WRITER.match(name) else None
    count = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
    return range(int(found[1]), int(found[1]) + count) if found else range(0)


def _read(name: str, operands: str) -> set[int]:
    given = operands.strip()
    if _written(name, operands):
        given = re.sub(r"\bUR\d+", "", given, count=1)
    found = re.findall(r"(gdesc\[)?\bUR(\d+)", given)  # a product reads the second half of four, at least
    return {n for kind, number in found for n in ((int(number) + 2, int(number) + 3) if kind else (int(number),))}
