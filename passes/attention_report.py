"""What a rewritten site became, in words and in facts."""

from typing import Any

from vbcompile.kernels.score_function import causal_offset
from vbcompile.passes.attention_plan import Plan
from vbcompile.passes.graph_axes import product
from vbcompile.passes.graph_ops import is_tensor, shape_of


def describe(made: Plan) -> str:
    """One line, e.g. ``attention, causal, 4 query heads per key head, no mask tensor``."""
    function = made.function
    words = ["attention"]
    if function.mask is not None:
        words.append(_mask_word(made))
    if function.program[function.score] != ("score",):
        words.append("score function")
    heads = _queries_per_key_head(made)
    if heads > 1:
        words.append(f"{heads} query heads per key head")
    if function.sink is not None:
        words.append("sink")
    if made.site.dropout:
        words.append("dropout")
    count = len(made.captured)
    words.append("no mask tensor" if count == 0 else f"{count} captured tensor{'s' if count > 1 else ''}")
    return ", ".join(words)


def _mask_word(made: Plan) -> str:
    function = made.function
    q, k = (_int_size(dim) for dim in (made.rows, made.keys))
    # with a dynamic length the offset is asked for at two sizes: a causal mask has the same one
    sizes = [(q, k)] if q is not None and k is not None else [(16, 16), (24, 24)]
    if all(causal_offset(function, *size) is not None for size in sizes):
        return "causal"
    return "mask from positions" if function.depends_on(function.mask, "k_index") else "mask"


def _int_size(dim: Any) -> int | None:
    size = product(dim)
    return size if type(size) is int else None


def _queries_per_key_head(made: Plan) -> int:
    q = {a for dim in made.site.space.resolve_all(made.q.dims) for a in dim}
    k = {a for dim in made.site.space.resolve_all(made.k.dims) for a in dim}
    return _int_size(tuple(a for dim in made.lead for a in dim if a in q and a not in k)) or 1


def details(made: Plan) -> dict[str, Any]:
    """Facts for a machine reader: shapes as text (symbolic sizes by name), dtype, score function."""
    tensors = {"q": made.q.node, "k": made.k.node, "v": made.v.node}
    return {
        **{name: [str(size) for size in shape_of(node)] for name, node in tensors.items()},
        "dtype": str(made.dtype).removeprefix("torch."),
        "score_function": made.function.dumps(),
        "captured": [_shape_text(node) for node, _ in made.captured],
        "dropout": bool(made.site.dropout),
    }


def _shape_text(captured: Any) -> list[str]:
    return [str(s) for s in shape_of(captured)] if is_tensor(captured) else []
