"""Every program and every command in README.md and docs/ runs as it stands.

All but the switch by environment, which stands for them, run Inductor's graphs without C++ kernels, as most tests do
(``quick_pytorch.py``); ``--matrix`` compiles them everywhere.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vbcompile.__main__ import _parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = ("make ", "git ", "pip install", "export ", "source ")  # what sets up, here or on a vendor's machine
PARSED = ("vbcompile tune", "vbcompile calibrate path/")  # needs a card, or a model of the reader's
BY_CI = ("pytest ", "cd tests && python -m ")  # tests themselves, and their longer forms: what they name has to exist
MODEL = """
import torch
def make():
    return torch.nn.TransformerEncoderLayer(64, 4, 1024, dropout=0.0, batch_first=True), [torch.randn(2, 8, 64)]
if __name__ == "__main__":
    model, inputs = make()
    model(*inputs).sum().backward()
"""


def blocks(language: str) -> list:
    """``(page, text)`` of every block of a language, each named by its page and number."""
    found = []
    for page in PAGES:
        texts = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)
        found += [pytest.param(page, t, id=f"{page.relative_to(ROOT)}-{n}") for n, t in enumerate(texts)]
    return found


@pytest.fixture
def run(warm_python, monkeypatch, pytestconfig):
    """Runs a command line; programs without variables begin with PyTorch imported."""
    scripts, users_path = Path(sys.executable).parent, os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PATH", str(scripts), prepend=os.pathsep)
    if not pytestconfig.getoption("--matrix"):
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "no_cpp_kernels"), prepend=os.pathsep)
    for name in ("VB_MODE", "ENABLE_VIRTUAL_BLACKWELL"):
        monkeypatch.delenv(name, raising=False)

    def run(command: list[str], folder: Path, **environment: str) -> None:
        program, *words = command
        if environment or program not in ("python", "vbcompile"):
            if program == "python":
                command, environment = [sys.executable, *words], {"PYTHONPATH": users_path, **environment}
            done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
        else:
            done = warm_python.run([str(scripts / "vbcompile"), *words] if program == "vbcompile" else words, folder)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"

    return run


def is_program(text: str) -> bool:
    """Blocks that import torch are programs; the others show a call in the reader's own code."""
    return "import torch" in text


@pytest.mark.parametrize(("page", "text"), [b for b in blocks("python") if is_program(b.values[1])])
def test_a_program_runs(page, text, tmp_path, run):
    (tmp_path / "program.py").write_text(text)
    run(["python", "program.py"], tmp_path)


@pytest.mark.parametrize(("page", "text"), [b for b in blocks("python") if not is_program(b.values[1])])
def test_a_fragment_names_what_exists(page, text):
    """It compiles, and every public name of ours in it exists."""
    import vbcompile

    compile(text, str(page), "exec")
    for name in re.findall(r"\b(?:vb|vbcompile)\.(\w+)", text):
        assert hasattr(vbcompile, name) or (ROOT / "vbcompile" / f"{name}.py").exists(), name


@pytest.fixture(scope="module")
def done():
    """Lines that ran already, each with the programs beside it: pages share some."""
    return set()


@pytest.mark.parametrize(("page", "text"), blocks("sh"))
def test_commands_run(page, text, tmp_path, done, run):
    programs = {"model.py": MODEL, "train.py": MODEL}
    programs |= dict(re.findall(r"^```python\n# file: (\S+)\n(.*?)^```", page.read_text(), re.M | re.S))
    for name, program in programs.items():
        (tmp_path / name).write_text(program)
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        if (run_as := (line, *programs.items())) in done:
            continue
        done.add(run_as)
        words = shlex.split(line)
        environment: dict[str, str] = {}
        while "=" in words[0]:
            name, _, environment[name] = words.pop(0).partition("=")
        if words[0] == "python" and words[1].startswith("bench/"):
            assert (ROOT / words[1]).is_file(), line  # measured on the machine that its results name
        elif line.startswith(BY_CI):
            named = [ROOT / w for w in words if w.endswith(".py")]
            named += [ROOT / "tests" / w.replace(".", "/") for w in words if w.startswith("vendors.")]
            assert named and all(path.exists() or path.with_suffix(".py").exists() for path in named), line
        elif line.startswith(PARSED):
            _parser().parse_args(words[1:])
        elif not line.startswith(ELSEWHERE):
            run(words, tmp_path, **environment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_in_a_block_that_runs(page):
    text = re.sub(r"^```(?:python|sh)\n.*?^```", "", page.read_text(), flags=re.M | re.S)
    assert not re.findall(r"^ *(?:[A-Z_]+=\S+ )*(?:vbcompile|python|pytest|torchrun|make) \S.*$", text, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_the_text_exist(page):
    text = page.read_text()
    named = set(re.findall(r"`(?:python |pytest )?((?:bench|docs|tests|kernels|passes|vbcompile)/[\w/]+\.\w+)", text))
    assert not {name for name in named if "NAME" not in name and not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)", page.read_text()):
        name, _, heading = link.partition("#")
        if "://" not in link:
            file = page.parent / name if name else page
            assert file.exists(), link
            assert not heading or heading in headings(file), link


def headings(page: Path) -> set[str]:
    """The names by which links reach the headings of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in found}
