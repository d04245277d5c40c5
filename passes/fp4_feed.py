"""What a compiled graph with packed weights is called with: their tensors, current at every call."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vbcompile.passes.fp4_weights import Packed, PackKey, WeightState, give_up, looks_inside, pack

log = logging.getLogger(__name__)


@dataclass(eq=False)
class FedWeight:
    """One packed copy that a graph takes.

    Attributes:
        positions: of its weights among the caller's arguments.
        names: what errors call them.
        packed: the copy as of the last call.
        master: for each weight, what becomes of its own memory after the first call: ``keep``, ``host`` or ``drop``.
    """

    positions: tuple[int, ...]
    key: PackKey
    names: tuple[str, ...]
    packed: Packed
    master: tuple[str, ...]

    def __post_init__(self) -> None:
        self.layout = self.packed.linear.layout


class WeightFeed:
    """Supplies the packed tensors to a compiled graph, after the caller's own arguments.

    The same compiled graph may be called with other weights, as happens when one compiled block serves many layers:
    each weight brings its own packed copy.
    """

    def __init__(self, fed: Sequence[FedWeight], max_error: float, watch: str, unpacked: Callable[..., Any]) -> None:
        self._fed, self._max_error, self._watch, self._unpacked = fed, max_error, watch, unpacked
        self._gives_up = any(master != "keep" for one in fed for master in one.master)
        self._warned = False
        # positions of weights with what was last seen of them, and the tensors that go with that
        self._last: tuple[list[tuple[int, WeightState, int]], list[Tensor]] | None = None

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` called with the packed tensors added."""

        def with_packed_weights(*args: Any) -> Any:
            try:
                extra = self._tensors(args)
            except _Unsuitable as reason:
                return self._run_unpacked(args, str(reason))
            out = compiled(*args, *extra)
            if self._gives_up:
                self._give_up(args)
            return out

        return with_packed_weights

    def _tensors(self, args: Sequence[Any]) -> list[Tensor]:
        last = self._last
        if last is not None:
            seen, extra = last
            for position, state, contents in seen:
                if state.contents != contents or not state.is_as_seen(args[position]):
                    break
            else:
                return extra
        return self._looked_for(args)

    def _looked_for(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors after a look at every weight, those made again that have to be."""
        extra: list[Tensor] = []
        seen: list[tuple[int, WeightState, int]] = []
        for fed in self._fed:
            weights = [args[position] for position in fed.positions]
            packed = fed.packed  # at once: another thread may call with other weights
            if not packed.is_current(weights, self._watch) or max(packed.errors) > self._max_error:
                packed = fed.packed = self._packed_again(fed, weights)
            extra += packed.linear.tensors
            seen += [(p, *looked) for p, looked in zip(fed.positions, packed.states, strict=True)]
        if not any(looks_inside(args[position], self._watch) for position, *_ in seen):
            self._last = seen, extra
        return extra

    def _packed_again(self, fed: FedWeight, weights: list[Tensor]) -> Packed:
        try:
            packed = pack(weights, fed.key, fed.names, self._watch, keep="keep" not in fed.master)
        except ValueError as error:
            raise _Unsuitable(str(error)) from error
        for name, loss in zip(fed.names, packed.errors, strict=True):
            if loss > self._max_error:
                raise _Unsuitable(f"{name}: relative error {loss:.3f} is above {self._max_error}")
        if packed.linear.layout != fed.layout:
            raise _Unsuitable(f"{fed.names[0]}: the new weight does not fit the layout {fed.layout}")
        return packed

    def _run_unpacked(self, args: Sequence[Any], reason: str) -> Any:
        if any(state.dropped for fed in self._fed for state, _ in fed.packed.states):
            raise RuntimeError(f"{reason}; other high-precision weights were given up, so nothing can run without FP4")
        if not self._warned:
            self._warned = True
            log.warning("FP4 does not suit the weights this graph is called with; it runs uncompiled: %s", reason)
        return self._unpacked(*args)

    def _give_up(self, args: Sequence[Any]) -> None:
        for fed in self._fed:
            for position, name, master in zip(fed.positions, fed.names, fed.master, strict=True):
                if master != "keep":
                    give_up(args[position], fed.key, name, to_host=master == "host")


class _Unsuitable(Exception):
    """A weight that cannot take the place of the one that the graph was compiled for."""
