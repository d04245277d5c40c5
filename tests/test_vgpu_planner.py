"""The planner: safe on every input, optimal on small ones, the same on every run, and clear when it refuses."""

import json
import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vgpu_reference import Machine, brute_force, link, llama_sweep, random_sweep

from vbcompile import vgpu_planner
from vbcompile.vgpu_check import check_plan
from vbcompile.vgpu_plan import Copy, Operator, PlanError, Sweep, Tier, Weight
from vbcompile.vgpu_planner import plan_weights, smallest_budget
from vbcompile.vgpu_simulator import timeline
from vbcompile.vgpu_size import size_text

GB = 10**9
RAM = Tier(2, "cpu", 10**15, 55 * GB, 55 * GB, 15_000)
PEER = Tier(1, "cuda:1", 40 * GB, 370 * GB, latency_ns=15_000)
SSD = Tier(3, "ssd", 10**15, 7 * GB, latency_ns=100_000, via=2)


def budget_between(sweep: Sweep, seed: int, tiers=None) -> int:
    """A budget from the smallest that works to just below the one for everything."""
    least = smallest_budget(sweep, tiers or [link()], alignment=1)
    most = sweep.reserve + sum(weight.nbytes for weight in sweep.weights)
    return least + int(random.Random(seed).random() * (most - least))


