"""Before a run, from shapes alone: what fits where, peak memory, step time, bottleneck, smallest workable budget."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vbcompile.vgpu import VGPUStack, create_vgpu_stack
from vbcompile.vgpu_plan import Operator, Plan, PlanError, Sweep, Tier, Weight
from vbcompile.vgpu_planner import fits_on_device, plan_weights, smallest_budget
from vbcompile.vgpu_rates import Rates
from vbcompile.vgpu_simulator import timeline
from vbcompile.vgpu_size import exact_size, parse_size, size_text

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Estimate", "PlanError", "estimate"]

_STATE_PARTS = 3  # gradient, first and second moment
_WIDEST_COPIES = 2  # outputs of the widest matrix that are alive at once, where no inputs were given


@dataclass(frozen=True)
class Placement:
    """One level: what of the model lives there. All in bytes; ``streamed`` is per step."""

    level: int
    device: str
    capacity: int
    weights: int
    other: int
    streamed: int


@dataclass(frozen=True)
class Estimate:
    """What to expect of one step.

    Attributes:
        fits: Whether everything is on the device, so that nothing is streamed.
        budget: Bytes of device memory allowed.
        peak_bytes: Most device memory in use.
        weight_bytes: All weights.
        reserve_bytes: Device memory beside weights: activations, and in training what fits of the rest.
        state_bytes: Gradients and optimizer state of training; on the device if ``fits``, else on the host.
        step_ns: Time of one step; ``compute_ns`` of it if nothing had to be waited for.
        bottleneck: ``compute`` or the level whose link decides.
        smallest_budget: Least bytes of device memory with which a plan exists.
        placements: One row per level.
        assumptions: What was not known and how it was filled in.
        plan: The plan itself.
        memory: ``(nanoseconds, bytes)`` of device memory over the step; empty where the step was not traced.
    """

    fits: bool
    budget: int
    peak_bytes: int
    weight_bytes: int
    reserve_bytes: int
    state_bytes: int
    step_ns: int
    compute_ns: int
    bottleneck: str
    smallest_budget: int
    placements: tuple[Placement, ...]
    assumptions: tuple[str, ...]
    plan: Plan
    memory: tuple[tuple[int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All figures, without the plan, ready for JSON."""
        return {name: asdict(self)[name] for name in self.__dataclass_fields__ if name not in ("plan", "memory")}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [
            f"{'fits' if self.fits else 'streamed'}: weights {size_text(self.weight_bytes)}, device budget "
            f"{size_text(self.budget)}, peak {size_text(self.peak_bytes)} "
            f"({size_text(self.reserve_bytes)} beside weights)",
            f"step {self.step_ns / 1e6:.2f} ms, {self.compute_ns / 1e6:.2f} ms of it computation; bottleneck: "
            f"{self.bottleneck}",
            f"smallest budget that works: {size_text(self.smallest_budget)}",
            f"{'level':<12}{'capacity':>16}{'weights':>16}{'other':>16}{'per step':>16}",
        ]
        for row in self.placements:
            figures = (row.capacity, row.weights, row.other, row.streamed)
            lines.append(f"{row.level} {row.device:<10}" + "".join(f"{size_text(figure):>16}" for figure in figures))
        return "\n".join([*lines, *(f"assumed: {text}" for text in self.assumptions)])


