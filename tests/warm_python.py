"""Python processes of their own that begin with PyTorch imported: an import takes longer than most programs do.

A process that has imported PyTorch, and done nothing else, is forked for each program. The program is its ``__main__``
and its end is that of the process, as with ``python program.py``. Not for variables that are read when PyTorch is
imported, unless every program has them.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
from quick_pytorch import forget_imports, leave_out


class WarmPython:
    """Runs programs as ``python`` does.

    Args:
        cpp_kernels: let Inductor write C++ kernels (see ``quick_pytorch.leave_out``).
        variables: of the environment, for every program.
    """

    def __init__(self, cpp_kernels: bool = True, **variables: str) -> None:
        self._cpp_kernels = cpp_kernels
        self._variables = variables
        self._parent: subprocess.Popen[str] | None = None

    def run(
        self,
        words: list[str],
        folder: Path | None = None,
        variables: dict[str, str] | None = None,
        cpp_kernels: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python *words`` and wait for its end.

        Args:
            words: ``[file, ...]``, ``["-c", program, ...]`` or ``["-m", module, ...]``.
            folder: where it runs; None: where this process does.
            variables: more of the environment, none that PyTorch or Python reads when it begins.
            cpp_kernels: let Inductor write C++ kernels for this program.
        """
        known = os.environ | self._variables | (variables or {})
        if torch.accelerator.is_available():  # cannot be used on both sides of a fork
            return subprocess.run([sys.executable, *words], cwd=folder, env=known, capture_output=True, text=True)
        with tempfile.TemporaryDirectory() as outputs:
            files = [os.path.join(outputs, name) for name in ("stdout", "stderr")]
            request = {
                "words": words, "folder": str(folder or os.getcwd()), "environment": known, "files": files,
                "cpp_kernels": cpp_kernels or self._cpp_kernels,
            }  # fmt: skip
            status = self._ask(json.dumps(request))
            stdout, stderr = (Path(file).read_text() for file in files)
        return subprocess.CompletedProcess(words, status, stdout, stderr)

    def _ask(self, request: str) -> int:
        if self._parent is None:
            self._parent = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | self._variables, start_new_session=True,
            )  # fmt: skip
        try:
            print(request, file=self._parent.stdin, flush=True)
            answer = self._parent.stdout.readline()
            assert answer, "the process that programs are forked from has ended"
            return int(answer)
        except BaseException:  # a test that is stopped leaves no program behind
            self.close()
            raise

    def __enter__(self) -> "WarmPython":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and a program that runs."""
        if self._parent is not None:
            os.killpg(self._parent.pid, signal.SIGKILL)
            self._parent.communicate()
            self._parent = None


def _become(words: list[str], folder: str, environment: dict[str, str], files: list[str], cpp_kernels: bool) -> None:
    """Run the program in this process."""
    torch._inductor.config.fallback_by_default = not cpp_kernels
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, flags) in enumerate(
        [(os.devnull, os.O_RDONLY)] + [(f, os.O_CREAT | os.O_WRONLY) for f in files]
    ):
        os.dup2(os.open(name, flags), number)
    first, *rest = words
    if first == "-m":
        sys.path[0], sys.argv = folder, rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.path[0], sys.argv = ("", ["-c", *rest[1:]]) if first == "-c" else (str(Path(folder, first).parent), words)
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    if first == "-c":
        text, name = rest[0].encode(), "<string>"
    else:
        name = program.__file__ = str(Path(folder, first))
        text = Path(first).read_bytes()
    exec(compile(text, name, "exec", dont_inherit=True), program.__dict__)


def main() -> None:
    importlib.import_module("torch._inductor.compile_fx")  # what every compilation imports
    leave_out(cpp_kernels=False)
    forget_imports()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
