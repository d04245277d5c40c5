"""Our Triton kernels through Ascend's compilers, without CANN.

    python -m vendors.triton_ascend        (from the folder tests/)

Makes ``build/vendors/triton_ascend``, an environment of its own with triton-ascend 3.2.0 (54 MB) and ascendnpu-ir 1.2.0
(161 MB); Python 3.9 to 3.11, Linux, x86-64. Says for each kernel how far it comes, and ends with an error where that is
not what the registry tells users.
"""

import argparse
import sys

from vendors.environments import environment, run_inside

INSIDE = "--inside"
SOC = "Ascend910B1"
PACKAGES = (
    (
        "--no-deps", "triton-ascend==3.2.0", "ascendnpu-ir==1.2.0", "pybind11", "pyyaml", "attrs", "decorator",
        "psutil", "scipy",
    ),
)  # fmt: skip


def inside(soc: str) -> int:
    from vbcompile.device_catalog import catalog_target
    from vbcompile.kernels.triton_target import refuses_triton
    from vendors.triton_ascend.kernels import outcomes

    found = outcomes(soc)
    small, large = found[:2]
    wrong = []
    if (small.stage, large.stage) != ("all", "memory"):
        wrong.append(f"the check of on-chip memory does not work: {small}, {large}")
    if any(outcome.stage == "all" for outcome in found[2:]):
        wrong.append("a kernel of ours compiles, and the registry refuses it: look again")
    print(f"what the registry says: {refuses_triton(catalog_target(soc))}")
    print("\n".join(["wrong:", *wrong]) if wrong else "triton-ascend: as the registry says")
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        return inside(SOC)
    return run_inside(environment("triton_ascend", *PACKAGES), "vendors.triton_ascend", [*arguments, INSIDE])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
