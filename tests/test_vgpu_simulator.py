"""The policies that the plan is compared with, on the same clock."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vgpu_reference import link, llama_sweep, random_sweep

from vbcompile.vgpu_check import check_plan
from vbcompile.vgpu_plan import Operator, Sweep, Tier, Weight
from vbcompile.vgpu_planner import plan_weights
from vbcompile.vgpu_simulator import resident_prefix, simulate_lru, simulate_on_demand

GB = 10**9
RAM = Tier(1, "cpu", 10**15, 55 * GB, latency_ns=15_000)


def cyclic(count: int, compute: int = 100, nbytes: int = 1000) -> Sweep:
    return Sweep(
        tuple(Weight(f"w{i}", nbytes) for i in range(count)),
        tuple(Operator(f"o{i}", compute, (i,)) for i in range(count)),
    )


def test_lru_misses_every_use_of_a_cyclic_sweep():
    """Sleator and Tarjan 1985: a cache of C < n entries never hits on 0, 1, ..., n-1, 0, 1, ..."""
    sweep = cyclic(80)
    for cached in (1, 20, 79):
        outcome = simulate_lru(sweep, cached * 1000, link())
        assert (outcome.hits, outcome.misses) == (0, 80)
        assert outcome.streamed_bytes == 80_000
    assert simulate_lru(sweep, 80_000, link()).misses == 0


def test_a_fixed_set_and_a_ring_miss_what_does_not_fit():
    plan = plan_weights(cyclic(80), 20_000, [link()], alignment=1)
    assert len(plan.copies) == 80 - (20 - 2)


def test_lru_is_not_bad_there_and_back():
    """Training: forward and backward. Of 160 uses 40 are hits for LRU, as many as the best policy has."""
    weights = cyclic(80).weights
    order = [*range(80), *reversed(range(80))]
    sweep = Sweep(weights, tuple(Operator(f"o{n}", 100, (i,)) for n, i in enumerate(order)))
    assert simulate_lru(sweep, 20_000, link()).misses == 120
    plan = plan_weights(sweep, 20_000, [link()], alignment=1)
    check_plan(plan)
    assert len(plan.copies) <= 125


@settings(max_examples=40, deadline=None)
@given(count=st.integers(3, 40), cached=st.integers(2, 39), compute=st.integers(1, 3000), ahead=st.integers(0, 3))
def test_the_plan_beats_lru_on_cyclic_sweeps(count, cached, compute, ahead):
    """Also with prefetch: LRU copies everything in each step, the plan only what is not resident.

    A prefetching cache may use the place of any weight for any other, a plan has fixed places: where their number does
    not divide the number of copies, one copy per step waits for one operator.
    """
    sweep, budget = cyclic(count, compute), min(cached, count - 1) * 1000
    plan = plan_weights(sweep, budget, [link()], alignment=1)
    lru = simulate_lru(sweep, budget, link(), ahead)
    assert plan.streamed_bytes <= lru.streamed_bytes
    assert plan.prediction.step_ns <= lru.step_ns + (compute if ahead else 0)


@pytest.mark.parametrize(
    ("name", "bits", "budget", "faster"),
    [("8B", 16, 6, 1.6), ("8B", 4.5, 3, 2.4), ("70B", 16, 20, 1.15), ("70B", 4.5, 20, 1.9)],
)
def test_the_plan_beats_lru_in_decoding(name, bits, budget, faster):
    sweep = llama_sweep(name, bits, 1)
    plan = plan_weights(sweep, budget * GB, [RAM])
    lru = min(simulate_lru(sweep, budget * GB, RAM, ahead).step_ns for ahead in (0, 2))
    assert lru >= faster * plan.prediction.step_ns


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), count=st.integers(2, 10), ahead=st.integers(0, 4))
def test_lru_accounts_for_every_byte_and_nanosecond(seed, count, ahead):
    sweep = random_sweep(seed, count)
    total = sum(weight.nbytes for weight in sweep.weights)
    uses = sum(len(operator.weights) for operator in sweep.operators)
    outcome = simulate_lru(sweep, sweep.reserve + max(total // 2, 6000), link(), ahead)
    assert outcome.hits + outcome.misses == uses
    assert outcome.step_ns == sweep.compute_ns + outcome.stall_ns
    assert outcome.step_ns >= outcome.streamed_bytes or ahead


def test_on_demand_copies_what_is_not_resident_and_overlaps_nothing():
    sweep = cyclic(10)
    resident = resident_prefix(sweep, 4500)
    assert resident == frozenset(range(4))
    outcome = simulate_on_demand(sweep, resident, link())
    assert (outcome.streamed_bytes, outcome.misses, outcome.hits) == (6000, 6, 4)
    assert outcome.step_ns == 10 * 100 + 6 * 1000


def test_lru_refuses_an_operator_that_does_not_fit():
    sweep = replace(cyclic(3), operators=(Operator("all", 10, (0, 1, 2)),))
    with pytest.raises(ValueError, match="do not fit in 2999 bytes"):
        simulate_lru(sweep, 2999, link())
    assert simulate_lru(sweep, 3000, link()).misses == 0
