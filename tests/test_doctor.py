"""The doctor: what it finds on good, bare and broken machines, and that every problem carries its fix."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_devices import make_bare, plug_in
from rich.console import Console

import vbcompile
from vbcompile import device_vendors, doctor, doctor_toolchain
from vbcompile.device import Target, forget_devices
from vbcompile.doctor import diagnose
from vbcompile.doctor_findings import Diagnosis, KernelReport, Problem, ToolCheck
from vbcompile.doctor_toolchain import check_cpp_compiler, check_triton, check_triton_launcher
from vbcompile.kernels import registry

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    make_bare(monkeypatch)
    for name in ("VB_MODE", "VB_STRICT", "ENABLE_VIRTUAL_BLACKWELL", "TRITON_INTERPRET", "CXX", "PT_HPU_LAZY_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    forget_devices()


@pytest.fixture
def installed(monkeypatch):
    """A healthy installation around the checks: entry point, registry and compilers."""
    needs = lambda target: "" if target.vendor == "nvidia" else "needs an NVIDIA GPU"
    monkeypatch.setattr(registry, "describe", lambda target: [("attention", "fast", needs(target))])
    entry = [importlib.metadata.EntryPoint("vblackwell", "vbcompile.backend:vblackwell", "torch_dynamo_backends")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: entry)
    works = lambda *_: ToolCheck("triton", "here", True, "compiled")
    monkeypatch.setattr(doctor_toolchain, "check_triton", works)
    monkeypatch.setattr(doctor_toolchain, "check_triton_launcher", works)
    monkeypatch.setattr(doctor_toolchain, "check_cpp_compiler", lambda: ToolCheck("c++", "here", True, "/usr/bin/g++"))


def _text(found: Diagnosis) -> str:
    console = Console(file=StringIO(), width=200)
    found.render(console)
    return console.file.getvalue()


def test_a_healthy_machine_has_no_problems(installed):
    found = diagnose()
    assert found.problems == [] and found.exit_status == 0
    assert found.backend_visible
    assert found.versions["torch"] == importlib.metadata.version("torch")
    assert found.versions["vbcompile"] == vbcompile.__version__
    assert [device.device for device in found.devices] == ["cpu"]
    assert {vendor.device_type: vendor.state for vendor in found.vendors} == dict.fromkeys(
        ("cuda", "hpu", "npu", "xpu"), "missing"
    )
    assert all(vendor.reason and vendor.fix for vendor in found.vendors)
    assert found.kernels == [KernelReport("cpu", "attention", "fast", "needs an NVIDIA GPU")]
    assert "No problems found." in _text(found)


def test_json_and_text_hold_the_same_facts(installed, monkeypatch):
    plug_in(monkeypatch, "intel")
    monkeypatch.setenv("VB_MODE", "memory")
    found = diagnose()
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.to_dict()))
    card = data["devices"][0]
    assert (card["device"], card["arch"], card["driver"], card["memory_gb"]) == ("xpu:0", "bmg", "1.6.33578", 12.0)
    assert [device["device"] for device in data["devices"]] == ["xpu:0", "xpu:1", "cpu"]
    assert {"name": "VB_MODE", "value": "memory", "problem": ""} in data["environment"]
    assert data["exit_status"] == 0
    text = _text(found)
    for fact in ("bmg", "1.6.33578", "12.0 GiB", "VB_MODE", "needs an NVIDIA GPU", torch.__version__.split("+")[0]):
        assert fact in text


def test_text_shows_markup_as_written():
    found = Diagnosis(problems=[Problem("a [bold] name", "write [/x]")], versions={"[red]": "1"})
    text = _text(found)
    assert "a [bold] name" in text and "write [/x]" in text and "[red]" in text


def test_kernels_are_listed_once_per_architecture(installed, monkeypatch):
    plug_in(monkeypatch, "nvidia", count=4)
    found = diagnose()
    assert [(row.arch, row.reason) for row in found.kernels] == [("sm_90", ""), ("cpu", "needs an NVIDIA GPU")]


def test_a_card_that_torch_cannot_use_is_an_error(installed, monkeypatch):
    make_bare(monkeypatch, seen=("huawei",))
    found = diagnose()
    assert found.exit_status == 1
    (problem,) = found.problems
    assert "torch-npu is not installed" in problem.what and "pip install 'torch-npu==" in problem.fix
    text = _text(found)
    assert "error: npu: the package torch-npu is not installed" in text and "1 error(s), 0 warning(s)" in text


def test_a_setting_that_stops_compilation_is_an_error(installed, monkeypatch):
    plug_in(monkeypatch, "habana")
    assert diagnose().problems == []
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "1")
    (problem,) = diagnose().problems
    assert "PT_HPU_LAZY_MODE='1'" in problem.what and problem.fix == "export PT_HPU_LAZY_MODE=0"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("VB_MODE", "memroy", "did you mean 'memory'"),
        ("VB_STRICT", "maybe", "valid values are"),
        ("ENABLE_VIRTUAL_BLACKWELL", "perhaps", "valid values are"),
        ("VB_MDOE", "full", "did you mean VB_MODE?"),
    ],
)
def test_invalid_variables_are_flagged(installed, monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    found = diagnose()
    assert [(row.name, row.value) for row in found.environment if row.problem] == [(name, value)]
    (problem,) = found.problems
    assert says in problem.what and problem.fix == f"unset {name}" and found.exit_status == 1


def test_valid_variables_are_shown_without_a_problem(installed, monkeypatch):
    monkeypatch.setenv("VB_MODE", "full")
    monkeypatch.setenv("VB_STRICT", "1")
    monkeypatch.setenv("ENABLE_VIRTUAL_BLACKWELL", "1")
    found = diagnose()
    ours = {row.name: row.problem for row in found.environment}
    assert {"VB_MODE": "", "VB_STRICT": "", "ENABLE_VIRTUAL_BLACKWELL": ""}.items() <= ours.items()
    assert found.problems == []


def test_every_variable_that_the_code_reads_is_known_to_the_doctor():
    sources = [path for place in ("vbcompile", "kernels", "passes") for path in (ROOT / place).glob("*.py")]
    text = "\n".join(path.read_text() for path in sources if path.name != "doctor.py")
    read = set(re.findall(r"""["'](VB_[A-Z_]+[A-Z])["']""", text))
    assert read <= set(doctor._VARIABLES)


def test_a_missing_entry_point_is_an_error(installed, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: [])
    (problem,) = diagnose().problems
    assert "does not find the backend" in problem.what and "pip install" in problem.fix


def test_a_check_that_fails_does_not_hide_the_others(installed, monkeypatch):
    def broken(target):
        raise KeyError("no such operator")

    monkeypatch.setattr(registry, "describe", broken)
    found = diagnose()
    (problem,) = found.problems
    assert "list_kernels failed: KeyError: 'no such operator'" in problem.what
    assert found.devices and found.backend_visible


@pytest.mark.parametrize(
    ("message", "says", "fix"),
    [
        (
            "Failed to load the backend extension: torch_npu. You can disable",
            "torch_npu: OSError: libhccl",
            "AUTOLOAD=0",
        ),
        ("Failed to load the backend extension: vbcompile. You can", "loading vbcompile", "unset that variable"),
        ("libtorch_cpu.so: undefined symbol", "undefined symbol", "reinstall PyTorch"),
    ],
)
def test_a_torch_that_does_not_import_still_gets_a_diagnosis(monkeypatch, message, says, fix):
    def refuse(name):
        raise RuntimeError(message) from (OSError("libhccl.so") if "backend extension" in message else None)

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    found = diagnose()
    (problem,) = found.problems
    assert says in problem.what and fix in problem.fix
    assert found.versions["torch"] and found.exit_status == 1
    assert "1 error(s)" in _text(found)


def _metadata(monkeypatch, requires: dict[str, list[str]], versions: dict[str, str]) -> None:
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    def requirements(name):
        if name not in requires:
            raise importlib.metadata.PackageNotFoundError(name)
        return requires[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", requirements)


def test_packages_that_are_too_old_are_problems(monkeypatch):
    requires = {
        "vbcompile": ["torch>=2.11", "numpy", "rich>=13", "transformers>=5.0; extra == 'hf'", "gguf>=0.17; extra=='x'"]
    }
    _metadata(monkeypatch, requires, {"torch": "2.9.1+cu130", "rich": "13.0", "transformers": "4.57.0.dev0"})
    problems = doctor._requirement_problems()
    assert [(problem.what.partition(" is")[0], problem.severity) for problem in problems] == [
        ("torch 2.9.1+cu130", "error"),
        ("transformers 4.57.0.dev0", "warning"),
    ]
    assert problems[0].fix == "pip install 'torch>=2.11'"


def test_packages_of_another_torch_are_problems(monkeypatch):
    requires = {"torch": ["triton==3.7.0; platform_system == 'Linux'", "sympy"], "torch-npu": ["torch==1.13.0.*"]}
    versions = {"triton": "3.6.0", "torch-npu": "1.13.0", "intel-extension-for-pytorch": "2.8.0"}
    _metadata(monkeypatch, requires, versions)
    npu, ipex, triton = doctor._pair_problems()
    assert "needs torch 1.13.0" in npu.what and "pip install 'torch-npu==" in npu.fix and npu.severity == "error"
    assert ipex.fix == "pip uninstall intel-extension-for-pytorch" and ipex.severity == "warning"
    assert triton.fix == "pip install triton==3.7.0" and triton.severity == "warning"
    versions["triton"] = "3.7.0+git1"
    assert doctor._triton_mismatch() is None


def test_tools_that_fail_are_problems(installed, monkeypatch):
    fails = ToolCheck("c++", "Inductor on the CPU", False, "g++ is not on PATH", "install a C++ compiler")
    monkeypatch.setattr(doctor_toolchain, "check_cpp_compiler", lambda: fails)
    (problem,) = diagnose().problems
    assert (problem.severity, problem.fix) == ("error", "install a C++ compiler")
    plug_in(monkeypatch, "nvidia")
    (problem,) = diagnose().problems
    assert problem.severity == "warning"  # graphs for the card do not need it


def test_the_interpreter_is_a_warning(installed, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = diagnose()
    assert [problem.severity for problem in found.problems] == ["warning"] and found.exit_status == 0


# Compilers


def test_a_working_cpp_compiler_passes():
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    check = check_cpp_compiler()
    assert check.ok, check.detail
    assert check.detail == shutil.which("g++")


def test_a_missing_cpp_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check = check_cpp_compiler()
    assert not check.ok and "no-such-compiler" in check.detail and "apt-get install g++" in check.fix


@pytest.mark.parametrize(
    ("script", "detail", "fix"),
    [
        ("echo 'x.cpp:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1", "Python.h", "python3-dev"),
        ("echo 'noise' >&2; echo 'ld: error: cannot find -lgomp' >&2; exit 1", "cannot find -lgomp", "install g++"),
        ("exit 3", "ended with 3", "install g++"),
    ],
)
def test_a_broken_cpp_compiler_gets_its_own_fix(monkeypatch, tmp_path, script, detail, fix):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    check = check_cpp_compiler()
    assert not check.ok and detail in check.detail and fix in check.fix


def test_a_compiler_that_hangs_is_given_up(monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(doctor_toolchain.subprocess, "run", hang)
    monkeypatch.setenv("CXX", sys.executable)
    check = check_cpp_compiler()
    assert not check.ok and "TimeoutExpired" in check.detail


@pytest.mark.parametrize(
    ("vendor", "arch"), [("nvidia", "sm_90"), ("nvidia", "sm_120"), ("amd", "gfx942"), ("amd", "gfx1100")]
)
def test_triton_compiles_for_cards_that_are_not_here(monkeypatch, tmp_path, vendor, arch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check = check_triton(Target(vendor, "cuda", arch, features=frozenset({"triton"})))
    assert check.ok, check.detail
    assert arch in check.detail


def test_triton_failing_is_reported_without_noise(monkeypatch, capsys):
    triton_trial = pytest.importorskip("vbcompile.triton_trial")

    def fail(target):
        print("pages of assembly")
        raise RuntimeError("ptxas failed\n\nwith this\nreason\nand more")

    monkeypatch.setattr(triton_trial, "compile_trial", fail)
    check = check_triton(Target("nvidia", "cuda", "sm_90", "H100", features=frozenset({"triton"})))
    assert not check.ok and check.detail == "RuntimeError: ptxas failed | with this | reason" and check.fix
    assert "H100" in check.purpose
    assert capsys.readouterr().out == ""


def test_triton_is_not_asked_where_it_is_not_used():
    assert check_triton(Target("cpu", "cpu", "cpu")) is None
    assert check_triton(Target("habana", "hpu", "gaudi2")) is None
    assert check_triton_launcher(Target("cpu", "cpu", "cpu")) is None


def test_a_missing_triton_names_the_package():
    check = check_triton(Target("intel", "xpu", "bmg"))
    assert not check.ok and "pytorch-triton-xpu" in check.fix


def test_a_launcher_without_a_card_is_reported(monkeypatch):
    triton_trial = pytest.importorskip("vbcompile.triton_trial")

    def fail():
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(triton_trial, "current_target", fail)
    check = check_triton_launcher(Target("nvidia", "cuda", "sm_90", features=frozenset({"triton"})))
    assert not check.ok and "0 active drivers" in check.detail and "python3-dev" in check.fix
    monkeypatch.setattr(triton_trial, "current_target", lambda: SimpleNamespace(arch=90))
    assert check_triton_launcher(Target("nvidia", "cuda", "sm_90", features=frozenset({"triton"}))).ok


def test_the_kernel_matrix_comes_from_the_registry():
    found = diagnose()
    assert {"attention"} <= {row.operator for row in found.kernels}
    assert any(row.reason == "" for row in found.kernels if row.operator == "attention")
    assert not any("list_kernels" in problem.what for problem in found.problems)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD card")
def test_on_a_real_card(monkeypatch):
    monkeypatch.undo()
    forget_devices()
    found = diagnose()
    card = found.devices[0]
    assert card.device == "cuda:0" and card.driver and card.memory_gb > 1
    assert all(tool.ok for tool in found.tools), found.tools
    assert len([tool for tool in found.tools if tool.tool == "triton"]) == 2
    assert any(row.arch == card.arch and not row.reason for row in found.kernels)
    assert device_vendors.probe("cuda").ready
