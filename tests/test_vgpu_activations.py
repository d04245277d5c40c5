"""Keep, recompute or offload: within the budget always, best on small steps, and clear when it cannot be done."""

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vgpu_reference import link

from vbcompile import vgpu_activations
from vbcompile.vgpu_activations import Activation, plan_activations
from vbcompile.vgpu_plan import Operator, PlanError, Tier

HOST = Tier(1, "cpu", 10**9, 10**9, 10**9)


def training_step(seed: int, layers: int) -> tuple[list[Operator], list[Activation]]:
    """A chain of layers and its backward; some activations cannot leave, some cannot be recomputed."""
    random_ = random.Random(seed)
    operators = [Operator(f"forward {i}", random_.randint(200, 2000)) for i in range(layers)]
    operators += [Operator(f"backward {i}", random_.randint(400, 4000)) for i in reversed(range(layers))]
    activations = []
    for i in range(layers):
        first_backward = 2 * layers - 1 - i
        last_forward = min(i + random_.randint(0, 1), layers - 1)
        recompute = random_.choice((None, 100, 500, 1500))
        last = first_backward + random_.randint(0, i)
        activations.append(
            Activation(
                f"a{i}",
                random_.choice((500, 1000, 2000)),
                i,
                last_forward,
                first_backward,
                last,
                recompute,
                random_.random() < 0.8,
            )
        )
    return operators, activations


def replayed(operators, activations, fates, tier) -> tuple[int, int]:
    """(peak, step time) by walking through the step, transfer by transfer, from the rules alone."""
    now = out = back = peak = 0
    left: dict[int, int] = {}
    arrived: dict[int, int] = {}
    pairs = list(enumerate(zip(activations, fates, strict=True)))
    for position, operator in enumerate(operators):
        for i, (_, fate) in pairs:
            if fate.choice == "offload" and fate.free_before == position:
                now = max(now, left[i])
        for i, (a, _) in sorted(
            (p for p in pairs if p[1][1].choice == "offload" and p[1][1].back_at == position),
            key=lambda p: p[1][0].first_backward,
        ):
            back = max(back, now) + tier.read_ns(a.nbytes)
            arrived[i] = back
        live, extra = 0, 0
        for i, (a, fate) in pairs:
            gone = fate.choice != "keep" and fate.free_before <= position < fate.back_at
            if a.produced <= position <= a.last_backward and not gone:
                live += a.nbytes
            if position == a.first_backward and fate.choice == "recompute":
                extra += a.recompute_ns
            if position == a.first_backward and fate.choice == "offload":
                now = max(now, arrived[i])
        peak = max(peak, live)
        now += operator.nanoseconds + extra
        for i, (a, fate) in pairs:
            if a.produced == position and fate.choice == "offload":
                out = left[i] = max(out, now) + tier.write_ns(a.nbytes)
    return peak, now


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 14), share=st.floats(0, 1.1), rate=st.integers(1, 8))
def test_the_peak_keeps_within_the_budget(seed, layers, share, rate):
    operators, activations = training_step(seed, layers)
    tier = link(rate * 10**8)
    budget = int(share * sum(a.nbytes for a in activations))
    try:
        plan = plan_activations(operators, activations, budget, tier)
    except PlanError as error:
        assert error.minimum_budget > budget and str(error.minimum_budget) in str(error)
        plan = plan_activations(operators, activations, error.minimum_budget, tier)
    assert plan.peak_bytes <= plan.budget
    assert replayed(operators, activations, plan.fates, tier) == (plan.peak_bytes, plan.step_ns)
    assert plan.step_ns >= plan.kept_step_ns
    assert plan == plan_activations(operators, activations, plan.budget, tier)
    for activation, fate in zip(activations, plan.fates, strict=True):
        if fate.choice != "keep":
            assert activation.last_forward < fate.free_before and fate.back_at <= activation.first_backward
        assert fate.choice != "offload" or activation.can_offload
        assert fate.choice != "recompute" or activation.recompute_ns is not None


def test_small_steps_get_the_best_of_all_choices():
    """Against an enumeration of every choice with every pair of positions, replayed from the rules."""
    compared = 0
    for seed in range(60):
        operators, activations = training_step(seed, 3)
        budget = int(0.8 * sum(a.nbytes for a in activations))
        best = cheapest_of_all(operators, activations, budget, HOST)
        if best is None:
            with pytest.raises(PlanError):
                plan_activations(operators, activations, budget, HOST)
            continue
        compared += 1
        assert plan_activations(operators, activations, budget, HOST).step_ns == best, seed
    assert compared >= 20


