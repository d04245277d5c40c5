"""The attention corpus on simulated vendors: run natively, by plain PyTorch, or left alone; and whether it is right.

python -m vendors.coverage [--every N] [--kind npu|hpu|xpu]        (from the folder tests/)
"""

import argparse
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from attention_cases.case import DISTINCT, INFERENCE, TRAINING, Case
from attention_corpus import CASES
from attention_trial import FUSED, LEFT, REFUSED_BY_PYTORCH, attempt, vblackwell

from vbcompile.backend import add_listener, remove_listener
from vbcompile.report import GraphReport
from vendors.trial import intel_gpu, vendor

OWN = {"npu": ("npu_fusion", "npu_infer"), "hpu": ("hpu_fused",), "xpu": ("xpu_flash",)}
KINDS = tuple(OWN)
# Intel's kernel takes 16-bit floats and few numbers of features
_SETTINGS = {"xpu": {"dtype": torch.bfloat16, "sizes": replace(DISTINCT, features=64, value_features=64)}}


@dataclass(frozen=True)
class Run:
    """One case on one vendor.

    Attributes:
        how: ``native``, ``fallback`` (the operator's plain PyTorch), ``left`` (the model's own operators).
        reason: why it is not native.
        problems: results worse than eager's.
    """

    case: str
    mode: str
    how: str
    reason: str
    problems: tuple[str, ...]


def run(kind: str, case: Case, mode: str) -> Run:
    """One case under the backend, compared with eager by the oracle of the corpus."""
    reports: list[GraphReport] = []
    add_listener(reports.append)
    with ExitStack() as stack:
        stack.callback(remove_listener, reports.append)
        stack.enter_context(intel_gpu() if kind == "xpu" else vendor(kind))
        # the statistics of dropout are compared with a tolerance for float32
        settings = {} if case.dropout else _SETTINGS.get(kind, {})
        result = attempt(case, vblackwell("eager"), mode=mode, **settings)
    chosen = [d.implementation for r in reports for d in r.decisions if d.action == "rewritten"]
    problems = list(result.problems)
    if result.verdict not in (FUSED, LEFT, REFUSED_BY_PYTORCH):  # cases of fixed sizes, where these differ
        problems.append(f"{result.verdict}: {result.sites} sites")
    if not result.sites:
        reasons = [d.reason for r in reports for d in r.decisions]
        return Run(case.name, mode, "left", "; ".join(reasons), tuple(problems))
    other = [text for text in chosen if not all(_is_own(kind, part) for part in text.split("; backward: "))]
    return Run(case.name, mode, "fallback" if other else "native", _reason(kind, other), tuple(problems))


def _is_own(kind: str, text: str) -> bool:
    return text.startswith(OWN[kind])


def _reason(kind: str, texts: list[str]) -> str:
    """What the vendor's own implementations said."""
    found = []
    for text in texts:
        for part in text.replace("(not ", "; ").replace("; backward: ", "; ").split("; "):
            name, _, reason = part.partition(": ")
            if name in OWN[kind] and reason:
                found.append(reason.rstrip(")"))
    return "; ".join(dict.fromkeys(found))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="each so many cases")
    parser.add_argument("--kind", choices=KINDS, action="append")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wrong = 0
    for kind in options.kind or KINDS:
        runs = [
            run(kind, c, m) for m in (INFERENCE, TRAINING) for c in [*CASES.values()][:: options.every] if m in c.modes
        ]
        table = Counter((r.mode, r.how) for r in runs)
        print(f"\n{kind}: {len(runs)} runs, {sum(bool(r.problems) for r in runs)} wrong")
        for mode in (INFERENCE, TRAINING):
            print(f"  {mode}: " + ", ".join(f"{table[mode, how]} {how}" for how in ("native", "fallback", "left")))
        for reason, count in Counter(r.reason for r in runs if r.how == "fallback").most_common():
            print(f"    {count:3d} fallback: {reason}")
        for r in runs:
            if r.problems:
                wrong += 1
                print(f"  WRONG {r.case} {r.mode}: {'; '.join(r.problems)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
