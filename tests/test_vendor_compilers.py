"""Where rewritten graphs go on devices that Inductor does not compile for, and what is said about it."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import fx, nn
from vendors.trial import pretend

from vbcompile import backend, said_once, vendor_compilers
from vbcompile.config import resolve_config
from vbcompile.device import Target
from vbcompile.device_catalog import catalog_target
from vbcompile.passes import pipeline
from vbcompile.vendor_compilers import Compiler, choose_compiler, compile_by_vendor


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(said_once, "_said", set())
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)


def register(monkeypatch, *names):
    monkeypatch.setattr(vendor_compilers.compat, "is_registered_backend", lambda name: name in names)


def graph(with_own=False) -> fx.GraphModule:
    class Model(nn.Module):
        def forward(self, x):
            return (
                torch.ops.vblackwell.attention.default(x, x, x, [], 1.0, 0.0, None, "")[0] if with_own else (x.relu(),)
            )

    from vbcompile.kernels import attention  # noqa: F401  # registers the operator

    return fx.symbolic_trace(Model())


def chosen(arch, with_own=False, **options) -> Compiler:
    return choose_compiler(resolve_config(options=options), catalog_target(arch), graph(with_own))


@pytest.mark.parametrize("arch", ["cpu", "sm_90", "gfx942", "pvc"])
def test_inductor_where_it_compiles(arch):
    assert chosen(arch) == Compiler("inductor")


@pytest.mark.parametrize("arch", ["cpu", "Ascend910B1", "gaudi2"])
@pytest.mark.parametrize("name", ["inductor", "aot_eager", "eager"])
def test_the_user_has_the_last_word(arch, name):
    assert chosen(arch, downstream=name).name == name


def test_ascend(monkeypatch):
    register(monkeypatch, "npu")
    assert chosen("Ascend910B1").name == "npu"
    assert chosen("Ascend910B1", with_own=True).name == "aot_eager"
    assert "operators that the passes put in" in chosen("Ascend910B1", with_own=True).reason
    register(monkeypatch)
    assert chosen("Ascend910B1") == Compiler(
        "aot_eager", "torch-npu (no version known) registered no compiler, and Inductor has none for Ascend"
    )


def test_gaudi(monkeypatch):
    register(monkeypatch, "hpu_backend")
    assert chosen("gaudi2", with_own=True).name == "hpu_backend"
    register(monkeypatch)
    assert chosen("gaudi2").name == "aot_eager" and "registered no compiler" in chosen("gaudi2").reason


@pytest.mark.parametrize(("value", "name"), [("1", "eager"), ("0", "hpu_backend")])
def test_lazy_mode_of_the_environment(monkeypatch, value, name, caplog):
    register(monkeypatch, "hpu_backend")
    monkeypatch.setenv("PT_HPU_LAZY_MODE", value)
    compiler = chosen("gaudi2")
    assert compiler.name == name
    if name == "eager":
        with caplog.at_level(logging.WARNING):
            vendor_compilers.say_once(compiler)
            vendor_compilers.say_once(compiler)
        assert [r.message for r in caplog.records] == [f"graphs go to {compiler}"]
        assert compiler.reason.startswith("lazy mode of habana-torch-plugin (no version known) is on")
        assert "set PT_HPU_LAZY_MODE=0 in the environment before Python starts" in compiler.reason


@pytest.mark.parametrize("lazy", [True, False])
def test_lazy_mode_of_the_release(monkeypatch, lazy):
    register(monkeypatch, "hpu_backend")
    names = ["habana_frameworks", "habana_frameworks.torch", "habana_frameworks.torch.utils"]
    for name in [*names, "habana_frameworks.torch.utils.internal"]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["habana_frameworks.torch.utils.internal"].is_lazy = lambda: lazy
    assert chosen("gaudi2").name == ("eager" if lazy else "hpu_backend")


@pytest.mark.parametrize(("vendor", "kind", "arch"), [("intel", "xpu", "bmg"), ("amd", "cuda", "gfx942")])
def test_no_triton(vendor, kind, arch):
    compiler = choose_compiler(resolve_config(), Target(vendor, kind, arch), graph())
    assert compiler.name == "aot_eager" and vendor in compiler.reason


def test_a_failing_compiler_is_replaced(monkeypatch, caplog):
    def refuse(gm, inputs):
        raise NotImplementedError("no converter for aten.relu")

    monkeypatch.setattr(vendor_compilers.compat, "registered_backend", lambda name: refuse)
    x = torch.tensor([-1.0, 1.0])
    (out,) = compile_by_vendor(Compiler("npu"), graph(), [x], strict=False)(x)
    assert torch.equal(out, x.relu())
    assert "npu does not compile this graph (NotImplementedError: no converter for aten.relu)" in caplog.text
    with pytest.raises(NotImplementedError):
        compile_by_vendor(Compiler("npu"), graph(), [x], strict=True)


@pytest.mark.parametrize("fails", [False, True])
def test_memory_mode_under_a_compiler_that_takes_no_plan(fails, monkeypatch, caplog):
    def compile_it(gm, inputs):
        if fails:
            raise NotImplementedError("no converter")
        return gm.forward

    torch._dynamo.reset()
    monkeypatch.setattr(backend, "choose_compiler", lambda *_: Compiler("npu"))
    monkeypatch.setattr(vendor_compilers.compat, "registered_backend", lambda name: compile_it)
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with backend.collected_reports() as reports:
        torch.compile(nn.Sequential(layer, nn.GELU(), layer), backend="vblackwell", options={"mode": "memory"})(x)
    found = [d.reason for d in reports[0].decisions]
    assert "npu decides alone what is saved" in found[0] and "npu decides alone" in caplog.text
    assert any("kept for the backward" in reason for reason in found) == fails  # AOT eager follows the plan


@pytest.mark.parametrize(
    ("arch", "version", "expected"),
    [
        ("Ascend310P3", "", "npu_fusion: needs an Ascend 910B, 910_93 or 950, this is Ascend310P3"),
        (
            "Ascend910B1",
            "2.0.1",
            "npu_fusion: npu::npu_fusion_attention needs 2.1 or later of torch-npu (found 2.0.1); plain PyTorch runs",
        ),
    ],
)
def test_passes_without_a_kernel_say_why(arch, version, expected):
    target = Target("huawei", "npu", arch)
    with pretend(target, version):
        reason = pipeline._no_attention_kernel(target)
    assert reason.startswith(f"no fused attention kernel for huawei {arch}, the model's own operators run (")
    assert expected in reason and "NVIDIA" not in reason


@pytest.mark.parametrize("arch", ["Ascend910B1", "gaudi2", "pvc", "cpu", "sm_90"])
def test_passes_with_a_kernel_run(arch):
    assert pipeline._no_attention_kernel(catalog_target(arch)) is None


def test_fp4_on_an_older_ascend():
    reason = pipeline._no_fp4_kernel(catalog_target("Ascend910B1"))
    assert reason is not None and "weights keep their precision" in reason
    assert "npu_mxfp4: needs the FP4 units of an Ascend 950, this is Ascend910B1" in reason
