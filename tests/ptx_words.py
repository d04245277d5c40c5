"""Runs short pieces of PTX on arrays of 32-bit words, one instruction after the other."""

import re
from collections.abc import Callable

import numpy as np
import torch

TYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def multiply_halves(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of pairs of 16-bit floats, rounded to nearest even, subnormals kept."""
    x, y = (torch.from_numpy(v.view(np.int16)).view(TYPES[kind]).double() for v in (a, b))
    return (x * y).to(TYPES[kind]).view(torch.int16).numpy().view(np.uint32)


def or_of_and(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    assert (table == 0xEA).all()  # the truth table of (a & b) | c
    return (a & b) | c


def add_to_product(kind: str) -> Callable[..., np.ndarray]:
    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        assert (c == 0x80008000).all()  # minus zero: the sum is the product
        return multiply_halves(kind, a, b)

    return run


def pick_bytes(a: np.ndarray, b: np.ndarray, select: np.ndarray) -> np.ndarray:
    """prmt: each nibble of ``select`` names a byte of ``b a``; its highest bit asks for copies of the byte's sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    picked = np.zeros_like(a)
    for place in range(4):
        index = (select >> np.uint32(4 * place)) & np.uint32(7)
        byte = (both >> (index.astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = (select >> np.uint32(4 * place + 3)) & np.uint32(1)
        byte = np.where(sign == 1, (byte >> np.uint64(7)) * np.uint64(255), byte)
        picked |= byte.astype(np.uint32) << np.uint32(8 * place)
    return picked


def rotate(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
    assert (low == high).all()
    return low << count | low >> (np.uint32(32) - count)


def add_products_of_bytes(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    for place in map(np.uint32, (0, 8, 16, 24)):
        c = c + ((a >> place) & np.uint32(255)) * ((b >> place) & np.uint32(255))
    return c


def larger_magnitudes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of pairs of 16-bit floats: the larger magnitude, with the sign of the product. NaN is not tried."""
    x, y = (v.view(np.uint16) for v in (a, b))
    return (np.maximum(x & 0x7FFF, y & 0x7FFF) | (x ^ y) & 0x8000).view(np.uint32)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 ``a * b + c``, rounded once more than the device does."""
    x, y, z = (v.view(np.float32).astype(np.float64) for v in (a, b, c))
    return (x * y + z).astype(np.float32).view(np.uint32)


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "not.b32": np.bitwise_not,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "shf.l.wrap.b32": rotate,
    "lop3.b32": or_of_and,
    "prmt.b32": pick_bytes,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "add.u32": np.add,
    "dp4a.u32.u32": add_products_of_bytes,
    "max.NaN.xorsign.abs.bf16x2": larger_magnitudes,
    "fma.rn.f32": multiply_add,
    "sub.u32": np.subtract,
    **{f"mul.rn.{kind}": lambda a, b, kind=kind: multiply_halves(kind, a, b) for kind in TYPES},
    **{f"fma.rn.{kind}": add_to_product(kind) for kind in TYPES},
}


def run_ptx(text: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All registers after the instructions; ``{a, b}`` is a word made of two 16-bit registers, a the low one.

    Raises:
        KeyError: an instruction or register that is not known.
    """
    state = {name: value.astype(np.uint32) for name, value in inputs.items()}
    size = next(iter(state.values())).shape

    def read(operand: str) -> np.ndarray:
        if operand.startswith("{"):
            low, high = (state[name] for name in operand[1:-1].replace(" ", "").split(","))
            return low | high << np.uint32(16)
        constant = re.fullmatch(r"0[xf][0-9A-Fa-f]+|\d+", operand)
        return np.full(size, int(operand.replace("0f", "0x"), 0), np.uint32) if constant else state[operand]

    body = re.sub(r"\.reg[^;]*;", "", text.strip()[1:-1])
    for instruction in filter(None, (i.strip() for i in body.split(";"))):
        name, rest = instruction.split(" ", 1)
        target, *operands = (o.strip() for o in re.findall(r"\{[^}]*\}|[^,\s{}]+", rest))
        value = OPERATIONS[name](*map(read, operands))
        if target.startswith("{"):
            low, high = target[1:-1].replace(" ", "").split(",")
            state[low], state[high] = value & np.uint32(0xFFFF), value >> np.uint32(16)
        else:
            state[target] = value
    return state


def matrix_product(kind: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """mma.m16n8k16 of one warp, registers ``[32]`` as the PTX ISA assigns them; sums float32 as words, in double."""
    lane = np.arange(32)
    row, column = lane // 4, 2 * (lane % 4)

    def halves(word: np.ndarray) -> list[torch.Tensor]:
        both = torch.from_numpy(word.view(np.int16).reshape(32, 2).copy()).view(TYPES[kind]).double()
        return [both[:, 0], both[:, 1]]

    left, right, total = torch.zeros(16, 16).double(), torch.zeros(16, 8).double(), torch.zeros(16, 8).double()
    for register in range(4):
        for part, value in enumerate(halves(a[register])):
            left[row + 8 * (register % 2), column + 8 * (register // 2) + part] = value
        total[row + 8 * (register // 2), column + register % 2] = torch.from_numpy(
            c[register].view(np.float32)
        ).double()
    for register in range(2):
        for part, value in enumerate(halves(b[register])):
            right[column + 8 * register + part, row] = value
    total = (total + left @ right).float()
    return [total[row + 8 * (r // 2), column + r % 2].numpy().view(np.uint32) for r in range(4)]


def run_warp(text: str, inputs: dict[str, np.ndarray], memory: np.ndarray) -> dict[str, np.ndarray]:
    """Like :func:`run_ptx` for one warp, with loads (addresses are places in ``memory``, bytes) and matrix products."""
    state = {name: value.astype(np.uint32) for name, value in inputs.items()}
    predicate = np.ones(32, bool)
    body = re.sub(r"\.reg[^;]*;", "", text.strip()[1:-1])
    instructions = iter([i.strip() for i in re.sub(r"(?m)^(\w+):$", r"\1:;", body).split(";") if i.strip()])
    for instruction in instructions:
        groups = [g.replace(" ", "").split(",") for g in re.findall(r"\{([^}]*)\}", instruction)]
        if instruction.startswith("setp."):
            name, _, left, right = re.findall(r"[^,\s]+", instruction)
            predicate = {"setp.gt.s32": np.greater, "setp.ne.u32": np.not_equal, "setp.eq.u32": np.equal}[name](
                state[left].view(np.int32), int(right)
            )
        elif instruction.startswith("vote.sync.any"):
            predicate = np.full(32, predicate.any())
        elif "bra " in instruction:
            if predicate.all() or not instruction.startswith("@"):
                label = instruction.split()[-1]
                while next(instructions) != f"{label}:":
                    pass
        elif instruction.endswith(":"):
            continue
        elif re.match(r"(@p )?ld.(relaxed.gpu.)?global", instruction):
            base, offset = re.search(r"\[(\S+) \+ (\d+)\]", instruction).groups()
            targets = groups[0] if groups else [instruction.split(" [")[0].split()[-1].rstrip(",")]
            size = 2 if ".u16" in instruction else 4
            there = predicate if instruction.startswith("@") else np.ones(32, bool)
            for number, name in enumerate(targets):
                at = state[base].astype(np.int64) + int(offset) + size * number
                parts = memory[np.where(there, at, 0)[:, None] + np.arange(size)].astype(np.uint32)
                words = (parts << np.arange(0, 8 * size, 8, dtype=np.uint32)).sum(1, dtype=np.uint32)
                state[name] = np.where(there, words, state.get(name, words))
        elif instruction.startswith("mma.sync.aligned.m16n8k16"):
            a, b, c = ([state[name] for name in group] for group in groups[1:])
            kind = "bf16x2" if ".bf16." in instruction else "f16x2"
            state |= dict(zip(groups[0], matrix_product(kind, a, b, c), strict=True))
        else:
            state = run_ptx(f"{{{instruction};}}", state)
    return state
