"""FP4 on hardware that has it, none of which is here: compiled code, choice, numerics up to the instruction itself."""

import re

import pytest
import torch
import torch.nn.functional as F
from fp4_compiling import Feed, compiled
from test_fp4_quantize import launch as quantize_launch
from triton_aot import SHARED_BYTES, Launch, compile_launch

from vbcompile.device_catalog import catalog_target
from vbcompile.explainer import explain
from vbcompile.kernels import fp4_native, fp4_quantize
from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_linear import choose, fp4_linear, make_case
from vbcompile.kernels.registry import describe, force
from vbcompile.kernels.triton_target import interpreted

N, K = 4096, 14336
PRODUCTS = {  # how FP4 is multiplied by FP4
    ("sm_100", "nvfp4"): r"tcgen05\.mma\S*kind::mxf4nvf4\.block_scale\.scale_vec::4X",
    ("sm_100", "mxfp4"): r"tcgen05\.mma\S*kind::mxf4\.block_scale\.scale_vec::2X",
    ("sm_120", "nvfp4"): r"mma\.sync\S*kind::mxf4nvf4\.block_scale\.scale_vec::4X\S*e2m1\.e2m1\S*ue4m3",
    ("sm_120", "mxfp4"): r"mma\.sync\S*kind::mxf4nvf4\.block_scale\.scale_vec::2X\S*e2m1\.e2m1\S*ue8m0",
    ("gfx950", "mxfp4"): r"v_mfma_scale_f32_\d+x\d+x\d+_f8f6f4",
}
pytestmark = pytest.mark.usefixtures("fresh_weights")
compiles = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")


def native_launch(arch, m, format_name, kind="e2m1", epilogue="none", n=N, k=K):
    """What a launch of the shipped configuration passes for the weight ``[n, k]``; ``kind`` of x."""
    from vbcompile.kernels.fp4_native_kernels import fp4_native_kernel

    config = fp4_native.native_config(catalog_target(arch), m, n, k, kind == "e2m1")
    words, floats = torch.empty(16, dtype=torch.uint8), torch.empty(16)
    out = torch.empty(16, dtype=torch.float16 if kind == "fp16" else torch.bfloat16)
    x = words if kind == "e2m1" else out
    counters = torch.empty(16, dtype=torch.int32)
    arguments = (x, words, floats, words, words, floats, out, out, floats, counters, m + 1, n, k, k, 7, config.splits)
    options = fp4_native.launch_options(format_name, kind, config, epilogue)
    return Launch(fp4_native_kernel, arguments, {"SPLIT": config.splits > 1, "BIAS": True, **options})


def text_of(report):
    return report.assembly.get("ptx") or report.assembly["amdgcn"]


# -------------------------------------------------------------------------------------------------------- compiled code
@compiles
@pytest.mark.parametrize(("m", "epilogue"), [(1, "none"), (128, "gated_silu"), (2048, "none"), (2048, "gated_silu")])
@pytest.mark.parametrize(("arch", "format_name"), PRODUCTS)
def test_fp4_is_multiplied_by_fp4(arch, format_name, m, epilogue):
    report = compile_launch(native_launch(arch, m, format_name, epilogue=epilogue), arch)
    assert re.search(PRODUCTS[arch, format_name], text_of(report))
    assert report.spills == 0 and report.shared <= SHARED_BYTES[arch]


@compiles
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("m", [1, 64, 2048])
def test_gfx950_decodes_fp4_with_its_scale(m, kind):
    report = compile_launch(native_launch("gfx950", m, "mxfp4", kind), "gfx950")
    text = text_of(report)
    assert f"v_cvt_scalef32_pk_{'bf16' if kind == 'bf16' else 'f16'}_fp4" in text
    assert re.search(rf"v_mfma_f32_\w+_{'bf16' if kind == 'bf16' else 'f16'}", text)
    assert report.spills == 0 and report.shared <= SHARED_BYTES["gfx950"]


@compiles
@pytest.mark.parametrize(("arch", "format_name"), PRODUCTS)
def test_rounding_of_activations_compiles_without_spills(arch, format_name):
    assert compile_launch(quantize_launch(format_name, "rows", K), arch).spills == 0


# --------------------------------------------------------------------------------------------------------------- choice
def chosen(arch, format_name, activations, m=64, layout=None):
    target = catalog_target(arch)
    layout = layout or fp4_native.native_layout(target, format_name, activations, torch.bfloat16, m)
    layout = layout or ("fragments2t" if target.vendor == "nvidia" else "fragments2")
    return choose(target, make_case(torch.bfloat16, m, N, K, format_name, layout, activations))


