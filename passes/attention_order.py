"""The memory order in which the readers of an attention want its result."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import fx

from vbcompile.passes.graph_axes import Dim, Dims, permutation, product
from vbcompile.passes.graph_ops import call_of, known_equal, reads_metadata_only, shape_of, tensor_of


def reads_rows_first(out: fx.Node, dims: Dims, lead: Sequence[Dim], rows: Dim, values: Dim) -> bool:
    """Whether everybody reads the result as ``[lead[0], rows, other leads, features]`` in a row.

    ``dims`` are the result's own dimensions, all of them in finest atoms.
    """
    if len(lead) < 2:
        return False
    wanted = [*lead[0], *rows, *(a for dim in lead[1:] for a in dim), *values]
    return _all_pack(out, dims, wanted)


def _all_pack(node: fx.Node, dims: Dims, wanted: list[Any]) -> bool:
    users = [u for u in node.users if not reads_metadata_only(u)]
    return len(users) == 1 and _packs(users[0], dims, wanted)  # of several copies one may be written to


def _packs(user: fx.Node, dims: Dims, wanted: list[Any]) -> bool:
    """Whether ``user`` (of a tensor with ``dims``) makes a contiguous tensor in the wanted order of axes."""
    call = call_of(user)
    if call is None or call.in_place:
        return False
    if call.name in ("contiguous", "reshape", "flatten"):
        if user.op == "call_method" and user.target == "view":
            return False
        if [a for dim in dims for a in dim] == wanted:
            return _is_packed(user)
        regrouped = _regrouped(dims, user) if call.name == "reshape" else None
        return regrouped is not None and _lies_together(regrouped, wanted) and _all_pack(user, regrouped, wanted)
    order = permutation(call, len(dims))
    if order is None:
        return False
    return _all_pack(user, tuple(dims[d] for d in order), wanted)


def _is_packed(node: fx.Node) -> bool:
    """Whether a result is contiguous in the source, where ``reshape`` may give a view that is not."""
    packed: Any = 1
    for size, stride in reversed(list(zip(shape_of(node), tensor_of(node).stride(), strict=True))):
        if not known_equal(size, 1) and not known_equal(stride, packed):
            return False
        packed = packed * size
    return True


def _regrouped(dims: Dims, reshape: fx.Node) -> Dims | None:
    """The dimensions after a reshape that cuts no axis."""
    atoms = [a for dim in dims for a in dim]
    found: list[Dim] = []
    for size in shape_of(reshape):
        count = next((n for n in range(len(atoms) + 1) if known_equal(product(tuple(atoms[:n])), size)), None)
        if count is None:
            return None
        found.append(tuple(atoms[:count]))
        del atoms[:count]
    return None if atoms else tuple(found)


def _lies_together(dims: Dims, wanted: list[Any]) -> bool:
    """Whether the atoms of every dimension are neighbours in memory, so that the reshape is a view."""
    places = [[wanted.index(a) for a in dim] for dim in dims]
    return all(b == a + 1 for place in places for a, b in pairwise(place))
