"""Hopper attention: what it refuses, what it compiles to for sm_90a (no GPU needed), and numerics on a GPU."""

import contextlib
import math
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attention_compare import compare, compare_forward
from attention_forms import causal, make_forms, make_function, softcap

from vbcompile.device import get_target
from vbcompile.kernels import attention_gpu, attention_problem
from vbcompile.kernels import attention_hopper as hopper
from vbcompile.kernels import attention_hopper_gradients as gradients
from vbcompile.kernels.attention_case import make_case
from vbcompile.kernels.attention_hopper_call import describe_call, refuses_call
from vbcompile.kernels.attention_hopper_program import compile_hopper, peel
from vbcompile.kernels.attention_layout import broadcast_strides
from vbcompile.kernels.attention_problem import with_padded_lead
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.score_triton import CapturedPattern

pytest.importorskip("triton")

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one block may use on Hopper
REGISTER_FILE = 65536  # registers of one multiprocessor


# ------------------------------------------------------------------------------------------- refusals
def tensors(batch=1, heads=4, key_heads=2, queries=64, keys=128, dim=64, dtype=torch.bfloat16):
    q = torch.empty(batch, heads, queries, dim, dtype=dtype)
    k, v = (torch.empty(batch, key_heads, keys, dim, dtype=dtype) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize(
    ("change", "scale", "offset", "reason"),
    [
        ({}, 0.1, None, None),
        ({}, 0.1, 0, None),
        ({"dim": 128, "dtype": torch.float16}, 0.1, 64, None),
        ({"dtype": torch.float32}, 0.1, None, "dtypes"),
        ({"dim": 96}, 0.1, None, "head dimensions"),
        ({"key_heads": 3}, 0.1, None, "no multiple"),
        ({"queries": 0}, 0.1, None, "empty"),
        ({}, -0.1, None, "scale"),
        ({}, 0.0, None, "scale"),
        ({}, math.nan, None, "scale"),
        ({}, 0.1, -1, "causal offset"),
    ],
)
def test_problem_is_refused_with_a_reason(change, scale, offset, reason):
    answer = hopper.refuses_problem(*tensors(**change), scale, offset)
    assert answer is None if reason is None else reason in answer


def test_mismatched_tensors_are_refused():
    q, k, v = tensors()
    assert "fit together" in hopper.refuses_problem(q, k, v[:, :, :100], 0.1, None)
    assert "fit together" in hopper.refuses_problem(q.expand(2, -1, -1, -1), k, v, 0.1, None)
    assert "dtypes" in hopper.refuses_problem(q, k.half(), v, 0.1, None)
    assert "[B, H, S, D]" in hopper.refuses_problem(q[0], k, v, 0.1, None)


def test_strides_the_accelerator_cannot_address_are_refused():
    x = torch.empty(2, 4, 32, 64, dtype=torch.bfloat16)
    assert hopper.refuses_layout("x", x) is None
    assert hopper.refuses_layout("x", x.transpose(1, 2)) is None
    assert "last dimension" in hopper.refuses_layout("x", x.mT)
    assert "positive multiple" in hopper.refuses_layout("x", x[:, :1].expand(2, 4, 32, 64))
    odd = torch.empty(2 * 4 * 32 * 68, dtype=torch.bfloat16)
    assert "positive multiple" in hopper.refuses_layout(
        "x", odd.as_strided((2, 4, 32, 64), (4 * 32 * 68, 32 * 68, 68, 1))
    )
    assert "aligned" in hopper.refuses_layout("x", odd[1:].as_strided((1, 1, 32, 64), (64, 64, 64, 1)))
    assert hopper.refuses_layout("x", odd.as_strided((1, 1, 32, 64), (7, 0, 64, 1))) is None  # size 1: any stride


def test_other_devices_are_refused():
    assert hopper.refuses_capability((9, 0)) is None
    assert "8.0" in hopper.refuses_capability((8, 0))
    assert "10.0" in hopper.refuses_capability((10, 0))
    assert "NVIDIA" in hopper.refuses(*tensors(), 0.1, None)
    with pytest.raises(ValueError, match="NVIDIA"):
        hopper.forward(*tensors(), 0.1, None, False)


# ------------------------------------------------------------------------------------------- the cubic of exp2
def cubic_exp2(x: np.ndarray) -> np.ndarray:
    """The instructions of ``exp2_mixed`` in float32."""
    single = np.float32
    t = np.maximum(x, single(-125.0))
    r = t + single(12582912.0)
    f = t - (r - single(12582912.0))
    p = single(0.055171654) * f + single(0.24261113)
    p = p * f + single(0.69326097)
    p = p * f + single(0.99992806)
    return ((r.view(np.uint32) << np.uint32(23)) + p.view(np.uint32)).view(np.float32)


def test_cubic_of_exp2_is_close():
    x = -np.random.default_rng(0).uniform(0, 120, 100_000).astype(np.float32)
    assert np.max(np.abs(cubic_exp2(x) / np.exp2(x.astype(np.float64)) - 1)) < 1e-4
    assert cubic_exp2(np.float32([-np.inf]))[0] < 1e-37
    source = (Path(hopper.__file__).parent / "attention_hopper_tiles.py").read_text()
    for constant in (0.055171654, 0.24261113, 0.69326097, 0.99992806, 12582912.0, -125.0):
        assert f"0f{np.float32(constant).view(np.uint32):08X}" in source


# ------------------------------------------------------------------------------------------- capped scores, masks
def test_polynomial_of_tanh_is_close():
    from vbcompile.kernels import attention_hopper_tiles as tiles

    limit, a, b, c = (x.value for x in (tiles.TANH_LIMIT, tiles.TANH_A, tiles.TANH_B, tiles.TANH_C))
    u = np.linspace(-limit, limit, 10_001)[:5000]
    square = u * u
    assert np.max(np.abs(u * (a + square * (b + square * c)) / np.tanh(u) - 1)) < 2.3e-4  # half of the instruction's


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [("softcap", torch.bfloat16, 0.0), ("softcap", torch.float16, None), ("bias", torch.bfloat16, None)],
)
def test_capped_scores_are_recognised(name, dtype, expected):
    (q, k, _), captured = make_forms(256, 512, 64, 64)[name].inputs(dtype)
    call = describe_call(q, k, captured, (2, 2), 0.1, make_forms(256, 512, 64, 64)[name].function)
    assert call.program.cap == expected