@pytest.mark.parametrize("m", [1, 64, 4096])
@pytest.mark.parametrize(("arch", "format_name"), PRODUCTS)
def test_w4a4_is_chosen_where_it_is_native_and_asked_for(arch, format_name, m):
    few = arch == "gfx950" and m == 1  # nothing is gained by rounding one row
    assert chosen(arch, format_name, "fp4", m).implementation.name == ("native_decode" if few else "native")
    others = [chosen(arch, format_name, a, m).implementation.name for a in ("same", "fp8")]
    assert "native" not in others and (others == ["native_decode"] * 2) == (arch == "gfx950" and m <= 64)


def test_the_plain_layout_is_for_what_reads_it():
    layout = lambda arch, *case: fp4_native.native_layout(catalog_target(arch), "mxfp4", *case)
    assert layout("sm_100", "fp4", torch.float16, None) == layout("gfx950", "same", torch.bfloat16, 64) == "plain"
    assert layout("sm_100", "fp4", torch.float32, 1) is layout("gfx950", "same", torch.float32, 1) is None
    assert layout("gfx950", "same", torch.bfloat16, 65) is layout("gfx950", "same", torch.bfloat16, None) is None
    with force(fp4_linear="triton"):
        assert layout("sm_100", "fp4", torch.bfloat16, 1) is layout("gfx950", "same", torch.bfloat16, 1) is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_elsewhere_activations_stay_as_they_are(arch):
    choice = chosen(arch, "nvfp4", "fp4", layout="fragments2" if arch == "gfx942" else None)
    assert choice.implementation.name not in ("native", "reference_fp4")
    assert ("native", f"{arch} does not multiply FP4 by FP4 (sm_100, sm_120 and gfx950 do)") in choice.elsewhere


def test_gfx950_says_that_it_has_no_nvfp4():
    choice = chosen("gfx950", "nvfp4", "fp4", layout="fragments2")
    assert ("native", "gfx950 does not multiply nvfp4") in choice.refused
    assert ("native_decode", "gfx950 does not decode nvfp4") in choice.refused


@pytest.mark.parametrize(("arch", "names"), [("sm_100", {"native"}), ("sm_120", {"native"}),
                                             ("gfx950", {"native", "native_decode"}), ("sm_90", set())])  # fmt: skip
def test_doctor_lists_them(arch, names):
    able = {name for op, name, reason in describe(catalog_target(arch)) if op == "fp4_linear" and not reason}
    assert able & {"native", "native_decode"} == names


def test_the_pass_takes_the_option(reports):
    model, x = Feed().requires_grad_(False), torch.randn(3, 128)
    with torch.no_grad():
        got = compiled(model, fp4_activations="fp4")(x)
        torch._dynamo.reset()
        assert torch.equal(got, compiled(model)(x))  # a CPU has no FP4 products
    assert reports[0].count("rewritten", "fp4") == 3


@pytest.mark.parametrize(("arch", "name"), [("sm_100", "native"), ("sm_120", "native"), ("sm_90", "hopper")])
def test_explain_names_what_would_run(arch, name):
    model, x = Feed(256, 512).requires_grad_(False).bfloat16(), torch.randn(256, 256, dtype=torch.bfloat16)
    options = {"mode": "speed", "strict": True, "fp4_activations": "fp4"}
    found = explain(model, x, options=options, as_device=arch).to_dict()
    text = [d["implementation"] for g in found["graphs"] for d in g["decisions"] if d["pass_name"] == "fp4"]
    assert len(text) == 3 and all(t.startswith(f"{name} ") for t in text), text


# ------------------------------------------------------------------------------------------------------------- numerics
def signal(format_name, bits_of_x=4):
    torch.manual_seed(0)
    weight, x = torch.randn(512, 2048) * 0.02, torch.randn(256, 2048)
    w = to_layout(fp4_quantize.quantize(weight, format_name), "plain")
    exact = x.double() @ weight.double().T
    with force(fp4_linear="reference_fp4" if bits_of_x == 4 else "reference"):
        got = fp4_linear(x, *w.tensors, None, 2048, format_name, "plain", "fp4").double()
    return float(20 * torch.log10(exact.norm() / (got - exact).norm()))


@pytest.mark.parametrize(("format_name", "four", "full"), [("nvfp4", 18.0, 21.8), ("mxfp4", 15.9, 19.1)])
def test_accuracy_is_what_the_documentation_says(format_name, four, full):
    assert signal(format_name) == pytest.approx(four, abs=0.1)
    assert signal(format_name, 16) == pytest.approx(full, abs=0.1)


