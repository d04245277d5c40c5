"""Implementations of the logical operators: who can run a case on a target, at what cost, and why others cannot.

An operator (``attention``) has one meaning and several implementations. Each states its refusals as sentences, so that
a user who asks why a kernel does not run gets an answer. The reference refuses nothing, so a choice always exists.

Users override the choice of one compile with the option ``implementations``, and of a process with :func:`force` or
``VB_IMPLEMENTATION=attention=triton,attention_backward=reference``. The option goes with the graph: the calls of its
operators carry it as text, so it holds in the backward, in other threads and in every cache.
Other packages add implementations by an entry point in the group ``vbcompile.implementations`` that names a function;
it is called without arguments when a choice is first asked for, and calls ``operator(name).register(...)``.
"""

import difflib
import logging
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module, metadata
from operator import itemgetter
from typing import Any

from vbcompile.config_error import ConfigError
from vbcompile.device import Target
from vbcompile.kernels import replay

log = logging.getLogger(__name__)

VARIABLE = "VB_IMPLEMENTATION"
ENTRY_POINTS = "vbcompile.implementations"

# operator -> modules whose import registers its implementations; imported when a choice is first asked for
_VENDORS = ("vendor_npu_attention", "vendor_npu_decode", "vendor_hpu_attention", "vendor_xpu_attention")
_ATTENTION = tuple(f"vbcompile.kernels.{m}" for m in ("attention", "attention_sdpa", "attention_gpu", *_VENDORS))
_FP4_LINEAR = tuple(
    f"vbcompile.kernels.{m}"
    for m in ("fp4_linear", "fp4_linear_gpu", "fp4_native", "fp4_linear_cpu", "vendor_npu_fp4", "vendor_hpu_fp4")
)
MODULES = {
    "attention": _ATTENTION,
    "attention_backward": _ATTENTION,
    "attention_training": tuple(f"vbcompile.kernels.{m}" for m in ("attention_training", "vendor_hpu_training")),
    "fp4_linear": _FP4_LINEAR,
    "fp4_linear_backward": _FP4_LINEAR,
    "fp4_quantize": tuple(f"vbcompile.kernels.{m}" for m in ("fp4_quantize", "fp4_quantize_triton", "vendor_npu_fp4")),
    "fp4_grouped_linear": ("vbcompile.kernels.fp4_grouped", "vbcompile.kernels.fp4_grouped_cpu"),
}


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        name: unique within the operator.
        run: called with the operator's arguments.
        refuses: ``(target, case) -> reason`` or None where it can run; ``case`` None asks about the target alone.
        cost: ``(target, case) -> relative time``; the lowest that does not refuse is chosen, ties by registration.
        options: keyword arguments that ``run`` takes beyond those; what it leaves out, the operator does afterwards.
        replays: whether calls may be remembered (:mod:`vbcompile.kernels.replay` says what that takes).
        inlines: whether ``run`` is a few of PyTorch's operators and reads no values on the host, so that compiled
            graphs may hold these operators themselves.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Target, Any], str | None]
    cost: Callable[[Target, Any], float]
    options: frozenset[str] = frozenset()
    replays: bool = False
    inlines: bool = False


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for a case, and why the others were not.

    Attributes:
        refused: ``(name, reason)`` of those that run on the target but not this case, or not as fast.
        elsewhere: ``(name, reason)`` of those that do not run on the target at all.
        asked: whether the user named the implementation.
    """

    implementation: Implementation
    refused: tuple[tuple[str, str], ...]
    elsewhere: tuple[tuple[str, str], ...] = ()
    asked: bool = False

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
        _load_third_parties()

    def register(self, implementation: Implementation) -> None:
        """Add an implementation; a second one of the same name is an error."""
        if any(i.name == implementation.name for i in self.implementations):
            raise ValueError(f"operator {self.name!r} already has an implementation {implementation.name!r}")
        self.implementations.append(implementation)
        forget_choices()

    def choose(self, target: Target, case: Hashable, asked: str = "") -> Choice:
        """The cheapest implementation that takes ``case`` on ``target``, or the forced one; remembered per case.

        Args:
            asked: the option ``implementations`` of the compile as :func:`as_text` writes it.

        Raises:
            ConfigError: the implementation that the user forced does not exist or refuses the case.
        """
        with following(asked):
            return _choose(self.name, target, case, forced_implementation(self.name))

    def cheapest_inlined(self, target: Target, case: Any) -> tuple[float, Implementation] | None:
        """The cheapest of those that graphs may hold themselves, behind its cost; None where each refuses."""
        self.load()
        costs, _, _ = _sort_out([i for i in self.implementations if i.inlines], target, case)
        return min(costs, key=_by_cost, default=None)


def never_refuses(target: Target, case: Any) -> None:
    """What an implementation refuses that runs everything."""
    return None


def always(cost: float) -> Callable[[Target, Any], float]:
    """What an implementation costs whose time, beside others', is about the same for every case."""
    return lambda target, case: cost


