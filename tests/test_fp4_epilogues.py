"""FP4 products that apply what follows them: activations and SwiGLU gates, the operator and the pass."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import compiled, rounded
from torch import nn

from vbcompile.device import get_target
from vbcompile.kernels import fp4_linear_triton
from vbcompile.kernels.fp4 import take_rows
from vbcompile.kernels.fp4_epilogue import EPILOGUES, apply_epilogue, function_of, is_gated, turns
from vbcompile.kernels.fp4_layout import dequantize_weight, to_layout
from vbcompile.kernels.fp4_linear import fp4_linear, make_case
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.registry import force, operator
from vbcompile.passes import fp4 as fp4_pass

pytestmark = pytest.mark.usefixtures("fresh_weights")
FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
AFTER = [e for e in EPILOGUES if e != "none"]


def exact(x, gate, up, epilogue, bias=None):
    """In float64, from the weights of gate and up apart (up is ignored where there is no gate)."""
    y = x.double() @ gate.double().T
    z = x.double() @ up.double().T
    if bias is not None:
        y, z = y + bias[: y.shape[-1]].double(), z + bias[y.shape[-1] :].double()
    return FUNCTIONS[function_of(epilogue)](y) * (z if is_gated(epilogue) else 1)


# ------------------------------------------------------------------------------------------------------------- operator
def gated_weight(n, k, layout, format_name="nvfp4", device="cpu", gate_first=True):
    """A packed weight in turns, and the values of gate and up."""
    packed = quantize(torch.randn(n, k, device=device) * 0.1, format_name)
    w = to_layout(take_rows(packed, turns(n, gate_first, packed.device)), layout)
    rows = to_layout(packed, "plain")
    halves = dequantize_weight(*rows.tensors, k, format_name, "plain", torch.float64).chunk(2)
    return w, *(halves if gate_first else halves[::-1])


@pytest.mark.parametrize("epilogue", AFTER)
@pytest.mark.parametrize("layout", ["plain", "fragments2t"])
def test_operator_applies_the_epilogue_once_rounded(epilogue, layout):
    if is_gated(epilogue):
        w, gate, up = gated_weight(96, 64, layout)
    else:
        w = to_layout(quantize(torch.randn(90, 64) * 0.1), layout)
        gate = up = dequantize_weight(*w.tensors, 64, "nvfp4", layout, torch.float64)
    for shape in ((3, 64), (2, 3, 64), (0, 64), (64,)):
        x = torch.randn(shape)
        got = fp4_linear(x, *w.tensors, None, 64, "nvfp4", layout, "same", epilogue)
        assert got.is_contiguous()
        torch.testing.assert_close(got, exact(x, gate, up, epilogue).float(), rtol=1e-5, atol=1e-5)


def test_a_gate_in_the_second_half_and_a_bias():
    w, gate, up = gated_weight(64, 32, "plain", gate_first=False)
    bias, x = torch.randn(64), torch.randn(5, 32)
    order = turns(64, False, bias.device)
    got = fp4_linear(x, *w.tensors, bias[order], 32, "nvfp4", "plain", "same", "gated_gelu")
    swapped = torch.cat([bias[32:], bias[:32]])
    torch.testing.assert_close(got, exact(x, gate, up, "gated_gelu", swapped).float(), rtol=1e-5, atol=1e-5)


def test_operator_contract_with_an_epilogue():
    w, _, _ = gated_weight(64, 32, "plain")
    arguments = (*w.tensors, torch.randn(64), 32, "nvfp4", "plain", "same", "gated_silu")
    torch.library.opcheck(
        fp4_linear, (torch.randn(2, 3, 32), *arguments), test_utils=("test_schema", "test_faketensor")
    )
    with pytest.raises(NotImplementedError, match="no gradient through its epilogue gated_silu"):
        fp4_linear(torch.randn(2, 32, requires_grad=True), *arguments)


@pytest.mark.parametrize(("n", "epilogue", "message"), [(64, "tanh", "valid: none, silu"), (72, "gated_silu", "turns")])
def test_epilogues_that_do_not_fit_are_refused(n, epilogue, message):
    w = to_layout(quantize(torch.randn(n, 32)), "plain")
    with pytest.raises(ValueError, match=message):
        fp4_linear(torch.randn(1, 32), *w.tensors, None, 32, "nvfp4", "plain", "same", epilogue)


def test_special_values_go_through_as_in_pytorch():
    x = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), float("nan"), -80.0, 1e-30])
    for name, function in FUNCTIONS.items():
        torch.testing.assert_close(apply_epilogue(x, name), function(x), equal_nan=True)


def test_interpreted_epilogues(interpreting_python):
    program = """
