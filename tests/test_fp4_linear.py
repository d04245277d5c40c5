"""The FP4 linear operator: layouts, every implementation against float64, gradients, contract."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vbcompile.device import Target, get_target
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import fp4_linear_cpu, fp4_linear_triton
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_layout import LAYOUTS, _untile_scales, dequantize_weight, refuses_layout, to_layout
from vbcompile.kernels.fp4_linear import choose, fp4_linear, fp4_linear_backward, fp4_linear_reference, make_case
from vbcompile.kernels.fp4_linear_few import product_few
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.registry import operator

FORMATS = ("nvfp4", "mxfp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 70, 100), (3, 33, 48), (6, 20, 77), (40, 130, 260))  # rows, N, K
HOPPER = Target("nvidia", "cuda", "sm_90", multiprocessors=132, features=frozenset({"triton", "bf16", "fp8"}))


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)


def weight(n, k, format_name="nvfp4", layout="plain", scale=0.02):
    return to_layout(quantize(torch.randn(n, k) * scale, format_name), layout)


def decoded(w, dtype=torch.float64):
    return dequantize_weight(*w.tensors, w.k, w.format_name, w.layout, dtype)


def check_error(got, x, w, bias):
    """Our error against float64 is at most twice plain PyTorch's in the same dtype."""
    dense = decoded(w)
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    plain = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    assert got.dtype == x.dtype and got.shape == exact.shape and got.is_contiguous()
    ours, theirs = float((got.double() - exact).norm()), float((plain.double() - exact).norm())
    assert ours <= 2 * theirs + 1e-7 * float(exact.norm())


