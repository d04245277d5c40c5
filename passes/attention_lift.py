"""What a tensor of the graph holds at a point of the iteration space, as an expression.

The lifter walks from a tensor to what it is computed from, carrying the coordinates at which it is read: views change
the coordinates, pointwise operators become expressions, ``arange`` becomes an index. What it does not understand it
leaves as a captured tensor, unless it depends on the scores, which must be understood or the site is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import SymFloat, SymInt, fx

from vbcompile.passes.attention_contraction import Contraction
from vbcompile.passes.attention_expression import BOOL, FLOAT, INT, Algebra, Expression, bounds, count_instructions
from vbcompile.passes.graph_axes import (
    REPEATS,
    RESHAPES,
    Atom,
    AxisError,
    Dim,
    Space,
    broadcast_input,
    index_items,
    product,
    view_input,
)
from vbcompile.passes.graph_ops import Call, call_of, is_tensor, known, known_equal, positive_dim, shape_of, tensor_of, value_of

Coordinate = Dim | Expression
Coordinates = tuple[Coordinate, ...]

_PROGRAM_LIMIT = 48  # instructions; a longer expression of indices is cheaper to load than to compute
_EXPENSIVE = {"exp", "log", "log1p", "pow", "sin", "cos", "sqrt", "rsqrt", "tanh", "sigmoid", "div", "mod", "floordiv"}


class Refusal(Exception):
    """Why a site is left alone."""


class Opaque(Exception):
    """This tensor cannot be looked into at these coordinates."""


def kind_of(dtype: torch.dtype) -> str:
    """Kind of number of a dtype; raises Opaque for complex and quantised ones."""
    if dtype == torch.bool:
        return BOOL
    if dtype.is_floating_point:
        return FLOAT
    if dtype.is_complex or dtype.is_quantized if hasattr(dtype, "is_quantized") else dtype.is_complex:
        raise Opaque
    return INT


class Lifter:
    """Lifts the tensors of one site.

    Args:
        contraction: the matrix product whose elements are the scores; None where there is none (a fused call's mask).
        recalled: what was found out about tensors for other sites of the graph.
        may_cut: whether axes may be cut to follow a reshape of a mask or bias.
        symbolic_sizes: whether sizes that are known only at run time may become part of an expression.
        position: place of every node of the graph.
        stable: ``stable(node)`` says whether the node still holds the same values where the fused call will read it,
            judged from its definition on; ``stable(node, True)`` judges from the first node of the site on.
        representative: one node for all that compute the same value.
        outer: for the placeholders of an inner graph, the nodes of the graph around it that they stand for.
    """

    def __init__(
        self,
        space: Space,
        algebra: Algebra,
        *,
        contraction: Contraction | None,
        position: Mapping[fx.Node, int],
        stable: Callable[[fx.Node, bool], bool],
        representative: Callable[[fx.Node], fx.Node],
        outer: Mapping[fx.Node, fx.Node],
        recalled: dict[Any, tuple[Expression, list[Atom]]],
        may_cut: bool = True,
        symbolic_sizes: bool = True,
    ) -> None:
        self.space = space
        self.algebra = algebra
        self.contraction = contraction
        self.score = None if contraction is None else contraction.node
        self.score_dims: tuple[Dim, ...] | None = None
        self.region: set[fx.Node] = set()
        self._position = position
        self._stable = stable
        self._representative = representative
        self._outer = outer
        self._recalled = recalled
        self._may_cut = may_cut
        self._symbolic_sizes = symbolic_sizes
        self._memo: dict[Any, Expression | None] = {}
        self._dependent: dict[fx.Node, bool] = {}

    # -------------------------------------------------------------------------------------------- entry points
    def lift(self, argument: Any, coordinates: Coordinates) -> Expression:
        """The expression of a tensor node (or number) at ``coordinates``; raises Refusal."""
        if not is_tensor(argument):
            return self.number(argument)
        if argument is self.score:
            return self._the_score(coordinates)
        if self.depends(argument):
            return self._dependent_value(argument, coordinates)
        found = self._recall(argument, coordinates)
        if found is not None:
            return found
        cuts = self.space.count_cuts()
        try:
            found = self._value(argument, coordinates)
        except Opaque:
            return self._capture(argument, coordinates, direct=True)
        if self.space.count_cuts() == cuts:
            self._remember(argument, coordinates, found)
        return found

    # ---------------------------------------------------------------- what other sites of the graph found out already
    def _key(self, argument: fx.Node, coordinates: Coordinates) -> tuple[Any, list[Atom]] | None:
        """The tensor and the pattern of its coordinates, and the atoms that fill the pattern."""
        if not self._plain(coordinates):
            return None
        atoms = list(dict.fromkeys(atom for c in self.space.resolve_all(coordinates) for atom in c))  # type: ignore
        pattern = tuple(tuple((atoms.index(a), str(a.size)) for a in c) for c in self.space.resolve_all(coordinates))  # type: ignore
        return (argument, pattern, self._may_cut, self._symbolic_sizes), atoms

    def _remember(self, argument: fx.Node, coordinates: Coordinates, found: Expression) -> None:
        key = self._key(argument, coordinates)
        if key is not None and found.atoms <= set(key[1]):
            self._recalled[key[0]] = found, key[1]

    def _recall(self, argument: fx.Node, coordinates: Coordinates) -> Expression | None:
        key = self._key(argument, coordinates)
        if key is None or key[0] not in self._recalled:
            return None
        found, atoms = self._recalled[key[0]]
        renamed = dict(zip(atoms, key[1], strict=True))
        return self._rename(found, renamed, {})

    def _rename(self, e: Expression, atoms: dict[Atom, Atom], done: dict[Expression, Expression]) -> Expression | None:
        """The expression over other axes; None where a tensor in it may have changed meanwhile."""
        if e in done:
            return done[e]
        algebra = self.algebra
        result: Expression | None
        if e.name == "axis":
            result = algebra.axis(atoms[e.arguments[0]])
        elif e.name == "tensor":
            node, dims = e.arguments
            moved = tuple(tuple(atoms[a] for a in dim) for dim in dims)
            is_there = not node._erased and self._stable(node, False)
            result = algebra.tensor(node, moved, e.kind) if is_there else None
        elif e.is_leaf:
            result = {"const": algebra.const, "size": algebra.size, "scalar": algebra.scalar}[e.name](e.arguments[0])
        else:
            parts = [self._rename(a, atoms, done) for a in e.arguments]
            result = None if any(p is None for p in parts) else algebra.raw(e.name, *parts)  # type: ignore[arg-type]
        if result is not None:
            done[e] = result
        return result

    def number(self, argument: Any) -> Expression:
        """A Python or symbolic number; raises Refusal for anything else."""
        value = value_of(argument)
        if isinstance(value, (bool, int, float)):
            return self.algebra.const(value)
        if isinstance(value, SymInt):
            size = self.algebra.size(value)
            if size.name == "size" and not self._symbolic_sizes:
                raise Refusal("a size that is known only at run time takes part in the scores")
            return size
        if isinstance(value, SymFloat):
            constant = value.node.maybe_as_float()
            if constant is not None:
                return self.algebra.const(constant)
            if isinstance(argument, fx.Node):
                return self.algebra.scalar(argument)
        raise Refusal(f"an operand is neither a tensor nor a number ({type(value).__name__})")

    def depends(self, node: fx.Node) -> bool:
        """Whether the node is computed from the scores."""
        if self.score is None or node not in self._position:
            return False
        first = self._position[self.score]
        todo = [node]
        while todo:
            n = todo[-1]
            if n in self._dependent:
                todo.pop()
                continue
            if n is self.score or self._position.get(n, -1) <= first:
                self._dependent[n] = n is self.score
                continue
            missing = [i for i in n.all_input_nodes if i not in self._dependent]
            if missing:
                todo += missing
                continue
            self._dependent[n] = any(self._dependent[i] for i in n.all_input_nodes)
        return self._dependent[node]

    # ------------------------------------------------------------------------------------------------- scores
    def _the_score(self, coordinates: Coordinates) -> Expression:
        if not all(isinstance(c, tuple) for c in coordinates):
            raise Refusal("the scores are read at computed positions")
        dims = self.space.resolve_all(coordinates)  # type: ignore[arg-type]
        if self.score_dims is not None and self.space.resolve_all(self.score_dims) != dims:
            raise Refusal("the scores are combined with a rearranged copy of themselves")
        self.score_dims = dims
        assert self.contraction is not None
        if self.contraction.addend is None:
            return self.algebra.score
        make = self.algebra.make
        scaled = make("mul", self.algebra.score, make("to_float", self.number(self.contraction.alpha)))
        beta = make("to_float", self.number(self.contraction.beta))
        if beta.name == "const" and beta.value == 0:
            return scaled
        addend = make("to_float", self.operand(self.contraction.addend, dims, True))
        return make("add", scaled, make("mul", addend, beta))

    def _dependent_value(self, node: fx.Node, coordinates: Coordinates) -> Expression:
        key = node, coordinates
        known_value = self._memo.get(key)
        if known_value is not None:
            return known_value
        self.region.add(node)
        try:
            result = self._apply(node, coordinates)
        except (Opaque, AxisError) as error:
            detail = f": {error}" if str(error) else ""
            raise Refusal(f"{_name(node)} between the first matrix product and the softmax{detail}") from None
        self._memo[key] = result
        return result

    # ---------------------------------------------------------------------------------------- independent tensors
    def _value(self, node: fx.Node, coordinates: Coordinates) -> Expression:
        """Raises Opaque where the tensor cannot be expressed at these coordinates."""
        key = node, coordinates
        if key not in self._memo:
            try:
                self._memo[key] = self._find(node, coordinates)
            except (Opaque, Refusal, AxisError):
                self._memo[key] = None
        result = self._memo[key]
        if result is None:
            raise Opaque
        return result

    def _find(self, node: fx.Node, coordinates: Coordinates) -> Expression:
        plain = all(isinstance(c, tuple) for c in coordinates)
        try:
            found = self._apply(node, coordinates)
        except (Opaque, AxisError):
            if not plain:
                raise
            return self._capture(node, coordinates)
        if plain and self._better_loaded(node, coordinates, found):
            return self._capture(node, coordinates)
        return found

    def _capture(self, node: fx.Node, coordinates: Coordinates, direct: bool = False) -> Expression:
        if not all(isinstance(c, tuple) for c in coordinates) or node not in self._position:
            raise Opaque
        if not self._stable(node, direct):
            if direct:
                raise Refusal(f"{node.name} is modified in place while the attention uses it")
            raise Opaque
        dtype = tensor_of(node).dtype
        if dtype.is_complex:
            raise Refusal("a complex operand")
        return self.algebra.tensor(self._representative(node), coordinates, kind_of(dtype))  # type: ignore[arg-type]

    def _better_loaded(self, node: fx.Node, coordinates: Coordinates, found: Expression) -> bool:
        """Whether to load the node's own elements instead of computing them from what it was computed from."""
        if found.name in ("const", "tensor") or node not in self._position:
            return False
        if "tensor" not in found.leaves and "scalar" not in found.leaves:
            size = count_instructions(found)
            return size > _PROGRAM_LIMIT or (len(found.atoms) <= 1 and size > 1 and _is_expensive(found))
        tensors, axes = _tensors_and_axes(found)
        detached = tensor_of(node).is_floating_point() and not tensor_of(node).requires_grad
        if detached and any(tensor_of(t).requires_grad for t, _ in tensors):
            return True
        if len(axes) >= 2:
            return count_instructions(found) > _PROGRAM_LIMIT
        return any(atoms >= found.atoms for _, atoms in tensors)

    # ------------------------------------------------------------------------------------------------ operators
    def _apply(self, node: fx.Node, coordinates: Coordinates) -> Expression:
        """The node's value from those of its inputs; raises Opaque or AxisError where the operator is not known."""
        call = call_of(node)
        if call is None or call.in_place:
            if node in self._outer:
                return self._through_boundary(node, coordinates)
            raise Opaque("" if call is None else "an in-place operator")
        special = getattr(self, f"_read_{call.name}", None)
        if special is not None:
            return special(call, node, coordinates)
        moved = self._view(call, node, coordinates)
        if moved is not None:
            return self._read(*moved)
        from vbcompile.passes.attention_pointwise import pointwise

        return pointwise(self, call, node, coordinates)

    def _read(self, argument: Any, coordinates: Coordinates) -> Expression:
        """An input of the node in hand."""
        if not is_tensor(argument):
            return self.number(argument)
        if argument is self.score or self.depends(argument):
            return self.lift(argument, coordinates)
        return self._value(argument, coordinates)

    def operand(self, argument: Any, coordinates: Coordinates, direct: bool) -> Expression:
        """An input of a pointwise operator, broadcast; ``direct``: of one that depends on the scores."""
        if not is_tensor(argument):
            return self.number(argument)
        narrowed = broadcast_input(coordinates, shape_of(argument))  # type: ignore[arg-type]
        return self.lift(argument, narrowed) if direct else self._read(argument, narrowed)

    @staticmethod
    def _plain(coordinates: Coordinates) -> bool:
        return all(isinstance(c, tuple) for c in coordinates)

    def _through_boundary(self, node: fx.Node, coordinates: Coordinates) -> Expression:
        found = self._value(self._outer[node], coordinates)
        if "tensor" in found.leaves or "scalar" in found.leaves or "size" in found.leaves:
            raise Opaque
        return found

    def index(self, coordinate: Coordinate) -> Expression:
        """A coordinate as an integer expression."""
        if isinstance(coordinate, Expression):
            return coordinate
        make = self.algebra.make
        result = self.algebra.const(0)
        for position, atom in enumerate(coordinate):
            stride = product(coordinate[position + 1 :])
            result = make("add", result, make("mul", self.algebra.axis(atom), self.algebra.size(stride)))
        return result

    def _coordinate(self, index: Expression, size: Any) -> Coordinate:
        """An integer expression as a coordinate of a dimension; raises Opaque where it may be negative."""
        if index.name == "axis" and known_equal(index.arguments[0].size, size):
            return (index.arguments[0],)
        if known_equal(size, 1):
            return ()
        affine = self.algebra.affine(index)
        if affine is None or not known(bounds(affine)[0] >= 0):
            raise Opaque
        return index

    # ---------------------------------------------------------------------------------------------------- views
    def _view(self, call: Call, node: fx.Node, coordinates: Coordinates) -> tuple[fx.Node, Coordinates] | None:
        if self._plain(coordinates) or call.name not in RESHAPES | REPEATS:
            if self._may_cut or self.score is None or self.depends(node):
                return view_input(self.space, call, node, coordinates)  # type: ignore[arg-type]
            cuts = self.space.snapshot()
            moved = view_input(self.space, call, node, coordinates)  # type: ignore[arg-type]
            if self.space.count_cuts() != len(cuts):
                self.space.restore(cuts)
                raise Opaque
            return moved
        if call.name in REPEATS:
            raise Opaque
        inner, outer = shape_of(call.input), shape_of(node)
        rest = [c for c, size in zip(coordinates, outer, strict=True) if not known_equal(size, 1)]
        sizes = [size for size in outer if not known_equal(size, 1)]
        kept = [size for size in inner if not known_equal(size, 1)]
        if len(kept) != len(sizes) or not all(known_equal(a, b) for a, b in zip(kept, sizes, strict=True)):
            raise Opaque
        return call.input, tuple(() if known_equal(size, 1) else rest.pop(0) for size in inner)

    def _read_getitem(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        source = call.input
        if not is_tensor(source):
            raise Opaque
        moved = view_input(self.space, call, node, coordinates)  # type: ignore[arg-type]
        if moved is not None:
            return self._read(*moved)
        items = index_items(call.get("index"), len(shape_of(source)))
        if self.depends(source):
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
            inner.append(self._coordinate(self._value(item, where), size))
        return self._value(source, tuple(inner))

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
        return self._value(source, tuple(inner))

    def _slice_coordinate(self, item: slice, coordinate: Coordinate, size: Any) -> Coordinate:
        start, step = value_of(item.start), value_of(item.step)
        start = 0 if start is None else start
        if step not in (None, 1) or not isinstance(start, (int, SymInt)):
            raise Opaque
        if not known(start >= 0):
            start = start + size
            if not known(start >= 0):
                raise Opaque
        return self._coordinate(self.algebra.make("add", self.index(coordinate), self.algebra.size(start)), size)

    def _fixed(self, index: Any, size: Any) -> Coordinate:
        if known_equal(size, 1):
            return ()
        index = index if known(index >= 0) else index + size
        return self._coordinate(self.algebra.size(index), size)

    def _read_narrow(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        dim = positive_dim(call.get("dim"), len(coordinates))
        items: list[Any] = [slice(None)] * len(coordinates)
        items[dim] = slice(call.get("start"), None)
        return self._slice(call.input, items, coordinates)

    def _read_select(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        shape = shape_of(call.input)
        dim = positive_dim(call.get("dim"), len(shape))
        items: list[Any] = [slice(None)] * len(shape)
        items[dim] = call.get("index")
        return self._slice(call.input, items, coordinates)

    def _read_cat(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        """A choice of the parts, where they can be read at shifted positions."""
        parts = call.get("tensors")
        if not isinstance(parts, (tuple, list)) or not all(is_tensor(p) and not self.depends(p) for p in parts):
            raise Opaque
        dim = positive_dim(call.get("dim", 0), len(coordinates))
        index = self.index(coordinates[dim])
        make, size = self.algebra.make, self.algebra.size
        values, ends, start = [], [], 0
        for part in parts:
            shifted = make("sub", index, size(start))
            values.append(self._value(part, (*coordinates[:dim], shifted, *coordinates[dim + 1 :])))
            start = start + shape_of(part)[dim]
            ends.append(start)
        result = values[-1]
        for value, end in reversed(list(zip(values[:-1], ends, strict=False))):
            result = make("where", make("lt", index, size(end)), value, result)
        return result

    # ------------------------------------------------------------------------------------------------ factories
    def _read_arange(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        make = self.algebra.make
        dtype = tensor_of(node).dtype
        start, step = self.number(call.get("start", 0)), self.number(call.get("step", 1))
        if dtype in (torch.float16, torch.bfloat16):
            raise Opaque  # would round the positions
        index = self.index(coordinates[0])
        if dtype.is_floating_point:
            start, step, index = (make("to_float", e) for e in (start, step, index))
        return make("add", make("mul", index, step), start)

    def constant(self, value: Any, dtype: torch.dtype) -> Expression:
        """A constant as a tensor of ``dtype`` holds it."""
        kind = kind_of(dtype)
        if isinstance(value, fx.Node):
            return self.algebra.make({BOOL: "to_bool", INT: "to_int", FLOAT: "to_float"}[kind], self._read(value, ()))
        if not isinstance(value, (bool, int, float)):
            raise Opaque
        if kind != FLOAT:
            return self.algebra.const(bool(value) if kind == BOOL else int(value))
        rounded = value if dtype in (torch.float64, torch.float32) else torch.tensor(value, dtype=dtype).item()
        return self.algebra.const(float(rounded))

    def _read_full(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        value = {"zeros": 0, "ones": 1}.get(call.name.removesuffix("_like").removeprefix("new_"), call.get("fill_value"))
        return self.constant(value, tensor_of(node).dtype)

    _read_zeros = _read_ones = _read_zeros_like = _read_ones_like = _read_full_like = _read_full
    _read_new_zeros = _read_new_ones = _read_new_full = _read_full

    def _read_tensor(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        return self.constant(call.get("data"), tensor_of(node).dtype)

    _read_scalar_tensor = _read_tensor

    def _read_tril(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        make = self.algebra.make
        row, column = (self.index(c) for c in coordinates[-2:])
        limit = make("add", row, self.number(call.get("diagonal", 0)))
        inside = make("le" if call.name == "tril" else "ge", column, limit)
        value = self._read(call.input, coordinates)
        return make("where", inside, value, self.constant(0, tensor_of(node).dtype))

    _read_triu = _read_tril

    # -------------------------------------------------------------------------------------- differences and sums
    def _read_diff(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        """``x[i] - x[i - 1]`` of a formula, where what is prepended continues the formula to ``i = -1``."""
        prepend = call.get("prepend")
        if call.get("n", 1) != 1 or call.get("append") is not None or tensor_of(node).dtype == torch.bool:
            raise Opaque
        dim = positive_dim(call.get("dim", -1), len(coordinates))
        make, const = self.algebra.make, self.algebra.const
        index = self.index(coordinates[dim])

        def at(shifted: Expression) -> Expression:
            return self._value(call.input, (*coordinates[:dim], shifted, *coordinates[dim + 1 :]))

        if prepend is None:
            return make("sub", at(make("add", index, const(1))), at(index))
        if not is_tensor(prepend) or not known_equal(shape_of(prepend)[dim], 1):
            raise Opaque
        before = self._value(prepend, (*coordinates[:dim], (), *coordinates[dim + 1 :]))
        if at(const(-1)) is not before:
            raise Opaque
        return make("sub", at(index), at(make("sub", index, const(1))))

    def _read_cumsum(self, call: Call, node: fx.Node, coordinates: Coordinates) -> Expression:
        """Of what does not change along the axis."""
        make = self.algebra.make
        dim = positive_dim(call.get("dim"), len(coordinates))
        axis = self.space.dim(shape_of(node)[dim])
        value = self._value(call.input, (*coordinates[:dim], axis, *coordinates[dim + 1 :]))
        if not axis or axis[0] in value.atoms or value.kind == FLOAT:
            raise Opaque
        count = make("add", self.index(coordinates[dim]), self.algebra.const(1))
        return make("mul", make("to_int", value), count)


def _name(node: fx.Node) -> str:
    call = call_of(node)
    return call.name if call is not None else getattr(node.target, "__name__", str(node.target))


def _is_expensive(e: Expression) -> bool:
    return not e.is_leaf and (e.name in _EXPENSIVE or any(_is_expensive(a) for a in e.arguments))


def _tensors_and_axes(e: Expression) -> tuple[list[tuple[fx.Node, frozenset[Any]]], set[Any]]:
    """Captured tensors with their axes, and the axes whose index is used as a number."""
    tensors: dict[Expression, tuple[fx.Node, frozenset[Any]]] = {}
    axes: set[Any] = set()
    seen: set[Expression] = set()
    todo = [e]
    while todo:
        x = todo.pop()
        if x in seen:
            continue
        seen.add(x)
        if x.name == "tensor":
            tensors[x] = x.arguments[0], x.atoms
        elif x.name == "axis":
            axes.add(x.arguments[0])
        elif not x.is_leaf:
            todo.extend(x.arguments)
    return list(tensors.values()), axes
