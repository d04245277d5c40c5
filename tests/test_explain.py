"""``explain`` and the command line."""

import json
import sys

import pytest
import torch

import vbcompile
from vbcompile.__main__ import main
from vbcompile.config_error import ConfigError
from vbcompile.vgpu import VGPUStack

_MODEL = """
import torch
def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.125, -1) @ v
def returns_weights(q, k, v):
    p = torch.softmax(q @ k.transpose(-2, -1) * 0.125, -1)
    return p @ v, p
class Layer(torch.nn.Module):
    def forward(self, x):
        return attention(x, x, x)
def make_module():
    frozen = torch.nn.Linear(64, 1024).requires_grad_(False)
    return torch.nn.Sequential(Layer(), torch.nn.Linear(64, 64), frozen), (torch.randn(1, 1, 16, 64),)
def make():
    return attention, [torch.randn(2, 4, 16, 64) for _ in range(3)]
def make_by_name():
    return attention, dict(zip("qkv", make()[1]))
def wrong():
    return 3
if __name__ == "__main__":
    print(torch.nn.Linear(4, 4)(torch.randn(2, 4)).shape)
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(_MODEL)
    return path


@pytest.fixture
def functions():
    namespace: dict = {}
    exec(_MODEL, namespace)
    return namespace


def test_explanation_tells_what_became_what(functions):
    q, k, v = (torch.randn(2, 4, 16, 64) for _ in range(3))
    explanation = vbcompile.explain(functions["attention"], q, k, v)
    (report,) = explanation.reports
    (decision,) = [d for d in report.decisions if d.pass_name == "attention"]
    assert decision.action == "rewritten" and "cpu_flash" in decision.implementation
    assert explanation.counts() == {"attention": {"rewritten": 1}}
    assert json.loads(explanation.to_json())["counts"] == explanation.counts()
    assert "cpu_flash" in str(explanation).replace("\n", "")


def test_explanation_gives_the_reason_of_a_refusal(functions):
    q, k, v = (torch.randn(2, 4, 16, 64) for _ in range(3))
    explanation = vbcompile.explain(functions["returns_weights"], q, k, v)
    (decision,) = [d for d in explanation.reports[0].decisions if d.pass_name == "attention"]
    assert decision.action == "left" and decision.reason


def test_a_model_whose_forward_was_compiled_is_explained(functions):
    model, inputs = functions["make_module"]()
    inner = model.forward = torch.compile(model.forward, backend="vblackwell", options={"downstream": "eager"})
    for _ in range(2):  # before its first call, and behind it
        (report,) = vbcompile.explain(model, *inputs, mode="speed").reports
        assert report.mode == "speed" and report.count("rewritten", "fp4") == 1
        assert {d.site.split(" ")[0] for d in report.decisions} == {"0", "1", "2"}
        assert model.forward is inner
        model(*inputs)


def test_explaining_twice_and_while_compiled(functions):
    q, k, v = (torch.randn(2, 4, 16, 64) for _ in range(3))
    run = torch.compile(functions["attention"], backend="vblackwell")
    want = run(q, k, v)
    for _ in range(12):
        assert vbcompile.explain(functions["attention"], q, k, v).counts()["attention"]["rewritten"] == 1
    torch.testing.assert_close(run(q, k, v), want)


def test_wrong_arguments_are_named_without_a_compiler_around_them():
    with pytest.raises(ConfigError, match="did you mean 'speed'"):
        vbcompile.explain(torch.sin, torch.ones(2), mode="sped")
    with pytest.raises(TypeError, match=r"explain takes a torch\.nn\.Module or a function and its inputs, not int"):
        vbcompile.explain(3)


def test_what_is_saved_for_the_backward_is_explained(monkeypatch, model_file, capsys):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    counts = vbcompile.explain(model, torch.randn(32, 64), mode="memory").counts()
    assert counts["activations"] == {"left": 1} and counts["recompute"]["left"] >= 1
    with pytest.raises(vbcompile.PlanError, match="smallest budget that works"):
        vbcompile.explain(model, torch.randn(32, 64), options={"mode": "memory", "budget": "1KB"})
    monkeypatch.setenv("VB_HBM_BUDGET", "1KB")
    assert main(["explain", f"{model_file}:make_module", "--mode", "memory"]) == 1
    assert capsys.readouterr().err.startswith("vbcompile: the activation budget")


def test_explain_a_function_from_a_file(model_file, capsys):
    assert main(["explain", f"{model_file}:make", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"attention": {"rewritten": 1}}


def test_inputs_may_be_a_dictionary_alone(model_file, capsys):
    """As tokenizers return them."""
    assert main(["explain", f"{model_file}:make_by_name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"attention": {"rewritten": 1}}


def test_explain_modules_from_a_file(model_file, capsys, monkeypatch):
    """Their functions read the file's globals, which Dynamo finds by the name of the file's module."""
    monkeypatch.setitem(sys.modules, "model", sys)  # another one of that name
    arguments = [f"{model_file}:make_module", "--json", "--mode", "speed", "--as", "sm_90"]
    assert main(["explain", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)["graphs"][0]["decisions"]
    assert [(d["pass_name"], d["action"]) for d in found] == [
        ("attention", "rewritten"), ("mixed_precision", "rewritten"), ("fp4", "left"), ("fp4", "rewritten")
    ]  # fmt: skip
    assert not any("float32" in d["implementation"] for d in found)  # no refusal of it: products run in bfloat16


def test_explain_a_script(model_file, warm_python):
    done = warm_python.run(["-m", "vbcompile", "explain", str(model_file)])
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 4])" in done.stdout and "graph 0/0" in done.stdout


@pytest.mark.parametrize("status", [0, 3])
def test_a_script_that_ends_itself_is_explained(status, tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text(f"import sys, torch\ntorch.nn.Linear(4, 4)(torch.randn(2, 4))\nsys.exit({status})\n")
    try:
        assert main(["explain", str(path)]) == bool(status)
    finally:
        vbcompile.disable()
    shown = capsys.readouterr()
    assert "nodes, mode balanced" in shown.out and ("ended with status 3" in shown.err) == bool(status)


@pytest.mark.parametrize(
    "target", ["nothing.py:make", "no.such.module:make", "{file}:nothing", "{file}:wrong", "no.py"]
)
def test_wrong_targets_are_usage_errors(target, model_file, capsys):
    assert main(["explain", target.format(file=model_file)]) == 2
    assert "vbcompile:" in capsys.readouterr().err


def test_run_of_a_missing_script(capsys):
    assert main(["run", "missing.py"]) == 2
    vbcompile.disable()
    assert "no such file" in capsys.readouterr().err


def test_doctor(capsys):
    status = main(["doctor", "--json"])
    diagnosis = json.loads(capsys.readouterr().out)
    assert status == diagnosis["exit_status"]
    assert any("attention" in json.dumps(kernel) for kernel in diagnosis["kernels"])


_PLANNED = """
import torch
def make():
    return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8))), [torch.randn(4, 512)]
