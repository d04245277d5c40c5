"""Matrix products of any spelling, with a label for every axis of their operands and result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from vbcompile.passes.graph_axes import Dim, Dims, Space
from vbcompile.passes.graph_ops import Call, call_of, is_tensor, known_equal, positive_dim, shape_of, tensor_of

Label = str
Labels = tuple[Label, ...]


@dataclass(frozen=True)
class Contraction:
    """``out = sum over the labels that are missing in out of lhs * rhs``, each axis with a label.

    Attributes:
        addend: what ``baddbmm`` and ``addmm`` add, with ``beta`` and ``alpha``: ``beta * addend + alpha * product``.
        before: the multiplication whose result ``node`` sums up, where they are two operators.
    """

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    lhs_labels: Labels
    rhs_labels: Labels
    out_labels: Labels
    addend: Any = None
    beta: Any = 1
    alpha: Any = 1
    before: fx.Node | None = None

    @property
    def summed(self) -> Labels:
        return tuple(label for label in self.lhs_labels if label not in self.out_labels)

    def swapped(self) -> "Contraction":
        """The same product with its operands named the other way round."""
        return Contraction(
            self.node, self.rhs, self.lhs, self.rhs_labels, self.lhs_labels, self.out_labels,
            self.addend, self.beta, self.alpha, self.before,
        )  # fmt: skip

    def label_dims(self, space: Space, out_dims: Dims) -> dict[Label, Dim]:
        """The dimension of every label, given those of the result; summed labels get new axes."""
        dims = dict(zip(self.out_labels, out_dims, strict=True))
        sizes = zip((*self.lhs_labels, *self.rhs_labels), (*shape_of(self.lhs), *shape_of(self.rhs)), strict=True)
        for label, size in sizes:
            if label not in dims:
                dims[label] = space.dim(size, "c")
        return dims

    def lhs_dims(self, dims: dict[Label, Dim]) -> Dims:
        return _operand_dims(self.lhs, self.lhs_labels, dims)

    def rhs_dims(self, dims: dict[Label, Dim]) -> Dims:
        return _operand_dims(self.rhs, self.rhs_labels, dims)


def _operand_dims(node: fx.Node, labels: Labels, dims: dict[Label, Dim]) -> Dims:
    return tuple(() if known_equal(size, 1) else dims[x] for x, size in zip(labels, shape_of(node), strict=True))


def contraction_of(call: Call | None, node: fx.Node) -> Contraction | None:
    """The contraction that a node computes; None for other operators and for products with repeated labels."""
    if call is None or call.in_place or not is_tensor(node):
        return None
    read = _READERS.get(call.name)
    found = read(call, node) if read is not None else None
    if found is None or not (is_tensor(found.lhs) and is_tensor(found.rhs)):
        return None
    lhs, rhs = _broad_labels(found.lhs, found.lhs_labels), _broad_labels(found.rhs, found.rhs_labels)
    if (lhs ^ rhs) - set(found.out_labels):
        return None  # a plain sum over an axis of one operand
    return found


def is_product(node: fx.Node) -> bool:
    """Whether a node is a matrix product: a contraction, or a layer with its bias."""
    call = call_of(node)
    return call is not None and (call.name == "linear" or contraction_of(call, node) is not None)


def _broad_labels(node: fx.Node, labels: Labels) -> set[Label]:
    return {label for label, size in zip(labels, shape_of(node), strict=True) if not known_equal(size, 1)}


def _matmul(call: Call, node: fx.Node) -> Contraction | None:
    lhs, rhs = call.input, call.get("other")
    if not (is_tensor(lhs) and is_tensor(rhs)):
        return None
    lhs_rank, rhs_rank = len(shape_of(lhs)), len(shape_of(rhs))
    if min(lhs_rank, rhs_rank) < 2:
        return None
    rank = max(lhs_rank, rhs_rank)
    batch = tuple(f"b{i}" for i in range(rank - 2))
    lhs_labels = (*batch[rank - lhs_rank :], "m", "c")
    rhs_labels = (*batch[rank - rhs_rank :], "c", "n")
    return Contraction(node, lhs, rhs, lhs_labels, rhs_labels, (*batch, "m", "n"))


def _inner(call: Call, node: fx.Node) -> Contraction | None:
    """The last axis of both is summed."""
    lhs, rhs = call.input, call.get("other")
    if not (is_tensor(lhs) and is_tensor(rhs)) or min(len(shape_of(lhs)), len(shape_of(rhs))) < 2:
        return None
    return _tensor_product(node, lhs, rhs, [len(shape_of(lhs)) - 1], [len(shape_of(rhs)) - 1])


def _tensordot(call: Call, node: fx.Node) -> Contraction | None:
    lhs, rhs, dims = call.input, call.get("other"), call.get("dims", 2)
    if not (is_tensor(lhs) and is_tensor(rhs)):
        return None
    ranks = len(shape_of(lhs)), len(shape_of(rhs))
    if type(dims) is int:
        dims = list(range(ranks[0] - dims, ranks[0])), list(range(dims))
    pairs = [[d % rank for d in side] for side, rank in zip(dims, ranks, strict=True)]
    return _tensor_product(node, lhs, rhs, *pairs)


def _tensor_product(
    node: fx.Node, lhs: fx.Node, rhs: fx.Node, lhs_summed: list[int], rhs_summed: list[int]
) -> Contraction:
    """Pairs of axes are summed; the others of ``lhs``, then those of ``rhs``, are the result's."""
    lhs_labels, rhs_labels = ([f"{side}{d}" for d in range(len(shape_of(x)))] for side, x in (("l", lhs), ("r", rhs)))
    for n, (a, b) in enumerate(zip(lhs_summed, rhs_summed, strict=True)):
        lhs_labels[a] = rhs_labels[b] = f"c{n}"
    out = [x for x in (*lhs_labels, *rhs_labels) if not x.startswith("c")]
    return Contraction(node, lhs, rhs, tuple(lhs_labels), tuple(rhs_labels), tuple(out))


