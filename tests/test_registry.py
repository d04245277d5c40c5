"""The registry: what users force, what other packages add, and the matrix for devices that are not here."""

import json
import logging
from importlib import metadata

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import vbcompile
from vbcompile.__main__ import main
from vbcompile.config_error import ConfigError
from vbcompile.device import DeviceError, get_target
from vbcompile.device_catalog import ARCHITECTURES, catalog_target
from vbcompile.doctor import list_kernels
from vbcompile.kernels import registry
from vbcompile.kernels.registry import Implementation, always, force, operator, parse_forced


def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.125, -1) @ v


def heads():
    return [torch.randn(2, 4, 16, 64) for _ in range(3)]


def test_a_forced_implementation_runs():
    inputs = heads()
    want = attention(*inputs)
    run = torch.compile(attention, backend="vblackwell", options={"downstream": "eager"})
    with force(attention="reference"):
        explained = vbcompile.explain(attention, *inputs).reports[0].decisions[0].implementation
        torch.testing.assert_close(run(*inputs), want)
    assert explained.startswith("reference (not ") and "another was asked for" in explained
    torch.testing.assert_close(run(*inputs), want)
    assert vbcompile.explain(attention, *inputs).reports[0].decisions[0].implementation.startswith("cpu_flash")


@pytest.mark.parametrize("compiled", [False, True])
def test_forcing_what_cannot_run_says_why(fresh_dynamo, compiled):
    run = torch.compile(attention, backend="vblackwell", options={"downstream": "eager"})
    error: type[Exception] = BackendCompilerFailed
    if compiled:
        run(*heads())
        error = ConfigError
    with force(attention="hopper"), pytest.raises(error, match=r"hopper.*refuses.*Hopper"):
        run(*heads())
    with force(attention="quick"), pytest.raises(error, match=r"has no implementation .quick.; valid: reference"):
        run(*heads())
    with pytest.raises(KeyError, match="unknown operator"), force(attentoin="reference"):
        pass


def test_the_environment_forces():
    assert parse_forced({}) == {}
    assert parse_forced({"VB_IMPLEMENTATION": "attention=triton, fp4_linear=reference"}) == {
        "attention": "triton",
        "fp4_linear": "reference",
    }
    for wrong in ("triton", "attention=", "attentoin=triton"):
        with pytest.raises(ConfigError, match="OPERATOR=IMPLEMENTATION; valid: attention="):
            parse_forced({"VB_IMPLEMENTATION": wrong})


@pytest.fixture
def own_implementations():
    """Everything that a test registers is gone afterwards."""
    op = operator("attention")
    op.load()
    before = list(op.implementations)
    yield op
    op.implementations[:] = before
    registry.forget_choices()


def test_another_package_adds_an_implementation(own_implementations, monkeypatch):
    def add():
        refuses = lambda target, case: None if target.vendor == "cpu" else "made for processors"
        run = lambda q, *rest: own_implementations.implementations[0].run(q, *rest)
        own_implementations.register(Implementation("theirs", run, refuses, always(1e-9)))

    def broken():
        raise OSError("no such library")

    entries = [type("Entry", (), {"value": f.__name__, "load": lambda self, f=f: f})() for f in (add, broken)]
    registry._load_third_parties.cache_clear()
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries)
    messages = []
    monkeypatch.setattr(logging.getLogger("vbcompile.kernels.registry"), "warning", lambda *a: messages.append(a))
    decision = vbcompile.explain(attention, *heads()).reports[0].decisions[0]
    assert decision.implementation.startswith("theirs")
    assert "no such library" in str(messages)


def test_a_name_is_taken_once(own_implementations):
    with pytest.raises(ValueError, match="already has an implementation 'reference'"):
        own_implementations.register(own_implementations.implementations[0])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_catalogued_device_has_an_attention_and_an_fp4_kernel_or_a_reason(arch):
    target = catalog_target(arch)
    rows = list_kernels([arch])
    assert {row.operator for row in rows} == set(registry.MODULES)
    for row in rows:
        assert row.arch == target.arch
        assert not row.reason or len(row.reason) > 8
    assert all(any(r.operator == name and not r.reason for r in rows) for name in registry.MODULES)


def test_the_catalogue_agrees_with_detection():
    here = get_target("cpu")
    assert catalog_target("CPU").features == here.features
    assert catalog_target("sm_90").features == {"bf16", "fp8", "tma", "fp64", "triton"}
    assert "fp4" in catalog_target("gfx950").features and "fp4" not in catalog_target("gfx942").features
    with pytest.raises(DeviceError, match=r"unknown architecture 'sm90'; known: sm_80.*did you mean sm_90"):
        catalog_target("sm90")


def test_the_matrix_from_the_command_line(capsys):
    assert main(["doctor", "--kernels", "--device", "gfx942", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["arch"] for row in rows} == {"gfx942", "cpu"}
    assert next(r for r in rows if r["arch"] == "gfx942" and r["implementation"] == "triton")["reason"] == ""
    assert main(["doctor", "--kernels"]) == 0
    assert "attention" in capsys.readouterr().out
    assert main(["doctor", "--device", "gfx9"]) == 2
    assert "unknown architecture" in capsys.readouterr().err


def test_explaining_for_a_device_that_is_not_here(tmp_path, capsys):
    path = tmp_path / "model.py"
    path.write_text(
        "import torch\ndef f(q, k, v):\n    return torch.softmax(q @ k.mT * 0.125, -1) @ v\n"
        "def make():\n    return f, [torch.randn(2, 4, 128, 64, dtype=torch.bfloat16) for _ in range(3)]\n"
    )
    for arch, chosen in (("sm_90", "hopper"), ("gfx942", "triton")):
        assert main(["explain", f"{path}:make", "--as", arch, "--json"]) == 0
        (graph,) = json.loads(capsys.readouterr().out)["graphs"]
        assert arch in graph["target"] and graph["decisions"][0]["implementation"].startswith(chosen)
    assert main(["explain", f"{path}:make", "--as", "nothing"]) == 2
    assert main(["explain", str(path), "--as", "gfx942"]) == 2
