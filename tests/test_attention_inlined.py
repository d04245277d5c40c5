"""Attention by PyTorch's own operators is in the compiled graph itself, without a call of ours, and equally right."""

import copy

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from vbcompile.config import resolve_config
from vbcompile.device import Target
from vbcompile.kernels.registry import force
from vbcompile.passes.attention import fuse_attention
from vbcompile.passes.implementation_choice import explain_choices
from vbcompile.passes.pass_context import PassContext

OURS, THEIRS = "ops.vblackwell.attention", "_scaled_dot_product_flash_attention_for_cpu"
THEIRS_ON_GPU = "_scaled_dot_product_cudnn_attention.default("
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def plain(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v


def causal(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return torch.softmax((q @ k.transpose(-2, -1) * 0.25).masked_fill(~keep, -torch.inf), -1) @ v


def grouped(q, k, v):
    return plain(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1))


def padded(q, k, v):
    keep = torch.arange(k.shape[-2]) < torch.tensor([7, 12])[:, None, None, None]
    return torch.softmax((q @ k.transpose(-2, -1) * 0.25).masked_fill(~keep, -torch.inf), -1) @ v


def narrow_values(q, k, v):
    return plain(q, k, v[..., :5])


def capped(q, k, v):
    return torch.softmax(torch.tanh(q @ k.transpose(-2, -1) * 0.25) * 20, -1) @ v


def heads(dtype=torch.float32, rows=12, width=16, requires_grad=False):
    return [torch.randn(2, 4, rows, width, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def compiled(function, **options):
    return torch.compile(function, backend="vblackwell", options=options or None)


def code(function, *inputs, **options):
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        result, sources = run_and_get_code(compiled(function, **options), *inputs)
    return result, "\n".join(sources)


FUSED = (plain, causal, grouped, padded, narrow_values)


def everything(q, k, v):
    return tuple(function(q, k, v) for function in (*FUSED, capped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(dtype):
    """The last form is one that no fused operator computes: it is compiled from its meaning."""
    inputs = heads(dtype)
    results, source = code(everything, *inputs)
    assert source.count(f"{THEIRS}.default(") == len(FUSED) and OURS not in source
    exact = everything(*(t.double() for t in inputs))
    for got, eager, want in zip(results, everything(*inputs), exact, strict=True):
        assert (got - want).abs().max() <= 2 * (eager - want).abs().max() + 1e-7


def test_training_keeps_our_operators():
    inputs = heads(requires_grad=True)
    result, source = code(causal, *inputs)
    assert result.requires_grad and OURS in source


def test_dropout_stays_ours():
    def dropped(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    _, source = code(dropped, *heads())
    assert OURS in source


def test_sizes_that_change_stay_ours():
    run = compiled(plain)
    for rows in (12, 9, 15):
        inputs = heads(rows=rows)
        torch.testing.assert_close(run(*inputs), plain(*inputs))


def test_a_forced_implementation_is_followed():
    with force(attention="reference"):
        _, source = code(plain, *heads())
    assert OURS in source
    inputs = heads(torch.bfloat16)
    got, source = code(padded, *inputs, implementations={"attention": "reference"})
    assert OURS not in source and THEIRS not in source and "extern_kernels.bmm(" not in source  # sums
    want = padded(*(t.double() for t in inputs))
    assert (got - want).abs().max() <= 2 * (padded(*inputs) - want).abs().max()
    _, source = code(plain, *heads(), implementations={"attention": "cpu_flash"})
    assert THEIRS in source


def implementations(rows, function=plain, **options):
    """As the report of a Hopper card names them."""
    target = Target("nvidia", "cuda", "sm_90", multiprocessors=132, features=frozenset({"triton", "bf16", "tma"}))
    found = []

    def backend(gm, example_inputs):
        rewritten = copy.deepcopy(gm)
        context = PassContext(resolve_config(None, options), target, False, False, list(example_inputs))
        found.extend(explain_choices(rewritten, target, False, fuse_attention(rewritten, context)))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*heads(torch.bfloat16, rows=rows, width=128))
    torch._dynamo.reset()
    return [decision.implementation for decision in found]


def test_small_calls_run_by_the_operator_that_costs_the_host_least():
    (small,) = implementations(256)
    assert small.startswith(("cudnn, since", "flash_attention_2, since")) and "otherwise hopper" in small
    (large,) = implementations(1024)
    (graphs,) = implementations(256, inductor_mode="reduce-overhead")
    (named,) = implementations(256, implementations={"attention": "triton"})
    (eager,) = implementations(256, downstream="aot_eager")
    assert all(how.startswith("hopper (not") for how in (large, graphs, named, eager))


def test_the_smallest_calls_that_no_fused_operator_computes_are_compiled_from_their_meaning():
    (small,) = implementations(12, capped)
    (larger,) = implementations(256, capped)
    assert small.startswith("reference, since") and not larger.startswith("reference")


@pytest.mark.gpu
def test_small_calls_on_a_gpu():
    inputs = [torch.randn(2, 4, n, 128, dtype=torch.bfloat16, device="cuda") for n in (1, 300, 300)]
    inputs[1:] = [t[:, :2] for t in inputs[1:]]
    repeated = lambda q, k, v: plain(q, *(t.repeat_interleave(2, 1) for t in (k, v)))
    got, source = code(repeated, *inputs)
    assert ("flash_attention.default(" in source) == (torch.version.hip is None)
    want = repeated(*(t.double() for t in inputs))
    assert (got - want).abs().max() <= 2 * (repeated(*inputs) - want).abs().max()


@pytest.mark.gpu
def test_the_smallest_masked_calls_on_a_gpu():
    inputs = [torch.randn(2, 4, n, 128, dtype=torch.bfloat16, device="cuda") for n in (1, 40, 40)]
    keep = torch.rand(2, 1, 1, 40, device="cuda") > 0.4
    keep[..., 0] = True
    masked = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, keep)
    got, source = code(masked, *inputs)
    assert OURS not in source and "bmm(" not in source
    want = masked(*(t.double() for t in inputs))
    assert (got - want).abs().max() <= 2 * (masked(*inputs) - want).abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("function", [plain, grouped])
def test_on_a_gpu(function):
    """Head size 96 is cuDNN's on Hopper, FlashAttention-2's elsewhere on NVIDIA."""
    if torch.version.hip:
        pytest.skip("on AMD our own kernel runs")
    inputs = [torch.randn(2, 4, 1024, 96, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    got, source = code(function, *inputs)
    expected = THEIRS_ON_GPU if torch.cuda.get_device_capability() in ((9, 0), (10, 0)) else "flash_attention.default("
    assert expected in source and OURS not in source
    want = function(*(t.double() for t in inputs))
    assert (got - want).abs().max() <= 2 * (function(*inputs) - want).abs().max()
