"""Hopper attention as machine code for sm_90a, which needs no GPU: no spills, tensor cores that run asynchronously."""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_forms import make_forms
from matrix import forms
from test_attention_hopper import tensors

from vbcompile.kernels import attention_hopper as hopper
from vbcompile.kernels import attention_hopper_gradients as gradients
from vbcompile.kernels import attention_problem
from vbcompile.kernels.attention_hopper_call import describe_call
from vbcompile.kernels.attention_layout import broadcast_strides

pytest.importorskip("triton")


SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one block may use on Hopper
REGISTER_FILE = 65536  # registers of one multiprocessor


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


def check_machine_code(compiled, registers: int) -> list[str]:
    """Tensor cores run asynchronously, tiles come by the copy engine, nothing spills, blocks fit. Instructions."""
    names = [name.split(".")[0] for name in disassemble(compiled)]
    assert names.count("HGMMA") >= 16
    assert names.count("UTMALDG") >= 3
    assert "USETMAXREG" in names
    assert not {"LDL", "STL", "HMMA"} & set(names)
    # Serialised products carry a WARPGROUP instruction before and after every HGMMA.
    assert names.count("WARPGROUP") <= names.count("HGMMA")
    assert compiled.metadata.shared <= SHARED_LIMIT
    assert compiled.metadata.num_warps * 32 * registers <= REGISTER_FILE
    return names


def loops_of(names: list[str], dim: int, consumers: int) -> int:
    """Loops over key tiles in a consumer of the forward: each has both products, the rest of its code as much again."""
    return names.count("HGMMA") // (consumers * (8 + dim // 16)) - 1


@pytest.mark.parametrize(
    ("dim", "causal", "dtype"),
    forms(
        [(d, c, torch.bfloat16) for d, c in hopper.FORWARD_CONFIGS] + [(128, True, torch.float16)],
        lambda dim, causal, dtype: dtype == torch.bfloat16,
    ),
)
def test_forward_compiles_without_spills(recorded, dim, causal, dtype):
    kernels, recorders = recorded
    out, lse = hopper.forward(*tensors(dim=dim, dtype=dtype), 0.1, 64 if causal else None, rows_first=True)
    assert out.stride() == (64 * 4 * dim, dim, 4 * dim, 1) and lse.shape == (1, 4, 64)
    ((arguments, options),) = recorders["attention_forward"].launches
    assert options["CAUSAL"] == causal
    names = check_machine_code(*compile_for_hopper(kernels["attention_forward"], arguments, options))
    assert loops_of(names, dim, options["CONSUMERS"]) == (2 if causal else 1)


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


SCORED = {  # form -> head dimensions, the first in every run
    "bias": (64, 128),
    "softcap": (128, 64),
    "window": (128, 64),
    "document_causal": (64,),
    "alibi": (128,),
    "sink": (64,),
    "bool_mask": (128,),
    "chunks": (64,),
}


@pytest.mark.parametrize(
    ("name", "dim"),
    forms(((name, dim) for name, dims in SCORED.items() for dim in dims), lambda name, dim: dim == SCORED[name][0]),
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
    names = check_machine_code(compiled, registers)
    if options["plan"] is not None and options["ROUNDING"] == "halfway":
        assert loops_of(names, dim, options["CONSUMERS"]) == 3


SCORED_BACKWARD = {  # form -> head dimensions, whether gradients of captured tensors are wanted; the first in every run
    "bias": ((64, True),),
    "softcap": ((128, False), (64, False)),
    "window": ((64, False), (128, False)),
    "document_causal": ((64, False),),
    "alibi": ((64, True), (128, False)),
}


@pytest.mark.parametrize(
    ("name", "dim", "wanted"),
    forms(
        ((name, *variant) for name, variants in SCORED_BACKWARD.items() for variant in variants),
        lambda name, *variant: variant == SCORED_BACKWARD[name][0],
    ),
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
