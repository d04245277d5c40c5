"""The process-wide switch: unchanged models are compiled, and everything can be undone."""

import copy
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from fake_devices import make_bare, plug_in
from torch import nn

import vbcompile as vb
from vbcompile.device import forget_devices
from vbcompile.global_switch import _switch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture(autouse=True)
def off():
    torch._dynamo.reset()
    yield
    vb.disable()


def graphs_of(call):
    before = _switch.graphs
    call()
    return _switch.graphs - before


def enable(**options):
    vb.enable(verbose=False, downstream="aot_eager", **options)


def train(model, steps=8):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 768, generator=generator), torch.randn(32, 768, generator=generator)
    optimizer, criterion, losses = torch.optim.Adam(model.parameters(), lr=1e-3), nn.MSELoss(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_contract_training_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768))
    twin = copy.deepcopy(model)
    want = train(model)
    before = _switch.graphs
    vb.enable_balanced_mode()
    got = train(twin)
    assert _switch.graphs - before == 1
    assert got[-1] < 0.5 * got[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "mode"),
    [
        (vb.enable_balanced_mode, "balanced"),
        (vb.enable_memory_mode, "memory"),
        (vb.enable_speed_mode, "speed"),
        (vb.enable_full_optimization, "full"),
    ],
)
def test_every_enable_function_sets_its_mode(function, mode, capsys):
    function()
    assert vb.is_enabled() and _switch.config.mode == mode
    assert f"mode {mode}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [({"mode": "balanced"}, True), ({}, False), ({"mode": "memory", "mixed_precision": False}, False)],
)
def test_mixed_precision_is_announced_where_it_is_on(options, says, monkeypatch, capsys):
    monkeypatch.delenv("VB_MODE", raising=False)
    make_bare(monkeypatch)
    vb.enable(**options)
    assert "bfloat16" not in capsys.readouterr().out  # on the CPU never by a mode
    plug_in(monkeypatch, "nvidia")
    vb.enable(**options)
    assert ("bfloat16 products" in capsys.readouterr().out) == says
    vb.disable()
    forget_devices()


@pytest.mark.parametrize("make", [Net, lambda: nn.Linear(8, 8), lambda: nn.Sequential(nn.Linear(8, 8))])
def test_outermost_module_is_compiled_once(make):
    model, x = make(), torch.randn(4, 8)
    want = model(x)
    enable()
    assert graphs_of(lambda: torch.testing.assert_close(model(x), want)) == 1
    assert graphs_of(lambda: model(x)) == 0


def test_more_modules_than_the_recompile_limit():
    enable()
    x = torch.randn(4, 8)
    assert graphs_of(lambda: [nn.Linear(8, 8)(x) for _ in range(12)]) == 12


def test_disable_restores_everything():
    model, x = Net(), torch.randn(4, 8)
    enable()
    enable(mode="memory")
    vb.disable()
    vb.disable()
    assert torch.nn.Module.__dict__["_compiled_call_impl"] is None and not vb.is_enabled()
    assert graphs_of(lambda: model(x)) == 0


def test_what_is_left_alone():
    enable()
    x = torch.randn(4, 8)
    scripted = torch.jit.script(nn.Linear(8, 8))
    other = torch.compile(Net(), backend="eager")
    own = Net()
    own.compile(backend="eager")
    loss = nn.MSELoss()
    assert graphs_of(lambda: (scripted(x), other(x), own(x), loss(x, x))) == 0
    torch.jit.trace(Net(), x)
    torch.fx.symbolic_trace(Net())
    torch.export.export(Net(), (x,))


def test_hooks_copies_pickles_and_collection():
    enable()
    model, x = Net(), torch.randn(4, 8)
    want = model.second(model.first(x))
    handle = model.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(model(x), want + 1)
    handle.remove()
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), want)
    linear = nn.Linear(8, 8)
    linear(x)
    alive = weakref.ref(linear)
    del linear
    torch._dynamo.reset()
    assert alive() is None


def test_unknown_mode_changes_nothing():
    with pytest.raises(vb.ConfigError, match="valid: balanced"):
        vb.enable("fast")
    assert not vb.is_enabled()


def test_print_stats_names_the_graphs(capsys):
    enable()
    Net()(torch.randn(4, 8))
    vb.print_stats()
    assert "graphs compiled" in capsys.readouterr().out
    vb.disable()
    vb.print_stats()
    assert "vblackwell: off" in capsys.readouterr().out


_SCRIPT = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))  # nothing for a C++ compiler
print(sys.argv[1:], tuple(model(torch.randn(4, 8)).shape))
print("backend loaded:", "vbcompile.backend" in sys.modules, torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.parametrize(
    ("command", "variables", "expected"),
    [
        (["-m", "vbcompile", "run"], {}, "True 1"),
        pytest.param(
            ["-m", "vbcompile", "run"],
            {"ENABLE_VIRTUAL_BLACKWELL": "1", "VB_MODE": "memory"},
            "True 1",
            marks=pytest.mark.matrix,
        ),
        ([], {"ENABLE_VIRTUAL_BLACKWELL": "1", "VB_MODE": "balanced"}, "True 1"),
        ([], {"ENABLE_VIRTUAL_BLACKWELL": "0"}, "False 0"),
    ],
)
def test_unchanged_script(tmp_path, warm_python, command, variables, expected):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    words = [*command, str(script), "--epochs", "3"]
    if variables:  # read when PyTorch is imported
        environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    else:
        done = warm_python.run(words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['--epochs', '3'] (4, 8)", f"backend loaded: {expected}"]


def test_a_wrong_variable_is_an_error_that_names_it():
    environment = {**os.environ, "ENABLE_VIRTUAL_BLACKWELL": "maybe"}
    done = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("vbcompile: environment variable ENABLE_VIRTUAL_BLACKWELL='maybe'")


def test_sites_of_pytorchs_own_layers_are_named_by_module():
    enable()
    nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)(torch.randn(1, 4, 16))
    assert [d.site for d in _switch.reports[-1].decisions] == ["self_attn"]