def last_resort(target: Target, case: Any) -> float:
    """What an implementation costs that runs where all others refuse."""
    return math.inf


def to_be_run(choice: Choice) -> Implementation:
    """The implementation; a recording of the call that is under way is given up if it does not take part in that."""
    if not choice.implementation.replays:
        replay.refuse()
    return choice.implementation


def forget_choices() -> None:
    """Make every choice anew: implementations or their costs have changed."""
    _choose.cache_clear()
    replay.forget()


_OPERATORS = {name: Operator(name) for name in MODULES}


def operator(name: str) -> Operator:
    """The operator of that name; raises KeyError with the known ones."""
    if name not in _OPERATORS:
        raise KeyError(f"unknown operator {name!r}; known: {', '.join(_OPERATORS)}")
    return _OPERATORS[name]


@contextmanager
def force(**implementations: str) -> Iterator[None]:
    """Run operators by the named implementations in this process: ``with force(attention="triton"): ...``.

    Graphs compiled earlier follow too, since the choice is made when an operator runs; not where they hold PyTorch's
    own attention operators (:mod:`vbcompile.passes.attention_inlined`).

    Raises:
        KeyError: unknown operator.
        ConfigError: from the operator's call, where the implementation does not exist or refuses the case.
    """
    for name in implementations:
        operator(name)
    forced, before = _forced(), dict(_forced())
    forced.update(implementations)
    try:
        yield
    finally:
        forced.clear()
        forced.update(before)


def forced_implementation(name: str) -> str | None:
    """The implementation that the user wants for an operator, None where the choice is free."""
    return (_option.get() or {}).get(name) or _forced().get(name)


_option: ContextVar[Mapping[str, str] | None] = ContextVar("implementations", default=None)


@contextmanager
def option(implementations: Mapping[str, str]) -> Iterator[None]:
    """Within it, choices follow the option ``implementations`` of a compile."""
    token = _option.set(implementations)
    try:
        yield
    finally:
        _option.reset(token)


def check_option(implementations: Mapping[str, str], target: Target) -> None:
    """Raise ConfigError where the option names no operator, no implementation, or one that the target does not run,
    and where ``VB_IMPLEMENTATION`` names what does not exist."""
    check_names(implementations)
    check_names(_forced())
    for name, implementation in implementations.items():
        reason = _named(name, implementation).refuses(target, None)
        if reason:
            raise ConfigError(_refusal(name, implementation, reason))


def check_names(implementations: Mapping[str, str]) -> None:
    """Raise ConfigError for an operator or an implementation that does not exist; asks no device."""
    for name, implementation in implementations.items():
        if name not in _OPERATORS:
            raise ConfigError(f"option 'implementations': unknown operator {_unknown(name, [*_OPERATORS])}")
        _OPERATORS[name].load()
        _named(name, implementation)


def as_text(implementations: Mapping[str, str]) -> str:
    """The option as calls in a graph carry it, ``attention=triton,attention_backward=reference``."""
    return ",".join(f"{name}={implementation}" for name, implementation in sorted(implementations.items()))


def following(asked: str) -> AbstractContextManager[None]:
    """:func:`option` from the text that a call in a graph carries; empty: nothing changes."""
    return option(_pairs(asked)) if asked else _FREE


_FREE = nullcontext()


