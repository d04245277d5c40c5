"""The report page: complete, self-contained, escaped, and legible on a small screen in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

import vbcompile
from vbcompile.__main__ import main
from vbcompile.report import Decision, GraphReport
from vbcompile.report_charts import memory_chart, timeline_chart
from vbcompile.report_page import Movement, html_page
from vbcompile.vgpu_plan import Operator, Sweep, Tier, Weight
from vbcompile.vgpu_planner import plan_weights
from vbcompile.vgpu_simulator import Event, timeline
from vbcompile.vgpu_size import size_text

_VOID = {"meta", "br", "img", "link"}


class _Checker(HTMLParser):
    """Every element is closed in order; collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def make_plan():
    weights = tuple(Weight(f"layer.{i}.weight", 2**20) for i in range(12))
    operators = tuple(Operator(f"linear {i}", 100_000, (i,)) for i in range(12))
    return plan_weights(Sweep(weights, operators, 2**18), 6 * 2**20, [Tier(1, "cpu", 2**30, 20 * 10**9)])


def make_report():
    report = GraphReport("0/0", 30, True, "cuda (sm_90)", "memory", {"mode": {"value": "memory", "source": "mode="}})
    report.decisions += [
        Decision("attention", "model.py:8 <lambda>", "rewritten", "attention, causal", "hopper"),
        Decision("attention", "model.py:9", "left", "the attention weights are returned & used"),
    ]
    report.failures.append(("fp4", "ValueError: <b>"))
    report.unavailable.append(("recompute", "not here"))
    report.graph_break = "print(x)"
    return report


COUNTERS = {"hits": 7, "stall_ns": 2_500_000, "wasted_bytes": 1536, "gbps": {"h2d": 51.49}, "measured_step_ns": None}


def test_the_page_holds_every_fact_and_nothing_foreign():
    plan = make_plan()
    page = html_page(
        [make_report()],
        "a <model>",
        [Movement(plan, [(0, 2**20), (500, 2**19)], timeline(plan), [(0, 2**20), (900, 2**21)], COUNTERS)],
        "a <note>",
    )
    found = parse(page)
    text = " ".join(found.text)
    facts = ("a <model>", "model.py:8 <lambda>", "returned & used", "hopper", "ValueError: <b>", "not here", "print(x)")
    counters = ("hits", "2.500 ms", "1.50 KiB", "h2d 51.5", "none yet")
    for fact in (*facts, *counters, "layer.3.weight", "memory (mode=)", "budget 6.00 MiB", plan.prediction.bottleneck):
        assert fact in text, fact
    assert found.tags.count("svg") == 4 and "a <note>" in text
    assert not {"script", "link", "img", "iframe"} & set(found.tags) and found.references == []
    assert set(re.findall(r"https?://[^\s\"<]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_a_page_of_a_real_model():
    def attention(q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1) * 0.125, -1) @ v

    explanation = vbcompile.explain(attention, *(torch.randn(2, 4, 16, 64) for _ in range(3)))
    text = " ".join(parse(explanation.to_html("attention")).text)
    assert "cpu_flash" in text and "Not planned: this is a function" in text
    assert "captured no graph" in " ".join(parse(html_page([], "nothing")).text)


def test_pages_from_the_command_line(tmp_path):
    path, page = tmp_path / "model.py", tmp_path / "page.html"
    path.write_text(
        "import torch\ndef make():\n"
        "    return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8))), [torch.randn(4, 512)]\n"
    )
    assert main(["explain", f"{path}:make", "--html", str(page)]) == 0
    found = parse(page.read_text())
    assert "model.py:make" in " ".join(found.text) and found.tags.count("svg") == 1  # memory over a training step
    assert main(["explain", f"{path}:make", "--as", "gfx942", "--html", str(page)]) == 0
    assert "device that is not here" in page.read_text() and "svg" not in parse(page.read_text()).tags
    assert main(["plan", f"{path}:make", "--budget", "4MiB", "--html", str(page)]) == 0
    assert parse(page.read_text()).tags.count("svg") == 2


_OFFLOADED = """
import torch, vbcompile
def make():
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8))).requires_grad_(False)
    return vbcompile.offload(model, "cpu", {0: "5MB", "cpu": "1GiB"}), [torch.randn(4, 512)]
if __name__ == "__main__":
    model, inputs = make()
    torch.compile(model, backend="vblackwell", options={"mode": "memory", "downstream": "eager"})(*inputs)
"""


def test_pages_of_an_offloaded_model_show_its_plan_and_the_call(tmp_path):
    path, page = tmp_path / "model.py", tmp_path / "page.html"
    path.write_text(_OFFLOADED)
    assert main(["explain", f"{path}:make", "--mode", "memory", "--html", str(page)]) == 0
    found = parse(page.read_text())
    text = " ".join(found.text)
    assert found.tags.count("svg") == 3 and "Measured: device memory" in text and "ran uncompiled" in text
    assert "6.00 MiB per step" in text and "measured step" in text
    try:
        assert main(["explain", str(path), "--mode", "memory", "--html", str(page)]) == 0
    finally:
        vbcompile.disable()
    text = " ".join(parse(page.read_text()).text)
    assert "6.00 MiB per step" in text and "measured step" in text and "Measured: one step" not in text


def test_a_step_that_cannot_be_planned_says_why():
    class Chooses(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    page = vbcompile.explain(Chooses(), torch.ones(3)).to_html()
    assert "Not planned: the model cannot be traced without its data" in page


def test_charts_of_nothing_and_of_one_moment():
    assert timeline_chart([]) == "" and memory_chart([]) == ""
    parse(timeline_chart([Event("compute", "a", 5, 5)]))
    parse(memory_chart([(0, 0)]))
    assert [size_text(n) for n in (0, 1023, 2**20, 5 * 2**40)] == ["0 B", "1023 B", "1.00 MiB", "5.00 TiB"]


def test_bars_lie_where_their_events_are():
    svg = timeline_chart([Event("compute", "a", 0, 50), Event("cpu", "w", 50, 100)])
    (a, w) = [
        (float(x), float(width)) for x, width in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    ]
    assert abs(a[0] + a[1] - w[0]) < 0.2 and abs(a[1] - w[1]) < 0.2


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser_nothing_is_cut_off(tmp_path, width):
    """The browser itself says how wide the page is, and how many characters of text it shows."""
    plan = make_plan()
    page = html_page([make_report()], "model", [Movement(plan, [(0, 2**22), (10**6, 2**21)], timeline(plan))])
    outer = tmp_path / "outer.html"  # the page in a frame: a window has a least width of its own
    outer.write_text(
        f"<title></title><iframe width={width} height=900 srcdoc='{page.replace(chr(39), '&#39;')}' onload='"
        "const d = this.contentDocument; document.title = "
        'd.documentElement.scrollWidth + " " + d.body.innerText.length\'></iframe>'
    )
    flags = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "dump-dom",
             "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    command = [BROWSER, *(f"--{flag}" for flag in flags), outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    shown, characters = re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups()
    assert int(shown) <= width and int(characters) > 400
