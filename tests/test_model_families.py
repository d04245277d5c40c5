"""Model families of Transformers under the backend: every attention site fused, everything equal to eager.

``bench/attention_coverage.py --what families`` runs them with Inductor, and plain Inductor for comparison.
"""

import pytest
from attention_cases.case import INFERENCE, TRAINING
from attention_trial import vblackwell

pytest.importorskip("transformers")

from model_families import FAMILIES, try_family

pytestmark = pytest.mark.usefixtures("one_thread")
SDPA = ("llama", "gpt2", "gemma3_text", "bert", "bart", "whisper", "vit", "swin", "wav2vec2", "clip", "modernbert")


def _families(every: int = 1, names: tuple[str, ...] = (), always: int = 1) -> list:
    """Families; of those, all but each ``always``-th are left to ``make test-all``."""
    chosen = [f for f in FAMILIES if not names or f.name in names][::every]
    left = [() if n % always == 0 else pytest.mark.matrix for n in range(len(chosen))]
    return [pytest.param(family, id=family.name, marks=marks) for family, marks in zip(chosen, left, strict=True)]


def _without_padding() -> list:
    """Decoders and a part of the others; in every run those that are not trained, every other one."""
    families = [p.values[0] for p in _families() if p.values[0].kind == "decoder"]
    families += [p.values[0] for p in _families(every=5)[8:]]
    trained = {p.id for p in _families(always=2) if not p.marks}
    marks = [pytest.mark.matrix if f.name in trained else () for f in families]
    return [pytest.param(f, id=f.name, marks=m) for f, m in zip(families, marks, strict=True)]


def _check(result) -> None:
    assert not result.problems, "; ".join(result.problems)
    assert result.sites == result.expected


@pytest.mark.parametrize("family", _families(always=2))
def test_training_with_padding(family):
    captures_autograd = FAMILIES.index(family) % 4 == 0  # costs twice the time
    backend = vblackwell("aot_eager" if captures_autograd else "eager")
    _check(try_family(family, backend, mode=TRAINING, padded=True))


@pytest.mark.parametrize("family", _without_padding())
def test_inference_without_padding(family):
    """Without an ``attention_mask`` the causal mask has no input: it is a constant of the graph."""
    _check(try_family(family, vblackwell("eager"), mode=INFERENCE, padded=False))


@pytest.mark.parametrize("family", _families(names=SDPA))
def test_inference_of_the_sdpa_implementation(family):
    _check(try_family(family, vblackwell("eager"), mode=INFERENCE, implementation="sdpa", padded=True))


@pytest.mark.parametrize("family", _families(every=12))
def test_dynamic_shapes(family):
    _check(try_family(family, vblackwell("eager"), mode=INFERENCE, dynamic=True, padded=True))


def test_families_are_many():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 40
    assert all(family.sites > 0 for family in FAMILIES)
