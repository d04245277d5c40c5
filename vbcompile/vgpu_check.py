"""Proof that a plan is safe, written without the planner's own reasoning: each condition is checked as stated."""

from vbcompile.vgpu_plan import DEVICE, Plan, padded, staged


def check_plan(plan: Plan) -> None:
    """Prove that the plan is safe to run.

    The peak keeps within the budget; the bytes of each level within its capacity; each use of a streamed weight is
    covered by a copy that was waited for; no two weights overlap in the ring while both are in use; no copy waits for
    an operator that itself waits for that copy.

    Raises:
        AssertionError: one of these does not hold, which is a defect of the planner.
    """
    _require(plan.peak_bytes <= plan.budget, f"peak {plan.peak_bytes} is over the budget {plan.budget}")
    _check_capacities(plan)
    _check_copies(plan)
    _check_cover(plan)
    _check_ring(plan)
    _check_staging(plan)


def _check_capacities(plan: Plan) -> None:
    used = {level: nbytes for level, nbytes in plan.bytes_per_level.items() if level != DEVICE}
    for via in {plan.tier(read.level).via for read in plan.reads}:
        if via is None:
            raise AssertionError("a disk read leads nowhere")
        used[via] = used.get(via, 0) + plan.staging_bytes
    for level, nbytes in used.items():
        _require(nbytes <= plan.tier(level).capacity, f"level {level} holds {nbytes} bytes, more than its capacity")


def _check_copies(plan: Plan) -> None:
    count = len(plan.sweep.operators)
    for index, copy in enumerate(plan.copies):
        weight = plan.sweep.weights[copy.weight]
        tier = plan.tier(copy.level)
        _require(copy.level == plan.levels[copy.weight], f"copy {index} does not come from where the weight lives")
        _require(copy.nbytes == weight.nbytes, f"copy {index} has not the size of its weight")
        _require(copy.link == (copy.level if tier.via is None else tier.via), f"copy {index} is on the wrong link")
        _require((copy.read is None) == (tier.via is None), f"copy {index} has no matching read")
        _require(copy.offset >= 0 and copy.offset + weight.nbytes <= plan.ring_bytes, f"copy {index} leaves the ring")
        _require(-count <= copy.free_after < copy.first_use <= copy.last_use < count, f"copy {index} waits for itself")
    firsts = [copy.first_use for copy in plan.copies]
    _require(firsts == sorted(firsts), "copies are not in order of use")


def _check_cover(plan: Plan) -> None:
    """Each operator finds each of its weights: resident, or copied, waited for and not yet released."""
    stays: dict[int, list[tuple[int, int]]] = {}
    for copy in plan.copies:
        stays.setdefault(copy.weight, []).append((copy.first_use, copy.last_use))
    for index, operator in enumerate(plan.sweep.operators):
        for weight in operator.weights:
            here = plan.levels[weight] == DEVICE or any(a <= index <= b for a, b in stays.get(weight, ()))
            _require(here, f"operator {operator.name!r} reads {plan.sweep.weights[weight].name!r}, which is not there")


def _check_ring(plan: Plan) -> None:
    """Whatever was in a slot's bytes, in this step or the one before, has been used when the copy begins."""
    count = len(plan.sweep.operators)
    spans = [(c.offset, c.offset + padded(c.nbytes, plan.alignment)) for c in plan.copies]
    for later, copy in enumerate(plan.copies):
        for earlier, other in enumerate(plan.copies):
            if spans[earlier][0] >= spans[later][1] or spans[later][0] >= spans[earlier][1]:
                continue
            last_use = other.last_use if earlier < later else other.last_use - count
            _require(last_use <= copy.free_after, f"copy {later} overwrites copy {earlier} while it is in use")


def _check_staging(plan: Plan) -> None:
    links = [(index, copy) for index, copy in enumerate(plan.copies) if copy.read is not None]
    _require([copy.read for _, copy in links] == list(range(len(plan.reads))), "reads and copies do not match")
    spans = [(r.offset, r.offset + staged(r.nbytes)) for r in plan.reads]
    for later, read in enumerate(plan.reads):
        copy = plan.copies[read.copy]
        _require(copy.read == later and copy.nbytes == read.nbytes, f"read {later} is not that of its copy")
        _require(spans[later][1] <= plan.staging_bytes, f"read {later} leaves the staging memory")
        _require(read.free_after < read.copy, f"read {later} waits for itself")
        for earlier, other in enumerate(plan.reads):
            if spans[earlier][0] >= spans[later][1] or spans[later][0] >= spans[earlier][1]:
                continue
            taken = other.copy if earlier < later else other.copy - len(plan.copies)
            _require(taken <= read.free_after, f"read {later} overwrites read {earlier} before it was taken on")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