"""


def test_plan(tmp_path, capsys, monkeypatch):
    path = tmp_path / "planned.py"
    path.write_text(_PLANNED)
    assert main(["plan", f"{path}:make", "--budget", "4MiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    measured = []
    monkeypatch.setattr(VGPUStack, "calibrate", lambda stack: measured.append(stack))
    assert main(["plan", f"{path}:make", "--measure"]) == 0
    assert measured and "plan --measure" in capsys.readouterr().out  # nothing came of it here
    assert main(["plan", f"{path}:make", "--budget", "1KiB"]) == 1
    assert "smallest" in capsys.readouterr().err
    assert main(["plan", f"{path}:make", "--budget", "much"]) == 2
    assert main(["plan", str(path)]) == 2


_FUNCTIONS = """
import torch
def make():
    return torch.nn.Linear(64, 64), (torch.randn(2, 64),)
def number():
    return 5, (torch.randn(2, 64),)
def narrow():
    return torch.nn.Linear(64, 64), (torch.randn(2, 3),)
def wants(x):
    return number()
layer = torch.nn.Linear(64, 64)
"""


@pytest.mark.parametrize(
    "command, variables, message",
    [
        ("explain f.py:make --mode fast", {}, "unknown mode 'fast'"),
        ("explain f.py:make", {"VB_MODE": "fast"}, "unknown mode 'fast'"),
        ("explain f.py:make", {"VB_HBM_BUDGET": "lots"}, "not an amount of memory"),
        ("explain f.py:make", {"VB_IMPLEMENTATION": "garbage"}, "not OPERATOR=IMPLEMENTATION"),
        ("explain f.py:make --html none/page.html", {}, "no such folder"),
        ("explain f.py:make --htlm page.html", {}, "unrecognized arguments: --htlm page.html"),
        ("explain f.py:number", {}, "must return a model first, not int"),
        ("explain f.py:wants", {}, "wants is called without arguments: missing a required argument: 'x'"),
        ("explain f.py:layer", {}, "layer must be a function that returns (model, inputs), not the model"),
        ("explain f.py:make", {"VB_IMPLEMENTATION": "attention=tritn"}, "did you mean 'triton'?"),
        ("explain broken.py:make", {}, "broken.py, line 1"),
        ("explain absent.py:make", {}, "No module named 'nothing_of_this_name'"),
        ("run f.py", {"VB_MODE": "fast"}, "unknown mode 'fast'"),
        ("run f.py", {"ENABLE_VIRTUAL_BLACKWELL": "perhaps"}, "valid values are"),
        ("plan f.py:number", {}, "first, not int"),
        ("plan f.py:narrow", {}, "cannot be traced"),
        ("plan f.py:make --weight-bits -3", {}, "weight_bits must be positive"),
        ("plan f.py:make --html none/page.html", {}, "no such folder"),
        ("tune --shape 64x64 --rows 0", {}, "numbers from 1"),
        ("calibrate f.py:make --out packed.bin", {}, "must end in .safetensors"),
        ("calibrate f.py:make --out none/packed.safetensors", {}, "no such folder"),
        ("calibrate f.py:make --out packed.safetensors --tokens 0", {}, "numbers from 1"),
        ("calibrate f.py:number --out packed.safetensors", {}, "first, not int"),
        ("bench --device nope", {}, "unknown device 'nope'"),
        ("bench --quick --out none/result.json", {}, "no such folder"),
        ("bench --quick --out .", {}, "this is a folder"),
        ("explain f.py:make --html .", {}, "this is a folder"),
    ],
)
def test_wrong_usage_is_one_line(command, variables, message, tmp_path, monkeypatch, capsys):
    for name, text in {"f.py": _FUNCTIONS, "broken.py": "def (", "absent.py": "import nothing_of_this_name"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vbcompile: ") and message in line


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"vbcompile {vbcompile.__version__}\n"


def test_no_command_is_a_usage_error():
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
