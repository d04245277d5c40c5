"""Products of rows sorted by expert with a stack of FP4 weights: meaning, kernel, gradient, contract, bad input."""

from pathlib import Path

import pytest
import torch
from triton_aot import Launch, compile_launch

from vbcompile.device import Target, get_target
from vbcompile.kernels import fp4_linear_triton
from vbcompile.kernels.fp4 import PackedWeight
from vbcompile.kernels.fp4_grouped import (
    Fp4GroupedCase,
    fp4_grouped_linear,
    fp4_grouped_linear_backward,
    to_grouped_layout,
)
from vbcompile.kernels.fp4_layout import dequantize_weight
from vbcompile.kernels.fp4_linear_triton import preferred_layout
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.registry import operator
from vbcompile.kernels.triton_target import interpreted

ENDS = (0, 5, 5, 12)  # empty groups at the front and in the middle; rows past the last end


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)


def stack(layout="plain", format_name="nvfp4", experts=4, n=70, k=100, device="cpu"):
    parts = [quantize(torch.randn(n, k) * 0.02 * (e + 1), format_name) for e in range(experts)]
    tensors = (torch.stack([getattr(p, name) for p in parts]) for name in ("codes", "block_scales", "tensor_scale"))
    packed = PackedWeight(*tensors, format_name, (experts, n, k))
    return to_grouped_layout(packed.to(device), layout)


def decoded(w):
    parts = [dequantize_weight(*p, w.k, w.format_name, w.layout, torch.float64) for p in zip(*w.tensors, strict=True)]
    return torch.stack(parts)


def exact(x, dense, ends):
    out, start = x.new_zeros(x.shape[0], dense.shape[1], dtype=torch.float64), 0
    for weight, end in zip(dense, ends, strict=True):
        out[start:end] = x[start:end].double() @ weight.T
        start = end
    return out


