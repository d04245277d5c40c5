"""The operator ``fp4_quantize``: what it promises, which implementation runs where, and that they agree."""

import pytest
import torch
from fp4_compiling import Feed, compiled
from torch._dynamo.exc import BackendCompilerFailed
from triton_aot import Launch, compile_launch

from vbcompile.device_catalog import catalog_target
from vbcompile.explainer import explain
from vbcompile.kernels import fp4_rounding
from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_formats import FORMATS
from vbcompile.kernels.fp4_quantize import Fp4QuantizeCase, choose, fp4_quantize, quantize, rounded
from vbcompile.kernels.fp4_quantize_triton import search_options
from vbcompile.kernels.registry import describe, force
from vbcompile.kernels.triton_target import interpreted
from vbcompile.passes import fp4_weights

K = 4096


# ------------------------------------------------------------------------------------------------------------- promises
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("method", ["mse", "nearest"])
@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
def test_the_operator_follows_the_rules(format_name, method, per_row):
    for weight in (torch.randn(6, 40), torch.randn(2, 40, 6, dtype=torch.bfloat16).mT):
        torch.library.opcheck(fp4_quantize, (weight, format_name, method, per_row))
        packed, again = (
            rounded(weight, format_name, method, per_row),
            quantize(weight, format_name, method=method, per_row=per_row),
        )
        assert torch.equal(packed.codes, again.codes) and packed.shape == tuple(weight.shape)


def test_refusals():
    for weight, method, reason in (
        (torch.randn(4), "mse", r"fp4_quantize: shape \[4\] is not a matrix"),
        (torch.randn(4, 8), "mse", "K = 8 is too small"),
        (torch.randn(4, 32), "best", "unknown method 'best' for nvfp4; valid methods: mse, nearest"),
    ):
        with pytest.raises(ValueError, match=reason):
            fp4_quantize(weight, "nvfp4", method)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("method", ["mse", "nearest"])
