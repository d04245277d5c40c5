"""Our Triton kernels through Intel's compiler, without an Intel GPU.

    python -m vendors.triton_intel [compile] [run] [--form causal ...]        (from the folder tests/)

Makes ``build/vendors/triton_intel``, an environment of its own with triton-xpu 3.3.0b1 (182 MB), pyopencl and Intel's
OpenCL runtime for processors; Python 3.9 to 3.11, Linux, x86-64. ``compile``: SPIR-V for the cards, with local memory
within their limit. ``run``: SPIR-V without matrix units, run on this processor and compared with plain PyTorch; the
runtime compiles for half a minute to some minutes a kernel. Both where none is named, each in a process of its own:
Triton asks for the device once a process.
"""

import argparse
import sys

from vendors.environments import environment, run_inside

INSIDE = "--inside"
PACKAGES = (
    ("--pre", "--no-deps", "triton-xpu==3.3.0b1"),
    ("intel-opencl-rt", "intel-cmplr-lib-rt", "pyopencl", "numpy"),
)
ARCHITECTURES = ("pvc", "bmg")


def inside(options: argparse.Namespace) -> int:
    from vendors.triton_intel import kernels

    wrong = []
    if options.what == ["compile"]:
        driver = kernels.CompilingDriver()
        for arch in ARCHITECTURES:
            wrong += kernels.compile_all(arch, driver)
    else:
        wrong += kernels.run_all(tuple(options.form or kernels.FORMS))
    (what,) = options.what
    print("\n".join(["wrong:", *wrong]) if wrong else f"triton-xpu, {what}: all right", flush=True)
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="compile, run; both by default")
    parser.add_argument("--form", action="append", help="a form of attention to run, of tests/attention_forms.py")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.what) - {"compile", "run"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; valid: compile, run")
    options.what = options.what or ["compile", "run"]
    if options.inside:
        return inside(options)
    folder = environment("triton_intel", *PACKAGES)
    runtime = folder / "icd"
    runtime.mkdir(exist_ok=True)  # the wheel's own names a folder of its build machine
    (runtime / "cpu.icd").write_text(str(folder / "lib" / "libintelocl.so"))
    variables = {"OCL_ICD_VENDORS": str(runtime), "LD_LIBRARY_PATH": str(folder / "lib")}
    forms = [word for form in options.form or () for word in ("--form", form)]
    commands = [[what, *forms, INSIDE] for what in options.what]
    return max(run_inside(folder, "vendors.triton_intel", command, **variables) for command in commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