def cheapest_of_all(operators, activations, budget, tier) -> int | None:
    fate = vgpu_activations.Fate
    options = []
    for a in activations:
        mine = [fate("keep", a.last_backward + 1, a.last_backward + 1)]
        if a.recompute_ns is not None:
            mine.append(fate("recompute", a.last_forward + 1, a.first_backward))
        if a.can_offload:
            spans = product(range(a.last_forward + 1, a.first_backward + 1), repeat=2)
            mine += [fate("offload", leave, back) for leave, back in spans if leave < back]
        options.append(mine)
    replays = (replayed(operators, activations, fates, tier) for fates in product(*options))
    return min((step for peak, step in replays if peak <= budget), default=None)


def test_prices_alone_are_close_to_the_best(monkeypatch):
    instances = []
    for seed in range(40):
        operators, activations = training_step(seed, 5)
        budget = int(0.8 * sum(a.nbytes for a in activations))
        try:
            instances.append((operators, activations, budget, plan_activations(operators, activations, budget, HOST)))
        except PlanError:
            continue
    assert len(instances) > 20
    monkeypatch.setattr(vgpu_activations, "_EXHAUSTIVE", 0)
    ratios = [plan_activations(o, a, b, HOST).step_ns / best.step_ns for o, a, b, best in instances]
    assert min(ratios) >= 1.0 and max(ratios) < 1.15 and sum(ratios) / len(ratios) < 1.01


def test_all_are_kept_where_they_fit():
    operators, activations = training_step(0, 8)
    plan = plan_activations(operators, activations, sum(a.nbytes for a in activations), HOST)
    assert plan.declined and plan.step_ns == plan.kept_step_ns and not plan.chosen("offload")


def test_a_wide_link_hides_the_offload_and_a_narrow_one_leaves_it_to_recomputation():
    layers = 16
    operators = [Operator(f"o{i}", 1000) for i in range(2 * layers)]
    activations = [
        Activation(f"a{i}", 1000, i, i, 2 * layers - 1 - i, 2 * layers - 1 - i, recompute_ns=300) for i in range(layers)
    ]
    fast = plan_activations(operators, activations, 9000, link(4 * 10**9))
    assert fast.step_ns == fast.kept_step_ns and len(fast.chosen("offload")) >= 7
    slow = plan_activations(operators, activations, 9000, link(10**8))
    assert len(slow.chosen("recompute")) >= 6 and slow.step_ns <= slow.kept_step_ns + 8 * 300


def test_the_price_of_an_offload_counts_those_that_it_delays(monkeypatch):
    """A link with time for ten of forty: the rest has to be recomputed although each alone would fit in its window."""
    monkeypatch.setattr(vgpu_activations, "_TRIES", 0)
    layers = 40
    operators = [Operator(f"o{i}", 1000) for i in range(2 * layers)]
    activations = [
        Activation(f"a{i}", 4000, i, i, 2 * layers - 1 - i, 2 * layers - 1 - i, recompute_ns=400) for i in range(layers)
    ]
    plan = plan_activations(operators, activations, 4000 * 12, link())
    assert plan.step_ns <= plan.kept_step_ns + 400 * layers
    assert 4 <= len(plan.chosen("offload")) <= 11


def test_the_host_holds_no_more_than_it_has():
    operators, activations = training_step(4, 12)
    activations = [replace(a, recompute_ns=400, can_offload=True) for a in activations]
    budget = sum(a.nbytes for a in activations) // 2
    plan = plan_activations(operators, activations, budget, replace(HOST, capacity=2500))
    assert plan.host_bytes <= 2500 and plan.peak_bytes <= budget
    stuck = [replace(a, recompute_ns=None) for a in activations]
    with pytest.raises(PlanError, match=r"cpu has 2\.44 KiB") as caught:
        plan_activations(operators, stuck, budget, replace(HOST, capacity=2500))
    assert plan_activations(operators, stuck, caught.value.minimum_budget, replace(HOST, capacity=2500)).declined


def test_bad_input_is_refused():
    operators, activations = training_step(0, 3)
    with pytest.raises(ValueError, match="budget"):
        plan_activations(operators, activations, -1, HOST)
    with pytest.raises(ValueError, match="there are 2"):
        plan_activations(operators[:2], activations, 10, HOST)
    with pytest.raises(ValueError, match="positions"):
        Activation("a", 1, 3, 2, 4, 5)
    with pytest.raises(ValueError, match="negative"):
        Activation("a", -1, 1, 2, 4, 5)
    with pytest.raises(PlanError, match="largest operator") as caught:
        plan_activations(operators, activations, 0, HOST)
    assert caught.value.largest_operator and caught.value.budget == 0
