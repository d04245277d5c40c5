"""Implementations of the logical operators: who can run a case on a target, at what cost, and why others cannot.

An operator (``attention``) has one meaning and several implementations. Each states its refusals as sentences, so that
a user who asks why a kernel does not run gets an answer. The reference refuses nothing, so a choice always exists.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

from vbcompile.device import Target

# operator -> modules whose import registers its implementations; imported when a choice is first asked for
_ATTENTION = tuple(f"vbcompile.kernels.{m}" for m in ("attention", "attention_sdpa", "attention_gpu"))
_FP4_LINEAR = tuple(f"vbcompile.kernels.{m}" for m in ("fp4_linear", "fp4_linear_gpu", "fp4_linear_cpu"))
MODULES = {
    "attention": _ATTENTION,
    "attention_backward": _ATTENTION,
    "fp4_linear": _FP4_LINEAR,
    "fp4_linear_backward": _FP4_LINEAR,
}


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        name: unique within the operator.
        run: called with the operator's arguments.
        refuses: ``(target, case) -> reason`` or None where it can run; ``case`` None asks about the target alone.
        cost: ``(target, case) -> relative time``; the lowest that does not refuse is chosen, ties by registration.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Target, Any], str | None]
    cost: Callable[[Target, Any], float]


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for a case, and why the others were not.

    Attributes:
        refused: ``(name, reason)`` of those that run on the target but not this case, or not as fast.
        elsewhere: ``(name, reason)`` of those that do not run on the target at all.
    """

    implementation: Implementation
    refused: tuple[tuple[str, str], ...]
    elsewhere: tuple[tuple[str, str], ...] = ()

    def explain(self) -> str:
        """The choice and what was refused on this target, in one line."""
        refusals = "; ".join(f"{name}: {reason}" for name, reason in self.refused)
        return self.implementation.name + (f" (not {refusals})" if refusals else "")


@dataclass
class Operator:
    """A logical operator and its implementations."""

    name: str
    implementations: list[Implementation] = field(default_factory=list)

    def load(self) -> None:
        """Import the modules that register this operator's implementations."""
        for module in MODULES[self.name]:
            import_module(module)

    def register(self, implementation: Implementation) -> None:
        """Add an implementation; a second one of the same name is an error."""
        if any(i.name == implementation.name for i in self.implementations):
            raise ValueError(f"operator {self.name!r} already has an implementation {implementation.name!r}")
        self.implementations.append(implementation)
        _choose.cache_clear()

    def choose(self, target: Target, case: Hashable) -> Choice:
        """The cheapest implementation that takes ``case`` on ``target``; remembered per case."""
        return _choose(self.name, target, case)


_OPERATORS = {name: Operator(name) for name in MODULES}


def operator(name: str) -> Operator:
    """The operator of that name; raises KeyError with the known ones."""
    if name not in _OPERATORS:
        raise KeyError(f"unknown operator {name!r}; known: {', '.join(_OPERATORS)}")
    return _OPERATORS[name]


@lru_cache(maxsize=4096)
def _choose(name: str, target: Target, case: Any) -> Choice:
    _OPERATORS[name].load()
    costs: list[tuple[float, Implementation]] = []
    refused: list[tuple[str, str]] = []
    elsewhere: list[tuple[str, str]] = []
    for implementation in _OPERATORS[name].implementations:
        if reason := implementation.refuses(target, None):
            elsewhere.append((implementation.name, reason))
        elif reason := implementation.refuses(target, case):
            refused.append((implementation.name, reason))
        else:
            costs.append((implementation.cost(target, case), implementation))
    if not costs:
        raise RuntimeError(f"no implementation of {name} runs this: {refused + elsewhere}")
    cost, chosen = min(costs, key=lambda c: c[0])
    refused += [(i.name, f"estimated {c / cost:.2g} times slower") for c, i in costs if cost < c < math.inf]
    if math.isinf(cost):  # nothing but the last resort: then it matters why
        return Choice(chosen, (*refused, *elsewhere))
    return Choice(chosen, tuple(refused), tuple(elsewhere))


def describe(target: Target) -> list[tuple[str, str, str]]:
    """``(operator, implementation, reason)`` for every implementation; the reason is empty where it can run."""
    rows = []
    for name in MODULES:
        operator(name).load()
        rows += [(name, i.name, i.refuses(target, None) or "") for i in operator(name).implementations]
    return rows
