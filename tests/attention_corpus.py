"""The corpus of attention: every case of ``attention_cases``, by name."""

from attention_cases import layouts, masks, modules, refusals, scores, spellings, unusual, writes
from attention_cases.case import REGISTRY, Case

__all__ = ["CASES", "FAMILIES", "layouts", "masks", "modules", "refusals", "scores", "spellings", "unusual", "writes"]

CASES: dict[str, Case] = dict(sorted(REGISTRY.items(), key=lambda item: (item[1].family, item[0])))
FAMILIES: list[str] = sorted({case.family for case in CASES.values()})
