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


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "lop3.b32": or_of_and,
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
        constant = re.fullmatch(r"0x[0-9A-F]+|\d+", operand)
        return np.full(size, int(operand, 0), np.uint32) if constant else state[operand]

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
