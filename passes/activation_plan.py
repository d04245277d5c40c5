"""From a joint graph to the planner's terms and back: which saved tensor is kept, recomputed or offloaded, and when."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch.fx as fx

from vbcompile import compat
from vbcompile.compat_symbols import bytes_hint, count_hint, size_hint
from vbcompile.passes.activation_fusion import FusedKernels
from vbcompile.passes.activation_graph import JointGraph, node_bytes, tensors_of
from vbcompile.vgpu_activations import Activation, ActivationPlan, plan_activations
from vbcompile.vgpu_plan import Operator, PlanError, Tier, padded

log = logging.getLogger(__name__)

_DEEPEST = 2  # costly operators that are run again one behind the other
_SMALLEST_SHARE = 1000  # a tensor below this part of all that is saved is not worth a decision
_SMALLEST_MOVED = 2**20  # bytes; a smaller copy is mostly latency
_TRIES = 8  # halvings on the way to the smallest budget in the time that is allowed
_FINE = 50  # which is good enough within this part of it
_SEGMENT = 2**21  # PyTorch's allocators take memory in such steps for what is larger than half of one
_GRAIN = 512  # and hand out what is smaller in these


@dataclass(frozen=True)
class Rates:
    """Speeds of a device, in bytes per second; ``matmul`` in floating-point operations per second.

    Attributes:
        away: From the device to host memory.
        back: From host memory to the device.
        host_bytes: Host memory that activations may take.
        workspace: Bytes of the device that vendors' libraries take.
    """

    matmul: int
    memory: int
    away: int
    back: int
    host_bytes: int
    workspace: int = 0

    @property
    def tier(self) -> Tier:
        """Host memory as the planner sees it."""
        return Tier(1, "cpu", self.host_bytes, self.back, self.away, latency_ns=20_000)


@dataclass(frozen=True)
class Limits:
    """What the plan has to keep.

    Attributes:
        budget: Bytes of device memory for everything that is alive in the step; None: as little as ``slowdown`` allows.
        slowdown: Share of the step's time that less memory may cost.
        recompute: Whether costly operators may run again.
        offload: Whether tensors may leave the device.
    """

    budget: int | None = None
    slowdown: float = 0.10
    recompute: bool = True
    offload: bool = True


class StepPlanner:
    """Plans one joint graph.

    Args:
        joint: The graph.
        rates: Speeds of the device that runs it.
        limits: What to keep to.
    """

    def __init__(self, joint: JointGraph, rates: Rates, limits: Limits) -> None:
        self.joint, self.rates, self.limits = joint, rates, limits
        self.saved = list(joint.smallest_cut())

    @cached_property
    def _timeline(self) -> tuple[dict[fx.Node, int], list[fx.Node], list[int]]:
        """Operator index of each node, first node of each operator, and nanoseconds of each operator."""
        index: dict[fx.Node, int] = {}
        leaders: list[fx.Node] = []
        times: list[int] = []
        order = [*self.joint.forward, *(n for n in self.joint.graph.nodes if self._is_later(n))]
        for node in order:
            costly = not self._is_light(node)
            if costly or not leaders or (node not in self.joint.forward and leaders[-1] in self.joint.forward):
                leaders.append(node)
                times.append(0)
            index[node] = len(leaders) - 1
            times[-1] += self.nanoseconds(node)
        return index, leaders, times

    def _is_later(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node not in self.joint.forward

    def _is_light(self, node: fx.Node) -> bool:
        return self.joint.kinds.is_view(node) or self.joint.kinds.is_cheap(node)

    def nanoseconds(self, node: fx.Node) -> int:
        """Estimated time of one operator; pointwise ones are fused, so that each of them writes at most."""
        if self.joint.kinds.is_view(node):
            return 0
        written = node_bytes(node)
        if self._is_light(node):
            return written * 10**9 // (2 * self.rates.memory)
        moved = written + sum(map(node_bytes, node.all_input_nodes))
        return max(operations(node) * 10**9 // self.rates.matmul, moved * 10**9 // self.rates.memory)

    @cached_property
    def first_backward(self) -> int:
        """Index of the first operator of the backward."""
        leaders = self._timeline[1]
        return next((i for i, node in enumerate(leaders) if node not in self.joint.forward), len(leaders))

    def leader(self, operator: int) -> fx.Node | None:
        """First node of an operator; None behind the last."""
        leaders = self._timeline[1]
        return leaders[operator] if operator < len(leaders) else None

    @cached_property
    def recomputable(self) -> dict[fx.Node, int]:
        """Saved tensors that costly operators could make again, with the time it takes.

        Each may need others of them; every few operators one tensor stays, so that no chain grows long.
        """
        depth: dict[fx.Node, int] = {}
        found: dict[fx.Node, int] = {}
        for node in self.saved:
            work = self.joint.made_from(node, self.saved)
            allowed = all(self.joint.is_cheap(n) or self.joint.is_costly(n) for n in work)
            sources = {s for n in work for s in n.all_input_nodes if s in depth}
            level = 1 + max((depth[s] for s in sources), default=0)
            if allowed and level <= _DEEPEST and not self.joint.kinds.is_saved_by_user(node):
                depth[node] = level
                found[node] = sum(map(self.nanoseconds, work))
            else:
                depth[node] = 0
        return found

    @cached_property
    def _kernels(self) -> FusedKernels:
        index, leaders, _ = self._timeline
        last = len(leaders) - 1
        return FusedKernels(self.joint, index, self._is_light, set(self.saved), min(self.first_backward, last))

    @cached_property
    def _needs(self) -> dict[fx.Node, tuple[int, int]]:
        """First and last operator of the backward that may ask for each forward value, also to make others from it."""
        index = self._timeline[0]
        kept = set(self.saved) - (set(self.recomputable) if self.limits.recompute else set())
        needs: dict[fx.Node, tuple[int, int]] = {}
        last = len(self._timeline[1]) - 1
        for node in reversed(self.joint.forward):
            users = [u for u in node.users if u in index and u not in self.joint.forward]
            spans = [(index[u], self._kernels.end(u)) for u in users]
            spans += [needs[u] for u in node.users if u in self.joint.forward and u not in kept and u in needs]
            spans += [(last, last)] if node in self.joint.gradients else []
            if spans:
                needs[node] = min(s[0] for s in spans), max(s[1] for s in spans)
        return needs

    @cached_property
    def planned(self) -> list[fx.Node]:
        """Saved tensors that are large enough to think about."""
        total = sum(map(node_bytes, self.saved))
        return [n for n in self.saved if n in self._needs and node_bytes(n) * _SMALLEST_SHARE >= total]

    def _activation(self, node: fx.Node, late: set[fx.Node], gone_by: int | None) -> Activation:
        index, limits = self._timeline[0], self.limits
        first, last = self._needs[node]
        reads = [index[u] for u in self._all_readers(node) if u in self.joint.forward]
        again = self.recomputable.get(node) if limits.recompute and node not in self.joint.results else None
        moved = limits.offload and node not in self.joint.results and node not in late
        return Activation(
            node.name,
            held_bytes(node),
            index[node],
            max([index[node], *reads]),
            first,
            last,
            recompute_ns=again,
            can_offload=moved and node_bytes(node) >= _SMALLEST_MOVED,
            gone_by=gone_by,
        )

    @cached_property
    def _reserved(self) -> list[int]:
        """What else takes memory during each operator: gradients as they are made, and what passes between them."""
        change = [0] * (len(self._timeline[1]) + 1)
        for begin, end, nbytes in self._passing():
            change[begin] += nbytes
            change[end + 1] -= nbytes
        return list(accumulate(change[:-1]))

    def _passing(self) -> Iterator[tuple[int, int, int]]:
        """First and last operator, and bytes, of everything that is not planned; what is fused takes no memory."""
        index, leaders, _ = self._timeline
        planned, saved, last, kernels = set(self.planned), set(self.saved), len(leaders) - 1, self._kernels
        for node in index:
            if node in planned or self.joint.kinds.is_view(node) or not node_bytes(node):
                continue
            inside = node in self.joint.forward
            readers = self._all_readers(node)
            again = [u for u in readers if inside and u not in self.joint.forward and not self._is_light(u)]
            uses = [kernels.end(u) for u in readers if (u in self.joint.forward) == inside or node in saved]
            times = [(index[u], kernels.end(u)) for u in again] + self._made_for(readers)
            if times and node not in saved:  # made again there
                begin = kernels.begin(node, min(t[0] for t in times))
                yield begin, max(t[1] for t in times), held_bytes(node)
            if not self._is_fused(node, readers):
                end = last if node in self.joint.results else max(uses, default=index[node])
                begin = index[node] if inside else kernels.begin(node, index[node])
                yield begin, max(begin, end), held_bytes(node)
        for node, operator in index.items():
            if size := scratch_bytes(node):
                yield operator, operator, size
        for node in self.joint.backward:
            if node.op == "placeholder" and leaders:  # gradients of the results
                ends = [kernels.end(u) for u in self._all_readers(node)] if compat.frees_result_gradients() else []
                yield min(self.first_backward, last), max(ends, default=last), held_bytes(node)

    def _made_for(self, readers: list[fx.Node]) -> list[tuple[int, int]]:
        """When costly operators among these would run again, at the soonest."""
        again = self.recomputable if self.limits.recompute else {}
        return [(self._needs[u][0], self._needs[u][0]) for u in readers if u in again and u in self._needs]

    def _is_fused(self, node: fx.Node, readers: list[fx.Node]) -> bool:
        """Whether a pointwise operator's result goes straight into those that read it."""
        real = [u for u in readers if not self.joint.kinds.is_view(u)]
        return self._is_light(node) and bool(real) and all(map(self._is_light, real)) and node not in self.joint.results

    def _all_readers(self, node: fx.Node) -> list[fx.Node]:
        """Operators that read a node's memory, through views too."""
        found, stack = [], [node]
        while stack:
            for user in stack.pop().users:
                if user in self._timeline[0]:
                    found.append(user)
                    if self.joint.kinds.is_view(user):
                        stack.append(user)
        return found

    @cached_property
    def resident_bytes(self) -> int:
        """Parameters and other inputs."""
        inputs = self.joint.graph.find_nodes(op="placeholder")
        return sum(held_bytes(n) for n in inputs if n not in self.joint.backward)

    def plan(self) -> ActivationPlan:
        """The fates of :attr:`planned`, in their order.

        Raises:
            PlanError: the budget cannot be kept.
        """
        late: set[fx.Node] = set()
        while True:
            try:
                found = self._search([self._activation(n, late, None) for n in self.planned])
            except PlanError:
                if not late:
                    raise
                # a slow link: the end of the forward waits for what is on its way
                return self._search([self._activation(n, set(), self.first_backward) for n in self.planned])
            overdue = {
                n
                for n, fate in zip(self.planned, found.fates, strict=True)
                if fate.choice == "offload" and fate.free_before > self.first_backward
            }
            if not overdue:
                return found
            late |= overdue  # still on their way when the forward ends: the backward would have to hold the source

    def _search(self, activations: list[Activation]) -> ActivationPlan:
        operators = [Operator(n.name, t) for n, t in zip(self._timeline[1], self._timeline[2], strict=True)]
        tier, limits, resident = self.rates.tier, self.limits, self.resident_bytes + self.rates.workspace
        reserved = [resident + size for size in self._reserved]

        def solve(budget: int) -> ActivationPlan:
            return plan_activations(operators, activations, budget, tier, reserved=reserved)

        if limits.budget is not None:
            return solve(limits.budget)
        try:
            least = solve(0).peak_bytes
        except PlanError as error:
            least = error.minimum_budget or 0
        best = solve(2**62)
        allowed = best.kept_step_ns * (1 + limits.slowdown)
        low, high = least, best.kept_peak_bytes
        for _ in range(_TRIES):
            if high - low <= high // _FINE:
                break
            middle = (low + high) // 2
            found = solve(middle)
            if found.step_ns <= allowed:
                best, high = found, middle
            else:
                low = middle
        return best