import torch
from test_fp4_epilogues import AFTER, exact, gated_weight
from vbcompile.kernels import fp4_linear_triton as T
from vbcompile.kernels.fp4_epilogue import apply_epilogue, is_gated
from vbcompile.kernels.fp4_epilogue_kernels import epilogue_alone
from vbcompile.kernels import replay
from vbcompile.kernels.fp4_linear import fp4_linear
from vbcompile.kernels.registry import force
replay.takes = lambda device: True
torch.manual_seed(0)
for epilogue in AFTER:
    w, gate, up = gated_weight(160, 100, "fragments2")
    x, bias = torch.randn(19, 104).half()[:, :100], torch.randn(160)
    for config in (None, T.TileConfig(16, 2, 2, 2, 4, 2)):
        got = T.product(x, *w.tensors, bias, 100, "nvfp4", "fragments2", config, epilogue)
        plain = T.product(x.float(), *w.tensors, bias, 100, "nvfp4", "fragments2", config)
        want = apply_epilogue(plain, epilogue)
        assert got.shape == want.shape and got.is_contiguous()
        torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)
        wide = T.product(x.float(), *w.tensors, bias, 100, "nvfp4", "fragments2", config, epilogue)
        torch.testing.assert_close(wide, want, rtol=2e-5, atol=1e-6)
    for _ in range(4):  # the third and fourth repeat what the second did
        x = torch.randn(2, 5, 104).half()[..., :100]
        with force(fp4_linear="triton"):
            got = fp4_linear(x, *w.tensors, bias, 100, "nvfp4", "fragments2", "same", epilogue)
        assert torch.equal(got, T.product(x, *w.tensors, bias, 100, "nvfp4", "fragments2", None, epilogue))
    y = torch.randn(3, 1040)
    torch.testing.assert_close(epilogue_alone(y, epilogue), apply_epilogue(y, epilogue), rtol=1e-5, atol=1e-6)
    assert epilogue_alone(y[:0], epilogue).shape == apply_epilogue(y[:0], epilogue).shape