@pytest.mark.parametrize("layout", ["plain", "fragments2t", "fragments8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_meets_its_own_expert(layout, dtype):
    w, x = stack(layout), torch.randn(14, 103).to(dtype)[:, :100]
    got = fp4_grouped_linear(x, *w.tensors, torch.tensor(ENDS, dtype=torch.int32), 100, "nvfp4", layout)
    want = exact(x, decoded(w), ENDS)
    assert got.dtype == dtype and float((got.double() - want).norm() / want.norm()) < 4 * torch.finfo(dtype).eps
    assert not got[12:].any()


def test_gradients():
    w, ends = stack(n=12, k=16), torch.tensor(ENDS, dtype=torch.int32)
    x = torch.randn(14, 16, dtype=torch.float64, requires_grad=True)
    run = lambda x: fp4_grouped_linear(x, *w.tensors, ends, 16, "nvfp4", "plain")
    assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)


def test_operator_contract():
    w, ends = stack("fragments2t"), torch.tensor(ENDS, dtype=torch.int32)
    x = torch.randn(14, 100, requires_grad=True)
    torch.library.opcheck(fp4_grouped_linear, (x, *w.tensors, ends, 100, "nvfp4", "fragments2t"))
    grad = torch.randn(14, 70)
    torch.library.opcheck(fp4_grouped_linear_backward, (grad, *w.tensors, ends, 100, "nvfp4", "fragments2t"))
    assert fp4_grouped_linear(x[:0], *w.tensors, ends * 0, 100, "nvfp4", "fragments2t").shape == (0, 70)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": torch.tensor([1, 2, 3, 4])}, "ends must be int32"),
        ({"ends": torch.tensor([1, 2], dtype=torch.int32)}, r"contiguous \[2, ...\]"),
        ({"x": torch.randn(2, 3, 100)}, r"x must be \[T, 100\]"),
        ({"x": torch.randn(2, 99)}, r"floating point \[..., 100\]"),
        ({"layout": "spiral"}, "unknown FP4 layout"),
        ({"format_name": "fp5"}, "fp5"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    codes, block_scales, row_scale = stack().tensors
    arguments = {
        "x": torch.randn(14, 100), "codes": codes, "block_scales": block_scales, "row_scale": row_scale,
        "ends": torch.tensor(ENDS, dtype=torch.int32), "k": 100, "format_name": "nvfp4", "layout": "plain",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fp4_grouped_linear(**(arguments | change))
    with pytest.raises(ValueError, match="stack of experts"):
        to_grouped_layout(quantize(torch.randn(8, 16)), "plain")


def test_interpreted_kernel(interpreting_python):
    """In a process of its own: Triton decides at import whether it interprets."""
    program = """
import torch, test_fp4_grouped as T
from vbcompile.kernels.fp4_grouped import grouped_product
torch.manual_seed(0)
for name, layout, (n, k) in (("nvfp4", "fragments2", (70, 100)), ("mxfp4", "fragments8", (130, 260))):
    w, x = T.stack(layout, name, n=n, k=k), torch.randn(40, k).half()
    for ends in (T.ENDS, (0, 0, 0, 40), (33, 33, 40, 40), (0, 0, 0, 0)):
        got = grouped_product(x, *w.tensors, torch.tensor(ends, dtype=torch.int32), k, name, layout)
        want = T.exact(x, T.decoded(w), ends)
        assert float((got.double() - want).norm()) <= 1e-3 * float(want.norm()), (name, layout, ends)
"""
    done = interpreting_python.run(["-c", program], Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_compiles_without_spills(arch):
    from vbcompile.kernels.fp4_grouped_kernels import fp4_grouped_kernel

    vendor = "nvidia" if arch.startswith("sm") else "amd"
    target = Target(vendor, "cuda", arch, multiprocessors=132, features=frozenset({"triton", "bf16"}))
    config = fp4_linear_triton.tile_config(target, 16, 2880, 2880)
    layout = preferred_layout(target)
    x, ints = torch.empty(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.int32)
    arguments = (x, ints, ints.view(torch.uint8), torch.empty(16), ints, x, 32, 2880, 2880, 2880, 46, 46)
    options = {
        "EXPERTS": 32, "BLOCK_M": config.block_m, "ROWS": config.rows, "COLUMNS": config.columns,
        "STAGES": config.stages, "num_warps": config.warps,
        **fp4_linear_triton.decoding(target, "mxfp4", layout, torch.bfloat16),
    }  # fmt: skip
    assert compile_launch(Launch(fp4_grouped_kernel, arguments, options), arch).spills == 0


def test_choice():
    hopper = Target("nvidia", "cuda", "sm_90", multiprocessors=132, features=frozenset({"triton", "bf16"}))
    case = Fp4GroupedCase(torch.bfloat16, 64, 32, 2880, 2880, "mxfp4", "fragments2t")
    assert operator("fp4_grouped_linear").choose(hopper, case).implementation.name == "triton"
    many = Fp4GroupedCase(torch.bfloat16, 1 << 16, 32, 2880, 2880, "mxfp4", "fragments2t")
    assert operator("fp4_grouped_linear").choose(hopper, many).implementation.name == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 40, 600])
def test_on_a_gpu(dtype, rows):
    layout = preferred_layout(get_target("cuda"))
    for name, (n, k) in (("nvfp4", (72, 104)), ("mxfp4", (1000, 2880))):
        w = stack(layout, name, experts=5, n=n, k=k, device="cuda")
        ends = [*sorted(torch.randint(0, rows + 1, (4,)).tolist()), rows]
        x = torch.randn(rows, k, device="cuda", dtype=dtype, requires_grad=True)
        got = fp4_grouped_linear(x, *w.tensors, torch.tensor(ends, dtype=torch.int32, device="cuda"), k, name, layout)
        want = exact(x.detach(), decoded(w), ends)
        assert float((got.double() - want).norm() / want.norm()) < 2 * torch.finfo(dtype).eps
        grad = torch.randn_like(got)
        got.backward(grad)
        back = exact(grad, decoded(w).transpose(1, 2), ends)
        assert float((x.grad.double() - back).norm() / back.norm()) < 2 * torch.finfo(dtype).eps
