"""Random masks as score functions: positions, lengths, captured tensors that broadcast every way, large constants."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from vbcompile.kernels.score_function import Builder, ScoreFunction

_LARGE = (2**31 - 1, -(2**31) + 1, 2**30, 2**31 + 5, -(2**33))


class RandomMask:
    """A mask drawn from ``seed`` over ``[*lead, rows, columns]``.

    Attributes:
        function: plain scores under the mask.
        captured: tensors that it reads.
    """

    def __init__(self, seed: int, lead: Sequence[int], rows: int, columns: int) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._lead, self._rows, self._columns = tuple(lead), rows, columns
        self._builder = Builder()
        self._wide = self._random.random() < 0.5  # 32 bits wrap where constants are large
        self.captured: list[Tensor] = []
        score = self._builder.emit("score")
        mask = self._bool(self._random.choice((1, 2, 2, 3)))
        self.function = ScoreFunction(self._builder.program, score, mask)

    def _bool(self, depth: int) -> int:
        emit, pick = self._builder.emit, self._random.choice
        kind = (
            pick(("compare",) * 4 + ("bound",) * 4 + ("captured",))
            if depth == 0
            else pick(("and", "and", "and", "or", "or", "not", "xor", "bound", "compare"))
        )
        match kind:
            case "captured":
                return emit("captured", self._capture(bools=True))
            case "not":
                return emit("not", self._bool(depth - 1))
            case "and" | "or" | "xor":
                return emit(kind, self._bool(depth - 1), self._bool(depth - 1))
            case "bound":
                sides = [emit("k_index"), self._term()]
                self._random.shuffle(sides)
                return emit(pick(("lt", "le", "gt", "ge", "eq")), *sides)
        return emit(pick(("lt", "le", "gt", "ge", "eq", "ne")), self._int(2), self._int(2))

    def _term(self) -> int:
        """What bounds columns: a row or a number, with an offset."""
        emit, pick = self._builder.emit, self._random.choice
        base = pick((lambda: emit("q_index"), lambda: emit("neg", emit("q_index")), lambda: self._int(1)))()
        return emit(pick(("add", "sub")), base, self._int(pick((0, 0, 1))))

    def _int(self, depth: int) -> int:
        emit, pick = self._builder.emit, self._random.choice
        if depth == 0:
            leaf = pick(("q_index", "k_index", "lead", "length", "const", "const", "captured", "captured"))
            match leaf:
                case "lead":
                    return emit("lead_index", self._random.randrange(len(self._lead)))
                case "length":
                    return emit(pick(("q_length", "k_length")))
                case "const":
                    large = self._wide and self._random.random() < 0.2
                    return emit("const", pick(_LARGE) if large else self._random.randint(-9, self._columns))
                case "captured":
                    return emit("captured", self._capture(bools=False))
            return emit(leaf)
        match pick(("add", "sub", "add", "sub", "neg", "abs", "mul", "floordiv", "mod", "maximum", "minimum", "leaf")):
            case "neg" | "abs" as name:
                return emit(name, self._int(depth - 1))
            case "mul" | "floordiv" | "mod" as name:
                return emit(name, self._int(0), emit("const", pick((-3, 2, 3, 5))))
            case "leaf":
                return self._int(0)
            case name:
                return emit(name, self._int(depth - 1), self._int(depth - 1))

    def _capture(self, bools: bool) -> int:
        flip = lambda n: n if self._random.random() < 0.5 else 1
        shape = [*map(flip, self._lead), *self._random.choice(((self._rows, 1), (1, self._columns), (1, 1)) + (
            ((self._rows, self._columns),) if bools else ()
        ))]  # fmt: skip
        if bools:
            made = torch.rand(shape, generator=self._generator) < self._random.choice((0.5, 0.95))
        else:
            top = self._random.choice((3, self._columns))
            made = torch.randint(-2, top, shape, generator=self._generator)
            made = made.sort(-1).values if self._random.random() < 0.3 else made
            made = made if self._wide else made.to(torch.int32)
        self.captured.append(made)
        return len(self.captured) - 1
