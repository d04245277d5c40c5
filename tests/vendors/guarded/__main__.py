"""The session of a Gaudi or Intel GPU user on a simulated machine of two cards.

python -m vendors.guarded hpu|xpu        (from the folder tests/; the first time builds some C++, half a minute)
"""

import json
import sys
from contextlib import ExitStack

from vendors import gaudi, intel
from vendors.guarded import GuardedDevice
from vendors.packages import release
from vendors.session import problems, session


def main(kind: str) -> int:
    device = GuardedDevice({"hpu": "habana", "xpu": "intel"}[kind])
    device.install()
    with ExitStack() as stack:
        if kind == "hpu":
            kernels = device.kernels(gaudi.kernels("1.19.0"))
            package = stack.enter_context(release("habana-torch-plugin", "1.19.0", kernels, "HPU"))
            package.add_shapes(gaudi.SHAPES)
            stack.enter_context(gaudi.python_package(gaudi.fused_sdpa("1.19.0")))
            calls = package.calls
        else:
            calls = stack.enter_context(intel.flash_kernels(device.kernels, ("XPU",)))
        answers = session(kind, calls)
    found = problems(kind, answers)
    print(
        "\n".join([json.dumps(answers, default=str), *found])
        if found
        else f"{kind}: all right; {len(calls)} vendor calls"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