sweeps = st.builds(random_sweep, seed=st.integers(0, 10**6), count=st.integers(1, 14), twice=st.booleans())
tier_sets = st.sampled_from(
    [
        [link()],
        [link(latency_ns=300)],
        [link(level=1), link(3 * GB, level=2, capacity=3000)],
        [link(level=1, capacity=40_000), link(GB // 5, level=2, via=1)],
        [link(4 * GB, level=1, capacity=2500), link(level=2, capacity=30_000), link(GB // 5, level=3, via=2)],
    ]
)


@settings(max_examples=60, deadline=None)
@given(sweep=sweeps, tiers=tier_sets, share=st.floats(0, 1.1), alignment=st.sampled_from([1, 256]))
def test_every_plan_is_safe_and_every_refusal_is_right(sweep, tiers, share, alignment):
    total = sum(weight.nbytes for weight in sweep.weights) + sweep.reserve
    budget = max(int(share * total), 1)
    try:
        plan = plan_weights(sweep, budget, tiers, alignment=alignment)
    except PlanError as error:
        assert error.budget == budget < error.minimum_budget
        assert plan_weights(sweep, error.minimum_budget, tiers, alignment=alignment).peak_bytes <= error.minimum_budget
        return
    check_plan(plan)
    assert plan.peak_bytes <= budget
    assert plan.prediction.step_ns >= plan.prediction.roofline_ns
    assert plan.prediction.step_ns == sweep.compute_ns + plan.prediction.stall_ns
    assert plan == plan_weights(sweep, budget, tiers, alignment=alignment)


@settings(max_examples=40, deadline=None)
@given(sweep=sweeps, tiers=tier_sets, seed=st.integers(0, 99))
def test_predicted_time_is_that_of_a_machine_of_queues(sweep, tiers, seed):
    plan = plan_weights(sweep, budget_between(sweep, seed, tiers), tiers, alignment=1)
    ends = Machine(plan, 8).run()
    assert plan.prediction.step_ns in (ends[7] - ends[6], -((ends[3] - ends[7]) // 4))


@pytest.mark.parametrize("twice", [False, True], ids=["sweep", "there and back"])
def test_small_sweeps_get_the_best_of_all_resident_sets(twice):
    for seed in range(25):
        sweep = random_sweep(seed, 3 + seed % 4, twice=twice)
        budget = budget_between(sweep, seed)
        plan = plan_weights(sweep, budget, [link()], alignment=1)
        assert plan.prediction.step_ns == brute_force(sweep, budget, link(), 1), seed


def test_diffusion_alone_is_close_to_the_best_of_all_sets(monkeypatch):
    """What large models get: the same instances, without the exhaustive search."""
    best, ratios = [], []
    for seed in range(25):
        sweep = random_sweep(seed, 5 + seed % 3)
        budget = budget_between(sweep, seed)
        best.append((sweep, budget, plan_weights(sweep, budget, [link()], alignment=1).prediction.step_ns))
    monkeypatch.setattr(vgpu_planner, "_EXHAUSTIVE", 0)
    for sweep, budget, step in best:
        ratios.append(plan_weights(sweep, budget, [link()], alignment=1).prediction.step_ns / step)
    assert min(ratios) >= 1.0
    assert max(ratios) < 1.1 and sum(ratios) / len(ratios) < 1.01


@pytest.mark.parametrize(
    ("tokens", "bits", "budget", "at_least"),
    [(1, 16, 20, 0.985), (1, 4.5, 20, 0.975), (8192, 16, 20, 0.98), (2048, 4.5, 20, 0.995)],
)
def test_share_of_the_roofline_for_seventy_billion_weights(tokens, bits, budget, at_least):
    plan = plan_weights(llama_sweep("70B", bits, tokens), budget * GB, [RAM])
    check_plan(plan)
    assert plan.prediction.efficiency >= at_least
    assert plan.peak_bytes <= budget * GB


@pytest.mark.parametrize(
    ("tiers", "at_least"),
    [
        ([PEER, RAM], 0.97),
        ([replace(RAM, capacity=64 * GB), SSD], 0.96),
        ([PEER, replace(RAM, capacity=32 * GB), SSD], 0.95),
    ],
    ids=["neighbour and host", "host and disk", "all three"],
)
def test_tiers_share_the_work_and_none_idles(tiers, at_least):
    plan = plan_weights(llama_sweep("70B", 16, 1), 20 * GB, tiers)
    check_plan(plan)
    assert plan.prediction.efficiency >= at_least
    order = [copy.level for copy in plan.copies]
    for level in {tier.level for tier in tiers}:  # each level serves each fifth of the step
        for part in range(5):
            assert level in order[part * len(order) // 5 : (part + 1) * len(order) // 5]


def test_training_streams_in_both_passes_and_holds_the_turn():
    sweep = llama_sweep("8B", 16, 4096, training=True)
    plan = plan_weights(sweep, 6 * GB, [RAM])
    check_plan(plan)
    streamed = sum(1 for level in plan.levels if level)
    assert streamed < len(plan.copies) < 2 * streamed
    assert any(c.last_use - c.first_use > 0 for c in plan.copies)


def test_a_model_that_fits_is_declined():
    sweep = llama_sweep("8B", 16, 1)
    plan = plan_weights(sweep, 20 * GB, [RAM])
    check_plan(plan)
    assert plan.declined and not plan.copies and plan.ring_bytes == 0
    assert plan.prediction.step_ns == sweep.compute_ns and plan.prediction.bottleneck == "compute"
    assert "nothing is streamed" in plan.summary()


def test_pinned_and_tiny_weights_stay():
    weights = [Weight(f"w{i}", 1_000_000) for i in range(12)] + [Weight("state", 900_000, pinned=True)]
    weights += [Weight(f"bias{i}", 100) for i in range(12)]
    operators = [Operator(f"o{i}", 1000, (i, 13 + i)) for i in range(12)] + [Operator("update", 1000, (12,))]
    plan = plan_weights(Sweep(tuple(weights), tuple(operators)), 6_000_000, [RAM])
    check_plan(plan)
    assert plan.levels[12] == 0 and not any(plan.levels[13:])
    assert any(plan.levels[:12])


def test_a_weight_that_nothing_reads_takes_no_room_on_the_device():
    weights = (Weight("a", 100), Weight("unused", 100_000), Weight("b", 100))
    plan = plan_weights(Sweep(weights, (Operator("x", 9, (0,)), Operator("y", 9, (2,)))), 1000, [link()], alignment=1)
    check_plan(plan)
    assert plan.levels[1] == 1 and all(copy.weight != 1 for copy in plan.copies)


def test_a_tied_weight_is_kept_first():
    weights = tuple(Weight(f"w{i}", 1000) for i in range(12))
    tied = Operator("head", 500, (0,))
    operators = (*(Operator(f"o{i}", 500, (i,)) for i in range(12)), Operator("again", 500, (1,)), tied)
    plan = plan_weights(Sweep(weights, operators), 6000, [link()], alignment=1)
    check_plan(plan)
    assert plan.levels[0] == 0


# How a runtime drives it


def test_the_program_waits_before_every_use_and_overwrites_nothing_in_use():
    """Play three steps as a runtime would, with addresses; transfers happen at once, which is the worst order."""
    for seed in range(20):
        sweep = random_sweep(seed, 6, twice=seed % 2 == 0)
        tiers = [link(level=1, capacity=10**6), link(GB // 5, level=2, via=1)]
        plan = plan_weights(sweep, budget_between(sweep, seed, tiers), tiers, alignment=1)
        arena: dict[int, int] = {}
        running: set[int] = set()
        waited: set[int] = set()
        runtime_prefetch(plan, plan.prologue, arena, running)
        for _ in range(3):
            for action, target in plan.program():
                if action == "prefetch":
                    runtime_prefetch(plan, [target], arena, running)
                elif action == "wait":
                    waited.add(target)
                    running.add(target)
                elif action == "release":
                    running.remove(target)
                    waited.remove(target)
                else:
                    for weight in sweep.operators[target].weights:
                        assert plan.levels[weight] == 0 or holds(plan, weight, waited, arena)


def runtime_prefetch(plan, copies, arena, running):
    for index in copies:
        copy: Copy = plan.copies[index]
        for byte in range(copy.offset, copy.offset + copy.nbytes):
            assert arena.get(byte) not in running, "a slot in use was overwritten"
            arena[byte] = index


def holds(plan, weight, waited, arena) -> bool:
    for index in waited:
        copy = plan.copies[index]
        if copy.weight == weight:
            return all(arena[byte] == index for byte in range(copy.offset, copy.offset + copy.nbytes))
    return False


def test_a_plan_is_plain_data():
    plan = plan_weights(random_sweep(3, 6), 7000, [link(), link(GB // 5, level=2, via=1)], alignment=1)
    data = json.loads(plan.to_json())
    assert data["peak_bytes"] == plan.peak_bytes and len(data["copies"]) == len(plan.copies)
    assert data["bytes_per_level"]["1"] == plan.bytes_per_level[1]


def test_a_timeline_shows_every_lane_of_one_step():
    plan = plan_weights(llama_sweep("8B", 16, 1), 6 * GB, [replace(RAM, capacity=6 * GB), SSD])
    events = timeline(plan)
    assert {event.lane for event in events} == {"compute", "cpu", "ssd"}
    compute = [event for event in events if event.lane == "compute"]
    assert len(compute) == len(plan.sweep.operators) and compute[-1].end_ns == plan.prediction.step_ns
    for lane in ("compute", "cpu", "ssd"):
        one = [event for event in events if event.lane == lane]
        assert all(a.end_ns <= b.start_ns for a, b in pairwise(one))


def test_the_check_finds_what_is_wrong():
    plan = plan_weights(random_sweep(5, 7), 4500, [link()], alignment=1)
    check_plan(plan)
    first, second, *rest = plan.copies
    broken = [
        replace(plan, budget=plan.peak_bytes - 1),
        replace(plan, tiers=(link(capacity=10),)),
        replace(plan, copies=plan.copies[1:]),
        replace(plan, copies=(first, replace(second, free_after=-len(plan.sweep.operators)), *rest)),
        replace(plan, copies=(replace(first, free_after=first.first_use), second, *rest)),
        replace(plan, copies=(replace(first, offset=plan.ring_bytes), second, *rest)),
        replace(plan, copies=(second, first, *rest)),
    ]
    for number, wrong in enumerate(broken):
        with pytest.raises(AssertionError):
            check_plan(wrong)
            pytest.fail(f"broken plan {number} passed")


# Bad input


def test_too_small_a_budget_is_refused_with_the_one_that_works():
    sweep = llama_sweep("8B", 16, 1)
    with pytest.raises(PlanError) as caught:
        plan_weights(sweep, GB // 10, [RAM])
    error = caught.value
    assert error.largest_operator == "lm_head" and error.ring == error.largest_operator_bytes == 1_050_673_152
    assert error.minimum_budget == 1_050_673_152
    for fact in ("95.37 MiB", "1050673152 bytes (1002.00 MiB)", "lm_head", "smallest budget that works", "ring"):
        assert fact in str(error)
    check_plan(plan_weights(sweep, error.minimum_budget, [RAM]))
    with pytest.raises(PlanError):
        plan_weights(sweep, error.minimum_budget - 1, [RAM])


def test_tiers_without_room_are_refused_with_the_budget_that_works():
    sweep = random_sweep(7, 12)
    tiers = [link(capacity=3000)]
    least = smallest_budget(sweep, tiers, alignment=1)
    with pytest.raises(PlanError) as caught:
        plan_weights(sweep, least - 1500, tiers, alignment=1)
    assert caught.value.minimum_budget == least and "cpu 2.93 KiB" in str(caught.value)
    check_plan(plan_weights(sweep, least, tiers, alignment=1))
    with pytest.raises(PlanError, match="none"):
        plan_weights(sweep, sum(w.nbytes for w in sweep.weights) // 2, [])


def test_a_reserve_counts_against_the_budget():
    sweep = random_sweep(1, 6)
    larger = replace(sweep, reserve=sweep.reserve + 700)
    assert smallest_budget(larger, [link()]) == smallest_budget(sweep, [link()]) + 700
    with pytest.raises(PlanError, match=re.escape(size_text(larger.reserve))):
        plan_weights(larger, larger.reserve, [link()])


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "6GiB", None])
def test_a_budget_is_a_positive_integer(budget):
    with pytest.raises(ValueError, match="budget"):
        plan_weights(random_sweep(0, 3), budget, [link()])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Weight("w", -1), "size of weight 'w'"),
        (lambda: Weight("w", 1.0), "size of weight 'w'"),
        (lambda: Operator("o", -5), "duration of operator 'o'"),
        (lambda: Sweep((Weight("a", 1), Weight("a", 2)), ()), "same name"),
        (lambda: Sweep((Weight("a", 1),), (Operator("o", 1, (1,)),)), "'o' reads weights"),
        (lambda: Tier(1, "cpu", 10, 0), "read rate of level 1"),
        (lambda: Tier(0, "cuda:0", 10, 5), "level 0"),
        (lambda: Tier(1, "cpu", -1, 5), "capacity of level 1"),
        (lambda: plan_weights(random_sweep(0, 2), 9, [link(), link()]), "same level number"),
        (lambda: plan_weights(random_sweep(0, 2), 9, [link(level=2, via=1)]), "leads nowhere"),
    ],
)
def test_nonsense_is_refused(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_edges():
    assert plan_weights(Sweep((), ()), 1, []).declined
    assert plan_weights(Sweep((Weight("empty", 0),), (Operator("o", 1, (0,)),)), 1, []).declined
    alone = Sweep((Weight("a", 10), Weight("b", 10)), (Operator("both", 5, (0, 1, 0)),))
    with pytest.raises(PlanError) as caught:
        plan_weights(alone, 19, [link()], alignment=1)
    assert caught.value.minimum_budget == 20
