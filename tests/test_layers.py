"""Imports point one way: foundations, kernels, passes, backend, tools; private names and long files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_TOOLS = {
    "__init__",
    "__main__",
    "autoload",
    "bench",
    "demo",
    "doctor",
    "estimator",
    "explainer",
    "fp4_calibration",
    "global_switch",
    "tune",
}


def layer(module: str) -> int:
    """0 foundations, 1 kernels, 2 passes, 3 backend, 4 tools."""
    parts = module.split(".")[1:]
    if not parts:
        return 0  # the package itself: its version
    if parts[0].split("_")[0] in ("checkpoint", "handles"):
        return 1  # files of packed weights stand on the formats, offloaded weights on files
    if parts[0] in ("kernels", "passes"):
        return 1 if parts[0] == "kernels" else 2
    if parts[0].split("_")[0] in {name.split("_")[0] for name in _TOOLS if name[0] != "_"} or parts[0] in _TOOLS:
        return 4
    return 3 if parts[0] == "backend" else 0


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join((*prefix, path.stem)), path)
        for folder, prefix in (
            ("vbcompile", ("vbcompile",)),
            ("kernels", ("vbcompile", "kernels")),
            ("passes", ("vbcompile", "passes")),
        )
        for path in sorted((ROOT / folder).glob("*.py"))
    ]


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages = ("vbcompile", "vbcompile.kernels", "vbcompile.passes")
            found |= {f"{node.module}.{a.name}" if node.module in packages else node.module for a in node.names}
    return {name for name in found if name.split(".")[0] == "vbcompile"}


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_down(module, path):
    too_high = {name for name in imported(path) if layer(name) > layer(module)}
    assert not too_high, f"{module} (layer {layer(module)}) imports {too_high}"


def test_no_modules_import_each_other():
    """Wherever the import stands, inside a function too."""
    names = {name for name, _ in modules()}
    below = {name: imported(path) & names - {name} for name, path in modules()}
    while leaves := {name for name, under in below.items() if not under}:
        below = {name: under - leaves for name, under in below.items() if name not in leaves}
    assert not below


@pytest.mark.parametrize(
    "path", [path for _, path in modules()] + sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.name
)
def test_private_names_stay_at_home(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [alias.name for node in imports if (node.module or "").startswith("vbcompile") for alias in node.names]
    assert not [name for name in ours if name.startswith("_") and not name.startswith("__")]


@pytest.mark.parametrize("path", [path for _, path in modules()], ids=lambda path: path.name)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 500
