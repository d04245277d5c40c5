"""Slots of the ring, on cases small enough to draw."""

from vbcompile.vgpu_plan import Operator, Sweep, Weight
from vbcompile.vgpu_slots import Place, Stay, place, stays


def test_two_slots_alternate_and_wait_for_the_last_but_one():
    entries = [Stay(i, 10, i, i) for i in range(4)]
    assert place(entries, 20, 4) == [Place(0, -2), Place(10, -1), Place(0, 0), Place(10, 1)]


def test_a_third_slot_lets_copies_run_further_ahead():
    entries = [Stay(i, 10, i, i) for i in range(6)]
    assert [slot.free_after for slot in place(entries, 30, 6)] == [-3, -2, -1, 0, 1, 2]


def test_one_slot_is_enough_and_too_little_is_not():
    entries = [Stay(i, 10, i, i) for i in range(3)]
    assert place(entries, 10, 3) == [Place(0, -1), Place(0, 0), Place(0, 1)]
    assert place(entries, 9, 3) is None
    assert place([], 0, 3) == []


def test_the_weights_of_one_operator_lie_side_by_side():
    entries = [Stay(0, 6, 0, 0), Stay(1, 3, 1, 1), Stay(2, 3, 1, 1), Stay(3, 4, 2, 2)]
    assert [slot.offset for slot in place(entries, 10, 3)] == [0, 0, 3, 6]


def test_a_slot_is_not_given_away_at_the_operator_that_still_reads_it():
    """Weight 0 is held through operator 1, for which weight 1 arrives: both must be there."""
    entries = [Stay(0, 10, 0, 1), Stay(1, 10, 1, 1)]
    assert place(entries, 19, 2) is None
    assert place(entries, 20, 2) == [Place(0, -1), Place(10, -1)]


def test_a_larger_weight_waits_for_all_that_it_overwrites():
    entries = [Stay(0, 4, 0, 3), Stay(1, 4, 1, 1), Stay(2, 4, 2, 2), Stay(3, 8, 4, 4)]
    assert place(entries, 12, 5)[3] == Place(0, 3)


def test_a_weight_is_held_while_little_passes_by():
    weights = tuple(Weight(name, 10) for name in "abc")
    turn = Sweep(weights, tuple(Operator(str(n), 1, (w,)) for n, w in enumerate((0, 1, 2, 2, 1, 0))))
    everything, sizes = frozenset(range(3)), [10, 10, 10]
    assert stays(turn, everything, sizes, -1) == [Stay(w, 10, n, n) for n, w in enumerate((0, 1, 2, 2, 1, 0))]
    assert stays(turn, everything, sizes, 0) == [
        Stay(0, 10, 0, 0),
        Stay(1, 10, 1, 1),
        Stay(2, 10, 2, 3),
        Stay(1, 10, 4, 4),
        Stay(0, 10, 5, 5),
    ]
    assert stays(turn, everything, sizes, 10) == [
        Stay(0, 10, 0, 0),
        Stay(1, 10, 1, 4),
        Stay(2, 10, 2, 3),
        Stay(0, 10, 5, 5),
    ]
    assert stays(turn, frozenset({1}), sizes, 0) == [Stay(1, 10, 1, 4)]
