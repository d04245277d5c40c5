"""What the rules for single operators ask of the walk that leads to them, :class:`attention_lift.Lifter`."""

from typing import Any, Protocol

from torch import fx

from vbcompile.passes.attention_expression import Algebra, Coordinate, Coordinates, Expression
from vbcompile.passes.graph_axes import Space


class Reader(Protocol):
    """Reads the operands of the operator in hand; what cannot be read raises Opaque, or Refusal for the whole site.

    Attributes:
        score: the matrix product whose elements are the scores; None where there is none.
    """

    algebra: Algebra
    space: Space
    score: fx.Node | None

    def depends(self, node: fx.Node) -> bool:
        """Whether the node is computed from the scores."""

    def lift(self, argument: Any, coordinates: Coordinates) -> Expression:
        """A tensor that depends on the scores, or is loaded where it cannot be expressed, or a number."""

    def value(self, node: fx.Node, coordinates: Coordinates) -> Expression:
        """A tensor that does not depend on the scores."""

    def read(self, argument: Any, coordinates: Coordinates) -> Expression:
        """Any input."""

    def operand(self, argument: Any, coordinates: Coordinates, direct: bool) -> Expression:
        """An input of a pointwise operator, broadcast; ``direct``: of one that depends on the scores."""

    def number(self, argument: Any) -> Expression:
        """A Python or symbolic number."""

    def size(self, value: Any) -> Expression: ...

    def index(self, coordinate: Coordinate) -> Expression:
        """A coordinate as an integer expression."""

    def coordinate(self, index: Expression, size: Any) -> Coordinate:
        """An integer expression as a coordinate of a dimension."""
