"""What a pass is told besides the graph, and how it reaches what happens after the passes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vbcompile.config import Config
from vbcompile.device import Target

Compile = Callable[..., Callable[..., Any]]
"""``compile(graph module, example inputs, cudagraphs=True)`` gives what runs."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may know.

    Attributes:
        config: the resolved configuration.
        target: the device that kernels are chosen for.
        elsewhere: whether the graph runs on another device, so that its kernels cannot be those that were chosen.
        training: whether autograd records what the graph computes.
        example_inputs: one for each placeholder; a pass that adds placeholders at the end adds to it.
        wrappers: applied in order to the compiled graph; what comes out is called with the caller's own arguments, so
            the wrapper of a pass that adds placeholders supplies their values.
        around: applied in order to what compiles a graph; for a pass that compiles it in several parts.
    """

    config: Config
    target: Target
    training: bool
    elsewhere: bool = False
    example_inputs: list[Any] = field(default_factory=list)
    wrappers: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = field(default_factory=list)
    around: list[Callable[[Compile], Compile]] = field(default_factory=list)

    @property
    def implementations(self) -> Mapping[str, str]:
        """The option of that name as far as the graph can follow it here."""
        return {} if self.elsewhere else self.config.implementations

    @property
    def followed(self) -> Mapping[str, str]:
        """The option of that name as far as passes follow it: weights are packed here, wherever the graph runs."""
        named = self.config.implementations
        return {k: v for k, v in named.items() if k != "fp4_quantize"} if self.elsewhere else named

    def undo(self, inputs: int, wrappers: int) -> None:
        """Forget the inputs and wrappers that were added beyond these numbers, and what was put around the compiler."""
        del self.example_inputs[inputs:]
        del self.wrappers[wrappers:]
        self.around.clear()