# -------------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("shape", [(5, 70), (130, 200), (64, 128), (1, 33)])
def test_layouts_hold_the_same_weight(layout, format_name, shape):
    source = torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    source[0] = 0 if shape[0] > 1 else source[0]
    packed = quantize(source, format_name)
    if refuses_layout(packed, layout):
        pytest.fail("an ordinary weight must fit every layout")
    there = to_layout(packed, layout)
    assert torch.equal(decoded(there, torch.float32), dequantize(packed))
    if layout != "plain" and format_name == "nvfp4":  # every row has its largest scale in the same octave
        rows = _untile_scales(there.block_scales, 4)[: shape[0]].amax(1) >> 3
        assert (rows[int(shape[0] > 1) :] == 17).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_and_scale_survives_every_layout(layout):
    for name, scales, block in (("nvfp4", range(127), 16), ("mxfp4", range(254), 32)):
        codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
        blocks = torch.tensor(scales, dtype=torch.uint8)[:, None].repeat(1, 512 // block)
        packed = PackedWeight(codes, blocks, torch.ones(1), name, (len(scales), 512))
        assert torch.equal(decoded(to_layout(packed, layout)), dequantize(packed, torch.float64))


def test_scales_too_far_apart_are_refused_by_tile_layouts():
    codes = torch.full((1, 32), 0x22, dtype=torch.uint8)
    packed = PackedWeight(codes, torch.tensor([[100, 119]], dtype=torch.uint8), torch.ones(1), "mxfp4", (1, 64))
    assert "differ by more" in refuses_layout(packed, "fragments2t")
    with pytest.raises(ValueError, match="differ by more"):
        to_layout(packed, "fragments2t")
    assert refuses_layout(packed, "plain") is None
    packed.codes[:, :16] = 0  # a block of zeros has no scale to keep
    assert refuses_layout(packed, "fragments2t") is None


def test_layout_errors():
    packed = quantize(torch.randn(4, 32))
    with pytest.raises(ValueError, match="unknown FP4 layout 'tiles'; valid: plain"):
        to_layout(packed, "tiles")
    with pytest.raises(ValueError, match="takes a matrix"):
        to_layout(quantize(torch.randn(2, 4, 32)), "plain")


# ------------------------------------------------------------------------------------------------------ implementations
CASES = list(itertools.product(FORMATS, DTYPES, SHAPES, (False, True)))


@pytest.mark.parametrize(("format_name", "dtype", "shape", "biased"), CASES)
def test_cpu_kernels_are_as_exact_as_pytorch(format_name, dtype, shape, biased):
    assert fp4_linear_cpu.unavailable() is None
    m, n, k = shape
    w, x = weight(n, k, format_name), torch.randn(m, k).to(dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    for run in (fp4_linear_cpu.product, fp4_linear_cpu.dequantize_product):
        check_error(run(x, *w.tensors, bias, k, format_name, "plain"), x, w, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_cpu_decoding_is_exact(dtype, format_name):
    w = weight(37, 208 if format_name == "nvfp4" else 224, format_name)
    got = fp4_linear_cpu.dequantize(*w.tensors, w.k, format_name, dtype)
    assert torch.equal(got, decoded(w, torch.float32).to(dtype))


@pytest.mark.parametrize("format_name", FORMATS)
def test_cpu_product_of_every_code_and_scale_is_exact(format_name):
    """Rows of the unit matrix read the weight out; scales that are NaN or have a sign are no special case."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    block = fp4_format(format_name).block_size
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 512 // block)
    if format_name == "mxfp4":
        scales[253:255] = 252  # six times the two largest are infinite in float32
    packed = PackedWeight(codes, scales, torch.ones(1), format_name, (256, 512))
    got = fp4_linear_cpu.product(torch.eye(512), codes, scales, torch.ones(256), None, 512, format_name, "plain")
    torch.testing.assert_close(got.T, dequantize(packed), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format_name", FORMATS)
def test_cpu_product_of_every_remainder(format_name):
    """Ends of a row at each block of a vector's step, even and odd numbers of rows of both operands."""
    block = fp4_format(format_name).block_size
    rows = zip(itertools.cycle((1, 2, 3, 5)), itertools.cycle((33, 34, 61)), strict=False)
    for k, (m, n) in zip(range(block, 640, block), rows, strict=False):
        columns = max(block, k - k % 3)
        w, x = weight(n, columns, format_name), torch.randn(m, columns)
        check_error(fp4_linear_cpu.product(x, *w.tensors, None, w.k, format_name, "plain"), x, w, None)


def test_cpu_product_runs_on_every_thread_and_gives_the_same_bits(warm_python):
    script = (
        "import os, torch; from vbcompile.kernels import fp4_linear_cpu as c; torch.set_num_threads(1);"
        "codes, scales = torch.arange(999 * 256).view(999, 256).byte(), torch.full((999, 32), 40).byte();"
        "run = lambda: c.product(torch.ones(1, 512), codes, scales, torch.ones(999), None, 512, 'nvfp4', 'plain');"
        "one = run(); before = len(os.listdir('/proc/self/task')); torch.set_num_threads(3);"
        "assert torch.equal(one, run()); print(len(os.listdir('/proc/self/task')) - before)"
    )
    run = warm_python.run(["-c", script])
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == 2


@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma")])
def test_cpu_kernels_of_lesser_processors(monkeypatch, tmp_path, flags):
    """Plain C++ and AVX2, and a compiler without OpenMP."""
    if flags and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("needs AVX2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fp4_linear_cpu, "_THREADS", ("--no-such-flag",))
    monkeypatch.setattr(fp4_linear_cpu, "compile_flags", lambda: ("-O1", "-std=c++20", *flags))
    kernels = fp4_linear_cpu.library.__wrapped__()
    monkeypatch.setattr(fp4_linear_cpu, "library", lambda: kernels)
    for format_name in FORMATS:
        test_cpu_product_of_every_code_and_scale_is_exact(format_name)
        test_cpu_product_of_every_remainder(format_name)
        for dtype in DTYPES:
            test_cpu_decoding_is_exact(dtype, format_name)


def test_cpu_kernels_say_why_they_cannot_run(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = make_case(torch.float32, 1, 64, 64, "nvfp4", "plain")
    cpu = next(i for i in operator("fp4_linear").implementations if i.name == "cpu")
    assert "no-such-compiler" in cpu.refuses(get_target("cpu"), None)
    assert cpu.refuses(HOPPER, case) == "runs on CPUs"
    with pytest.raises(fp4_linear_cpu.Unavailable, match="no-such-compiler"):
        fp4_linear_cpu.library.__wrapped__()


def test_a_failing_compiler_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fp4_linear_cpu, "compile_flags", lambda: ("-O0", "--no-such-flag"))
    with pytest.raises(fp4_linear_cpu.Unavailable, match="failed"):
        fp4_linear_cpu.library.__wrapped__()
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(fp4_linear_cpu, "library", fp4_linear_cpu.library.__wrapped__)
    reason = fp4_linear_cpu.unavailable.__wrapped__()
    assert "Not a directory" in reason and f"keep their precision on this processor: {reason}" in caplog.text


def test_interpreted_triton_kernels(interpreting_python):
    """In a process of its own: Triton decides at import whether it interprets."""
    program = """
import torch
from vbcompile.kernels import fp4_linear_triton as T
from vbcompile.kernels.fp4_layout import dequantize_weight, to_layout
from vbcompile.kernels.fp4_linear_fp8 import quantize_rows
from vbcompile.kernels.fp4_quantize import quantize
torch.manual_seed(0)
for name in ("nvfp4", "mxfp4"):
    for layout in ("fragments2", "fragments8"):
        for m, n, k in ((1, 70, 100), (19, 130, 260), (3, 1, 33)):
            w = to_layout(quantize(torch.randn(n, k) * 0.02, name), layout)
            dense = dequantize_weight(*w.tensors, k, name, layout, torch.float32)
            for dtype in (torch.float16, torch.float32):
                assert torch.equal(T.dequantize(*w.tensors, k, name, layout, dtype), dense.to(dtype))
                bias = torch.randn(n).to(dtype) if m > 1 else None
                x = torch.randn(m, k + 3).to(dtype)[:, :k]
                exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
                plain = torch.nn.functional.linear(x, dense.to(dtype), bias)
                for config in (None, T.TileConfig(16, 2, 2, 2, 4, 2), T.TileConfig(32, 1, 1, 3, 4, 2)):
                    got = T.product(x, *w.tensors, bias, k, name, layout, config)
                    ours, theirs = (got.double() - exact).norm(), (plain.double() - exact).norm()
                    assert ours <= 2 * theirs + 1e-7 * exact.norm(), (name, layout, m, n, k, dtype, config)
for k, paired in ((1000, False), (17408, False), (17408, True)):
    x = torch.randn(3, k)
    x[1] = 0
    rounded, scale = quantize_rows(x, paired)
    torch.testing.assert_close(scale[:, 0] * 448, torch.where(x.abs().amax(1) > 0, x.abs().amax(1), 448.0))
    if paired:
        x = x.view(3, k // 16, 2, 8).transpose(2, 3).reshape(3, k)
    # the interpreter loses the carry into the exponent
    torch.testing.assert_close(rounded.float() * scale, x, rtol=0.51, atol=2e-4)
    assert float((rounded.float() * scale - x).norm() / x.norm()) < 0.1
"""
    done = interpreting_python.run(["-c", program])
    assert done.returncode == 0, done.stderr[-4000:]


# ------------------------------------------------------------------------------------------------------------- operator
@pytest.mark.parametrize("layout", ["plain", "fragments2t"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_operator_on_odd_inputs(dtype, layout):
    w = weight(70, 100, layout=layout)
    bias = torch.randn(70, dtype=torch.float32)
    for x in (
        torch.randn(2, 3, 100),
        torch.randn(100),
        torch.randn(0, 100),
        torch.randn(2, 0, 100),
        torch.randn(100, 5).t(),
        torch.randn(4, 200)[:, ::2],
        torch.randn(2, 1, 100).expand(2, 3, 100),
    ):
        x = x.to(dtype)
        got = fp4_linear(x, *w.tensors, bias, 100, "nvfp4", layout)
        check_error(got, x, w, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_decoded_weight(dtype):
    w = weight(48, 100)
    x = torch.randn(2, 5, 100, dtype=dtype, requires_grad=True)
    bias = torch.randn(48, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 48, dtype=dtype)
    got = torch.autograd.grad(fp4_linear(x, *w.tensors, bias, 100, "nvfp4", "plain"), (x, bias), grad)
    want = torch.autograd.grad(F.linear(x, decoded(w, dtype), bias), (x, bias), grad)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_in_float64():
    w = weight(5, 33)
    x = torch.randn(3, 33, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    run = lambda x, bias: fp4_linear(x, *w.tensors, bias, 33, "nvfp4", "plain")
    assert torch.autograd.gradcheck(run, (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: run(x, None), (x,))


@pytest.mark.parametrize("layout", ["plain", "fragments8t"])
def test_operator_contract(layout):
    w = weight(40, 64, "mxfp4", layout)
    for shape in ((3, 64), (2, 3, 64), (0, 64)):
        x = torch.randn(shape, requires_grad=True)
        bias = torch.randn(40, requires_grad=True)
        for b in (bias, None):
            torch.library.opcheck(fp4_linear, (x, *w.tensors, b, 64, "mxfp4", layout))
        torch.library.opcheck(fp4_linear_backward, (torch.randn(*shape[:-1], 40), *w.tensors, 64, "mxfp4", layout))


def test_nothing_but_the_packed_weight_is_kept_for_the_backward():
    w, saved = weight(64, 128), []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp4_linear(x, *w.tensors, None, 128, "nvfp4", "plain")
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in w.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 99)}, "x must be floating point"),
        ({"x": torch.ones(2, 100, dtype=torch.int32)}, "x must be floating point"),
        ({"bias": torch.randn(71)}, r"bias must be floating point \[70\]"),
        ({"codes": torch.zeros(70, 50, dtype=torch.uint8)}, "codes and block scales"),
        ({"row_scale": torch.ones(70, dtype=torch.float64)}, "row_scale must be float32"),
        ({"layout": "tiles"}, "unknown FP4 layout"),
        ({"format_name": "fp4"}, "unknown FP4 format 'fp4'"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    w = weight(70, 100)
    arguments = dict(zip(("codes", "block_scales", "row_scale"), w.tensors, strict=True))
    arguments = {"x": torch.randn(2, 100), **arguments, "bias": None, "k": 100, "format_name": "nvfp4"}
    with pytest.raises(ValueError, match=message):
        fp4_linear(**{**arguments, "layout": "plain", **change})


# --------------------------------------------------------------------------------------------------------------- choice
def test_choice_on_hopper_follows_the_number_of_rows():
    def chosen(m, **extra):
        case = make_case(torch.bfloat16, m, 4160, 4096, "nvfp4", "fragments2t", **extra)
        return choose(HOPPER, case).implementation.name

    assert [chosen(m) for m in (1, 3, 8, 64, 256)] == ["triton_diagonal"] * 2 + ["triton_stream", "hopper", "hopper"]
    assert chosen(4096) in ("hopper", "triton_dequantize")
    assert chosen(4096, activations="fp8") == "triton_fp8"
    old = Target("nvidia", "cuda", "sm_80", multiprocessors=108, features=frozenset({"triton", "bf16"}))
    large = make_case(torch.bfloat16, 4096, 4160, 4096, "nvfp4", "fragments8t")
    implementation = choose(old, large).implementation
    assert implementation.name == "triton_dequantize"
    assert implementation.cost(old, large) > 1  # and says that it is slower than bfloat16


def test_choice_names_the_reason_for_the_reference():
    old = Target("nvidia", "cuda", "sm_75", features=frozenset({"triton"}))
    choice = choose(old, make_case(torch.float16, 1, 64, 64, "nvfp4", "plain"))
    assert choice.implementation.name == "reference"
    assert any("sm_80" in reason for _, reason in choice.refused)
    assert fp4_linear_triton.preferred_layout(old) == "plain"


def test_reference_takes_every_layout():
    x = torch.randn(3, 100)
    for layout in LAYOUTS:
        w = weight(70, 100, layout=layout)
        check_error(fp4_linear_reference(x, *w.tensors, None, 100, "nvfp4", layout), x, w, None)


# ------------------------------------------------------------------------------------------------------------------ GPU
def test_a_call_without_rows_is_not_for_hopper():
    for activations in ("same", "fp8"):
        case = make_case(torch.bfloat16, 0, 4096, 4096, "nvfp4", "fragments2t", activations)
        assert "hopper" not in choose(catalog_target("sm_90"), case).implementation.name


def gpu_products(m, n, k, format_name, dtype, activations="same"):
    """``(name, function)`` of every implementation but the references that takes a case on this GPU."""
    target = get_target("cuda")
    case = make_case(dtype, m, n, k, format_name, fp4_linear_triton.preferred_layout(target), activations)
    operator("fp4_linear").load()
    for i in operator("fp4_linear").implementations:
        if not i.name.startswith("reference") and not i.refuses(target, None) and not i.refuses(target, case):
            yield i.name, i.run


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 16, 27, 33, 64, 100, 300])
def test_every_implementation_on_a_gpu(dtype, m, format_name):
    layout = fp4_linear_triton.preferred_layout(get_target("cuda"))
    for n, k in ((1000, 2880), (70, 100), (4096, 4096), (208, 7168)):
        w = to_layout(quantize(torch.randn(n, k, device="cuda") * 0.02, format_name), layout)
        x = torch.randn(m, k + 8, device="cuda", dtype=dtype)[:, :k]
        bias = torch.randn(n, device="cuda", dtype=dtype) if k != 2880 else None
        for name, run in gpu_products(m, n, k, format_name, dtype):
            got = run(x, *w.tensors, bias, k, format_name, layout)
            check_error(got, x, w, bias)
            assert torch.equal(got, run(x, *w.tensors, bias, k, format_name, layout)), f"{name}: two runs differ"
        check_error(fp4_linear(x, *w.tensors, bias, k, format_name, layout), x, w, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 32, 64, 128, 512])
def test_every_code_and_scale_is_exact_on_a_gpu(rows, dtype, format_name):
    """Rows hold one scale each, columns the codes; products with the identity are sums of one term."""
    layout = fp4_linear_triton.preferred_layout(get_target("cuda"))
    scales, block = (range(128), 16) if format_name == "nvfp4" else (range(118, 142), 32)
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    blocks = torch.tensor([s % 127 if block == 16 else min(s, 136) for s in scales], dtype=torch.uint8)
    blocks = blocks[:, None].repeat(1, 512 // block)
    if block == 16:
        blocks[:, -1] = 126  # the largest: the others then keep their bytes
    packed = PackedWeight(codes, blocks, torch.ones(1), format_name, (len(scales), 512))
    w = to_layout(packed.to("cuda"), layout)
    want = dequantize_weight(*w.tensors, 512, format_name, layout, torch.float32).to(dtype).t()
    eye = torch.eye(512, device="cuda", dtype=dtype)
    for name, run in gpu_products(rows, len(scales), 512, format_name, dtype):
        whole = rows > 1 or name in ("triton_few", "triton_diagonal")
        parts = eye.split(rows) if whole else eye[:4].split(rows)
        got = torch.cat([run(e, *w.tensors, None, 512, format_name, layout) for e in parts])
        assert torch.equal(got, want[: len(got)]), (name, int((got != want[: len(got)]).sum()))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-30, 1e-4, 255.0, 300.0, 1e30])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_magnitudes_of_x_on_a_gpu(m, size):
    """Some elements of x beyond what is multiplied in place of the weights, and all of them far from one."""
    layout = fp4_linear_triton.preferred_layout(get_target("cuda"))
    w = to_layout(quantize(torch.randn(70, 1024, device="cuda") * 0.02), layout)
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
    for change in (lambda: x.mul_(size), lambda: x.normal_().index_fill_(1, torch.arange(0, 999, 400).cuda(), size)):
        change()
        for _, run in gpu_products(m, 70, 1024, "nvfp4", x.dtype):
            check_error(run(x, *w.tensors, None, 1024, "nvfp4", layout), x, w, None)
    x[0, 5] = float("inf")
    for name, run in gpu_products(m, 70, 1024, "nvfp4", x.dtype):
        assert not run(x, *w.tensors, None, 1024, "nvfp4", layout)[0].isfinite().any(), name


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["fragments2t", "fragments8t"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_in_both_layouts_on_a_gpu(dtype, layout):
    if get_target("cuda").vendor != "nvidia":
        pytest.skip("NVIDIA's layouts")
    for (n, k), m, format_name in itertools.product(((1000, 2880), (70, 192)), (1, 9, 32), FORMATS):
        w = to_layout(quantize(torch.randn(n, k, device="cuda") * 0.02, format_name), layout)
        x, bias = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
        check_error(product_few(x, *w.tensors, bias, k, format_name, layout), x, w, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("m", [7, 64, 130, 500])
def test_fp8_products_keep_their_signal_on_a_gpu(m, format_name):
    layout = fp4_linear_triton.preferred_layout(get_target("cuda"))
    for n, k in ((1040, 4096), (208, 2064)):
        dense, x = torch.randn(n, k, device="cuda"), torch.randn(m, k + 8, device="cuda", dtype=torch.bfloat16)[:, :k]
        x[3] *= 1000
        x[5] = 0
        bias = torch.randn(n, device="cuda")
        exact = x.double() @ dense.double().T
        w, few = to_layout(quantize(dense, format_name, method="fp8"), layout), torch.arange(m, device="cuda") != 3
        for name, run in gpu_products(m, n, k, format_name, x.dtype, "fp8"):
            got = run(x, *w.tensors, bias, k, format_name, layout).double() - bias.double()
            ratio = float(20 * torch.log10(exact[few].norm() / (got - exact)[few].norm()))
            assert ratio > (21.2 if format_name == "nvfp4" else 18.5), (name, ratio)
            assert float(got[5].abs().max()) < 0.02, name  # the bias in bfloat16


@pytest.mark.gpu
def test_gradient_on_a_gpu():
    layout = fp4_linear_triton.preferred_layout(get_target("cuda"))
    w = to_layout(quantize(torch.randn(512, 384, device="cuda") * 0.02), layout)
    x = torch.randn(7, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(7, 512, device="cuda", dtype=torch.bfloat16)
    fp4_linear(x, *w.tensors, None, 384, "nvfp4", layout).backward(grad)
    torch.testing.assert_close(x.grad, grad @ decoded(w, torch.bfloat16))
