"""Programs in forked processes run as by ``python`` itself."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, os, sys
if __name__ == "__main__":
    import __main__
    atexit.register(print, "the end")
    print(sys.argv, sys.path[0], os.getcwd(), globals().get("__file__"), __main__.__dict__ is globals())
    print([name for name in globals() if not name.startswith("__")], sys.stdin.read(), sys.flags.isolated)
    print("to stderr", file=sys.stderr)
    sys.modules["left by a program"] = None
    sys.exit(3)
"""


@pytest.mark.parametrize("way", ["file", "module", "text"])
def test_a_program_runs_as_by_python(warm_python, tmp_path, way):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = {"file": ["program.py"], "module": ["-m", "program"], "text": ["-c", PROGRAM]}[way] + ["--epochs", "3"]
    want = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    for _ in range(2):  # nothing is left by the first
        got = warm_python.run(words, tmp_path)
        assert (got.returncode, got.stderr) == (want.returncode, want.stderr) == (3, "to stderr\n")
        assert got.stdout == want.stdout and got.stdout.endswith("the end\n")


def test_its_environment_and_its_errors(warm_python, tmp_path):
    program = "import os; print(os.environ['GREETING']); raise ValueError('no luck')"
    done = warm_python.run(["-c", program], tmp_path, {"GREETING": "hello"})
    assert (done.returncode, done.stdout) == (1, "hello\n") and "ValueError: no luck" in done.stderr
    assert warm_python.run(["-c", "import os; assert 'GREETING' not in os.environ"]).returncode == 0
    assert warm_python.run(["-c", "import os; os.abort()"]).returncode < 0
