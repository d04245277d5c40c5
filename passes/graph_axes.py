"""Axes of tensors, followed backwards through view operators.

Every axis of interest is an :class:`Atom`. The dimensions of a node are described as one tuple of atoms per dimension:
``((b,), (h, g), (q,), (k,))`` is a tensor of four dimensions whose second one is the row-major product of ``h`` and
``g``; ``()`` is a dimension of size one. Going from the output of a view to its input keeps the description exact;
where a reshape cuts an atom in two, the :class:`Space` records the cut, so that every description resolves to the same
finest atoms.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import SymInt, fx

from vbcompile.passes.graph_ops import Call, known, known_equal, positive_dim, shape_of, value_of

Size = Any  # int or SymInt


class Atom:
    """One axis of the iteration space of a site."""

    __slots__ = ("label", "size")

    def __init__(self, size: Size, label: str = "") -> None:
        self.size = size
        self.label = label

    def __repr__(self) -> str:
        return f"{self.label or 'axis'}:{self.size}"


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


class AxisError(Exception):
    """A view moves elements in a way that atoms cannot describe."""


class Space:
    """The atoms of one site and how they were cut."""

    def __init__(self) -> None:
        self._cuts: dict[Atom, Dim] = {}

    def dim(self, size: Size, label: str = "") -> Dim:
        """A new axis as a dimension; a size of one needs no atom."""
        return () if known_equal(size, 1) else (Atom(size, label),)

    def resolve(self, dim: Dim) -> Dim:
        """The dimension in finest atoms."""
        if not any(atom in self._cuts for atom in dim):
            return dim
        return tuple(
            fine for atom in dim for fine in (self.resolve(self._cuts[atom]) if atom in self._cuts else (atom,))
        )

    def resolve_all(self, dims: Dims) -> Dims:
        return tuple(self.resolve(dim) for dim in dims)

    def cut(self, atom: Atom, outer: Size, inner: Size) -> Dim:
        parts = Atom(outer, atom.label + "o"), Atom(inner, atom.label + "i")
        self._cuts[atom] = parts
        return parts

    def count_cuts(self) -> int:
        return len(self._cuts)

    def snapshot(self) -> dict[Atom, Dim]:
        return dict(self._cuts)

    def restore(self, snapshot: dict[Atom, Dim]) -> None:
        self._cuts = dict(snapshot)

    def regroup(self, dims: Dims, sizes: Sequence[Size]) -> Dims:
        """The same elements in row-major order as dimensions of other sizes; raises AxisError where atoms cannot."""
        atoms = [atom for dim in self.resolve_all(dims) for atom in dim]
        cuts = self.snapshot()
        try:
            return self._regroup_in_order(atoms, sizes)
        except AxisError:
            if all(type(size) is int for size in (*sizes, *(a.size for a in atoms))):
                raise
            self.restore(cuts)
            return self._regroup_between(atoms, sizes)

    def _regroup_in_order(self, atoms: list[Atom], sizes: Sequence[Size]) -> Dims:
        rest = atoms[::-1]  # a stack
        result = tuple(() if known_equal(size, 1) else self._take(rest, size) for size in sizes)
        if rest:
            raise AxisError("a reshape whose sizes cannot be followed")
        return self.resolve_all(result)

    def _regroup_between(self, atoms: list[Atom], sizes: Sequence[Size]) -> Dims:
        """Equal sizes at either end stay; as a reshape keeps the number of elements, what one atom or one size is left
        between them equals all that it stands against, whether or not symbols say so."""
        wanted = [n for n, size in enumerate(sizes) if not known_equal(size, 1)]
        result: list[Dim] = [() for _ in sizes]
        for end in (-1, 0):
            while atoms and wanted and known_equal(atoms[end].size, sizes[wanted[end]]):
                result[wanted.pop(end)] = (atoms.pop(end),)
        if len(wanted) == 1:
            result[wanted[0]] = tuple(atoms)
        elif len(atoms) == 1 and wanted:
            (atom,) = atoms
            for n, place in enumerate(wanted[:-1]):
                outer, atom = self.cut(atom, sizes[place], math.prod(sizes[p] for p in wanted[n + 1 :]))
                result[place] = (outer,)
            result[wanted[-1]] = (atom,)
        elif atoms or wanted:
            raise AxisError("a reshape whose sizes cannot be followed")
        return self.resolve_all(tuple(result))

    def _take(self, atoms: list[Atom], size: Size) -> Dim:
        taken: list[Atom] = []
        product: Size = 1
        while not known_equal(product, size):
            if not atoms:
                raise AxisError("a reshape whose sizes cannot be followed")
            atom = atoms.pop()
            rest = size // product  # without a remainder: every atom taken so far divides it
            if known_equal(rest, atom.size):
                return (*taken, atom)
            if _divides(atom.size, rest):
                taken.append(atom)
                product = product * atom.size
            elif _divides(rest, atom.size):
                outer, inner = self.cut(atom, rest, atom.size // rest)
                atoms.append(inner)
                taken.append(outer)
                product = product * rest
            else:
                raise AxisError("a reshape that cuts an axis unevenly")
        return tuple(taken)


def product(dim: Dim) -> Size:
    """Size of a dimension."""
    size: Size = 1
    for atom in dim:
        size = size * atom.size
    return size


def _divides(a: Size, b: Size) -> bool:
    if type(a) is int and type(b) is int:
        return a > 0 and b % a == 0
    return known((b // a) * a == b) or known(b % a == 0)


# ------------------------------------------------------------------------------------------------------ views
RESHAPES = {"reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"}
REPEATS = {"repeat", "repeat_interleave"}
_SAME = {"contiguous", "clone"}


def view_input(space: Space, call: Call, dims: Dims) -> tuple[fx.Node, Dims] | None:
    """The input of a view (or plain copy) and its dimensions, given those of the output; None for any other operator.

    Raises AxisError where the operator is a view that atoms cannot follow.
    """
    source = call.input
    if call.in_place or not isinstance(source, fx.Node) or not hasattr(value_of(source), "shape"):
        return None
    if call.name in _SAME:
        return source, dims
    if call.name in RESHAPES:
        return source, space.regroup(dims, shape_of(source))
    order = permutation(call, len(dims))
    if order is not None:
        moved: list[Dim] = [()] * len(dims)
        for position, dim in zip(order, dims, strict=True):
            moved[position] = dim
        return source, tuple(moved)
    if call.name in ("expand", "expand_as"):
        return source, broadcast_input(dims, shape_of(source))
    if call.name == "getitem":
        return _plain_index(call, source, dims)
    if call.name == "repeat_interleave":
        return _repeat_interleave(space, call, source, dims)
    if call.name == "repeat":
        return _repeat(space, call, source, dims)
    return None


def broadcast_input(dims: Dims, shape: Sequence[Size]) -> Dims:
    """Dimensions of an operand of ``shape`` that is broadcast to ``dims``."""
    trailing = dims[len(dims) - len(shape) :]
    return tuple(() if known_equal(size, 1) else dim for size, dim in zip(shape, trailing, strict=True))


def permutation(call: Call, rank: int) -> list[int] | None:
    """``order`` with output dimension ``i`` = input dimension ``order[i]``; None for other operators."""
    order = list(range(rank))
    if call.name == "transpose":
        a, b = (positive_dim(call.get(name), rank) for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
    elif call.name == "mT" or (call.name in ("t", "T") and rank == 2):
        order[-1], order[-2] = order[-2], order[-1]
    elif call.name == "T":
        order.reverse()
    elif call.name == "permute":
        order = [positive_dim(d, rank) for d in call.get("dims")]
    elif call.name == "movedim":
        return _movedim(call, rank)
    elif call.name != "t":
        return None
    return order


def _movedim(call: Call, rank: int) -> list[int]:
    def dims(name: str) -> list[int]:
        value = call.get(name)
        return [positive_dim(d, rank) for d in (value if isinstance(value, (tuple, list)) else (value,))]

    source, destination = dims("source"), dims("destination")
    order: list[int | None] = [None] * rank
    for s, d in zip(source, destination, strict=True):
        order[d] = s
    rest = iter(d for d in range(rank) if d not in source)
    return [next(rest) if d is None else d for d in order]


def index_items(index: Any, rank: int) -> list[Any]:
    """The items of an index with the ellipsis written out as full slices, covering all ``rank`` dimensions."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    fill = [slice(None)] * (rank - consumed)
    if any(item is Ellipsis for item in items):
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        return items[:at] + fill + items[at + 1 :]
    return items + fill


