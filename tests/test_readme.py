"""The README's figures are those of the results files, and its make targets exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_generated_from_the_results():
    subprocess.run([sys.executable, ROOT / "bench" / "readme_tables.py", "--check"], check=True)


def test_picture_is_drawn_from_the_results():
    subprocess.run([sys.executable, ROOT / "bench" / "readme_picture.py", "--check"], check=True)


def test_make_targets_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert targets and targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
