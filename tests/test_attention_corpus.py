"""The corpus of attention under the backend: the right number of fused sites, and results as good as eager's.

The rewritten graph runs eagerly here, so that the whole corpus takes a minute; ``bench/attention_coverage.py`` runs the
full product with Inductor.
"""

import pytest
import torch
from attention_cases.case import COINCIDENT, INFERENCE, SINGLE, TRAINING
from attention_corpus import CASES
from attention_oracle import Outcome, differences
from attention_trial import FUSED, LEFT, attempt, dropout_problems, identity_values, judge, prepared, vblackwell
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread", "no_fake_tensor_cache")


def _trials(mode: str, every: int = 1, families: tuple[str, ...] = (), always: int = 1) -> list:
    """Cases of a mode; of those, all but each ``always``-th are left to ``make test-all``."""
    chosen = [c for c in CASES.values() if mode in c.modes and (not families or c.family in families)][::every]
    left = [() if n % always == 0 else pytest.mark.matrix for n in range(len(chosen))]
    return [pytest.param(case, id=case.name, marks=marks) for case, marks in zip(chosen, left, strict=True)]


@pytest.fixture(scope="module")
def backend():
    return vblackwell("eager")


def _check(result) -> None:
    assert result.verdict in (FUSED, LEFT), f"{result.verdict}: {result.sites} sites, expected {result.expected}"
    assert not result.problems, "; ".join(result.problems)


@pytest.mark.parametrize("case", _trials(INFERENCE))
def test_inference(case, backend):
    _check(attempt(case, backend, mode=INFERENCE))


@pytest.mark.parametrize("case", _trials(TRAINING, always=8))
def test_training(case, backend):
    _check(attempt(case, backend, mode=TRAINING))


@pytest.mark.parametrize("case", _trials(TRAINING, every=8))
def test_training_in_bfloat16(case, backend):
    _check(attempt(case, backend, mode=TRAINING, dtype=torch.bfloat16))


@pytest.mark.parametrize("case", _trials(INFERENCE, families=("layout", "einsum", "grouped", "refuse", "product")))
def test_all_sizes_equal(case, backend):
    """Sizes that coincide hide a confusion of axes from every check of shapes."""
    _check(attempt(case, backend, mode=INFERENCE, sizes=COINCIDENT))


@pytest.mark.parametrize("case", _trials(INFERENCE, every=12))
def test_batch_of_one(case, backend):
    _check(attempt(case, backend, mode=INFERENCE, sizes=SINGLE))


@pytest.mark.parametrize("case", _trials(INFERENCE, every=14, always=2))
def test_dynamic_shapes(case, backend):
    _check(attempt(case, backend, mode=INFERENCE, dynamic=True))


def test_scores_scaled_by_a_size_that_varies(backend):
    """A tensor divided by a number of sizes is as finite as the tensor is."""
    _check(attempt(CASES["deberta_v3_with_xsoftmax"], backend, mode=INFERENCE, dynamic=True))


@pytest.mark.parametrize("case", _trials(TRAINING, every=20, always=2))
def test_dynamic_shapes_in_training(case, backend):
    _check(attempt(case, backend, mode=TRAINING, dynamic=True))


@pytest.mark.parametrize("case", _trials(TRAINING, every=20))
def test_through_autograd_capture(case):
    """AOTAutograd traces the operator's fake, forward and backward."""
    _check(attempt(case, vblackwell("aot_eager"), mode=TRAINING))


# ------------------------------------------------------------------------------ the corpus and its oracle
def test_corpus_is_large_enough():
    assert sum(case.must_fuse for case in CASES.values()) >= 600
    assert sum(case.must_refuse for case in CASES.values()) >= 80


def test_judge():
    assert judge(1, (1,)) == FUSED
    assert judge(0, (0,)) == judge(0, (0, 1)) == LEFT
    assert judge(0, (2,)) == "missed"
    assert judge(1, (2,)) == "partial"
    assert judge(1, (0,)) == judge(2, (1,)) == "wrongly fused"


def _outcome(**values) -> Outcome:
    return Outcome({name: None if v is None else torch.tensor(v) for name, v in values.items()})


@pytest.mark.parametrize(
    ("ours", "accepted"),
    [([1.0, 2.0], True), ([1.0, 2.001], False), ([1.0, float("nan")], False), ([1.0], False), (None, False)],
)
def test_oracle_sees_what_is_wrong(ours, accepted):
    eager = _outcome(x=[1.0, 2.0])
    assert (differences(_outcome(x=ours), eager, eager) == []) is accepted


def test_oracle_wants_nan_where_eager_has_it():
    nan = _outcome(x=[1.0, float("nan")])
    assert differences(nan, nan, nan) == []
    assert differences(_outcome(x=[1.0, 0.0]), nan, nan)


def test_oracle_allows_twice_the_error_of_eager():
    truth, eager = _outcome(x=[1.0]), _outcome(x=[1.01])
    assert differences(_outcome(x=[0.985]), eager, truth) == []
    assert differences(_outcome(x=[0.97]), eager, truth)


class _WrongDropout(nn.Module):
    def __init__(self, module: nn.Module, fault: str) -> None:
        super().__init__()
        self.module, self.fault = module, fault

    def forward(self, q, k, v):
        weights = torch.softmax(q @ k.mT * 0.35, -1)
        if self.fault == "none":
            return nn.functional.dropout(weights, 0.25) @ v
        if self.fault == "rate":
            return nn.functional.dropout(weights, 0.5) * 0.5 / 0.75 @ v
        if self.fault == "unscaled":
            return nn.functional.dropout(weights, 0.25) * 0.75 @ v
        if self.fault == "repeated":
            mask = torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)) > 0.25
            return weights * mask / 0.75 @ v
        dropped = nn.functional.dropout(weights, 0.25)  # a backward that forgets the mask
        return (weights + (dropped - weights).detach()) @ v


@pytest.mark.parametrize("fault", ["none", "rate", "unscaled", "repeated", "backward"])
def test_oracle_of_dropout(fault):
    case = CASES["DropoutModule"]
    inputs = case.make_inputs(torch.float32, "cpu", 0)
    module = prepared(case, TRAINING, torch.float32, "cpu", SINGLE)
    found = dropout_problems(case, module, _WrongDropout(module, fault), inputs)
    assert bool(found) is (fault != "none")
    assert torch.equal(identity_values(inputs)[2][0, 0], torch.eye(inputs[2].shape[-2]))
