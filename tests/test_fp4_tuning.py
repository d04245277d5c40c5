"""Tables of measured times: which row counts, whose goes first, broken files; the command that writes them."""

import json
import logging
import math
from importlib import resources

import pytest
import torch
from torch import nn

from vbcompile import tune
from vbcompile.__main__ import main
from vbcompile.device import Target
from vbcompile.kernels import fp4_linear_few, fp4_linear_hopper, fp4_linear_triton, fp4_tuning
from vbcompile.kernels.fp4_linear import choose, make_case
from vbcompile.kernels.registry import operator

HOPPER = Target("nvidia", "cuda", "sm_90", multiprocessors=132, features=frozenset({"triton", "bf16", "fp8"}))
SHAPE = (640, 1920)  # in no table


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fp4_tuning.forget()
    yield tmp_path / "vbcompile" / "fp4_linear.json"
    fp4_tuning.forget()


def write(times, m=16, dense=10.0, shape=SHAPE):
    fp4_tuning.write_user_table("sm_90", "a card", [["nvfp4", *shape, m, dense, times]])


def chosen(m, activations="same", shape=SHAPE):
    case = make_case(torch.bfloat16, m, *shape, "nvfp4", "fragments2t", activations)
    return choose(HOPPER, case).implementation.name


def test_of_every_shape_in_the_shipped_table_the_fastest_runs():
    """An implementation that the table leaves out was slower, whatever its estimate."""
    table = json.loads(resources.files("vbcompile.kernels").joinpath("tuned/fp4_linear.json").read_text())["sm_90"]
    for format_name, n, k, m, _, times in table["rows"]:
        case = make_case(torch.bfloat16, m, n, k, format_name, "fragments2t", "same")
        allowed = {i.name: i for i in operator("fp4_linear").implementations if not i.refuses(HOPPER, case)}
        fastest = min((name for name in times if name in allowed), key=lambda name: times[name][0])
        assert choose(HOPPER, case).implementation.name == fastest, (format_name, n, k, m)


def test_the_fastest_measured_one_runs_as_it_was_measured():
    write({"triton": [3.0, [16, 1, 2, 3, 4, 2]], "triton_few": [4.0, [1, 8, 2, None]], "triton_dequantize": [20, None]})
    assert chosen(16) == "triton"
    assert chosen(3) == "triton"  # counts of rows between two stand for the larger
    assert chosen(1) == "triton_diagonal"  # but not for one that is far larger
    assert chosen(1 << 20) in ("hopper", "triton_dequantize")  # beyond the table, by estimate
    config = fp4_linear_triton.tile_config(HOPPER, 16, *SHAPE)
    assert config == fp4_linear_triton.TileConfig(16, 1, 2, 3, 4, 2)
    assert fp4_linear_few.few_config(HOPPER, 4, *SHAPE) == fp4_linear_few.FewConfig(1, 8, 2)
    write({"triton_few": [2.0, [2, 4, 2, None]]})
    assert chosen(16) == "triton_few"


def test_fp8_is_measured_and_still_has_to_be_asked_for():
    write({"triton_fp8": [1.0, None], "triton": [3.0, [64, 1, 2, 3, 4, 2]]}, m=64)
    assert (chosen(64), chosen(64, "fp8")) == ("triton", "triton_fp8")


def test_kernels_that_a_table_does_not_know_keep_what_the_shipped_one_says_or_their_estimate():
    shape, shipped = (4096, 4096), fp4_tuning.lookup("sm_90", "nvfp4", 4096, 4096, 16)
    assert shipped is not None and "triton_stream" in shipped.times
    cost = lambda name: fp4_tuning.relative_cost(HOPPER, name, "nvfp4", *shape, 16)
    before = cost("triton_stream")
    write({"triton": [300.0, None]}, dense=10 * shipped.dense, shape=shape)
    assert cost("triton_stream") == pytest.approx(before) and cost("triton") == pytest.approx(30.0 / shipped.dense)
    assert chosen(16, shape=shape) != "triton"
    write({"triton": [9.0, None], "triton_few": [math.inf, None]})  # in no other table
    assert cost("triton_stream") is not None and math.isinf(
        fp4_tuning.relative_cost(HOPPER, "triton_few", "nvfp4", *SHAPE, 16)
    )
    assert fp4_tuning.relative_cost(HOPPER, "triton_stream", "nvfp4", *SHAPE, 16) is None
    assert chosen(16) == "triton_stream"


def test_rows_of_a_shape_are_replaced_and_others_stay(own_table):
    write({"triton": [3.0, None]}, m=16)
    write({"triton": [4.0, None]}, m=64)
    write({"triton": [2.0, None]}, m=16)
    rows = json.loads(own_table.read_text())["sm_90"]["rows"]
    assert [(row[3], row[5]["triton"][0]) for row in rows] == [(16, 2.0), (64, 4.0)]


@pytest.mark.parametrize(
    "text",
    ["no json", '{"sm_90": {"rows": [["fp9", 1, 1, 1, 1.0, {}]]}}', '{"sm_90": 3}', '{"sm_90": {"rows": [[1]]}}'],
)
def test_a_broken_table_is_named_and_left_out(own_table, text, caplog):
    own_table.parent.mkdir()
    own_table.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert chosen(64) in {i.name for i in operator("fp4_linear").implementations}
    assert str(own_table) in caplog.text and "tune" in caplog.text
    with pytest.raises(ValueError):
        fp4_tuning.write_user_table("sm_90", "a card", [])


def test_shipped_configurations_are_ones_that_their_kernels_take():
    for arch, shapes in fp4_tuning._tables().items():
        assert arch.startswith(("sm_", "gfx"))
        for rows in shapes.values():
            for m, measured in rows.items():
                assert m & (m - 1) == 0 and measured.times.keys() == measured.configs.keys()
                for name, kind in (
                    ("triton_few", fp4_linear_few.FewConfig), ("hopper", fp4_linear_hopper.WideConfig),
                    ("triton", fp4_linear_triton.TileConfig),
                ):  # fmt: skip
                    if measured.configs.get(name) is not None:
                        kind(*measured.configs[name])


def test_command_without_a_device_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--shape", "64x64"]) == 1
    assert "needs an NVIDIA or AMD GPU" in capsys.readouterr().err
    for wrong in (["tune"], ["tune", "--shape", "64"], ["tune", "model.py"]):
        assert main(wrong) == 2


def test_shapes_of_a_model():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 16))
    assert tune.shapes_of(model) == [(8, 16), (16, 8)]


@pytest.mark.gpu
def test_tuning_on_a_gpu(own_table):
    (row,) = tune.tune([(512, 1024)], rows=[16])
    assert row[:4] == ["nvfp4", 512, 1024, 16] and row[4] > 0 and "triton" in row[5]
    fastest = min((time, name) for name, (time, _) in row[5].items() if name != "triton_fp8")[1]
    assert chosen(16, shape=(512, 1024)) == fastest
