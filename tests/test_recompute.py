"""What the backward makes again: the smallest set to save, plans under a budget, and gradients that stay the same."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vbcompile import compat
from vbcompile.config import resolve_config
from vbcompile.config_error import ConfigError
from vbcompile.device import get_target
from vbcompile.passes import activation_partition, recompute
from vbcompile.passes.activation_graph import JointGraph, node_bytes
from vbcompile.passes.activation_plan import Limits, Rates, StepPlanner, operations
from vbcompile.passes.pass_context import PassContext
from vbcompile.report import GraphReport
from vbcompile.vgpu_plan import PlanError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

RATES = Rates(matmul=10**12, memory=10**11, away=10**10, back=10**10, host_bytes=2**40)


def joint_graph(model, *inputs):
    """The joint graph of a training step, as the partitioner gets it."""
    from functorch.compile import aot_module, make_boxed_func, min_cut_rematerialization_partition

    found = []

    def split(joint, given, *, num_fwd_outputs, **options):
        found.append(JointGraph(joint.graph, num_fwd_outputs))
        return min_cut_rematerialization_partition(joint, given, num_fwd_outputs=num_fwd_outputs, **options)

    def keep(gm, _):
        return make_boxed_func(gm.forward)

    aot_module(model, fw_compiler=keep, partition_fn=split)(*inputs)
    return found[0]


class Gated(nn.Module):
    """Normed, gated feed-forward blocks with residual connections."""

    def __init__(self, width=32, blocks=2, dropout=0.0):
        super().__init__()
        self.width, self.dropout = width, dropout
        self.gate = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(blocks))

    def forward(self, x):
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            y = down(F.silu(gate(y)) * up(y))
            x = x + F.dropout(y, self.dropout, self.training)
        return x


# ------------------------------------------------------------------------------------------- what is saved
def test_only_results_of_matrix_products_and_residuals_are_saved():
    joint = joint_graph(Gated(blocks=2), torch.randn(128, 32))
    row = 128 * 4
    sizes = sorted(node_bytes(n) for n in joint.smallest_cut())
    # gate and up of both blocks, and the residual between them; the input is there anyway
    assert sizes == [32 * row, *(4 * [128 * row])]


def test_small_results_of_reductions_are_saved_rather_than_read_again():
    joint = joint_graph(Gated(width=256, blocks=1), torch.randn(64, 256))
    saved = joint.smallest_cut()
    assert any(node_bytes(n) == 64 * 4 for n in saved)


_STEPS = (
    lambda a, b, weight: a @ weight,
    lambda a, b, weight: a.sin(),
    lambda a, b, weight: a * b,
    lambda a, b, weight: a + b,
    lambda a, b, weight: a.exp(),
)


def random_model(seed):
    """A few pointwise operators and products in a random order, each reading earlier values."""
    generator = torch.Generator().manual_seed(seed)

    def pick(count):
        return int(torch.randint(count, (), generator=generator))

    steps = [(pick(5), pick(i + 1), pick(i + 1)) for i in range(4)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(8, 8, generator=generator) for _ in steps)

        def forward(self, x):
            values = [x]
            for weight, (kind, a, b) in zip(self.weights, steps, strict=True):
                values.append(_STEPS[kind](values[a], values[b], weight))
            return values[-1].square() + values[-2].cos()

    return Model()


def brute_force(joint):
    """Fewest bytes from which all that is needed can be made without products, by trying every set."""
    choices = [n for n in joint.forward if not joint.kinds.is_view(n)]

    def makes(node, saved):
        if node not in joint.forward or node in saved:
            return True
        return joint.is_cheap(node) and all(makes(s, saved) for s in node.all_input_nodes)

    best = math.inf
    for count in range(len(choices) + 1):
        for saved in itertools.combinations(choices, count):
            cost = sum(node_bytes(n) for n in saved)
            if cost < best and all(makes(n, set(saved)) for n in joint.needed):
                best = cost
    return best


@pytest.mark.parametrize("seed", range(6))
def test_no_smaller_set_exists(seed):
    joint = joint_graph(random_model(seed), torch.randn(4, 8, requires_grad=True))
    assert sum(map(node_bytes, joint.smallest_cut())) == brute_force(joint)


def test_operations_are_counted():
    joint = joint_graph(nn.Linear(16, 64), torch.randn(32, 16))
    (product,) = [n for n in joint.forward if joint.is_costly(n)]
    assert operations(product) == 2 * 32 * 16 * 64


# ------------------------------------------------------------------------------------------- plans
def planner(limits, width=64, blocks=4, rows=512, rates=RATES):
    return StepPlanner(joint_graph(Gated(width, blocks), torch.randn(rows, width)), rates, limits)


def test_gradients_of_results_are_counted_as_long_as_pytorch_holds_them(monkeypatch):
    ends = []
    for frees in (True, False):
        monkeypatch.setattr(compat, "frees_result_gradients", lambda frees=frees: frees)
        found = planner(Limits(2**40))
        ends.append(found._reserved[-1])
    (tangent,) = (n for n in found.joint.backward if n.op == "placeholder")
    assert ends[1] - ends[0] == node_bytes(tangent)


def test_a_budget_is_kept_and_least_memory_costs_no_more_than_allowed():
    unlimited = planner(Limits(2**40)).plan()
    assert unlimited.declined
    with pytest.raises(PlanError) as caught:
        planner(Limits(1)).plan()
    budget = (unlimited.kept_peak_bytes + caught.value.minimum_budget) // 2
    plan = planner(Limits(budget)).plan()
    assert plan.peak_bytes <= budget < plan.kept_peak_bytes and not plan.declined
    least = planner(Limits(slowdown=0.1)).plan()
    assert least.step_ns <= 1.1 * least.kept_step_ns and least.peak_bytes < least.kept_peak_bytes
    free = planner(Limits(slowdown=0.0)).plan()
    assert free.step_ns == free.kept_step_ns and least.peak_bytes <= free.peak_bytes


def test_results_that_one_kernel_makes_are_there_together():
    made = planner(Limits(2**40), blocks=1)
    wide = 512 * 256 * 4
    births = {node: at for node, at in made._kernels._births.items() if node_bytes(node) == wide}
    # the gated product again, and the gradients of both halves: behind the gradient that comes in from the last layer
    assert len(births) == 3 and len(set(births.values())) == 1
    at = next(iter(births.values()))
    assert made._reserved[at] >= 4 * wide and made._reserved[at - 1] < 4 * wide
    readers = {made._kernels.end(reader) for node in births for reader in made._kernels._products(node)}
    assert min(readers) >= at


def test_a_slow_link_is_left_alone_and_a_fast_one_used():
    slow = planner(Limits(slowdown=0.2), rates=Rates(10**12, 10**11, 10**5, 10**5, 2**40)).plan()
    assert not slow.chosen("offload") and slow.chosen("recompute")
    fast = planner(Limits(slowdown=0.0), rows=4096, rates=Rates(10**11, 10**11, 10**12, 10**12, 2**40)).plan()
    assert fast.chosen("offload") and not fast.chosen("recompute")


def test_over_a_slow_link_the_end_of_the_forward_waits_rather_than_the_budget_is_missed():
    sizes = {"width": 128, "rows": 4096}
    with pytest.raises(PlanError) as caught:
        planner(Limits(1), **sizes).plan()
    budget = int(1.02 * caught.value.minimum_budget)
    with pytest.raises(PlanError):
        planner(Limits(budget, offload=False), **sizes).plan()
    step = planner(Limits(budget), rates=Rates(10**12, 10**11, 10**6, 10**6, 2**40), **sizes)
    plan = step.plan()
    gone = [f.free_before for f in plan.fates if f.choice == "offload"]
    assert plan.peak_bytes <= budget and step.first_backward in gone and max(gone) <= step.first_backward
    assert plan.step_ns > 2 * plan.kept_step_ns


def test_residuals_stay_so_that_no_chain_grows_long():
    found = planner(Limits())
    residual = [n for n in found.saved if node_bytes(n) == 512 * 64 * 4]
    assert residual and not any(n in found.recomputable for n in residual[1::2])
    longest = max(
        len([w for w in found.joint.made_from(n, found.saved) if found.joint.is_costly(w)]) for n in found.saved
    )
    assert longest <= 1


def test_an_impossible_budget_names_the_one_that_works():
    with pytest.raises(PlanError, match="smallest budget that works") as caught:
        planner(Limits(1000)).plan()
    assert caught.value.minimum_budget
    assert planner(Limits(caught.value.minimum_budget)).plan().peak_bytes <= caught.value.minimum_budget


def test_exactly_the_plan_reaches_the_backward():
    model, x = Gated(64, 3), torch.randn(512, 64)
    from functorch.compile import aot_module, make_boxed_func

    limits = Limits(planner(Limits(), blocks=3).plan().peak_bytes, offload=False)
    seen = {}

    def split(joint, given, *, num_fwd_outputs, **options):
        graph = JointGraph(joint.graph, num_fwd_outputs)
        step = StepPlanner(graph, RATES, limits)
        again = {a.name for a in step.plan().chosen("recompute")}
        seen["wanted"] = {n.name for n in step.saved if n.name not in again}
        seen["again"] = again
        recompute.mark(graph, dict.fromkeys(n for n in step.saved if n.name in seen["wanted"]))
        forward, backward = compat.partition(joint, given, num_fwd_outputs=num_fwd_outputs, **options)
        outputs = forward.graph.output_node().args[0][num_fwd_outputs:]
        seen["found"] = {n.name for n in outputs if n.op == "call_function"}
        seen["run again"] = {n.name for n in backward.graph.nodes}
        return forward, backward

    aot_module(model, fw_compiler=lambda gm, _: make_boxed_func(gm.forward), partition_fn=split)(x)
    assert seen["again"] and seen["found"] == seen["wanted"]
    assert all(name in seen["run again"] for name in seen["again"])


# ------------------------------------------------------------------------------------------- whole steps
def compiled(model, dynamic=None, **options):
    wanted = {"mode": "memory", "mixed_precision": False, "slowdown": 1.0, "strict": True, "downstream": "aot_eager"}
    return torch.compile(model, backend="vblackwell", dynamic=dynamic, options=wanted | options)


def gradients(function, model, x, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    function(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_and_report(reports):
    model, x = Gated(64), torch.randn(512, 64)
    expected = gradients(torch.compile(model, backend="aot_eager"), model, x)
    function = compiled(model)
    assert same(gradients(function, model, x), expected)
    (report,) = reports
    made = [d for d in report.decisions if d.pass_name == "recompute" and d.action == "rewritten"]
    kept = [d for d in report.decisions if d.pass_name == "recompute" and d.action == "left"]
    assert made and kept and not report.failures and "recompute" not in dict(report.unavailable)
    assert all("made again in the backward" in d.reason for d in made)
    (whole,) = [d for d in report.decisions if d.pass_name == "activations"]
    assert whole.action == "rewritten" and whole.details["peak_bytes"] < whole.details["peak_bytes_if_kept"]
    listed = sum(d.details["bytes"] for d in made + kept)
    assert 0.99 * whole.details["saved_bytes"] < listed <= whole.details["saved_bytes"] and "instead of" in whole.reason
    assert any("gate" in d.site for d in made + kept), "sites are named as in the model"


def test_less_is_saved():
    model, x = Gated(64), torch.randn(512, 64)

    def saved(function):
        loss = function(x).square().mean()
        node = loss.grad_fn.next_functions[0][0].next_functions[0][0]
        return sum(t.nbytes for t in node.saved_tensors if t is not None)

    assert saved(compiled(model)) < 0.6 * saved(torch.compile(model, backend="aot_eager"))


def test_dropout_is_replayed():
    model, x = Gated(64, dropout=0.3).train(), torch.randn(512, 64)
    expected = gradients(torch.compile(model, backend="aot_eager"), model, x, seed=7)
    function = compiled(model)
    assert same(gradients(function, model, x, seed=7), expected)
    assert not same(gradients(function, model, x, seed=8), expected)


def test_a_hundred_steps_do_not_drift():
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    states = []
    for wrap in (lambda m: torch.compile(m, backend="aot_eager"), compiled):
        torch.manual_seed(1)
        model = Gated(32)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        function = wrap(model)
        for _ in range(100):
            optimizer.zero_grad()
            F.mse_loss(function(x), target).backward()
            optimizer.step()
        states.append([p.detach() for p in model.parameters()])
    assert same(*states)


def test_gradients_accumulate():
    model = Gated(32)
    parts = [torch.randn(64, 32) for _ in range(3)]
    results = []
    for function in (torch.compile(model, backend="aot_eager"), compiled(model)):
        model.zero_grad()
        for part in parts:
            function(part).square().mean().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert same(*results)


def test_dynamic_rows(reports):
    model = Gated(32)
    function = compiled(model, dynamic=True)
    for rows in (128, 300):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(gradients(function, model, x), gradients(model, model, x))
    assert len(reports) == 1, "compiled once for all sizes"


def test_marked_sizes_stay_dynamic(reports):
    """The planner looks at sizes, also those that products sum over, and must not fix them."""
    weight = torch.randn(16, 16, requires_grad=True)
    function = compiled(lambda x: ((x @ weight) @ x.mT).softmax(-1) @ x)
    for rows in (5, 9):
        x = torch.randn(3, rows, 16)
        torch._dynamo.mark_dynamic(x, 1)
        function(x).sum().backward()
    assert len(reports) == 1


def test_state_that_the_forward_writes_is_not_read_again():
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 4)).train()
    x = torch.randn(256, 16)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = gradients(model, model, x)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(gradients(compiled(model), model, x), expected)
    torch.testing.assert_close(model.state_dict(), after)


def test_a_part_of_an_input_that_the_forward_writes():
    def step(function):
        rows, weight = torch.arange(16.0).view(4, 4), torch.ones(2, 2, requires_grad=True)
        function(rows, weight).sum().backward()
        return weight.grad, rows

    def double_every_other_column(rows, weight):
        part = rows[:, ::2]
        result = part.contiguous() @ weight
        part.mul_(2.0)
        return result

    torch.testing.assert_close(step(compiled(double_every_other_column)), step(double_every_other_column))


def test_checkpointing_by_the_model_is_respected():
    class Checkpointed(Gated):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Checkpointed(32), torch.randn(64, 32)
    expected = gradients(torch.compile(model, backend="aot_eager"), model, x)
    assert same(gradients(compiled(model, slowdown=0.0), model, x), expected)


def test_a_plan_that_fails_leaves_what_pytorch_saves(reports, monkeypatch, caplog):
    def broken(self):
        raise RuntimeError("no idea")

    monkeypatch.setattr(StepPlanner, "plan", broken)
    model, x = Gated(32), torch.randn(64, 32)
    assert same(
        gradients(compiled(model, strict=False), model, x),
        gradients(torch.compile(model, backend="aot_eager"), model, x),
    )
    assert reports[0].failures == [("recompute", "RuntimeError: no idea")]
    assert "saved as PyTorch does: RuntimeError: no idea" in caplog.text
    with pytest.raises(Exception, match="no idea"):
        gradients(compiled(Gated(16), strict=True), model, torch.randn(8, 16))


def test_a_budget_that_is_too_small_reaches_the_user():
    model, x = Gated(32), torch.randn(64, 32)
    with pytest.raises(Exception, match="smallest budget that works") as caught:
        compiled(model, budget="1KB", strict=False)(x)
    assert isinstance(caught.value, PlanError) or "PlanError" in str(caught.value)


def test_no_partitioner_where_nothing_is_to_be_saved():
    report = GraphReport("0", 1, True, "cpu", "memory", {})

    def chosen(training=True, **options):
        context = PassContext(resolve_config(options=options, environ={}), get_target("cpu"), training)
        return activation_partition.partitioner_for(context, report)

    assert chosen(mode="memory") is not None and chosen(mode="memory", training=False) is None
    assert chosen(mode="balanced") is None and chosen(mode="balanced", recompute=True) is not None
    # from main memory to main memory: only if asked for by name
    assert not chosen(mode="memory")._limits.offload
    assert chosen(mode="memory", offload=True)._limits.offload
    assert chosen(mode="memory", recompute=False) is None


@pytest.mark.parametrize(
    ("options", "reason"), [({}, "only by offload=True"), ({"mode": "speed"}, "recompute and offload are off")]
)
def test_a_budget_that_nothing_keeps_is_said(options, reason, caplog):
    report = GraphReport("0", 1, True, "cpu", "balanced", {})
    for budget, environ in (({"budget": "1GiB"}, {}), ({}, {"VB_HBM_BUDGET": "1GiB"})):
        config = resolve_config(options={**options, **budget}, environ=environ)
        for training in (True, True, False):
            context = PassContext(config, get_target("cpu"), training)
            assert activation_partition.partitioner_for(context, report) is None
    (decision,) = report.decisions
    assert decision.action == "left" and reason in decision.reason and "mode 'memory' plans" in decision.reason
    assert [record.getMessage() for record in caplog.records] == [decision.reason]  # not for the environment's


def test_a_budget_that_moving_alone_keeps_is_kept():
    layers = [layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.GELU())]
    joint = joint_graph(nn.Sequential(*layers), torch.randn(4096, 256))
    least = {}
    for again in (True, False):
        with pytest.raises(PlanError) as caught:
            StepPlanner(joint, RATES, Limits(1, recompute=again)).plan()
        least[again] = caught.value.minimum_budget
    assert least[False] < least[True]
    report = GraphReport("0", 1, True, "cpu", "memory", {})
    _, plan = activation_partition.ActivationPartitioner(RATES, Limits(least[False]), report)._plan(joint)
    assert plan.peak_bytes <= least[False] and plan.chosen("offload") and not plan.chosen("recompute")
    with pytest.raises(PlanError) as caught:
        activation_partition.ActivationPartitioner(RATES, Limits(1), report)._plan(joint)
    assert caught.value.minimum_budget == least[False]


def test_settings():
    assert resolve_config(environ={"VB_HBM_BUDGET": "2GiB"}).budget == 2**31
    assert resolve_config(options={"budget": 5}, environ={"VB_HBM_BUDGET": "2GiB"}).budget == 5
    assert resolve_config(environ={}).slowdown == 0.1
    for wrong in ({"budget": "much"}, {"budget": 0}, {"slowdown": 2}, {"slowdown": "a"}):
        with pytest.raises(ConfigError):
            resolve_config(options=wrong, environ={})
