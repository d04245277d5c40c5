"""Stacks of experts' weights: every form in which models multiply by them, on packed copies."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import interpreted, reasons, rounded
from torch import nn

from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_grouped import fp4_grouped_linear, fp4_grouped_linear_reference, to_grouped_layout
from vbcompile.kernels.fp4_grouped_cpu import grouped_product
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.passes import fp4_weights

E, N, K = 4, 192, 128


pytestmark = pytest.mark.usefixtures("fresh_weights")


def decoded(weight, transposed=False):
    """FP4 values of a stack, each expert with a tensor scale of its own."""
    return rounded(weight.mT).mT if transposed else rounded(weight)


def product_by_groups(x, weight, ends):
    """``weight [E, N, K]``, row by row in float64."""
    rows, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        rows.append(x[begin:end].double() @ weight[expert].double().T)
        begin = end
    return torch.cat(rows)


class Stack(nn.Module):
    """One product with a stack in the form of ``run(module, x)``."""

    def __init__(self, run, transposed=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, K, N) if transposed else torch.randn(E, N, K), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(E, N), requires_grad=False)
        self.run = run

    def forward(self, x, *more):
        return self.run(self, x, *more)


FORMS = {
    "bmm": (lambda m, x: torch.bmm(x, m.weight), True, (E, 3, K)),
    "bmm of a transpose": (lambda m, x: torch.bmm(x, m.weight.transpose(1, 2)), False, (E, 3, K)),
    "matmul": (lambda m, x: x @ m.weight.mT, False, (E, 5, K)),
    "einsum-like permute": (lambda m, x: torch.matmul(x, m.weight.permute(0, 2, 1)), False, (E, 2, K)),
    "linear of one": (lambda m, x: F.linear(x, m.weight[2]), False, (2, 3, K)),
    "linear of the last": (lambda m, x: F.linear(x, m.weight[-1], m.bias[-1]), False, (6, K)),
    "product with one": (lambda m, x: x @ m.weight[1], True, (6, K)),
    "loop": (lambda m, x: torch.stack([F.linear(x, m.weight[e]) for e in range(E)]).sum(0), False, (3, K)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, reports):
    run, transposed, shape = FORMS[form]
    model, x = Stack(run, transposed), torch.randn(shape)
    twin = copy.deepcopy(model)
    twin.weight.copy_(decoded(model.weight, transposed))
    torch.testing.assert_close(interpreted(model)(x), twin(x), rtol=1e-4, atol=1e-4)
    assert reports[0].count("rewritten", "fp4") == (E if form == "loop" else 1) and not reports[0].failures
    assert reports[0].decisions[-1].details["shape"] == [E, N, K]


def test_an_expert_chosen_by_a_tensor(reports):
    model, x = Stack(lambda m, x, e: F.linear(x, m.weight[e])), torch.randn(3, K)
    run = interpreted(model)
    for expert in (0, 3, -1):
        want = F.linear(x, decoded(model.weight)[expert])
        torch.testing.assert_close(run(x, torch.tensor(expert)), want, rtol=1e-4, atol=1e-4)
    assert reports[0].count("rewritten", "fp4") == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(transposed, reports):
    """As ``transformers`` calls them: bfloat16, rows sorted by expert."""
    orient = (lambda w: w) if transposed else (lambda w: w.transpose(-2, -1))
    model = Stack(lambda m, x, ends: F.grouped_mm(x, orient(m.weight), offs=ends), transposed).bfloat16()
    x, ends = torch.randn(7, K).bfloat16(), torch.tensor([2, 2, 6, 7], dtype=torch.int32)
    got = interpreted(model)(x, ends)
    values = decoded(model.weight, transposed)
    want = product_by_groups(x, values.mT if transposed else values, ends)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=0.3)
    assert reports[0].count("rewritten", "fp4") == 1 and got.dtype == torch.bfloat16


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_for_every_row(left, transposed, reports):
    """Weights gathered for each row, on either side of the product."""

    def run(m, x, ids):
        chosen = m.weight[ids].mT if transposed else m.weight[ids]  # [T, N, K]
        if left:
            return torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(x.unsqueeze(1), chosen.transpose(1, 2)).squeeze(1)

    model, x, ids = Stack(run, transposed), torch.randn(6, K), torch.tensor([3, 0, 0, -1, 2, 0])
    values = decoded(model.weight, transposed)
    want = torch.stack([(values[i].T if transposed else values[i]) @ row for i, row in zip(ids, x, strict=True)])
    torch.testing.assert_close(interpreted(model)(x, ids), want, rtol=1e-4, atol=1e-4)
    assert reports[0].count("rewritten", "fp4") == 1 and not reports[0].failures


def moe(kind):
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shared = {
        "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 100, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**shared, intermediate_size=256, num_local_experts=E)).eval()
    config = Qwen3MoeConfig(**shared, moe_intermediate_size=192, num_experts=E, decoder_sparse_step=1)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize(("kind", "how"), [("mixtral", "grouped_mm"), ("qwen3_moe", "batched_mm")])
def test_models_of_transformers(kind, how, reports):
    model, tokens = moe(kind), torch.arange(6)[None]
    model.config._experts_implementation = how
    twin, stacks = copy.deepcopy(model), 0
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if weight.numel() >= 2**15 // 2 and weight.ndim > 1 and "embed" not in name and "lm_head" not in name:
                if weight.numel() >= 2**15:
                    weight.copy_(rounded(weight))
                stacks += weight.ndim == 3
        got, want = interpreted(model)(tokens, use_cache=False).logits, twin(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    packed = [d for r in reports for d in r.decisions if d.pass_name == "fp4" and d.action == "rewritten"]
    experts = [d for d in packed if len(d.details["shape"]) == 3]
    assert len(experts) == stacks == 2


def test_gradients_pass_through_frozen_experts():
    model = Stack(lambda m, x: torch.bmm(x, m.weight.mT))
    x = torch.randn(E, 3, K, requires_grad=True)
    interpreted(model, mixed_precision=False)(x).square().sum().backward()
    values = decoded(model.weight).double()
    want = 2 * (x.detach().double() @ values.mT) @ values
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-4, atol=1e-3)


def test_updated_and_dropped_experts():
    model, x = Stack(lambda m, x: torch.bmm(x, m.weight.mT)), torch.randn(E, 3, K)
    run = interpreted(model)
    run(x)
    model.weight.mul_(-2)
    want = torch.bmm(x, decoded(model.weight).mT)
    torch.testing.assert_close(run(x), want, rtol=1e-4, atol=1e-3)
    torch._dynamo.reset()
    run = interpreted(model, fp4_master="drop")
    for _ in range(2):
        torch.testing.assert_close(run(x), want, rtol=1e-4, atol=1e-3)
    assert model.weight.untyped_storage().nbytes() == 4


class OtherUses(nn.Module):
    """Products with stacks that are none of the forms."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, N, K), requires_grad=False)

    def forward(self, x):
        shared = x @ self.weight.mT  # one x for all experts: broadcast
        some = torch.bmm(x.expand(2, -1, -1), self.weight[1:3].mT)
        return shared, some, self.weight.sum()


