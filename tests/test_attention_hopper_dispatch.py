"""What the Hopper attention kernels are not asked to do, and which leading axis a mask reads."""

import pytest
import torch

from vbcompile.kernels import attention_gpu, attention_problem
from vbcompile.kernels.attention_case import make_case
from vbcompile.kernels.attention_hopper_call import describe_call, refuses_call
from vbcompile.kernels.score_function import ScoreFunction

SHAPE = ((1, 1, 256, 256), torch.bfloat16)
TILE_MASK = ScoreFunction((("score",), ("captured", 0), ("const", 0.0), ("gt", 1, 2)), 0, 3)


def test_a_plan_of_tiles_follows_the_axis_that_the_mask_reads():
    """``j <= i + 8 * lead_index(1)`` in a space of three leading axes: the third of the kernels' four."""
    instructions = (
        ("score",),
        ("k_index",),
        ("q_index",),
        ("lead_index", 1),
        ("const", 8),
        ("mul", 3, 4),
        ("add", 2, 5),
    )
    function = ScoreFunction((*instructions, ("le", 1, 6)), 0, 7)
    q = torch.empty(2, 8, 256, 64, dtype=torch.bfloat16)
    call = describe_call(q, q, (), (2, 4, 2), 1.0, function)
    space = q.reshape(2, 4, 2, 256, 64)
    problem = attention_problem.describe(space, space, space, call.originals, 1.0, 0.0, call.function)
    assert problem.program.mask_axes == {2} and problem.mask_sizes == [1, 1, 4, 1]


@pytest.mark.parametrize(
    ("program", "shapes"),
    [
        ((("score",), ("q_length",), ("q_index",), ("sub", 1, 2), ("div", 0, 3)), []),
        ((("score",), ("k_index",), ("log", 1), ("mul", 0, 2)), []),
        ((("score",), ("captured", 0), ("div", 0, 1)), [((1, 1, 256, 1), torch.float32)]),
    ],
)
def test_backward_of_functions_that_are_undefined_past_the_ends(program, shapes):
    function = ScoreFunction(program, len(program) - 1)
    assert "past the ends" in refuses_call(shapes, 256, 256, function, ())
    assert refuses_call(shapes, 256, 256, function) is None  # the forward never stores those rows


def test_a_temperature_per_head_is_defined_everywhere():
    function = ScoreFunction((("score",), ("captured", 0), ("div", 0, 1)), 2)
    assert refuses_call([((1, 4, 1, 1), torch.float32)], 256, 256, function, ()) is None


def test_a_tile_that_only_masks_has_no_gradient_here():
    assert refuses_call([SHAPE], 256, 256, TILE_MASK) is refuses_call([SHAPE], 256, 256, TILE_MASK, ()) is None
    assert "its gradient is zero" in refuses_call([SHAPE], 256, 256, TILE_MASK, (0,))


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_scales_that_the_kernels_cannot_take(scale):
    q = torch.empty(1, 4, 256, 64, dtype=torch.bfloat16)
    case = make_case(q, q, q, [], scale, 0.0, ScoreFunction().dumps())
    assert "scale" in attention_gpu._refuses_hopper_scores(case)
