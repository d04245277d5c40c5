"""Run the attention operator as if CPU tensors were a vendor's, and compare it with plain PyTorch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from attention_forms import Form, eager
from torch import Tensor

from vbcompile import backend, device_vendors
from vbcompile.device import Target
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import attention, attention_training, fp4_linear, fp4_quantize, registry, vendor_operators
from vbcompile.kernels.attention import attention_reference
from vendors import ascend, gaudi, intel
from vendors.packages import Release, release

SEED = torch.tensor([0x1234_5678_9ABC], dtype=torch.int64)
# vendor -> the device that plays it, its package, the kernels of a release
VENDORS = {
    "npu": ("Ascend910B1", "torch-npu", ascend.kernels),
    "hpu": ("gaudi2", "habana-torch-plugin", gaudi.kernels),
}
NEWEST = {"npu": "2.13.0", "hpu": "1.19.0"}


@contextmanager
def pretend(target: Target, version: str = "") -> Iterator[None]:
    """CPU tensors count as tensors of ``target``, whose package is here in release ``version``."""
    with ExitStack() as stack:
        for module in (attention, attention_training, fp4_linear, fp4_quantize, backend):
            stack.enter_context(patch.object(module, "get_target", lambda device=None: target))
        stack.enter_context(patch.object(vendor_operators, "is_present", lambda kind: kind == target.device_type))
        stack.enter_context(patch.object(device_vendors, "installed_version", lambda name: version or None))
        registry.forget_choices()
        try:
            yield
        finally:
            registry.forget_choices()


@contextmanager
def vendor(kind: str, version: str = "", arch: str = "") -> Iterator[Release]:
    """A machine of that vendor, its package in a release (the newest by default)."""
    device, package, kernels = VENDORS[kind]
    version = version or NEWEST[kind]
    with release(package, version, kernels(version)) as opened, pretend(catalog_target(arch or device), version):
        yield opened


@contextmanager
def intel_gpu(version: str = "") -> Iterator[list[str]]:
    """An Intel GPU: PyTorch's own operators have kernels there; Triton's are left out, nothing here could run them.

    With ``version``, the recorded schemas of that PyTorch hold the calls too, not only those of the installed one.
    """
    target = catalog_target("pvc")
    with ExitStack() as stack:
        kernels = stack.enter_context(intel.kernels_of(version)) if version else intel.KERNELS
        calls = stack.enter_context(intel.flash_kernels(kernels=kernels))
        stack.enter_context(pretend(replace(target, features=target.features - {"triton"})))
        yield calls


def results(
    form: Form,
    dtype: torch.dtype,
    seed: int = 0,
    all_gradients: bool = True,
    device: str = "cpu",
    call: Callable[..., Any] | None = None,
) -> list[tuple[str, float, float]]:
    """``(name, error, allowed error)`` of output, ``lse`` and gradients through the operator and autograd.

    Args:
        all_gradients: those of captured tensors too.
        device: where the operator runs.
        call: what runs in its place, with its arguments; ``lse`` may be missing from its results.
    """
    tensors, captured = form.inputs(dtype, seed)
    leaves = [t.detach().requires_grad_() for t in tensors]
    leaves += [t.detach().requires_grad_(all_gradients and t.is_floating_point()) for t in captured]
    names = ["out", "lse", "grad_q", "grad_k", "grad_v", *(f"grad_captured_{n}" for n in range(len(captured)))]
    placed = [t.detach().to(device).requires_grad_(t.requires_grad) for t in leaves]
    ours = [t if t is None else t.cpu() for t in _through_operator(form, placed, call)]
    plain = _with_gradients(form, leaves, lambda *t: eager(form, *t[:3], list(t[3:]), SEED))
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in leaves]
    truth = _with_gradients(form, wide, lambda *t: _reference(form, t))
    found = []
    for name, value, other, exact in zip(names, ours, plain, truth, strict=True):
        if name == "lse" and value is None:
            continue
        if exact is None:
            assert value is None, f"{name}: a gradient out of nothing"
            continue
        assert value is not None and value.shape == exact.shape, f"{name}: {value}"
        assert torch.equal(value.isnan(), exact.isnan()), f"{name}: NaN in other places"
        terms = ours[0].numel() // value.numel() if name.startswith("grad_captured") else 1
        # two roundings, and gradients that are zero but for what cancels
        floor = max(1, terms) ** 0.5 * 2 * torch.finfo(torch.float32).eps * (_size(exact) + 1e-3)
        found.append((name, _distance(value, exact), 2 * _distance(other, exact) + floor))
    return found


def _through_operator(form: Form, leaves: list[Tensor], call: Callable[..., Any] | None) -> list[Tensor | None]:
    q, k, v, *captured = leaves
    seed = SEED.to(q.device) if form.dropout_p else None
    run = torch.ops.vblackwell.attention if call is None else call
    arguments = q, k, v, captured, form.scale, form.dropout_p, seed, form.function.dumps()
    return _with_gradients(form, leaves, lambda *_: run(*arguments))


def _reference(form: Form, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return attention_reference(
        *tensors[:3], list(tensors[3:]), form.scale, form.dropout_p, SEED, form.function.dumps()
    )  # fmt: skip


def _with_gradients(form: Form, leaves: list[Tensor], run) -> list[Tensor | None]:
    out, lse = (*run(*leaves), None)[:2]
    wanted = [t for t in leaves if t.requires_grad]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    gradients = iter(torch.autograd.grad(out, wanted, upstream, allow_unused=True))
    return [
        out.detach(),
        None if lse is None else lse.detach(),
        *(next(gradients) if t.requires_grad else None for t in leaves),
    ]


def _distance(value: Tensor, exact: Tensor) -> float:
    difference = (value.double() - exact.double()).masked_fill(value.double() == exact.double(), 0.0)
    return float(difference.nan_to_num().norm())


def _size(exact: Tensor) -> float:
    return float(exact.nan_to_num(posinf=0, neginf=0).norm())