def estimate(
    model: "nn.Module | Mapping[str, Any]",
    *,
    inputs: "torch.Tensor | Sequence[Any] | Mapping[str, Any] | None" = None,
    budget: int | str | None = None,
    stack: VGPUStack | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    tokens: int = 1,
    weight_bits: float | None = None,
    training: bool = False,
    reserve: int | str | None = None,
    tflops: float | None = None,
) -> Estimate:
    """Estimate one step without materialising a weight.

    Args:
        model: A module, on the meta device or any other, or its shapes in order of use:
            ``{"layer.weight": (4096, 4096)}``, with ``((4096, 4096), torch.bfloat16)`` or a tensor for another type
            than float32.
        inputs: Inputs of the module (by position, by name, or the one tensor); only shapes and dtypes count. With them
            the step is traced: order, work and live memory are those of the model. Without them each module's own
            weights are taken in order of definition, used once for ``tokens`` rows.
        budget: Device memory, e.g. ``"20GiB"``; None: level 0 of the stack.
        stack: The tiers; None: those of this machine within ``VB_HBM_BUDGET``, or of ``max_memory``.
        tokens: Rows of each matrix product (batch times sequence length) where ``inputs`` are not given.
        weight_bits: Bits per element of matrices as they are stored, scales included (FP4: 4.5).
        training: Forward and backward, with gradients and two values of optimizer state per weight.
        reserve: Device memory beside weights; None: traced, or assumed from the widest matrix.
        tflops: Matrix rate of the device in 10**12 operations per second; None: as calibrated, else not a limit.

    Raises:
        PlanError: nothing works within the budget and the tiers; it names the smallest budget that does.
        ConfigError: a size or tier that makes no sense.
        TypeError: neither a module nor shapes.
        ValueError: ``tokens`` or ``weight_bits`` not positive, a shape that is none, or a model that cannot be traced.
    """
    if not (isinstance(model, Mapping) or hasattr(model, "named_modules")):
        raise TypeError(f"estimate takes a torch.nn.Module or shapes by name, not {type(model).__name__}")
    _require_positive(tokens=tokens, weight_bits=weight_bits, tflops=tflops)
    if stack is None:
        stack = create_vgpu_stack(max_memory=max_memory, budget=budget)
    elif budget is not None:
        stack = stack.with_budget(min(parse_size("budget", budget), stack.budget))
    notes: list[str] = []
    rates = _rates(stack, tflops, notes)
    sweep, live = _sweep(model, inputs, tokens, weight_bits, training, rates)
    if reserve is not None:
        sweep, live = Sweep(sweep.weights, sweep.operators, parse_size("reserve", reserve)), ()
    elif inputs is None:
        notes.append(f"{size_text(sweep.reserve)} beside weights, from the widest matrix: give inputs or reserve")
    states = _state_bytes(sweep, model, training, notes)
    found = _evaluate(sweep, stack, states, notes)
    return replace(found, memory=_memory(found.plan, live))


