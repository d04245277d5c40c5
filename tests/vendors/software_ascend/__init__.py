"""The real torch-npu wheel on a machine without Ascend: its libraries linked against stand-ins for CANN's.

``runtime.c`` is a runtime over host memory; every other CANN symbol that the wheel asks for, by the linker or by
``dlsym``, is a function that returns zero. The symbols are read from the wheel when the stand-ins are built.
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

SONAMES = (
    "libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel", "libacl_prof", "libmsprofiler",
    "libprofapi", "libruntime", "libascend_hal", "libnnopbase", "libascend_ml", "libmsprof", "libhcomm",
)  # fmt: skip
_LOADED_BY_NAME = re.compile(rb"\0((?:acl|Hccl|hccl)[A-Za-z0-9_]{3,80})(?=\0)")


def build(site: Path, torch_libraries: Path, folder: Path) -> Path:
    """Make the stand-ins for the wheel unpacked in ``site``; needs gcc and nm. Returns the folder to load them from."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "libascendcl.so").exists():
        return folder
    package = site / "torch_npu"
    libraries = [*package.glob("lib/*.so"), *package.glob("_C*.so"), *package.glob("dynamo/torchair/core/*.so")]
    provided = _symbols([*torch_libraries.glob("*.so*"), *libraries, *site.glob("torch_npu.libs/*")], "--defined-only")
    wanted = {s for s in _symbols(libraries, "--undefined-only") - provided if not s.startswith(("Py", "_Py"))}
    wanted |= {name.decode() for library in libraries for name in _LOADED_BY_NAME.findall(library.read_bytes())}
    source = Path(__file__).parent / "runtime.c"
    own = set(re.findall(r"^[\w ]+[ *](\w+)\(", source.read_text(), re.MULTILINE))
    assembly = folder / "zero.s"
    assembly.write_text(_zero_functions(sorted(wanted - own)))
    _compile(folder / "libascendcl.so", [str(source), str(assembly)])
    empty = folder / "empty.c"
    empty.write_text("static int unused;\n")
    for name in SONAMES:
        linked = ["-Wl,--no-as-needed", f"-L{folder}", "-lascendcl"]
        _compile(folder / f"{name}.so", [str(empty), *linked])
    return folder


def _symbols(libraries: Iterable[Path], kind: str) -> set[str]:
    """Names without versions; undefined ones that carry a version belong to the C library."""
    found: set[str] = set()
    for library in libraries:
        listing = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True, check=False).stdout
        names = [line.split()[-1] for line in listing.splitlines() if line.strip()]
        found |= {n.partition("@")[0] for n in names if kind == "--defined-only" or "@" not in n}
    return found


def _zero_functions(names: list[str]) -> str:
    labels = "\n".join(f".globl {n}\n.type {n},@function\n{n}:" for n in names)
    return (
        f'.text\n{labels}\nxor %eax,%eax\nxor %edx,%edx\npxor %xmm0,%xmm0\nret\n.section .note.GNU-stack,"",@progbits\n'
    )


def _compile(target: Path, arguments: list[str]) -> None:
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", str(target), f"-Wl,-soname,{target.name}", *arguments]
    subprocess.run(command, check=True)
