"""The corpus of attention: every case of ``attention_cases``, by name."""

from attention_cases import (
    circumstances,
    composites,
    eras,
    gradients,
    hazards,
    language,
    layouts,
    lookalikes,
    masks,
    modules,
    normalisers,
    numbers,
    pytorch_patterns,
    refusals,
    repeats,
    science,
    scores,
    spellings,
    structures,
    tensors,
    unusual,
    vision,
    writes,
)
from attention_cases.case import REGISTRY, Case

__all__ = [
    "CASES",
    "FAMILIES",
    "circumstances",
    "composites",
    "eras",
    "gradients",
    "hazards",
    "language",
    "layouts",
    "lookalikes",
    "masks",
    "modules",
    "normalisers",
    "numbers",
    "pytorch_patterns",
    "refusals",
    "repeats",
    "science",
    "scores",
    "spellings",
    "structures",
    "tensors",
    "unusual",
    "vision",
    "writes",
]

CASES: dict[str, Case] = dict(sorted(REGISTRY.items(), key=lambda item: (item[1].family, item[0])))
FAMILIES: list[str] = sorted({case.family for case in CASES.values()})