def is_full_slice(item: Any, size: Size) -> bool:
    """Whether the slice keeps a dimension of that size as it is."""
    if not isinstance(item, slice) or item.step not in (None, 1):
        return False
    start, stop = value_of(item.start), value_of(item.stop)
    begins = start is None or (isinstance(start, (int, SymInt)) and (known_equal(start, 0) or known(start + size <= 0)))
    return begins and (
        stop is None or known_equal(stop, size) or (type(stop) is int and type(size) is int and stop >= size)
    )


def _plain_index(call: Call, source: fx.Node, dims: Dims) -> tuple[fx.Node, Dims] | None:
    shape = shape_of(source)
    index = call.get("index")
    if any(isinstance(i, (list, bool)) for i in (index if isinstance(index, tuple) else (index,))):
        return None
    given = list(dims)
    result: list[Dim] = []
    position = 0
    for item in index_items(index, len(shape)):
        if item is None:
            given.pop(0)
        elif isinstance(item, int) and known_equal(shape[position], 1):
            result.append(())
            position += 1
        elif is_full_slice(item, shape[position]):
            result.append(given.pop(0))
            position += 1
        else:
            return None
    return source, tuple(result)


def _repeat_interleave(space: Space, call: Call, source: fx.Node, dims: Dims) -> tuple[fx.Node, Dims] | None:
    repeats, dim = call.get("repeats"), call.get("dim")
    if type(repeats) is not int or not isinstance(dim, int) or "output_size" in call.arguments:
        return None
    dim = positive_dim(dim, len(dims))
    outer, _ = space.regroup((dims[dim],), (shape_of(source)[dim], repeats))
    return source, (*dims[:dim], outer, *dims[dim + 1 :])


def _repeat(space: Space, call: Call, source: fx.Node, dims: Dims) -> tuple[fx.Node, Dims] | None:
    repeats, shape = call.get("repeats"), shape_of(source)
    if not all(type(r) is int for r in repeats):
        return None
    result = []
    leading = len(repeats) - len(shape)
    for repeat, size, dim in zip(repeats[leading:], shape, dims[leading:], strict=True):
        result.append(dim if repeat == 1 else space.regroup((dim,), (repeat, size))[1])
    return source, tuple(result)
