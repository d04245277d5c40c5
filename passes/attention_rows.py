"""Rows of scores in which a mask leaves no key, computed once in the graph for all the layers that share a mask.

Models that mask by a large negative number mean "takes no part", except in rows without any key: there the softmax of
equal numbers is the mean over all keys. With such rows known, the fill is a mask everywhere else (and tiles of hidden
keys need no work).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vbcompile.kernels.score_function import POINTWISE, ScoreFunction, accumulation_dtype
from vbcompile.passes.graph_axes import Dim, Dims
from vbcompile.passes.graph_effects import Effects
from vbcompile.passes.graph_emit import Emitter
from vbcompile.passes.graph_ops import tensor_of


@dataclass(frozen=True)
class EmptyRows:
    """A captured tensor yet to be made: bool ``[*lead, Q, 1]``, True in rows where a mask leaves no key.

    Attributes:
        mask: its ``score`` is the mask.
        captured: tensors of the graph that the mask reads, with their dimensions.
    """

    mask: ScoreFunction
    captured: tuple[tuple[fx.Node, Dims], ...]

    def key(self, captured: list[tuple[fx.Node, Dims]], target: list[Dim]) -> Any:
        """Equal for what gives the same tensor; ``captured`` with dimensions in finest atoms, as ``target``."""
        places = {atom: (n, m) for n, group in enumerate(target) for m, atom in enumerate(group)}
        read = tuple((node, tuple(tuple(places[a] for a in dim) for dim in dims)) for node, dims in captured)
        return self.mask.dumps(), read, tuple(tuple(str(a.size) for a in group) for group in target)


class EmptyRowsOfGraph:
    """What was computed so far in one graph.

    Args:
        effects: of the graph.
    """

    def __init__(self, effects: Effects) -> None:
        self.made: dict[Any, fx.Node] = {}
        self._effects = effects

    def find(self, key: Any, inputs: Sequence[fx.Node], here: fx.Node) -> fx.Node | None:
        """The node made for ``key``, if it comes before ``here`` and its inputs hold the same values still."""
        made, place = self.made.get(key), self._effects.position
        if made is None or made._erased or place[made] > place[here]:
            return None
        return None if any(self._effects.is_written(x, place[made], place[here]) for x in inputs) else made


def emit_empty_rows(
    emitter: Emitter, mask: ScoreFunction, captured: list[fx.Node], sizes: list[Any], like: Tensor
) -> fx.Node:
    """Nodes that compute :class:`EmptyRows`.

    Args:
        captured: as the fused operator takes them, each broadcastable to ``sizes``.
        sizes: of the canonical space ``[*lead, Q, K]``: numbers, or nodes that hold them.
        like: the queries, for their device and dtype.

    Returns:
        A node of rank ``len(sizes)``, with last size one.
    """
    shown = _Evaluation(emitter, mask, captured, sizes, like).value(mask.score)
    shown = emitter.method("any", shown, -1, keepdim=True)
    return emitter.function(torch.logical_not, shown)


class _Evaluation:
    """The instructions of a program as operators of the graph."""

    def __init__(
        self, emitter: Emitter, function: ScoreFunction, captured: list[fx.Node], sizes: list[Any], like: Tensor
    ) -> None:
        self._emitter = emitter
        self._function = function
        self._captured = captured
        self._sizes = sizes
        self._device, self._dtype = like.device, accumulation_dtype(like.dtype)
        self._values: dict[int, fx.Node] = {}

    def value(self, position: int) -> fx.Node:
        if position not in self._values:
            name, *arguments = self._function.program[position]
            leaf = self._leaves.get(name)
            self._values[position] = self._operator(name, arguments) if leaf is None else leaf(*arguments)
        return self._values[position]

    @property
    def _leaves(self) -> dict[str, Callable[..., fx.Node]]:
        return {
            "q_index": lambda: self._index(-2),
            "k_index": lambda: self._index(-1),
            "lead_index": self._index,
            "q_length": lambda: self._constant(self._sizes[-2]),
            "k_length": lambda: self._constant(self._sizes[-1]),
            "captured": lambda n: self._captured[n],
            "const": self._constant,
        }

    def _index(self, axis: int) -> fx.Node:
        index = self._emitter.function(torch.arange, self._sizes[axis], device=self._device)
        axis %= len(self._sizes)
        return self._emitter.method("reshape", index, [-1 if d == axis else 1 for d in range(len(self._sizes))])

    def _constant(self, value: Any) -> fx.Node:
        return self._emitter.function(torch.full, (1,) * len(self._sizes), value, device=self._device)

    def _operator(self, name: str, arguments: list[int]) -> fx.Node:
        values = [self.value(a) for a in arguments]
        casts = {"to_float": self._dtype, "to_int": torch.int64, "to_bool": torch.bool}
        if name in casts:
            return self._emitter.method("to", values[0], casts[name])
        if name == "div" or any(tensor_of(v).is_floating_point() for v in values):
            values = [v if tensor_of(v).dtype == torch.bool else self._float(v) for v in values]
        return self._emitter.function(POINTWISE[name][1], *values)

    def _float(self, value: fx.Node) -> fx.Node:
        return value if tensor_of(value).dtype == self._dtype else self._emitter.method("to", value, self._dtype)
