"""The fused call of a site, planned: operands without needless copies, leading axes, the score function.

Nothing in the graph changes here; a site that cannot be planned is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, fx

from vbcompile.kernels.score_function import Builder, Instruction, ScoreFunction
from vbcompile.kernels.score_triton import LEAD_AXES
from vbcompile.passes.attention_expression import Expression, parts
from vbcompile.passes.attention_lift import Refusal
from vbcompile.passes.attention_masks import conjunction
from vbcompile.passes.attention_order import reads_rows_first
from vbcompile.passes.attention_rows import EmptyRows
from vbcompile.passes.attention_site import Operand, Retry, Site
from vbcompile.passes.graph_axes import AxisError, Dim, Dims, product, view_input
from vbcompile.passes.graph_effects import Effects, ancestors, learned_leaves, storage_of
from vbcompile.passes.graph_ops import FLOATS, Call, call_of, is_tensor, known_equal, tensor_of, value_of

_LARGEST = torch.finfo(torch.float32).max


@dataclass
class Plan:
    """What to emit.

    Attributes:
        lead: the leading dimensions in their order; each one atom, or several merged.
        dtype: of q, k and v of the fused call.
        captured: ``(node, symbolic number or rows to be found, its dimensions)``.
        factor: constant that was taken out of the operands, part of the scale.
        terms: as those of the site.
    """

    site: Site
    lead: list[Dim] = field(default_factory=list)
    q: Operand = None  # type: ignore[assignment]
    k: Operand = None  # type: ignore[assignment]
    v: Operand = None  # type: ignore[assignment]
    dtype: torch.dtype = torch.float32
    function: ScoreFunction = field(default_factory=ScoreFunction)
    captured: list[tuple[fx.Node | EmptyRows, Dims]] = field(default_factory=list)
    factor: float = 1.0
    terms: list[tuple[Operand, Operand, Dim]] = field(default_factory=list)

    @property
    def rows(self) -> Dim:
        return self.site.space.resolve(self.site.rows)

    @property
    def keys(self) -> Dim:
        return self.site.space.resolve(self.site.keys)


def plan(site: Site, effects: Effects) -> Plan:
    """Plan a site; raises Refusal, or Retry where less detail may do."""
    made = Plan(site)
    made.dtype = _common_dtype(site)
    peeler = _Peeler(site, effects)
    may_scale = not site.terms  # a factor of one part is none of the other's
    made.q, made.factor = peeler.peel(site.q, (site.rows, site.features), may_scale)
    made.k, factor = peeler.peel(site.k, (site.keys, site.features), may_scale)
    for q, k, features in site.terms:
        q, k = (peeler.peel(x, (axis, features), False)[0] for x, axis in ((q, site.rows), (k, site.keys)))
        made.terms.append((q, k, features))
    made.factor *= factor
    made.v, _ = peeler.peel(site.v, (site.keys, site.values), may_scale=False)
    if made.dtype != tensor_of(site.out).dtype or made.dtype != site.score_dtype:
        _use_low_precision(made, peeler)
    builder = _ProgramBuilder(made)
    held = [*builder.tensors(), *(gate.dims for gate in site.gates)]
    made.lead = _with_batch_of_one(made, _leading(site, held), builder.tensors())
    made.function = builder.build()
    made.captured = builder.captured
    _check_arrangement(made)
    return made


def check_gradients(plans: Sequence[Plan]) -> None:
    """Raise Refusal where an input that wants a gradient takes part in the source (maybe to get zero) but not here."""
    kept: set[fx.Node] = set()
    for made in plans:
        operands = [made.q, made.k, made.v, *(x for q, k, _ in made.terms for x in (q, k))]
        others = [
            *(n for n, _ in made.captured),
            *(n for _, n, _ in made.site.factors),
            *(gate.factor for gate in made.site.gates),
            *(made.site.residual or ())[:1],
        ]
        kept |= {x.node for x in operands} | {n for n in others if isinstance(n, fx.Node)}
    region = set().union(*(made.site.region for made in plans))
    read = {i for node in region for i in node.all_input_nodes} - region - kept
    lost = learned_leaves([n for n in read if is_tensor(n) and tensor_of(n).requires_grad], kept)
    if lost and not lost <= ancestors(kept):
        raise Refusal(f"{min(n.name for n in lost)} would get no gradient")


def _check_arrangement(made: Plan) -> None:
    """Raise Refusal where an operand cannot be brought into the canonical space by views."""
    space, site = made.site.space, made.site
    features, values = space.resolve(site.features), space.resolve(site.values)
    outer = [*made.lead, made.rows, made.keys]
    targets = [
        (made.q.dims, [*made.lead, made.rows, features]),
        (made.k.dims, [*made.lead, made.keys, features]),
        (made.v.dims, [*made.lead, made.keys, values]),
        *((q.dims, [*made.lead, made.rows, space.resolve(axis)]) for q, _, axis in made.terms),
        *((k.dims, [*made.lead, made.keys, space.resolve(axis)]) for _, k, axis in made.terms),
    ]
    for dims, target in targets:
        if not {*target[-2], *target[-1]} <= _set(space.resolve_all(dims)):
            raise Refusal("queries, keys or values are repeated along an axis of theirs")
        _check_dims(space.resolve_all(dims), target)
    for _, dims in made.captured:
        _check_dims(space.resolve_all(dims), outer, spread=site.spread)
    if site.residual is not None:
        _check_dims(space.resolve_all(site.residual[1]), list(space.resolve_all(site.out_dims)))
    for gate in site.gates:
        if _set(space.resolve_all(gate.dims)) & set(made.rows):
            raise Refusal("the weights are multiplied with something that differs from key to key and from row to row")
        if made.dtype == torch.float16 and not gate.guard:
            raise Refusal("a gate of the values may be too large for float16")
        _check_dims(space.resolve_all(gate.dims), [*made.lead, made.keys])
    for _, _, dims in site.factors:
        _check_dims(space.resolve_all(dims), list(space.resolve_all(site.out_dims)))


def _check_dims(dims: Dims, target: list[Dim], spread: bool = False) -> None:
    atoms = [a for dim in dims for a in dim]
    if len(set(atoms)) != len(atoms):
        raise Refusal("a diagonal of a tensor takes part in the scores")
    for group in target:
        missing = set(group) - set(atoms)
        if set(group) & set(atoms) and missing and not spread:
            raise Retry("an operand covers a part of a merged axis")
    if not set(atoms) <= {a for group in target for a in group}:
        raise Retry("an operand has an axis that the attention does not have")


# -------------------------------------------------------------------------------------------------------- precision
def _common_dtype(site: Site) -> torch.dtype:
    return torch.promote_types(site.score_dtype, tensor_of(site.out).dtype)


def _use_low_precision(made: Plan, peeler: "_Peeler") -> None:
    """Scores computed from upcast operands are as exact from the operands themselves: the products are the same."""
    low = tensor_of(made.site.out).dtype
    if tensor_of(made.v.node).dtype != low:
        return
    q, k = peeler.below_cast(made.q, low), peeler.below_cast(made.k, low)
    terms = [(peeler.below_cast(a, low), peeler.below_cast(b, low), axis) for a, b, axis in made.terms]
    if q is not None and k is not None and all(a is not None and b is not None for a, b, _ in terms):
        made.q, made.k, made.dtype = q, k, low
        made.terms = terms  # type: ignore[assignment]


# --------------------------------------------------------------------------------------------------------- operands
class _Peeler:
    """Looks for what an operand was copied, repeated or scaled from."""

    def __init__(self, site: Site, effects: Effects) -> None:
        self.site = site
        self.effects = effects
        self.end = effects.position[site.insert_before]

    def peel(self, operand: Operand, whole: tuple[Dim, Dim], may_scale: bool) -> tuple[Operand, float]:
        """A tensor earlier in the graph with the same elements, and the factor left out; ``whole`` stays uncut."""
        space = self.site.space
        best, factor, running = operand, 1.0, 1.0
        cuts = space.snapshot()
        here = operand
        pieces = [len(space.resolve(dim)) for dim in whole]
        while True:
            step = self._step(here, may_scale)
            if step is None or [len(space.resolve(dim)) for dim in whole] != pieces or self._too_many():
                break
            here, gain, scale = step
            running *= scale
            if gain or (best is not operand and not self._is_ordered(best) and self._is_ordered(here)):
                best, factor, cuts = here, running, space.snapshot()
            elif best is operand and not self._is_ordered(best) and self._is_ordered(here) and running == 1.0:
                best, cuts = here, space.snapshot()
        space.restore(cuts)
        return best, factor

    def _too_many(self) -> bool:
        site = self.site
        taken = {*site.space.resolve(site.rows), *site.space.resolve(site.values)}
        return sum(a not in taken for dim in site.space.resolve_all(site.out_dims) for a in dim) > LEAD_AXES

    def _step(self, here: Operand, may_scale: bool) -> tuple[Operand, bool, float] | None:
        """One operator back: the input, whether leaving the operator out saves work, the factor left out."""
        call = call_of(here.node)
        if call is None or call.in_place or not is_tensor(call.input) or not self._readable(call.input):
            return None
        if self._is_written_since(here.node):
            return None
        if may_scale and call.name in ("mul", "div"):
            return self._scaling(call, here)
        try:
            moved = view_input(self.site.space, call, here.dims)
        except AxisError:
            return None
        if moved is None:
            return None
        node, dims = moved
        if self._loses_an_axis(here.dims, dims):
            return None
        gain = call.name in ("expand", "expand_as", "repeat", "repeat_interleave")
        return Operand(node, dims), gain or storage_of(node) != storage_of(here.node), 1.0

    def _loses_an_axis(self, before: Dims, after: Dims) -> bool:
        """Whether a row, key or feature axis is there only because a copy was repeated along it."""
        site, resolve = self.site, self.site.space.resolve
        lost = _set(site.space.resolve_all(before)) - _set(site.space.resolve_all(after))
        axes = [site.rows, site.keys, site.features, site.values, *(axis for *_, axis in site.terms)]
        return any(lost & set(resolve(axis)) for axis in axes)

    def _scaling(self, call: Call, here: Operand) -> tuple[Operand, bool, float] | None:
        factor = value_of(call.get("other"))
        if (
            not isinstance(factor, (int, float))
            or isinstance(factor, bool)
            or factor in (0, float("inf"), -float("inf"))
        ):
            return None
        if factor != factor or tensor_of(call.input).dtype != tensor_of(here.node).dtype or len(call.arguments) != 2:
            return None
        return Operand(call.input, here.dims), True, factor if call.name == "mul" else 1.0 / factor

    def _readable(self, node: fx.Node) -> bool:
        """Whether the tensor holds at the end of the site what it held when it was made, under one gradient mode."""
        begin = self.effects.position.get(node)
        if begin is None:
            return False
        return not self.effects.is_written(node, begin, self.end) and not self.effects.switches_grad_mode(
            begin, self.end
        )

    def _is_written_since(self, node: fx.Node) -> bool:
        """Whether something else was written into the tensor since it was computed."""
        return self.effects.is_written(node, self.effects.position.get(node, -1), self.end)

    def _is_ordered(self, operand: Operand) -> bool:
        """Whether the dimensions stand in canonical order already."""
        space, site = self.site.space, self.site
        dims = space.resolve_all(operand.dims)
        if any(len(dim) > 1 for dim in dims) or len(dims) < 3:
            return False
        order = [a for dim in space.resolve_all(site.out_dims) for a in dim]
        last = [*space.resolve(site.rows), *space.resolve(site.keys), *space.resolve(site.features)]
        last += space.resolve(site.values)
        place = {a: n for n, a in enumerate([*(a for a in order if a not in last), *last])}
        sequence = [place[a] for dim in dims for a in dim if a in place]
        return sequence == sorted(sequence) and bool(dims[-1])

    def below_cast(self, operand: Operand, dtype: torch.dtype) -> Operand | None:
        """The operand before it was cast up from ``dtype``."""
        space = self.site.space
        here, cuts = operand, space.snapshot()
        while tensor_of(here.node).dtype != dtype:
            call = call_of(here.node)
            step: Operand | None = None
            is_copy = call is not None and not call.in_place and is_tensor(call.input)
            if call is not None and is_copy and self._readable(call.input) and not self._is_written_since(here.node):
                if call.name in ("to", "float", "type", "type_as", "double"):
                    step = Operand(call.input, here.dims) if _widens(call.input, here.node) else None
                else:
                    back = self._step(here, may_scale=False)
                    step = None if back is None else back[0]
            if step is None or self._too_many():
                space.restore(cuts)
                return None
            here = step
        return here


def _widens(source: fx.Node, cast: fx.Node) -> bool:
    """Whether a conversion gives a floating type that holds all numbers of the type before."""
    before, after = tensor_of(source).dtype, tensor_of(cast).dtype
    return before in FLOATS and after in FLOATS and torch.promote_types(before, after) == after


# ------------------------------------------------------------------------------------------------------ leading axes
def _leading(site: Site, captured: list[Dims]) -> list[Dim]:
    """The leading dimensions: every atom of the result but rows and value features, merged down to four."""
    space = site.space
    others = {*space.resolve(site.rows), *space.resolve(site.values)}
    atoms = [a for dim in space.resolve_all(site.out_dims) for a in dim if a not in others]
    lead: list[Dim] = [(a,) for a in atoms]
    operands = [site.q, site.k, site.v, *(x for q, k, _ in site.terms for x in (q, k))]
    holders = [_set(space.resolve_all(o.dims)) for o in operands]
    holders += [_set(space.resolve_all(dims)) for dims in captured]
    while len(lead) > LEAD_AXES:
        for place in range(len(lead) - 1):
            joint = lead[place] + lead[place + 1]
            if all(set(joint) <= h or not set(joint) & h for h in holders):
                lead[place : place + 2] = [joint]
                break
        else:
            raise Retry(f"more than {LEAD_AXES} leading axes")
    return lead


def _with_batch_of_one(made: Plan, lead: list[Dim], captured: list[Dims]) -> list[Dim]:
    """The leading dimensions, behind one of size one where readers then get the result rows first, without a copy.

    Not where a tensor of scores is captured: heads that share it are told by the first leading dimension.
    """
    site, space = made.site, made.site.space
    scores = any(_set(space.resolve_all(dims)) >= {*made.rows, *made.keys} for dims in captured)
    if not made.rows or scores or len(lead) >= LEAD_AXES:
        return lead
    longer: list[Dim] = [(), *lead]
    dims = space.resolve_all(site.out_dims)
    return longer if reads_rows_first(site.out, dims, longer, made.rows, space.resolve(site.values)) else lead


def _set(dims: Dims) -> set[Any]:
    return {a for dim in dims for a in dim}


# ----------------------------------------------------------------------------------------------------------- program
class _ProgramBuilder:
    """Writes expressions down as a score function."""

    def __init__(self, made: Plan) -> None:
        self.made = made
        self.site = made.site
        self.captured: list[tuple[fx.Node | EmptyRows, Dims]] = []
        self._builder = Builder()
        self._positions: dict[Expression, int] = {}
        self._mask = conjunction(self.site.algebra, self.site.logits.mask)

    def roots(self) -> list[Expression]:
        return [e for e in (self.site.logits.value, self._mask, self.site.sink) if e is not None]

    def tensors(self) -> list[Dims]:
        """Dimensions of every captured tensor."""
        return [e.arguments[1] for e in parts(*self.roots()) if e.name == "tensor"]

    def build(self) -> ScoreFunction:
        score, mask, sink = (
            None if e is None else self._emit(e) for e in (self.site.logits.value, self._mask, self.site.sink)
        )
        assert score is not None
        if self.site.sink is not None and set(self.site.sink.atoms) & set(self.made.keys):
            raise Refusal("the sink differs from key to key")
        function = ScoreFunction(self._builder.program, score, mask, sink, self.site.empty_rows).pruned()
        return function

    def _emit(self, e: Expression) -> int:
        if e not in self._positions:
            self._positions[e] = self._write(e)
        return self._positions[e]

    def _write(self, e: Expression) -> int:
        emit = self._builder.emit
        if e.name == "score":
            return emit("score")
        if e.name == "const":
            return emit("const", self._held(e.value))
        if e.name == "axis":
            return self._axis(e.arguments[0])
        if e.name == "size":
            return self._size(e.arguments[0])
        if e.name == "tensor":
            return emit("captured", self._capture(e.arguments[0], self.site.space.resolve_all(e.arguments[1])))
        if e.name == "scalar":
            return emit("captured", self._capture(e.arguments[0], ()))
        if e.name == "empty_row":
            return emit("captured", self._capture(self._empty_rows(e.arguments[0]), ()))
        return emit(e.name, *(self._emit(a) for a in e.arguments))

    def _held(self, value: Any) -> Any:
        """A number as a function may hold it that is evaluated in float32: fills of float64 scores stay finite."""
        if not isinstance(value, float) or self.made.dtype == torch.float64 or not abs(value) > _LARGEST:
            return value
        is_finite = self.site.logits_dtype == torch.float64 and math.isfinite(value)
        return math.copysign(_LARGEST if is_finite else math.inf, value)

    def _empty_rows(self, mask: Expression) -> EmptyRows:
        apart = _ProgramBuilder(self.made)
        place = apart._emit(mask)
        captured = tuple((node, dims) for node, dims in apart.captured if isinstance(node, fx.Node))
        return EmptyRows(ScoreFunction(apart._builder.program, place), captured)

    def _capture(self, node: fx.Node | EmptyRows, dims: Dims) -> int:
        if (node, dims) not in self.captured:
            self.captured.append((node, dims))
        return self.captured.index((node, dims))

    def _axis(self, atom: Any) -> int:
        """An axis index from row, key and leading indices."""
        emit, space = self._builder.emit, self.site.space
        fine = space.resolve((atom,))
        for dim, leaf in ((self.made.rows, ("q_index",)), (self.made.keys, ("k_index",))):
            if fine == dim:
                return emit(*leaf)
        result: int | None = None
        for place, part in enumerate(fine):
            stride = product(fine[place + 1 :])
            index = self._fine_axis(part)
            term = index if known_equal(stride, 1) else emit("mul", index, self._size(stride))
            result = term if result is None else emit("add", result, term)
        assert result is not None
        return result

    def _fine_axis(self, atom: Any) -> int:
        emit = self._builder.emit
        places: list[tuple[Instruction, Dim]] = [(("q_index",), self.made.rows), (("k_index",), self.made.keys)]
        places += [(("lead_index", d), dim) for d, dim in enumerate(self.made.lead)]
        for leaf, dim in places:
            if atom not in dim:
                continue
            index = emit(*leaf)
            place = dim.index(atom)
            stride = product(dim[place + 1 :])
            if not known_equal(stride, 1):
                index = emit("floordiv", index, self._size(stride))
            return index if place == 0 else emit("mod", index, self._size(atom.size))
        raise Refusal("an index over an axis that is not part of the attention")

    def _size(self, value: Any) -> int:
        """A size as a constant, or from the numbers of rows and keys."""
        emit = self._builder.emit
        if not isinstance(value, SymInt):
            return emit("const", int(value))
        q, k = product(self.made.rows), product(self.made.keys)
        forms = ((q, ("q_length",), None), (k, ("k_length",), None), (k - q, ("k_length",), ("q_length",)))
        for base, leaf, minus in (*forms, (q - k, ("q_length",), ("k_length",))):
            rest = _as_int(value - base)
            if rest is None:
                continue
            position = emit(*leaf)
            if minus is not None:
                position = emit("sub", position, emit(*minus))
            return position if rest == 0 else emit("add", position, emit("const", rest))
        raise Retry("a size that is known only at run time takes part in the scores")


def _as_int(value: Any) -> int | None:
    if isinstance(value, SymInt):
        return value.node.maybe_as_int()
    return int(value)
