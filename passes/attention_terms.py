"""Scores that are a sum of two matrix products, as one product of longer features.

Latent attention adds what a rotary part of queries and keys gives to what the rest gives. The sum is the product of the
concatenations, so that no tensor of the size of the scores is needed for the second part.
"""

from collections.abc import Callable

from torch import fx

from vbcompile.kernels.attention_case import MAX_HEAD_SIZE
from vbcompile.passes.attention_checks import atoms_of
from vbcompile.passes.attention_contraction import Contraction, contraction_of
from vbcompile.passes.attention_expression import Algebra, Expression
from vbcompile.passes.attention_masks import parents_of_score, substitute
from vbcompile.passes.attention_site import Operand
from vbcompile.passes.graph_axes import Dim, Space, product
from vbcompile.passes.graph_ops import call_of, tensor_of

Term = tuple[Operand, Operand, Dim]  # one more part of the features: queries, keys, the axis


def split_term(
    space: Space,
    algebra: Algebra,
    logits: Expression,
    query: Operand,
    key: Operand,
    features: Dim,
    roles: tuple[Dim, Dim],
    readable: Callable[[Contraction], bool],
) -> tuple[Expression, Term | None]:
    """The logits without a second product that is added to the score before anything else, and that product.

    Args:
        roles: axes of the rows and of the keys.
        readable: whether the operands of a product still hold the same values where the fused call reads them.
    """
    parents = parents_of_score(algebra, [logits])
    parent = next(iter(parents)) if len(parents) == 1 else None
    if parent is None or parent.name != "add" or parent.arguments.count(algebra.score) != 1:
        return logits, None
    other = parent.arguments[1] if parent.arguments[0] is algebra.score else parent.arguments[0]
    if other.name != "tensor":
        return logits, None
    second = contraction_of(call_of(other.arguments[0]), other.arguments[0])
    if second is None or second.addend is not None or not readable(second):
        return logits, None
    term = _bind(space, second, space.resolve_all(other.arguments[1]), roles)
    if term is None or not _fits(space, term, features, (query.node, key.node)):
        return logits, None
    return substitute(algebra, logits, {parent: algebra.score}), term


def _bind(space: Space, second: Contraction, out_dims: tuple[Dim, ...], roles: tuple[Dim, Dim]) -> Term | None:
    """Which operand belongs to the queries: the one with the rows and without the keys."""
    rows, keys = (set(space.resolve(dim)) for dim in roles)
    dims = second.label_dims(space, out_dims)
    features = tuple(atom for x in second.summed for atom in dims[x])
    for one in (second, second.swapped()):
        q, k = Operand(one.lhs, one.lhs_dims(dims)), Operand(one.rhs, one.rhs_dims(dims))
        of_q, of_k = atoms_of(space, q.dims), atoms_of(space, k.dims)
        if rows and rows <= of_q and keys <= of_k and not rows & of_k and not keys & of_q:
            return q, k, features
    return None


def _fits(space: Space, term: Term, features: Dim, nodes: tuple[fx.Node, fx.Node]) -> bool:
    """Whether all parts are of one precision and together no wider than kernels take."""
    q, k, added = term
    width = product(space.resolve(features)) + product(space.resolve(added))
    dtypes = {tensor_of(n).dtype for n in (*nodes, q.node, k.node)}
    return type(width) is int and width <= MAX_HEAD_SIZE and len(dtypes) == 1 and bool(added)
