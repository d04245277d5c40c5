"""Where elements come from: indexing, and tensors made in the graph (``arange``, ``tril``, ``full``, ``cumsum``)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, fx

from vbcompile.passes.attention_expression import (
    BOOL,
    FLOAT,
    INT,
    Coordinate,
    Coordinates,
    Expression,
    Opaque,
    kind_of,
)
from vbcompile.passes.attention_reader import Reader
from vbcompile.passes.graph_axes import broadcast_input, index_items, view_input
from vbcompile.passes.graph_ops import Call, is_tensor, known, known_equal, positive_dim, shape_of, tensor_of, value_of


def read_source(lifter: Reader, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression | None:
    """The element at ``coordinates``; None for operators that are not read here, raises Opaque where one cannot be."""
    rule = None if call.name.startswith("_") else getattr(_Source, call.name, None)
    return None if rule is None else rule(_Source(lifter), call, node, coordinates)


class _Source:
    """A method per operator, named as the operator."""

    def __init__(self, lifter: Reader) -> None:
        self.lifter = lifter

    def getitem(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        source = call.input
        if not is_tensor(source):
            raise Opaque
        moved = view_input(self.lifter.space, call, coordinates)  # type: ignore[arg-type]
        if moved is not None:
            return self.lifter.read(*moved)
        items = index_items(call.get("index"), len(shape_of(source)))
        if self.lifter.depends(source):
            raise Opaque
        if all(is_tensor(item) for item in items):
            return self._gather(source, items, coordinates)
        return self._slice(source, items, coordinates)

    def _gather(self, source: fx.Node, items: Sequence[fx.Node], coordinates: Coordinates) -> Expression:
        """``x[i, j, ...]`` with an integer tensor for every dimension."""
        inner = []
        for item, size in zip(items, shape_of(source), strict=True):
            if tensor_of(item).dtype == torch.bool:
                raise Opaque
            where = broadcast_input(coordinates, shape_of(item))  # type: ignore[arg-type]
            inner.append(self.lifter.coordinate(self.lifter.value(item, where), size))
        return self.lifter.value(source, tuple(inner))

    def _slice(self, source: fx.Node, items: Sequence[Any], coordinates: Coordinates) -> Expression:
        """Basic indexing with constant bounds."""
        given, inner = list(coordinates), []
        sizes = iter(shape_of(source))
        for item in items:
            if item is None:
                given.pop(0)
                continue
            size = next(sizes)
            if isinstance(item, slice):
                inner.append(self._slice_coordinate(item, given.pop(0), size))
            elif isinstance(value_of(item), (int, SymInt)) and not isinstance(item, bool):
                inner.append(self._fixed(value_of(item), size))
            else:
                raise Opaque
        return self.lifter.value(source, tuple(inner))

    def _slice_coordinate(self, item: slice, coordinate: Coordinate, size: Any) -> Coordinate:
        start, step = value_of(item.start), value_of(item.step)
        start = 0 if start is None else start
        if step not in (None, 1) or not isinstance(start, (int, SymInt)):
            raise Opaque
        if not known(start >= 0):
            start = start + size
            if not known(start >= 0):
                raise Opaque
        return self.lifter.coordinate(
            self.lifter.algebra.make("add", self.lifter.index(coordinate), self.lifter.size(start)), size
        )

    def _fixed(self, index: Any, size: Any) -> Coordinate:
        if known_equal(size, 1):
            return ()
        index = index if known(index >= 0) else index + size
        return self.lifter.coordinate(self.lifter.size(index), size)

    def narrow(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        dim = positive_dim(call.get("dim"), len(coordinates))
        items: list[Any] = [slice(None)] * len(coordinates)
        items[dim] = slice(call.get("start"), None)
        return self._slice(call.input, items, coordinates)

    def select(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        shape = shape_of(call.input)
        dim = positive_dim(call.get("dim"), len(shape))
        items: list[Any] = [slice(None)] * len(shape)
        items[dim] = call.get("index")
        return self._slice(call.input, items, coordinates)

    def cat(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        """A choice of the parts, where they can be read at shifted positions."""
        parts = call.get("tensors")
        if not isinstance(parts, (tuple, list)) or not all(is_tensor(p) and not self.lifter.depends(p) for p in parts):
            raise Opaque
        dim = positive_dim(call.get("dim", 0), len(coordinates))
        index = self.lifter.index(coordinates[dim])
        make, size = self.lifter.algebra.make, self.lifter.size
        values, ends, start = [], [], 0
        for part in parts:
            shifted = make("sub", index, size(start))
            values.append(self.lifter.value(part, (*coordinates[:dim], shifted, *coordinates[dim + 1 :])))
            start = start + shape_of(part)[dim]
            ends.append(start)
        result = values[-1]
        for value, end in reversed(list(zip(values[:-1], ends, strict=False))):
            result = make("where", make("lt", index, size(end)), value, result)
        return result

    # ------------------------------------------------------------------------------------------------ factories
    def arange(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        make = self.lifter.algebra.make
        dtype = tensor_of(node).dtype
        start, step = self.lifter.number(call.get("start", 0)), self.lifter.number(call.get("step", 1))
        if dtype not in (torch.int64, torch.int32, torch.float32, torch.float64):
            raise Opaque  # would round the positions, or wrap
        if not dtype.is_floating_point and FLOAT in (start.kind, step.kind):
            raise Opaque  # would cut them
        index = self.lifter.index(coordinates[0])
        if dtype.is_floating_point:
            start, step, index = (make("to_float", e) for e in (start, step, index))
        return make("add", make("mul", index, step), start)

    def _constant(self, value: Any, dtype: torch.dtype) -> Expression:
        """A constant as a tensor of ``dtype`` holds it."""
        kind = kind_of(dtype)
        if isinstance(value, fx.Node):
            return self.lifter.algebra.make(
                {BOOL: "to_bool", INT: "to_int", FLOAT: "to_float"}[kind], self.lifter.read(value, ())
            )
        if not isinstance(value, (bool, int, float)):
            raise Opaque
        if kind == INT and not torch.iinfo(dtype).min <= int(value) <= torch.iinfo(dtype).max:
            raise Opaque  # wraps
        if kind != FLOAT:
            return self.lifter.algebra.const(bool(value) if kind == BOOL else int(value))
        rounded = value if dtype in (torch.float64, torch.float32) else torch.tensor(value, dtype=dtype).item()
        return self.lifter.algebra.const(float(rounded))

    def full(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        value = {"zeros": 0, "ones": 1}.get(
            call.name.removesuffix("_like").removeprefix("new_"), call.get("fill_value")
        )
        return self._constant(value, tensor_of(node).dtype)

    zeros = ones = zeros_like = ones_like = full_like = full
    new_zeros = new_ones = new_full = full

    def tensor(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        return self._constant(call.get("data"), tensor_of(node).dtype)

    scalar_tensor = new_tensor = tensor

    def tril(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        make = self.lifter.algebra.make
        row, column = (self.lifter.index(c) for c in coordinates[-2:])
        limit = make("add", row, self.lifter.number(call.get("diagonal", 0)))
        inside = make("le" if call.name == "tril" else "ge", column, limit)
        value = self.lifter.read(call.input, coordinates)
        return make("where", inside, value, self._constant(0, tensor_of(node).dtype))

    triu = tril

    # -------------------------------------------------------------------------------------- differences and sums
    def diff(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        """``x[i] - x[i - 1]`` of a formula, where what is prepended continues the formula to ``i = -1``."""
        prepend = call.get("prepend")
        is_whole = tensor_of(node).dtype in (torch.int64, torch.int32)
        if call.get("n", 1) != 1 or call.get("append") is not None or not is_whole:
            raise Opaque
        dim = positive_dim(call.get("dim", -1), len(coordinates))
        make, const = self.lifter.algebra.make, self.lifter.algebra.const
        index = self.lifter.index(coordinates[dim])

        def at(shifted: Expression) -> Expression:
            return self.lifter.value(call.input, (*coordinates[:dim], shifted, *coordinates[dim + 1 :]))

        if prepend is None:
            return make("sub", at(make("add", index, const(1))), at(index))
        if not is_tensor(prepend) or not known_equal(shape_of(prepend)[dim], 1):
            raise Opaque
        before = self.lifter.value(prepend, (*coordinates[:dim], (), *coordinates[dim + 1 :]))
        if at(const(-1)) is not before:
            raise Opaque
        return make("sub", at(index), at(make("sub", index, const(1))))

    def cumsum(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        """Of what does not change along the axis."""
        make = self.lifter.algebra.make
        dim = positive_dim(call.get("dim"), len(coordinates))
        axis = self.lifter.space.dim(shape_of(node)[dim])
        value = self.lifter.value(call.input, (*coordinates[:dim], axis, *coordinates[dim + 1 :]))
        if not axis or axis[0] in value.atoms or value.kind == FLOAT or tensor_of(node).dtype != torch.int64:
            raise Opaque
        count = make("add", self.lifter.index(coordinates[dim]), self.lifter.algebra.const(1))
        return make("mul", make("to_int", value), count)
