"""The contract's list on a simulated Ascend machine with two cards, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vbcompile.config import FP4_ACTIVATIONS

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def answers():
    places = [str(TESTS), str(TESTS.parent), *sys.path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(places),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "vendors.session"]
    done = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr}


def test_detection(answers):
    found = answers["devices"]
    assert (found["best"], found["arch"]) == ("npu", "Ascend950PR_9589")
    assert found["info"]["npu_available"] and found["info"]["vendor"] == "huawei" and found["info"]["device_count"] == 2


def test_adapter(answers):
    found = answers["devices"]
    assert found["place"] == "npu:1" and found["held"] == 4 << 18 and found["released"] == 0
    assert found["beyond"] == "no device npu:2; valid devices: npu:0, npu:1, cpu"
    assert found["wrong_place"] == ["2 of 2 tensors are on cpu, not npu (first: weight): call model.to('npu')"]


def test_manager(answers):
    assert answers["devices"]["all"] == ["npu:0", "npu:1", "cpu"]
    assert answers["devices"]["summary"]["npu_devices"] == 2


def test_levels(answers):
    levels = [level["device"] for level in answers["devices"]["levels"]]
    assert levels[:3] == ["npu:0", "npu:1", "cpu"]


def test_training_of_the_contracts_model(answers):
    found, expected = answers["training"]["losses"], answers["training"]["expected"]
    assert found[-1] < 0.7 * found[0]
    assert found == pytest.approx(expected, rel=0.02) and found != expected  # mixed precision: bfloat16 products


def test_a_block_under_the_backend(answers):
    found = answers["compiled"]
    assert found["inference"] < 1e-5 and found["training"] < 1e-5 and found["gradient"] < 1e-4
    inference, training = found["calls"]
    assert inference == ["npu_fusion_attention"]
    assert training[:2] == ["npu_fusion_attention", "npu_fusion_attention_grad"]
    assert found["decisions"][0].startswith("npu_fusion")
    assert (
        "graphs go to aot_eager (torch-npu (no version known) registered no compiler, and Inductor has none for Ascend)"
        in answers["log"]
    )
    assert "undone" not in answers["log"]


def test_four_bits(answers):
    rounded = ["npu_dynamic_mx_quant", "npu_quant_matmul"] * 2 * (len(FP4_ACTIVATIONS) - 1)
    assert answers["four_bits"]["calls"] == ["npu_weight_quant_batchmatmul"] * 2 + rounded
    assert answers["four_bits"]["error"] < 0.3


def test_two_cards(answers):
    assert answers["two_cards"]["error"] < 1e-5 and answers["two_cards"]["place"] == "npu:0"