@pytest.mark.parametrize("format_name", ["nvfp4", "mxfp4"])
def test_reference_multiplies_what_was_rounded(format_name):
    x, weight, bias = torch.randn(2, 3, 100), torch.randn(70, 100), torch.randn(70)
    x[0, 1] *= 1e4
    packed = fp4_quantize.quantize(weight, format_name)
    w = to_layout(packed, "plain")
    rounded = dequantize(fp4_native.round_rows(x.view(6, 100), format_name)).view(2, 3, 100)
    assert float((rounded - x)[0, 1].norm() / x[0, 1].norm()) < 0.15
    with force(fp4_linear="reference_fp4"):
        run = lambda x: fp4_linear(x, *w.tensors, bias, 100, format_name, "plain", "fp4")
        torch.testing.assert_close(run(x), F.linear(rounded, dequantize(packed), bias), rtol=1e-5, atol=1e-4)
        x[1, 2, 5], x[0, 0, 3] = torch.nan, torch.inf
        broken = run(x).isnan()
        assert broken[1, 2].all() and broken[0, 0].all() and int(broken.sum()) == 140
        assert run(x[:0]).shape == (0, 3, 70)


def test_interpreted_kernels(interpreting_python):
    """All but the instruction: that one is a product in NumPy here, which the interpreter does not have."""
    program = """
import numpy as np, torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from vbcompile.kernels import fp4_native as T
from vbcompile.kernels.fp4 import dequantize, take_rows
from vbcompile.kernels.fp4_epilogue import apply_epilogue, is_gated, turns
from vbcompile.kernels.fp4_formats import E2M1_VALUES, FORMATS
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.registry import force

def values(handle, scale, packs_rows):
    data = handle.data.T if packs_rows else handle.data
    if data.dtype == np.uint8:
        data = np.array(E2M1_VALUES)[np.stack((data & 15, data >> 4), -1)].reshape(data.shape[0], -1)
    if scale is not None:
        block = data.shape[1] // scale.data.shape[1]
        table = np.array(FORMATS["mxfp4" if block == 32 else "nvfp4"].scale_values)
        data = data * np.repeat(table[scale.data], block, 1)
    return data.astype(np.float64)

def dot_scaled(self, a, a_scale, a_type, b, b_scale, b_type, fast, a_pack, b_pack, total):
    product = values(a, a_scale, False) @ values(b, b_scale, True).T
    return interpreter.TensorHandle((total.data + product).astype(np.float32), total.dtype)

def constant_formats(self, a, a_scale, a_format, b, b_scale, b_format, *rest, own=TritonSemantic.dot_scaled):
    return own(self, a, a_scale, tl.constexpr(a_format), b, b_scale, tl.constexpr(b_format), *rest)

interpreter.InterpreterBuilder.create_dot_scaled = dot_scaled
TritonSemantic.dot_scaled = constant_formats
torch.manual_seed(0)
for name in ("nvfp4", "mxfp4"):
    for m, n, k in ((1, 70, 100), (19, 144, 600), (3, 16, 2064)):
        x = torch.randn(m, k + 3).half()[:, :k]
        x[0] *= 4
        x[-1, : k // 2] = 0
        with force(fp4_quantize="triton"):
            got = T.round_rows(x, name)
        packed = quantize(torch.randn(n, k) * 0.1, name)
        for epilogue in ("none", "gelu", "gated_silu"):
            rows = take_rows(packed, turns(n, True, x.device)) if is_gated(epilogue) and n % 16 == 0 else packed
            if is_gated(epilogue) and n % 16:
                continue
            w, bias = to_layout(rows, "plain"), torch.randn(n)
            for left, run in ((dequantize(got, torch.float64), T.product_fp4), (x.double(), T.product)):
                exact = left @ dequantize(rows, torch.float64).T + bias.double()
                with force(fp4_quantize="triton"):
                    out = run(x, *w.tensors, bias, k, name, "plain", epilogue=epilogue)
                torch.testing.assert_close(out.double(), apply_epilogue(exact, epilogue), rtol=2e-3, atol=2e-3)
    x[0, 3] = torch.nan
    broken = T.product_fp4(x, *w.tensors, bias, k, name, "plain").isnan()
    assert torch.equal(broken, torch.arange(m).unsqueeze(1).expand(m, n) == 0)
"""
    done = interpreting_python.run(["-c", program])
    assert done.returncode == 0, done.stderr[-4000:]
