"""What is said of a training step that takes more memory than its budget, by counters that the test sets."""

import logging

import pytest
import torch

from vbcompile import backend, runtime_activation_budget
from vbcompile.report import GraphReport
from vbcompile.runtime_activation_budget import BudgetWatch

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Counters:
    """A device's counters; inputs of 40 bytes and 7 bytes of others are there from the beginning."""

    def __init__(self):
        self.allocated, self.peak, self.resets = 47, 47, 0

    def take(self, nbytes):
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)

    def allocated_bytes(self):
        return self.allocated

    def peak_bytes(self):
        return self.peak

    def reset_peak(self):
        self.peak, self.resets = self.allocated, self.resets + 1


class CompiledFunction(torch.autograd.Function):
    """As AOTAutograd's: the forward saves 100 bytes, the backward takes ``extra`` more while it runs."""

    @staticmethod
    def forward(ctx, x, counters, extra):
        ctx.counters, ctx.extra = counters, extra
        counters.take(100)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.counters.take(ctx.extra)
        ctx.counters.take(-ctx.extra - 100)
        return gradient, None, None


@pytest.fixture
def counters(monkeypatch):
    monkeypatch.setattr(runtime_activation_budget, "_own_bytes", lambda args: 40)
    monkeypatch.setattr(BudgetWatch, "_meter_of", lambda self, args: self._make_meter(args[0].device))
    return Counters()


def watched(budget, counters):
    told = []
    watch = BudgetWatch(budget, lambda device: counters, told.append)
    return watch.wrap(lambda x, extra: CompiledFunction.apply(x, counters, extra)), told


def steps(run, counters, extras, between=0):
    for extra in extras:
        result = run(torch.ones(2, requires_grad=True), extra)
        counters.take(between)
        result.sum().backward()
        counters.take(-between)


def test_a_budget_that_is_kept_leaves_the_counters_alone(counters):
    run, told = watched(150, counters)
    steps(run, counters, [10, 10, 10, 10])
    assert not told and counters.resets == 0 and counters.peak == 157


def test_what_takes_more_is_told_once_in_bytes_of_this_graph(counters):
    run, told = watched(150, counters)
    steps(run, counters, [30, 30, 30, 30, 30])
    assert told == [170] and counters.resets == 2


def test_what_the_first_step_compiles_and_what_comes_in_between_does_not_count(counters):
    run, told = watched(150, counters)
    steps(run, counters, [5000, 10, 10, 10], between=300)
    assert not told and counters.resets == 2


def test_forwards_without_a_backward_and_inference_are_not_measured_for_ever(counters):
    run, told = watched(10, counters)
    with torch.no_grad():
        run(torch.ones(2), 0)
    for _ in range(20):
        run(torch.ones(2, requires_grad=True), 0)
    assert not told and counters.resets < 10


def test_results_without_a_backward_are_judged_by_the_forward(counters):
    told = []

    def forward(x):
        counters.take(20)
        counters.take(-20)
        return x.detach()

    run = BudgetWatch(50, lambda device: counters, told.append).wrap(forward)
    for _ in range(4):
        run(torch.ones(2, requires_grad=True))
    assert told == [60] and counters.resets == 1


def test_the_message_names_a_budget_that_works_and_enters_the_report(caplog, monkeypatch):
    report = GraphReport("3", 1, True, "cuda (sm_90)", "memory")
    made = []
    monkeypatch.setattr(BudgetWatch, "wrap", lambda self, compiled: made.append(self._tell) or compiled)
    assert backend._watched(len, None, report) is len and not made
    backend._watched(len, 1000, report)
    with caplog.at_level(logging.WARNING):
        made[0](1100)
    assert "graph 3: a training step took 1.07 KiB" in caplog.text and "one of 900 bytes" in caplog.text
    assert report.failures == [("budget", caplog.records[0].message.partition(": ")[2])]


def test_the_backward_of_a_compiled_graph_is_found():
    x = torch.randn(3, 2, requires_grad=True)
    results = torch.compile(lambda x: (x.view(-1), x.sin()), backend="aot_eager")(x)
    node = runtime_activation_budget._backward_of(results)
    assert node is results[1].grad_fn
    assert runtime_activation_budget._backward_of([x, x.sin()]) is None
