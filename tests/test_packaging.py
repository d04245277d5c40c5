"""The package as users get it: wheel contents, entry points, editable install, the checkout beside other packages."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_COMPILE = (
    "import torch; m = torch.nn.Linear(4, 4); x = torch.randn(2, 4);"
    "torch.testing.assert_close(torch.compile(m, backend='vblackwell', options={'downstream': 'eager'})(x), m(x));"
    "import vbcompile, vbcompile.kernels.registry; print(vbcompile.__file__, vbcompile.kernels.registry.__file__)"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy: setuptools leaves a folder beside the sources, and packs what an earlier build left there."""
    copy, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("vbcompile", "kernels", "passes"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, copy]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_and_nothing_else(wheel):
    expected = {f"vbcompile/{path.name}" for path in (ROOT / "vbcompile").glob("*.py")} | {"vbcompile/py.typed"}
    for folder in ("kernels", "passes"):
        files = [path for pattern in ("*.py", "tuned/*.json", "*.[ch]*") for path in (ROOT / folder).glob(pattern)]
        expected |= {f"vbcompile/{path.relative_to(ROOT)}" for path in files}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("vbcompile-")}
    assert names == expected


def test_wheel_works_from_anywhere(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert all(Path(name).is_relative_to(target) for name in run.stdout.split())


def test_short_names_stay_free_for_other_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "passes" / "__init__.py").exists()


def test_checkout_beside_a_regular_package_named_kernels(tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("MARK = 'the other package'\n")
    program = "import kernels, vbcompile.kernels.registry; print(kernels.MARK)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "the other package", run.stderr


def test_importing_us_is_cheap_and_imports_no_torch():
    program = (
        "import sys, time; t = time.process_time(); import vbcompile; t = time.process_time() - t;"
        "print(t, 'torch' in sys.modules)"
    )
    seconds, torch_loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 0.1 and torch_loaded == "False"


def test_public_names_resolve_and_match_their_list():
    import vbcompile

    for name in vbcompile.__all__:
        assert getattr(vbcompile, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vbcompile.nothing  # noqa: B018


def test_environment_is_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert "torch==2.13.0" in lines


def test_extras_and_scripts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"npu", "hpu", "xpu", "hf", "bench", "test"} <= project["optional-dependencies"].keys()
    assert project["scripts"] == {"vbcompile": "vbcompile.__main__:main"}
