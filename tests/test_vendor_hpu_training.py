"""Training on Gaudi by ``FusedSDPA.apply``: arguments of three releases, results by the 2x rule, and refusals."""

import inspect
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from attention_forms import make_forms
from torch import nn
from vendors import gaudi
from vendors.packages import HPU_RELEASES
from vendors.trial import results, vendor

import vbcompile
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels.attention_training import attend, training_case
from vbcompile.kernels.registry import force, operator

FORMS = make_forms(37, 53, 16, 24)
NATIVE = [
    "plain", "causal_bottom_right", "window", "key_padding", "bias_rows", "alibi", "rows_first", "grouped",
    "grouped_bias", "one_kv_head", "four_axes",
]  # fmt: skip


@contextmanager
def machine(version="1.19.0", function=None):
    """A Gaudi whose package has this release's FusedSDPA, or the class given."""
    found = function or gaudi.fused_sdpa(version)
    with gaudi.python_package(found), vendor("hpu", version) as package:
        package.add_shapes(gaudi.SHAPES)
        with patch.object(found, "apply", wraps=found.apply) as apply:
            package.applied = apply
            yield package


def of_square(form):
    """Queries as many as keys: then no row of a causal mask is empty."""
    return make_forms(37, 37, 16, 24)[form]


@pytest.mark.parametrize("version", HPU_RELEASES)
@pytest.mark.parametrize("name", NATIVE)
def test_forms_and_releases(name, version):
    form = FORMS[name]
    with machine(version) as package:
        rows = results(form, torch.float32, all_gradients=False, call=attend)
    assert not [row for row in rows if not row[1] <= row[2]], rows
    may_give_nan = form.function.empty_rows == "nan" and name not in ("plain", "rows_first", "grouped", "one_kv_head")
    if package.applied.called:
        assert len(package.applied.call_args.args) == 9 and not package.applied.call_args.kwargs
    else:
        assert may_give_nan
    assert package.calls == ["sdpa_recomp_fwd", "sdpa_recomp_bwd"]


@pytest.mark.parametrize("name", ["plain", "causal", "window", "grouped", "one_kv_head"])
def test_by_the_vendors_function(name):
    with machine() as package:
        rows = results(of_square(name), torch.bfloat16, call=attend)
    assert not [row for row in rows if not row[1] <= row[2]], rows
    assert package.applied.called


def test_shared_keys_come_with_five_axes():
    with machine() as package:
        results(FORMS["grouped"], torch.float32, call=attend)
    q, k, v = package.applied.call_args.args[:3]
    assert q.dim() == k.dim() == v.dim() == 5 and k.shape[2] == 1 and q.shape[2] > 1


@pytest.mark.parametrize("version", HPU_RELEASES)
def test_dropout_is_the_vendors(version):
    """One mask in both directions: the result is linear in the values, so ``<out, g> = <v, dv>``; half are dropped."""
    q, k, v = (torch.randn(2, 4, 64, 16, dtype=torch.float32, requires_grad=True) for _ in range(3))
    function = FORMS["plain"].function.dumps()
    with machine(version) as package:
        (out,) = attend(q, k, v, [], 0.25, 0.5, torch.tensor([3]), function)
        g = torch.randn_like(out)
        _, dk, dv = torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
        torch.testing.assert_close((out * g).sum(), (v * dv).sum(), rtol=1e-4, atol=1e-4)
        shares = attend(q, k, torch.ones_like(v), [], 0.25, 0.5, torch.tensor([3]), function)[0]
    assert package.applied.call_args.args[4] == 0.5 and float(dk.norm()) > 0
    assert 0.9 < float(shares.mean()) < 1.1 and float(shares.std()) > 0.05


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv, self.dropout = nn.Linear(32, 64), dropout

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (8, 8)).transpose(1, 2).split([4, 2, 2], 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, dropout_p=self.dropout)
        return a.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("downstream", ["eager", "aot_eager"])
def test_a_model_trains_by_it(downstream):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 24, 32)
    expected = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    torch._dynamo.reset()
    with machine() as package:
        run = torch.compile(model, backend="vblackwell", options={"downstream": downstream, "strict": True})
        found = torch.autograd.grad(run(x).square().sum(), [*model.parameters()])
        calls = list(package.calls)
        (report,) = vbcompile.explain(model, x).reports
        with torch.no_grad():
            inference = torch.compile(model, backend="vblackwell", options={"downstream": downstream})(x)
    assert package.applied.called and calls == ["sdpa_recomp_fwd", "sdpa_recomp_bwd"]
    assert report.decisions[0].implementation.startswith("hpu_fused_sdpa")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inference, model(x), rtol=1e-4, atol=1e-5)


def test_dropout_of_a_model():
    torch._dynamo.reset()
    model, x = Attention(dropout=0.25), torch.randn(2, 24, 32)
    with machine() as package:
        run = torch.compile(model, backend="vblackwell", options={"downstream": "aot_eager", "strict": True})
        run(x).sum().backward()
    assert package.calls == ["sdpa_recomp_fwd", "sdpa_recomp_bwd"]
    assert float(model.qkv.weight.grad.norm()) > 0


# ------------------------------------------------------------------------------------------------------ refusals
def choice(name="plain", gradients=False):
    form = of_square(name)
    (q, k, v), captured = form.inputs(torch.bfloat16)
    captured = [c.requires_grad_(gradients and c.is_floating_point()) for c in captured]
    case = training_case(q, k, v, captured, form.dropout_p > 0, form.function.dumps())
    return operator("attention_training").choose(catalog_target("gaudi2"), case)


@pytest.mark.parametrize(
    ("name", "gradients", "reason"),
    [
        ("softcap", False, "knows no score function beyond an additive bias and a mask"),
        ("sink", False, "knows no sinks in training"),
        ("bias", True, "has no gradient for the bias"),
        ("causal_empty_rows", False, "gives rows without a key no NaN"),
    ],
)
def test_cases_that_the_operators_run(name, gradients, reason):
    found = choice(name, gradients)
    assert found.implementation.name == "operators" and reason in found.explain()


def test_without_the_package():
    with gaudi.python_package(None), vendor("hpu"):
        found = choice()
    reason = "FusedSDPA.apply needs 1.11 or later of habana-torch-plugin (found 1.19.0), with its habana_frameworks"
    assert found.implementation.name == "operators"
    assert reason in str(found.elsewhere) and "the operators under it are called instead" in str(found.elsewhere)


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("q, k, v, attn_mask, dropout_p, is_causal, scale, softmax_mode, new", "wants 'softmax_mode', which is not"),
        ("q, k, v, mask, dropout_p", "takes q, k, v, mask, dropout_p, which is not known here"),
    ],
)
def test_another_signature_is_refused_not_guessed(signature, reason):
    forward = eval(f"lambda ctx, {signature}: None")
    with machine(function=type("FusedSDPA", (torch.autograd.Function,), {"forward": staticmethod(forward)})):
        found = choice()
    assert found.implementation.name == "operators" and reason in str(found.elsewhere)


def test_the_user_decides():
    with machine() as package:
        for named in ({"attention_training": "operators"}, {"attention": "hpu_fused"}):
            with force(**named):
                results(of_square("plain"), torch.float32, call=attend)
    assert not package.applied.called and len(package.calls) == 4


def test_stand_ins_have_the_vendors_arguments():
    counts = [len(inspect.signature(gaudi.fused_sdpa(v).forward).parameters) - 1 for v in HPU_RELEASES]
    assert counts == [11, 13, 15]
