"""The page of one measured step of an offloaded model."""

import re

import pytest
import torch
from test_offload_pass import blocks, compiled, offload
from test_report_page import parse

import vbcompile
from vbcompile.handles_model import stores_of
from vbcompile.handles_timeline import movement_of, recorded


def test_page_of_a_measured_step(tmp_path):
    model, x = offload(blocks()), torch.randn(3, 32)
    run = compiled(model)
    expected = run(x)
    page = vbcompile.write_timeline(run, tmp_path / "step.html", x)
    found = parse(page.read_text())
    text = " ".join(found.text)
    assert found.tags.count("svg") == 3 and "Measured: one step" in text and "streamed bytes" in text
    measured = page.read_text().partition("Measured: one step")[2].partition("Measured: device memory")[0]
    assert {"compute", "h2d", "stall"} == {*re.findall(r'text-anchor="end">([a-z]\w*)<', measured)}
    torch.testing.assert_close(run(x), expected)
    (after,) = vbcompile.stats(model)
    assert after.steps == 5 and not model[0].up.weight.payload.residence.record


def test_both_halves_of_a_training_step_are_recorded():
    model, x = offload(blocks().requires_grad_(True), "130KiB"), torch.randn(3, 32)
    run = compiled(model, "aot_eager")
    stores = stores_of(run)
    with recorded(stores):
        for _ in range(2):
            run(x).sum().backward()
        movement = movement_of(stores[0])
    operators = [operator.name for operator in movement.plan.sweep.operators]
    assert [event.name for event in movement.measured if event.lane == "compute"] == operators
    assert movement.statistics["steps"] == 2 and movement.statistics["measured_step_ns"] > 0


def test_without_offload_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match=r"call vbcompile\.offload"):
        vbcompile.write_timeline(blocks(), tmp_path / "step.html", torch.randn(3, 32))
    with pytest.raises(ValueError, match="declined, the model fits"):
        vbcompile.write_timeline(offload(blocks(), "64MiB"), tmp_path / "step.html", torch.randn(3, 32))
    assert not (tmp_path / "step.html").exists()