@lru_cache(maxsize=256)
def _pairs(text: str) -> Mapping[str, str]:
    return dict(part.split("=", 1) for part in text.split(","))


@cache
def _forced() -> dict[str, str]:
    """Operator -> implementation that the user wants; begins with what the environment says."""
    return parse_forced(os.environ)


def parse_forced(environ: Mapping[str, str]) -> dict[str, str]:
    """``VB_IMPLEMENTATION`` as a dictionary. Raises ConfigError where it names no operator."""
    forced: dict[str, str] = {}
    for part in filter(None, environ.get(VARIABLE, "").split(",")):
        name, _, implementation = (word.strip() for word in part.partition("="))
        if name not in MODULES or not implementation:
            valid = ", ".join(f"{name}=..." for name in MODULES)
            raise ConfigError(
                f"environment variable {VARIABLE}: {part!r} is not OPERATOR=IMPLEMENTATION; valid: {valid}"
            )
        forced[name] = implementation
    return forced


@cache
def _load_third_parties() -> None:
    """Once: a package that fails is named in a warning and left out."""
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()()
        except Exception as error:  # noqa: BLE001 - somebody else's code, reported
            log.warning("implementations of %s are left out: %s: %s", entry.value, type(error).__name__, error)


@lru_cache(maxsize=4096)
def _choose(name: str, target: Target, case: Any, forced: str | None) -> Choice:
    _OPERATORS[name].load()
    if forced is not None:
        return _forced_choice(name, target, case, forced)
    costs, refused, elsewhere = _sort_out(_OPERATORS[name].implementations, target, case)
    if not costs:
        raise RuntimeError(f"no implementation of {name} runs this: {refused + elsewhere}")
    cost, chosen = min(costs, key=_by_cost)
    refused += [(i.name, f"estimated {c / cost:.2g} times slower") for c, i in costs if cost < c < math.inf]
    if math.isinf(cost):  # nothing but the last resort: then it matters why
        return Choice(chosen, (*refused, *elsewhere))
    return Choice(chosen, tuple(refused), tuple(elsewhere))


_Costs = list[tuple[float, Implementation]]
_Reasons = list[tuple[str, str]]
_by_cost = itemgetter(0)


def _sort_out(
    implementations: Iterable[Implementation], target: Target, case: Any
) -> tuple[_Costs, _Reasons, _Reasons]:
    """What each costs that takes a case, why others do not, and why others do not run on the target at all."""
    costs: _Costs = []
    refused: _Reasons = []
    elsewhere: _Reasons = []
    for implementation in implementations:
        if reason := implementation.refuses(target, None):
            elsewhere.append((implementation.name, reason))
        elif reason := implementation.refuses(target, case):
            refused.append((implementation.name, reason))
        else:
            costs.append((implementation.cost(target, case), implementation))
    return costs, refused, elsewhere


def _forced_choice(name: str, target: Target, case: Any, forced: str) -> Choice:
    chosen = _named(name, forced)
    reason = chosen.refuses(target, None) or chosen.refuses(target, case)
    if reason:
        raise ConfigError(_refusal(name, forced, reason))
    others = (i.name for i in _OPERATORS[name].implementations if i is not chosen)
    return Choice(chosen, tuple((other, "another was asked for") for other in others), asked=True)


def _named(name: str, wanted: str) -> Implementation:
    found = {i.name: i for i in _OPERATORS[name].implementations}
    if wanted not in found:
        raise ConfigError(f"operator {name} has no implementation {_unknown(wanted, [*found])}")
    return found[wanted]


def _refusal(name: str, wanted: str, reason: str) -> str:
    return f"implementation {wanted!r} of {name} was asked for and refuses: {reason}"


def _unknown(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1)
    return f"{name!r}; valid: {', '.join(valid)}" + (f"; did you mean {close[0]!r}?" if close else "")


def describe(target: Target) -> list[tuple[str, str, str]]:
    """``(operator, implementation, reason)`` for every implementation; the reason is empty where it can run."""
    rows = []
    for name in MODULES:
        operator(name).load()
        rows += [(name, i.name, i.refuses(target, None) or "") for i in operator(name).implementations]
    return rows