def _evaluate(sweep: Sweep, stack: VGPUStack, states: int, notes: list[str]) -> Estimate:
    """States are kept on the device if that spares all streaming, else on the host, where they take room."""
    complete = replace(sweep, reserve=sweep.reserve + states)
    away = 0 if fits_on_device(complete, stack.budget) else states
    smallest = _smallest(sweep, stack.tiers(), states)
    if away and not _has_room(stack.tiers(), away):
        raise PlanError(
            f"gradients and optimizer state need {size_text(states)} beyond the device, more than host memory has. The "
            f"smallest budget that works is {exact_size(smallest)}, with everything on the device",
            budget=stack.budget,
            minimum_budget=smallest,
        )
    tiers = _without(stack.tiers(), away)
    plan = plan_weights(sweep if away else complete, stack.budget, tiers)
    step, bottleneck = plan.prediction.step_ns, plan.prediction.bottleneck
    leaving = tiers[0].write_ns(away // _STATE_PARTS) if away and tiers else 0
    if leaving > step:
        step, bottleneck = leaving, f"gradients to {tiers[0].name}"
    return Estimate(
        fits=plan.declined,
        budget=stack.budget,
        peak_bytes=plan.peak_bytes,
        weight_bytes=sum(weight.nbytes for weight in sweep.weights),
        reserve_bytes=plan.sweep.reserve,
        state_bytes=states,
        step_ns=step,
        compute_ns=sweep.compute_ns,
        bottleneck=bottleneck,
        smallest_budget=smallest,
        placements=_placements(plan, stack, away),
        assumptions=tuple(notes),
        plan=plan,
    )


def _memory(plan: Plan, live: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Device memory as operators begin, and at the end: what the plan takes throughout, and what is alive with each."""
    if not live:
        return ()
    constant = plan.peak_bytes - max(live)
    running = [event for event in timeline(plan) if event.lane == "compute"]
    points = [(event.start_ns, constant + nbytes) for event, nbytes in zip(running, live, strict=True)]
    return (*points, (running[-1].end_ns, constant + live[-1]))


def _smallest(sweep: Sweep, tiers: Sequence[Tier], states: int) -> int:
    """Least budget: with the states beyond the device if there is room for them, else with everything on it."""
    if states and not _has_room(tiers, states):
        return smallest_budget(replace(sweep, reserve=sweep.reserve + states), ())
    return smallest_budget(sweep, _without(tiers, states))


def _has_room(tiers: Sequence[Tier], nbytes: int) -> bool:
    return any(tier.level == _states_level(tiers) and tier.capacity >= nbytes for tier in tiers)


def _states_level(tiers: Sequence[Tier]) -> int | None:
    """Level that takes gradients and optimizer state: host memory, or what there is."""
    levels = [tier.level for tier in tiers if tier.name == "cpu"] or [tier.level for tier in tiers]
    return levels[0] if levels else None


def _without(tiers: Sequence[Tier], nbytes: int) -> tuple[Tier, ...]:
    """The tiers with ``nbytes`` taken from the one that holds the states; that one first, as it is asked for most."""
    taken = _states_level(tiers)
    rest = [replace(t, capacity=max(t.capacity - nbytes, 0)) if t.level == taken else t for t in tiers]
    return tuple(sorted(rest, key=lambda tier: (tier.level != taken, tier.level)))


def _placements(plan: Plan, stack: VGPUStack, states: int) -> tuple[Placement, ...]:
    beside = {0: plan.sweep.reserve + plan.ring_bytes}
    holder = _states_level(stack.tiers())
    if holder is not None:
        beside[holder] = states
    for level in {tier.via for tier in stack.tiers() if tier.via is not None}:
        beside[level] = beside.get(level, 0) + plan.staging_bytes
    return tuple(
        Placement(
            level=level.number,
            device=level.device,
            capacity=level.capacity,
            weights=plan.bytes_per_level.get(level.number, 0),
            other=beside.get(level.number, 0),
            streamed=sum(copy.nbytes for copy in plan.copies if copy.level == level.number),
        )
        for level in stack.levels
    )


_HOW_TO_KNOW = "not measured (vbcompile plan --measure, create_vgpu_stack(measure=True))"


def _rates(stack: VGPUStack, tflops: float | None, notes: list[str]) -> Rates:
    level = stack.levels[0]
    if level.source == "default":
        notes.append(f"{level.speed_gbps:g} GB/s for the memory of {level.device}: {_HOW_TO_KNOW}")
    notes += [
        f"{lv.speed_gbps:g} GB/s for the link of {lv.device}: {_HOW_TO_KNOW}"
        for lv in stack.levels[1:]
        if lv.source == "default"
    ]
    if tflops is not None:
        return Rates(level.read_rate, int(tflops * 10**12))
    measured = stack.calibration.matmul if stack.calibration is not None else None
    if measured is None:
        notes.append(f"matrix products take no longer than reading their operands: {_HOW_TO_KNOW}")
    return Rates(level.read_rate, measured)


def _sweep(
    model: Any,
    inputs: Any,
    tokens: int,
    bits: float | None,
    training: bool,
    rates: Rates,
) -> tuple[Sweep, tuple[int, ...]]:
    """The step, and bytes alive beside the weights with each operator where it was traced."""
    if isinstance(model, Mapping):
        if inputs is not None:
            raise ValueError("inputs need a module to run through; with shapes give tokens")
        modules = [(name, [(name, *_shape(name, value))]) for name, value in model.items()]
        return _from_shapes(modules, tokens, bits, training, rates), ()
    if inputs is None:
        return _from_shapes(_own_weights(model), tokens, bits, training, rates), ()
    return _from_trace(model, inputs, bits, training, rates)


def _shape(name: str, value: Any) -> tuple[tuple[int, ...], "torch.dtype"]:
    """Shape and dtype of a tensor, of a shape, or of a pair of both."""
    import torch

    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    dtype = torch.float32
    if isinstance(value, Sequence) and len(value) == 2 and isinstance(value[1], torch.dtype):
        value, dtype = value
    if not isinstance(value, Sequence) or not all(isinstance(n, int) and n >= 0 for n in value):
        raise ValueError(f"{name!r}: a shape is a sequence of integers, with a dtype or without, not {value!r}")
    return tuple(value), dtype


def _own_weights(model: "nn.Module") -> list[tuple[str, list[tuple[str, tuple[int, ...], "torch.dtype"]]]]:
    """For each module with weights of its own, their names (tied ones by their first name), shapes and types."""
    first: dict[int, str] = {}
    found = []
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        rows = []
        for part, tensor in own:
            full = first.setdefault(id(tensor), f"{name}.{part}" if name else part)
            rows.append((full, tuple(tensor.shape), tensor.dtype))
        if rows:
            found.append((name or type(model).__name__, rows))
    return found


def _from_shapes(
    modules: Sequence[tuple[str, Sequence[tuple[str, tuple[int, ...], "torch.dtype"]]]],
    tokens: int,
    bits: float | None,
    training: bool,
    rates: Rates,
) -> Sweep:
    index: dict[str, int] = {}
    weights: list[Weight] = []
    operators: list[Operator] = []
    widest = 0
    for name, rows in modules:
        used, nbytes, flops = [], 0, 0
        for full, shape, dtype in rows:
            size = _stored(shape, dtype, bits)
            if full not in index:
                index[full] = len(weights)
                weights.append(Weight(full, size))
            used.append(index[full])
            nbytes += size
            if len(shape) >= 2:
                flops += 2 * math.prod(shape) * tokens
                widest = max(widest, (shape[0] + math.prod(shape[1:])) * dtype.itemsize)
        operators.append(Operator(name, rates.nanoseconds(nbytes, flops), tuple(used)))
    reserve = _WIDEST_COPIES * widest * tokens
    if training:  # the backward reads each weight once more, for twice the products
        operators += [Operator(f"{o.name} backward", 2 * o.nanoseconds, o.weights) for o in reversed(operators)]
        reserve += tokens * sum(
            (s[0] + math.prod(s[1:])) * d.itemsize for _, r in modules for _, s, d in r if len(s) >= 2
        )
    return Sweep(tuple(weights), tuple(operators), reserve)


def _from_trace(
    model: "nn.Module", inputs: Any, bits: float | None, training: bool, rates: Rates
) -> tuple[Sweep, tuple[int, ...]]:
    import torch

    from vbcompile.vgpu_trace import trace

    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    by_name = isinstance(inputs, Mapping)
    traced = trace(model, () if by_name else inputs, inputs if by_name else None, training=training)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    index = {name: position for position, name in enumerate(state)}
    parameters = dict(model.named_parameters())
    weights = tuple(
        Weight(name, _stored(tuple(t.shape), t.dtype, bits), pinned=training and name not in parameters)
        for name, t in state.items()
    )
    saved = [t.nbytes - weights[index[name]].nbytes for name, t in state.items()]
    operators = tuple(
        Operator(
            f"{position}:{op.name}",
            rates.nanoseconds(max(op.nbytes - sum(saved[index[n]] for n in op.weights), 0), op.flops, op.launches),
            tuple(index[name] for name in op.weights),
        )
        for position, op in enumerate(traced.operators)
    )
    return Sweep(weights, operators, traced.peak_bytes), tuple(op.live_bytes for op in traced.operators)


def _stored(shape: tuple[int, ...], dtype: "torch.dtype", bits: float | None) -> int:
    if bits is not None and len(shape) >= 2 and dtype.is_floating_point:
        return -int(-math.prod(shape) * bits // 8)
    return math.prod(shape) * dtype.itemsize


def _state_bytes(sweep: Sweep, model: Any, training: bool, notes: list[str]) -> int:
    """Gradient, first and second moment of each weight, in the weight's own type as PyTorch's Adam keeps them."""
    if not training:
        return 0
    notes.append(
        "Adam with two values of state per weight; its own time, and the way of updated weights back, are not counted"
    )
    trained = None if isinstance(model, Mapping) else {n for n, p in model.named_parameters() if p.requires_grad}
    return _STATE_PARTS * sum(weight.nbytes for weight in sweep.weights if trained is None or weight.name in trained)


def _require_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not value > 0):
            raise ValueError(f"{name} must be positive, not {value!r}")