def test_other_products_stay(reports):
    model, x = OtherUses(), torch.randn(3, K)
    for got, want in zip(interpreted(model)(x), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not reports[0].count("rewritten", "fp4") and not reasons(reports[0])


@pytest.mark.parametrize("ends", [[0, 0, 0, 0], [1, 2, 3, 4], [5, 5, 5, 5], [0, 9, 9, 9], [2, 3, 3, 7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_kernel_against_the_reference(ends, dtype):
    weight = to_grouped_layout(quantize(torch.randn(E, N, K)), "plain")
    x, ends = torch.randn(9, K).to(dtype), torch.tensor(ends, dtype=torch.int32)
    arguments = (x, *weight.tensors, ends, K, "nvfp4", "plain")
    got, want = grouped_product(*arguments), fp4_grouped_linear_reference(*arguments)
    torch.testing.assert_close(got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0.2)
    assert torch.equal(fp4_grouped_linear(*arguments), got)


def test_mxfp4_stacks_whose_scales_are_far_apart_stay_plain():
    stack = torch.randn(E, 128, 128)
    stack[2, 5, 32:64] *= 2.0**-30
    weight = nn.Parameter(stack, requires_grad=False)
    key = fp4_weights.PackKey("mxfp4", "fragments2", False)
    assert fp4_weights.pack([weight], key, ["weight"]).linear.layout == "plain"
    near = nn.Parameter(torch.randn(E, 128, 128), requires_grad=False)
    packed = fp4_weights.pack([near], key, ["weight"])
    assert packed.linear.layout == "fragments2" and packed.linear.codes.shape[0] == E
    assert dequantize(quantize(near, "mxfp4")).shape == near.shape


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bmm", "loop", "linear of one"])
def test_forms_on_a_gpu(form, reports):
    run, transposed, shape = FORMS[form]
    model, x = Stack(run, transposed).cuda().bfloat16(), torch.randn(shape, device="cuda").bfloat16()
    twin = copy.deepcopy(model)
    twin.weight.copy_(decoded(model.weight, transposed))
    torch.testing.assert_close(interpreted(model)(x), twin(x), rtol=2e-2, atol=0.5)
    assert reports[0].count("rewritten", "fp4") == (E if form == "loop" else 1)
