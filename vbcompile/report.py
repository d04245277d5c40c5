"""Decision records: what each pass did to a graph, what it left alone, and why.

Every view of a compile (log line, ``explain`` text, JSON) is made from these records.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decision:
    """What a pass decided about one site of a graph.

    Attributes:
        pass_name: the pass, e.g. ``"attention"``.
        site: where, in the user's terms: module path and source line where known, else the node's name.
        action: ``"rewritten"`` or ``"left"``.
        reason: for ``"left"``, why; for ``"rewritten"``, what it became.
        implementation: which implementation runs on the target, and why it was chosen; empty where nothing was chosen.
        details: facts for a machine reader (shapes, dtype, mask kind, refused implementations).
    """

    pass_name: str
    site: str
    action: str
    reason: str
    implementation: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class GraphReport:
    """All decisions about one captured graph.

    Attributes:
        graph: running number of the graph in this process, and its Dynamo compile id where known.
        nodes: number of FX nodes before the passes.
        training: whether autograd was recording when the graph was captured.
        decisions: in the order of the passes.
        failures: ``(pass, reason)`` of passes that failed; the graph before that pass was kept.
        unavailable: passes that the mode names and that this version or target does not have, with the reason.
        graph_break: why Dynamo ended the graph before the model returned; empty where it did not.
        compiler: where the rewritten graph went, and why not to Inductor.
    """

    graph: str
    nodes: int
    training: bool
    target: str
    mode: str
    config: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    unavailable: list[tuple[str, str]] = field(default_factory=list)
    graph_break: str = ""
    compiler: str = ""

    def count(self, action: str, pass_name: str | None = None) -> int:
        """Number of decisions with that action (and pass)."""
        return sum(d.action == action and pass_name in (None, d.pass_name) for d in self.decisions)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), default=str)

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"graph {self.graph}: {self.nodes} nodes, mode {self.mode}, {self.target}"]
        for name in dict.fromkeys(d.pass_name for d in self.decisions):
            parts.append(f"{name}: {self.count('rewritten', name)} rewritten, {self.count('left', name)} left")
        parts += [f"{name} failed ({reason})" for name, reason in self.failures]
        return "; ".join(parts)


def merge_counts(reports: Sequence[GraphReport]) -> dict[str, dict[str, int]]:
    """Decisions per pass and action over several graphs: ``{"attention": {"rewritten": 4, "left": 1}}``."""
    total: dict[str, dict[str, int]] = {}
    for report in reports:
        for decision in report.decisions:
            actions = total.setdefault(decision.pass_name, {})
            actions[decision.action] = actions.get(decision.action, 0) + 1
    return total
