"""The backend end to end on a GPU: training and inference against eager PyTorch, with a float64 reference.

Rule: our error against float64 is at most twice that of eager PyTorch in the model's own dtype, plus what another order
of summation may cost.
"""

import copy

import pytest
import torch
from causal_block import Block
from torch import nn
from torch._dynamo.utils import counters

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]
DEVICE = "cuda"
ROUNDING = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4, torch.float32: 1e-6}


def grouped_block(**settings):
    return Block(width=256, kv_heads=2, **settings)


def compiled(model, **keywords):
    options = None if "mode" in keywords else {"strict": True}
    return torch.compile(model, backend="vblackwell", options=options, **keywords)


def run(model, call, x, training):
    """Output and, in training, the gradients of all parameters and of the input."""
    x = x.clone().requires_grad_(training)
    with torch.set_grad_enabled(training):
        out = call(x)
    results = {"out": out.detach()}
    if training:
        model.zero_grad()
        out.square().mean().backward()
        results |= {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    return {name: t.clone() for name, t in results.items()}


def assert_as_exact_as_eager(model, call, x, training):
    """``call`` computes what ``model`` does; both are compared with float64."""
    exact_model = copy.deepcopy(model).double()
    exact = run(exact_model, exact_model, x.double(), training)
    eager, ours = (run(model, f, x, training) for f in (model, call))
    for name, want in exact.items():
        scale = want.norm().item() + 1e-30
        errors = [((t[name].double() - want).norm() / scale).item() for t in (ours, eager)]
        assert ours[name].dtype == eager[name].dtype
        assert errors[0] <= 2 * errors[1] + ROUNDING[ours[name].dtype], (name, errors)


def implementations(reports):
    return [d.implementation for r in reports for d in r.decisions if d.action == "rewritten"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_training_is_as_exact_as_eager(dtype, reports):
    model = nn.Sequential(grouped_block(), grouped_block()).to(DEVICE, dtype)
    x = torch.randn(2, 512, 256, device=DEVICE, dtype=dtype)
    assert_as_exact_as_eager(model, compiled(model), x, training=True)
    assert counters["vblackwell"]["fuse_attention"] == 2
    chosen = implementations(reports)
    assert len(chosen) == 2 and all(not c.startswith("reference") and "backward: reference" not in c for c in chosen)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_is_as_exact_as_eager(context):
    model = grouped_block().to(DEVICE, torch.bfloat16).eval()
    x = torch.randn(2, 300, 256, device=DEVICE, dtype=torch.bfloat16)
    call = compiled(model)
    with context():
        assert_as_exact_as_eager(model, call, x, training=False)
    assert counters["vblackwell"]["fuse_attention"] == 1


def test_dynamic_shapes_fuse_once_and_stay_right():
    model = grouped_block().to(DEVICE, torch.bfloat16)
    call = compiled(model, dynamic=True)
    for size in (65, 128, 333):
        x = torch.randn(2, size, 256, device=DEVICE, dtype=torch.bfloat16)
        assert_as_exact_as_eager(model, call, x, training=True)
    assert counters["stats"]["unique_graphs"] == 1


def test_sizes_that_change_down_to_empty():
    model = grouped_block().to(DEVICE)
    call = compiled(model)
    for shape in ((2, 64, 256), (3, 64, 256), (3, 80, 256), (0, 80, 256), (1, 1, 256)):
        x = torch.randn(shape, device=DEVICE)
        torch.testing.assert_close(call(x), model(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_cuda_graphs(training):
    model = grouped_block().to(DEVICE, torch.bfloat16).train(training)
    call = compiled(model, mode="reduce-overhead")
    for _ in range(4):  # warm-up, recording, two replays, fresh data each
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(2, 256, 256, device=DEVICE, dtype=torch.bfloat16)
        assert_as_exact_as_eager(model, call, x, training)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["vblackwell"]["fuse_attention"] == 1


def test_cuda_graphs_draw_new_dropout_masks():
    model = grouped_block(dropout=0.5).to(DEVICE, torch.bfloat16)
    call = compiled(model, mode="reduce-overhead")
    x = torch.randn(2, 128, 256, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        results.append(call(x).detach().clone())
    assert all(not torch.equal(results[i], results[j]) for i in range(5) for j in range(i))


def test_autocast():
    model = grouped_block().to(DEVICE)
    x = torch.randn(2, 256, 256, device=DEVICE)
    call = compiled(model)

    def under(f):
        def wrapped(t):
            with torch.autocast(DEVICE, torch.bfloat16):
                return f(t)

        return wrapped

    exact_model = copy.deepcopy(model).double()
    exact = run(exact_model, exact_model, x.double(), True)
    eager, ours = (run(model, under(f), x, True) for f in (model, call))
    for name, want in exact.items():
        errors = [((t[name].double() - want).norm() / want.norm()).item() for t in (ours, eager)]
        assert ours[name].dtype == eager[name].dtype
        assert errors[0] <= 2 * errors[1] + 1e-3, (name, errors)


def test_a_named_mode_brings_mixed_precision(reports):
    model = grouped_block().to(DEVICE)
    x = torch.randn(2, 256, 256, device=DEVICE)
    call = compiled(model, mode="balanced")
    ours, eager = run(model, call, x, True), run(model, model, x, True)
    assert [r.count("rewritten", "mixed_precision") for r in reports] == [1]
    for name, want in eager.items():
        assert ours[name].dtype == want.dtype == torch.float32
        assert not torch.equal(ours[name], want)
        assert (ours[name] - want).norm() <= 2e-2 * want.norm(), name


def test_without_a_mode_float32_stays_float32(reports):
    model = grouped_block().to(DEVICE)
    x = torch.randn(2, 256, 256, device=DEVICE)
    assert_as_exact_as_eager(model, compiled(model), x, training=True)
    assert [r.count("rewritten", "mixed_precision") for r in reports] == [0]


def test_dropout_repeats_with_the_seed_and_stops_in_evaluation():
    model = grouped_block(dropout=0.25).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 200, 256, device=DEVICE, dtype=torch.bfloat16)
    call = compiled(model)

    def seeded(seed):
        torch.manual_seed(seed)
        return run(model, call, x, True)

    first, again, other = seeded(1), seeded(1), seeded(2)
    torch.testing.assert_close(first, again, atol=1e-4, rtol=1e-2)
    assert not torch.equal(first["out"], other["out"])
    model.eval()
    assert_as_exact_as_eager(model, call, x, training=False)


def test_dropout_is_unbiased_and_its_gradient_uses_the_same_mask():
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 128, 64, device=DEVICE) for _ in range(3))

    def attend(q, k, v):
        return nn.functional.dropout((q @ k.mT / 8).softmax(-1), 0.5) @ v

    call = torch.compile(attend, backend="vblackwell", options={"strict": True})
    torch.manual_seed(4)
    mean = sum(call(q, k, v) for _ in range(400)) / 400
    want = (q @ k.mT / 8).softmax(-1) @ v
    spread = ((q @ k.mT / 8).softmax(-1).square() @ v.square()).sqrt() / 20  # standard error of the mean at p = 1/2
    assert ((mean - want) / spread).square().mean().sqrt() < 1.2
    assert counters["vblackwell"]["fuse_attention"] == 1
    # the output is linear in v: with one mask, <grad_v, direction> is the output's change exactly
    direction = torch.randn_like(v)
    torch.manual_seed(5)
    moved = call(q, k, v + direction)
    torch.manual_seed(5)
    leaf = v.clone().requires_grad_()
    out = call(q, k, leaf)
    weight = torch.randn_like(out)
    out.backward(weight)
    change = ((moved - out) * weight).sum()
    torch.testing.assert_close((leaf.grad * direction).sum(), change, rtol=2e-2, atol=0.5)


def test_a_large_learned_bias_and_its_gradient():
    bias = torch.randn(4, 384, 384)
    bias[:, :, 5:9] -= 1e4  # some keys all but masked
    model = grouped_block(bias=bias).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 384, 256, device=DEVICE, dtype=torch.bfloat16)
    assert_as_exact_as_eager(model, compiled(model), x, training=True)
    assert counters["vblackwell"]["fuse_attention"] == 1


def test_a_padding_mask_of_the_lowest_float():
    """A mask as Transformers builds it; the second sequence is masked completely."""

    def masked(q, k, v, mask):
        return (q @ k.mT / 8 + mask).softmax(-1) @ v

    q, k, v = (torch.randn(2, 4, 300, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    keep = torch.arange(300, device=DEVICE) < torch.tensor([[200], [0]], device=DEVICE)
    mask = torch.zeros(2, 1, 300, 300, device=DEVICE, dtype=q.dtype)
    mask.masked_fill_(~keep[:, None, None], torch.finfo(q.dtype).min)
    got = torch.compile(masked, backend="vblackwell", options={"strict": True})(q, k, v, mask)
    exact = masked(*(t.double() for t in (q, k, v, mask)))
    eager = masked(q, k, v, mask)
    errors = [(t.double() - exact).norm().item() for t in (got, eager)]
    assert errors[0] <= 2 * errors[1]
    assert counters["vblackwell"]["fuse_attention"] == 1


def test_a_compiled_step_never_waits_for_the_device():
    model = grouped_block(dropout=0.1).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 256, 256, device=DEVICE, dtype=torch.bfloat16)
    call = compiled(model)
    run(model, call, x, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(model, call, x, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_of_transformers(attention, reports):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation=attention,
    )
    model = transformers.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    tokens = torch.randint(512, (2, 256), device=DEVICE)
    exact_model = copy.deepcopy(model).double()
    runs = []
    for instance, call in ((exact_model, exact_model), (model, model), (model, compiled(model))):
        instance.zero_grad()
        result = call(input_ids=tokens, labels=tokens)
        result.loss.backward()
        runs.append({"logits": result.logits.detach()} | {n: p.grad.clone() for n, p in instance.named_parameters()})
    exact, eager, ours = runs
    for name, want in exact.items():
        errors = [((t[name].double() - want).norm() / want.norm()).item() for t in (ours, eager)]
        assert errors[0] <= 2 * errors[1] + 1e-3, (name, errors)
    assert counters["vblackwell"]["fuse_attention"] == 3
    assert len(implementations(reports)) == 3