def test_weights_of_capped_scores_fit_the_range():
    caps = [compile_hopper(make_function(softcap(c)), (), True, False, False).cap for c in (30.0, 50.0, 51.0)]
    assert caps[0] == 0.0 and 0 < caps[1] < 60 and caps[2] is None


def test_keys_of_a_lane_below_a_bound():
    """The bit pattern of ``bits_below``: a lane holds keys ``8 a + c`` after its first one."""
    numbers = [8 * (n // 2) + n % 2 for n in range(32)]
    for bound in range(-20, 150):
        count = max(2 * (bound >> 3) + min(bound & 7, 2), 0)
        bits = (1 << 32) - 1 if count > 31 else (1 << count) - 1
        assert [bool(bits >> n & 1) for n in range(32)] == [key < bound for key in numbers]


# ------------------------------------------------------------------------------------------- compiled for sm_90a
class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((arguments, options))


@pytest.fixture
def recorded(monkeypatch):
    """Runs forward and backward on the CPU up to their launches; gives the recorders by kernel name."""
    from vbcompile.kernels import attention_hopper_backward, attention_hopper_forward, attention_hopper_rows

    homes = {
        "attention_forward": attention_hopper_forward,
        "attention_backward": attention_hopper_backward,
        **dict.fromkeys(("prepare_backward", "prepare_scores", "finish_backward"), attention_hopper_rows),
    }
    kernels = {name: getattr(home, name) for name, home in homes.items()}
    recorders = {name: Recorder() for name in homes}
    for name, home in homes.items():
        monkeypatch.setattr(home, name, recorders[name])
    for module in (hopper, gradients):
        monkeypatch.setattr(module, "refuses", lambda *a: None)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return kernels, recorders


def constants_of(path: tuple[int, ...], kind, value) -> dict[tuple[int, ...], Any]:
    """Arguments known at compile time, by their path in tuples of arguments."""
    if kind == "constexpr":
        return {path: value}
    if not isinstance(kind, tuple):
        return {}
    inside = [constants_of((*path, n), k, v) for n, (k, v) in enumerate(zip(kind, value, strict=True))]
    return {p: v for part in inside for p, v in part.items()}


def compile_for_hopper(kernel, arguments, options):
    """The kernel compiled as the launcher would specialise it."""
    import triton
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.experimental.gluon._runtime import GluonASTSource

    target = GPUTarget("cuda", 90, 32)
    backend = CUDABackend(target)
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants = {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = "constexpr"
        if not parameter.is_constexpr:
            kind = native_specialize_impl(backend, value, False, not parameter.do_not_specialize, True)[0]
        constants.update(constants_of((place,), kind, value))
        signature[parameter.name] = kind
    source = GluonASTSource(kernel, signature, constexprs=constants)
    chosen = {name: options[name] for name in ("num_warps", "maxnreg")}
    return triton.compile(source, target=target, options=chosen), chosen["maxnreg"]


def disassemble(compiled) -> list[str]:
    """Machine instructions, predicates removed."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)


def check_machine_code(compiled, registers: int) -> None:
    """Tensor cores run asynchronously, tiles come by the copy engine, nothing spills, blocks fit."""
    names = [name.split(".")[0] for name in disassemble(compiled)]
    assert names.count("HGMMA") >= 16
    assert names.count("UTMALDG") >= 3
    assert "USETMAXREG" in names
    assert not {"LDL", "STL", "HMMA"} & set(names)
    # Serialised products carry a WARPGROUP instruction before and after every HGMMA.
    assert names.count("WARPGROUP") <= names.count("HGMMA")
    assert compiled.metadata.shared <= SHARED_LIMIT
    assert compiled.metadata.num_warps * 32 * registers <= REGISTER_FILE


@pytest.mark.parametrize(
    ("dim", "causal", "dtype"),
    [(d, c, torch.bfloat16) for d, c in hopper.FORWARD_CONFIGS] + [(128, True, torch.float16)],
)
def test_forward_compiles_without_spills(recorded, dim, causal, dtype):
    kernels, recorders = recorded
    out, lse = hopper.forward(*tensors(dim=dim, dtype=dtype), 0.1, 64 if causal else None, rows_first=True)
    assert out.stride() == (64 * 4 * dim, dim, 4 * dim, 1) and lse.shape == (1, 4, 64)
    ((arguments, options),) = recorders["attention_forward"].launches
    assert options["CAUSAL"] == causal
    check_machine_code(*compile_for_hopper(kernels["attention_forward"], arguments, options))


@pytest.mark.parametrize(("dim", "causal"), list(gradients.BACKWARD_CONFIGS))
def test_backward_compiles_without_spills(recorded, dim, causal):
    kernels, recorders = recorded
    q, k, v = tensors(dim=dim)
    lse = torch.empty(1, 4, 64)
    dq, dk, dv = gradients.backward(q, None, q, k, v, q, lse, 0.1, 64 if causal else None)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    ((arguments, options),) = recorders["attention_backward"].launches
    compiled, registers = compile_for_hopper(kernels["attention_backward"], arguments, options)
    check_machine_code(compiled, registers)
    if gradients.BACKWARD_CONFIGS[dim, causal].block_k == 64:  # meant to run two blocks on a multiprocessor
        assert 2 * (compiled.metadata.shared + 1024) <= 228 * 1024
        assert 2 * compiled.metadata.num_warps * 32 * registers <= REGISTER_FILE


def test_offset_beyond_all_keys_is_no_causal_kernel(recorded):
    _, recorders = recorded
    hopper.forward(*tensors(keys=128), 0.1, 127, rows_first=False)
    hopper.forward(*tensors(keys=128), 0.1, 126, rows_first=False)
    assert [options["CAUSAL"] for _, options in recorders["attention_forward"].launches] == [False, True]


SCORED = {  # form, head dimension
    "bias": (64, 128),
    "softcap": (64, 128),
    "window": (64, 128),
    "document_causal": (64,),
    "alibi": (128,),
    "sink": (64,),
    "bool_mask": (128,),
}
SLOW = {("bias", 128), ("softcap", 64), ("window", 64), ("document_causal", 64), ("alibi", 128), ("bool_mask", 128)}


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        pytest.param(name, dim, marks=pytest.mark.slow if (name, dim) in SLOW else ())
        for name, dims in SCORED.items()
        for dim in dims
    ],
)
def test_score_functions_compile_without_spills(recorded, monkeypatch, name, dim):
    kernels, recorders = recorded
    monkeypatch.setattr(attention_problem, "launch", lambda *a, **options: None)
    form = make_forms(256, 512, dim, dim)[name]
    (q, k, v), captured = form.inputs(torch.bfloat16)
    call = describe_call(q, k, [c.to(torch.bfloat16) if c.dim() else c for c in captured], (2, 2), 0.1, form.function)
    hopper.forward(q, k, v, 0.1, None, False, call=call)
    ((_, options),) = recorders["attention_forward"].launches
    arguments = recorders["attention_forward"].launches[0][0]
    compiled, registers = compile_for_hopper(kernels["attention_forward"], arguments, options)
    check_machine_code(compiled, registers)


SCORED_BACKWARD = {  # form -> head dimensions, whether gradients of captured tensors are wanted
    "bias": ((64, True),),
    "softcap": ((64, False), (128, False)),
    "window": ((64, False), (128, False)),
    "document_causal": ((64, False),),
    "alibi": ((64, True), (128, False)),
}


@pytest.mark.parametrize(
    ("name", "dim", "wanted"),
    [
        pytest.param(name, dim, wanted, marks=() if (name, dim) == ("softcap", 128) else pytest.mark.slow)
        for name, variants in SCORED_BACKWARD.items()
        for dim, wanted in variants
    ],
)
def test_backward_of_score_functions_compiles_without_spills(recorded, monkeypatch, name, dim, wanted):
    kernels, recorders = recorded
    monkeypatch.setattr(attention_problem, "launch", lambda *a, **options: None)
    form = make_forms(256, 512, dim, dim)[name]
    (q, k, v), captured = form.inputs(torch.bfloat16)
    captured = [c.to(torch.bfloat16) if c.is_floating_point() else c for c in captured]
    numbers = tuple(n for n, c in enumerate(captured) if wanted and c.is_floating_point())
    call = describe_call(q, k, captured, (2, 2), 0.1, form.function, numbers)
    sums = tuple(torch.empty(captured[n].shape) for n in numbers)
    rows = SimpleNamespace(
        delta=torch.empty(2, 2, 256), low=torch.empty(2, 2, 256), empty=None, gradients=sums,
        gradient_strides=tuple(map(broadcast_strides, sums)),
    )  # fmt: skip
    gradients.backward_scored(q, q, k, v, torch.empty(2, 2, 256), 0.1, call, rows)
    ((arguments, options),) = recorders["attention_backward"].launches
    compiled, registers = compile_for_hopper(kernels["attention_backward"], arguments, options)
    check_machine_code(compiled, registers)
    ((_, prepared),) = recorders["prepare_scores"].launches
    assert prepared["UNBOUNDED"] == (name == "bias")


def test_constant_factors_leave_the_function():
    program = ScoreFunction(
        (("score",), ("const", 20.0), ("div", 0, 1), ("tanh", 2), ("const", 5.0), ("mul", 4, 3)), score=5
    )
    inside, inner, outer = peel(program)
    assert (inner, outer) == (1 / 20.0, 5.0)
    assert inside.program == (("score",), ("tanh", 0)) and inside.score == 1
    twice = ScoreFunction((("score",), ("const", 2.0), ("mul", 0, 1), ("add", 2, 0)), score=3)
    assert peel(twice)[1:] == (1.0, 1.0)  # the score is read twice: nothing moves
    negative = ScoreFunction((("score",), ("tanh", 0), ("const", -2.0), ("mul", 1, 2)), score=3)
    assert peel(negative)[2] == 1.0  # the largest logit must stay the largest


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("bias", torch.bfloat16, None),
        ("bias", torch.float64, "rows and columns of torch.float64"),
        ("oddities", torch.bfloat16, "registers"),
        ("sink", torch.bfloat16, None),
    ],
)
def test_score_functions_are_refused_with_a_reason(name, dtype, reason):
    form = make_forms(64, 128, 64, 64)[name]
    shapes = [(tuple(c.shape), dtype) for c in form.inputs(torch.float32)[1]]
    answer = refuses_call(shapes, 64, 128, with_padded_lead(form.function, 2))
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize(
    ("name", "needs", "reason"),
    [
        ("bias", (), None),
        ("softcap", (), None),
        ("document_causal", (), None),
        ("dropout", (), "dropout"),
        ("softcap", (True, True, True), None),
        ("causal", (True, True, True), None),
        ("bias", (True, True, True, True), None),
        ("document_causal", (True, True, True, False, False), None),
        ("sink_per_row", (True, True, True, True), None),
        ("temperature", (True, True, True, False), None),
        ("temperature", (True, True, True, True), "the score and an addend"),
    ],
)
def test_routing(name, needs, reason):
    form = make_forms(128, 128, 64, 64)[name]
    (q, k, v), captured = form.inputs(torch.bfloat16)
    arguments = (q, k, v, captured, form.scale, form.dropout_p, form.function.dumps(), needs)
    hopper_card = SimpleNamespace(vendor="nvidia", arch="sm_90")
    answer = attention_gpu._refuses_hopper(hopper_card, make_case(*arguments))
    assert answer is None if reason is None else reason in answer


def test_alibi_adds_one_number_per_column_and_one_per_row():
    form = make_forms(128, 128, 64, 64)["alibi"]
    patterns = tuple(map(CapturedPattern.of, form.inputs(torch.bfloat16)[1]))
    program = compile_hopper(with_padded_lead(form.function, 2), patterns, True, False, False)
    assert program.offset is not None and "tl.fma(step" in program.source and not program.unbounded


def test_rows_the_copy_engine_cannot_address_are_refused():
    form = make_forms(64, 124, 64, 64)["bias"]
    assert "16 bytes" in refuses_call([((1, 2, 64, 124), torch.bfloat16)], 64, 124, form.function)


# ------------------------------------------------------------------------------------------- numerics
CASES = [  # batch, heads, key heads, queries, keys, causal offset, rows first, dtype
    (2, 4, 2, 300, 520, None, False, torch.bfloat16),
    (1, 2, 1, 333, 333, 0, True, torch.bfloat16),
    (1, 3, 3, 128, 1000, 872, True, torch.float16),
    (2, 4, 4, 1024, 1024, 0, False, torch.bfloat16),
    (1, 1, 1, 1, 77, None, True, torch.bfloat16),
    (1, 8, 2, 700, 65, 3, False, torch.bfloat16),
    (3, 6, 2, 515, 2049, 100, True, torch.float16),
]


def plain_attention(q, k, v, scale, offset):
    """(out, lse) of plain PyTorch in the dtype of q; lse in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    if offset is not None:
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        s = s.masked_fill(torch.arange(k.shape[2], device=q.device)[None] > rows + offset, -math.inf)
    return s.softmax(-1) @ v, s.double().logsumexp(-1)


def error(x, exact) -> float:
    return (x.double() - exact).abs().max().item()


@pytest.fixture
def hopper_gpu():
    if torch.cuda.get_device_capability() != (9, 0) or hopper.refuses_triton():
        pytest.skip("needs a Hopper GPU and a verified Triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(hopper_gpu, case, dim):
    batch, heads, key_heads, queries, keys, offset, rows_first, dtype = case
    sizes = ((heads, queries), (key_heads, keys), (key_heads, keys), (heads, queries))
    q, k, v, g = (torch.randn(batch, s, h, dim, device="cuda", dtype=dtype).transpose(1, 2) for h, s in sizes)
    g_lse = torch.randn(batch, heads, queries, device="cuda") if rows_first else None
    scale = dim**-0.5

    def results(kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        out, lse = plain_attention(*leaves, scale, offset)
        loss = (out * g.to(kind)).sum().double() + (0.0 if g_lse is None else (lse * g_lse.double()).sum())
        return [out.detach(), *torch.autograd.grad(loss, leaves)], lse.detach()

    exact, exact_lse = results(torch.float64)
    plain, _ = results(dtype)
    out, lse = hopper.forward(q, k, v, scale, offset, rows_first)
    ours = [out, *gradients.backward(g, g_lse, q, k, v, out, lse, scale, offset)]
    assert error(lse, exact_lse) < 1e-3
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert error(a, c) <= 2 * error(b, c) + 1e-6, name


FORMS = make_forms(300, 432, 64, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FORMS if name != "additive_min"])
def test_score_functions_match_float64(hopper_gpu, name):
    form = FORMS[name]
    (q, k, v), captured = form.inputs(torch.bfloat16)
    case = make_case(*(t.cuda() for t in (q, k, v)), captured, form.scale, form.dropout_p, form.function.dumps())
    if attention_gpu._refuses_hopper(get_target(torch.device("cuda")), case):
        pytest.skip("left to the general kernels")
    rows = compare_forward(form, torch.bfloat16, attention_gpu._hopper_forward, seeds=range(2))
    assert not [row for row in rows if not row[1] <= row[2]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FORMS if name != "additive_min"])
def test_gradients_of_score_functions_match_float64(hopper_gpu, name):
    form = FORMS[name]
    (q, k, v), captured = form.inputs(torch.bfloat16)
    q, k, v = (t.cuda() for t in (q, k, v))
    for with_captured in (True, False):
        needs = [True] * 3 + [with_captured and c.is_floating_point() for c in captured]
        case = make_case(q, k, v, captured, form.scale, form.dropout_p, form.function.dumps(), needs)
        if attention_gpu._refuses_hopper(get_target(q.device), case) is None:
            break
    else:
        pytest.skip("left to the general kernels")
    run = (attention_gpu._hopper_forward, attention_gpu._hopper_backward)
    rows = compare(form, torch.bfloat16, range(2), run, with_captured)
    assert not [row for row in rows if not row[1] <= row[2]]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("size", [1.0, 8.0, 100.0, -100.0])
@pytest.mark.parametrize("causal_mask", [False, True])
def test_capped_scores_of_any_size(hopper_gpu, dim, size, causal_mask):
    """Scores within the polynomial's limit, partly beyond it, far beyond it, and all of them near the lower bound."""
    q, k, v = (torch.randn(1, 4, 700, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q = -k.abs() if size < 0 else q * size
    k = k.abs() * 4 if size < 0 else k
    function = make_function(softcap(50.0), mask=causal() if causal_mask else None)
    out, lse = attention_gpu._hopper_forward(q, k, v, [], dim**-0.5, 0.0, None, function.dumps())

    def reference(dtype):
        logits = 50 * torch.tanh((q.to(dtype) @ k.to(dtype).mT * dim**-0.5) / 50)
        if causal_mask:
            logits = logits.masked_fill(torch.ones(700, 700, device="cuda").triu(1).bool(), -math.inf)
        return logits.softmax(-1) @ v.to(dtype), logits.double().logsumexp(-1)

    (exact, exact_lse), (plain, plain_lse) = reference(torch.float64), reference(torch.bfloat16)
    assert error(out, exact) <= 2 * error(plain, exact)
    assert error(lse, exact_lse) <= 2 * error(plain_lse, exact_lse)


@pytest.mark.gpu
def test_nan_key_reaches_its_rows_only_under_a_cap(hopper_gpu):
    q, k, v = (torch.randn(1, 1, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[0, 0, 200] = math.nan
    function = make_function(softcap(30.0), mask=causal()).dumps()
    out, _ = attention_gpu._hopper_forward(q, k, v, [], 0.125, 0.0, None, function)
    assert out[0, 0, 200:].isnan().all() and out[0, 0, :200].isfinite().all()


@pytest.mark.gpu
def test_rows_of_least_finite_scores_are_uniform(hopper_gpu):
    """Padding as Hugging Face writes it: rows of nothing but ``finfo.min`` average the values."""
    q, k, v = (torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(1, 1, 256, 256, device="cuda", dtype=torch.bfloat16)
    bias[:, :, :7] = torch.finfo(torch.bfloat16).min
    function = ScoreFunction((("score",), ("captured", 0), ("add", 0, 1)), score=2).dumps()
    out, _ = attention_gpu._hopper_forward(q, k, v, [bias], 0.125, 0.0, None, function)
    expected = v.float().mean(2, keepdim=True).expand(-1, -1, 7, -1)
    torch.testing.assert_close(out[:, :, :7].float(), expected, atol=2e-2, rtol=0)


@pytest.mark.gpu
def test_repeated_runs_agree(hopper_gpu):
    q, k, v, g = (torch.randn(2, 8, 1500, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    runs = []
    for _ in range(3):
        out, lse = hopper.forward(q, k, v, 0.09, 0, False)
        runs.append((out, lse, *gradients.backward(g, None, q, k, v, out, lse, 0.09, 0)[1:]))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("position", [0, 7, 130])
def test_nan_key_reaches_its_rows_only(hopper_gpu, dim, position):
    q, k, v = (torch.randn(1, 1, 256, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[0, 0, position] = math.nan
    out, _ = hopper.forward(q, k, v, 0.1, 0, False)
    assert out[0, 0, position:].isnan().all() and out[0, 0, :position].isfinite().all()
