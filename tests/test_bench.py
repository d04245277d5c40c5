"""``vbcompile bench``: small cases measured, wrong results flagged, tables and plots from the JSON."""

import json

import pytest
import torch

from vbcompile import bench, bench_cases, bench_models
from vbcompile.__main__ import main
from vbcompile.bench import Result, Row, load
from vbcompile.bench_cases import Case, attention_case, copy_case, linear_case, quantize_case
from vbcompile.bench_peers import Peer, prepared
from vbcompile.bench_report import report

CPU = torch.device("cpu")


def small_cases(device, quick):
    return [
        lambda: attention_case(device, torch.float32, (1, 2, 48, 16), causal=True),
        lambda: quantize_case(device, 64, 256),
    ]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "makers", small_cases)
    monkeypatch.setattr(bench, "_PRODUCT", {"cpu": 64})
    monkeypatch.setitem(bench_cases._COPY_BYTES, "cpu", 2**16)


def test_a_run_from_the_command_line(small, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "--quick", "--out", str(out)]) == 0
    assert "attention" in capsys.readouterr().out
    result = load(out.read_text())
    attention, quantise = result.rows
    assert set(attention.times) == {"vblackwell", "sdpa", "eager"} and attention.implementation.startswith("cpu_flash")
    assert all(t > 0 for row in result.rows for t in row.times.values())
    assert 0 < attention.error <= attention.allowed and 0.07 < quantise.error <= quantise.allowed
    assert result.environment["torch"] == torch.__version__
    assert main(["bench", "report", str(out), "--out", str(tmp_path / "report")]) == 0
    files = {path.name: path for path in (tmp_path / "report").iterdir()}
    assert set(files) == {"bench.md", "speedup.png", "roofline.png"}
    assert files["roofline.png"].read_bytes().startswith(b"\x89PNG") and "attention" in files["bench.md"].read_text()


def test_a_wrong_result_fails_the_run(monkeypatch, small, capsys):
    wrong = Case("wrong", {"vblackwell": [lambda: None]}, 1.0, 1.0, 0.5, 0.1)
    monkeypatch.setattr(bench, "makers", lambda device, quick: [lambda: wrong])
    assert main(["bench"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_linear_case_is_checked_against_the_decoded_weights():
    with torch.no_grad():
        case = linear_case(CPU, torch.float32, 3, 128, 512)
        assert case.error <= case.allowed and set(case.runs) == {"vblackwell", "eager"}
        assert len(case.runs["vblackwell"]) == len(case.runs["eager"]) == 4


def test_a_model_beyond_its_budget_beside_accelerate():
    pytest.importorskip("accelerate")
    with torch.no_grad():
        case = bench_models.offloaded_case(CPU, 2, "1200KB", 256, "64KiB")
        assert set(case.runs) == {"vblackwell", "accelerate"} and not case.absent
        assert 0 < case.error <= case.allowed and case.over_link and not case.graphs
        assert "cpu: " in case.implementation  # weights stream
        assert case.memory[0][0] < case.memory[-1][0] and 0 < max(size for _, size in case.memory) <= 1_200_000


def test_a_model_whose_package_is_missing_says_so(monkeypatch, small, tmp_path, capsys):
    monkeypatch.setattr(bench_models.bench_peers, "missing", lambda package: f"{package} is not installed")
    cases = [lambda: bench_models.diffusion_case(CPU, 2, 16, 1, 16), lambda: copy_case(CPU)]
    monkeypatch.setattr(bench, "makers", lambda device, quick: cases)
    out = tmp_path / "bench.json"
    assert main(["bench", "--out", str(out)]) == 0
    assert "FLUX" in capsys.readouterr().out and "diffusers" in load(out.read_text()).rows[0].absent
    assert main(["bench", "report", str(out), "--out", str(tmp_path)]) == 0
    assert "diffusers is not installed" in (tmp_path / "bench.md").read_text()


def test_peers_that_cannot_run_say_why():
    def broken(weight):
        raise RuntimeError("no kernel for this card\nmore lines")

    peers = {
        "right": Peer("", lambda weight: lambda x: x @ weight.T),
        "wrong": Peer("", lambda weight: lambda x: 2 * (x @ weight.T)),
        "broken": Peer("", broken),
        "elsewhere": Peer("no_such_package", broken),
    }
    weight, x = torch.randn(8, 16), torch.randn(3, 16)
    error = lambda run: float((run(x) - x @ weight.T).norm() / (x @ weight.T).norm())
    working, absent = prepared(peers, weight, error, 0.1)
    assert set(working) == {"right"}
    assert absent == {
        "wrong": "its relative error is 1",
        "broken": "RuntimeError: no kernel for this card",
        "elsewhere": "no_such_package is not installed",
    }
    row = Row("a", {"vblackwell": 1.0}, 0.5, 0.5, 0.1, 0.2, "triton", absent)
    table = Result({"device": "x"}, [row]).__rich__()
    assert "no broken: RuntimeError: no kernel for this card" in str(table.columns[2]._cells)


def test_floor_counts_bytes_and_operations():
    case = copy_case(CPU)
    row = bench._measure(case, CPU, bandwidth=1e9, rate=1e30, rounds=3)
    assert row.floor == pytest.approx(case.nbytes / 1e9 * 1e6)
    heavy = Case("heavy", case.runs, 1e9, 1.0)
    assert bench._measure(heavy, CPU, 1e30, 1e12, 3).floor == pytest.approx(1e3)


def test_usage_errors(tmp_path, capsys):
    assert main(["bench", "report"]) == 2
    assert main(["bench", "report", str(tmp_path / "none.json")]) == 2
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    assert main(["bench", "report", str(tmp_path / "other.json")]) == 2
    (tmp_path / "none.txt").write_text("none")
    assert main(["bench", "report", str(tmp_path / "none.txt")]) == 2
    assert "none.txt is no result of `vbcompile bench --out`: Expecting value" in capsys.readouterr().err
    assert main(["bench", "--device", "cuda:99"]) == 2
    assert "vbcompile:" in capsys.readouterr().err


def test_json_round_trip(tmp_path):
    row = Row("a", {"vblackwell": 1.0}, 0.5, 0.5, 0.1, 0.2, "triton", memory=[[0, 10**9], [10**6, 2 * 10**9]])
    result = Result({"device": "x"}, [row])
    assert load(result.to_json()) == result and result.right
    (tmp_path / "bench.json").write_text(result.to_json())
    assert [path.name for path in report(tmp_path / "bench.json", tmp_path)][-1] == "memory.png"
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
