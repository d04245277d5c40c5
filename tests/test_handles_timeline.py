"""The page of one measured step of an offloaded model."""

import pytest
import torch
from test_offload_pass import blocks, compiled, offload
from test_report_page import parse

import vbcompile


def test_page_of_a_measured_step(tmp_path):
    model, x = offload(blocks()), torch.randn(3, 32)
    run = compiled(model)
    expected = run(x)
    page = vbcompile.write_timeline(run, tmp_path / "step.html", x)
    found = parse(page.read_text())
    text = " ".join(found.text)
    assert found.tags.count("svg") == 3 and "Measured: one step" in text and "streamed bytes" in text
    torch.testing.assert_close(run(x), expected)
    (after,) = vbcompile.stats(model)
    assert after.steps == 5 and not model[0].up.weight.payload.residence.record


def test_without_offload_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="this one has 0"):
        vbcompile.write_timeline(blocks(), tmp_path / "step.html", torch.randn(3, 32))
    assert not (tmp_path / "step.html").exists()
