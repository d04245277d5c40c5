"""Who may write into the result of an attention, which the fused operator saves for its backward.

A model's own operators save weights and values instead, so that a model may add a residual to the result in place.
"""

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vbcompile.passes.graph_effects import storage_of, storage_of_value, written_tensors
from vbcompile.passes.graph_ops import call_of, reads_metadata_only, value_of

_COPIES_AT_MOST = {"reshape", "flatten", "contiguous"}  # views where the layout allows it


def may_be_written(result: fx.Node) -> bool:
    """Whether a tensor that may share memory with ``result`` is written to, or leaves the graph."""
    todo, seen = [result], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            written = written_tensors(user)
            if user.op == "output" or written is None or node in written:
                return True
            if not reads_metadata_only(user) and _may_share(user, node):
                todo.append(user)
    return False


def _may_share(user: fx.Node, node: fx.Node) -> bool:
    call, place = call_of(user), storage_of(node)
    if call is not None and call.name in _COPIES_AT_MOST:
        return True
    values = [v for v in pytree.tree_leaves(value_of(user)) if isinstance(v, Tensor)]
    return any(place is None or storage_of_value(v) in (place, None) for v in values)
