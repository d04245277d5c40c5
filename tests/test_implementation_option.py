"""The option ``implementations``: what one compile runs its operators by, beside others in the same process."""

import pytest
import torch
from torch import nn

import vbcompile
from vbcompile.backend import _cache_key
from vbcompile.config import resolve_config
from vbcompile.config_error import ConfigError
from vbcompile.kernels import registry
from vbcompile.kernels.registry import Implementation, force, operator


def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.125, -1) @ v


def capped(q, k, v):
    return torch.softmax(torch.tanh(q @ k.transpose(-2, -1) * 0.125) * 20, -1) @ v


def heads(requires_grad=False):
    return [torch.randn(2, 4, 16, 64).requires_grad_(requires_grad) for _ in range(3)]


def compiled(function, downstream="eager", **implementations):
    options = {"downstream": downstream, "implementations": implementations}
    return torch.compile(function, backend="vblackwell", options=options)


@pytest.fixture
def counted():
    """Copies of the reference that count their calls, too expensive to be chosen; gone afterwards."""
    calls, before = [], {}
    for name in ("attention", "attention_backward"):
        op = operator(name)
        op.load()
        before[name] = list(op.implementations)
        reference = op.implementations[0]

        def run(*args, name=name, reference=reference):
            calls.append(name)
            return reference.run(*args)

        op.register(Implementation("counted", run, reference.refuses, reference.cost))
    yield calls
    for name, implementations in before.items():
        operator(name).implementations[:] = implementations
    registry.forget_choices()


@pytest.mark.parametrize("downstream", ["eager", "aot_eager", "inductor"])
def test_forward_and_backward_of_one_compile(counted, downstream):
    torch._dynamo.reset()
    named = {"attention": "counted", "attention_backward": "counted"}
    ours, free = compiled(attention, downstream, **named), compiled(lambda *t: attention(*t), downstream)
    for run, expected in ((ours, ["attention", "attention_backward"]), (free, [])):
        inputs = heads(requires_grad=True)
        want = torch.autograd.grad(attention(*inputs).sum(), inputs)
        counted.clear()
        gradients = torch.autograd.grad(run(*inputs).sum(), inputs)
        assert counted == expected
        torch.testing.assert_close(gradients, want)


def test_the_option_beats_the_process(counted):
    run = compiled(attention, attention="counted")
    with force(attention="cpu_flash"):
        run(*heads())
    assert counted == ["attention"]


def test_the_report_says_so():
    options = {"implementations": {"attention": "reference"}}
    (report,) = vbcompile.explain(attention, *heads(), options=options).reports
    text = report.decisions[0].implementation
    assert text.startswith("reference (not ") and "cpu_flash: another was asked for" in text
    assert report.config["implementations"] == {"value": {"attention": "reference"}, "source": "options"}


def test_for_a_device_that_is_not_here():
    """The choice is that device's, and what runs here follows this one."""
    inputs, options = [t.bfloat16() for t in heads()], {"implementations": {"attention": "triton"}}
    (report,) = vbcompile.explain(attention, *inputs, as_device="sm_90", options=options).reports
    assert report.decisions[0].implementation.startswith("triton (not ")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"attentoin": "triton"}, "unknown operator 'attentoin'; valid: attention, .*did you mean 'attention'"),
        ({"attention": "cpu_flush"}, "no implementation 'cpu_flush'; valid: reference, .*did you mean 'cpu_flash'"),
        ({"attention": "hopper"}, "'hopper' of attention was asked for and refuses: uses the instructions of Hopper"),
        ({"attention": "cpu_flash"}, "'cpu_flash' of attention was asked for and refuses: knows no score function"),
    ],
)
def test_what_cannot_run_is_an_error_that_says_why(named, message):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message) as raised:
        compiled(capped, **named)(*heads())
    assert isinstance(raised.value, ConfigError) or "ConfigError" in str(raised.value)


def test_names_are_looked_at_where_no_operator_is_called():
    with pytest.raises(ConfigError, match="did you mean 'triton'"):
        vbcompile.enable(implementations={"attention": "tritn"})
    assert not vbcompile.is_enabled()
    with force(attention="tritn"), pytest.raises(Exception, match="did you mean 'triton'"):
        torch._dynamo.reset()
        compiled(lambda x: x.sin())(torch.ones(2))


@pytest.mark.parametrize("wrong", ["triton", {"attention": None}, {1: "triton"}, ["attention"]])
def test_not_a_mapping(wrong):
    with pytest.raises(ConfigError, match="'implementations' must map operators to implementations"):
        resolve_config(options={"implementations": wrong})


def test_it_is_in_the_cache_key():
    keys = [{}, {"attention": "reference"}, {"attention": "reference", "attention_backward": "reference"}]
    assert len({_cache_key(resolve_config(options={"implementations": k})) for k in keys}) == len(keys)


@pytest.mark.parametrize("name", ["cpu_dequantize", "reference"])
def test_fp4_weights(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    x = torch.randn(3, 256)
    options = {"fp4": True, "implementations": {"fp4_linear": name}}
    with torch.no_grad():
        (report,) = vbcompile.explain(model, x, options=options).reports
        run = torch.compile(model, backend="vblackwell", options={**options, "downstream": "aot_eager"})
        free = torch.compile(model, backend="vblackwell", options={"fp4": True, "downstream": "aot_eager"})
        torch.testing.assert_close(run(x), free(x), rtol=1e-3, atol=1e-3)
    assert [d.implementation.split()[0] for d in report.decisions] == [name] * 2
