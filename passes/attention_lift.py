"""What a tensor of the graph holds at a point of the iteration space, as an expression.

The lifter walks from a tensor to what it is computed from, carrying the coordinates at which it is read: views change
the coordinates, pointwise operators become expressions, ``arange`` becomes an index. What it does not understand it
leaves as a captured tensor, unless it depends on the scores, which must be understood or the site is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import SymFloat, SymInt, fx

from vbcompile.passes.attention_contraction import Contraction
from vbcompile.passes.attention_exact import cancels
from vbcompile.passes.attention_expression import (
    Algebra,
    Coordinate,
    Coordinates,
    Expression,
    Opaque,
    bounds,
    count_instructions,
    is_constant_choice,
    kind_of,
    tensors_and_axes,
)
from vbcompile.passes.attention_masks import holds_learned_numbers
from vbcompile.passes.attention_pointwise import pointwise
from vbcompile.passes.attention_sources import read_source
from vbcompile.passes.graph_axes import (
    REPEATS,
    RESHAPES,
    Atom,
    AxisError,
    Dim,
    Space,
    broadcast_input,
    product,
    view_input,
)
from vbcompile.passes.graph_ops import (
    Call,
    call_of,
    is_tensor,
    known,
    known_equal,
    shape_of,
    tensor_of,
    value_of,
)

_PROGRAM_LIMIT = 48  # instructions; a longer expression of indices is cheaper to load than to compute
_EXPENSIVE = {"exp", "log", "log1p", "pow", "sin", "cos", "sqrt", "rsqrt", "tanh", "sigmoid", "div", "mod", "floordiv"}
_EXPENSIVE |= {"atan", "erf"}

_SHIFTS = {
    "amax", "max", "mean", "getitem", "detach", "add", "sub", "mul", "div", "neg", "to", "float", "type", "reshape",
    "unsqueeze", "squeeze", "flatten", "unflatten", "transpose", "permute", "contiguous", "clone",
}  # fmt: skip


class Refusal(Exception):
    """Why a site is left alone."""


class Lifter:
    """Lifts the tensors of one site.

    Args:
        contraction: the matrix product whose elements are the scores; None where there is none (a fused call's mask).
        recalled: what was found out about tensors for other sites of the graph.
        keys: the axes of the softmax.
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
        keys: Dim = (),
        may_cut: bool = True,
        symbolic_sizes: bool = True,
    ) -> None:
        self.space = space
        self.algebra = algebra
        self.contraction = contraction
        self.score = None if contraction is None else contraction.node
        self.score_dims: tuple[Dim, ...] | None = None
        self.region: set[fx.Node] = set()
        self.shifts: set[fx.Node] = set()
        self._position = position
        self._stable = stable
        self._representative = representative
        self._outer = outer
        self._recalled = recalled
        self.keys = keys
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
            found = self.value(argument, coordinates)
        except Opaque:
            return self.capture(argument, coordinates, direct=True)
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
        score = None if self.score is None else tensor_of(self.score)
        kind = None if score is None else (score.dtype, score.requires_grad)  # decides what is looked into
        return (argument, pattern, kind, self._may_cut, self._symbolic_sizes), atoms

    def _remember(self, argument: fx.Node, coordinates: Coordinates, found: Expression) -> None:
        key = self._key(argument, coordinates)
        if key is not None and found.atoms <= set(key[1]):
            self._recalled[key[0]] = found, key[1]

    def _recall(self, argument: fx.Node, coordinates: Coordinates) -> Expression | None:
        key = self._key(argument, coordinates)
        if key is None or key[0] not in self._recalled or not self._stable(argument, False):
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
            again: dict[str, Callable[[Any], Expression]] = {
                "const": algebra.const,
                "size": algebra.size,
                "scalar": algebra.scalar,
            }
            result = again[e.name](e.arguments[0])
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
            return self.size(value)
        if isinstance(value, SymFloat):
            constant = value.node.maybe_as_float()
            if constant is not None:
                return self.algebra.const(constant)
            if isinstance(argument, fx.Node):
                return self.algebra.scalar(argument)
        raise Refusal(f"an operand is neither a tensor nor a number ({type(value).__name__})")

    def size(self, value: Any) -> Expression:
        """A size; raises Refusal for one that is known only at run time and may take no part."""
        size = self.algebra.size(value)
        if size.name == "size" and not self._symbolic_sizes:
            raise Refusal("a size that is known only at run time takes part in the scores")
        return size

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
            if self._is_shift(node, coordinates):
                return self.algebra.shift(node)
            detail = f": {error}" if str(error) else ""
            raise Refusal(f"{_name(node)} between the first matrix product and the softmax{detail}") from None
        self._memo[key] = result
        return result

    def _is_shift(self, node: fx.Node, coordinates: Coordinates) -> bool:
        """Whether all keys of a row read one number here, made of finite scores and learned numbers alone."""
        if not self._plain(coordinates) or not tensor_of(node).is_floating_point():
            return False
        read = {atom for c in self.space.resolve_all(coordinates) for atom in c}  # type: ignore[arg-type]
        if read & set(self.space.resolve(self.keys)):
            return False
        todo, way = [node], set()
        while todo:
            n = todo.pop()
            call = call_of(n)
            if call is None or call.in_place or call.name not in _SHIFTS:
                return False
            way.add(n)
            dependent = [i for i in n.all_input_nodes if self.depends(i)]
            others = [i for i in n.all_input_nodes if i not in dependent and is_tensor(i)]
            if len(dependent) != 1 or not all(map(holds_learned_numbers, others)):
                return False
            todo += [i for i in dependent if i is not self.score]
        self.region |= way
        self.shifts.add(node)
        return True

    # ---------------------------------------------------------------------------------------- independent tensors
    def value(self, node: fx.Node, coordinates: Coordinates) -> Expression:
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
        if not self._stable(node, False):
            raise Opaque  # no longer what it was computed as
        plain = all(isinstance(c, tuple) for c in coordinates)
        try:
            found = self._apply(node, coordinates)
        except (Opaque, AxisError):
            if not plain:
                raise
            return self.capture(node, coordinates)
        score = None if self.score is None else tensor_of(self.score).dtype
        if cancels(found, tensor_of(node).dtype, score):
            raise Opaque
        leaks = _leaks_gradient(node, found)
        if plain and (leaks or self._better_loaded(node, found)):
            return self.capture(node, coordinates)
        if leaks:
            raise Opaque
        return found

    def capture(self, node: fx.Node, coordinates: Coordinates, direct: bool = False) -> Expression:
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

    def _better_loaded(self, node: fx.Node, found: Expression) -> bool:
        """Whether to load the node's own elements instead of computing them from what it was computed from."""
        if found.name in ("const", "tensor") or node not in self._position:
            return False
        if _is_flag(found) or self._is_choice_by_flag(found):
            return False  # the mask itself is there anyway, is smaller, and says what hides a key
        if "tensor" not in found.leaves and "scalar" not in found.leaves:
            size = count_instructions(found)
            return size > _PROGRAM_LIMIT or (len(found.atoms) <= 1 and size > 1 and _is_expensive(found))
        tensors, axes = tensors_and_axes(found)
        if len(axes) >= 2:
            return count_instructions(found) > _PROGRAM_LIMIT
        return any(atoms >= found.atoms for _, atoms in tensors)

    def _is_choice_by_flag(self, e: Expression) -> bool:
        """Whether a boolean tensor chooses between two constants; -inf only where no gradient goes to the score.

        Added, -inf gives NaN for the gradient of a row without a key, and a mask gives zero.
        """
        if not is_constant_choice(e) or not _is_flag(e.arguments[0]):
            return False
        without_gradient = self.score is not None and not tensor_of(self.score).requires_grad
        return without_gradient or all(abs(a.value) != float("inf") for a in e.arguments[1:])

    # ------------------------------------------------------------------------------------------------ operators
    def _apply(self, node: fx.Node, coordinates: Coordinates) -> Expression:
        """The node's value from those of its inputs; raises Opaque or AxisError where the operator is not known."""
        call = call_of(node)
        if call is None or call.in_place:
            if node in self._outer:
                return self._through_boundary(node, coordinates)
            raise Opaque("" if call is None else "an in-place operator")
        found = read_source(self, call, node, coordinates)
        if found is not None:
            return found
        if call.name == "detach" and not tensor_of(call.input).requires_grad:
            return self.read(call.input, coordinates)
        moved = self._view(call, node, coordinates)
        if moved is not None:
            return self.read(*moved)
        return pointwise(self, call, node, coordinates)

    def read(self, argument: Any, coordinates: Coordinates) -> Expression:
        """An input of the node in hand."""
        if not is_tensor(argument):
            return self.number(argument)
        if argument is self.score or self.depends(argument):
            return self.lift(argument, coordinates)
        return self.value(argument, coordinates)

    def operand(self, argument: Any, coordinates: Coordinates, direct: bool) -> Expression:
        """An input of a pointwise operator, broadcast; ``direct``: of one that depends on the scores."""
        if not is_tensor(argument):
            return self.number(argument)
        narrowed = broadcast_input(coordinates, shape_of(argument))  # type: ignore[arg-type]
        return self.lift(argument, narrowed) if direct else self.read(argument, narrowed)

    @staticmethod
    def _plain(coordinates: Coordinates) -> bool:
        return all(isinstance(c, tuple) for c in coordinates)

    def _through_boundary(self, node: fx.Node, coordinates: Coordinates) -> Expression:
        found = self.value(self._outer[node], coordinates)
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
            result = make("add", result, make("mul", self.algebra.axis(atom), self.size(stride)))
        return result

    def coordinate(self, index: Expression, size: Any) -> Coordinate:
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
            if self._may_cut or self.depends(node):
                return view_input(self.space, call, coordinates)  # type: ignore[arg-type]
            cuts = self.space.snapshot()
            moved = view_input(self.space, call, coordinates)  # type: ignore[arg-type]
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


def _name(node: fx.Node) -> str:
    call = call_of(node)
    return call.name if call is not None else getattr(node.target, "__name__", str(node.target))


def _is_flag(e: Expression) -> bool:
    """Whether the expression is a boolean tensor or its opposite."""
    return e.name == "tensor" if e.name != "not" else _is_flag(e.arguments[0])


def _leaks_gradient(node: fx.Node, e: Expression) -> bool:
    """Whether tensors in ``e`` want a gradient and the node, whose value it is, does not: it is detached."""
    value = tensor_of(node)
    if "tensor" not in e.leaves or value.requires_grad or not value.is_floating_point():
        return False
    return any(tensor_of(t).requires_grad for t, _ in tensors_and_axes(e)[0])


def _is_expensive(e: Expression) -> bool:
    return not e.is_leaf and (e.name in _EXPENSIVE or any(_is_expensive(a) for a in e.arguments))