def _linear(call: Call, node: fx.Node) -> Contraction | None:
    lhs, rhs = call.input, call.get("weight")
    if call.get("bias") is not None or not (is_tensor(lhs) and is_tensor(rhs)) or len(shape_of(rhs)) != 2:
        return None
    if len(shape_of(lhs)) < 2:
        return None
    batch = tuple(f"b{i}" for i in range(len(shape_of(lhs)) - 1))
    return Contraction(node, lhs, rhs, (*batch, "c"), ("n", "c"), (*batch, "n"))


def _sum_of_product(call: Call, node: fx.Node) -> Contraction | None:
    """``(lhs * rhs).sum(dims)``, the operands broadcast."""
    before = call.input
    product = call_of(before)
    if product is None or product.name != "mul" or product.in_place or call.get("dtype") is not None:
        return None
    operands = product.input, product.get("other")
    if not all(is_tensor(x) and tensor_of(x).is_floating_point() for x in operands):
        return None
    shape = shape_of(before)
    dims = call.get("dim")
    dims = range(len(shape)) if dims is None else dims if isinstance(dims, (tuple, list)) else (dims,)
    summed = {positive_dim(d, len(shape)) for d in dims}
    kept = [f"k{d}" if d in summed else f"b{d}" for d in range(len(shape)) if d not in summed or call.get("keepdim")]
    renamed = {f"b{d}": f"c{d}" for d in summed}
    lhs_labels, rhs_labels = (
        tuple(renamed.get(label, label) for label in _broadcast_labels(side, x, len(shape)))
        for side, x in zip("lr", operands, strict=True)
    )
    return Contraction(node, *operands, lhs_labels, rhs_labels, tuple(kept), before=before)


def _broadcast_labels(side: str, node: fx.Node, rank: int) -> Labels:
    """A label per place in the result; an axis of size one is nobody else's."""
    shape = shape_of(node)
    first = rank - len(shape)
    return tuple(f"{side if known_equal(size, 1) else 'b'}{first + n}" for n, size in enumerate(shape))


def _added(first: str, second: str, batch: Labels) -> Callable[[Call, fx.Node], Contraction | None]:
    def read(call: Call, node: fx.Node) -> Contraction | None:
        lhs, rhs = call.get(first), call.get(second)
        return Contraction(
            node, lhs, rhs, (*batch, "m", "c"), (*batch, "c", "n"), (*batch, "m", "n"),
            call.input, call.get("beta", 1), call.get("alpha", 1),
        )  # fmt: skip

    return read


def _einsum(call: Call, node: fx.Node) -> Contraction | None:
    operands = call.get("operands")
    labels = einsum_labels(call, node) if len(operands) == 2 else None
    return None if labels is None else Contraction(node, *operands, *labels)


def einsum_labels(call: Call, node: fx.Node) -> list[Labels] | None:
    """Labels of each operand, then of the result; None where an operand has one of them twice."""
    operands = call.get("operands")
    inputs, arrow, output = call.get("equation").replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != len(operands) or not all(is_tensor(x) for x in operands):
        return None
    labels = [_spell_out(part, len(shape_of(x))) for part, x in zip(parts, operands, strict=True)]
    labels.append(_spell_out(output if arrow else _implicit_output(parts), len(shape_of(node))))
    if any(len(set(x)) != len(x) for x in labels) or not set(labels[-1]) <= {x for part in labels[:-1] for x in part}:
        return None
    return labels


def _spell_out(part: str, rank: int) -> Labels:
    """Labels of one operand; the axes of an ellipsis are numbered from the right."""
    if "..." not in part:
        return tuple(part)
    left, right = part.split("...")
    hidden = rank - len(left) - len(right)
    return (*left, *(f"...{i}" for i in reversed(range(hidden))), *right)


def _implicit_output(parts: list[str]) -> str:
    letters = "".join(parts).replace("...", "")
    once = sorted(x for x in set(letters) if letters.count(x) == 1)
    return ("..." if any("..." in p for p in parts) else "") + "".join(once)


_READERS: dict[str, Callable[[Call, fx.Node], Contraction | None]] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "linear": _linear,
    "sum": _sum_of_product,
    "inner": _inner,
    "tensordot": _tensordot,
    "baddbmm": _added("batch1", "batch2", ("b0",)),
    "addmm": _added("mat1", "mat2", ()),
    "einsum": _einsum,
}