"""
    done = interpreting_python.run(["-c", program], Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-4000:]


# ----------------------------------------------------------------------------------------------------------------- pass
@pytest.fixture
def able(monkeypatch):
    """A device with kernels that take epilogues, as far as the pass can tell."""
    monkeypatch.setattr(fp4_pass, "refuses_triton", lambda target: None)


class Gated(nn.Module):
    """A feed-forward block with a gate, its product written by ``combine(gate layer, up layer, x)``."""

    def __init__(self, combine, bias=False):
        super().__init__()
        self.gate, self.up = nn.Linear(128, 256, bias), nn.Linear(128, 256, bias)
        self.down, self.combine = nn.Linear(256, 128), combine

    def forward(self, x):
        return self.down(self.combine(self.gate, self.up, x))


def up_first(gate, up, x):
    z = up(x)
    return z * F.gelu(gate(x), approximate="tanh")


PAIRS = {
    "gated_silu": lambda gate, up, x: F.silu(gate(x)) * up(x),
    "gated_gelu_tanh": up_first,
    "gated_gelu": lambda gate, up, x: torch.mul(up(x), F.gelu(gate(x))),
    "gated_relu": lambda gate, up, x: F.relu(gate(x), inplace=True) * up(x),
}


def epilogues(report):
    found = {d.site.split(" ")[0]: d.details["epilogue"] for d in report.decisions if d.action == "rewritten"}
    return {name: epilogue for name, epilogue in found.items() if epilogue}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_gate_and_up_become_one_product(name, bias, able, reports):
    model = Gated(PAIRS[name], bias).requires_grad_(False).eval()
    for x in (torch.randn(3, 128), torch.randn(2, 5, 128)):
        hidden = exact(x, rounded(model.gate.weight), rounded(model.up.weight), name,
                       torch.cat([model.gate.bias, model.up.bias]) if bias else None).float()  # fmt: skip
        want = F.linear(hidden, rounded(model.down.weight), model.down.bias)
        torch.testing.assert_close(compiled(model)(x), want, rtol=1e-4, atol=1e-5)
    assert epilogues(reports[0]) == {"gate": name, "up": name}
    text = next(d.reason for d in reports[0].decisions if d.site.startswith("gate"))
    assert "one product with up" in text and f"does {name} too" in text


class Halves(nn.Module):
    """One layer that holds gate and up."""

    def __init__(self, cut):
        super().__init__()
        self.both, self.down, self.cut = nn.Linear(128, 512), nn.Linear(256, 128), cut

    def forward(self, x):
        return self.down(self.cut(self.both(x)))


def _gate_first(y):
    gate, up = y.chunk(2, dim=-1)
    return up * F.silu(gate)


def _gate_second(y):
    up, gate = torch.split(y, 256, -1)
    return up * F.gelu(gate)


@pytest.mark.parametrize(("cut", "name"), [(_gate_first, "gated_silu"), (_gate_second, "gated_gelu")])
def test_a_layer_that_holds_both(cut, name, able, reports):
    model = Halves(cut).requires_grad_(False)
    x = torch.randn(4, 128)
    y = F.linear(x, rounded(model.both.weight), model.both.bias)
    want = F.linear(cut(y), rounded(model.down.weight), model.down.bias)
    torch.testing.assert_close(compiled(model)(x), want, rtol=1e-4, atol=1e-5)
    assert epilogues(reports[0]) == {"both": name}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_of_single_layers(name, able, reports):
    model = nn.Sequential(nn.Linear(128, 256), nn.Identity(), nn.Linear(256, 128)).requires_grad_(False)
    model[1].forward = FUNCTIONS[name]
    x = torch.randn(4, 128)
    hidden = FUNCTIONS[name](F.linear(x, rounded(model[0].weight), model[0].bias))
    want = F.linear(hidden, rounded(model[2].weight), model[2].bias)
    torch.testing.assert_close(compiled(model)(x), want, rtol=1e-4, atol=1e-5)
    assert list(epilogues(reports[0]).values()) == [name]


APART = {
    "gate read twice": lambda gate, up, x: (lambda g: F.silu(g) * up(x) + g)(gate(x)),
    "up read twice": lambda gate, up, x: (lambda u: F.silu(gate(x)) * u + u)(up(x)),
    "another input": lambda gate, up, x: F.silu(gate(x)) * up(x + 1),
    "another activation": lambda gate, up, x: torch.tanh(gate(x)) * up(x),
    "input written between": lambda gate, up, x: (lambda y: F.silu(gate(y)) * up(y.mul_(2)))(x + 0),
}


@pytest.mark.parametrize("combine", APART)
def test_what_is_not_one_product(combine, able, reports):
    model = Gated(APART[combine]).requires_grad_(False)
    x = torch.randn(4, 128)
    twin = Gated(APART[combine])
    twin.load_state_dict({n: rounded(p) if p.ndim == 2 else p for n, p in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), twin(x), rtol=1e-4, atol=1e-5)
    assert not any(is_gated(e) for e in epilogues(reports[0]).values())


def test_nothing_is_fused_where_gradients_are_wanted(able, reports):
    model = Gated(PAIRS["gated_silu"]).requires_grad_(False)
    x = torch.randn(4, 128, requires_grad=True)
    compiled(model, mixed_precision=False)(x).sum().backward()
    assert x.grad is not None and not epilogues(reports[0])
    assert sum("stays apart: gradients need" in d.reason for d in reports[0].decisions) == 2


def test_nothing_is_fused_on_request_or_without_such_kernels(able, monkeypatch, reports):
    model, x = Gated(PAIRS["gated_silu"]).requires_grad_(False), torch.randn(4, 128)
    compiled(model, fp4_fuse=False)(x)
    monkeypatch.setattr(fp4_pass, "refuses_triton", lambda target: "none here")
    torch._dynamo.reset()
    compiled(model)(x)
    assert not epilogues(reports[0]) and not epilogues(reports[1])


def test_a_partner_that_cannot_be_packed_leaves_the_other_alone(able, reports):
    model, x = Gated(PAIRS["gated_silu"]).requires_grad_(False), torch.randn(4, 128)
    model.gate.weight.copy_(rounded(model.gate.weight))  # loses little a second time
    got = compiled(model, fp4_max_error=0.05)(x)
    hidden = F.silu(F.linear(x, rounded(model.gate.weight))) * F.linear(x, model.up.weight)
    torch.testing.assert_close(got, model.down(hidden), rtol=1e-4, atol=1e-5)
    assert reports[0].count("rewritten", "fp4") == 1
    assert not epilogues(reports[0])


def test_updates_are_packed_in_turns_again(able):
    model, x = Gated(PAIRS["gated_silu"]).requires_grad_(False), torch.randn(4, 128)
    run = compiled(model)
    run(x)
    model.up.weight.mul_(-2)
    hidden = exact(x, rounded(model.gate.weight), rounded(model.up.weight), "gated_silu").float()
    want = F.linear(hidden, rounded(model.down.weight), model.down.bias)
    torch.testing.assert_close(run(x), want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ GPU
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("epilogue", "dtype"),
    [("gelu", torch.bfloat16), ("gated_silu", torch.bfloat16), ("gated_gelu_tanh", torch.float16)],
)
@pytest.mark.parametrize("activations", ["same", "fp8"])
def test_every_implementation_on_a_gpu(dtype, epilogue, activations):
    target = get_target("cuda")
    layout = fp4_linear_triton.preferred_layout(target)
    operator("fp4_linear").load()
    for m, (n, k) in ((m, s) for m in (1, 27, 64, 300) for s in ((1008, 2880), (80, 128))):
        w, gate, up = gated_weight(n, k, layout, device="cuda")
        x, bias = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
        if not is_gated(epilogue):
            gate = up = dequantize_weight(*w.tensors, k, "nvfp4", layout, torch.float64)
        ordered = bias if not is_gated(epilogue) else bias[turns(n, True, bias.device)]
        wanted = exact(x, gate, up, epilogue, bias if is_gated(epilogue) else torch.cat([bias, bias]))
        dense = torch.cat([gate, up] if is_gated(epilogue) else [gate]).to(dtype)
        plain = F.linear(x, dense, bias)
        plain = FUNCTIONS[function_of(epilogue)](plain[:, : gate.shape[0]]) * (
            plain[:, gate.shape[0] :] if is_gated(epilogue) else 1
        )
        case = make_case(dtype, m, n, k, "nvfp4", layout, activations)
        for i in operator("fp4_linear").implementations:
            if i.name == "reference" or i.refuses(target, None) or i.refuses(target, case):
                continue
            with force(fp4_linear=i.name):
                got = fp4_linear(x, *w.tensors, ordered, k, "nvfp4", layout, activations, epilogue)
            assert got.shape == wanted.shape and got.is_contiguous()
            ours, theirs = float((got.double() - wanted).norm()), float((plain.double() - wanted).norm())
            limit = 2 * theirs if "fp8" not in i.name else 0.06 * float(wanted.norm())
            assert ours <= limit + 1e-7 * float(wanted.norm()), (i.name, m, n, k)