def held_bytes(node: fx.Node) -> int:
    """Bytes that an allocator holds for a node's results: what is left of a block goes to others if it is worth it."""
    return sum(map(_block_bytes, map(bytes_hint, tensors_of(node))))


def _block_bytes(size: int) -> int:
    is_whole = 2 * size > _SEGMENT and 2 * (-size % _SEGMENT) <= _SEGMENT
    return padded(size, _SEGMENT if is_whole else _GRAIN)


def scratch_bytes(node: fx.Node) -> int:
    """Bytes that an operator takes while it runs: fused attention sums the gradients of queries in float32."""
    name = str(node.target)
    if "attention" not in name or "backward" not in name:
        return 0
    queries = next(tensors_of(node), None)  # their gradient
    return 0 if queries is None else 4 * count_hint(queries)


def operations(node: fx.Node) -> int:
    """Floating-point operations of a matrix product, convolution or attention; 0 for others."""
    name = str(node.target)
    sources = [next(tensors_of(s), None) for s in node.all_input_nodes]
    inputs = [s for s in sources if s is not None and s.dim() >= 2]
    result = next(tensors_of(node), None)
    if result is None or len(inputs) < 2:
        return 0
    size = count_hint(result)
    if "convolution" in name:
        weight = inputs[1]
        return 2 * size * count_hint(weight) // max(size_hint(weight.shape[0]), 1)
    if any(part in name for part in ("attention", "flash")):
        pairs = 4 if "backward" not in name else 10
        return pairs * size * size_hint(inputs[1].shape[-2])
    if any(part in name for part in ("mm", "linear")):
        return 2 * size * size_hint(inputs[-2].shape[-1])
    return 0