@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
def test_what_is_not_finite_is_nan_and_other_rows_are_as_ever(format_name, method, per_row):
    weight = torch.randn(4, 64)
    want = dequantize(rounded(weight, format_name, method, True))
    weight[1, 3], weight[2, 40] = torch.nan, -torch.inf
    packed = rounded(weight, format_name, method, per_row)
    values, size = dequantize(packed), packed.format.block_size
    assert values[1, :size].isnan().all() and values[2, 40 // size * size :][:size].isnan().all()
    assert int(values.isnan().sum()) == 2 * size and packed.tensor_scale.isfinite().all()
    if per_row and format_name == "nvfp4":
        assert torch.equal(values[[0, 3]], want[[0, 3]])


# --------------------------------------------------------------------------------------------------------------- choice
@pytest.mark.parametrize(
    ("arch", "format_name", "method", "name"),
    [
        ("cpu", "nvfp4", "mse", "reference"),
        ("sm_90", "nvfp4", "mse", "triton"),
        ("sm_100", "mxfp4", "nearest", "triton"),
        ("gfx942", "mxfp4", "mse", "triton"),
        ("pvc", "nvfp4", "fp8", "triton"),
        ("gaudi2", "mxfp4", "mse", "reference"),
        ("Ascend950PR_9589", "mxfp4", "nearest", "npu_dynamic_mx"),
        ("Ascend950PR_9589", "mxfp4", "mse", "reference"),
        ("Ascend910B1", "mxfp4", "nearest", "reference"),
    ],
)
def test_choice(arch, format_name, method, name):
    case = Fp4QuantizeCase(torch.bfloat16, K, format_name, method, False)
    assert choose(catalog_target(arch), case).implementation.name == name


@pytest.mark.parametrize(
    ("arch", "case", "reason"),
    [
        ("sm_90", (torch.float64, K, "nvfp4", "mse", False), "triton: computes in float32"),
        ("sm_90", (torch.bfloat16, K, "nvfp4", "four_over_six", False), "triton: knows the methods mse, nearest, fp8"),
        ("Ascend950PR_9589", (torch.float32, K, "mxfp4", "nearest", False), "npu_dynamic_mx: takes float16"),
        ("Ascend950PR_9589", (torch.bfloat16, K, "mxfp4", "mse", False), "npu_dynamic_mx: knows the method nearest"),
        ("Ascend950PR_9589", (torch.bfloat16, 4000, "mxfp4", "nearest", False), "columns in multiples of 64"),
        ("Ascend950PR_9589", (torch.bfloat16, K, "nvfp4", "nearest", True), "npu_dynamic_mx: makes MXFP4, not nvfp4"),
    ],
)
def test_refusals_say_why(arch, case, reason):
    choice = choose(catalog_target(arch), Fp4QuantizeCase(*case))
    assert choice.implementation.name == "reference" and reason in choice.explain()


def test_doctor_lists_them():
    rows = {name: reason for operator, name, reason in describe(catalog_target("Ascend910B1")) if "quant" in operator}
    assert rows["reference"] == "" and "Ascend's Triton" in rows["triton"]
    assert rows["npu_dynamic_mx"] == "needs the FP4 units of an Ascend 950, this is Ascend910B1"


# --------------------------------------------------------------------------------------------------------- packing code
@pytest.fixture
def runs():
    """Calls of an implementation of a third party, which rounds as the reference does."""
    calls = []

    def run(*arguments):
        calls.append(arguments[1:])
        return fp4_rounding.quantize_reference(*arguments)

    from vbcompile.kernels import registry

    operator = registry.operator("fp4_quantize")
    operator.load()
    before = list(operator.implementations)
    operator.register(
        registry.Implementation("theirs", run, lambda target, case: None, lambda target, case: float("inf"))
    )
    yield calls
    operator.implementations[:] = before
    registry.forget_choices()


@pytest.mark.usefixtures("fresh_weights")
def test_the_option_reaches_packing_and_packing_anew(runs):
    model, x = Feed().requires_grad_(False), torch.randn(3, 128)
    run = compiled(model, downstream="eager", implementations={"fp4_quantize": "theirs"})
    with torch.no_grad():
        want = run(x)
        assert runs == [("nvfp4", "mse", False)] * 3
        model.down.weight.mul_(2)
        run(x)
        assert len(runs) == 4
        fp4_weights.forget()
        torch._dynamo.reset()
        model.down.weight.div_(2)
        assert torch.equal(compiled(model, downstream="eager")(x), want) and len(runs) == 4


@pytest.mark.usefixtures("fresh_weights")
def test_the_option_reaches_trained_weights(runs):
    model, x = Feed(), torch.randn(3, 128)
    options = {"implementations": {"fp4_quantize": "theirs"}, "fp4_qat": True, "downstream": "aot_eager"}
    run = compiled(model, **options)
    run(x).sum().backward()
    before = len(runs)
    run(x).sum().backward()
    assert len(runs) == before + 3 and model.up.weight.grad is not None


@pytest.mark.usefixtures("fresh_weights")
def test_packing_runs_here_whatever_the_graph_is_explained_for():
    model, x = Feed().requires_grad_(False), torch.randn(3, 128)
    options = {"mode": "speed", "implementations": {"fp4_quantize": "triton"}, "strict": True}
    decisions = explain(model, x, options=options, as_device="sm_90").reports[0].decisions
    assert [d.details["packed_by"][:8] for d in decisions if d.pass_name == "fp4"] == ["triton"] * 3
    with pytest.raises(BackendCompilerFailed, match="fp4_quantize was asked for and refuses: no Triton for cpu"):
        compiled(model, implementations=options["implementations"])(x)


# ------------------------------------------------------------------------------------------------------------- kernels
def launch(format_name, method, k=K, dtype=torch.bfloat16):
    """What a launch for weights of k columns passes."""
    from vbcompile.kernels.fp4_quantize_kernels import fp4_rows_kernel, fp4_search_kernel

    fmt = FORMATS[format_name]
    x, floats, words = torch.empty(16, dtype=dtype), torch.empty(16), torch.empty(16, dtype=torch.uint8)
    if method == "rows":
        options = {"BLOCK": fmt.block_size, "BLOCKS": 4096 // fmt.block_size, "num_warps": 4}
        return Launch(fp4_rows_kernel, (x, words, words, floats, k, k), options)
    options = search_options(fmt, method, k // fmt.block_size)
    return Launch(fp4_search_kernel, (x, floats, words, words, k, k, k * k, k, 1), options)


@pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")
@pytest.mark.parametrize("method", ["mse", "fp8", "rows"])
@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942", "gfx1100"])
def test_kernels_compile_without_spills(arch, format_name, method):
    assert compile_launch(launch(format_name, method), arch).spills == 0


def test_interpreted_kernels(interpreting_python):
    """Every code and scale as in plain PyTorch, but for sums of equal errors in another order."""
    program = """
import torch
from vbcompile.kernels.fp4_quantize import rounded
from vbcompile.kernels.registry import force
torch.manual_seed(0)
weights = [torch.randn(2, 70).bfloat16(), torch.randn(2, 40, 2).half().mT * 1e-3, torch.randn(2, 64) * 1e-38]
weights[0][0, :40] = 0
weights.append(torch.randn(3, 64))
weights[-1][1, 3], weights[-1][2, 40] = torch.nan, torch.inf
for weight in weights:
    for name in ("nvfp4", "mxfp4"):
        for method in ("mse", "nearest", "fp8") if name == "nvfp4" else ("mse", "nearest"):
            for per_row in (False, True)[: 1 + (name == "nvfp4")]:
                want = rounded(weight, name, method, per_row)
                with force(fp4_quantize="triton"):
                    got = rounded(weight, name, method, per_row)
                rows = weight.float().isfinite().all(-1).flatten()
                pairs = [(got.block_scales, want.block_scales), (got.codes, want.codes)]
                same = [torch.equal(a.flatten(0, -2)[rows], b.flatten(0, -2)[rows]) for a, b in pairs]
                nan = want.format.nan_scale
                same.append(torch.equal(got.block_scales == nan, want.block_scales == nan))
                same.append(not rows.all() or torch.equal(got.tensor_scale, want.tensor_scale))
                assert all(same), (name, method, per_row, tuple(weight.shape), same)
"""
    done = interpreting_python.run(["-c", program])
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["mse", "nearest", "fp8"])
@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
def test_triton_rounds_as_plain_pytorch_on_a_card(format_name, method):
    """Sums in another order choose another scale only where two are equally good."""
    torch.manual_seed(0)
    weight = (torch.randn(300, 2000, device="cuda") * torch.logspace(-2, 2, 300, device="cuda")[:, None]).bfloat16()
    for each in (weight, weight.t().contiguous().t(), weight.view(3, 100, 2000)):
        for per_row in (False, True):
            found = []
            for implementation in ("triton", "reference"):
                with force(fp4_quantize=implementation):
                    found.append(rounded(each, format_name, method, per_row))
            ours, plain = found
            assert float((ours.block_scales != plain.block_scales).float().mean()) < 1e-3
            same = (ours.block_scales == plain.block_scales).repeat_interleave(ours.format.block_size // 2, -1)
            assert float((ours.codes != plain.codes)[same].float().mean()) < 1e-3
            torch.testing.assert_close(ours.tensor_scale, plain.tensor_scale, rtol=1e-6, atol=0)
            error, allowed = ((dequantize(p) - each.float()).norm() for p in found)
            assert float(error) <= 1.0001 * float(allowed)
